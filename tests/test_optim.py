"""Optimizers: equal to torch.optim or a reference by hand, pure == in place, mapped, compiled."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from msfs_functional import optim, schedules
from msfs_functional.matrix_updates import NEWTON_SCHULZ, orthogonalize

Params = dict[str, Tensor]

EVERY: dict[str, Callable[[], optim.Transformation]] = {
    "adamw": lambda: optim.adamw(1e-2, weight_decay=0.1),
    "adamw by schedule": lambda: optim.adamw(
        schedules.cosine(1e-2, 50, warmup=5), decay=[("bias", False), ("", True)]
    ),
    "sgd": lambda: optim.sgd(1e-2),
    "nesterov": lambda: optim.sgd(1e-2, 0.9, nesterov=True, weight_decay=0.1),
    "lion": lambda: optim.lion(1e-3, weight_decay=0.1),
    "muon": lambda: optim.muon(1e-2, dtype=torch.float32),
    "adafactor": lambda: optim.adafactor(1e-2, weight_decay=0.1),
    "clipped adamw": lambda: optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(1e-2)),
    "two groups": lambda: optim.by_group([("bias", optim.sgd(0.1)), ("", optim.lion(1e-3))]),
}


def draw(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Params:
    """Four parameters; the numbers are those of float32 in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (5, 7), "a.bias": (5,), "b.weight": (9, 4), "c.weight": (5, 7)}
    return {
        name: (scale * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


def copy(tree):
    return torch.utils._pytree.tree_map(torch.clone, tree)


def leaves(tree) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)


def run(optimizer: optim.Transformation, params: Params, steps: int) -> Params:
    state = optimizer.init(params)
    for step in range(steps):
        grads = draw(step, next(iter(params.values())).dtype)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
    return params


def run_torch(make: Callable[[list[Tensor]], list], params: Params, steps: int) -> Params:
    params = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizers = make(list(params.values()))
    for step in range(steps):
        for p, g in zip(params.values(), draw(step, p_dtype(params)).values(), strict=True):
            p.grad = g
        for optimizer in optimizers:
            optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def p_dtype(params: Params) -> torch.dtype:
    return next(iter(params.values())).dtype


def furthest(a: Params, b: Params) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


PEERS: dict[str, tuple[Callable[[], optim.Transformation], Callable[[list[Tensor]], list]]] = {
    "adamw": (
        lambda: optim.adamw(1e-2, 0.8, 0.95, 1e-6, weight_decay=0.1),
        lambda p: [torch.optim.AdamW(p, 1e-2, (0.8, 0.95), 1e-6, weight_decay=0.1)],
    ),
    "sgd": (lambda: optim.sgd(1e-2), lambda p: [torch.optim.SGD(p, 1e-2)]),
    "momentum": (
        lambda: optim.sgd(1e-2, 0.9, weight_decay=0.1),
        lambda p: [torch.optim.SGD(p, 1e-2, 0.9, weight_decay=0.1)],
    ),
    "nesterov": (
        lambda: optim.sgd(1e-2, 0.9, nesterov=True),
        lambda p: [torch.optim.SGD(p, 1e-2, 0.9, nesterov=True)],
    ),
    "adafactor": (
        lambda: optim.adafactor(1e-2, eps=(1e-6, 1e-3), weight_decay=0.1),
        lambda p: [torch.optim.Adafactor(p, 1e-2, eps=(1e-6, 1e-3), weight_decay=0.1)],
    ),
    "adafactor past lr**-2 steps": (
        lambda: optim.adafactor(0.2, eps=(1e-6, 1e-3), weight_decay=0.1),
        lambda p: [torch.optim.Adafactor(p, 0.2, eps=(1e-6, 1e-3), weight_decay=0.1)],
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_100_steps_equal_torch_optim_to_float32_rounding(name: str):
    """As near to torch's float64 run as torch's own float32 run is, twice at most."""
    ours, theirs = PEERS[name]
    exact = run_torch(theirs, draw(-1, torch.float64), 100)
    rounded = run_torch(theirs, draw(-1), 100)
    assert furthest(run(ours(), draw(-1), 100), exact) <= 2 * furthest(rounded, exact)
    assert furthest(run(ours(), draw(-1, torch.float64), 100), exact) < 1e-6


def test_lion_equals_the_algorithm_by_hand_in_float64():
    rate, b1, b2, decay = 1e-3, 0.9, 0.99, 0.1
    params = draw(-1, torch.float64)
    expected, mu = dict(params), {name: torch.zeros_like(p) for name, p in params.items()}
    for step in range(100):
        for name, g in draw(step, torch.float64).items():
            direction = torch.sign(b1 * mu[name] + (1 - b1) * g)
            expected[name] = expected[name] - rate * (direction + decay * expected[name])
            mu[name] = b2 * mu[name] + (1 - b2) * g
    actual = run(optim.lion(rate, b1, b2, weight_decay=decay), params, 100)
    assert furthest(actual, expected) < 1e-14


def test_first_adam_step_is_the_sign_of_the_gradient():
    params = {"w": torch.tensor([1.0, 2.0, 3.0])}
    grads = {"w": torch.tensor([0.5, -2.0, 1e-3])}
    optimizer = optim.adamw(0.1, weight_decay=0.0)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    torch.testing.assert_close(updates["w"], torch.tensor([-0.1, 0.1, -0.1]), rtol=2e-5, atol=0)
    assert state[0].count.item() == 1 and state[0].count.shape == ()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("match", [False, True])
def test_100_muon_steps_equal_torch_to_bfloat16_rounding_of_an_update(match: bool):
    adjust = "match_rms_adamw" if match else "original"
    optimizer = optim.muon(0.02, match_adamw=match, rest=optim.adamw(3e-4))
    mine = run(optimizer, draw(-1), 100)
    theirs = run_torch(
        lambda p: [
            torch.optim.Muon([x for x in p if x.ndim == 2], 0.02, adjust_lr_fn=adjust),
            torch.optim.AdamW([x for x in p if x.ndim != 2], 3e-4),
        ],
        draw(-1),
        100,
    )
    one_update = 0.02 * (0.2 * 3 if match else 1.5)  # the largest element of one step
    assert furthest(mine, theirs) < 4 * one_update * 2**-8
    assert furthest(mine, draw(-1)) > 10 * one_update


def test_orthogonalize_equals_the_polynomial_of_the_singular_values():
    g = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    expected = u * s[:, None, :] @ vh
    torch.testing.assert_close(orthogonalize(g, dtype=torch.float64), expected)
    torch.testing.assert_close(orthogonalize(g.mT, dtype=torch.float64), expected.mT)
    singular = torch.linalg.svdvals(orthogonalize(g))
    assert ((singular > 0.65) & (singular < 1.25)).all()
    assert (orthogonalize(torch.zeros(3, 4)) == 0).all()


@pytest.mark.parametrize("name", EVERY)
def test_compiled_in_place_equals_pure_holds_no_second_copy_and_never_recompiles(name: str):
    """Covers clipping, schedules and groups too: the count advances without a recompile."""
    optimizer = EVERY[name]()
    params = draw(-1)
    state = optimizer.init(params)
    eager, compiled = (copy(params), copy(state)), (copy(params), copy(state))
    update_ = optim.in_place(optimizer)
    compiled_update_ = torch.compile(update_, fullgraph=True)
    for step in range(5):
        grads = draw(step)
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        assert update_(grads, eager[1], eager[0]) is None
        if step == 0:
            _, (code,) = run_and_get_code(compiled_update_, grads, compiled[1], compiled[0])
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                compiled_update_(grads, compiled[1], compiled[0])
    for a, b in zip(leaves(eager), leaves((params, state)), strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(compiled, (params, state), rtol=2e-5, atol=2e-6)
    if name not in ("muon", "adafactor"):
        buffers = [line for line in code.splitlines() if "= empty_strided_cpu(" in line]
        assert all("_cpu((), ()" in line or "_cpu((4, )" in line for line in buffers), buffers


SHAPES = st.lists(
    st.lists(st.integers(1, 4), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4
)


@settings(max_examples=10)
@given(SHAPES, st.sampled_from(sorted(EVERY)), st.sampled_from([torch.float32, torch.bfloat16]))
def test_in_place_equals_pure_for_every_shape(
    shapes: list[tuple[int, ...]], name: str, dtype: torch.dtype
):
    params = {f"{i}.weight": torch.randn(shape).to(dtype) for i, shape in enumerate(shapes)}
    params["0.bias"] = torch.randn(3).to(dtype)
    optimizer = EVERY[name]()
    state = optimizer.init(params)
    other, other_state = copy(params), copy(state)
    for _ in range(3):
        grads = {key: torch.randn_like(p) for key, p in params.items()}
        updates, state = optimizer.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        optim.in_place(optimizer)(grads, other_state, other)
        assert all(p.dtype == dtype and p.isfinite().all() for p in params.values())
    for a, b in zip(leaves((params, state)), leaves((other, other_state)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EVERY)
def test_mapped_over_stacked_params_each_member_is_updated_as_if_alone(name: str):
    optimizer = EVERY[name]()
    members = [draw(i, scale=1 + i) for i in range(3)]
    grads = [draw(10 + i, scale=10.0**i) for i in range(3)]  # clipped by different factors

    def two_steps(params: Params, grads: Params):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return params, state

    def stack(trees):
        return torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *trees)

    mapped = torch.vmap(two_steps)(stack(members), stack(grads))
    alone = stack([two_steps(p, g) for p, g in zip(members, grads, strict=True)])
    torch.testing.assert_close(mapped, alone, rtol=1e-5, atol=1e-6)


def test_clip_scales_down_to_the_norm_and_never_up():
    grads = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    assert optim.global_norm(grads).item() == 5.0
    for norm, scale in ((1.0, 0.2), (5.0, 1.0), (50.0, 1.0)):
        clipped, _ = optim.clip_by_global_norm(norm).update(grads, (), grads)
        torch.testing.assert_close(clipped, {k: g * scale for k, g in grads.items()})
    zeros = {"a": torch.zeros(2)}
    assert (optim.clip_by_global_norm(1.0).update(zeros, (), zeros)[0]["a"] == 0).all()


def test_clip_equals_torch_and_norm_of_bfloat16_is_summed_in_float32():
    grads = draw(0)
    leaf = [torch.zeros_like(g).requires_grad_() for g in grads.values()]
    for p, g in zip(leaf, grads.values(), strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(leaf, 0.5)
    torch.testing.assert_close(optim.global_norm(grads), norm)
    clipped, _ = optim.clip_by_global_norm(0.5).update(grads, (), grads)
    torch.testing.assert_close(list(clipped.values()), [p.grad for p in leaf], rtol=1e-5, atol=1e-7)
    many = {"x": torch.full((10_000,), 0.1, dtype=torch.bfloat16)}
    assert optim.global_norm(many).dtype == torch.float32
    assert optim.global_norm(many).item() == pytest.approx(10.0, rel=2e-3)


def test_clip_turns_an_infinite_gradient_into_nan_for_the_guard_to_see():
    grads = {"a": torch.tensor([math.inf, 1.0])}
    clipped, _ = optim.clip_by_global_norm(1.0).update(grads, (), grads)
    assert clipped["a"].isnan().any()


def test_decay_rules_spare_what_they_say():
    params = {"w.weight": torch.ones(2), "w.bias": torch.ones(2)}
    zeros = {name: torch.zeros(2) for name in params}
    optimizer = optim.adamw(0.1, weight_decay=0.5, decay=[("bias$", False), ("", True)])
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    torch.testing.assert_close(updates["w.weight"], torch.full((2,), -0.05))
    assert (updates["w.bias"] == 0).all()
    typo = optim.adamw(0.1, decay=[("baias", False), ("", True)])
    with pytest.raises(ValueError, match="baias"):
        typo.update(zeros, typo.init(params), params)


def test_groups_have_their_own_learning_rates_and_keep_the_order_of_names():
    params = draw(0)
    optimizer = optim.by_group([("^b", optim.sgd(0.1)), ("", optim.sgd(0.01))])
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert list(updates) == list(params)
    for name, update in updates.items():
        torch.testing.assert_close(update, params[name] * (-0.1 if name[0] == "b" else -0.01))


def test_ema_is_the_weighted_mean_of_the_past():
    average = optim.ema(0.9)
    first, second = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}
    mean = average.init(first)
    assert mean["w"] is not first["w"]
    mean = average.update(second, average.update(second, mean))
    torch.testing.assert_close(mean["w"], torch.tensor([0.81 * 1 + 0.19 * 2]))
    half = {"w": torch.ones(2, dtype=torch.bfloat16)}
    assert average.update(half, average.init(half))["w"].dtype == torch.float32
    held = average.init(first)
    optim.overwrite(held, average.update(second, held))
    torch.testing.assert_close(held["w"], torch.tensor([1.1]))


def test_moments_of_narrow_params_are_float32():
    params = {"w.weight": torch.ones(3, 2, dtype=torch.bfloat16)}
    for name, make in EVERY.items():
        if name in ("two groups", "adamw by schedule"):  # their rules name a bias
            continue
        optimizer = make()
        updates, state = optimizer.update(params, optimizer.init(params), params)
        assert all(x.dtype in (torch.float32, torch.int64) for x in leaves(state))
        assert optim.apply_updates(params, updates)["w.weight"].dtype == torch.bfloat16


def test_nested_trees_of_params_work_where_no_rule_needs_names():
    params = {"policy": draw(0), "value": [torch.ones(3)]}
    optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert optim.apply_updates(params, updates)["value"][0].shape == (3,)


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from msfs_functional import optim, schedules

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
plain = {"a": torch.randn(6, 4), "b": torch.randn(5), "c": torch.randn(4, 6)}
grads = {name: torch.randn_like(p) for name, p in plain.items()}

def shard(tree):
    return {name: distribute_tensor(x.clone(), mesh, [Shard(0)]) for name, x in tree.items()}

for optimizer in (
    optim.adamw(schedules.cosine(1e-2, 10)),
    optim.lion(1e-2),
    optim.adafactor(1e-2),
    optim.muon(1e-2, dtype=torch.float32),
):
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optimizer)
    whole, parts = {name: p.clone() for name, p in plain.items()}, shard(plain)
    whole_state, parts_state = optimizer.init(whole), optimizer.init(parts)
    for _ in range(3):
        optim.in_place(optimizer)(grads, whole_state, whole)
        optim.in_place(optimizer)(shard(grads), parts_state, parts)
    for name, p in parts.items():
        assert p.placements == (Shard(0),)
        torch.testing.assert_close(p.full_tensor(), whole[name], rtol=1e-5, atol=1e-6)
dist.destroy_process_group()
"""


@pytest.mark.ranks
def test_sharded_on_two_ranks_equals_one_process(tmp_path: Path):
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'kernels'}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TWO_RANKS, str(rank), str(tmp_path / "store")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in ranks]
    assert all(process.returncode == 0 for process in ranks), errors


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: optim.adamw(-1.0), "learning_rate (-1.0)"),
        (lambda: optim.adamw(math.nan), "learning_rate (nan)"),
        (lambda: optim.adamw(1.0, b1=1.0), "b1 (1.0)"),
        (lambda: optim.adamw(1.0, b2=-0.1), "b2 (-0.1)"),
        (lambda: optim.adamw(1.0, weight_decay=-0.1), "weight_decay (-0.1)"),
        (lambda: optim.sgd(1.0, nesterov=True), "momentum"),
        (lambda: optim.ema(1.0), "decay (1.0)"),
        (lambda: optim.clip_by_global_norm(0.0), "max_norm (0.0)"),
        (lambda: optim.adafactor(clip=0.0), "clip (0.0)"),
        (lambda: optim.adafactor(beta2_decay=0.8), "beta2_decay (0.8)"),
        (lambda: optim.adamw(1.0).init({}), "no tensor"),
        (lambda: optim.global_norm({}), "norm"),
        (lambda: optim.muon(1.0, matrices=[("", True)]).init(draw(0)), "a.bias"),
        (lambda: optim.by_group([("^a", optim.sgd(1.0))]).init(draw(0)), "b.weight"),
    ],
)
def test_bad_arguments_raise_naming_the_value(call, said: str):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)
