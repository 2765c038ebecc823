"""The Triton backend of the op: what `cpu.py` offers for CPU tensors, for CUDA tensors of 16 and 32
bits.
"""

from torch import Tensor

from msfs_kernels import gluon_support, triton_decode, triton_forward
from msfs_kernels.options import Options
from msfs_kernels.triton_backward import backward
from msfs_kernels.triton_tangent import tangent

__all__ = ["backward", "forward", "tangent"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o (B, H, T, V) and lse (B, H, T): one kernel, or slices of the keys and a merge when
    decoding.
    """
    if q.numel() and k.numel() and triton_decode.suits(q, k):
        return triton_decode.decode(q, k, v, options)
    return triton_forward.forward(q, k, v, options, gluon_support.plan_forward)
