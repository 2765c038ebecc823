"""Collectives as linear maps, each with its transpose among them: every derivative is right.

Within one axis of a mesh a value is either the same on all ranks or differs from rank to rank. Seen
as one function over all ranks, whose cotangents are to be added up over ranks where they differ,

    name            from what each rank holds          to what each rank gets         transpose
    all_gather      its chunk                          the whole, to use its own way  reduce_scatter
    reduce_scatter  a summand of the whole             its chunk of the sum           all_gather
    psum            a summand                          the sum, the same on all       pvary
    pvary           the same on all                    that, to use its own way       psum
    split           the same whole on all              its chunk                      join
    join            its chunk                          the whole, the same on all     split
    shift           a tensor                           that of the rank `by` before   shift by -by

(JAX's shard_map types values in the same way.) A sum over ranks happens where a derivative needs
one, never twice. First and higher derivatives, forward mode and vmap work on each, eager and
compiled, where they become the functional collectives that Inductor overlaps and buckets.

Chunks are as torch.chunk and DTensor cut them: equal but for the last ones, which may be empty.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

FUNCTIONAL = torch.ops._c10d_functional
LIBRARY = torch.library.Library("msfs_functional", "DEF")


@torch.compiler.assume_constant_result
def group_size(group: str) -> int:
    return dist.distributed_c10d._resolve_process_group(group).size()  # pyright: ignore[reportArgumentType]


@torch.compiler.assume_constant_result
def group_rank(group: str) -> int:
    return dist.distributed_c10d._resolve_process_group(group).rank()  # pyright: ignore[reportArgumentType]


def chunk_bounds(size: int, parts: int, i: int) -> tuple[int, int]:
    """Where chunk i of `parts` begins and ends: as torch.chunk, but empty instead of missing."""
    each = -(-size // parts)
    return min(i * each, size), min((i + 1) * each, size)


def _gathered(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    parts = group_size(group)
    each = -(-size // parts)
    x = x.movedim(dim, 0)
    if x.shape[0] < each:
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, each - x.shape[0]))
    whole = FUNCTIONAL.all_gather_into_tensor(x.contiguous(), parts, group)
    return FUNCTIONAL.wait_tensor(whole).narrow(0, 0, size).movedim(0, dim)


def _all_gather(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    return _gathered(x.to(dtype), dim, size, group)


def _reduce_scatter(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    parts = group_size(group)
    each = -(-size // parts)
    x = x.to(dtype).movedim(dim, 0)
    if size < each * parts:
        x = F.pad(x, (0, 0) * (x.ndim - 1) + (0, each * parts - size))
    chunk = FUNCTIONAL.reduce_scatter_tensor(x.contiguous(), "sum", parts, group)
    start, stop = chunk_bounds(size, parts, group_rank(group))
    return FUNCTIONAL.wait_tensor(chunk).narrow(0, 0, stop - start).movedim(0, dim)


def _psum(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    return FUNCTIONAL.wait_tensor(FUNCTIONAL.all_reduce(x.to(dtype).contiguous(), "sum", group))


def _pvary(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype != dtype else x.view_as(x)


def _split(x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    start, stop = chunk_bounds(size, group_size(group), group_rank(group))
    return x.to(dtype).narrow(dim, start, stop - start)


def _shift(x: Tensor, dim: int, by: int, group: str, dtype: torch.dtype) -> Tensor:
    parts, rank = group_size(group), group_rank(group)
    flat = x.to(dtype).contiguous().flatten()
    sent, received = [0] * parts, [0] * parts
    sent[(rank + by) % parts] = received[(rank - by) % parts] = flat.numel()
    out = FUNCTIONAL.all_to_all_single(flat, received, sent, group)
    return FUNCTIONAL.wait_tensor(out).view(x.shape)


# Functions of (x, dim, size of the whole, group, dtype of the result), and their transposes.
KINDS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "all_gather": (_all_gather, "reduce_scatter"),
    "reduce_scatter": (_reduce_scatter, "all_gather"),
    "psum": (_psum, "pvary"),
    "pvary": (_pvary, "psum"),
    "split": (_split, "join"),
    "join": (_all_gather, "split"),
    "shift": (_shift, "shift"),
}


class Collective(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, kind: str, dim: int, size: int, group: str, dtype: torch.dtype
    ) -> Tensor:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return KINDS[kind][0](x, dim, size, group, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, *ctx.arguments = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:  # pyright: ignore
        kind, dim, size, group, _ = ctx.arguments
        size = -size if kind == "shift" else size
        return collective(cotangent, KINDS[kind][1], dim, size, group, ctx.dtype), *[None] * 5

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # pyright: ignore
        return collective(tangent, *ctx.arguments)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, kind: str, dim: int, *rest: Any) -> tuple:
        return collective(x.movedim(in_dims[0], 0), kind, dim + 1, *rest), 0


LIBRARY.define(
    "collective(Tensor x, str kind, int dim, SymInt size, str group, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _kernel(x: Tensor, kind: str, dim: int, size: int, group: str, dtype: torch.dtype) -> Tensor:
    return KINDS[kind][0](x, dim, size, group, dtype)


def _entry(*args: Any) -> Tensor:
    return Collective.apply(*args)  # pyright: ignore[reportReturnType]


LIBRARY.impl("collective", _kernel, "CompositeExplicitAutograd")
LIBRARY.impl("collective", _entry, "Autograd")
LIBRARY.impl("collective", _entry, "FuncTorchDynamicLayerFrontMode")
collective: Callable[..., Tensor] = torch.ops.msfs_functional.collective


def all_gather(
    x: Tensor, dim: int, size: int, group: str, dtype: torch.dtype | None = None
) -> Tensor:
    """The whole, `size` along dim, out of every rank's chunk; each rank uses it in its own way.

    Args:
        group: name of a process group, `mesh.get_group(axis).group_name`.
        dtype: cast to it before the gather; the backward casts back before it sums, so that bf16
            weights of fp32 masters have their gradients added up in fp32.
    """
    return collective(x, "all_gather", dim, size, group, dtype or x.dtype)


def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk, along dim, of the sum of every rank's x."""
    return collective(x, "reduce_scatter", dim, x.shape[dim], group, x.dtype)


def psum(x: Tensor, group: str) -> Tensor:
    """The sum of every rank's x."""
    return collective(x, "psum", 0, 0, group, x.dtype)


def pvary(x: Tensor, group: str, dtype: torch.dtype | None = None) -> Tensor:
    """x, equal on all ranks, about to be used by each in its own way: gradients are summed."""
    return collective(x, "pvary", 0, 0, group, dtype or x.dtype)


def split(x: Tensor, dim: int, group: str) -> Tensor:
    """This rank's chunk of an x that all ranks hold."""
    return collective(x, "split", dim, x.shape[dim], group, x.dtype)


def join(x: Tensor, dim: int, size: int, group: str) -> Tensor:
    """The inverse of `split`."""
    return collective(x, "join", dim, size, group, x.dtype)


def shift(x: Tensor, by: int, group: str) -> Tensor:
    """The x of the rank `by` places before this one, around the ring; shapes are equal."""
    return collective(x, "shift", 0, by, group, x.dtype)
