"""Claims of msfs_functional.regions: blocks compiled once, and nothing but faster."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from msfs_functional import optim, random
from msfs_functional.losses import cross_entropy
from msfs_functional.models.decoder import decoder, gpt2
from msfs_functional.models.transformer import tiny, transformer
from msfs_functional.params import stack
from msfs_functional.regions import Regions, region
from msfs_functional.train import init_state, make_step


@pytest.fixture
def counter(compile_with):
    return compile_with(CompileCounterWithBackend("eager"))


def training(depth, compile, lengths=((5, 6),), **options):
    model = transformer(tiny(20, width=8, depth=depth, heads=2, hidden=16, dropout=0.1))

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch["source"], batch["target"][:, :-1], key=key)
        total, tokens = cross_entropy(logits, batch["target"][:, 1:])
        return total / tokens, {"weight": tokens}

    key, params = random.key(0), model.init(0)
    if "members" in options:
        key = random.split(key, options["members"])
        params = stack([model.init(k) for k in key])
    state = init_state(params, optim.sgd(0.1), key)
    step = make_step(loss_fn, optim.sgd(0.1), compile=compile, **options)
    for i, (source, target) in enumerate(lengths):
        g = torch.Generator().manual_seed(i)
        batch = {
            "source": torch.randint(4, 20, (3, source), generator=g),
            "target": torch.randint(4, 20, (3, target), generator=g),
        }
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.parametrize("dynamic", [None, True])
def test_step_of_regions_equals_the_eager_step_over_changing_shapes(counter, dynamic):
    """Dropout included: keys are split inside the regions."""
    lengths = ((5, 6), (7, 4), (8, 8))
    one, metrics = training(1, "regions", lengths, dynamic=dynamic)
    other, expected = training(1, False, lengths)
    for name in one.params:
        torch.testing.assert_close(one.params[name], other.params[name])
    torch.testing.assert_close(metrics["loss"], expected["loss"])


def test_number_of_graphs_does_not_grow_with_depth(counter):
    counts = []
    for depth in (2, 3):
        counter.frame_count = 0
        training(depth, "regions")
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_region_is_the_plain_function_outside_of_a_step_and_under_transforms(counter):
    @region
    def double(x, n):
        return x * n

    x = torch.arange(3.0)
    assert torch.equal(double(x, 2), 2 * x)
    regions = Regions(dynamic=None)
    with regions.compiled():
        assert torch.equal(torch.func.grad(lambda x: double(x, 2).sum())(x), torch.full((3,), 2.0))
        assert counter.frame_count == 0
        assert torch.equal(double(x, 2), 2 * x) and torch.equal(double(x, 3), 3 * x)
    assert counter.frame_count == 2


def test_an_ensemble_in_regions_equals_the_eager_one(counter):
    one, metrics = training(1, "regions", members=3)
    assert counter.frame_count > 5
    other, expected = training(1, False, members=3)
    for name in one.params:
        torch.testing.assert_close(one.params[name], other.params[name])
    torch.testing.assert_close(metrics["loss"], expected["loss"])


def test_members_of_a_region_may_return_none_beside_tensors(counter):
    """As a decoder's block does, whose second result is the cache that it was not given."""

    @region
    def double(x, n):
        return x * n, None

    x, regions = torch.arange(6.0).view(2, 3), Regions(dynamic=False)
    with regions.compiled():
        found = torch.func.vmap(lambda x: double(x, 2)[0] if double(x, 2)[1] is None else x)(x)
    assert torch.equal(found, 2 * x) and counter.frame_count == 1


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_of_a_decoder_leave_their_last_addition_to_the_next_one(counter, dropout):
    """Two terms go from block to block where the first one gets two: one graph, equal gradients."""
    sizes = {"width": 8, "depth": 3, "heads": 2, "hidden": 16, "max_length": 8}
    config = gpt2(20, **sizes, dropout=dropout, attention_dropout=0.0)
    model, tokens = decoder(config), torch.arange(12).view(2, 6)
    params = {name: value.requires_grad_() for name, value in model.init(0).items()}
    taken, call = [], Regions.call

    def seen(self, fn, params, args, kwargs):
        taken.append(type(args[0]))
        return call(self, fn, params, args, kwargs)

    def gradients():
        states = model.apply(params, tokens, method="hidden", key=random.key(1))
        return torch.autograd.grad(states.square().mean(), list(params.values()))

    expected = gradients()
    with pytest.MonkeyPatch.context() as patch, Regions(dynamic=False).compiled():
        patch.setattr(Regions, "call", seen)
        found = gradients()
    for ours, value in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, value)
    terms = tuple if dropout == 0 else torch.Tensor
    assert taken[-3:] == [terms] * 3 and tuple not in taken[:-3]  # after that of the keys
    assert counter.frame_count == 2


def test_an_ensemble_of_decoders_in_regions_equals_the_eager_one(counter):
    config = gpt2(20, width=8, depth=2, heads=2, hidden=16, max_length=8)
    model, batch = decoder(config), {"tokens": torch.arange(14).view(2, 7)}

    def loss_fn(params, batch, key):
        logits = model.apply(params, batch["tokens"][:, :-1])
        total, count = cross_entropy(logits, batch["tokens"][:, 1:], ignore_index=-1)
        return total / count, {}

    after = []
    for compile in ("regions", False):
        key = random.split(random.key(0), 2)
        state = init_state(stack([model.init(k) for k in key]), optim.sgd(0.1), key)
        options = {"compile": compile, "members": 2, "dynamic": False}
        after.append(make_step(loss_fn, optim.sgd(0.1), **options)(state, batch)[0].params)
    for name, value in after[1].items():
        torch.testing.assert_close(after[0][name], value)
