"""Few rows through a layer: plain formulas by hand, Triton kernels in the interpreter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msfs_kernels import few_rows
from msfs_kernels.few_rows import rows_attention, rows_linear

from msfs_functional.attention import attention
from msfs_functional.rotary import rotary_table, rotate


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_is_norm_product_activation_and_sum(rows):
    x, w, b, r = (
        torch.randn(*s, dtype=torch.float64) for s in ((rows, 1, 6), (8, 6), (8,), (rows, 1, 8))
    )
    gain, shift = torch.randn(2, 6, dtype=torch.float64)
    layer = F.layer_norm(x, (6,), gain, shift, 1e-3)
    got = rows_linear(x, w, b, gain=gain, shift=shift, residual=r, norm="layer", eps=1e-3)
    torch.testing.assert_close(got, F.linear(layer, w, b) + r)
    rms = F.rms_norm(x, (6,), gain + 1, 1e-3)
    got = rows_linear(
        x, w, gain=gain, norm="rms", eps=1e-3, offset=1.0, activation="swish", gated=True
    )
    gate, up = F.linear(rms, w).chunk(2, -1)
    torch.testing.assert_close(got, F.silu(gate) * up)
    torch.testing.assert_close(rows_linear(x, w, b, activation="gelu"), F.gelu(F.linear(x, w, b)))


@pytest.mark.parametrize("heads, window, softcap", [(4, None, None), (2, 3, 2.0)])
def test_attention_is_that_of_the_whole_sequence(heads, window, softcap):
    """Token by token, against attention over all tokens; the second row is two tokens ahead."""
    G, D, T = 2, 6, 7
    qkv = torch.randn(2, T, (heads + 2 * G) * D, dtype=torch.float64)
    table = cosines, sines = rotary_table(torch.arange(T), D, 100.0, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.4, "softcap": softcap, "window": window}
    q, k, v = (
        x.unflatten(-1, (-1, D)).transpose(1, 2) for x in qkv.split([heads * D, G * D, G * D], -1)
    )
    q, k = rotate(q, *table), rotate(k, *table)
    whole = attention(q, k, v, is_causal=True, implementation="reference", **options)
    whole = whole.transpose(1, 2).flatten(2)
    cache = torch.zeros(2, 2, G, 9, D, dtype=torch.float64)
    cache[0, 1, :, :2], cache[1, 1, :, :2] = k[1, :, :2], v[1, :, :2]
    for t in range(T - 2):
        now = torch.tensor([t, t + 2])
        got = rows_attention(
            qkv[torch.arange(2), now][:, None],
            cache[0],
            cache[1],
            now,
            (cosines[now], sines[now]),
            heads=heads,
            **options,
        )[:, 0]
        torch.testing.assert_close(got, whole[torch.arange(2), now])
    torch.testing.assert_close(cache[0, 1, :, :T], k[1])


def test_gradients_and_many_rows_are_refused():
    w = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        rows_linear(torch.ones(1, 4), w)
    with pytest.raises(ValueError, match="must be at most 64 rows of 4"):
        rows_linear(torch.ones(65, 4), w)
    cache = torch.zeros(2, 2, 1, 5, 4)
    with pytest.raises(ValueError, match="a row for each"):
        rows_attention(
            torch.ones(3, 12), cache[0], cache[1], torch.tensor([1]), None, heads=1, scale=1.0
        )
    with pytest.raises(ValueError, match="norm"):
        rows_linear(torch.ones(1, 4), w, norm="batch")


LINEARS = [  # K, N, norm, activation, gated, dtype
    (40, 24, "layer", "gelu_tanh", False, torch.float32),
    (1030, 9, "rms", "swish", True, torch.float32),
    (4100, 3, "layer", "identity", True, torch.float32),
    (64, 8, "none", "gelu", False, torch.float16),
    (16, 5, "none", "relu", False, torch.float32),
    (16, 5, "rms", "quick_gelu", False, torch.float32),
]
ATTENTIONS = [  # heads, kv heads, head dim, position, window, softcap, rotary
    (4, 2, 8, 70, 0, 0.0, True),
    (3, 3, 12, 5, 3, 0.0, False),
    (2, 1, 8, 90, 60, 3.0, True),
    (2, 2, 8, 0, 0, 0.0, True),
]


def interpreted_linear(rows, K, N, norm, activation, gated, dtype):
    """By the kernel, by the formula, and by the formula in float64."""
    from msfs_kernels import triton_few_rows, triton_one_row

    torch.manual_seed(0)
    x, (gain, shift) = torch.randn(rows, K).to(dtype), torch.randn(2, K).to(dtype)
    w, b = torch.randn(2 * N if gated else N, K).to(dtype) / 8, torch.randn(2 * N).to(dtype)
    r = torch.randn(rows, N).to(dtype)
    shift = shift if norm == "layer" else None
    args = [x, w, b[: len(w)], gain, shift, r, norm, 1e-5, 0.5, activation, gated]
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    linear = triton_one_row.linear if rows == 1 else triton_few_rows.linear
    return (
        linear(*args).view(rows, -1),
        few_rows.plain_linear(*args),
        few_rows.plain_linear(*exact),
    )


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("case", LINEARS)
def test_the_interpreted_linear_kernel_equals_the_formula(interpreter, case, rows):
    got, plain, exact = interpreter(interpreted_linear, rows, *case)
    noise = torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * torch.maximum((plain - exact).abs().max(), noise)


def interpreted_attention(rows, heads, G, D, at, window, softcap, rotary):
    """Result and cache by the kernel, and by the formula."""
    from msfs_kernels import triton_few_rows, triton_one_row

    vars(triton_one_row)["HELD"] = 256  # so that the cache takes several rounds
    torch.manual_seed(0)
    qkv, cache = torch.randn(rows, (heads + 2 * G) * D), torch.randn(2, rows, G, 96, D)
    table = torch.randn(2, rows, D // 2) if rotary else (None, None)
    own, theirs = cache.clone(), cache.clone()
    rest: Any = ((at + 7 * torch.arange(rows)) % 96, *table, heads, 0.3, softcap, window)
    attend = triton_one_row.attend if rows == 1 else triton_few_rows.attend
    got = attend(qkv, own[0], own[1], *rest).view(rows, -1)
    return (got, own), (few_rows.plain_attention(qkv, theirs[0], theirs[1], *rest), theirs)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("case", ATTENTIONS)
def test_the_interpreted_attention_kernel_equals_the_formula(interpreter, case, rows):
    torch.testing.assert_close(*interpreter(interpreted_attention, rows, *case))


@pytest.mark.parametrize("rows", [2, 32, 64])
def test_kernels_of_several_rows_compile_for_hopper_without_spills(rows):
    from msfs_kernels.triton_compile import compile_launch, resources
    from msfs_kernels.triton_few_rows import plan_attention, plan_linear

    make = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16)  # noqa: E731
    soon = {"launch_pdl": True}
    x, w, gain, y = make(rows, 576), make(3072, 576), make(576), make(rows, 1536)
    given: tuple[Any, ...] = (x, w, None, gain, None, None, y, "rms", 1e-5, 0.0, "swish", True)
    caches, turns = (make(rows, 3, 320, 64) for _ in range(2)), torch.empty(2, rows, 32)
    place = torch.empty(rows, dtype=torch.int64)
    attention: tuple[Any, ...] = (make(rows, 960), *caches, place, *turns, x, 9, 0.125, 0.0, 0)
    for plan in (plan_linear(*given, soon=soon), plan_attention(*attention, soon=soon)):
        assert resources(compile_launch(plan, 90), 90).spills == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_formulas_on_a_gpu(dtype, rows):
    """Launched twice in a row, the second reading what the first wrote."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    error = 2e-2 if dtype is torch.bfloat16 else 1e-4
    x, gain, shift, up, down = (
        make(rows, 768),
        make(768),
        make(768),
        make(3072, 768),
        make(768, 3072),
    )
    up, down = up / 28, down / 55
    for _ in range(20):
        y = rows_linear(x, up, gain=gain, shift=shift, norm="layer", activation="gelu_tanh")
        z = rows_linear(y, down, residual=x)
        expected = few_rows.plain_linear(
            x, up, None, gain, shift, None, "layer", 1e-5, 0.0, "gelu_tanh", False
        )
        torch.testing.assert_close(y, expected, rtol=error, atol=error)
        expected = few_rows.plain_linear(
            y, down, None, None, None, x, "none", 1e-5, 0.0, "identity", False
        )
        torch.testing.assert_close(z, expected, rtol=error, atol=error)
        x = z / z.square().mean(-1, keepdim=True).sqrt()
    qkv, cache = make(rows, 24 * 64), make(2, rows, 6, 200, 64)
    own, theirs = cache.clone(), cache.clone()
    place = (150 + 13 * torch.arange(rows, device="cuda")) % 200
    turns = torch.randn(2, rows, 32, device="cuda")
    rest: tuple[Any, ...] = (place, *turns, 12, 0.125, 0.0, 0)
    got = torch.ops.msfs_kernels.rows_attention(qkv, own[0], own[1], *rest)
    expected = few_rows.plain_attention(qkv, theirs[0], theirs[1], *rest)
    torch.testing.assert_close(got, expected, rtol=error, atol=error)
    torch.testing.assert_close(own, theirs, rtol=1e-2, atol=1e-2)
