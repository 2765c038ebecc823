"""The decoder: masks, caches, padding, dropout, hooks, and its options under torch.func."""

from dataclasses import replace

import pytest
import torch
from torch.func import grad, jvp, vmap

from msfs_functional import random
from msfs_functional.attention import attention
from msfs_functional.losses import cross_entropy, linear_cross_entropy
from msfs_functional.models.decoder import (
    DECAY,
    PRESETS,
    DecoderConfig,
    block,
    decoder,
    fuse,
    gpt2,
    output_weight,
)
from msfs_functional.params import Params, by_rules
from msfs_functional.rotary import Scaling, frequencies, rotary_table, rotate
from msfs_functional.transforms import remat

SIZES = {"vocab": 23, "width": 16, "depth": 3, "heads": 4, "hidden": 24, "max_length": 32}
GPT2 = gpt2(**SIZES)
LLAMA = DecoderConfig(**SIZES, kv_heads=2)
EVERYTHING = DecoderConfig(
    **SIZES,
    kv_heads=1,
    head_dim=6,
    norm_offset=True,
    post_norm=True,
    qk_norm=True,
    rotary_scaling=Scaling("yarn", 2.0, original_length=16),
    windows=(3, None),
    attention_scale=0.3,
    attention_softcap=4.0,
    logit_softcap=5.0,
    activation="gelu_tanh",
    qkv_bias=True,
    output_bias=True,
    hidden_bias=True,
    tied=False,
    embedding_scale=4.0,
    dropout=0.1,
    attention_dropout=0.1,
)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "everything": EVERYTHING}
MODELS = {name: decoder(config) for name, config in CONFIGS.items()}
MODELS["one"] = decoder(replace(LLAMA, depth=1, windows=(3,)))


def build(name: str, seed: int = 0, dtype=torch.float64) -> Params:
    """Parameters away from their neutral initial values."""
    params = MODELS[name].init(seed, dtype=dtype)
    keys = random.split(random.key(seed + 100), len(params))
    return {
        key: value + 0.2 * random.normal(k, value.shape, dtype=dtype)
        for k, (key, value) in zip(keys, params.items(), strict=True)
    }


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 23, shape, generator=torch.Generator().manual_seed(seed))


each_config = pytest.mark.parametrize("name", CONFIGS)


@each_config
@pytest.mark.parametrize("implementation", ["flash", "reference"])
def test_cached_decode_equals_full_forward(name, implementation):
    """In pieces of 4, 2 and 1 tokens, the last at positions given for every row."""
    model, params, ids = MODELS[name], build(name), tokens(3, 8)
    options = {"method": "decode", "implementation": implementation}
    expected = model.apply(params, ids, implementation="reference")
    cache = model.apply(params, 3, 9, method="init_cache", dtype=torch.float64)
    logits = []
    for start, end, position in (
        (0, 4, 0),
        (4, 6, torch.tensor(4)),
        (6, 7, torch.tensor([6, 6, 6])),
        (7, 8, 7),
    ):
        part, cache = model.apply(params, ids[:, start:end], cache, position, **options)
        logits.append(part)
    torch.testing.assert_close(torch.cat(logits, 1), expected)


@each_config
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_decode_as_they_do_alone(name, side):
    model, params, ids, new = MODELS[name], build(name), tokens(3, 6), tokens(3, 3, seed=1)
    lengths = torch.tensor([6, 2, 4])
    pads = 6 - lengths
    rows = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    whole = [
        model.apply(params, torch.cat([row, extra])[None], implementation="reference")[0]
        for row, extra in zip(rows, new, strict=True)
    ]
    padded = torch.full((3, 6), 22)
    for i, row in enumerate(rows):
        padded[i, slice(pads[i], None) if side == "left" else slice(lengths[i])] = row
    cache = model.apply(params, 3, 10, method="init_cache", dtype=torch.float64)
    left = {"pads": pads} if side == "left" else {}
    logits, cache = model.apply(params, padded, cache, method="decode", **left)
    for i, n in enumerate(lengths):
        own = logits[i, pads[i] :] if side == "left" else logits[i, :n]
        torch.testing.assert_close(own, whole[i][:n])
    for t in range(3):
        at = lengths + t
        step, cache = model.apply(params, new[:, t : t + 1], cache, at, method="decode")
        for i, n in enumerate(lengths):
            torch.testing.assert_close(step[i, 0], whole[i][n + t])


@each_config
@pytest.mark.parametrize("implementation", ["flash", "reference"])
def test_packed_documents_equal_documents_alone(name, implementation):
    model, params, ids = MODELS[name], build(name), tokens(1, 9)
    cuts = (slice(0, 4), slice(4, 6), slice(6, 9))
    segments = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    options = {"segment_ids": segments, "positions": positions, "implementation": implementation}
    packed = model.apply(params, ids, **options)
    for cut in cuts:
        torch.testing.assert_close(packed[:, cut], model.apply(params, ids[:, cut]))


