"""The training step: loss and optimizer in, one compiled function of (state, batch) out.

    state = init_state(model.init(seed), optimizer, random.key(seed))
    step = make_step(loss_fn, optimizer)
    for batch in batches:
        state, metrics = step(state, batch)

`loss_fn(params, batch, key) -> (loss, metrics)` is all a user writes: a 0-d loss, the mean over the
batch's items, and a dict of 0-d tensors. metrics["weight"], the number of those items, is needed
where microbatches differ in it.

How a step runs, in the structure that measured fastest (a compiled loss, the autograd engine, a
compiled update in place):

    1. key = fold_in(state.key, state.step)
    2. loss_fn forward and backward, compiled together and partitioned; once for each microbatch
    3. one compiled update: gradient norm, guard, optimizer, moving average, written in place

Everything that changes from step to step is a tensor, so nothing recompiles, and nothing in a step
waits for the device.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import optree
import torch
from jaxtyping import Int64
from msfs_kernels.dispatch import is_sharded
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree

from msfs_functional import random
from msfs_functional.compiling import (
    compile_per_shape,
    fresh,
    start_compilers,
    why_not_compile,
)
from msfs_functional.leafwise import Leafwise, Trained, UpdateFn, memory_plan
from msfs_functional.optim import Transformation, apply_updates, ema, global_norm, overwrite
from msfs_functional.params import Functional, Params, stack
from msfs_functional.regions import Regions
from msfs_functional.side_by_side import joined, lay
from msfs_functional.transforms import NAMESPACE, accumulate
from msfs_functional.updates import tree_map

Metrics = dict[str, Tensor]
LossFn = Callable[[Any, Any, Any], tuple[Tensor, Metrics]]  # the key may be None
Step = Callable[["TrainState", Any], tuple["TrainState", Metrics]]
OURS = ("loss", "grad_norm", "skipped")


@dataclass(frozen=True)
class TrainState:
    """All that a training run is, as one pytree.

    In an ensemble of N every tensor but `step` has a leading dim N.

    Attributes:
        params: what is trained.
        opt_state: the optimizer's.
        ema: exponential moving average of params, or None.
        step: steps taken, skipped ones included; 0-d int64.
        skipped: steps whose loss or gradient was not finite; 0-d (N,) int64.
        key: base of the random keys; step i draws from fold_in(key, i).
    """

    params: Params
    opt_state: Any
    ema: Params | None
    step: Int64[Tensor, ""]
    skipped: Int64[Tensor, "*N"]
    key: Int64[Tensor, "*N 2"]


FIELDS = ("params", "opt_state", "ema", "step", "skipped", "key")
optree.register_pytree_node(
    TrainState,  # pyright: ignore[reportArgumentType]
    lambda state: (tuple(getattr(state, name) for name in FIELDS), None, FIELDS),
    lambda _, children: TrainState(*children),  # pyright: ignore[reportArgumentType]
    path_entry_type=optree.DataclassEntry,
    namespace=NAMESPACE,
)
_pytree.register_dataclass(TrainState)


def _map(fn: Callable[..., Any], *trees: Any) -> Any:
    return optree.tree_map(fn, *trees, namespace=NAMESPACE)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    leaves, spec, *_ = optree.tree_flatten(tree, namespace=NAMESPACE)
    return leaves, spec


def _vmap(fn: Callable[..., Any], mapped: tuple[int, ...]) -> Callable[..., Any]:
    """fn over dim 0 of every tensor in the arguments `mapped`; arguments and results any pytree."""

    def run(*args: Any) -> Any:
        leaves, spec = _flatten([args[i] for i in mapped])
        result: list[Any] = []

        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            one = list(args)
            for i, arg in zip(mapped, optree.tree_unflatten(spec, leaves), strict=True):
                one[i] = arg
            outs, out_spec = _flatten(fn(*one))
            result[:] = [out_spec]
            return tuple(outs)

        leaves = vmap(flat)(*leaves)
        return optree.tree_unflatten(result[0], leaves)

    return run


def _beside(tensors: Params, order: Sequence[str]) -> Params:
    """Tensors of an ensemble side by side in this order, in their own memory if they are already;
    those of several dtypes, and shards, stay as they are."""
    columns = [tensors[name] for name in order if name in tensors]
    if len({x.dtype for x in columns}) != 1 or any(map(is_sharded, columns)):
        return tensors
    if joined(columns, lead=1) is None:
        columns = lay(columns, lead=1)
    return dict(zip((name for name in order if name in tensors), columns, strict=True))


def _all_beside(trained: Trained, order: Sequence[str]) -> Trained:
    """The same for every dict that parameters' names are the keys of."""
    named = lambda x: isinstance(x, dict) and bool(x) and x.keys() <= set(order)  # noqa: E731
    each = lambda x: _beside(x, order) if named(x) else x  # noqa: E731
    return optree.tree_map(each, trained, is_leaf=named, namespace=NAMESPACE)  # pyright: ignore


