"""One row through a layer: the plain formulas by hand, the Triton kernels in the interpreter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from msfs_kernels import one_row
from msfs_kernels.one_row import row_attention, row_linear

from msfs_functional.attention import attention
from msfs_functional.rotary import rotary_table, rotate


def test_linear_is_norm_product_activation_and_sum():
    x, w, b, r = (
        torch.randn(*s, dtype=torch.float64) for s in ((1, 1, 6), (8, 6), (8,), (1, 1, 8))
    )
    gain, shift = torch.randn(2, 6, dtype=torch.float64)
    layer = F.layer_norm(x, (6,), gain, shift, 1e-3)
    got = row_linear(x, w, b, gain=gain, shift=shift, residual=r, norm="layer", eps=1e-3)
    torch.testing.assert_close(got, F.linear(layer, w, b) + r)
    rms = F.rms_norm(x, (6,), gain + 1, 1e-3)
    got = row_linear(
        x, w, gain=gain, norm="rms", eps=1e-3, offset=1.0, activation="swish", gated=True
    )
    gate, up = F.linear(rms, w).chunk(2, -1)
    torch.testing.assert_close(got, F.silu(gate) * up)
    torch.testing.assert_close(row_linear(x, w, b, activation="gelu"), F.gelu(F.linear(x, w, b)))


@pytest.mark.parametrize("heads, window, softcap", [(4, None, None), (2, 3, 2.0)])
def test_attention_is_that_of_the_whole_sequence(heads, window, softcap):
    """Token by token, against attention over all tokens."""
    G, D, T = 2, 6, 7
    qkv = torch.randn(T, (heads + 2 * G) * D, dtype=torch.float64)
    table = cosines, sines = rotary_table(torch.arange(T), D, 100.0, dtype=torch.float64)
    cache = torch.zeros(2, 1, G, 9, D, dtype=torch.float64)
    options: dict[str, Any] = {"scale": 0.4, "softcap": softcap, "window": window}
    got = [
        row_attention(
            qkv[t][None, None],
            cache[0],
            cache[1],
            torch.tensor([t]),
            (cosines[t], sines[t]),
            heads=heads,
            **options,
        )[0, 0]
        for t in range(T)
    ]
    q, k, v = (
        x.unflatten(-1, (-1, D)).transpose(0, 1) for x in qkv.split([heads * D, G * D, G * D], -1)
    )
    q, k = rotate(q, *table), rotate(k, *table)
    whole = attention(q, k, v, is_causal=True, implementation="reference", **options)
    torch.testing.assert_close(torch.stack(got), whole.transpose(0, 1).flatten(1))
    torch.testing.assert_close(cache[0, 0, :, :T], k)


def test_gradients_and_several_rows_are_refused():
    w = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no derivative"):
        row_linear(torch.ones(1, 4), w)
    with pytest.raises(ValueError, match="must be a single row of 4"):
        row_linear(torch.ones(2, 4), w)
    with pytest.raises(ValueError, match="norm"):
        row_linear(torch.ones(1, 4), w, norm="batch")


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


def interpreted_linear(K, N, norm, activation, gated, dtype):
    """By the kernel, by the formula, and by the formula in float64."""
    from msfs_kernels import triton_one_row

    torch.manual_seed(0)
    x, gain, shift = torch.randn(3, K).to(dtype)
    w, b = torch.randn(2 * N if gated else N, K).to(dtype) / 8, torch.randn(2 * N).to(dtype)
    args = (x, w, b[: len(w)], gain, shift if norm == "layer" else None, b[:N], norm, 1e-5, 0.5)
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in args]
    return (
        triton_one_row.linear(*args, activation, gated),
        one_row.plain_linear(*args, activation, gated),
        one_row.plain_linear(*exact, activation, gated),
    )


@pytest.mark.parametrize("case", LINEARS)
def test_the_interpreted_linear_kernel_equals_the_formula(interpreter, case):
    got, plain, exact = interpreter(interpreted_linear, *case)
    noise = torch.finfo(got.dtype).eps * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * torch.maximum((plain - exact).abs().max(), noise)


def interpreted_attention(heads, G, D, at, window, softcap, rotary):
    """Result and cache by the kernel, and by the formula."""
    from msfs_kernels import triton_one_row

    triton_one_row.HELD = 256  # so that the cache takes several rounds
    torch.manual_seed(0)
    qkv, cache = torch.randn((heads + 2 * G) * D), torch.randn(2, 1, G, 96, D)
    table = torch.randn(2, D // 2) if rotary else (None, None)
    own, theirs = cache.clone(), cache.clone()
    rest = (torch.tensor([at]), *table, heads, 0.3, softcap, window)
    got = triton_one_row.attend(qkv, own[0], own[1], *rest)
    return (got, own), (one_row.plain_attention(qkv, theirs[0], theirs[1], *rest), theirs)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_the_interpreted_attention_kernel_equals_the_formula(interpreter, case):
    torch.testing.assert_close(*interpreter(interpreted_attention, *case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_the_formulas_on_a_gpu(dtype):
    """Launched twice in a row, the second reading what the first wrote."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=dtype)  # noqa: E731
    error = 2e-2 if dtype is torch.bfloat16 else 1e-4
    x, gain, shift, up, down = make(768), make(768), make(768), make(3072, 768), make(768, 3072)
    up, down = up / 28, down / 55
    for _ in range(20):
        y = row_linear(x, up, gain=gain, shift=shift, norm="layer", activation="gelu_tanh")
        z = row_linear(y, down, residual=x)
        expected = one_row.plain_linear(
            x, up, None, gain, shift, None, "layer", 1e-5, 0.0, "gelu_tanh", False
        )
        torch.testing.assert_close(y, expected, rtol=error, atol=error)
        expected = one_row.plain_linear(
            y, down, None, None, None, x, "none", 1e-5, 0.0, "identity", False
        )
        torch.testing.assert_close(z, expected, rtol=error, atol=error)
        x = z / z.square().mean().sqrt()
    qkv, cache = make(24 * 64), make(2, 1, 6, 200, 64)
    own, theirs = cache.clone(), cache.clone()
    rest = (torch.tensor([150], device="cuda"), None, None, 12, 0.125, 0.0, 0)
    got = torch.ops.msfs_kernels.row_attention(qkv, own[0], own[1], *rest)
    expected = one_row.plain_attention(qkv, theirs[0], theirs[1], *rest)
    torch.testing.assert_close(got, expected, rtol=error, atol=error)
    assert torch.equal(own, theirs)
