"""Where every parameter lives on a mesh, by rules over names.

    rules = [
        (r"[qkv]\\.weight$", {"tp": Shard(0), "dp_shard": Shard(0)}),
        ("", {"dp_shard": Shard(0)}),
    ]
    params = init(model, seed, rules, mesh)     # or shard(params, rules, mesh): DTensors
    print(describe(params))
    gather(params)                              # plain tensors again

A rule's value says how each axis of the mesh cuts the parameter: {axis: Shard(dim)}; along an axis
that it leaves out, every rank holds the same. Dims need not divide: shards are cut as torch.chunk
cuts, the last ones are smaller or empty.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from msfs_functional import random
from msfs_functional.collectives import psum
from msfs_functional.meshes import active
from msfs_functional.params import Functional, Params, Rules, Window, by_rules, parameter_key

Cuts = Mapping[str, Placement]  # {axis: placement}; axes left out replicate

# Every parameter cut along its first dim over the ranks that see other data.
FULLY_SHARDED: Rules[Cuts] = [("", {"dp_shard": Shard(0)})]


def placements(
    rules: Rules[Cuts], shapes: Mapping[str, Sequence[int]], mesh: DeviceMesh
) -> dict[str, tuple[Placement, ...]]:
    """{name: a placement for each axis of `active(mesh)`}, by the first rule that matches.

    Args:
        shapes: {parameter name: shape}, such as `Functional.shapes`.

    Raises:
        ValueError: a rule that matches no parameter, a parameter that no rule matches, an axis that
            the mesh does not have, a dim that the parameter does not have.
    """
    axes, several = mesh.mesh_dim_names or (), active(mesh).mesh_dim_names or ()
    placed = {}
    for name, cuts in by_rules(rules, shapes).items():
        for axis, placement in cuts.items():
            if axis not in axes:
                raise ValueError(
                    f"the rule of {name!r} names the axis {axis!r}, but the mesh has {axes}: "
                    f"use one of them"
                )
            rank = len(shapes[name])
            if isinstance(placement, Shard) and not -rank <= placement.dim < max(rank, 1):
                raise ValueError(
                    f"the rule of {name!r} cuts dim {placement.dim}, but its shape is "
                    f"{tuple(shapes[name])}: cut one of its {rank} dims, or replicate it"
                )
        own = (cuts.get(axis, Replicate()) for axis in several)
        rank = len(shapes[name])
        placed[name] = tuple(
            Shard(p.dim % rank) if isinstance(p, Shard) and rank else Replicate() for p in own
        )
    return placed


def shard(params: Params, rules: Rules[Cuts], mesh: DeviceMesh) -> Params:
    """DTensors that hold this rank's shards of `params`, which every rank passes in full.

    Nothing is communicated: all ranks must pass equal values, as `init` of one seed or a checkpoint
    gives them. The shards are copies.
    """
    placed = placements(rules, {name: p.shape for name, p in params.items()}, mesh)
    return {
        name: distribute_tensor(
            p.detach().to(mesh.device_type), active(mesh), placed[name], src_data_rank=None
        ).clone()
        for name, p in params.items()
    }


def gather(params: Any) -> Any:
    """Every DTensor of a dict as a whole plain tensor, on each rank; all ranks call it together."""
    return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in params.items()}


def init(
    model: Functional,
    seed: int | Int64[Tensor, "2"],
    rules: Rules[Cuts],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype = torch.float32,
) -> Params:
    """`shard(model.init(seed), rules, mesh)` bit for bit, but no rank ever holds more than shards.

    An initialiser that takes no `window` draws its whole parameter, of which the shard is kept.
    """
    key = random.key(seed) if isinstance(seed, int) else seed
    key = key.to(mesh.device_type)
    placed, mesh = placements(rules, model.shapes, mesh), active(mesh)
    params = {}
    for name, shape in model.shapes.items():
        size, start = compute_local_shape_and_global_offset(shape, mesh, placed[name])
        local = model.draw(name, parameter_key(key, name), Window(tuple(start), tuple(size)))
        params[name] = DTensor.from_local(
            local.to(dtype),
            mesh,
            placed[name],
            run_check=False,
            shape=shape,
            stride=contiguous_stride(shape),
        )
    return params


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def sum_of_squares(leaves: Sequence[Tensor]) -> Tensor:
    """Over all elements of all shards, each counted once: 0-d, plain and equal on every rank.

    An all-reduce for each way and each axis of being cut, however many tensors there are.
    """
    sums: dict[Any, list[Tensor]] = {}
    for x in leaves:
        if isinstance(x, DTensor):
            summed = [Replicate() if p.is_partial() else p for p in x.placements]
            x = x.redistribute(placements=summed) if summed != list(x.placements) else x
        sums.setdefault(ways_cut(x), []).append(local_part(x))
    parts = {way: torch.stack(torch._foreach_norm(x)).square().sum() for way, x in sums.items()}
    return added_up(parts)


def inner_product(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """sum x y over all elements of all shards, each counted once: 0-d, plain, equal on every rank.

    Args:
        xs, ys: of equal shapes, cut alike and none of them a partial sum.
    """
    sums: dict[Any, list[Tensor]] = {}
    for x, y in zip(xs, ys, strict=True):
        sums.setdefault(ways_cut(x), []).append((local_part(x) * local_part(y)).sum())
    return added_up({way: torch.stack(parts).sum() for way, parts in sums.items()})


Way = tuple[DeviceMesh, tuple[bool, ...]] | None  # axes of a mesh that cut a tensor; None: none has


def ways_cut(x: Tensor) -> Way:
    if not isinstance(x, DTensor):
        return None
    return x.device_mesh, tuple(isinstance(p, Shard) for p in x.placements)


def local_part(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def added_up(parts: Mapping[Way, Tensor]) -> Tensor:
    """The sum of this rank's sums over tensors cut one way, and over the ranks that cut them."""
    totals = []
    for way, total in parts.items():
        mesh, cut = way or (None, ())
        for axis, yes in enumerate(cut):
            assert mesh is not None
            total = psum(total, mesh.get_group(axis).group_name) if yes else total
        totals.append(total)
    return torch.stack(totals).sum()


