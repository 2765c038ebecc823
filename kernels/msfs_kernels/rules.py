"""Derivative rules of the raw ops, one autograd.Function each, closed under themselves.

With J the derivative of (q, k, v, bias) -> (o, lse), attention_backward is J^T d and
attention_tangent is J t, and

    D_t [J^T d] = J^T t_d + second_backward(d, t)     grad <c, J^T d> = (J c, second_backward(d, c))
    D_u [J t]   = J u_t   + second_tangent(t, u)      grad <c, J t> = (J^T c, second_backward(c, t))

so second-order compositions are made of first-order kernels and the two maps of second_order.py. o
and lse, which the derivative ops take, are functions of q, k, v and bias: derivatives here are
total, and these two get none of their own. Rules are explicit formulas: one that called
torch.func.jvp could not nest. `forward` and `vmap` of each Function are put in by ops.register.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import call
from .options import OPTION_COUNT, OPTION_TENSORS


def zeros_like(x: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return x.new_zeros(()).expand(x.shape)


def filled(x: Tensor | None, like: Tensor) -> Tensor:
    return zeros_like(like) if x is None else x


def filled_tangents(tangents: Sequence, point: Sequence) -> tuple:
    """Zeros for the tangents of q, k and v that are None; the bias's stays None."""
    return *(filled(t, x) for t, x in zip(tangents[:3], point[:3], strict=True)), tangents[3]


def any_given(xs: tuple) -> bool:
    return any(x is not None for x in xs)


def total(parts: list[tuple]) -> tuple:
    first, *others = parts
    for other in others:
        first = tuple(a + b for a, b in zip(first, other, strict=True))
    return first


def save(ctx, tensors: tuple, options: tuple) -> None:
    """Keeps tensors and option tensors for both modes, and the option scalars.

    Among the tensors stands the point of the derivative: q, k, v, bias, o, lse.
    """
    ctx.set_materialize_grads(False)
    ctx.scalars = options[OPTION_TENSORS:]
    tensors = (*tensors, *options[:OPTION_TENSORS])
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def saved(ctx) -> tuple[tuple, tuple]:
    tensors = ctx.saved_tensors
    return tensors[:-OPTION_TENSORS], (*tensors[-OPTION_TENSORS:], *ctx.scalars)


def without_output(point: Sequence) -> tuple:
    """q, k, v, bias, lse of the point, which is all that second derivatives need."""
    return *point[:4], point[5]


def refuse_option_gradients(asked: bool) -> None:
    if asked:
        raise RuntimeError(
            "flash_attention has no derivative with respect to alibi_slopes: detach them, or pass"
            " bias=-slopes[:, None, None] * distance in their place, which has one"
        )


def refuse_third_derivative(*_: Any) -> Any:
    raise RuntimeError(
        "flash_attention has first and second derivatives, and a third was asked for:"
        " use the plain formula (implementation='reference') where third derivatives are needed"
    )


NO_GRADS = (None,) * OPTION_COUNT


class Attention(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, (*inputs[:4], *output), inputs[4:])

    @staticmethod
    def backward(ctx, do, dlse):
        refuse_option_gradients(any(ctx.needs_input_grad[4:]))
        point, options = saved(ctx)
        need_dbias = ctx.needs_input_grad[3]
        do = filled(do, point[4])
        dq, dk, dv, dbias = call("attention_backward", do, dlse, *point, *options, need_dbias)
        return dq, dk, dv, dbias if need_dbias else None, *NO_GRADS

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[4:]))
        point, options = saved(ctx)
        t = filled_tangents(tangents[:4], point)
        return call("attention_tangent", *t, *point, *options)


class AttentionBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.need_dbias = inputs[-1]
        save(ctx, inputs[:8], inputs[8:-1])

    @staticmethod
    def backward(ctx, *cotangents):
        refuse_option_gradients(any(ctx.needs_input_grad[8:]))
        (do, dlse, *point), options = saved(ctx)
        t = filled_tangents(cotangents, point)
        if not ctx.need_dbias:
            t = (*t[:3], None)
        to, tlse = call("attention_tangent", *t, *point, *options)
        need_dbias = ctx.needs_input_grad[5]
        dq, dk, dv, dbias = call(
            "attention_second_backward",
            *(do, dlse, *t, *without_output(point), *options, need_dbias),
        )
        tlse = None if dlse is None else tlse
        dbias = dbias if need_dbias else None
        return to, tlse, dq, dk, dv, dbias, None, None, *NO_GRADS, None

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[8:]))
        (do, dlse, *point), options = saved(ctx)
        tdo, tdlse, t, rest = tangents[0], tangents[1], tangents[2:6], (*options, ctx.need_dbias)
        parts = []
        if any_given((tdo, tdlse)):
            parts.append(call("attention_backward", filled(tdo, do), tdlse, *point, *rest))
        if any_given(t):
            args = (do, dlse, *filled_tangents(t, point), *without_output(point), *rest)
            parts.append(call("attention_second_backward", *args))
        return total(parts)


class AttentionTangent(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:10], inputs[10:])

    @staticmethod
    def backward(ctx, cto, ctlse):
        needs = ctx.needs_input_grad
        refuse_option_gradients(any(needs[10:]))
        t_and_point, options = saved(ctx)
        t, point = t_and_point[:4], t_and_point[4:]
        cto = filled(cto, point[4])
        dt: tuple = (None,) * 4
        if any(needs[:4]):
            dt = call("attention_backward", cto, ctlse, *point, *options, needs[3])
        dx: tuple = (None,) * 4
        if any(needs[4:8]):
            args = (cto, ctlse, *t, *without_output(point), *options, needs[7])
            dx = call("attention_second_backward", *args)
        dtbias, dbias = dt[3] if needs[3] else None, dx[3] if needs[7] else None
        return *dt[:3], dtbias, *dx[:3], dbias, None, None, *NO_GRADS

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[10:]))
        t_and_point, options = saved(ctx)
        t, point = t_and_point[:4], t_and_point[4:]
        parts = []
        if any_given(tangents[:4]):
            ut = filled_tangents(tangents[:4], point)
            parts.append(call("attention_tangent", *ut, *point, *options))
        if any_given(tangents[4:8]):
            u = filled_tangents(tangents[4:8], point)
            args = (*t, *u, *without_output(point), *options)
            parts.append(call("attention_second_tangent", *args))
        return total(parts)


class AttentionSecondBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = jvp = staticmethod(refuse_third_derivative)  # pyright: ignore


class AttentionSecondTangent(AttentionSecondBackward):
    pass
