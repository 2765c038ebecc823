"""The raw ops, registered so that every transform is right, eager and compiled.

Five ops on canonical tensors (options.py), in the namespace `torch.ops.msfs_kernels`:

    attention                   q, k, v, bias              -> o, lse
    attention_backward          J^T (do, dlse)             -> dq, dk, dv, dbias
    attention_tangent           J (tq, tk, tv, tbias)      -> to, tlse
    attention_second_backward   see second_order.py        -> dq, dk, dv, dbias
    attention_second_tangent    see second_order.py        -> uto, utlse

Each has a kernel per device, a fake and a vmap rule, and one Python entry registered for both Autograd (autograd,
AOTAutograd) and FuncTorchDynamicLayerFrontMode (torch.func): the entry applies an autograd.Function whose forward
calls the op again below autograd. torch.library.register_autograd in its place gives zero tangents without an error,
and an autograd.Function called from Python is wrong under torch.compile.

The rules are closed: derivatives of the first three ops are made of the five, by the identities

    D_t [J^T d]        = J^T t_d + second_backward(d, t)        grad <c, J^T d> = (J c, second_backward(d, c))
    D_u [J t]          = J u_t   + second_tangent(t, u)         grad <c, J t>   = (J^T c, second_backward(c, t))

o and lse that the derivative ops take are functions of q, k, v and bias: all derivatives here are total, so these
inputs get no gradient of their own. Derivatives of the last two ops, third derivatives of attention, raise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, second_order
from .options import Options, accumulate_dtype, empty_tokens_first

LIBRARY = torch.library.Library("msfs_kernels", "DEF")
OPS = torch.ops.msfs_kernels

OPTIONS = (
    "Tensor? key_lengths, Tensor? prefix_lengths, Tensor? q_segments, Tensor? k_segments, Tensor? alibi, Tensor? rng, "
    "bool causal, int window, float scale, float softcap, float dropout, str precision, bool deterministic"
)
OPTION_COUNT = (
    len(Options._fields) - 1
)  # without the bias, which is differentiable and stands with q, k, v
OPTION_TENSORS = OPTIONS.count("Tensor?")
INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? bias"
TANGENTS = "Tensor tq, Tensor tk, Tensor tv, Tensor? tbias"
GRADIENTS = (
    "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"  # dbias has no element unless asked for
)

SCHEMAS = {
    "attention": f"({INPUTS}, {OPTIONS}) -> (Tensor o, Tensor lse)",
    "attention_backward": (
        f"(Tensor do, Tensor? dlse, {INPUTS}, Tensor o, Tensor lse, bool need_dbias, {OPTIONS}) -> {GRADIENTS}"
    ),
    "attention_tangent": f"({TANGENTS}, {INPUTS}, Tensor o, Tensor lse, {OPTIONS}) -> (Tensor to, Tensor tlse)",
    "attention_second_backward": (
        f"(Tensor do, Tensor? dlse, {TANGENTS}, {INPUTS}, Tensor o, Tensor lse, Tensor to, Tensor tlse,"
        f" bool need_dbias, {OPTIONS}) -> {GRADIENTS}"
    ),
    "attention_second_tangent": (
        f"({TANGENTS}, Tensor uq, Tensor uk, Tensor uv, Tensor? ubias, {INPUTS}, Tensor o, Tensor lse, Tensor tlse,"
        f" Tensor uo, Tensor ulse, {OPTIONS}) -> (Tensor uto, Tensor utlse)"
    ),
}
ARGUMENTS = {
    name: [part.split()[-1] for part in schema[1 : schema.index(")")].split(", ")]
    for name, schema in SCHEMAS.items()
}
BIAS_LIKE = ("bias", "tbias", "ubias")


# Kernels and fakes.


def backend(x: Tensor) -> Any:
    """The module with forward, backward and tangent for a device type."""
    if x.device.type == "cpu":
        return cpu
    from . import triton_backend

    return triton_backend


def attention_kernel(q, k, v, bias, *rest):
    return backend(q).forward(q, k, v, Options(bias, *rest))


def backward_kernel(do, dlse, q, k, v, bias, o, lse, need_dbias, *rest):
    grads = backend(q).backward(do, dlse, q, k, v, o, lse, Options(bias, *rest), need_dbias)
    return with_dbias(grads, bias, need_dbias)


def tangent_kernel(tq, tk, tv, tbias, q, k, v, bias, o, lse, *rest):
    return backend(q).tangent(tq, tk, tv, tbias, q, k, v, o, lse, Options(bias, *rest))


def second_backward_kernel(
    do, dlse, tq, tk, tv, tbias, q, k, v, bias, o, lse, to, tlse, need_dbias, *rest
):
    options = Options(bias, *rest)
    grads = second_order.second_backward(
        do, dlse, tq, tk, tv, tbias, q, k, v, o, lse, to, tlse, options, need_dbias
    )
    return with_dbias(grads, bias, need_dbias)


def second_tangent_kernel(
    tq, tk, tv, tbias, uq, uk, uv, ubias, q, k, v, bias, o, lse, tlse, uo, ulse, *rest
):
    options = Options(bias, *rest)
    return second_order.second_tangent(
        tq, tk, tv, tbias, uq, uk, uv, ubias, q, k, v, o, lse, tlse, uo, ulse, options
    )


def with_dbias(grads, bias: Tensor | None, need_dbias: bool):
    """dbias summed to the bias's own shape, or a tensor without elements: schemas have no optional results."""
    dq, dk, dv, dbias = grads
    if bias is None or not need_dbias:
        return dq, dk, dv, dq.new_empty(0)
    return dq, dk, dv, dbias.sum_to_size(bias.shape).to(bias.dtype)


