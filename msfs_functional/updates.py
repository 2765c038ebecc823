"""Gradient transformations: the links that optimizers are chained from (as in optax).

A transformation is a pair of pure functions,

    init(params)                  -> state
    update(grads, state, params)  -> (updates, state)

and `chain` runs several in a row, each taking the updates of the one before as its grads. What the
last one returns is added to the parameters. Params, grads and updates are pytrees of one structure
(flat dicts where a rule asks for names); states are NamedTuples of such trees and of 0-d int64
counts, so that no step recompiles. Under `vmap` over stacked params each member is clipped, counted
and updated as if alone.

Nearly all of them treat each parameter alone. One that does says so by `kinds`, and a compiled
training step then compiles the update of one parameter for all, not a graph of all (`leafwise`).
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import optree
import torch
from msfs_kernels.dispatch import is_sharded
from torch import Tensor

from msfs_functional.params import Rules, by_rules
from msfs_functional.schedules import Schedule

Tree = Any  # a pytree of tensors
State = Any  # a pytree of tensors
T = TypeVar("T")


Kinds = Callable[[dict[str, Tensor]], dict[str, Hashable]]


class Transformation(NamedTuple):
    """init(params) -> state; update(grads, state, params) -> (updates, state).

    Attributes:
        kinds: None: an update needs all parameters at once. Else each is updated as if it were the
            only one, and kinds(params) says by name what the rules decide about it: parameters of
            one kind and shape are updated alike. Each dict in the state that is keyed by names of
            parameters holds what belongs to them, everything else is common to all.
        elementwise: whether each element of a parameter is updated alone, whatever its shape.
    """

    init: Callable[[Tree], State]
    update: Callable[[Tree, State, Tree], tuple[Tree, State]]
    kinds: Kinds | None = None
    elementwise: bool = False


def alike(params: dict[str, Tensor]) -> dict[str, Hashable]:
    """The kinds of a transformation that asks no rule: one for all."""
    return {name: None for name in params}


def tree_map(fn: Callable[..., Any], tree: T, *rest: Any, namespace: str = "") -> T:
    """fn, which works element by element, on every leaf; of DTensors it sees the shards.

    What is known to need no other rank's elements need not ask DTensor about it.
    """

    def on_shards(x: Any, *others: Any) -> Any:
        if type(x).__name__ != "DTensor":
            return fn(x, *others)
        from torch.distributed.tensor import DTensor

        parts = (y.to_local() if isinstance(y, DTensor) else y for y in (x, *others))
        mesh, placed = x.device_mesh, x.placements
        return DTensor.from_local(
            fn(*parts), mesh, placed, run_check=False, shape=x.shape, stride=x.stride()
        )

    return optree.tree_map(on_shards, tree, *rest, namespace=namespace)  # pyright: ignore


def whole_map(fn: Callable[..., Any], tree: T, *rest: Any) -> T:
    """fn, which may work across elements, on every leaf; a DTensor acts as the whole tensor."""
    return optree.tree_map(fn, tree, *rest)  # pyright: ignore


def widen(tree: T) -> T:
    """The tree with narrower floats than float32 cast to it, so that sums of them do not round."""
    return tree_map(lambda x: x.to(torch.promote_types(x.dtype, torch.float32)), tree)


def zeros_like(params: Tree) -> Tree:
    """Zeros in the shape of each parameter, in float32 where the parameter is narrower."""
    return tree_map(
        lambda p: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)), params
    )


def zero_count(params: Tree) -> Tensor:
    """A 0-d int64 zero on the device of the parameters."""
    leaves = optree.tree_leaves(params)
    if not leaves:
        raise ValueError("params hold no tensor: there is nothing to optimise")
    return torch.zeros((), dtype=torch.int64, device=leaves[0].device)


def stateless(
    update: Callable[[Tree, Tree], Tree], kinds: Kinds | None = None, elementwise: bool = False
) -> Transformation:
    """A transformation out of a function (grads, params) -> updates."""

    def init(params: Tree) -> State:
        return ()

    return Transformation(
        init, lambda grads, state, params: (update(grads, params), state), kinds, elementwise
    )


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """params + updates, in the dtype of each parameter."""
    return tree_map(lambda p, u: (p + u).to(p.dtype), params, updates)


def chain(*transformations: Transformation) -> Transformation:
    """The transformations one after another; the state is the tuple of theirs."""

    def init(params: Tree) -> State:
        return tuple(t.init(params) for t in transformations)

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        states = []
        for transformation, part in zip(transformations, state, strict=True):
            grads, part = transformation.update(grads, part, params)
            states.append(part)
        return grads, tuple(states)

    def kinds(params: dict[str, Tensor]) -> dict[str, Hashable]:
        parts = [t.kinds(params) for t in transformations if t.kinds]
        return {name: tuple(part[name] for part in parts) for name in params}

    alone = all(t.kinds for t in transformations)
    elementwise = all(t.elementwise for t in transformations)
    return Transformation(init, update, kinds if alone else None, elementwise)


def by_group(groups: Rules[Transformation]) -> Transformation:
    """Each parameter is updated by the transformation of the first rule that matches its name.

        by_group([("^embedding", sgd(0.1)), ("", adamw(1e-3))])

    A group sees its own parameters only: a clip inside of it clips by the norm of the group.
    """
    rules = [(pattern, i) for i, (pattern, _) in enumerate(groups)]
    return partition(lambda params, strict: by_rules(rules, params, strict), [t for _, t in groups])


def partition(
    assign: Callable[[dict[str, Tensor], bool], dict[str, int]], members: Sequence[Transformation]
) -> Transformation:
    """Each parameter is updated by members[assign(params, strict)[name]].

    `strict` is true where all parameters are given, so that a rule that matches none is a mistake.
    """

    def split(tree: dict[str, Any], member_of: dict[str, int]) -> list[dict[str, Any]]:
        return [{k: v for k, v in tree.items() if member_of[k] == i} for i in range(len(members))]

    def init(params: dict[str, Tensor]) -> State:
        parts = split(params, assign(params, True))
        return tuple(t.init(p) if p else () for t, p in zip(members, parts, strict=True))

    def update(grads: dict[str, Tensor], state: State, params: dict[str, Tensor]):
        member_of = assign(params, False)
        merged, states = {}, []
        for t, g, s, p in zip(
            members, split(grads, member_of), state, split(params, member_of), strict=True
        ):
            updates, s = t.update(g, s, p) if p else ({}, s)
            merged.update(updates)
            states.append(s)
        return {name: merged[name] for name in grads}, tuple(states)

    def kinds(params: dict[str, Tensor]) -> dict[str, Hashable]:
        found: dict[str, Hashable] = {}
        for i, part in enumerate(split(params, assign(params, True))):
            own = members[i].kinds
            if part and own:
                found.update({name: (i, kind) for name, kind in own(part).items()})
        return found

    alone = all(t.kinds for t in members)
    elementwise = all(t.elementwise for t in members)
    return Transformation(init, update, kinds if alone else None, elementwise)


def global_norm(tree: Tree) -> Tensor:
    """Euclidean norm of all leaves as one vector: 0-d, summed in float32 at least."""
    leaves = optree.tree_leaves(widen(tree))
    if not leaves:
        raise ValueError("a tree without tensors has no norm")
    if any(is_sharded(x) for x in leaves):
        from msfs_functional.sharding import sum_of_squares  # one process needs none of it

        return torch.sqrt(sum_of_squares(leaves))
    return torch.sqrt(torch.stack([x.square().sum() for x in leaves]).sum())


def clip_by_global_norm(max_norm: float) -> Transformation:
    """Scales all gradients by min(1, max_norm / global_norm) (Pascanu et al. 2013).

    A norm that is infinite or NaN makes every update NaN; the step's guard is what skips those.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm ({max_norm}) must be positive")

    def update(grads: Tree, params: Tree) -> Tree:
        scale = torch.clamp(max_norm / global_norm(grads), max=1.0)
        return tree_map(lambda g: g * scale, widen(grads))

    return stateless(update)


