"""Device meshes from degrees of parallelism.

    mesh(dp_shard=-1, tp=2)      under `torchrun --nproc-per-node 8`: dp_shard 4 x tp 2

A mesh has axes, a tensor has dims. The axes and what they are for:

    tp            ranks split every layer (tensor and sequence parallel)
    dp_replicate  ranks hold equal parameters and see other data
    dp_shard      ranks hold a shard of each parameter and see other data (FSDP, ZeRO 3)
    cp            ranks hold parts of the same sequences (context parallel)

Neighbouring ranks, which share the fastest links, form tp groups; then come cp, dp_shard and
dp_replicate. tp is the mesh's first axis all the same, because DTensor cuts a dim that several axes
share in the order of the axes: what one tp rank owns is contiguous, and dp_shard cuts that.
"""

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

AXES = ("tp", "dp_replicate", "dp_shard", "cp")  # as in the mesh
NEAREST_LAST = ("dp_replicate", "dp_shard", "cp", "tp")  # as ranks are numbered
DATA_AXES = ("dp_replicate", "dp_shard")  # ranks along them see different examples


def degrees(
    world: int, *, dp_replicate: int = 1, dp_shard: int = 1, tp: int = 1, cp: int = 1
) -> dict[str, int]:
    """{axis: ranks along it}, with the one -1 filled in so that the product is `world`.

    Raises:
        ValueError: a degree that is 0 or below -1, more than one -1, or a product that is not the
            number of processes. It depends on the arguments and the world size only, so that every
            rank raises and none waits.
    """
    given = {"dp_replicate": dp_replicate, "dp_shard": dp_shard, "tp": tp, "cp": cp}
    text = ", ".join(f"{axis} {n}" for axis, n in given.items())
    for axis, n in given.items():
        if n < 1 and n != -1:
            raise ValueError(
                f"{axis} ({n}) must be at least 1, or -1 to take the ranks that remain"
            )
    open_axes = [axis for axis, n in given.items() if n == -1]
    if len(open_axes) > 1:
        raise ValueError(
            f"only one degree may be -1, got {text}: give all of {', '.join(open_axes)} but one"
        )
    known = math.prod(n for n in given.values() if n != -1)
    if open_axes:
        if world % known:
            others = ", ".join(f"{axis} {n}" for axis, n in given.items() if n != -1)
            raise ValueError(
                f"{open_axes[0]} = -1 takes the ranks that remain, but the other degrees "
                f"({others}) multiply to {known}, which does not divide the number of processes "
                f"({world}): change a degree or start a multiple of {known} processes"
            )
        given[open_axes[0]] = world // known
    elif known != world:
        raise ValueError(
            f"degrees ({text}) multiply to {known}, but {world} processes run: change a degree, "
            f"set one to -1, or start {known} processes (torchrun --nproc-per-node)"
        )
    return given


def mesh(
    dp_replicate: int = 1,
    dp_shard: int = 1,
    tp: int = 1,
    cp: int = 1,
    *,
    device: str | None = None,
    timeout: float = 600.0,
) -> DeviceMesh:
    """The mesh of these degrees over all processes, with the axes (tp, dp_replicate, dp_shard, cp).

    Under torchrun (or whatever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) it joins the
    process group, unless somebody has; alone it needs no launcher and no network.

    Args:
        dp_replicate, dp_shard, tp, cp: ranks along each axis; one may be -1 and takes the rest.
        device: "cuda" or "cpu"; default: cuda where there is one.
        timeout: seconds after which a rank that waits for a missing one raises.

    Raises:
        ValueError: see `degrees`; no device for every process of this machine.
    """
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    size = degrees(world, dp_replicate=dp_replicate, dp_shard=dp_shard, tp=tp, cp=cp)
    device = join(device, timeout=timeout)
    ranks = torch.arange(world).reshape([size[axis] for axis in NEAREST_LAST])
    ranks = ranks.permute([NEAREST_LAST.index(axis) for axis in AXES]).contiguous()
    return DeviceMesh(device, ranks, mesh_dim_names=AXES)


def join(device: str | None = None, *, timeout: float = 600.0) -> str:
    """Takes part in the process group, and takes a GPU of one's own; what `mesh` begins with.

    A program that calls it first can let its ranks agree on mistakes before there is a mesh.

    Args:
        device, timeout: as in `mesh`.

    Returns:
        The kind of device, "cuda" or "cpu".

    Raises:
        ValueError: no device for every process of this machine.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        local, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if on_machine > devices:
            raise ValueError(
                f"{on_machine} processes on a machine with {devices} GPUs: start at most {devices} "
                f"a machine, or pass device='cpu'"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        options = {"backend": backend, "timeout": timedelta(seconds=timeout)}
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 and "MASTER_ADDR" not in os.environ:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, **options)
        else:
            store = store_of_attempt(timedelta(seconds=timeout))
            if store is not None:
                rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
                options |= {"store": store, "rank": rank, "world_size": world}
            dist.init_process_group(**options)
    return device


def store_of_attempt(timeout: timedelta) -> dist.Store | None:
    """The store of torchrun's node, seen through a prefix for this attempt; None elsewhere.

    torchrun keeps one store for all restarts, in which processes that start again may find the
    addresses of those that have died, and wait for them. Nodes of several may count restarts
    differently: start them with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, a store for each attempt.
    """
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not of_agent or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def active(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh without the axes of one rank, which cut nothing; dp_shard if none has more.

    Parameters live on it: what DTensor spends on an operation grows exponentially with the axes.
    """
    names = mesh.mesh_dim_names or ()
    kept = tuple(axis for axis in names if axis_size(mesh, axis) > 1) or ("dp_shard",)
    return mesh if kept == names else mesh[kept]


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    return mesh.size((mesh.mesh_dim_names or ()).index(axis))


def axis_rank(mesh: DeviceMesh, axis: str) -> int:
    """This process's coordinate along the axis."""
    return mesh.get_local_rank(axis)


def data_rank(mesh: DeviceMesh) -> tuple[int, int]:
    """(this process's share, number of shares) of every batch: ranks with one share see one batch.

    tp and cp ranks of one data rank get the same examples.
    """
    rank, shares = 0, 1
    for axis in DATA_AXES:
        n = axis_size(mesh, axis)
        rank, shares = rank * n + axis_rank(mesh, axis), shares * n
    return rank, shares
