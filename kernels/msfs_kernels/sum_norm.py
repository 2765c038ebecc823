"""The norm of a sum of two terms, and its gradient, one pass over memory each.

    x = a + b     y = (x - m) r g     m = mean(x) (RMSNorm: 0), r = 1 / sqrt(mean((x - m)^2) + eps)

Apart, the addition, the norm, and in the backward the gradients of input and gain would each read x
again. x itself is never written; sums are in float32.

Dimension key: n rows, D width, P programs of the backward.
Source: Ba et al. 2016; Zhang and Sennrich 2019.
"""

from typing import Any

import torch
from torch import Tensor

PROGRAMS = 528  # of the backward, at most: each adds up the gain's gradient over its rows


def formula(a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """y by plain operations, in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    x = a.to(wide) + b.to(wide)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.to(wide)).to(a.dtype)


class SumNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool
    ) -> Tensor:
        from .triton_sum_norm import plan_forward

        a, b = a.contiguous(), b.contiguous()
        y = torch.empty_like(a)
        moments = torch.empty(2, a.numel() // a.shape[-1], dtype=torch.float32, device=a.device)
        plan = plan_forward(a, b, gain.contiguous(), y, moments, eps, centred)
        plan.kernel[plan.grid](*plan.args, **plan.constants)
        ctx.save_for_backward(a, b, gain, moments)
        ctx.options = eps, centred
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        from .triton_sum_norm import plan_backward

        a, b, gain, moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated itself
            inputs = [
                x.detach().requires_grad_() if not x.requires_grad else x for x in (a, b, gain)
            ]
            y = formula(*inputs, *ctx.options)
            return *torch.autograd.grad(y, inputs, dy, create_graph=True), None, None
        dx = torch.empty_like(a)
        blocks = min(PROGRAMS, moments.shape[1])
        sums = torch.empty(blocks, a.shape[-1], dtype=torch.float32, device=a.device)
        plan = plan_backward(
            dy.contiguous(), a, b, gain.contiguous(), moments, dx, sums, ctx.options[1]
        )
        plan.kernel[plan.grid](*plan.args, **plan.constants)
        return dx, dx, sums.sum(0).to(gain.dtype), None, None


def sum_norm(a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """y (..., D) of a's dtype; for the autograd engine alone, on a GPU.

    Args:
        a, b: (..., D) of one dtype, 16 or 32 bits a number.
        gain: (D,).
        eps: added to the variance.
        centred: LayerNorm; else RMSNorm.
    """
    return SumNorm.apply(a, b, gain, eps, centred)  # pyright: ignore[reportReturnType]