def init_state(
    params: Params,
    optimizer: Transformation,
    key: Int64[Tensor, "*N 2"],
    *,
    ema_decay: float | None = None,
) -> TrainState:
    """The state before the first step. It takes `params` over: a donating step writes into them.

    Only tensors that are not contiguous are copied, and an ensemble's, which then lie side by side
    (`side_by_side`): a step of hundreds of small tensors has few launches so.

    Args:
        params: what is trained; for an ensemble of N stacked, every tensor with a leading dim N.
        key: base of all random keys, (2,); for an ensemble (N, 2), one for each member.
        ema_decay: not None keeps a moving average of params, which starts as a copy of them.

    Raises:
        ValueError: ensemble keys with params that are not stacked.
    """
    device = _flatten(params)[0][0].device
    init = optimizer.init
    if key.ndim == 2:
        for name, value in params.items():
            if value.shape[:1] != key.shape[:1]:
                raise ValueError(
                    f"{len(key)} keys ask for an ensemble, but {name!r} has shape "
                    f"{tuple(value.shape)}; stack the members' params, dim 0 counts them"
                )
        init = _vmap(init, mapped=(0,))
    own = lambda leaf: leaf.detach().clone(memory_format=torch.contiguous_format)  # noqa: E731
    trained = (
        {name: value.detach().contiguous() for name, value in params.items()},
        _map(own, init(params)),
        None if ema_decay is None else ema(ema_decay).init(params),
    )
    if key.ndim == 2:
        trained = _all_beside(trained, memory_plan(params, optimizer.kinds, lead=1))
    return TrainState(
        *trained,
        step=torch.zeros((), dtype=torch.int64, device=device),
        skipped=torch.zeros(key.shape[:-1], dtype=torch.int64, device=device),
        key=key.to(device, copy=True),
    )


def first_state(
    model: Functional,
    optimizer: Transformation,
    seeds: Sequence[int],
    *,
    device: torch.device | str | None = None,
    ema_decay: float | None = None,
) -> TrainState:
    """The state of a run before its first step; of an ensemble's where there are several seeds.

    Member i starts, and draws its random numbers, as the run with seeds[i] alone.
    """
    members = [model.init(seed, device=device) for seed in seeds]
    keys = torch.stack([random.key(seed, device=device) for seed in seeds])
    if len(members) == 1:
        return init_state(members[0], optimizer, keys[0], ema_decay=ema_decay)
    return init_state(stack(members), optimizer, keys, ema_decay=ema_decay)


@torch.no_grad()
def mean_loss(
    loss_fn: LossFn, params: Params, batches: Iterable[Any], *, members: int | None = None
) -> Tensor:
    """The loss over all batches, each weighted by its metrics["weight"], without a key.

    Args:
        loss_fn: as in `make_step`; it gets None for a key, which means evaluation.
        members: params are stacked so often; the loss is then (members,).
    """
    if members is not None:
        loss_fn = vmap(loss_fn, in_dims=(0, None, None))
    total, count = 0.0, 0.0
    for batch in batches:
        loss, metrics = loss_fn(params, batch, None)
        total, count = total + loss * metrics["weight"], count + metrics["weight"]
    return torch.as_tensor(total / count)


def step_key(key: Tensor, step: Tensor, part: Tensor | None) -> Tensor:
    """The key of a step, or of one microbatch of it."""
    key = random.fold_in(key, step)
    return key if part is None else random.fold_in(key, part)


