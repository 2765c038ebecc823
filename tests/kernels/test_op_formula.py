"""flash_attention equals the textbook formula: every option, shape, stride and dtype, CPU."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msfs_kernels import cpu, flash_attention, ops, short, tiled, tiles
from msfs_kernels.options import Options
from textbook import attention_mask, textbook
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest error, in units of the largest element; equal infinities count as equal."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape
    same = got == want
    if bool(same.all()):
        return 0.0
    error = (got - want).abs().masked_fill(same, 0.0).max()
    return float(error / want.masked_fill(want.isinf(), 0.0).abs().max().clamp_min(0.1))


def test_one_key_returns_its_value():
    v = randn(1, 2, 1, 3)
    torch.testing.assert_close(
        flash_attention(randn(1, 2, 4, 8), randn(1, 2, 1, 8, seed=1), v), v.expand(1, 2, 4, 3)
    )


def test_equal_logits_average_the_visible_values():
    q = torch.zeros(1, 2, 4)
    v = torch.tensor([[[1.0], [2.0], [6.0]]])
    o, lse = flash_attention(q, torch.ones(1, 3, 4), v, is_causal=True, return_lse=True)
    torch.testing.assert_close(o, torch.tensor([[[1.5], [3.0]]]))  # keys 0, 1 and keys 0, 1, 2
    torch.testing.assert_close(lse, torch.tensor([[math.log(2), math.log(3)]]))


def test_softcap_alibi_and_bias_by_hand():
    q = k = torch.tensor([[[2.0]]])
    options = {"scale": 3.0, "softcap": 5.0, "alibi_slopes": torch.tensor([0.5])}
    bias = torch.tensor([[[0.25]]])
    _, lse = flash_attention(q, k, k, bias=bias, return_lse=True, **options)
    assert float(lse) == pytest.approx(5 * math.tanh(12 / 5) + 0.25)
    k2 = torch.tensor([[[0.0], [2.0]]])  # the query stands at p = 1: key 0 is one token away
    _, lse = flash_attention(q, k2, k2, return_lse=True, **options)
    assert float(lse) == pytest.approx(math.log(math.exp(-0.5) + math.exp(5 * math.tanh(12 / 5))))


MASKS = {
    "causal": {"is_causal": True},
    "window": {"window": 2},
    "causal window": {"is_causal": True, "window": 3},
    "key lengths": {"key_lengths": torch.tensor([0, 4])},
    "prefix": {"is_causal": True, "prefix_lengths": torch.tensor([3, 0])},
    "prefix and window": {"window": 1, "prefix_lengths": torch.tensor([3, 0])},
    "segments": {
        "segment_ids": (
            torch.tensor([[0, 0, 1, 1, 2], [0, 1, 1, 1, 1]]),
            torch.tensor([[0, 0, 0, 1, 1, 1, 5], [1, 1, 1, 0, 0, 0, 0]]),
        )
    },
    "boolean bias": {
        "bias": torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    },
}


@pytest.mark.parametrize("options", MASKS.values(), ids=MASKS)
def test_hidden_keys_change_nothing_and_visible_keys_do(options):
    q, k, v = randn(2, 1, 5, 4), randn(2, 1, 7, 4, seed=1), randn(2, 1, 7, 4, seed=2)
    seen = attention_mask(5, 7, **options).expand(2, 1, 5, 7)[:, 0]
    for j in range(7):
        for change_k in (True, False):
            kk, vv = k.clone(), v.clone()
            (kk if change_k else vv)[:, :, j] += 1.0
            before, after = (
                flash_attention(q, k, v, **options),
                flash_attention(q, kk, vv, **options),
            )
            moved = (before != after).any(-1)[:, 0]
            alone = seen.sum(-1) == 1  # a single key has weight 1 whatever its logit is
            expected = seen[:, :, j] & ~alone if change_k else seen[:, :, j]
            assert torch.equal(moved, expected)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_query_without_keys_gives_zeros_and_zero_gradients(dtype):
    masks = [
        {"is_causal": True},  # T > S: the first queries stand before every key
        {"key_lengths": torch.zeros(2, dtype=torch.int64)},
        {"bias": torch.zeros(6, 4, dtype=torch.bool)},
        {"bias": torch.full((6, 4), -math.inf)},
        {"segment_ids": (torch.zeros(6, dtype=torch.int64), torch.ones(4, dtype=torch.int64))},
    ]
    for options in masks:
        q = randn(2, 2, 6, 4, dtype=dtype).requires_grad_()
        k = randn(2, 1, 4, 4, seed=1, dtype=dtype).requires_grad_()
        v = randn(2, 1, 4, 4, seed=2, dtype=dtype).requires_grad_()
        o, lse = flash_attention(q, k, v, return_lse=True, **options)
        rows = slice(0, 2) if "is_causal" in options else slice(0, 6)
        assert bool((o[:, :, rows] == 0).all()) and bool((lse[:, :, rows] == -math.inf).all())
        dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
        assert bool((dq[:, :, rows] == 0).all())
        assert all(bool(torch.isfinite(x).all()) for x in (dq, dk, dv))


def test_no_keys_at_all_and_no_queries_at_all():
    q, empty = randn(2, 3, 5, 4), randn(2, 3, 0, 4)
    o, lse = flash_attention(q, empty, empty, return_lse=True)
    assert bool((o == 0).all()) and bool((lse == -math.inf).all())
    assert flash_attention(empty, q, q).shape == (2, 3, 0, 4)
    assert flash_attention(q[:0], q[:0], q[:0]).shape == (0, 3, 5, 4)


@pytest.mark.parametrize("shift", [-1e4, -3e4, 3e4])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_large_logits_are_safe(shift, dtype):
    q, k, v = (randn(1, 2, 5, 8, seed=i, dtype=dtype) for i in range(3))
    bias = torch.full((5, 5), shift, dtype=dtype)
    x = [y.clone().requires_grad_() for y in (q, k, v)]
    o = flash_attention(*x, bias=bias, is_causal=True)
    grads = torch.autograd.grad(o.sum(), x)
    assert all(bool(torch.isfinite(y).all()) for y in (o, *grads))
    without = flash_attention(q, k, v, is_causal=True).double()
    # A constant shift leaves the softmax as it is, up to the rounding of shifted logits.
    assert worst(o, without) < max(
        4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * abs(shift),
        4 * torch.finfo(dtype).eps,
    )


# Random shapes, strides, dtypes and options.


@st.composite
def strided(draw, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random numbers of a shape, laid out in memory in one of several ways."""
    layout = draw(st.sampled_from(["contiguous", "tokens first", "last dim strided", "sliced"]))
    if layout == "tokens first":
        return (
            randn(*shape[:-3], shape[-2], shape[-3], shape[-1], seed=seed)
            .to(dtype)
            .transpose(-2, -3)
        )
    if layout == "last dim strided":
        return randn(*shape[:-2], shape[-1], shape[-2], seed=seed).to(dtype).mT
    if layout == "sliced":
        return randn(*shape[:-1], 2 * shape[-1] + 1, seed=seed).to(dtype)[..., 1::2]
    return randn(*shape, seed=seed).to(dtype)


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([F64, F64, torch.float32, torch.bfloat16, torch.float16]))
    lead = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    G, repeat = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    H, T = G * repeat, draw(st.sampled_from([1, 2, 7, 33]))
    S = draw(st.sampled_from([T, 1, 5, 40]))
    K = draw(st.sampled_from([8, 5]))
    Kv = draw(st.sampled_from([K, K, 3]))
    seed = draw(st.integers(0, 1000))
    q = draw(strided((*lead, H, T, K), dtype, seed))
    k = draw(strided((*lead, G, S, K), dtype, seed + 1))
    v = draw(strided((*lead, G, S, Kv), dtype, seed + 2))
    generator = torch.Generator().manual_seed(seed)
    names = draw(
        st.lists(
            st.sampled_from(
                "is_causal window key_lengths prefix_lengths segment_ids softcap alibi_slopes "
                "bias mask dropout scale".split()
            ),
            unique=True,
            max_size=4,
        )
    )
    options = {}
    for name in names:
        if name == "is_causal":
            options[name] = True
        elif name == "window":
            options[name] = draw(st.integers(1, 8))
        elif name in ("key_lengths", "prefix_lengths"):
            options[name] = torch.randint(0, S + 1, lead, generator=generator)
        elif name == "segment_ids":
            ids = [torch.randint(0, 2, (*lead, n), generator=generator).sort(-1)[0] for n in (T, S)]
            options[name] = tuple(ids)
        elif name == "softcap":
            options[name] = 2.0
        elif name == "scale":
            options[name] = 0.7
        elif name == "alibi_slopes":
            options[name] = torch.rand(H, generator=generator, dtype=F64)
        elif name == "dropout":
            options |= {"dropout": 0.4, "dropout_key": torch.tensor([seed, 7])}
        elif name in ("bias", "mask"):
            own = [1 if draw(st.booleans()) else n for n in (H, T, S)]
            values = torch.randn(own, generator=generator, dtype=F64)
            options["bias"] = values.to(dtype) if name == "bias" else values > -1.0
    return dtype, (q, k, v), options


