"""The op's forward in CUDA C++ (forward.cu), compiled by NVRTC at its first call, about a second.

It is there to be read: causal masks, grouped heads, any T and S, fp16 and bf16, head dims 64, 128.
What it computes is `attention`'s o and lse, so its derivatives are those of the op.
"""

from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from .options import Options, empty_tokens_first

HEAD_DIMS = (64, 128)
ROWS, THREADS = 64, 128  # queries and threads of one block, as in forward.cu


def find_problem(q: Tensor, v: Tensor, options: Options) -> str | None:
    """What this kernel cannot do and the Triton kernels can, or None."""
    if q.device.type != "cuda":
        return f"device {q.device}: implementation 'cuda' needs CUDA tensors; use 'flash'"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}: implementation 'cuda' takes float16 and bfloat16; use 'flash'"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return (
            f"head dims {q.shape[-1]} and {v.shape[-1]}: implementation 'cuda' takes equal ones of"
            f" {HEAD_DIMS}; use 'flash'"
        )
    if options.scale <= 0:
        return f"scale {options.scale}: implementation 'cuda' needs a positive one; use 'flash'"
    plain = Options(causal=options.causal, scale=options.scale)
    plain = plain._replace(precision=options.precision, deterministic=options.deterministic)
    extra = [
        name
        for name, given, default in zip(Options._fields, options, plain, strict=True)
        if given is not default and given != default
    ]
    if extra:
        named = ", ".join(extra)
        return f"options {named}: implementation 'cuda' knows causal masks only; use 'flash'"
    return None


@cache
def compiled(head_dim: int, dtype: torch.dtype, device: int) -> Any:
    source = (files("msfs_kernels") / "forward.cu").read_text()
    macros = [f"-DHEAD_DIM={head_dim}", f"-DBF16={int(dtype is torch.bfloat16)}"]
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(source, "flash_forward", nvcc_options=macros)


def readable(x: Tensor) -> Tensor:
    """x as 16-byte copies can read it: unit stride in the last dim, rows on 16-byte borders."""
    aligned = x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and aligned else x.contiguous()


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o (B, H, T, K) and lse (B, H, T) float32; a row that sees no key has o = 0, lse = -inf.

    Raises:
        ValueError: an input or option that this kernel does not know.
    """
    problem = find_problem(q, v, options)
    if problem is not None:
        raise ValueError(problem)
    q, k, v = readable(q), readable(k), readable(v)
    B, H, T, K = q.shape
    o = empty_tokens_first(q, B, H, T, K)
    lse = q.new_empty((B, H, T), dtype=torch.float32)
    if lse.numel() == 0:
        return o, lse
    strides = [stride for x in (q, k, v) for stride in x.stride()[:-1]]
    arguments = [q, k, v, o, lse, T, k.shape[2], H, H // k.shape[1], *strides]
    with torch.cuda.device(q.device):
        compiled(K, q.dtype, q.get_device())(
            grid=((T + ROWS - 1) // ROWS, H, B),
            block=(THREADS, 1, 1),
            args=[*arguments, int(options.causal), options.scale],
        )
    return o, lse
