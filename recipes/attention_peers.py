"""Who is measured by bench_attention: our attention, and every peer that is installed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from msfs_kernels.options import Options
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from msfs_kernels import flash_attention

    out = flash_attention(q, k, v, is_causal=causal)
    assert isinstance(out, Tensor)
    return out


def sdpa(backend: str) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attention


def flex() -> Attention:
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False  # the backward is timed by running it repeatedly
    torch._dynamo.config.recompile_limit = 64
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        if not causal:
            return compiled(q, k, v)
        length = q.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
        return compiled(q, k, v, block_mask=masks[length])

    return attention


def flash_attention_4() -> Attention:
    from flash_attn.cute import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        out = flash_attn_func(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
        )
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attention


def jvp_flash() -> Attention:
    from jvp_flash_attention.jvp_attention import JVPAttn

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return JVPAttn.fwd_dual(q, k, v, causal=causal)

    return attention


def cuda_cpp() -> Attention:
    """Our forward in CUDA C++, the one to read."""
    from msfs_kernels import cuda_forward

    def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        options = Options(causal=causal, scale=q.shape[-1] ** -0.5)
        return cuda_forward.forward(q.detach(), k.detach(), v.detach(), options)[0]

    return attention


PEERS: dict[str, Callable[[], Attention]] = {
    "ours": lambda: ours,
    "cuda": cuda_cpp,
    "flash2": lambda: sdpa("FLASH_ATTENTION"),
    "flex": flex,
    "cudnn": lambda: sdpa("CUDNN_ATTENTION"),
    "flash4": flash_attention_4,
    "math": lambda: sdpa("MATH"),
}


def available(names: list[str]) -> dict[str, Attention]:
    """The peers that import; the others are named once."""
    peers = {}
    for name in names:
        try:
            peers[name] = PEERS[name]()
        except ImportError as error:
            print(f"{name}: not installed ({error})")
    return peers


def jvp_flash_if_installed() -> Attention | None:
    try:
        return jvp_flash()
    except ImportError as problem:
        print(f"jvp_flash_attention is not installed ({problem})")
        return None


def jvp_of(attention: Attention, primals: tuple, tangents: tuple, causal: bool = False):
    """(o, its tangent), by torch.func.jvp over q, k and v."""

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal)

    return torch.func.jvp(fn, primals, tangents)