class ScheduleState(NamedTuple):
    count: Tensor  # updates made so far


def scheduled(
    fn: Callable[[Tree, Tree, float | Tensor], Tree],
    value: float | Schedule,
    kinds: Kinds = alike,
) -> Transformation:
    """updates = fn(grads, params, value); a schedule is asked for the value at each update.

    `fn` is elementwise. `kinds` is also asked when the state is made: there it sees all parameters.
    """

    def init(params: Tree) -> State:
        if kinds is not alike:
            kinds(params)
        return ScheduleState(zero_count(params)) if callable(value) else ()

    def update(grads: Tree, state: State, params: Tree) -> tuple[Tree, State]:
        if not callable(value):
            return fn(grads, params, value), state
        return fn(grads, params, value(state.count)), ScheduleState(state.count + 1)

    return Transformation(init, update, kinds, True)


def add_decayed_weights(
    weight_decay: float | Schedule, rules: Rules[bool] | None = None
) -> Transformation:
    """updates + weight_decay params, for the parameters whose rule says True (None: for all)."""
    if not callable(weight_decay):
        if weight_decay < 0:
            raise ValueError(f"weight_decay ({weight_decay}) must not be negative")
        if weight_decay == 0:
            return stateless(lambda grads, params: grads, alike, True)

    def kinds(params: dict[str, Tensor]) -> dict[str, Hashable]:
        return dict(by_rules(rules or [], params))

    def decayed(grads: Tree, params: Tree, weight: float | Tensor) -> Tree:
        if rules is None:
            return tree_map(lambda u, p: u + weight * p, grads, params)
        decays = by_rules(rules, params, strict=False)
        return {k: u + weight * params[k] if decays[k] else u for k, u in grads.items()}

    return scheduled(decayed, weight_decay, alike if rules is None else kinds)


def scale_by_learning_rate(learning_rate: float | Schedule) -> Transformation:
    """updates * -learning_rate; a schedule is asked with the updates made so far, 0 at first."""
    if not callable(learning_rate) and not learning_rate >= 0:
        raise ValueError(f"learning_rate ({learning_rate}) must not be negative")
    return scheduled(
        lambda grads, params, rate: tree_map(lambda u: u * -rate, grads), learning_rate
    )