def outputs(attention, dtype, x, options):
    """o, lse, and the gradients of a loss of both, in one dtype."""
    options = dict(options)
    leaves = [y.to(dtype).detach().requires_grad_() for y in x]
    bias = options.get("bias")
    if bias is not None and bias.dtype is not torch.bool:
        options["bias"] = bias.to(dtype).detach().requires_grad_()
        leaves.append(options["bias"])
    if "alibi_slopes" in options:
        options["alibi_slopes"] = options["alibi_slopes"].to(dtype)
    o, lse = attention(*leaves[:3], return_lse=True, **options)
    loss = o.sin().sum() + lse.masked_fill(lse == -math.inf, 0.0).cos().sum()
    return [o, lse, *torch.autograd.grad(loss, leaves)]


@settings(max_examples=120)
@given(problems())
def test_any_call_equals_the_textbook_forward_and_backward(problem):
    dtype, x, options = problem
    exact = [y.double() for y in x]
    rounded = dict(options)
    if "alibi_slopes" in options:
        rounded["alibi_slopes"] = options["alibi_slopes"].to(dtype).double()
    want = outputs(textbook, F64, exact, rounded)
    got = outputs(flash_attention, dtype, x, options)
    if dtype is F64:
        assert max(map(worst, got, want)) < 1e-12
        return
    plain = outputs(textbook, dtype, x, options)
    for mine, theirs, truth in zip(got, plain, want, strict=True):
        # Twice the plain formula's error; it may be exact by chance on tiny shapes.
        assert worst(mine, truth) <= 2 * max(worst(theirs, truth), 4 * torch.finfo(dtype).eps)


