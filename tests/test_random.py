"""Random numbers: published answers, one stream under every transform, right distributions."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msfs_kernels.philox import dropout_bits, multiply_32, philox_4x32, philox_words
from torch import Tensor

from msfs_functional import random

ROOT = Path(__file__).parent.parent
WORD = st.integers(0, 2**32 - 1)

# Random123's kat_vectors: four counter words, two key words, then the output for 10 and 7 rounds.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000  00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        "5f6fb709 0d893f64 4f121f81 4f730a48",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
    ),
    (  # digits of pi
        "243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ),
]

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "bits": lambda k: random.bits(k, (5, 7)),
    "bits of a late shard": lambda k: random.bits(k, (37,), offset=2**32 - 20),
    "integers": lambda k: random.integers(k, (77,), -3, 10),
    "uniform": lambda k: random.uniform(k, (5, 7)),
    "uniform in an interval": lambda k: random.uniform(k, (77,), low=-0.3, high=0.5),
    "uniform float64": lambda k: random.uniform(k, (77,), dtype=torch.float64),
    "normal": lambda k: random.normal(k, (1001,)),
    "normal bfloat16": lambda k: random.normal(k, (333,), dtype=torch.bfloat16),
    "normal float64": lambda k: random.normal(k, (333,), dtype=torch.float64),
    "exponential": lambda k: random.exponential(k, (333,)),
    "bernoulli": lambda k: random.bernoulli(k, 0.3, (77,)),
    "dropout": lambda k: random.dropout(k, torch.ones(9, 7, device=k.device), 0.4),
    "permutation": lambda k: random.permutation(k, 33),
    "fold_in": lambda k: random.fold_in(k, 5),
    "split": lambda k: random.split(k, 5),
}


def hexadecimal(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize("given_words, ten, seven", KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(given_words: str, ten: str, seven: str):
    words = hexadecimal(given_words)
    assert list(philox_4x32(*words)) == hexadecimal(ten)
    assert list(philox_4x32(*words, rounds=7)) == hexadecimal(seven)
    tensors = [torch.tensor(word) for word in words]
    assert [word.item() for word in philox_4x32(*tensors)] == hexadecimal(ten)


@given(WORD, st.integers(2**31, 2**32 - 1))
def test_product_of_words_is_exact(word: int, constant: int):
    product = word * constant
    assert multiply_32(word, constant) == (product >> 32, product & 0xFFFFFFFF)
    high, low = multiply_32(torch.tensor(word), constant)
    assert (high.item(), low.item()) == (product >> 32, product & 0xFFFFFFFF)


TRITON_PROGRAM = """
import torch
from msfs_kernels import philox, philox_triton

def direct(kernel):
    return kernel

keys = torch.tensor([[1, 2], [0xFFFFFFFF, 0x9ABCDEF0]])
shared = torch.arange(2**32 - 3, 2**32 + 40)
for counters in (shared[None], torch.stack([shared, shared * 5 - 2**62])):
    out = torch.empty(2, len(shared), 4, dtype=torch.int64)
    philox_triton.words(direct, keys, counters, 7, out)
    assert torch.equal(out, philox.philox_words(keys, counters, 7))
for threshold in (0, 1, 6554, 65536):
    out = torch.empty(2, 1061, dtype=torch.uint8)
    philox_triton.bits(direct, keys, threshold, out, philox.DROPOUT)
    assert torch.equal(out, philox.dropout_bits(keys, 8 * 1061, threshold))