def _objective(loss_fn: LossFn, weighted: bool, members: int | None) -> Callable[..., Any]:
    """(params, batch, key, step, part) -> (0-d tensor to differentiate, (metrics, weight))."""

    def one(params: Params, batch: Any, key: Tensor, step: Tensor, part: Tensor | None) -> Any:
        key = step_key(key, step, part)
        loss, metrics = loss_fn(params, batch, key)
        if loss.ndim:
            raise ValueError(f"loss_fn must return a 0-d loss, got shape {tuple(loss.shape)}")
        if taken := metrics.keys() & set(OURS):
            raise ValueError(f"the step itself reports {sorted(taken)}: rename loss_fn's metrics")
        sums = {"loss": loss, **metrics}
        sums = {name: torch.as_tensor(v, device=loss.device).detach() for name, v in sums.items()}
        weight = sums.get("weight", torch.ones_like(loss, dtype=torch.float32)).detach()
        if weighted:
            loss = loss * weight
            sums = {name: v if name == "weight" else v * weight for name, v in sums.items()}
        return loss, (sums, weight)

    def every(params: Params, batch: Any, key: Tensor, step: Tensor, part: Tensor | None) -> Any:
        losses, aux = _vmap(one, mapped=(0, 2))(params, batch, key, step, part)
        return losses.sum(), aux

    return one if members is None else every


def _settle(
    grads: Params, sums: Metrics, weight: Tensor, weighted: bool, clip: float | None, lead: int
) -> tuple[Metrics, Tensor | None, Tensor]:
    """(metrics, what to scale each gradient by, whether loss and gradient are finite)."""
    norm = _norm(list(grads.values()), lead)
    scale = None
    if weighted:
        sums = {name: v if name == "weight" else v / weight for name, v in sums.items()}
        norm, scale = norm / weight, 1 / weight
    if clip is not None:
        limit = torch.clamp(clip / norm, max=1.0)
        scale = limit if scale is None else scale * limit
    finite = sums["loss"].isfinite() & norm.isfinite()
    return {**sums, "grad_norm": norm}, scale, finite


def _norm(grads: list[Tensor], lead: int) -> Tensor:
    """Euclidean norm of all gradients as one vector; for an ensemble of each member."""
    if any(is_sharded(g) for g in grads):
        return global_norm(grads)
    wide = [torch.promote_types(g.dtype, torch.float32) for g in grads]
    if lead and (whole := joined(grads, lead)) is not None:
        return torch.linalg.vector_norm(whole, dim=1, dtype=wide[0])
    if lead:
        norms = [
            torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1, dtype=dtype)
            for g, dtype in zip(grads, wide, strict=True)
        ]
    elif len(set(wide)) == 1:  # half precision is widened in passing, not one by one
        norms = torch._foreach_norm(grads, 2, dtype=wide[0])
    else:
        norms = [
            torch.linalg.vector_norm(g, dtype=dtype) for g, dtype in zip(grads, wide, strict=True)
        ]
    dtype = max(wide, key=lambda dtype: dtype.itemsize)
    return torch.linalg.vector_norm(torch.stack([norm.to(dtype) for norm in norms]), dim=0)