def in_float64(x):
    return x.double() if torch.is_tensor(x) and x.is_floating_point() else x


MAPPED = st.none() | st.integers(0, 2)  # where a mapped dim stands, if there is one


@settings(max_examples=40)
@given(problems(), st.lists(MAPPED, min_size=3, max_size=3), st.integers(0, 2))
def test_gradients_vmapped_over_any_dims_equal_the_textbooks_one_by_one(problem, in_dims, out_dim):
    assume(in_dims != [None] * 3)
    _, x, options = problem
    x = [in_float64(y) for y in x]
    options = {name: in_float64(y) for name, y in options.items()}
    lanes = [
        [y if d is None else y * share for y, d in zip(x, in_dims, strict=True)]
        for share in (1.0, 0.5, -0.7)
    ]

    def gradients(attention):
        return grad(lambda *x: attention(*x, **options).sin().sum(), (0, 1, 2))

    one_by_one = zip(*(gradients(textbook)(*x) for x in lanes), strict=True)
    want = [torch.stack(ys, out_dim) for ys in one_by_one]
    inputs = [
        ys[0] if d is None else torch.stack(ys, d)
        for ys, d in zip(zip(*lanes, strict=True), in_dims, strict=True)
    ]
    got = vmap(gradients(flash_attention), tuple(in_dims), out_dim)(*inputs)
    assert max(map(worst, got, want)) < 1e-12


