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

from . import ahead

PROGRAMS = 528  # of the backward, at most: each adds up the gain's gradient over its rows


def formula(a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """y by plain operations, in float32 at least."""
    wide = torch.promote_types(a.dtype, torch.float32)
    x = a.to(wide) + b.to(wide)
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.to(wide)).to(a.dtype)


def forward(a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    """y, and (2, n) float32: means (unless centred is false) and 1 / deviations."""
    from .triton_sum_norm import plan_forward

    y = torch.empty_like(a, memory_format=torch.contiguous_format)
    moments = torch.empty(2, a.numel() // a.shape[-1], dtype=torch.float32, device=a.device)
    plan_forward(a.contiguous(), b.contiguous(), gain.contiguous(), y, moments, eps, centred).run()
    return y, moments


def backward(
    dy: Tensor, a: Tensor, b: Tensor, gain: Tensor, moments: Tensor, centred: bool
) -> tuple[Tensor, Tensor]:
    """What flows back to a, which is that to b, and (P, D), whose sum over P flows to the gain."""
    from .triton_sum_norm import plan_backward

    dx = torch.empty_like(a, memory_format=torch.contiguous_format)
    blocks = min(PROGRAMS, moments.shape[1])
    sums = torch.empty(blocks, a.shape[-1], dtype=torch.float32, device=a.device)
    given = dy.contiguous(), a.contiguous(), b.contiguous(), gain.contiguous()
    plan_backward(*given, moments, dx, sums, centred).run()
    return dx, sums


class SumNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore
        ctx: Any, a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool
    ) -> Tensor:
        y, moments = forward(a, b, gain, eps, centred)
        ctx.save_for_backward(a, b, gain, moments)
        ctx.options = eps, centred
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        a, b, gain, moments = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is differentiated itself
            given = [x if x.requires_grad else x.detach().requires_grad_() for x in (a, b, gain)]
            y = formula(given[0], given[1], given[2], *ctx.options)
            return *torch.autograd.grad(y, given, dy, create_graph=True), None, None
        dx, sums = backward(dy, a, b, gain, moments, ctx.options[1])
        return dx, dx, sums.sum(0).to(gain.dtype), None, None


def expect(x: Tensor, gain: Tensor, eps: float, centred: bool) -> None:
    """Has the kernels compiled for terms like x, beside what else is to be compiled."""
    ahead.expect(forward, (x, x, gain, eps, centred))
    moments = torch.empty(2, x.numel() // x.shape[-1], dtype=torch.float32, device=x.device)
    ahead.expect(backward, (x, x, x, gain, moments, centred))


def sum_norm(a: Tensor, b: Tensor, gain: Tensor, eps: float, centred: bool) -> Tensor:
    """y (..., D) of a's dtype; for the autograd engine alone, on a GPU.

    Args:
        a, b: (..., D) of one dtype, 16 or 32 bits a number.
        gain: (D,).
        eps: added to the variance.
        centred: LayerNorm; else RMSNorm.
    """
    return SumNorm.apply(a, b, gain, eps, centred)  # pyright: ignore[reportReturnType]
