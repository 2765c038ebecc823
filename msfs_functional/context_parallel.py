"""Context parallelism: ranks hold parts of the same sequences and attend around a ring.

    own = own_tokens(tokens, mesh)                              # this rank's tokens of each row
    positions = own_tokens(torch.arange(T), mesh, dim=0)
    model.apply(params, own, positions=positions, implementation=ring_attention(mesh))

Keys and values travel from rank to rank; each rank attends with its queries to what passes by, and
joins the parts by their log-sum-exps (Liu et al. 2023, "Ring attention"; Milakov and Gimelshein
2018). Under a causal mask rank 0 would be done long before the last one, so a sequence is cut into
2 n chunks, of which rank r holds the r-th from the front and the r-th from the back: each rank then
has the same work at every step. For n = 2, queries down, keys across, C causal, 1 all, . none:

              rank 0 holds chunks 0 and 3, rank 1 holds 1 and 2
              0 1 2 3
            0 C . . .        step 0: each rank its own keys (causal in the order of its tokens)
            1 1 C . .        step 1: rank 1 the front chunk of rank 0 with both of its chunks,
            2 1 1 C .                rank 0 both chunks of rank 1 with its back chunk
            3 1 1 1 C

Dimension key: ... batch dims, T a rank's tokens, H heads, G key heads, K head dim, n ranks.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from msfs_functional.collectives import group_rank, group_size, join, shift
from msfs_functional.meshes import axis_rank, axis_size


def own_tokens(x: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """What this rank holds along a dim of tokens: one chunk of the front, one of the back.

    Raises:
        ValueError: twice the ranks of cp do not divide the tokens.
    """
    n, rank = axis_size(mesh, "cp"), axis_rank(mesh, "cp")
    if n == 1:
        return x
    if x.shape[dim] % (2 * n):
        raise ValueError(
            f"2 cp ({2 * n}) must divide the tokens of a sequence ({x.shape[dim]}): "
            f"pad it or cut it"
        )
    chunks = x.chunk(2 * n, dim)
    return torch.cat([chunks[rank], chunks[2 * n - 1 - rank]], dim)


def all_tokens(own: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """The inverse of `own_tokens`, on every rank of cp; differentiable."""
    n = axis_size(mesh, "cp")
    if n == 1:
        return own
    whole = join(own, dim, own.shape[dim] * n, mesh.get_group("cp").group_name)
    chunks = whole.chunk(2 * n, dim)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])], dim)


def ring_attention(mesh: DeviceMesh) -> Callable[..., Tensor]:
    """`attention.attention` over sequences that are spread over cp as `own_tokens` spreads them.

    Exact, with every derivative. It takes `is_causal`, `scale`, `softcap` and `segment_ids`, each
    rank its own tokens'; other options raise a ValueError. A backward pass keeps the keys and
    values that passed by: recompute blocks (`remat`) where that is too much.
    """
    if axis_size(mesh, "cp") == 1:
        from msfs_functional.attention import attention

        return attention
    return _ring(mesh.get_group("cp").group_name)


@functools.cache
def _ring(group: str) -> Callable[..., Tensor]:
    """One function for a group, so that what is compiled for it serves all calls."""
    return functools.partial(_attend, group)


def _attend(
    group: str,
    q: Float[Tensor, "... H T K"],
    k: Float[Tensor, "... G T K"],
    v: Float[Tensor, "... G T X"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    segment_ids: Int[Tensor, "... T"] | None = None,
    **others: Any,
) -> Float[Tensor, "... H T X"]:
    from msfs_kernels import flash_attention
    from msfs_kernels.merge import merge_attention

    if given := sorted(name for name, value in others.items() if value not in (None, 0.0)):
        raise ValueError(f"ring attention does not know {given}: leave them out, or use cp=1")
    if q.shape[-2] != k.shape[-2] or isinstance(segment_ids, tuple):
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)}: ring attention is of tokens to themselves"
        )
    n, rank, half = group_size(group), group_rank(group), q.shape[-2] // 2
    attend = functools.partial(flash_attention, scale=scale, softcap=softcap, return_lse=True)

    def part(queries: slice, keys: slice, causal: bool, segments: Tensor | None):
        pair = None
        if segment_ids is not None and segments is not None:
            pair = segment_ids[..., queries].contiguous(), segments[..., keys].contiguous()
        rows = (q[..., queries, :], k[..., keys, :], v[..., keys, :])
        return attend(*rows, is_causal=causal, segment_ids=pair)

    every, front, back = slice(None), slice(0, half), slice(half, None)
    segments = segment_ids
    o, lse = part(every, every, is_causal, segments)
    for step in range(1, n):
        k, v = shift(k, 1, group), shift(v, 1, group)
        segments = None if segments is None else shift(segments, 1, group)
        source = (rank - step) % n  # whose keys these are
        if not is_causal:
            other, other_lse = part(every, every, False, segments)
        elif source < rank:
            other, other_lse = part(every, front, False, segments)
        else:
            seen, seen_lse = part(back, every, False, segments)
            nothing = torch.zeros_like(seen), torch.full_like(seen_lse, -math.inf)
            other = torch.cat([nothing[0], seen], -2)
            other_lse = torch.cat([nothing[1], seen_lse], -1)
        o, lse = merge_attention([o, other], [lse, other_lse])
    return o
