"""How a ValueError found while torch.compile traces reaches the caller as a ValueError.

Dynamo turns an exception of traced code into its own `Unsupported`, and one of a fake kernel into a
RuntimeError. So under compilation a wrong call becomes an op of the right shapes whose kernel
raises the message: the compiled function compiles, and its call raises what the eager call raises,
before anything is computed.
"""

from typing import Any

import torch
from torch import Tensor

from .options import LIBRARY, OPS, accumulate_dtype

LIBRARY.define(
    "attention_refused(Tensor q, SymInt[] lead, SymInt value_dim, str problem)"
    " -> (Tensor o, Tensor lse)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def refuse(q, lead, value_dim, problem):
    raise ValueError(problem)


@torch.library.register_fake("msfs_kernels::attention_refused", lib=LIBRARY)
def refused_shapes(q, lead, value_dim, problem):
    shape = (*lead, *q.shape[-3:-1])
    return q.new_empty((*shape, value_dim)), q.new_empty(shape, dtype=accumulate_dtype(q.dtype))


class Refused(torch.autograd.Function):
    """Differentiable and mappable in form, so that any transform of a wrong call runs, and raises.

    Its derivatives are the op again: constants would leave it without a use, and compilers drop
    such an op.
    """

    @staticmethod
    def forward(*args):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return OPS.attention_refused(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.args = inputs[1:]
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, *_):
        (q,) = ctx.saved_tensors
        dq, _ = OPS.attention_refused(q, list(q.shape[:-3]), q.shape[-1], ctx.args[-1])
        return dq, None, None, None

    @staticmethod
    def jvp(ctx, *_):
        return OPS.attention_refused(*ctx.saved_tensors, *ctx.args)

    @staticmethod
    def vmap(info, in_dims, q, lead, value_dim, problem):
        q = q if in_dims[0] is None else q.select(in_dims[0], 0)
        return OPS.attention_refused(q, [info.batch_size, *lead], value_dim, problem), (0, 0)


def entry(*args):
    return Refused.apply(*args)


LIBRARY.impl("attention_refused", refuse, "CompositeExplicitAutograd")
LIBRARY.impl("attention_refused", entry, "Autograd")
LIBRARY.impl("attention_refused", entry, "FuncTorchDynamicLayerFrontMode")


def refused(q: Any, v: Any, problem: str) -> tuple[Tensor, Tensor]:
    """Raises the problem: now, or under torch.compile when the compiled function is called."""
    tensors = isinstance(q, Tensor) and isinstance(v, Tensor) and min(q.ndim, v.ndim) >= 3
    # torch.compiler.is_exporting() itself is True in all that torch 2.11 compiles.
    exporting = torch.compiler._is_exporting_flag
    if not tensors or not torch.compiler.is_compiling() or exporting:
        raise ValueError(problem)
    return OPS.attention_refused(q, list(q.shape[:-3]), v.shape[-1], problem)
