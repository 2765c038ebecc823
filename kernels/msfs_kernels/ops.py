"""The raw ops, registered so that every transform is right, eager and compiled.

Five ops on canonical tensors (options.py), in the namespace `torch.ops.msfs_kernels`:

    attention                   q, k, v, bias               -> o, lse
    attention_backward          J^T (do, dlse)              -> dq, dk, dv, dbias
    attention_tangent           J (tq, tk, tv, tbias)       -> to, tlse
    attention_second_backward   see second_order.py         -> dq, dk, dv, dbias
    attention_second_tangent    see second_order.py         -> uto, utlse

Each has a kernel per device, a fake and a vmap rule, and one Python entry registered for both
Autograd (autograd and AOTAutograd come by) and FuncTorchDynamicLayerFrontMode (torch.func does): it
applies an autograd.Function whose forward calls the op again below autograd. Seen on torch 2.11 to
2.15: torch.library.register_autograd in its place gives zero tangents without an error, and an
autograd.Function called from Python comes out wrong under torch.compile.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ahead, cpu, rules, second_order, tiled
from .batching import vmap_rule
from .dispatch import DIRECT_RULES, KERNELS, RULES, mixing_dtensors
from .options import (
    LIBRARY,
    OPS,
    OPTION_SCHEMA,
    Options,
    accumulate_dtype,
    empty_tokens_first,
)

INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? bias"
TANGENTS = "Tensor tq, Tensor tk, Tensor tv, Tensor? tbias"
SECOND_TANGENTS = "Tensor uq, Tensor uk, Tensor uv, Tensor? ubias"
GRADIENTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias)"  # dbias is empty unless asked for
LARGEST_HEAD_DIM = 256  # of the Triton kernels


def backend(q: Tensor, v: Tensor) -> Any:
    """The module whose forward, backward and tangent serve these tensors."""
    if q.device.type == "cpu":
        return cpu
    if q.dtype is torch.float64 or max(q.shape[3], v.shape[3]) > LARGEST_HEAD_DIM:
        return tiled
    from . import triton_backend

    return triton_backend


def attention(q, k, v, bias, *options):
    return backend(q, v).forward(q, k, v, Options(bias, *options))


def attention_backward(do, dlse, q, k, v, bias, o, lse, *rest):
    *options, need_dbias = rest
    full = Options(bias, *options)
    grads = backend(q, v).backward(do, dlse, q, k, v, o, lse, full, need_dbias)
    return with_dbias(grads, bias, need_dbias)


def attention_tangent(tq, tk, tv, tbias, q, k, v, bias, o, lse, *options):
    full = Options(bias, *options)
    return backend(q, v).tangent(tq, tk, tv, tbias, q, k, v, o, lse, full)


def attention_second_backward(do, dlse, tq, tk, tv, tbias, q, k, v, bias, lse, *rest):
    *options, need_dbias = rest
    full = Options(bias, *options)
    grads = second_order.second_backward(
        do, dlse, tq, tk, tv, tbias, q, k, v, lse, full, need_dbias
    )
    return with_dbias(grads, bias, need_dbias)


def attention_second_tangent(tq, tk, tv, tbias, uq, uk, uv, ubias, q, k, v, bias, lse, *options):
    full = Options(bias, *options)
    return second_order.second_tangent(tq, tk, tv, tbias, uq, uk, uv, ubias, q, k, v, lse, full)


def with_dbias(grads, bias: Tensor | None, need_dbias: bool):
    """dbias summed to the bias's shape, or nothing in it: schemas have no optional results."""
    dq, dk, dv, dbias = grads
    if bias is None or not need_dbias:
        return dq, dk, dv, dq.new_empty(0)
    return dq, dk, dv, dbias.sum_to_size(bias.shape).to(bias.dtype)


def fake(kernel: Callable, names: list[str]) -> Callable:
    """Shapes, dtypes and strides of an op's results from its arguments' names."""
    trained = kernel in (attention, attention_backward)  # what every training step launches

    def outputs(*args):
        if trained:
            ahead.expect(kernel, args)
        given = dict(zip(names, args, strict=True))
        q, v = given["q"], given["v"]
        B, H, T, _ = q.shape
        lse = q.new_empty((B, H, T), dtype=accumulate_dtype(q.dtype))
        return empty_tokens_first(q, B, H, T, v.shape[3]), lse

    def gradients(*args):
        if trained:
            ahead.expect(kernel, args)
        given = dict(zip(names, args, strict=True))
        bias = given["bias"] if given["need_dbias"] else None
        dbias = given["q"].new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return *(empty_tokens_first(given[x], *given[x].shape) for x in "qkv"), dbias

    return gradients if "need_dbias" in names else outputs


class DirectAttention(rules.Attention):
    """The same rule around the bare kernel, in the form without setup_context, which costs less."""

    @staticmethod
    def forward(ctx, *args):
        outputs = attention(*args)
        rules.save(ctx, (*args[:4], *outputs), args[4:])
        return outputs

    setup_context = torch.autograd.Function.setup_context


DIRECT_RULES["attention"] = DirectAttention


def register(kernel: Callable, rule: Any, arguments: str, results: str) -> None:
    name = kernel.__name__
    arguments = f"{arguments}, {OPTION_SCHEMA}"
    if results == GRADIENTS:
        arguments += ", bool need_dbias"
    names = [argument.split()[-1] for argument in arguments.split(", ")]
    LIBRARY.define(f"{name}({arguments}) -> {results}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(OPS, name)

    def forward(*args):
        with torch._C._AutoDispatchBelowADInplaceOrView(), mixing_dtensors(args):
            return op(*args)

    # Function.apply asks for it at every call, and working it out takes 100 us.
    forward.__signature__ = inspect.signature(forward)

    def entry(*args):
        return rule.apply(*args)

    rule.forward = staticmethod(forward)
    rule.vmap = vmap_rule(op, names)
    KERNELS[name], RULES[name] = kernel, rule
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"msfs_kernels::{name}", fake(kernel, names), lib=LIBRARY)
    LIBRARY.impl(name, entry, "Autograd")
    LIBRARY.impl(name, entry, "FuncTorchDynamicLayerFrontMode")


register(attention, rules.Attention, INPUTS, "(Tensor o, Tensor lse)")
register(
    attention_backward,
    rules.AttentionBackward,
    f"Tensor do, Tensor? dlse, {INPUTS}, Tensor o, Tensor lse",
    GRADIENTS,
)
register(
    attention_tangent,
    rules.AttentionTangent,
    f"{TANGENTS}, {INPUTS}, Tensor o, Tensor lse",
    "(Tensor to, Tensor tlse)",
)
register(
    attention_second_backward,
    rules.AttentionSecondBackward,
    f"Tensor do, Tensor? dlse, {TANGENTS}, {INPUTS}, Tensor lse",
    GRADIENTS,
)
register(
    attention_second_tangent,
    rules.AttentionSecondTangent,
    f"{TANGENTS}, {SECOND_TANGENTS}, {INPUTS}, Tensor lse",
    "(Tensor uto, Tensor utlse)",
)
