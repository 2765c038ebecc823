"""The functional path of sharded training: parameters are whole only while they are used.

    model = sharded(transformer(config), TRANSFORMER, mesh(dp_shard=-1))
    params = model.init(seed)                                        # DTensors: this rank's shards
    step = make_step(gathered(loss_fn, model), optimizer)            # loss_fn as for one process

What a parameter of a block goes through (dp_shard, in one step):

    forward     all_gather -> the block runs on the whole tensor -> forgotten
    backward    all_gather again -> gradient of the whole -> reduce_scatter -> gradient of the shard

Parameters outside of blocks are gathered once around the loss. The optimizer sees shards only.
Everything is made of the linear maps of `collectives`, so torch.func transforms of the sharded loss
are right too. A step can run in two ways:

    make_step(loss_fn, optimizer)       one graph; Inductor may reorder the collectives in it
    make_step(loss_fn, optimizer, compile="regions", gradient=model.gradient)
                                        each block compiled once for all, its gathers and sums on
                                        streams beside the others' computation (`overlap`)
"""

# pyright: reportAttributeAccessIssue=false
import copy
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import msfs_kernels.sharding  # noqa: F401, forward mode over DTensors
import optree
import torch
from jaxtyping import Int64
from msfs_kernels.dispatch import is_sharded
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from msfs_functional import overlap, peer_copies, random, sharding
from msfs_functional.collectives import KINDS, chunk_bounds, collective, psum
from msfs_functional.meshes import DATA_AXES, active, axis_rank, axis_size, data_rank
from msfs_functional.params import Functional, Methods, Params, Rules
from msfs_functional.sharding import Cuts, placements
from msfs_functional.transforms import NAMESPACE, add_terms, value_and_grad
from msfs_functional.transport import way