"""


def test_triton_kernels_equal_the_cpu_bit_for_bit():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", TRITON_PROGRAM],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "kernels")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("chip", [80, 90, 100])
def test_triton_kernels_compile_without_a_gpu(chip: int):
    triton = pytest.importorskip("triton")
    from msfs_kernels import philox_triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    numbers = {"keys": "*i64", "n": "i32", "blocks": "i32"}
    fixed = {"DOMAIN": 3, "BLOCK": philox_triton.BLOCK}
    for kernel, signature in (
        (philox_triton.words_kernel, {"counters": "*i64", "out": "*i64", "row_stride": "i32"}),
        (philox_triton.bits_kernel, {"out": "*u8", "threshold": "i32"}),
    ):
        types = {**numbers, **signature, **dict.fromkeys(fixed, "constexpr")}
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, fixed)
        assert triton.compile(source, target=GPUTarget("cuda", chip, 32)).asm["cubin"]


COMPILED = ("uniform in an interval", "normal", "dropout", "split")  # every kind of arithmetic


def draw_all(key: Tensor) -> dict[str, Tensor]:
    return {name: draw(key) for name, draw in DRAWS.items()}


def differing(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [name for name in actual if not torch.equal(actual[name], expected[name])]


def test_draws_are_bit_equal_eager_compiled_vmapped_and_repeated():
    keys = random.split(random.key(11), 3)
    alone = draw_all(keys[0])
    each = torch.func.vmap(draw_all)(keys)
    loop = [draw_all(key) for key in keys]
    assert not differing(alone, loop[0])
    assert not differing(each, {name: torch.stack([d[name] for d in loop]) for name in DRAWS})

    def draw_some(key: Tensor) -> dict[str, Tensor]:
        return {name: DRAWS[name](key) for name in COMPILED}

    @torch.compile(fullgraph=True)  # both in one graph, which compiles in half the time of two
    def compiled(keys: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return draw_some(keys[0]), torch.func.vmap(draw_some)(keys)

    one, many = compiled(keys)
    assert not differing(one, alone)
    assert not differing(many, each)


def test_ops_map_over_keys_counters_both_and_nested():
    keys, counters = random.split(random.key(1), 3), torch.arange(15).view(3, 5)
    one = torch.stack([philox_words(k, counters[0], 0) for k in keys])
    assert torch.equal(torch.vmap(lambda k: philox_words(k, counters[0], 0))(keys), one)
    pairs = torch.stack([philox_words(k, c, 0) for k, c in zip(keys, counters, strict=True)])
    assert torch.equal(torch.vmap(lambda k, c: philox_words(k, c, 0))(keys, counters), pairs)
    over = torch.vmap(lambda c: torch.vmap(lambda k: philox_words(k, c, 0))(keys))(counters)
    assert torch.equal(
        over, torch.stack([torch.stack([philox_words(k, c, 0) for k in keys]) for c in counters])
    )
    last = torch.vmap(lambda k: dropout_bits(k, 20, 9000), in_dims=1)(keys.T.contiguous())
    assert torch.equal(last, dropout_bits(keys, 20, 9000))


@pytest.mark.parametrize("n", [3, 5000])
def test_op_words_are_philox_at_every_counter(n: int):
    key, counters = random.key(2**63 + 5), torch.arange(n) + 2**32 - 2
    expected = [philox_4x32(c % 2**32, c >> 32, 0, 6, *key.tolist()) for c in counters.tolist()]
    assert philox_words(key, counters, 6).tolist() == [list(words) for words in expected]


def test_ops_pass_opcheck():
    keys = random.split(random.key(1), 3)
    for op, arguments in (
        (torch.ops.msfs_kernels.philox_words, (keys, torch.arange(40), 1)),
        (torch.ops.msfs_kernels.dropout_bits, (keys, 77, 6554)),
    ):
        torch.library.opcheck(op, arguments)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**33))
def test_shards_join_to_the_whole(first: int, second: int, start: int):
    key = random.key(3)
    whole = random.bits(key, (first + second,), offset=start)
    shards = [
        random.bits(key, (first,), offset=start),
        random.bits(key, (second,), offset=start + first),
    ]
    assert torch.equal(whole, torch.cat(shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_and_normal_shards_join_to_the_whole(dtype: torch.dtype):
    for draw in (random.uniform, random.normal):
        whole = draw(random.key(3), (101,), dtype=dtype)
        shards = [draw(random.key(3), (n,), dtype=dtype, offset=i) for i, n in ((0, 33), (33, 68))]
        assert torch.equal(whole, torch.cat(shards))


def test_an_element_depends_on_key_and_flat_index_only():
    key = random.key(4)
    flat = random.normal(key, (60,))
    assert torch.equal(random.normal(key, (3, 4, 5)), flat.view(3, 4, 5))
    assert torch.equal(random.normal(key, (7,)), flat[:7])


@given(st.integers(-(2**63), 2**64 - 1), st.integers(-(2**63), 2**63 - 1))
def test_fold_in_takes_integers_and_tensors_alike(seed: int, data: int):
    key = random.key(seed)
    folded = random.fold_in(key, data)
    assert folded.shape == (2,) and folded.dtype == torch.int64
    assert ((0 <= folded) & (folded < 2**32)).all()
    assert torch.equal(folded, random.fold_in(key, torch.tensor(data)))
    assert torch.equal(folded, random.fold_in(key, torch.tensor([1, data]))[1])
    small = torch.tensor(data % 100, dtype=torch.int32)
    assert torch.equal(random.fold_in(key, small), random.fold_in(key, data % 100))


def test_keys_and_their_draws_never_meet():
    key = random.key(0)
    folded = random.fold_in(key, torch.arange(1000))
    keys = torch.cat([key[None], random.key(1)[None], folded, random.split(key, 1000)])
    assert len(torch.unique(keys, dim=0)) == 2002
    draws = torch.cat([random.bits(k, (4,)) for k in keys[:500]])
    assert len(torch.unique(draws)) > 1998  # 2000 of 2**32: a repeat has a chance of 0.0005


# Kolmogorov-Smirnov: sqrt(n) sup |F_n - F| exceeds 1.95 once in a thousand draws.
def distance(x: Tensor, distribution: Callable[[Tensor], Tensor]) -> float:
    n = x.numel()
    f = distribution(x.double().flatten().sort().values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return math.sqrt(n) * max((f - steps[:-1]).max().item(), (steps[1:] - f).max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distributions_pass_kolmogorov_smirnov(dtype: torch.dtype):
    key, n = random.key(2024), (200_000,)
    assert distance(random.uniform(key, n, dtype=dtype), lambda x: x) < 1.95
    assert distance(random.normal(key, n, dtype=dtype), torch.special.ndtr) < 1.95
    assert distance(random.exponential(key, n, dtype=dtype), lambda x: -torch.expm1(-x)) < 1.95
    wide = random.uniform(key, n, low=-2.0, high=1.0, dtype=dtype)
    assert distance(wide, lambda x: (x + 2) / 3) < 1.95


def test_normal_moments_and_tails():
    z = random.normal(random.key(1), (1_000_000,)).double()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(z.pow(power).mean() - expected) < 4 * math.sqrt(spread / 1e6)
    beyond = (z.abs() > 4).double().mean().item()
    assert abs(beyond - 6.334e-5) < 4 * math.sqrt(6.334e-5 / 1e6)


def test_neighbouring_elements_and_keys_are_uncorrelated():
    keys = random.split(random.key(9), 2)
    a, b = (random.normal(k, (400_000,)) for k in keys)
    for x, y in ((a, b), (a[1:], a[:-1]), (a[1:] ** 2, a[:-1] ** 2), (a**2, b**2)):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 4 / math.sqrt(400_000)


def test_fixed_point_normal_is_the_box_muller_formula():
    first, second = random.words(random.key(5), (10_000,), 2)
    u, a = (first.double() + 0.5) / 2**32, (second & (2**31 - 1)).double() / 2**31
    sign = torch.where(second < 2**31, 1.0, -1.0)
    expected = sign * torch.sqrt(-2 * torch.log(u)) * torch.sin(math.pi / 2 * a)
    actual = random.normal(random.key(5), (10_000,), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=3e-8, atol=3e-8)


def test_minus_log_is_finite_and_ordered_at_its_edges():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    values = random.minus_log(words)
    assert (values.diff() < 0).all() and values[-1] >= 0
    expected = -torch.log((words.double() + 0.5) / 2**32)
    torch.testing.assert_close(values.double() / 2**31, expected, rtol=3e-8, atol=1e-9)


@given(st.integers(0, 2**62 - 1))
def test_integer_sqrt_is_the_floor(square: int):
    assert random.integer_sqrt(torch.tensor(square)).item() == math.isqrt(square)


@pytest.mark.parametrize("dtype", random.PRECISION)
def test_uniform_fills_half_open_interval_of_every_dtype(dtype: torch.dtype):
    u = random.uniform(random.key(6), (100_000,), dtype=dtype)
    assert u.dtype == dtype and u.min() >= 0 and u.max() < 1
    assert abs(u.double().mean() - 0.5) < 0.5 * 2.0 ** -random.PRECISION[dtype] + 0.005


@given(st.floats(0, 1))
def test_bernoulli_takes_numbers_and_tensors_alike(p: float):
    p = float(torch.tensor(p))
    key = random.key(7)
    drawn = random.bernoulli(key, p, (2000,))
    assert torch.equal(drawn, random.bernoulli(key, torch.tensor(p), (2000,)))
    assert abs(drawn.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / 2000) + 1e-9


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.9, 1e-6, 0.999999])
def test_dropout_drops_by_its_bits_and_keeps_the_mean(rate: float):
    key, x = random.key(8), torch.randn(100, 50)
    threshold = min(round(rate * 2**16), 2**16 - 1)
    packed = dropout_bits(key, 5000, threshold).tolist()
    kept = torch.tensor([packed[i // 8] >> i % 8 & 1 for i in range(5000)], dtype=torch.bool)
    kept = kept.view(100, 50)
    dropped = random.dropout(key, x, rate)
    torch.testing.assert_close(dropped, torch.where(kept, x / (1 - threshold / 2**16), 0.0))
    p = threshold / 2**16
    assert abs(p - rate) < 2e-5
    assert abs(kept.double().mean() - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / 5000)


def test_dropout_is_the_identity_without_key_or_rate():
    x = torch.randn(3)
    assert random.dropout(None, x, 0.25) is x and random.dropout(random.key(0), x, 0.0) is x
    assert random.dropout(random.key(0), torch.ones(3, 0), 0.25).shape == (3, 0)


def test_dropout_bits_are_independent_of_one_another():
    packed = torch.stack([dropout_bits(k, 80_000, 2**15) for k in random.split(random.key(5), 2)])
    bits = (packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).double()  # (2, bytes, 8)
    columns = torch.cat([bits[0], bits[1]], -1).T
    correlation = torch.corrcoef(columns) - torch.eye(16)
    assert correlation.abs().max() < 4.5 / math.sqrt(10_000)


def test_dropout_derivatives_are_those_of_its_mask():
    key, x, t = random.key(8), torch.randn(6, 5), torch.randn(6, 5)
    mask = random.dropout(key, torch.ones(6, 5), 0.4)
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True)):
        grad = wrap(torch.func.grad(lambda x: (random.dropout(key, x, 0.4) * t).sum()))(x)
        torch.testing.assert_close(grad, mask * t)
        out, tangent = wrap(
            lambda x, t: torch.func.jvp(lambda x: random.dropout(key, x, 0.4), (x,), (t,))
        )(x, t)
        torch.testing.assert_close((out, tangent), (mask * x, mask * t))
    leaf = x.clone().requires_grad_()
    random.dropout(key, leaf, 0.4).backward(t)
    torch.testing.assert_close(leaf.grad, mask * t)


def test_compiled_dropout_keeps_one_bit_an_element_for_its_backward():
    saved = []
    x = torch.randn(64, 33, requires_grad=True)
    forward = torch.compile(lambda k, x: random.dropout(k, x, 0.4), fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = forward(random.key(8), x)
    assert sum(t.nbytes for t in saved) == 64 * 33 // 8
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(slope != 0, out != 0)


def test_dropout_under_vmap_takes_one_key_each_or_one_for_all():
    keys, x = random.split(random.key(8), 4), torch.randn(4, 6, 5)
    each = torch.vmap(lambda k, x: random.dropout(k, x, 0.4))(keys, x)
    assert torch.equal(
        each, torch.stack([random.dropout(k, y, 0.4) for k, y in zip(keys, x, strict=True)])
    )
    shared = torch.vmap(lambda x: random.dropout(keys[0], x, 0.4))(x)
    assert torch.equal(shared, torch.stack([random.dropout(keys[0], y, 0.4) for y in x]))


def test_dropout_keeps_the_dtype_and_drops_infinities():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        x = torch.full((1000,), math.inf, dtype=dtype)
        dropped = random.dropout(random.key(1), x, 0.5)
        assert dropped.dtype == dtype and not dropped.isnan().any() and (dropped == 0).any()


def test_permutation_is_one_and_every_order_is_as_likely():
    drawn = torch.vmap(lambda k: random.permutation(k, 3))(random.split(random.key(2), 6000))
    assert (drawn.sort(-1).values == torch.arange(3)).all()
    _, counts = torch.unique(drawn, dim=0, return_counts=True)
    chi_square = ((counts - 1000.0) ** 2 / 1000).sum()
    assert len(counts) == 6 and chi_square < 20.5  # 0.1% of 5 degrees of freedom


def test_categorical_draws_by_softmax_and_never_minus_infinity():
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0])
    drawn = random.categorical(random.key(3), logits.expand(50_000, 4))
    counts = torch.bincount(drawn, minlength=4)
    expected = 50_000 * torch.softmax(logits, 0)
    assert counts[1] == 0
    assert ((counts - expected)[[0, 2, 3]] ** 2 / expected[[0, 2, 3]]).sum() < 13.8


def test_choice_with_and_without_replacement_follows_the_weights():
    keys = random.split(random.key(3), 20_000)
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2])
    drawn = torch.vmap(lambda k: random.choice(k, 4, (2,), replace=False, p=weights))(keys)
    assert (drawn[:, 0] != drawn[:, 1]).all() and (drawn != 1).all()
    first = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    torch.testing.assert_close(first, weights, rtol=0, atol=0.015)
    again = random.choice(keys[0], 4, (20_000,), p=weights)
    torch.testing.assert_close(torch.bincount(again) / 20_000, weights, rtol=0, atol=0.015)
    assert sorted(random.choice(keys[0], 9, (3, 3), replace=False).flatten()) == list(range(9))
    assert random.choice(keys[0], 5, (1000,)).unique().tolist() == [0, 1, 2, 3, 4]


K = random.key(0)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: random.key(2**64), str(2**64)),
        (lambda: random.bits(torch.zeros(2), (3,)), "torch.float32"),
        (lambda: random.bits(random.split(K, 3), (3,)), "(3, 2)"),
        (lambda: random.bits(K, (3,), offset=-1), "offset (-1)"),
        (lambda: random.split(K, 0), "n (0)"),
        (lambda: random.fold_in(K, 2**63), str(2**63)),
        (lambda: random.fold_in(random.split(K), 1), "(2, 2)"),
        (lambda: random.fold_in(K, torch.ones(2)), "torch.float32"),
        (lambda: random.fold_in(K, torch.ones(2, dtype=torch.int64, device="meta")), "meta"),
        (lambda: random.uniform(K, (3,), low=1.0, high=0.0), "low (1.0)"),
        (lambda: random.uniform(K, (3,), dtype=torch.int64), "torch.int64"),
        (lambda: random.normal(K, (3,), dtype=torch.int32), "torch.int32"),
        (lambda: random.integers(K, (3,), 5, 5), "low 5"),
        (lambda: random.bernoulli(K, 1.5, (3,)), "p (1.5)"),
        (lambda: random.dropout(K, torch.ones(3), 1.0), "rate (1.0)"),
        (lambda: random.dropout(K, torch.ones(3), -0.1), "rate (-0.1)"),
        (lambda: random.dropout(K, torch.ones(3), math.nan), "rate (nan)"),
        (lambda: random.dropout(K, torch.ones(3, dtype=torch.int64), 0.1), "torch.int64"),
        (lambda: random.dropout(K, torch.ones(3, device="meta"), 0.1), "meta"),
        (lambda: random.choice(K, 3, (4,), replace=False), "n = 3"),
        (lambda: random.choice(K, 3, p=torch.ones(4)), "(4,)"),
    ],
)
def test_bad_arguments_raise_naming_the_value(call, said: str):
    with pytest.raises(ValueError) as error:
        call()
    assert said in str(error.value)


@pytest.mark.gpu
def test_cuda_draws_the_numbers_of_the_cpu():
    expected = draw_all(random.key(11))
    key = random.key(11, device="cuda")
    for draw in (draw_all, torch.compile(draw_all, fullgraph=True)):
        assert not differing({name: x.cpu() for name, x in draw(key).items()}, expected)


@pytest.mark.gpu
def test_cuda_draws_are_mapped_over_keys_and_differentiable():
    expected = torch.vmap(draw_all)(random.split(random.key(11), 3))
    keys = random.split(random.key(11, device="cuda"), 3)  # made there, 4 words apart
    for draw in (torch.vmap(draw_all), torch.compile(torch.vmap(draw_all), fullgraph=True)):
        assert not differing({name: x.cpu() for name, x in draw(keys).items()}, expected)
        assert not differing({name: x.cpu() for name, x in draw(keys.clone()).items()}, expected)
    key, x = keys[0], torch.randn(64, 33, device="cuda")
    mask = random.dropout(key, torch.ones_like(x), 0.3)
    slope = torch.func.grad(lambda x: (random.dropout(key, x, 0.3) ** 2).sum())
    for wrapped in (slope, torch.compile(slope, fullgraph=True)):
        torch.testing.assert_close(wrapped(x), 2 * mask**2 * x)
