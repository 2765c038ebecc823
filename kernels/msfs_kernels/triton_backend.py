"""The Triton backend of the op: what `cpu.py` offers for CPU tensors, for CUDA tensors of 16 and 32 bits."""

from msfs_kernels.triton_backward import backward
from msfs_kernels.triton_forward import forward
from msfs_kernels.triton_tangent import tangent

__all__ = ["backward", "forward", "tangent"]
