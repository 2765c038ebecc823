"""What programs in Gluon for Hopper are made of: who takes which tile, rings of buffers with their
barriers, and the copy engine's descriptors. `gluon_forward.py` says how they work together.
"""

# Lists have no stars in Triton's language.
# ruff: noqa: RUF005
# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalOperand=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

import math

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from msfs_kernels.options import Options

ROWS = gl.constexpr(64)  # queries of a consumer: the height of a warpgroup's product
# Triton 3.7 renamed them.
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def place(step, tiles, blocks, heads, wave):
    """(query block, flat head) of this program's step-th tile, or a block below 0 if it has none.

    Heads go in groups of `wave`, in each the longest tiles of a causal mask first. Every second
    round of programs goes backwards: who got the longest of one round gets the shortest of the
    next.
    """
    programs = gl.num_programs(0)
    mine = gl.program_id(0)
    if step % 2 == 1:
        mine = programs - 1 - mine
    tile = step * programs + mine
    group = tile // (wave * blocks)
    rest = tile - group * (wave * blocks)
    size = gl.maximum(gl.minimum(wave, heads - group * wave), 1)
    block = blocks - 1 - rest // size
    return gl.where(tile < tiles, block, -1), group * wave + rest % size


@gluon.jit
def key_blocks(row, T, S, CAUSAL: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """(all, unmasked) key blocks of queries row .. row + BM - 1; at least one, if hidden whole."""
    high = S
    full = S
    if CAUSAL:
        high = gl.minimum(S, gl.minimum(row + BM, T) + (S - T))
        full = gl.maximum(gl.minimum(S, row + 1 + (S - T)), 0)
    return gl.maximum((high + BN - 1) // BN, 1), full // BN


@gluon.jit
def buffers_for(x, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of the descriptor x."""
    return gl.allocate_shared_memory(x.dtype, [COUNT] + x.block_type.shape, x.layout)


@gluon.jit
def barriers_for(COUNT: gl.constexpr, READERS: gl.constexpr):
    """(full, free) of each of COUNT buffers, every one of which READERS consumers read."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return full, free


def descriptor(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """A copy-engine descriptor of (B, H, T, K) for tiles of `rows` of one head and of that many
    columns, by default K.
    """
    unit = x.shape[-1]  # any aligned stride will do for a dim of size 1
    strides = [
        stride if size > 1 else unit
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ]
    block = [1, 1, rows, columns or x.shape[-1]]
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


def multiprocessors(x: Tensor) -> int:
    """Those of x's device."""
    if not x.is_cuda:
        return 132
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def balanced_wave(blocks: int, programs: int) -> int:
    """The fewest heads whose tiles make pairs of whole rounds: all programs then do as much."""
    return 2 * programs // math.gcd(blocks, 2 * programs)


def work_of(
    q: Tensor, v: Tensor, options: Options, rows: int = 128
) -> tuple[int, tuple[int, ...], int]:
    """Programs; tiles, blocks, heads, H, group, T, S as the kernels take them; and the wave. A tile
    is `rows` queries."""
    (B, H, T, _), (_, G, S, _) = q.shape, v.shape
    blocks = triton.cdiv(T, rows)
    tiles = blocks * B * H
    programs = min(multiprocessors(q), tiles)
    wave = balanced_wave(blocks, programs) if options.causal else 1
    return programs, (tiles, blocks, B * H, H, H // G, T, S), wave
