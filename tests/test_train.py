"""Claims of msfs_functional.train, on a small token classifier with dropout."""

import functools

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from msfs_functional import optim, random, train
from msfs_functional import params as P
from msfs_functional.compiling import can_compile, graphed, why_not_compile
from msfs_functional.train import init_state, make_step
from msfs_functional.transforms import in_dtype

VOCAB = 7
NAMES = ("params", "opt_state", "ema", "step", "skipped", "key")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 6)
        self.hidden, self.out = nn.Linear(6, 8), nn.Linear(8, VOCAB)

    def forward(self, source, target, key=None, rate=0.2):
        context = self.embedding(source).mean(1, keepdim=True)
        x = self.hidden(self.embedding(target) + context).tanh()
        return self.out(random.dropout(key, x, rate))


model = P.functional(Net, [(r"", P.normal(0.3))])


def loss_fn(params, batch, key, rate=0.2):
    logits = model.apply(params, batch["source"], batch["target"][:, :-1], key, rate)
    labels, kept = batch["target"][:, 1:], batch["kept"][:, 1:]
    losses = F.cross_entropy(logits.mT, labels, reduction="none")
    weight = kept.sum()
    mean = (losses * kept).sum() / weight.clamp(min=1)
    right = ((logits.argmax(-1) == labels) & kept).sum()
    return mean * batch["scale"], {"weight": weight, "accuracy": right / weight.clamp(min=1)}


certain_loss = functools.partial(loss_fn, rate=0.0)


def make_batch(seed, rows=4, source=5, target=6):
    g = torch.Generator().manual_seed(seed)
    return {
        "source": torch.randint(VOCAB, (rows, source), generator=g),
        "target": torch.randint(VOCAB, (rows, target), generator=g),
        "kept": torch.rand(rows, target, generator=g) > 0.3,
        "scale": torch.tensor(1.0),
    }


def optimizer():
    return optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2))


def new_state(seed=0, dtype=torch.float32, **kwargs):
    key = random.key(seed)
    return init_state(model.init(key, dtype=dtype), optimizer(), key, **kwargs)


def new_ensemble(n, **kwargs):
    keys = random.split(random.key(9), n)
    params = P.stack([model.init(key) for key in keys])
    return init_state(params, optimizer(), keys, **kwargs), keys


def leaves(tree):
    return optree.tree_leaves(tree, namespace="msfs_functional")


def copy(tree):
    return optree.tree_map(lambda t: t.clone(), tree, namespace="msfs_functional")


