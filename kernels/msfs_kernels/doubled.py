"""The 3 x 3 convolution of an image with every pixel doubled, as one of 2 x 2 on the image itself.

    y = interleave(F.conv2d(x, kernel(weight), padding=1), bias)
      = F.conv2d(double(x), weight, bias, padding=1)

Along one side, taps w0 w1 w2 at pixel 2 i + p of the doubled image meet these of the small one:

    p = 0    i - 1: w0         i: w1 + w2
    p = 1        i: w0 + w1    i + 1: w2

So each of the 2 x 2 pixels (p, q) in place of one wants a kernel of 2 x 2, on one grid of windows:
4 products where there were 9, in the gradients, too.

On a GPU both are Triton kernels with gradients of their own, wherever `group_norm.fused` says so;
else formulas.

Dimension key: B batch, H height, W width, C channels, O outputs, I inputs.
"""

from typing import Any

import torch
from torch import Tensor

from msfs_kernels.group_norm import fused


def plain_kernel(weight: Tensor) -> Tensor:
    """The formula that `kernel` is."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    taps = torch.tensor(
        [[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device, dtype=wide
    )
    phases = torch.einsum("pak,qbl,oikl->pqoiab", taps, taps, weight.to(wide))
    return phases.flatten(0, 2).to(weight.dtype)


def plain_interleave(y: Tensor, bias: Tensor) -> Tensor:
    """The formula that `interleave` is."""
    phases, (H, W) = y.unflatten(1, (2, 2, -1)), (y.shape[2] - 1, y.shape[3] - 1)
    rows = [
        torch.stack([phases[:, p, q, :, p : H + p, q : W + q] for q in (0, 1)], -1) for p in (0, 1)
    ]
    return torch.stack(rows, 3).flatten(2, 3).flatten(3) + bias[:, None, None]


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        from . import triton_doubled

        return triton_doubled.kernel(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        from . import triton_doubled

        if not torch.is_grad_enabled() and fused(grad):
            return triton_doubled.kernel_gradient(grad)
        phases = grad.unflatten(0, (2, 2, -1))
        taps = grad.new_tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
        return torch.einsum("pak,qbl,pqoiab->oikl", taps, taps, phases)


def kernel(weight: Tensor) -> Tensor:
    """(O, I, 3, 3) to (4 O, I, 2, 2): phase 2 p + q of output o is row (2 p + q) O + o."""
    return Kernel.apply(weight) if fused(weight) else plain_kernel(weight)  # pyright: ignore


class Interleave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor) -> Tensor:
        from . import triton_doubled

        ctx.dtype = bias.dtype
        return triton_doubled.interleave(y, bias.contiguous())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # pyright: ignore
        from . import triton_doubled, triton_group_norm

        if not torch.is_grad_enabled() and fused(dy):
            sums = triton_group_norm.sums_of_channels(dy, ctx.dtype)
            return triton_doubled.part(dy), sums
        B, C, H, W = dy.shape
        parts = dy.new_zeros(B, 2, 2, C, H // 2 + 1, W // 2 + 1)
        for p in (0, 1):
            for q in (0, 1):
                place = parts[:, p, q, :, p : H // 2 + p, q : W // 2 + q]
                place.copy_(dy[:, :, p::2, q::2])
        return parts.flatten(1, 3), dy.sum((0, 2, 3))


def interleave(y: Tensor, bias: Tensor) -> Tensor:
    """(B, 4 C, H + 1, W + 1) to (B, C, 2 H, 2 W), plus the bias: pixel (2 i + p, 2 j + q) is phase
    2 p + q of position (i + p, j + q)."""
    return Interleave.apply(y, bias) if fused(y) else plain_interleave(y, bias)  # pyright: ignore