@each_config
def test_the_future_and_padding_are_hidden_and_a_prefix_is_seen(name):
    model, params, ids = MODELS[name], build(name), tokens(2, 8)
    lengths, changed = torch.tensor([5, 8]), ids.clone()
    changed[0, 5:] = changed[0, 5:] % 22 + 1
    changed[1, 6] = changed[1, 6] % 22 + 1
    before = model.apply(params, ids, key_lengths=lengths)
    after = model.apply(params, changed, key_lengths=lengths)
    torch.testing.assert_close(after[0, :5], before[0, :5])
    torch.testing.assert_close(after[1, :6], before[1, :6])
    assert (after[1, 6:] != before[1, 6:]).any(-1).all()
    prefix = torch.tensor([0, 7])
    before = model.apply(params, ids, prefix_lengths=prefix)
    after = model.apply(params, changed, prefix_lengths=prefix)
    assert (after[1] != before[1]).any(-1).all()
    torch.testing.assert_close(after[0, :5], before[0, :5])
    cache = model.apply(params, 2, 9, method="init_cache", dtype=torch.float64)
    cached, _ = model.apply(params, changed, cache, method="decode", prefix_lengths=prefix)
    torch.testing.assert_close(cached, after)


def test_a_window_hides_what_lies_further_back():
    params, ids = build("one"), tokens(1, 8)
    changed = ids.clone()
    changed[0, 2] = changed[0, 2] % 22 + 1
    before, after = (MODELS["one"].apply(params, x)[0] for x in (ids, changed))
    torch.testing.assert_close(after[5:], before[5:])
    assert (after[2:5] != before[2:5]).any(-1).all()


@pytest.mark.parametrize("prefix", [None, (2, 6)])
def test_cached_decode_equals_full_forward_far_beyond_the_window(prefix):
    """A window of 3, 24 tokens: prompts of 9 in two calls (a prefix in one), then one by one."""
    model, params, ids = MODELS["everything"], build("everything"), tokens(2, 24)
    given = {} if prefix is None else {"prefix_lengths": torch.tensor(prefix)}
    expected = model.apply(params, ids, implementation="reference", **given)
    cache = model.apply(params, 2, 24, method="init_cache", dtype=torch.float64)
    logits, cache = model.apply(params, ids[:, :7], cache, method="decode", **given)
    parts = [logits]
    for start, end in ((7, 9), *((t, t + 1) for t in range(9, 24))):
        at = torch.tensor(start)
        logits, cache = model.apply(params, ids[:, start:end], cache, at, method="decode")
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected)


def test_a_prefix_beyond_a_window_is_seen_from_inside_alone():
    params, ids = build("one"), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7] = changed[0, 7] % 22 + 1
    given = {"prefix_lengths": torch.tensor([8])}
    before, after = (MODELS["one"].apply(params, x, **given)[0] for x in (ids, changed))
    assert (after[:10] != before[:10]).any(-1).all()  # in the prefix; then a window of 3
    torch.testing.assert_close(after[10:], before[10:])


@each_config
def test_embeddings_can_stand_in_for_tokens(name):
    model, params, ids = MODELS[name], build(name), tokens(2, 7)
    embeddings = model.apply(params, ids, method="embed")
    expected = model.apply(params, ids)
    torch.testing.assert_close(model.apply(params, None, embeddings=embeddings), expected)
    cache = model.apply(params, 2, 7, method="init_cache", dtype=torch.float64)
    given = {"embeddings": embeddings, "method": "decode"}
    torch.testing.assert_close(model.apply(params, None, cache, **given)[0], expected)


@each_config
def test_fused_projections_give_the_same(name):
    params, ids = build(name), tokens(2, 7)
    fused = decoder(replace(CONFIGS[name], fused=True))
    torch.testing.assert_close(fused.apply(fuse(params), ids), MODELS[name].apply(params, ids))
    assert set(fuse(params)) == set(fused.shapes)


@each_config
def test_hidden_states_and_output_weight_make_the_logits(name):
    model, params, ids = MODELS[name], build(name), tokens(2, 7)
    states = model.apply(params, ids, method="hidden")
    logits, cap = states @ output_weight(params).T, CONFIGS[name].logit_softcap
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(model.apply(params, ids), logits)


def test_dropout_follows_its_key_in_every_implementation():
    model, params, ids = MODELS["everything"], build("everything"), tokens(2, 7)

    def run(seed, implementation):
        key = None if seed is None else random.key(seed)
        return model.apply(params, ids, key=key, implementation=implementation)

    for seed in (None, 1):
        torch.testing.assert_close(run(seed, "flash"), run(seed, "reference"))
    assert not torch.allclose(run(1, "flash"), run(2, "flash"))
    assert not torch.allclose(run(1, "flash"), run(None, "flash"))


