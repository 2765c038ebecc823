"""Decoding a single sequence: what one token does in a layer, in five launches instead of ten.

    row_linear      y = activation(W norm(x) + b) + residual        for one row x
    row_attention   rotates q and k, puts k and v into the cache, attends to the cache

A product of one row with a matrix takes as long as reading the matrix: a few microseconds, so that
every launch around it counts. The norm of x (each program computes it for itself: x is short), the
bias, the activation and the addition to the residual stream are therefore part of it.

Inference only: an input that requires a gradient is refused, and no transform applies.

Dimension key: K inputs, N outputs, H heads, G key heads, D head dim, L cache length (tokens).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LIBRARY = torch.library.Library("msfs_kernels", "FRAGMENT")
OPS = torch.ops.msfs_kernels
NORMS = ("none", "rms", "layer")
ACTIVATIONS = ("identity", "gelu", "gelu_tanh", "relu", "swish", "quick_gelu")


def row_linear(
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
        x: (..., K) with a single row.
        weight: (N, K), contiguous; gated: (2 N, K), and the result is activation(first N) * others.
        bias: one number a row of `weight`.
        gain, shift: (K,), of the norm: (gain + offset) x / rms(x), or LayerNorm's.
        residual: (..., N), added last.
        norm: of NORMS.
        activation: of ACTIVATIONS.

    Raises:
        ValueError: more than one row, shapes or names that do not fit.
    """
    if x.numel() != x.shape[-1] or weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"x {tuple(x.shape)} must be a single row of {weight.shape[-1]} numbers, the weight is "
            f"{tuple(weight.shape)}"
        )
    if norm not in NORMS or activation not in ACTIVATIONS:
        raise ValueError(
            f"norm ({norm!r}) must be one of {NORMS}, activation ({activation!r}) of {ACTIVATIONS}"
        )
    y = OPS.row_linear(
        x.reshape(-1), weight, bias, gain, shift, residual, norm, eps, offset, activation, gated
    )
    return y.view(*x.shape[:-1], -1)


def row_attention(
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
    """Attention of one token to the cache and itself: heads side by side, (..., H D).

    Writes the token's key, rotated, and value into the cache IN PLACE.

    Args:
        qkv: (..., (H + 2 G) D), a single row.
        keys, values: (1, G, L, D), contiguous.
        position: of the token, one int64 number: what it sees ends there.
        rotary: cosines and sines (..., D / 2) of the position, float32 (float64 for float64).
        window: keys that it sees, itself included.
    """
    cosines, sines = (None, None) if rotary is None else (x.reshape(-1) for x in rotary)
    out = OPS.row_attention(
        qkv.reshape(-1), keys, values, position.reshape(-1), cosines, sines, heads, scale,
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
        y = y - y.mean()
    if norm != "none":
        y = y * torch.rsqrt(y.square().mean() + eps)
        y = y * (gain.to(dtype) + offset)
    if shift is not None:
        y = y + shift.to(dtype)
    y = weight.to(dtype) @ y
    if bias is not None:
        y = y + bias.to(dtype)
    if gated:
        gate, up = y.chunk(2)
        y = activated(gate, activation) * up
    else:
        y = activated(y, activation)
    return (y if residual is None else y + residual.reshape(-1).to(dtype)).to(x.dtype)


def plain_attention(
    qkv, keys, values, position, cosines, sines, heads, scale, softcap, window
) -> Tensor:
    _, G, L, D = keys.shape
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).view(-1, D).split([heads, G, G])
    if cosines is not None:
        q, k = (
            torch.cat([a * cosines - b * sines, b * cosines + a * sines], -1)
            for a, b in (x.chunk(2, -1) for x in (q, k))
        )
    q, k, v = (x.to(keys.dtype) for x in (q, k, v))
    keys[0].index_copy_(1, position, k[:, None])
    values[0].index_copy_(1, position, v[:, None])
    group = heads // G
    scores = q.to(dtype).view(G, group, D) @ keys[0].to(dtype).mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = position - torch.arange(L, device=position.device)
    visible = behind >= 0
    if window:
        visible = visible & (behind < window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ values[0].to(dtype)).reshape(-1).to(qkv.dtype)


# ---------------------------------------------------------------------------------- registration


def on_gpu_linear(*args) -> Tensor:
    from msfs_kernels import triton_one_row

    return triton_one_row.linear(*args)


def on_gpu_attention(*args) -> Tensor:
    from msfs_kernels import triton_one_row

    return triton_one_row.attend(*args)


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
    "row_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift,"
    " Tensor? residual, str norm, float eps, float offset, str activation, bool gated) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.define(
    "row_attention(Tensor qkv, Tensor(a!) keys, Tensor(b!) values, Tensor position,"
    " Tensor? cosines, Tensor? sines, int heads, float scale, float softcap, int window) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("row_linear", plain_linear, "CPU")
LIBRARY.impl("row_attention", plain_attention, "CPU")
LIBRARY.impl("row_linear", on_gpu_linear, "CUDA")
LIBRARY.impl("row_attention", on_gpu_attention, "CUDA")
LIBRARY.impl("row_linear", refuse_gradients(OPS.row_linear), "Autograd")
LIBRARY.impl("row_attention", refuse_gradients(OPS.row_attention), "Autograd")
torch.library.register_fake(
    "msfs_kernels::row_linear",
    lambda x, weight, *rest: x.new_empty(weight.shape[0] // (2 if rest[-1] else 1)),
    lib=LIBRARY,
)
torch.library.register_fake(
    "msfs_kernels::row_attention",
    lambda qkv, keys, *rest: qkv.new_empty(rest[4] * keys.shape[-1]),
    lib=LIBRARY,
)