def fake_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, _ = q.shape
    o = empty_tokens_first(q, B, H, T, v.shape[3])
    return o, q.new_empty((B, H, T), dtype=accumulate_dtype(q.dtype))


def fake_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, need_dbias: bool):
    dbias = q.new_empty(0) if bias is None or not need_dbias else bias.new_empty(bias.shape)
    return *(empty_tokens_first(x, *x.shape) for x in (q, k, v)), dbias


def fake(name: str) -> Callable:
    """What the op returns, without values: shapes, dtypes and strides."""
    names = ARGUMENTS[name]

    def gradients(*args):
        given = dict(zip(names, args, strict=True))
        return fake_gradients(
            given["q"], given["k"], given["v"], given["bias"], given["need_dbias"]
        )

    def outputs(*args):
        given = dict(zip(names, args, strict=True))
        return fake_outputs(given["q"], given["v"])

    return gradients if "need_dbias" in names else outputs


# vmap: the mapped dim becomes part of the batch of one call.


def fold(x: Tensor, dim: int | None, size: int) -> Tensor:
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def vmap_rule(name: str) -> Callable:
    names = ARGUMENTS[name]

    def rule(info, in_dims, *args):
        given = dict(zip(names, args, strict=True))
        dims = dict(zip(names, in_dims, strict=True))
        batch = given["q"].shape[0 if dims["q"] is None else (1 if dims["q"] == 0 else 0)]
        need_dbias = given.get("need_dbias", False)
        widened = None  # the bias's own batch size, where its gradient came out wider
        folded = []
        for argument, x in given.items():
            if not isinstance(x, Tensor):
                folded.append(x)
                continue
            dim = dims[argument]
            if argument in BIAS_LIKE:
                x = x if dim is None else x.movedim(dim, 0)
                own = x.shape[0 if dim is None else 1]
                if dim is None and own == 1 and not need_dbias:
                    folded.append(x)
                    continue
                if own == 1 and batch != 1:
                    x = (
                        x.expand(batch, *x.shape[1:])
                        if dim is None
                        else x.expand(-1, batch, *x.shape[2:])
                    )
                    widened = True
                dim = None if dim is None else 0
            folded.append(fold(x, dim, info.batch_size))
        results = getattr(OPS, name)(*folded)
        outputs, out_dims = [], []
        for i, x in enumerate(results):
            if i == 3 and (given["bias"] is None or not need_dbias):
                outputs.append(x)
                out_dims.append(None)
                continue
            x = x.unflatten(0, (info.batch_size, -1))
            if i == 3 and widened:
                x = x.sum(1, keepdim=True)
            outputs.append(x)
            out_dims.append(0)
        return tuple(outputs), tuple(out_dims)

    return rule


# Derivatives.


def zeros_like(x: Tensor) -> Tensor:
    """Zeros that take no memory."""
    return x.new_zeros(()).expand(x.shape)


def filled(x: Tensor | None, like: Tensor) -> Tensor:
    return zeros_like(like) if x is None else x


def filled_tangents(tangents: tuple, primals: tuple) -> tuple:
    """Zeros for the tangents of q, k and v that are None; the bias's stays None."""
    return *(filled(t, x) for t, x in zip(tangents[:3], primals[:3], strict=True)), tangents[3]


def any_given(xs: tuple) -> bool:
    return any(x is not None for x in xs)


def total(parts: list[tuple]) -> tuple:
    first, *others = parts
    for other in others:
        first = tuple(a + b for a, b in zip(first, other, strict=True))
    return first