Gather = tuple[tuple[str, int, int, str], ...]  # collectives as (kind, dim, size, group), in order
LossFn = Callable[[Any, Any, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Local(torch.autograd.Function):
    """A DTensor's shard as a plain tensor, differentiable in every way torch.func knows."""

    @staticmethod
    def forward(x: Tensor, spec: Any) -> Tensor:
        return x._local_tensor.view_as(x._local_tensor)  # pyright: ignore

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.spec = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:  # pyright: ignore
        return Distributed.apply(cotangent, ctx.spec), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:  # pyright: ignore
        return Local.apply(tangent, ctx.spec)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, spec: Any) -> tuple:
        return Local.apply(x.movedim(in_dims[0], 0), batched(spec, info.batch_size)), 0


class Distributed(torch.autograd.Function):
    """The inverse of Local."""

    @staticmethod
    def forward(x: Tensor, spec: Any) -> Tensor:
        mesh, placed, shape = spec
        stride = sharding.contiguous_stride(shape)
        return DTensor.from_local(x, mesh, placed, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.spec = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple:  # pyright: ignore
        return Local.apply(cotangent, ctx.spec), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Any:  # pyright: ignore
        return Distributed.apply(tangent, ctx.spec)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor, spec: Any) -> tuple:
        return Distributed.apply(x.movedim(in_dims[0], 0), batched(spec, info.batch_size)), 0


def batched(spec: tuple, size: int) -> tuple:
    mesh, placed, shape = spec
    placed = tuple(Shard(p.dim + 1) if isinstance(p, Shard) else p for p in placed)
    return mesh, placed, torch.Size((size, *shape))


def local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor, also inside torch.func transforms."""
    if torch.compiler.is_compiling():
        return x.to_local()
    bottom = x
    while torch._C._functorch.is_functorch_wrapped_tensor(bottom):
        bottom = torch._C._functorch.get_unwrapped(bottom)
    assert isinstance(bottom, DTensor)
    return Local.apply(x, (bottom.device_mesh, bottom.placements, x.shape))  # pyright: ignore


def gather_steps(
    shape: torch.Size, placed: tuple[Placement, ...], mesh: DeviceMesh, inside: bool
) -> Gather:
    """What makes a shard whole over the data axes; along tp it stays cut.

    Args:
        inside: whether tp ranks use a parameter that they all hold each in its own way.
    """
    axes = mesh.mesh_dim_names or ()
    sizes, first, then = list(shape), [], []
    for axis, placement in zip(axes, placed, strict=True):
        n = axis_size(mesh, axis)
        if isinstance(placement, Shard):
            whole = sizes[placement.dim]
            start, stop = chunk_bounds(whole, n, axis_rank(mesh, axis))
            sizes[placement.dim] = stop - start
            if axis != "tp" and n > 1:
                name = mesh.get_group(axis).group_name
                then.insert(0, ("all_gather", placement.dim, whole, name))
        elif n > 1 and (axis != "tp" or inside):
            first.append(("pvary", 0, 0, mesh.get_group(axis).group_name))
    return (*first, *then)


def tp_shape(shape: torch.Size, placed: tuple[Placement, ...], mesh: DeviceMesh) -> torch.Size:
    """What tp leaves to this rank of a whole parameter's shape."""
    sizes = list(shape)
    for axis, placement in zip(mesh.mesh_dim_names or (), placed, strict=True):
        if axis == "tp" and isinstance(placement, Shard):
            start, stop = chunk_bounds(
                sizes[placement.dim], axis_size(mesh, axis), axis_rank(mesh, axis)
            )
            sizes[placement.dim] = stop - start
    return torch.Size(sizes)


def gathered_param(
    x: Tensor, steps: Gather, dtype: torch.dtype | None, reduce_dtype: torch.dtype | None
) -> Tensor:
    """The whole tensor of a sharded parameter, in `dtype`; its gradient is summed over ranks."""
    x = local(x)
    if reduce_dtype is not None:
        x = x.to(reduce_dtype)
    dtype = dtype or x.dtype
    for kind, dim, size, group in steps:
        x = collective(x, kind, dim, size, group, dtype)
    return x.to(dtype)


@dataclass(frozen=True)
class Plan:
    """How parameters become whole: for each name its steps, and the dtypes on the way."""

    steps: Mapping[str, Gather]
    dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    place: int = 0  # of the unit that these parameters are, in `Sharded.units`

    def whole(self, params: Params) -> Params:
        return {
            name: gathered_param(p, self.steps[name], self.dtype, self.reduce_dtype)
            if name in self.steps and is_sharded(p)
            else p
            for name, p in params.items()
        }

    def run(self, fn: Callable[..., Any], params: Params, *args: Any) -> Any:
        """fn(whole params, *args), whose backward gathers again what fn saves of them.

        Params that are whole already are taken as they are.
        """
        if not any(is_sharded(params[name]) for name in self.steps if name in params):
            return fn(params, *args)
        if torch.compiler.is_compiling():
            whole = checkpoint(self.whole, params, use_reentrant=False, preserve_rng_state=False)
            return fn(whole, *args)
        pipeline = overlap.active()
        if pipeline is not None and pipeline.knows(self.place, params):
            return pipeline.run(self.place, fn, params, args)
        whole = self.whole(params)
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if torch._C._are_functorch_transforms_active() or outer or not torch.is_grad_enabled():
            return fn(whole, *args)
        names = {
            whole[name].untyped_storage().data_ptr(): name
            for name, steps in self.steps.items()
            if name in params and any(kind == "all_gather" for kind, *_ in steps)
        }

        if not names:
            return fn(whole, *args)

        def pack(x: Tensor) -> Any:
            name = names.get(x.untyped_storage().data_ptr()) if type(x) is Tensor else None
            return x if name is None else (name, x.shape, x.stride(), x.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, shape, stride, offset = packed
            with torch.no_grad():
                again = self.whole({name: params[name]})[name]
            return again.as_strided(shape, stride, offset)

        with saved_tensors_hooks(pack, unpack):
            return fn(whole, *args)


@dataclass(frozen=True)
class Layout:
    """How a family of models is cut.

    Attributes:
        rules: name -> {axis: placement}.
        blocks: regex of the modules that are gathered one by one; "" for none.
        methods: those of a block that are called from outside of it.
        inside: regex of the parameters that tp ranks hold all, but use each in its own way.
        divided: sizes in the model's config that tp must divide.
        split: makes a skeleton compute with what tp leaves of its parameters.
    """

    rules: Rules[Cuts]
    blocks: str = ""
    methods: tuple[str, ...] = ("forward",)
    inside: str = r"(?!)"
    divided: tuple[str, ...] = ()
    split: Callable[[nn.Module, str], None] | None = None


@dataclass(frozen=True, eq=False)
class Sharded(Functional):
    """A Functional whose init makes shards and whose apply takes them; made by `sharded`.

    Attributes:
        mesh, layout: as given.
        placements: {parameter name: a placement for each axis of `active(mesh)`}.
        plan: how all parameters become whole.
        root: the same of those outside of blocks.
        units: those outside of blocks, then block by block; None where several axes cut one.
        outside: names of those outside of blocks: before the first block, and after it.
        transport: what an overlapped step's parameters and gradients travel by.
        inner: the model of whole parameters, as tp cuts them; the same with blocks in shards.
    """

    mesh: DeviceMesh
    layout: Layout
    placements: dict[str, tuple[Placement, ...]]
    plan: Plan
    root: Plan
    units: tuple[overlap.Unit, ...] | None
    outside: tuple[tuple[str, ...], ...]
    transport: overlap.Transport
    inner: tuple[Functional, Functional]

    def init(
        self,
        seed: int | Int64[Tensor, "2"],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Params:
        """This rank's shards of what the unsharded model's init returns, as DTensors."""
        if device is not None and torch.device(device).type != self.mesh.device_type:
            raise ValueError(f"device ({device}) must be the mesh's, {self.mesh.device_type}")
        return sharding.init(self, seed, self.layout.rules, self.mesh, dtype=dtype)

    def apply(self, params: Params, /, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
        def run(whole: Params, *args: Any) -> Any:
            sharded = any(map(is_sharded, whole.values()))
            inner = self.inner[int(sharded)]  # Dynamo of torch 2.11 takes no bool for an index
            return inner.apply(whole, *args, method=method, **kwargs)

        return self.root.run(run, params, *args)

    @torch.no_grad()
    def gradient(self, fn: Callable[..., Any], params: Params, calls: Iterable[tuple]) -> Any:
        """As `transforms.accumulate`, for `train.make_step(..., gradient=model.gradient)`.

        One call: blocks are gathered and gradients summed beside the computation (`overlap`).
        Several: one gather and one sum over ranks for all of them. Each rank holds whole parameters
        and whole gradients meanwhile, where `accumulate` gathers and reduces block by block, n
        times over. Gradients are added up in `reduce_dtype`.
        """
        calls = list(calls)
        if len(calls) == 1 and self.units is not None:
            return self._overlapped(fn, params, calls[0])
        whole, total, sums = self.plan.whole(params), None, {}
        one = value_and_grad(fn, has_aux=True)
        for call in calls:
            with torch.enable_grad():
                terms, grads = one(whole, *call)
            total = add_terms(total, terms)
            for name, g in grads.items():
                if name in sums:
                    sums[name] += g
                else:
                    sums[name] = g.to(self.plan.reduce_dtype or params[name].dtype, copy=True)
        for name, p in params.items():
            assert isinstance(p, DTensor)
            g = sums.pop(name)
            for kind, dim, size, group in reversed(self.plan.steps[name]):
                g = collective(g, KINDS[kind][1], dim, size, group, g.dtype)
            spec = (p.device_mesh, p.placements, p.shape)
            sums[name] = Distributed.apply(g.to(p.dtype), spec)
        return total, {name: sums[name] for name in params}

    def _overlapped(self, fn: Callable[..., Any], params: Params, call: tuple) -> Any:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        assert self.units is not None
        how = self.plan.dtype, self.plan.reduce_dtype, self.transport
        pipeline = overlap.Pipeline(leaves, self.units, self.outside, *how)
        with torch.enable_grad(), pipeline.running():
            value, aux = fn(leaves, *call)
            inputs = [pipeline.anchor, *leaves.values()]
            _, *direct = torch.autograd.grad(value, inputs, allow_unused=True)
        summed, grads = pipeline.gradients(), {}
        for (name, p), g in zip(params.items(), direct, strict=True):
            assert isinstance(p, DTensor)
            if name in summed:
                own = Distributed.apply(summed[name], (p.device_mesh, p.placements, p.shape))
                g = own if g is None else g + own
            grads[name] = torch.zeros_like(p) if g is None else g
        terms: Any = value, aux
        detached = optree.tree_map(Tensor.detach, terms, namespace=NAMESPACE)
        return detached, grads


def sharded(
    model: Functional,
    layout: Layout,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    transport: overlap.Transport | Literal["auto"] = "auto",
) -> Sharded:
    """The model whose params are DTensors on `mesh`; the loss that calls it does not change.

    Args:
        dtype: of the gathered parameters and so of the products, such as torch.bfloat16; None:
            that of the shards.
        reduce_dtype: in which gradients are added up over ranks; None: that of the shards, so that
            fp32 masters get fp32 sums.
        transport: what parameters and gradients of an overlapped step travel by. "copies": copies
            between the GPUs of one host (`peer_copies`), which leave multiprocessors alone;
            gradients go in their own dtype then. "collectives": those of the process groups.
            "auto": copies if all GPUs that share a parameter can, else collectives.

    Raises:
        ValueError: rules that do not fit the model or the mesh (see `sharding.placements`); tp that
            does not divide heads; copies between other devices than the GPUs of one host.
    """
    placed = placements(layout.rules, model.shapes, mesh)
    plan = functools.partial(Plan, dtype=dtype, reduce_dtype=reduce_dtype)
    steps = {
        name: gather_steps(shape, placed[name], active(mesh), bool(re.search(layout.inside, name)))
        for name, shape in model.shapes.items()
    }
    skeleton = copy.deepcopy(model.skeleton)
    if (tp := axis_size(mesh, "tp")) > 1:
        split_model(skeleton, layout, tp, mesh.get_group("tp").group_name)
    names = {id(p): name for name, p in skeleton.named_parameters()}
    in_blocks: set[str] = set()
    blocks: list[dict[str, str]] = []  # {name in the block: name of the parameter} of each
    for path, module in skeleton.named_modules():
        if layout.blocks and re.search(layout.blocks, path):
            own = {slot: names[id(p)] for slot, p in module.named_parameters()}
            in_blocks |= set(own.values())
            blocks.append(own)
            within = {slot: steps[name] for slot, name in own.items()}
            gather_in(module, layout.methods, plan(within, place=len(blocks)))
    root = {name: name for name in model.shapes if name not in in_blocks}
    inherited = {f.name: getattr(model, f.name) for f in fields(Functional)}
    inherited |= {"skeleton": skeleton, "_methods": Methods(skeleton)}
    units = units_of([root, *blocks], steps)
    groups = {own.group for unit in units or () for own in unit.ways.values() if own.group}
    why_not = peer_copies.why_not(sorted(groups), mesh.device_type)
    if transport == "copies" and why_not:
        raise ValueError(f'transport="copies": {why_not}; or take transport="auto"')
    if transport == "auto":
        transport = "collectives" if why_not or not groups else "copies"
    parts = {n: tp_shape(shape, placed[n], active(mesh)) for n, shape in model.shapes.items()}
    mixed = {n: model.shapes[n] if n in in_blocks else part for n, part in parts.items()}
    return Sharded(
        **inherited,
        mesh=mesh,
        layout=layout,
        placements=placed,
        plan=plan(steps),
        root=plan({name: steps[name] for name in root}),
        units=units,
        outside=around(list(model.shapes), in_blocks),
        transport=transport,
        inner=(
            Functional(**{**inherited, "shapes": parts}),
            Functional(**{**inherited, "shapes": mixed}),
        ),
    )


def around(names: Sequence[str], in_blocks: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The names outside of blocks that stand before the first block, and those after it."""
    first = next((i for i, name in enumerate(names) if name in in_blocks), len(names))
    after = tuple(name for name in names[first:] if name not in in_blocks)
    return tuple(group for group in (tuple(names[:first]), after) if group)


def units_of(
    parts: Sequence[Mapping[str, str]], steps: Mapping[str, Gather]
) -> tuple[overlap.Unit, ...] | None:
    units = []
    for names in parts:
        ways = {slot: way(steps[name]) for slot, name in names.items()}
        known = {slot: own for slot, own in ways.items() if own is not None}
        if len(known) < len(ways):
            return None
        units.append(overlap.Unit(names, known))
    return tuple(units)


def split_model(skeleton: nn.Module, layout: Layout, tp: int, group: str) -> None:
    if layout.split is None:
        raise ValueError(
            f"tp is {tp}, but the layout of {type(skeleton).__name__} has no tensor parallelism: "
            f"use tp=1"
        )
    config = skeleton.config
    for name in layout.divided:
        size = getattr(config, name, None)
        if size is not None and size % tp:
            raise ValueError(f"tp ({tp}) must divide {name} ({size}): choose another degree of tp")
    if getattr(config, "fused", False):
        raise ValueError(
            "fused matrices cannot be cut by heads: use fused=False with tp, or tp=1 with fused"
        )
    layout.split(skeleton, group)


def gather_in(module: nn.Module, methods: Sequence[str], plan: Plan) -> None:
    """These methods of the module, when its parameters are shards, run on them made whole."""
    kind = type(module)

    def around(name: str) -> Callable[..., Any]:
        method = getattr(kind, name)

        @functools.wraps(method)
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            held: Params = dict(self.named_parameters())
            if not any(is_sharded(p) for p in held.values()):
                return method(self, *args, **kwargs)

            def on_whole(whole: Params) -> Any:
                own = {f"skeleton.{slot}": p for slot, p in whole.items()}
                return functional_call(Methods(self), own, (name, args, kwargs), tie_weights=False)

            return plan.run(on_whole, held)

        return run

    own = {name: around(name) for name in methods if hasattr(kind, name)}
    module.__class__ = type(kind.__name__, (kind,), own)


def gathered(loss_fn: LossFn, model: Any) -> LossFn:
    """loss_fn over the whole batch, of which each rank passes its own share.

    `model` is what `sharded` or `fsdp.fully_sharded` returned, the one that loss_fn calls.

    Loss and metrics are means over all shares, weighted by metrics["weight"] where there is one
    (else every share weighs the same), and equal on every rank; "weight" itself is summed. The key
    is folded with the number of the share, so that shares drop out apart from each other. Ranks of
    cp hold other tokens of the same examples and count as shares, too.
    """
    mesh = model.mesh
    share, shares = data_rank(mesh)
    share, shares = (
        share * axis_size(mesh, "cp") + axis_rank(mesh, "cp"),
        shares * axis_size(mesh, "cp"),
    )
    axes = [axis for axis in (*DATA_AXES, "cp") if axis_size(mesh, axis) > 1]
    groups = [mesh.get_group(axis).group_name for axis in axes]

    @functools.wraps(loss_fn)
    def run(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if shares > 1:
            key = random.fold_in(key, share)
        loss, metrics = model.root.run(loss_fn, params, batch, key)
        if not groups:
            return loss, metrics
        dtype = torch.promote_types(loss.dtype, torch.float32)
        weight = metrics.get("weight", torch.ones((), device=loss.device))
        rest = {name: v for name, v in metrics.items() if name != "weight"}
        terms = [torch.as_tensor(v, device=loss.device).to(dtype) for v in (loss, *rest.values())]
        weight = torch.as_tensor(weight, device=loss.device).detach().to(dtype)
        sums = torch.stack([*(v * weight for v in terms), weight])
        for group in groups:
            sums = psum(sums, group)
        *totals, total = sums.unbind()
        loss, *means = (v / total.detach() for v in totals)
        out = dict(zip(rest, means, strict=True))
        return loss, {**out, "weight": total} if "weight" in metrics else out

    return run