def share_out(fn: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """fn(torch.stack(tensors)).unbind(), where fn treats each tensor alone and needs it whole.

    Of the N tensors, cut alike, each rank is sent its share whole (an all-to-all over the axes that
    cut them), runs fn on it, and sends the shards of the result back. Along other axes the ranks do
    the same.

    Args:
        fn: (n, *shape) -> (n, *shape), for any n >= 0.
        tensors: DTensors of one shape, dtype and placement.
    """
    some = tensors[0]
    assert isinstance(some, DTensor)
    mesh, shape = some.device_mesh, torch.Size((len(tensors), *some.shape))
    cut = tuple(Shard(p.dim + 1) if isinstance(p, Shard) else p for p in some.placements)
    whole = tuple(Shard(0) if isinstance(p, Shard) else p for p in some.placements)
    like = {"run_check": False, "shape": shape, "stride": contiguous_stride(shape)}
    parts = torch.stack([x.to_local() for x in tensors if isinstance(x, DTensor)])
    mine = DTensor.from_local(parts, mesh, cut, **like).redistribute(placements=whole).to_local()
    made = fn(mine) if mine.numel() else mine
    back = DTensor.from_local(made, mesh, whole, **like).redistribute(placements=cut).to_local()
    like = {"run_check": False, "shape": some.shape, "stride": contiguous_stride(some.shape)}
    return [DTensor.from_local(x, mesh, some.placements, **like) for x in back.unbind()]


def describe(params: Params) -> str:
    """A table: every parameter's name, shape, this rank's shape, and which axis cuts which dim."""
    rows = [("parameter", "shape", "on this rank", "placement")]
    total = here = 0
    for name, p in params.items():
        local = p.to_local() if isinstance(p, DTensor) else p
        total, here = total + p.numel(), here + local.numel()
        cuts = "one process"
        if isinstance(p, DTensor):
            axes = zip(p.device_mesh.mesh_dim_names or (), p.placements, strict=True)
            cut = [f"{axis} cuts dim {x.dim}" for axis, x in axes if isinstance(x, Shard)]
            cuts = ", ".join(cut) or "replicated"
        rows.append((name, str(tuple(p.shape)), str(tuple(local.shape)), cuts))
    rows.append(("total", f"{total:,}", f"{here:,}", f"{here / max(total, 1):.1%} on this rank"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip()
        for row in rows
    )
