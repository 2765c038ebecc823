"""What image networks do between convolutions, each in few passes over channels_last memory.

    y = group_norm(x, gain, bias, groups, eps, shift=time, silu=True)
    x = join(x, skip)                  # more channels; the gradient comes back in two whole pieces
    x = residual(y, bias, x)           # y + bias + x, or y + bias
    x = double(x)                      # twice the height and width, each pixel repeated

On a GPU these are Triton kernels (`triton_group_norm`) that nothing has to compile for a shape;
under torch.func transforms, in forward mode, inside torch.compile, on a CPU, in another layout and
for derivatives of derivatives they are the plain formulas, which torch differentiates.

Dimension key: B batch, C channels, H height, W width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused(*images: Tensor) -> bool:
    """Whether the kernels can take these tensors here and now."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._functorch.get_interpreter_stack()  # pyright: ignore
        and forward_ad._current_level < 0
        and all(
            type(x) in (Tensor, torch.nn.Parameter)
            and x.is_cuda
            and x.dtype in DTYPES
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            for x in images
        )
    )


def plain_group_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    shift: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """The formula that `group_norm` is."""
    if shift is not None:
        x = x + shift[:, :, None, None]
    y = F.group_norm(x, groups, gain, bias, eps)
    return F.silu(y) if silu else y


class GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, gain, bias, shift, groups: int, eps: float, silu: bool, passes: bool):
        from . import triton_group_norm

        triton_group_norm.expect(x, gain, bias, shift, groups, any(ctx.needs_input_grad))
        y, found = triton_group_norm.forward(x, gain, bias, shift, groups, eps, silu)
        ctx.save_for_backward(x, gain, bias, shift, *found)
        ctx.options = groups, eps, silu
        ctx.set_materialize_grads(False)
        return (y, x) if passes else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, more: Tensor | None = None) -> Any:  # pyright: ignore
        from . import triton_group_norm

        if dy is None:  # only what passed was used
            return more, None, None, None, *NONE
        x, gain, bias, shift, *found = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates this gradient
            given = x, gain, bias, shift
            wanted = [t for t, need in zip(given, ctx.needs_input_grad, strict=False) if need]
            y = plain_group_norm(*given, *ctx.options)
            grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            grads = [next(grads) if need else None for need in ctx.needs_input_grad[:4]]
            if grads[0] is not None and more is not None:
                grads[0] = grads[0] + more
            return *grads, *NONE
        found = triton_group_norm.Statistics(*found)
        silu = ctx.options[2]
        return *triton_group_norm.backward(dy, x, gain, bias, shift, found, silu, more), *NONE


NONE = (None,) * 4


def group_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    *,
    shift: Tensor | None = None,
    silu: bool = False,
    passes: bool = False,
) -> Any:
    """GroupNorm of x + shift, and SiLU of it.

    Args:
        x: (B, C, H, W) float; channels_last for the kernels.
        gain, bias: (C,) float.
        shift: (B, C), added to every pixel before; None adds nothing.
        silu: z sigmoid(z) of what is normalized.
        passes: returns (y, x). Who uses that x beside y, as a residual block does, has both
            gradients of x added where the norm's is made.

    Raises:
        ValueError: groups that do not divide the channels; a gain, bias or shift of another shape.

    Source: Wu and He 2018.
    """
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups ({groups}) must divide the channels ({x.shape[1]})")
    if not gain.shape == bias.shape == x.shape[1:2]:
        raise ValueError(
            f"gain {tuple(gain.shape)} and bias {tuple(bias.shape)} must be ({x.shape[1]},): one "
            "number for each channel"
        )
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(
            f"shift {tuple(shift.shape)} must be {tuple(x.shape[:2])}: one number for each image "
            "and channel"
        )
    if not fused(x):
        y = plain_group_norm(x, gain, bias, shift, groups, eps, silu)
        return (y, x) if passes else y
    # The kernels know no strides of these; in the rule, second derivatives would end at the copies.
    shift = None if shift is None else shift.contiguous()
    given = x, gain.contiguous(), bias.contiguous(), shift
    return GroupNorm.apply(*given, groups, eps, silu, passes)  # pyright: ignore


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        ctx.cut = x.shape[1]
        return torch.cat([x, skip], 1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        from . import triton_group_norm

        if torch.is_grad_enabled() or not fused(dy):
            return dy[:, : ctx.cut], dy[:, ctx.cut :]
        return triton_group_norm.split(dy, ctx.cut)


def join(x: Tensor, skip: Tensor) -> Tensor:
    """The channels of both (B, _, H, W)."""
    return Join.apply(x, skip) if fused(x, skip) else torch.cat([x, skip], 1)  # pyright: ignore


class Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor | None, x: Tensor | None) -> Tensor:
        from . import triton_group_norm

        ctx.has = bias is not None, x is not None
        ctx.dtype = None if bias is None else bias.dtype
        return triton_group_norm.residual(y, None if bias is None else bias.contiguous(), x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        from . import triton_group_norm

        (has_bias, has_x), dbias = ctx.has, None
        if has_bias and fused(dy) and not torch.is_grad_enabled():
            dbias = triton_group_norm.sums_of_channels(dy, ctx.dtype)
        elif has_bias:
            dbias = dy.sum((0, 2, 3))
        return dy, dbias, dy if has_x else None


def residual(y: Tensor, bias: Tensor | None, x: Tensor | None = None) -> Tensor:
    """y + bias + x: what a block adds to what it got.

    Args:
        y, x: (B, C, H, W); None adds nothing.
        bias: (C,), or None.

    Raises:
        ValueError: an x or a bias of another shape.
    """
    if (bias is not None and bias.shape != y.shape[1:2]) or (x is not None and x.shape != y.shape):
        shapes = [None if t is None else tuple(t.shape) for t in (bias, x)]
        raise ValueError(
            f"bias {shapes[0]} and x {shapes[1]} must be ({y.shape[1]},) and {tuple(y.shape)}"
        )
    images = [y] if x is None else [y, x]
    if fused(*images) and all(z.dtype == y.dtype for z in images):
        return Residual.apply(y, bias, x)  # pyright: ignore
    y = y if bias is None else y + bias[:, None, None]
    return y if x is None else y + x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from . import triton_group_norm

        return triton_group_norm.double(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        from . import triton_group_norm

        if torch.is_grad_enabled() or not fused(dy):
            return 4 * F.avg_pool2d(dy, 2)
        return triton_group_norm.fold(dy)


def double(x: Tensor) -> Tensor:
    """x (B, C, H, W) at twice the height and width, each pixel repeated. torch's own kernel for
    channels_last takes seven times as long as the memory does."""
    if fused(x):
        return Double.apply(x)  # pyright: ignore
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
