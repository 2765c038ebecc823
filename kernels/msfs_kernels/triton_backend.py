"""The Triton backend of the op: what `cpu.py` offers for CPU tensors, for CUDA tensors of 16 and 32
bits.
"""

from torch import Tensor

from msfs_kernels import gluon_support, triton_decode, triton_dual, triton_forward
from msfs_kernels.options import Options
from msfs_kernels.triton_backward import backward
from msfs_kernels.triton_tangent import tangent

__all__ = ["backward", "dual", "forward", "tangent"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) and lse (B, H, T): one kernel, or slices of the keys and a merge when
    decoding.
    """
    if q.numel() and k.numel() and triton_decode.suits(q, k):
        return triton_decode.decode(q, k, v, options)
    return triton_forward.forward(q, k, v, options, gluon_support.plan_forward)


def dual(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, lse and their tangents to, tlse, of a call without masks but the causal one: in one pass
    where that is faster.
    """
    if gluon_support.dual_is_faster(tq, tk, tv, q, k, v, options):
        plan = gluon_support.gluon_dual.plan_dual
        return triton_dual.dual(tq, tk, tv, q, k, v, options, plan)
    if triton_dual.one_pass(q, k, v, options):
        return triton_dual.dual(tq, tk, tv, q, k, v, options)
    o, lse = forward(q, k, v, options)
    return o, lse, *tangent(tq, tk, tv, None, q, k, v, o, lse, options)
