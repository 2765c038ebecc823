"""Decoding few sequences: what one token of each does in a layer, in five launches, not ten.

    rows_linear      y = activation(W norm(x) + b) + residual        for each row x
    rows_attention   rotates q and k, puts k and v into the cache, attends to the cache

A product of few rows with a matrix takes as long as reading the matrix: a few microseconds, so that
every launch around it counts. The norm of x (each program computes it for itself: x is short), the
bias, the activation and the addition to the residual stream are therefore part of it.

Inference only: an input that requires a gradient is refused, and no transform applies.

Dimension key: M rows (sequences), K inputs, N outputs, H heads, G key heads, D head dim, L cache
length (tokens).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("msfs_kernels", "FRAGMENT")
OPS = torch.ops.msfs_kernels
NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "relu", "swish", "quick_gelu")
MOST = 64  # rows: beyond, a product is more than reading its matrix


def rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-5,
    offset: float = 0.0,
    activation: str = "identity",
    gated: bool = False,
) -> Tensor:
    """activation(norm(x) weight^T + bias) + residual, computed in float32.

    Args:
        x: (..., K), at most MOST rows.
        weight: (N, K), contiguous; gated: (2 N, K), and the result is activation(first N) * others.
        bias: one number a row of `weight`.
        gain, shift: (K,), of the norm: (gain + offset) x / rms(x), or LayerNorm's.
        residual: (..., N), added last.
        norm: of NORMS.
        activation: of ACTIVATIONS.

    Raises:
        ValueError: more rows, shapes or names that do not fit.
    """
    K = x.shape[-1]
    if x.numel() > MOST * K or weight.shape[-1] != K:
        raise ValueError(
            f"x {tuple(x.shape)} must be at most {MOST} rows of {weight.shape[-1]} numbers, the "
            f"weight is {tuple(weight.shape)}"
        )
    if norm not in NORMS or activation not in ACTIVATIONS:
        raise ValueError(
            f"norm ({norm!r}) must be one of {NORMS}, activation ({activation!r}) of {ACTIVATIONS}"
        )
    if residual is not None:
        residual = residual.reshape(-1, residual.shape[-1])
    y = OPS.rows_linear(
        x.reshape(-1, K), weight, bias, gain, shift, residual, norm, eps, offset, activation, gated
    )
    return y.view(*x.shape[:-1], -1)


def rows_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of a token of each row to its cache and itself: heads side by side, (..., H D).

    Writes the tokens' keys, rotated, and values into the cache IN PLACE.

    Args:
        qkv: (..., (H + 2 G) D), M rows.
        keys, values: (M, G, L, D), contiguous.
        position: of the tokens, M int64 numbers: what each sees ends there.
        rotary: cosines and sines of the positions, M rows of D / 2, float32 (float64 for float64).
        window: keys that it sees, itself included.
    """
    M, _, _, D = keys.shape
    if qkv.numel() != M * qkv.shape[-1] or position.numel() != M:
        raise ValueError(
            f"qkv {tuple(qkv.shape)} and position {tuple(position.shape)} must have a row for each "
            f"of the cache's, {M}"
        )
    cosines, sines = (None, None) if rotary is None else (x.reshape(M, D // 2) for x in rotary)
    out = OPS.rows_attention(
        qkv.reshape(M, -1), keys, values, position.reshape(-1), cosines, sines, heads, scale,
        softcap or 0.0, window or 0,
    )  # fmt: skip
    return out.view(*qkv.shape[:-1], -1)


# ------------------------------------------------------------------------------- plain formulas


def activated(x: Tensor, activation: str) -> Tensor:
    functions = {
        "identity": lambda x: x,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
        "swish": F.silu,
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    }
    return functions[activation](x)


def plain_linear(
    x, weight, bias, gain, shift, residual, norm, eps, offset, activation, gated
) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        y = y * (gain.to(dtype) + offset)
    if shift is not None:
        y = y + shift.to(dtype)
    y = y @ weight.to(dtype).mT
    if bias is not None:
        y = y + bias.to(dtype)
    if gated:
        gate, up = y.chunk(2, -1)
        y = activated(gate, activation) * up
    else:
        y = activated(y, activation)
    return (y if residual is None else y + residual.to(dtype)).to(x.dtype)


def plain_attention(
    qkv, keys, values, position, cosines, sines, heads, scale, softcap, window
) -> Tensor:
    M, G, L, D = keys.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).view(M, -1, D).split([heads, G, G], 1)
    if cosines is not None:
        c, s = cosines[:, None], sines[:, None]
        q, k = (
            torch.cat([a * c - b * s, b * c + a * s], -1)
            for a, b in (x.chunk(2, -1) for x in (q, k))
        )
    q, k, v = (x.to(keys.dtype) for x in (q, k, v))
    rows = torch.arange(M, device=keys.device)
    keys[rows, :, position], values[rows, :, position] = k, v
    scores = q.to(dtype).view(M, G, heads // G, D) @ keys.to(dtype).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = position[:, None] - torch.arange(L, device=position.device)
    visible = behind >= 0
    if window:
        visible = visible & (behind < window)
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    return (weights @ values.to(dtype)).reshape(M, -1).to(qkv.dtype)


# ---------------------------------------------------------------------------------- registration


def on_gpu_linear(x: Tensor, *args) -> Tensor:
    from msfs_kernels import triton_few_rows, triton_one_row

    if x.shape[0] == 1:
        return triton_one_row.linear(x, *args)[None]
    return triton_few_rows.linear(x, *args)


def on_gpu_attention(qkv: Tensor, *args) -> Tensor:
    from msfs_kernels import triton_few_rows, triton_one_row

    if qkv.shape[0] == 1:
        return triton_one_row.attend(qkv, *args)[None]
    return triton_few_rows.attend(qkv, *args)


def refuse_gradients(op):
    def run(*args):
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"{op} has no derivative: call it under torch.no_grad(), or decode with the model's"
                " own blocks"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return run


LIBRARY.define(
    "rows_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift,"
    " Tensor? residual, str norm, float eps, float offset, str activation, bool gated) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "rows_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position,"
    " Tensor? cosines, Tensor? sines, int heads, float scale, float softcap, int window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("rows_linear", plain_linear, "CPU")
LIBRARY.impl("rows_attention", plain_attention, "CPU")
LIBRARY.impl("rows_linear", on_gpu_linear, "CUDA")
LIBRARY.impl("rows_attention", on_gpu_attention, "CUDA")
LIBRARY.impl("rows_linear", refuse_gradients(OPS.rows_linear), "Autograd")
LIBRARY.impl("rows_attention", refuse_gradients(OPS.rows_attention), "Autograd")
torch.library.register_fake(
    "msfs_kernels::rows_linear",
    lambda x, weight, *rest: x.new_empty(len(x), weight.shape[0] // (2 if rest[-1] else 1)),
    lib=LIBRARY,
)
torch.library.register_fake(
    "msfs_kernels::rows_attention",
    lambda qkv, keys, *rest: qkv.new_empty(len(qkv), rest[4] * keys.shape[-1]),
    lib=LIBRARY,
)