def save(ctx, tensors: tuple, options: tuple) -> None:
    """Keeps tensors and option tensors for both modes, and the option scalars."""
    ctx.set_materialize_grads(False)
    ctx.scalars = options[OPTION_TENSORS:]
    tensors = (*tensors, *options[:OPTION_TENSORS])
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def saved(ctx) -> tuple[tuple, tuple]:
    tensors = ctx.saved_tensors
    return tensors[:-OPTION_TENSORS], (*tensors[-OPTION_TENSORS:], *ctx.scalars)


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
        (*x, o, lse), options = saved(ctx)
        need_dbias = ctx.needs_input_grad[3]
        dq, dk, dv, dbias = OPS.attention_backward(
            filled(do, o), dlse, *x, o, lse, need_dbias, *options
        )
        return dq, dk, dv, dbias if need_dbias else None, *NO_GRADS

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[4:]))
        (*x, o, lse), options = saved(ctx)
        return OPS.attention_tangent(*filled_tangents(tangents, tuple(x)), *x, o, lse, *options)


class AttentionBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.need_dbias = inputs[8]
        save(ctx, inputs[:8], inputs[9:])

    @staticmethod
    def backward(ctx, *cotangents):
        refuse_option_gradients(any(ctx.needs_input_grad[9:]))
        (do, dlse, *x, o, lse), options = saved(ctx)
        direction = filled_tangents(cotangents, tuple(x))
        if not ctx.need_dbias:
            direction = (*direction[:3], None)
        to, tlse = OPS.attention_tangent(*direction, *x, o, lse, *options)
        need_dbias = ctx.needs_input_grad[5]
        dq, dk, dv, dbias = OPS.attention_second_backward(
            do, dlse, *direction, *x, o, lse, to, tlse, need_dbias, *options
        )
        given = None if dlse is None else tlse
        return to, given, dq, dk, dv, dbias if need_dbias else None, None, None, None, *NO_GRADS

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[9:]))
        (do, dlse, *x, o, lse), options = saved(ctx)
        tdo, tdlse, direction = tangents[0], tangents[1], tangents[2:6]
        parts = []
        if any_given((tdo, tdlse)):
            parts.append(
                OPS.attention_backward(filled(tdo, do), tdlse, *x, o, lse, ctx.need_dbias, *options)
            )
        if any_given(direction):
            direction = filled_tangents(direction, tuple(x))
            to, tlse = OPS.attention_tangent(*direction, *x, o, lse, *options)
            parts.append(
                OPS.attention_second_backward(
                    do, dlse, *direction, *x, o, lse, to, tlse, ctx.need_dbias, *options
                )
            )
        return total(parts)


class AttentionTangent(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, (*inputs[:10], *output), inputs[10:])

    @staticmethod
    def backward(ctx, cto, ctlse):
        refuse_option_gradients(any(ctx.needs_input_grad[10:]))
        (*t_and_x, o, lse, to, tlse), options = saved(ctx)
        t, x = t_and_x[:4], t_and_x[4:]
        cto = filled(cto, to)
        needs = ctx.needs_input_grad
        dt: tuple = (None,) * 4
        if any(needs[:4]):
            dt = OPS.attention_backward(cto, ctlse, *x, o, lse, needs[3], *options)
        dx: tuple = (None,) * 4
        if any(needs[4:8]):
            dx = OPS.attention_second_backward(
                cto, ctlse, *t, *x, o, lse, to, tlse, needs[7], *options
            )
        dtbias, dbias = dt[3] if needs[3] else None, dx[3] if needs[7] else None
        return *dt[:3], dtbias, *dx[:3], dbias, None, None, *NO_GRADS

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_option_gradients(any_given(tangents[10:]))
        (*t_and_x, o, lse, _, tlse), options = saved(ctx)
        t, x = tuple(t_and_x[:4]), tuple(t_and_x[4:])
        parts = []
        if any_given(tangents[:4]):
            ut = filled_tangents(tangents[:4], x)
            parts.append(OPS.attention_tangent(*ut, *x, o, lse, *options))
        if any_given(tangents[4:8]):
            u = filled_tangents(tangents[4:8], x)
            uo, ulse = OPS.attention_tangent(*u, *x, o, lse, *options)
            parts.append(OPS.attention_second_tangent(*t, *u, *x, o, lse, tlse, uo, ulse, *options))
        return total(parts)


class AttentionSecondBackward(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = jvp = staticmethod(refuse_third_derivative)


class AttentionSecondTangent(AttentionSecondBackward):
    pass


# Registration.


def register(name: str, kernel: Callable, rule: Any) -> None:
    LIBRARY.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(OPS, name)

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    rule.forward = staticmethod(forward)
    rule.vmap = staticmethod(vmap_rule(name))

    def entry(*args):
        return rule.apply(*args)

    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"msfs_kernels::{name}", fake(name), lib=LIBRARY)
    LIBRARY.impl(name, entry, "Autograd")
    LIBRARY.impl(name, entry, "FuncTorchDynamicLayerFrontMode")


register("attention", attention_kernel, Attention)
register("attention_backward", backward_kernel, AttentionBackward)
register("attention_tangent", tangent_kernel, AttentionTangent)
register("attention_second_backward", second_backward_kernel, AttentionSecondBackward)
register("attention_second_tangent", second_tangent_kernel, AttentionSecondTangent)
