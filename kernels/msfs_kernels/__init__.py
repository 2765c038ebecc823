"""Exact attention as one registered op: every transform of torch.func right, eager and compiled,
CPU and CUDA.
"""

from .attention import flash_attention
from .merge import merge_attention

__all__ = ["flash_attention", "merge_attention"]