def test_around_block_sees_each_block_and_remat_changes_no_gradient():
    model, params, ids = MODELS["everything"], build("everything"), tokens(2, 7)
    seen = []

    def around(fn):
        def run(block_params, *rest):
            seen.append((fn, sorted(block_params)))
            return remat(fn)(block_params, *rest)

        return run

    leaves = {name: value.requires_grad_() for name, value in params.items()}

    def grads(**options):
        logits = model.apply(leaves, ids, key=random.key(1), **options)
        return torch.autograd.grad(logits.square().sum(), list(leaves.values()))

    torch.testing.assert_close(grads(around_block=around), grads())
    names = sorted(n.removeprefix("blocks.0.") for n in params if n.startswith("blocks.0."))
    assert [own for _, own in seen[:3]] == [names] * 3
    assert all(fn.func is block for fn, _ in seen)


def test_attention_can_be_replaced():
    model, params, ids, calls = MODELS["llama"], build("llama"), tokens(2, 7), []

    def own(q, k, v, **options):
        calls.append(options["is_causal"])
        return attention(q, k, v, implementation="reference", **options)

    torch.testing.assert_close(
        model.apply(params, ids, implementation=own), model.apply(params, ids)
    )
    assert calls == [True] * 3


BATCH = torch.cat([tokens(2, 6), torch.tensor([[5, 6, 7, 0, 0, 0]])])


def loss_with(name: str, implementation: str, fused: bool = False, key=None):
    """(params, tokens) -> summed next-token loss of a batch or of one sequence; 0 is padding."""
    model = MODELS[name]

    def loss(params, batch):
        batch = batch.reshape(-1, batch.shape[-1])
        options = {"key": key, "implementation": implementation}
        options["key_lengths"] = (batch[:, :-1] != 0).sum(-1)
        if fused:
            states = model.apply(params, batch[:, :-1], method="hidden", **options)
            return linear_cross_entropy(states, output_weight(params), batch[:, 1:])[0]
        return cross_entropy(model.apply(params, batch[:, :-1], **options), batch[:, 1:])[0]

    return loss


def compositions(name: str):
    params, tangent = build(name), build(name, seed=1)
    stacked = {key: torch.stack([params[key], tangent[key]]) for key in params}
    return {
        "grad": lambda loss: grad(loss)(params, BATCH),
        "vmap(grad)": lambda loss: vmap(grad(loss), in_dims=(None, 0))(params, BATCH),
        "jvp": lambda loss: jvp(lambda p: loss(p, BATCH), (params,), (tangent,)),
        "jvp(grad)": lambda loss: jvp(lambda p: grad(loss)(p, BATCH), (params,), (tangent,)),
        "vmap over members": lambda loss: vmap(grad(loss), in_dims=(0, None))(stacked, BATCH),
    }


@each_config
@pytest.mark.parametrize("composition", compositions("gpt2"))
def test_flash_equals_reference_under_transforms(name, composition):
    compose, key = compositions(name)[composition], random.key(3)
    ours = compose(loss_with(name, "flash", key=key))
    expected = compose(loss_with(name, "reference", key=key))
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-8)
    if CONFIGS[name].logit_softcap is None:
        fused = compose(loss_with(name, "flash", fused=True, key=key))
        torch.testing.assert_close(fused, expected, atol=1e-9, rtol=1e-8)