def assert_trees(a, b, **tolerance):
    for x, y in zip(leaves(a), leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.fixture
def quick_compile(compile_with):
    """torch.compile without code generation: everything but Inductor, in a tenth of the time."""
    compile_with("aot_eager")


@pytest.fixture
def counter(monkeypatch, compile_with):
    """Counts compiled graphs; keys are folded by an addition, which traces in no time."""
    monkeypatch.setattr(random, "fold_in", lambda key, data: key + data)
    return compile_with(CompileCounterWithBackend("eager"))


def test_step_equals_the_loop_written_out():
    state = new_state(ema_decay=0.9)
    step = make_step(loss_fn, optimizer(), ema_decay=0.9, compile=False)
    params, key = copy(state.params), random.key(0)
    opt_state, mean = optimizer().init(params), copy(params)
    for i in range(4):
        batch = make_batch(i)
        here = random.fold_in(key, i)
        grads, (loss, metrics) = torch.func.grad_and_value(loss_fn, has_aux=True)(
            params, batch, here
        )
        updates, opt_state = optimizer().update(grads, opt_state, params)
        params = optim.apply_updates(params, updates)
        mean = {name: 0.9 * mean[name] + 0.1 * params[name] for name in mean}
        state, mine = step(state, batch)
        expected = metrics | {
            "loss": loss,
            "grad_norm": optim.global_norm(grads),
            "skipped": torch.tensor(0),
        }
        assert mine.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(mine[name], value)
            assert not mine[name].requires_grad
    assert_trees((state.params, state.opt_state, state.ema), (params, opt_state, mean))
    assert state.step == 4 and not any(leaf.requires_grad for leaf in leaves(state))


@pytest.mark.parametrize(
    "loss_fn, options",
    [
        (loss_fn, {"accumulation": 2, "ema_decay": 0.9, "donate": False}),
        (certain_loss, {"accumulation": 2, "ema_decay": 0.9, "members": 2}),
    ],
    ids=["dropout", "ensemble"],
)
def test_compiled_step_equals_eager_step(quick_compile, loss_fn, options):
    ema_decay = options.get("ema_decay")
    results = []
    for compile in (False, True):
        if "members" in options:
            state, _ = new_ensemble(2, ema_decay=ema_decay)
        else:
            state = new_state(ema_decay=ema_decay)
        step = make_step(loss_fn, optimizer(), compile=compile, **options)
        for i in range(3):
            state, metrics = step(state, make_batch(i))
        results.append((state, metrics))
    assert_trees(*results)


def test_step_compiled_to_machine_code_equals_eager_and_writes_in_place():
    state, reference = new_state(ema_decay=0.9), new_state(ema_decay=0.9)
    compiled = make_step(certain_loss, optimizer(), ema_decay=0.9)
    eager = make_step(certain_loss, optimizer(), ema_decay=0.9, compile=False)
    places = [leaf.data_ptr() for leaf in leaves(state)]
    for i in range(3):
        state, metrics = compiled(state, make_batch(i))
        reference, expected = eager(reference, make_batch(i))
        assert_trees(metrics, expected, rtol=1e-5, atol=1e-6)
    assert_trees(state, reference, rtol=1e-4, atol=1e-6)
    assert [leaf.data_ptr() for leaf in leaves(state)] == places


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_donating_step_reuses_memory_and_the_other_leaves_its_input_alone(quick_compile, compile):
    state = new_state(ema_decay=0.9)
    before = copy(state)
    step = make_step(certain_loss, optimizer(), ema_decay=0.9, compile=compile, donate=False)
    after, _ = step(state, make_batch(0))
    assert_trees(state, before, rtol=0, atol=0)
    donating = make_step(certain_loss, optimizer(), ema_decay=0.9, compile=compile)
    places = [leaf.data_ptr() for leaf in leaves(state)]
    state, metrics = donating(state, make_batch(0))
    assert_trees(state, after, rtol=0, atol=0)
    held = metrics["skipped"]
    state, _ = donating(state, make_batch(1) | {"scale": torch.tensor(torch.nan)})
    assert [leaf.data_ptr() for leaf in leaves(state)] == places
    assert held == 0 and state.skipped == 1


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_step_equals_one_step_on_the_whole_batch(parts):
    """The microbatches hold different numbers of kept labels, so unweighted means would differ."""
    batch = make_batch(3, rows=8)
    batch["kept"][:2, 1:] = False
    batch["kept"][0, 1] = True
    one, many = new_state(dtype=torch.float64), new_state(dtype=torch.float64)
    one, expected = make_step(certain_loss, optimizer(), compile=False)(one, batch)
    many, metrics = make_step(certain_loss, optimizer(), accumulation=parts, compile=False)(
        many, batch
    )
    assert_trees(many, one)
    assert_trees(metrics, expected)
    assert metrics["weight"] == batch["kept"][:, 1:].sum()


def test_microbatches_without_weight_are_averaged_evenly():
    def loss_fn(params, batch, key):
        return (params["w"] * batch).mean(), {}

    optimizer = optim.sgd(1.0)
    state = init_state({"w": torch.ones(())}, optimizer, random.key(0))
    step = make_step(loss_fn, optimizer, accumulation=2, compile=False)
    state, metrics = step(state, torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert metrics["loss"] == 3 and state.params["w"] == -2 and "weight" not in metrics


def test_random_keys_differ_by_step_and_microbatch_and_repeat_exactly():
    def loss_fn(params, batch, key):
        return params["w"] * 0, {"weight": batch[0], "word": key[0].double()}

    optimizer, key = optim.sgd(1.0), random.key(5)
    state = init_state({"w": torch.ones(())}, optimizer, key)
    step = make_step(loss_fn, optimizer, compile=False)
    for i in range(3):
        state, metrics = step(state, torch.ones(2))
        assert metrics["word"] == random.fold_in(key, i)[0]
    state = init_state({"w": torch.ones(())}, optimizer, key)
    step = make_step(loss_fn, optimizer, accumulation=2, compile=False)
    _, metrics = step(state, torch.tensor([1.0, 3.0]))
    words = [random.fold_in(random.fold_in(key, 0), i)[0].double() for i in range(2)]
    torch.testing.assert_close(metrics["word"], (words[0] + 3 * words[1]) / 4)


def poisoned(kind):
    """A loss that is finite for scale 1 and whose value or gradient is not for scale 0."""

    def loss_fn(params, batch, key):
        loss, metrics = certain_loss(params, batch | {"scale": torch.tensor(1.0)}, key)
        if kind == "loss":
            return loss / batch["scale"], metrics
        bias = params["out.bias"][0]
        return loss + (bias - bias.detach() + batch["scale"]).sqrt(), metrics  # slope 1/2 or inf

    return loss_fn


@pytest.mark.parametrize(
    "kind, compile", [("loss", False), ("gradient", False), ("gradient", True)]
)
def test_step_that_is_not_finite_changes_no_bit(quick_compile, kind, compile):
    good, bad = make_batch(0), make_batch(1) | {"scale": torch.tensor(0.0)}
    step = make_step(poisoned(kind), optimizer(), ema_decay=0.9, compile=compile)
    state, _ = step(new_state(ema_decay=0.9), good)
    before = copy(state)
    state, metrics = step(state, bad)
    for name in ("params", "opt_state", "ema", "key"):
        assert all(
            torch.equal(x, y)
            for x, y in zip(
                leaves(getattr(state, name)), leaves(getattr(before, name)), strict=True
            )
        )
    assert state.step == 2 and state.skipped == 1 and metrics["skipped"] == 1
    assert metrics["loss"].isfinite() == (kind == "gradient")
    state, metrics = step(state, good)
    assert metrics["skipped"] == 1 and not torch.equal(
        state.params["out.bias"], before.params["out.bias"]
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_member_of_an_ensemble_equals_its_run_alone(accumulation):
    """Dropout, clipping, moving average and a step that only member 1 skips, included."""
    trap = 1

    def loss_fn_with_trap(params, batch, key):
        params, mark = P.split(params, [("^mark$", False), ("", True)])
        loss, metrics = loss_fn(params, batch, key)
        marked = (mark["mark"] > 0.5) & (batch["scale"] == 2)
        return loss / (~marked).float(), metrics

    options = {"ema_decay": 0.8, "accumulation": accumulation, "compile": False}
    state, keys = new_ensemble(3)
    marks = torch.zeros(3).index_fill_(0, torch.tensor(trap), 1.0)
    state = init_state(state.params | {"mark": marks}, optimizer(), keys, ema_decay=0.8)
    alone = [
        init_state(model.init(key) | {"mark": mark}, optimizer(), key, ema_decay=0.8)
        for key, mark in zip(keys, marks.clone(), strict=True)
    ]
    together = make_step(loss_fn_with_trap, optimizer(), members=3, **options)
    single = make_step(loss_fn_with_trap, optimizer(), **options)
    for i in range(4):
        batch = make_batch(i) | {"scale": torch.tensor(2.0 if i == 2 else 1.0)}
        state, metrics = together(state, batch)
        for m in range(3):
            alone[m], expected = single(alone[m], batch)
            assert_trees({k: v[m] for k, v in metrics.items()}, expected, equal_nan=True)
    assert state.skipped.tolist() == [0, 1, 0] and state.step == 4
    for m in range(3):
        member = optree.tree_map(
            lambda t, m=m: t[m] if t.ndim else t, state, namespace="msfs_functional"
        )
        assert_trees(member, alone[m])


SHAPES = [(2, 3, 4), (2, 4, 4), (4, 4, 4), (3, 5, 3), (5, 6, 6), (6, 3, 8)]


@pytest.mark.parametrize("dynamic, graphs", [(None, 3), (True, 2), (False, len(SHAPES) + 1)])
def test_nothing_recompiles_once_every_bucket_was_seen(counter, dynamic, graphs):
    """Gradient graphs as `dynamic` says and one update, though sizes coincide in some batches."""
    schedule = lambda count: 1e-2 / (1 + count.float())  # noqa: E731
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(schedule))
    key = random.key(0)
    state = init_state(model.init(key), optimizer, key)
    step = make_step(certain_loss, optimizer, dynamic=dynamic)
    for i, shape in enumerate(SHAPES):
        state, _ = step(state, make_batch(i, *shape))
    assert counter.frame_count == graphs
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i, shape in enumerate([*reversed(SHAPES), *SHAPES]):
            state, _ = step(state, make_batch(100 + i, *shape))
    assert counter.frame_count == graphs


def test_more_steps_in_a_process_than_the_recompile_limit(counter):
    def loss_fn(params, batch, key):
        return (params["w"] * batch).square().sum(), {}

    optimizer = optim.sgd(0.1)
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(4):
            state = init_state({"w": torch.ones(i + 2)}, optimizer, random.key(0))
            make_step(loss_fn, optimizer)(state, torch.ones(i + 2))
    assert counter.frame_count == 2 * 4


def test_more_static_shapes_than_the_recompile_limit(counter):
    def loss_fn(params, batch, key):
        return (params["w"] * batch).square().sum(), {}

    optimizer = optim.sgd(0.1)
    state = init_state({"w": torch.ones(())}, optimizer, random.key(0))
    step = make_step(loss_fn, optimizer, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for i in range(4):
            state, _ = step(state, torch.ones(i + 2))
    assert counter.frame_count == 4 + 1


def test_step_learns_and_state_continues_from_a_copy_bit_for_bit():
    state = new_state()
    step = make_step(loss_fn, optimizer(), compile=False)
    batch = make_batch(0)
    state, first = step(state, batch)
    for _ in range(100):
        state, last = step(state, batch)
    assert last["loss"] < 0.7 * first["loss"]
    kept = copy(state)
    runs = []
    for start in (kept, state):
        for i in range(3):
            start, _ = step(start, make_batch(i))
        runs.append(start)
    assert all(torch.equal(x, y) for x, y in zip(*map(leaves, runs), strict=True))


def test_state_is_a_pytree_with_named_paths():
    state = new_state(ema_decay=0.5)
    paths = optree.tree_paths(state, namespace="msfs_functional")
    assert ("params", "hidden.weight") in paths and ("step",) in paths
    doubled = optree.tree_map(lambda t: 2 * t, state, namespace="msfs_functional")
    assert isinstance(doubled, train.TrainState) and doubled.ema.keys() == state.params.keys()
    values, spec = torch.utils._pytree.tree_flatten(state)
    assert isinstance(torch.utils._pytree.tree_unflatten(values, spec), train.TrainState)
    assert len(values) == len(leaves(state)) and train.FIELDS == NAMES


def test_state_holds_no_memory_twice():
    params = {"w": torch.ones(3)}
    anchored = optim.Transformation(lambda p: {"start": p, "zero": p}, lambda g, s, p: (g, s))
    state = init_state(params, anchored, random.key(0), ema_decay=0.5)
    places = [leaf.data_ptr() for leaf in leaves(state)]
    assert len(set(places)) == len(places) and state.params["w"] is not params["w"]
    assert state.params["w"].data_ptr() == params["w"].data_ptr()


def test_members_drawn_by_vmap_can_be_written_in_place():
    """vmap expands what does not depend on the key: a zero bias of all members is one number."""
    zeros = P.functional(Net, [("bias", P.zeros), ("", P.normal(0.3))])
    keys = random.split(random.key(0), 2)
    state = init_state(torch.vmap(zeros.init)(keys), optimizer(), keys)
    step = make_step(loss_fn, optimizer(), members=2, compile=False)
    state, _ = step(state, make_batch(0))
    first, second = state.params["hidden.bias"]
    assert first.any() and not torch.equal(first, second)


def test_bad_input_is_refused_by_name():
    step = functools.partial(make_step, loss_fn, optimizer(), compile=False)
    with pytest.raises(ValueError, match=r"accumulation \(3\) must divide the batch.*\(4, "):
        step(accumulation=3)(new_state(), make_batch(0))
    with pytest.raises(ValueError, match=r"accumulation \(0\) must be at least 1"):
        step(accumulation=0)
    with pytest.raises(ValueError, match="members=2, but the state holds None"):
        step(members=2)(new_state(), make_batch(0))
    with pytest.raises(ValueError, match="holds no moving average"):
        step(ema_decay=0.9)(new_state(), make_batch(0))
    with pytest.raises(ValueError, match=r"2 keys ask for an ensemble, but 'w' has shape \(3,\)"):
        init_state({"w": torch.ones(3)}, optimizer(), random.split(random.key(0), 2))
    wrong = {
        "must return a 0-d loss, got shape": lambda p, b, k: (p["out.bias"], {}),
        r"the step itself reports \['loss'\]": lambda p, b, k: (
            p["out.bias"].sum(),
            {"loss": k[0]},
        ),
    }
    for message, fn in wrong.items():
        with pytest.raises(ValueError, match=message):
            make_step(fn, optimizer(), compile=False)(new_state(), make_batch(0))


def test_machine_that_cannot_compile_says_why(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    assert can_compile("cpu") and why_not_compile("cpu") is None
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert not can_compile("cpu")
    with pytest.raises(ValueError, match=r"compile=True, but no C\+\+ compiler was found: install"):
        make_step(loss_fn, optimizer())(new_state(), make_batch(0))


@pytest.mark.gpu
def test_compiled_step_on_a_gpu_never_waits_for_it():
    state = init_state(model.init(0, device="cuda"), optimizer(), random.key(0), ema_decay=0.9)
    step = make_step(loss_fn, optimizer(), ema_decay=0.9, accumulation=2)
    batches = [{k: v.cuda() for k, v in make_batch(i).items()} for i in range(4)]
    state, _ = step(state, batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            state, _ = step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 4


@pytest.mark.gpu
def test_compiled_update_on_a_gpu_allocates_less_than_one_copy_of_the_state():
    def loss_fn(params, batch, key):
        return sum((p * batch).square().mean() for p in params.values()), {}

    size = 4 << 20
    params = {f"w{i}": torch.ones(size, device="cuda") for i in range(8)}
    state = init_state(params, optimizer(), random.key(0), ema_decay=0.9)
    step = make_step(loss_fn, optimizer(), ema_decay=0.9)
    batch = torch.ones((), device="cuda")
    for _ in range(3):
        state, metrics = step(state, batch)
        del metrics
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    state, _ = step(state, batch)
    gradients = 8 * 4 * size
    assert torch.cuda.max_memory_allocated() - held < 1.3 * gradients
    assert state.step == 4


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_step_replayed_from_cuda_graphs_equals_the_step(compile):
    """Two shapes in turn, a skipped step, and a state restored into other memory half way."""
    to_gpu = functools.partial(optree.tree_map, lambda t: t.cuda())
    batches = [to_gpu(make_batch(i, rows=4 + 2 * (i % 2))) for i in range(12)]
    batches[6]["scale"].fill_(torch.nan)
    options = {"ema_decay": 0.9, "accumulation": 2, "compile": compile, "dynamic": False}
    results = []
    for wrap in (lambda step: step, graphed):
        key = random.key(0)
        state = init_state(model.init(key, device="cuda"), optimizer(), key, ema_decay=0.9)
        step, losses = wrap(make_step(loss_fn, optimizer(), **options)), []
        for i, batch in enumerate(batches):
            if i == 8:
                state = copy(state)
            state, metrics = step(state, batch)
            losses.append(metrics["loss"])
        results.append((state, metrics, losses))
    assert_trees(*results, rtol=1e-4, atol=1e-5, equal_nan=True)  # atomic additions vary
    assert state.skipped == 1


def test_graphed_step_refuses_a_state_on_the_cpu():
    with pytest.raises(ValueError, match=r"graphed needs a state on a GPU, got one on .*cpu"):
        graphed(make_step(loss_fn, optimizer(), compile=False))(new_state(), make_batch(0))


def test_gradients_that_stay_in_half_precision_make_the_same_step():
    """A cast's gradient is a cast: with or without it the optimizer sees the same numbers."""

    def loss_fn(params, batch, key):
        params = P.cast(params, torch.bfloat16)
        y = torch.tanh(batch["x"].bfloat16() @ params["w"]) @ params["v"]
        return y.float().square().mean(), {}

    keys = random.split(random.key(0), 3)
    params = {"w": random.normal(keys[0], (8, 16)), "v": random.normal(keys[1], (16, 4))}
    batch, halves = {"x": random.normal(keys[2], (6, 8))}, in_dtype(torch.bfloat16)
    after = []
    for accumulation, gradient in ((1, None), (1, halves), (2, None), (2, halves)):
        optimizer = optim.adamw(1e-2)
        options = {"clip_norm": 0.1, "accumulation": accumulation, "gradient": gradient}
        step = make_step(loss_fn, optimizer, compile=False, **options)
        state = init_state(dict(params), optimizer, random.key(1))
        for _ in range(3):
            state, _ = step(state, batch)
        after.append(state.params)
    for plain, half in ((0, 1), (2, 3)):
        assert all(torch.equal(after[plain][name], after[half][name]) for name in params)