class AdamState(NamedTuple):
    count: Tensor  # updates made so far
    mu: Tree  # running mean of the gradients
    nu: Tree  # running mean of their squares


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transformation:
    """Mean gradient over root mean square gradient (Kingma and Ba 2015, Algorithm 1).

    mu <- b1 mu + (1 - b1) g,  nu <- b2 nu + (1 - b2) g**2,
    update = mu / (1 - b1**t) / (sqrt(nu / (1 - b2**t)) + eps), t = 1, 2, ...
    """
    check_decay(b1=b1, b2=b2)

    def init(params: Tree) -> AdamState:
        return AdamState(zero_count(params), zeros_like(params), zeros_like(params))

    def update(grads: Tree, state: AdamState, params: Tree) -> tuple[Tree, AdamState]:
        count, grads = state.count + 1, widen(grads)
        mu = tree_map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = tree_map(lambda v, g: b2 * v + (1 - b2) * g.square(), state.nu, grads)
        t = count.to(optree.tree_leaves(nu)[0].dtype)
        c1, c2 = one_minus_power(b1, t), one_minus_power(b2, t)
        updates = tree_map(lambda m, v: m / c1 / (torch.sqrt(v / c2) + eps), mu, nu)
        return updates, AdamState(count, mu, nu)

    return Transformation(init, update, alike, elementwise=True)


def one_minus_power(decay: float, count: Tensor) -> Tensor:
    """1 - decay**count for a floating-point count, by expm1, which does not cancel."""
    if decay == 0.0:
        return torch.ones_like(count)
    return -torch.expm1(count * math.log(decay))


def check_decay(**decays: float) -> None:
    for name, value in decays.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} ({value}) must be in [0, 1)")


class MomentumState(NamedTuple):
    mu: Tree


def scale_by_momentum(momentum: float, nesterov: bool = False) -> Transformation:
    """Heavy-ball momentum: mu <- momentum mu + g, update mu (Polyak 1964).

    With nesterov, update = momentum mu + g (Sutskever et al. 2013).
    """
    check_decay(momentum=momentum)

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        mu = tree_map(lambda m, g: momentum * m + g, state.mu, grads)
        updates = tree_map(lambda m, g: momentum * m + g, mu, grads) if nesterov else mu
        return updates, MomentumState(mu)

    init = lambda params: MomentumState(zeros_like(params))  # noqa: E731
    return Transformation(init, update, alike, elementwise=True)


def scale_by_lion(b1: float = 0.9, b2: float = 0.99) -> Transformation:
    """The sign of an interpolated momentum (Chen et al. 2023, Algorithm 2).

    update = sign(b1 mu + (1 - b1) g),  mu <- b2 mu + (1 - b2) g
    """
    check_decay(b1=b1, b2=b2)

    def update(grads: Tree, state: MomentumState, params: Tree) -> tuple[Tree, MomentumState]:
        updates = tree_map(lambda m, g: torch.sign(b1 * m + (1 - b1) * g), state.mu, grads)
        return updates, MomentumState(tree_map(lambda m, g: b2 * m + (1 - b2) * g, state.mu, grads))

    init = lambda params: MomentumState(zeros_like(params))  # noqa: E731
    return Transformation(init, update, alike, elementwise=True)


def in_place(transformation: Transformation) -> Callable[[Tree, State, Tree], None]:
    """The donating form: update_(grads, state, params) overwrites params and state.

    The numbers are those of the pure form. Compiled, each result is written straight over the
    tensor it replaces and no second copy of the state is ever held; eager, one is during the call.
    """

    @torch.no_grad()
    def update_(grads: Tree, state: State, params: Tree) -> None:
        updates, new_state = transformation.update(grads, state, params)
        overwrite(params, apply_updates(params, updates))
        overwrite(state, new_state)

    return update_


def overwrite(target: Tree, source: Tree) -> None:
    """Copies every leaf of `source` over the same leaf of `target`."""
    tree_map(lambda old, new: old.copy_(new), target, source)


class Average(NamedTuple):
    """init(params) -> mean; update(params, mean) -> mean."""

    init: Callable[[Tree], Tree]
    update: Callable[[Tree, Tree], Tree]


def ema(decay: float) -> Average:
    """Running average of the parameters: mean <- decay mean + (1 - decay) params.

    It starts as a copy of the parameters and is kept in float32 at least. The weight of a step
    halves every ln 2 / (1 - decay) steps: 693 for decay 0.999. `overwrite(mean, update(params,
    mean))` is the donating form.
    """
    check_decay(decay=decay)

    def init(params: Tree) -> Tree:
        return tree_map(
            lambda p: p.to(torch.promote_types(p.dtype, torch.float32), copy=True), params
        )

    def update(params: Tree, mean: Tree) -> Tree:
        return tree_map(lambda m, p: m + (1 - decay) * (p - m), mean, params)

    return Average(init, update)