@settings(max_examples=30)
@given(problems(), st.sampled_from([1, 50, 700, tiles.CPU_TILE]))
def test_torchs_kernels_and_tiles_of_any_size_agree(problem, budget):
    _, (q, k, v), options = problem
    options = Options(
        causal=options.get("is_causal", False),
        key_lengths=options["key_lengths"].reshape(-1) if "key_lengths" in options else None,
        scale=0.5,
    )
    q, k, v = (x.double().reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    v = k if v.shape != k.shape else v
    o, lse = cpu.forward(q, k, v, options)
    do = randn(*o.shape, seed=9)
    grads = cpu.backward(do, None, q, k, v, o, lse, options, False)[:3]
    with mock.patch.object(tiles, "CPU_TILE", budget):
        o_tiled, lse_tiled = tiled.forward(q, k, v, options)
        grads_tiled = tiled.backward(do, None, q, k, v, o, lse, options, False)[:3]
    assert max(map(worst, (o, lse, *grads), (o_tiled, lse_tiled, *grads_tiled))) < 1e-12


def test_gradients_of_a_key_of_several_heads_are_as_exact_as_the_formulas():
    for seed in range(0, 300, 3):
        q, k, v = (
            randn(h, t, 8, seed=seed + i, dtype=torch.float32)
            for i, (h, t) in enumerate(((3, 33), (1, 1), (1, 1)))
        )
        want = outputs(textbook, F64, (q, k, v), {})
        got, plain = (outputs(f, torch.float32, (q, k, v), {}) for f in (flash_attention, textbook))
        for mine, theirs, truth in zip(got, plain, want, strict=True):
            assert worst(mine, truth) <= 2 * max(worst(theirs, truth), 4 * 2**-23)


def test_rows_of_few_keys_leave_derivatives_the_error_of_the_plain_formula():
    """Where two keys share a row, dP - rowsum(P dP) is a difference of near-equal numbers."""

    def first(attention, *x):
        return grad(lambda *x: attention(*x, is_causal=True, window=2).sin().sum(), (0, 1, 2))(*x)

    def second(attention, *x):
        return jvp(lambda *y: first(attention, *y), x, x[::-1])[1]

    for derivative in (first, second):
        ours = plain = 0.0
        for seed in range(12):
            x = [randn(2, 4, 5, 4, seed=3 * seed + i) for i in range(3)]
            exact = derivative(textbook, *x)
            x = [y.float() for y in x]
            ours += sum(map(worst, derivative(flash_attention, *x), exact))
            plain += sum(map(worst, derivative(textbook, *x), exact))
        assert ours < 1.2 * plain


class Largest(TorchDispatchMode):
    """Notes the most elements that any intermediate tensor has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else (results,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return results


def test_no_order_of_derivative_holds_a_matrix_of_queries_times_keys():
    from msfs_kernels import second_order

    T, K = 4096, 8
    x = q, k, v = tuple(randn(1, 1, T, K, seed=i, dtype=torch.float32) for i in range(3))
    options = Options(causal=True, scale=0.3, window=1000, softcap=5.0)
    with Largest() as largest:
        o, lse = tiled.forward(q, k, v, options)
        point = (*x, o, lse)
        tiled.backward(o, lse, *point, options, False)
        tiled.tangent(*x, None, *point, options)
        second_order.second_backward(o, lse, *x, None, *x, lse, options, False)
        second_order.second_tangent(*x, None, *x, None, *x, lse, options)
    assert largest.elements < T * T / 16


def test_dropout_keeps_the_mean_and_is_a_function_of_its_key():
    q = k = torch.zeros(1, 8, 64, 4)
    v = torch.ones(1, 8, 64, 4)

    def run(key):
        return flash_attention(q, k, v, dropout=0.3, dropout_key=torch.tensor(key))

    o = run([1, 2])
    assert torch.equal(o, run([1, 2])) and not torch.equal(o, run([1, 3]))
    assert float(o.mean()) == pytest.approx(1.0, abs=0.02)
    kept = o[0, :, :, 0] * 64 * 0.7  # how many of 64 keys each query keeps
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    torch.testing.assert_close(flash_attention(q, k, v, dropout=0.0), v)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_a_kind_of_call_that_came_before_goes_a_short_way_to_the_same_bits(dtype, causal):
    def wide(*shape, seed):  # heads beside each other in memory, a gap behind each
        return randn(shape[0], shape[2], shape[1], 2 * shape[3], seed=seed, dtype=dtype)[
            ..., : shape[3]
        ].transpose(1, 2)

    def results(x, do, **options):
        leaves = [y.clone().requires_grad_() for y in x]
        o, lse = flash_attention(*leaves, is_causal=causal, return_lse=True, **options)
        first = torch.autograd.grad(o, leaves, do, retain_graph=True)
        second = torch.autograd.grad(o.sin().sum() + lse.sum(), leaves, create_graph=True)
        third = torch.autograd.grad(sum(y.sum() for y in second), leaves)
        return *flash_attention(*x, is_causal=causal, return_lse=True), o, lse, *first, *third

    short.REPLAYS.clear()
    for kind, shape in enumerate(
        ((2, 3, 5, 8), (1, 2, 1, 8), (3, 5, 8), (2, 1, 3, 5, 8), (2, 4, 33, 8))
    ):
        make = wide if len(shape) == 4 else randn
        for seed in range(0, 9, 3):
            x = [make(*shape, seed=seed + i) for i in range(3)]
            x = [x[0], x[1][:, ::2], x[2][:, ::2]] if kind == 4 else x  # grouped heads
            x = [x[0]] * 3 if seed == 0 and kind < 4 else x  # one in three places comes first
            x, do = [y.to(dtype) for y in x], randn(*shape, seed=seed + 9, dtype=dtype)
            do = do.sum().expand(shape) if kind == 0 else do  # what the gradient of a sum gets
            got = results(x, do)
            with mock.patch.object(short, "attention", lambda *_: None):
                want = results(x, do)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert all(a.stride() == b.stride() for a, b in zip(got, want, strict=True))
    assert short.REPLAYS and all(len(kind[0]) == 4 for kind in short.REPLAYS)


def test_numbers_that_are_not_in_memory_as_they_read_reach_kernels_as_they_read():
    class Watched:
        def __getattr__(self, name):
            def kernel(*args):
                assert not any(isinstance(x, Tensor) and x.is_neg() for x in args)
                return getattr(cpu, name)(*args)

            return kernel

    x = tuple(
        torch.view_as_complex(randn(2, 2, 3, 4, 2, seed=i, dtype=torch.float32)).conj().imag
        for i in range(3)
    )
    assert x[0].is_neg()
    plain = tuple(y.resolve_neg() for y in x)

    def results(x, do):
        leaves = [y.detach().requires_grad_() for y in x]
        o = flash_attention(*leaves)
        grads = torch.autograd.grad(o, leaves, do)
        return flash_attention(*x), *grads, *jvp(flash_attention, x, (do, do, do))

    with mock.patch.object(ops, "backend", lambda q, v: Watched()):
        got = results(x, x[1])
    torch.testing.assert_close(got, results(plain, plain[1]))


def test_results_have_tokens_before_heads_in_memory():
    o = flash_attention(*(randn(2, 3, 5, 4, seed=i) for i in range(3)))
    assert o.transpose(1, 2).is_contiguous()


def test_batch_dims_broadcast_and_may_be_absent():
    q, k = randn(2, 3, 4, 5, 8), randn(1, 3, 2, 7, 8, seed=1)
    o = flash_attention(q, k, k)
    torch.testing.assert_close(o, flash_attention(q, k.expand(2, 3, 2, 7, 8), k[0]))
    torch.testing.assert_close(o[1, 2], flash_attention(q[1, 2], k[0, 2], k[0, 2]))