@each_config
def test_reference_gradients_are_right_by_finite_differences(name):
    params, tangent = build(name), build(name, seed=1)
    loss, step = loss_with(name, "reference", key=random.key(3)), 1e-6
    moved = [
        loss({n: params[n] + sign * step * tangent[n] for n in params}, BATCH) for sign in (1, -1)
    ]
    _, slope = jvp(lambda p: loss(p, BATCH), (params,), (tangent,))
    torch.testing.assert_close(slope, (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-6)
    grads = grad(loss)(params, BATCH)
    product = torch.stack([(grads[n] * tangent[n]).sum() for n in grads]).sum()
    torch.testing.assert_close(product, slope, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("composition", ["grad", "jvp(grad)"])
def test_traced_transforms_equal_eager(composition):
    compose, loss = compositions("one")[composition], loss_with("one", "flash", fused=True)
    traced = torch.compile(lambda: compose(loss), fullgraph=True, backend="aot_eager")()
    expected = compose(loss_with("one", "reference"))
    torch.testing.assert_close(traced, expected, atol=1e-9, rtol=1e-8)


def test_a_call_leaves_the_skeleton_as_it_was():
    model, params = MODELS["everything"], build("everything")
    before = dict(model.skeleton.named_parameters(remove_duplicate=False))
    model.apply(params, tokens(1, 4))
    after = dict(model.skeleton.named_parameters(remove_duplicate=False))
    assert all(after[name] is value for name, value in before.items())


@pytest.mark.parametrize(
    ("preset", "millions"), [("gpt2", 124.4), ("small", 134.5), ("large", 1317)]
)
def test_presets_have_the_published_sizes(preset, millions):
    sizes = decoder(PRESETS[preset]()).shapes.values()
    assert sum(size.numel() for size in sizes) / 1e6 == pytest.approx(millions, rel=0.01)


def test_initial_values_follow_gpt2s_rules():
    params = decoder(gpt2(50, width=128, depth=8, heads=4)).init(0)
    for name, value in params.items():
        if name.endswith("bias"):
            assert (value == 0).all()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            std = 0.005 if name.endswith(("o.weight", "down.weight")) else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.05)
    assert (build("everything")["norm.weight"].abs() < 1).all()  # gains are 1 + weight
    decays = by_rules(DECAY, params)
    assert {name for name, yes in decays.items() if yes} == {
        name for name, value in params.items() if "blocks" in name and value.ndim == 2
    }


def test_rotary_positions_by_hand():
    cosines, sines = rotary_table(torch.tensor([0, 3]), 4, 100.0, dtype=torch.float64)
    angles = torch.tensor([[0, 0], [3, 0.3]], dtype=torch.float64)
    torch.testing.assert_close(cosines, angles.cos())
    turned = rotate(torch.tensor([[1.0, 2, 3, 4]] * 2, dtype=torch.float64), cosines, sines)
    x = torch.tensor([1.0, 2], dtype=torch.float64), torch.tensor([3.0, 4], dtype=torch.float64)
    by_hand = torch.cat(
        [x[0] * angles.cos() - x[1] * angles.sin(), x[1] * angles.cos() + x[0] * angles.sin()], -1
    )
    torch.testing.assert_close(turned, by_hand)


def test_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64)
    for scaling in (None, Scaling("llama3", 8.0, 64), Scaling("yarn", 4.0, 64)):
        products = []
        for start in (0, 10_000):
            table = rotary_table(
                torch.tensor([start, start + 5]), 8, 1e4, scaling, dtype=torch.float64
            )
            at = [tuple(t[i : i + 1] for t in table) for i in (0, 1)]
            products.append((rotate(q, *at[0]) * rotate(k, *at[1])).sum())
        torch.testing.assert_close(*products)


def test_scalings_keep_the_fast_and_slow_down_the_slow():
    plain = frequencies(64, 1e4)
    torch.testing.assert_close(frequencies(64, 1e4, Scaling("linear", 4.0)), plain / 4)
    for kind in ("llama3", "yarn"):
        ratio = plain / frequencies(64, 1e4, Scaling(kind, 4.0, original_length=1024))
        assert ratio[0] == 1 and ratio[-1] == pytest.approx(4)
        assert (ratio.diff() >= -1e-12).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"depth": 0}, "depth"),
        ({"head_dim": 5}, "even"),
        ({"windows": (0,)}, "windows"),
        ({"windows": ()}, "windows"),
        ({"norm_bias": True}, "norm_bias"),
        ({"activation": "tanh"}, "activation"),
        ({"logit_softcap": 0.0}, "logit_softcap"),
        ({"dropout": 1.0}, "dropout"),
        ({"rotary_scaling": {"kind": "ntk", "factor": 2.0}}, "kind"),
        ({"rotary_scaling": {"kind": "linear", "factor": 0.0}}, "factor"),
    ],
)
def test_bad_configurations_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        if "rotary_scaling" in options:
            options = {"rotary_scaling": Scaling(**options["rotary_scaling"])}
        DecoderConfig(**{**SIZES, **options})


def test_bad_calls_are_named():
    model, params, ids = MODELS["llama"], build("llama"), tokens(1, 33)
    with pytest.raises(ValueError, match="33 tokens exceed max_length"):
        model.apply(params, ids)
    with pytest.raises(ValueError, match="embeddings in their place"):
        model.apply(params, None)
    with pytest.raises(ValueError, match="max_length"):
        model.apply(params, 1, 33, method="init_cache")
    cache = model.apply(params, 1, 4, method="init_cache", dtype=torch.float64)
    with pytest.raises(ValueError, match="cache's length"):
        model.apply(params, ids[:, :5], cache, method="decode")
    with pytest.raises(ValueError, match="position 0"):
        options = {"method": "decode", "prefix_lengths": torch.tensor([2])}
        model.apply(params, ids[:, :2], cache, 1, **options)
