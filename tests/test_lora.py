"""Low-rank adapters on every model: they add what the formula says and leave the rest alone."""

import re
from functools import partial

import optree
import pytest
import torch

from msfs_functional import optim, random
from msfs_functional.lora import lora, merge, unmerge
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip
from msfs_functional.models.decoder import DecoderConfig, decoder, gpt2
from msfs_functional.models.transformer import TransformerConfig, transformer
from msfs_functional.models.vit import ViTConfig, clip_vision, vit
from msfs_functional.models.vlm import VLMConfig, vlm
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import value_and_grad

IDS = torch.randint(1, 19, (2, 5), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TEXT = TextConfig(8, 1, 2, 12, vocab=20, max_length=5, eos=19, projection=6)
IMAGE = {"width": 8, "depth": 1, "heads": 2, "hidden": 12, "image": 8, "patch": 4}
SIZES = {"width": 8, "depth": 2, "heads": 2, "hidden": 12}
MODELS = {
    "decoder": (decoder(DecoderConfig(20, **SIZES)), (IDS,)),
    "gpt2": (decoder(gpt2(20, **SIZES)), (IDS,)),
    "transformer": (transformer(TransformerConfig(20, **SIZES)), (IDS, IDS)),
    "vit": (vit(ViTConfig(**IMAGE)), (PIXELS,)),
    "vlm": (
        vlm(VLMConfig(ViTConfig(**IMAGE, pooling=None), DecoderConfig(20, **SIZES), 19)),
        (torch.tensor([[1, 19, 19, 19, 19, 5], [2, 19, 19, 19, 19, 7]]), PIXELS),
    ),
    "clip": (clip(CLIPConfig(clip_vision(**IMAGE, projection=6), TEXT)), (PIXELS, IDS)),
}
EVERY: list = [(r"norm|bias|scale|token|_embedding$", False), (r"weight$", True), (r"", False)]
each_model = pytest.mark.parametrize("name", MODELS)


def trained(adapters):
    """Adapters away from where they start."""
    keys = random.split(random.key(7), len(adapters))
    pairs = zip(keys, adapters.items(), strict=True)
    return {n: v + 0.3 * random.normal(k, v.shape).to(v.dtype) for k, (n, v) in pairs}


def rules_of(params):
    return [rule for rule in EVERY if any(re.search(rule[0], n) for n in params)]


@each_model
def test_every_matrix_of_every_model_takes_adapters(name):
    model, inputs = MODELS[name]
    params = model.init(0)
    adapters, adapt = lora(params, rules_of(params), rank=2, alpha=6.0)
    assert all(torch.equal(v, params[n]) for n, v in adapt(params, adapters).items())
    adapters = trained(adapters)
    adapted = adapt(params, adapters)
    chosen = {n.rpartition(".")[0] for n in adapters}
    assert len(chosen) >= 5
    for n, value in params.items():
        if n in chosen:
            change = 3.0 * adapters[f"{n}.b"] @ adapters[f"{n}.a"]
            torch.testing.assert_close(adapted[n], value + change.reshape(value.shape))
        else:
            assert adapted[n] is value
    before = model.apply(params, *inputs)
    merged, originals = merge(adapt, params, adapters)
    assert set(originals) == chosen
    after = model.apply(merged, *inputs)
    assert torch.equal(after, model.apply(adapted, *inputs)) and not torch.allclose(after, before)
    again = unmerge(merged, originals)
    assert again.keys() == params.keys()
    assert all(torch.equal(value, params[n]) for n, value in again.items())


@each_model
def test_gradients_are_those_of_the_matrix_projected(name):
    model, inputs = MODELS[name]
    params = model.init(0, dtype=torch.float64)
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    adapters, adapt = lora(params, rules_of(params), rank=2, alpha=6.0, dtype=torch.float64)
    adapters = trained(adapters)

    def loss(params):
        return model.apply(params, *inputs).square().mean()

    _, own = value_and_grad(loss)(adapt(params, adapters))
    _, grads = value_and_grad(lambda adapters: loss(adapt(params, adapters)))(adapters)
    for n in {n.rpartition(".")[0] for n in adapters}:
        whole = own[n].flatten(1)
        a, b = adapters[f"{n}.a"], adapters[f"{n}.b"]
        torch.testing.assert_close(grads[f"{n}.a"], 3.0 * b.T @ whole)
        torch.testing.assert_close(grads[f"{n}.b"], 3.0 * whole @ a.T)


def test_training_holds_state_for_adapters_alone():
    """The frozen parameters have no gradient, no optimizer state, and stay what they are."""
    model, (ids,) = MODELS["decoder"]
    params = model.init(0)
    before = {name: value.clone() for name, value in params.items()}
    adapters, adapt = lora(params, [(r"attention\.[qv]\.weight$", True), (r"", False)], rank=1)

    def loss_fn(adapters, batch, key):
        logits = model.apply(adapt(params, adapters), batch)
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
        ), {}

    optimizer = optim.adamw(1e-1)
    state = init_state(adapters, optimizer, random.key(0))
    step = make_step(loss_fn, optimizer, compile=False)
    losses = []
    for _ in range(6):
        state, metrics = step(state, ids)
        losses.append(metrics["loss"].item())
    assert losses[-1] < losses[0] - 0.01
    held = sum(x.numel() for x in optree.tree_leaves(state.opt_state, namespace="msfs_functional"))
    assert held <= 2 * sum(x.numel() for x in adapters.values()) + 2
    assert all(torch.equal(value, before[name]) for name, value in params.items())


def test_half_precision_weights_take_single_precision_adapters():
    params = {"w": torch.ones(4, 6, dtype=torch.bfloat16)}
    adapters, adapt = lora(params, [("w", True)], rank=2)
    adapters = trained(adapters)
    adapted = adapt(params, adapters)["w"]
    assert adapted.dtype == torch.bfloat16 and adapters["w.a"].dtype == torch.float32
    exact = 1 + adapters["w.b"] @ adapters["w.a"]
    assert torch.equal(adapted, exact.bfloat16())


def test_adapters_depend_on_seed_and_name_alone():
    params = {"one": torch.ones(4, 6), "two": torch.ones(4, 6)}
    both = lora(params, [("", True)], rank=2).adapters
    alone = lora({"two": params["two"]}, [("", True)], rank=2).adapters
    assert torch.equal(both["two.a"], alone["two.a"])
    assert not torch.equal(both["two.a"], both["one.a"])
    assert not torch.equal(
        both["two.a"], lora(params, [("", True)], rank=2, seed=1).adapters["two.a"]
    )


PLAIN = {"w": torch.ones(4, 6), "bias": torch.ones(4)}
choose = partial(lora, PLAIN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose([("", True)], 1), r"'bias' has shape \(4,\): only matrices"),
        (lambda: choose([("w", True), ("", False)], 5), r"rank \(5\) .* at most 4"),
        (lambda: choose([("w", True), ("", False)], 0), r"rank \(0\)"),
        (lambda: choose([("", False)], 1), "choose no parameter"),
        (lambda: choose([("q_proj", True), ("", False)], 1), "'q_proj' matches none"),
        (
            lambda: lora({"v": PLAIN["w"]}, [("v", True)], 1).adapt(
                PLAIN, lora({"v": PLAIN["w"]}, [("v", True)], 1).adapters
            ),
            "adapters of 'v' do not fit",
        ),
        (lambda: unmerge(PLAIN, {"v": PLAIN["w"]}), "'v'.* not among"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