def _update(optimizer: Transformation, ema_decay: float | None) -> UpdateFn:
    """(trained, grads, scale, finite) -> trained: optimizer, moving average and guard."""
    average = None if ema_decay is None else ema(ema_decay)

    def update(trained: Trained, grads: Params, scale: Tensor | None, finite: Tensor) -> Trained:
        params, opt_state, mean = trained
        grads = tree_map(lambda g, p: g.to(p.dtype), grads, params)  # see `transforms.in_dtype`
        if scale is not None:
            grads = tree_map(lambda g: g * scale.to(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = apply_updates(params, updates)
        if average is not None:
            mean = average.update(params, mean)
        guard = lambda new, old: torch.where(finite, new.to(old.dtype), old)  # noqa: E731
        return tree_map(guard, (params, opt_state, mean), trained, namespace=NAMESPACE)

    return update


def _on_shards(update: UpdateFn) -> UpdateFn:
    """An elementwise update, which of DTensors sees the shards."""

    def run(trained: Trained, grads: Params, scale: Tensor | None, finite: Tensor) -> Trained:
        if not any(map(is_sharded, grads.values())):
            return update(trained, grads, scale, finite)
        local = lambda x: x.to_local() if is_sharded(x) else x  # noqa: E731
        after = update(_map(local, trained), _map(local, grads), scale, finite)
        return tree_map(lambda old, new: new, trained, after, namespace=NAMESPACE)

    return run


def _on_matrices(update: UpdateFn, eager: UpdateFn) -> UpdateFn:
    """An update that looks at whole matrices (Muon) runs eagerly over shards: it sees all of them
    at once then, and what ranks send one another goes in few parts."""

    def run(trained: Trained, grads: Params, scale: Tensor | None, finite: Tensor) -> Trained:
        fn = eager if any(map(is_sharded, grads.values())) else update
        return fn(trained, grads, scale, finite)

    return run


def _advance(
    optimizer: Transformation,
    *,
    weighted: bool,
    clip: float | None,
    ema_decay: float | None,
    members: int | None,
    compile: bool | Literal["regions"],
    donate: bool,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, grads, sums, weight) -> (state, metrics): the whole step after the gradient."""
    lead = 0 if members is None else 1
    one = _update(optimizer, ema_decay)

    def every(trained: Trained, grads: Params, scale: Tensor | None, finite: Tensor) -> Trained:
        if scale is None:
            unscaled = lambda trained, grads, finite: one(trained, grads, None, finite)  # noqa: E731
            return _vmap(unscaled, mapped=(0, 1, 2))(trained, grads, finite)
        return _vmap(one, mapped=(0, 1, 2, 3))(trained, grads, scale, finite)

    pure = one if members is None else every

    def overwriting(trained: Trained, *rest: Any) -> Trained:
        overwrite(trained, pure(trained, *rest))
        return trained

    eager: UpdateFn = overwriting if donate else pure
    update = eager
    if compile and optimizer.kinds is not None:
        update = Leafwise(
            pure,
            optimizer.kinds,
            elementwise=optimizer.elementwise,
            lead=lead,
            donate=donate,
            thrifty=compile == "regions",
        )
    elif compile:
        update = torch.compile(fresh(update), fullgraph=True, dynamic=False)

    update = _on_shards(update) if optimizer.elementwise else _on_matrices(update, eager)

    plan: list[str] = []

    def advance(state: TrainState, grads: Params, sums: Metrics, weight: Tensor) -> Any:
        if lead:
            plan[:] = plan or memory_plan(state.params, optimizer.kinds, lead)
            grads = _beside(grads, plan)
        metrics, scale, finite = _settle(grads, sums, weight, weighted, clip, lead)
        trained = (state.params, state.opt_state, state.ema)
        params, opt_state, mean = update(trained, grads, scale, finite)
        step, skipped = state.step + 1, state.skipped + ~finite
        if donate:
            step, skipped = state.step.copy_(step), state.skipped.copy_(skipped)
        metrics["skipped"] = skipped.clone()
        return TrainState(params, opt_state, mean, step, skipped, state.key), metrics

    return advance


def _check(state: TrainState, ema_decay: float | None, members: int | None, compile: bool) -> None:
    held = len(state.key) if state.key.ndim == 2 else None
    if held != members:
        raise ValueError(
            f"make_step got members={members}, but the state holds {held}: give init_state a key "
            f"for each member, random.split(key, members), or make_step the same members"
        )
    if (state.ema is None) != (ema_decay is None):
        held = "no" if state.ema is None else "a"
        raise ValueError(
            f"make_step got ema_decay={ema_decay}, but the state holds {held} moving average: give "
            f"init_state the same ema_decay"
        )
    reason = why_not_compile(state.step.device) if compile else None
    if reason:
        raise ValueError(f"compile=True, but {reason}; or pass compile=False")


def _cut(batch: Any, n: int) -> list[Any]:
    """n equal microbatches, views of batch; 0-d tensors and other leaves are in each."""
    for leaf in _flatten(batch)[0]:
        if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] % n:
            raise ValueError(
                f"accumulation ({n}) must divide the batch, got a tensor of shape "
                f"{tuple(leaf.shape)}: choose batch sizes that are multiples of {n}"
            )

    def piece(leaf: Any, i: int) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            return leaf
        size = leaf.shape[0] // n
        return leaf[i * size : (i + 1) * size]

    return [_map(lambda leaf: piece(leaf, i), batch) for i in range(n)]  # noqa: B023


def make_step(
    loss_fn: LossFn,
    optimizer: Transformation,
    *,
    accumulation: int = 1,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    members: int | None = None,
    compile: bool | Literal["regions"] = True,
    dynamic: bool | None = None,
    donate: bool = True,
    gradient: Callable[..., Any] | None = None,
) -> Step:
    """step(state, batch) -> (state, metrics): gradient, guard, optimizer and average in one.

    A step whose loss or gradient norm is not finite changes nothing but `step` and `skipped`.
    Metrics are device tensors: loss_fn's own, "loss" (the mean), "grad_norm" (before clipping) and
    "skipped" (so far); reading one waits for the device, so read rarely.

    Args:
        loss_fn: (params, batch, key) -> (0-d mean loss, dict of 0-d metrics).
        optimizer: a Transformation, clipping and schedules included.
        accumulation: microbatches a step; every tensor of the batch is cut into so many along
            dim 0. Gradient, loss and metrics are means over them weighted by metrics["weight"],
            which is itself summed. Microbatch i draws from fold_in(step key, i). One of padding
            alone may weigh 0, but its loss must be finite: total / count.clamp(min=1), not 0 / 0.
        clip_norm: scale the gradient down to this global norm where it is longer (Pascanu et al.
            2013). Unlike `clip_by_global_norm` in the optimizer it lets the update compile by leaf.
        ema_decay: the same as init_state got.
        members: N trains an ensemble in one vmapped step: params, opt_state, ema, skipped, keys and
            metrics carry a leading dim N, the batch is common, clipping and guard are per member.
        compile: True: the loss is one graph, the fastest step. "regions": the blocks of the model
            are compiled once for all (`regions`), which starts many times sooner and costs some
            launches. False runs eager, for debugging or where `can_compile` says no.
        dynamic: batch shapes in compiled graphs. False: one graph for each shape, the fastest
            kernels, for few shapes. True: one graph for all shapes. None: a graph for the first
            shape, then one for all others. A bounded set of shapes stops compiling once each was
            seen, in all three. An ensemble takes False, which None then means: torch cannot trace
            its batched products over symbolic sizes.
        donate: write the new state into the old one's memory: nothing is allocated, and the state
            that went in is spent.
        gradient: replaces `transforms.accumulate`, for models that keep parameters of their own
            (`fsdp`), gather them beside the computation (`gathering.Sharded.gradient`), or are
            differentiated in half precision (`transforms.in_dtype`). The loss
            is then no graph, its regions are with compile="regions"; the update is.

    Raises:
        ValueError: a batch that accumulation does not divide; members that the state does not have;
            loss_fn returns something else; compile=True on a machine that cannot.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation ({accumulation}) must be at least 1")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm ({clip_norm}) must be positive; None does not clip")
    if members is not None and dynamic:
        raise ValueError(f"dynamic=True with members={members}: an ensemble needs dynamic=False")
    if compile:
        start_compilers()
    dynamic = False if members is not None else dynamic
    weighted = accumulation > 1
    objective = _objective(loss_fn, weighted, members)
    advance = _advance(
        optimizer,
        weighted=weighted,
        clip=clip_norm,
        ema_decay=ema_decay,
        members=members,
        compile=compile,
        donate=donate,
    )
    if compile == "regions":
        regions = Regions(dynamic)
        plain = objective

        def objective(*args: Any) -> Any:
            with regions.compiled():
                return plain(*args)

    elif compile and gradient is None:
        objective = compile_per_shape(objective, dynamic)
    checked = False

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        nonlocal checked
        if not checked:
            _check(state, ema_decay, members, bool(compile))
            checked = True
        if weighted:
            parts = torch.arange(accumulation, device=state.step.device).unbind()
            pieces = zip(_cut(batch, accumulation), parts, strict=True)
        else:
            pieces = [(batch, None)]
        calls = ((piece, state.key, state.step, part) for piece, part in pieces)
        (_, (sums, weight)), grads = (gradient or accumulate)(objective, state.params, calls)
        with torch.no_grad():
            return advance(state, grads, sums, weight)

    return step
