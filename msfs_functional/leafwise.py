"""A compiled update of all parameters that compiles the update of one.

An optimizer's update, traced over a whole tree, is a graph of some twenty operations for each of
hundreds of parameters, which takes longer to compile than the model. Where parameters are updated
each alone (`Transformation.kinds`), this module compiles the update of one parameter for each kind
and shape, and runs it parameter by parameter, in place. Where even elements are updated each alone,
parameters are seen as rows of 16 numbers, and one graph serves all shapes. Parameters that lie side
by side in memory, as those of an ensemble do, are then updated in one launch. Of others the small
ones, most of a model's, are copied together, updated in one launch and copied back: a launch of
each would take longer than the copies.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from msfs_functional.compiling import fresh
from msfs_functional.params import Params
from msfs_functional.side_by_side import flat, joined, memory_order
from msfs_functional.transforms import NAMESPACE
from msfs_functional.updates import Kinds

ROW = 16  # elements: what vectorised memory access wants sizes to be divisible by
SMALL = 2**16  # elements: below, a launch takes longer than a copy
FEW = 1 / 64  # of all elements: a kind with fewer is not worth a graph where starting soon counts
Trained = tuple[Params, Any, Params | None]  # params, opt_state, moving average
UpdateFn = Callable[[Trained, Params, Tensor | None, Tensor], Trained]


class Place(NamedTuple):
    """Some parameters among the leaves of (params, opt_state, ema)."""

    own: tuple[int, ...]  # leaves that belong to them; the first is a parameter
    common: tuple[int, ...]  # leaves that all parameters share, as counts
    tree: Any  # the tree in which they are the only parameters: places among own + common


class Leaf(NamedTuple):
    index: int
    own: bool


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def place(indices: Any, kept: Sequence[str], names: Params) -> Place:
    """Where `kept` stand in `indices`, the trained tree with each leaf's number in its place."""
    tree = only(indices, kept, names)
    found: list[Leaf] = optree.tree_leaves(tree, is_leaf=is_leaf, namespace=NAMESPACE)  # pyright: ignore
    own = tuple(leaf.index for leaf in found if leaf.own)
    common = tuple(leaf.index for leaf in found if not leaf.own)
    at = {index: i for i, index in enumerate(own + common)}
    tree = optree.tree_map(lambda x: at[x.index], tree, is_leaf=is_leaf, namespace=NAMESPACE)
    return Place(own, common, tree)


def only(tree: Any, kept: Sequence[str], names: Params, own: bool = False) -> Any:
    """`tree` of Leafs, in which every dict keyed by parameters' names has those of `kept` only."""
    if isinstance(tree, dict):
        if tree.keys() <= names.keys():
            own, tree = True, {name: tree[name] for name in kept if name in tree}
        return {key: only(value, kept, names, own) for key, value in tree.items()}
    if isinstance(tree, tuple):
        children = [only(child, kept, names, own) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else tuple(children)
    if isinstance(tree, list):
        return [only(child, kept, names, own) for child in tree]
    return None if tree is None else Leaf(tree, own)


def memory_plan(params: Params, kinds: Kinds | None, lead: int) -> list[str]:
    """Names in the order in which an ensemble's tensors lie: those of one kind together, and those
    whose size ROW does not divide at the end."""
    kind_of = kinds(params) if kinds else dict.fromkeys(params)
    numbers = {kind: i for i, kind in enumerate(dict.fromkeys(kind_of.values()))}
    uneven = {name: x.shape[lead:].numel() % ROW != 0 for name, x in params.items()}
    return sorted(params, key=lambda name: (uneven[name], numbers[kind_of[name]]))


def compiled(update: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fresh(update), fullgraph=True, dynamic=False)


@contextmanager
def beside() -> Iterator[Callable[[], AbstractContextManager[Any]]]:
    """Work that a CUDA graph runs beside the rest of what is recorded inside of this:

        with beside() as aside:
            with aside():
                ...  # on another stream, after all that was recorded before
            ...      # at the same time

    What is not being recorded goes in turn: launched one by one, it would gain nothing.
    """
    if not torch.cuda.is_available() or not torch.cuda.is_current_stream_capturing():
        yield nullcontext
        return
    main, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(main)
    yield lambda: torch.cuda.stream(other)
    main.wait_stream(other)


class Leafwise:
    """trained = update(trained, grads, scale, finite), compiled for one parameter at a time.

    Args:
        update_fn: the same for trees of any parameters.
        kinds, elementwise: the optimizer's.
        lead: leading dims that count members of an ensemble: 0 or 1.
        donate: write results into the tensors that they replace.
        thrifty: start sooner: what all parameters share, and kinds with FEW elements (gains and
            biases, where matrices decay), run operation by operation. A graph takes more than a
            second to compile, and saves some 20 launches; donated, those of FEW run `beside` the
            others in a CUDA graph.
    """

    def __init__(
        self,
        update_fn: UpdateFn,
        kinds: Kinds,
        *,
        elementwise: bool,
        lead: int,
        donate: bool,
        thrifty: bool = False,
    ):
        self.update_fn, self.kinds, self.elementwise = update_fn, kinds, elementwise
        self.lead, self.donate, self.thrifty = lead, donate, thrifty
        self.few: set[Hashable] = set()  # kinds that get no graph
        self.places: dict[str, Place] = {}
        self.kind_of: dict[str, Hashable] = {}
        self.graphs: dict[Hashable, Callable[..., Any]] = {}
        self.one_of_each: list[str] = []
        self.groups: list[list[str]] = []  # parameters that are updated by one call
        self.shared = Place((), (), None)
        self.update_shared: Callable[..., Any] = lambda *args: []

    def _prepare(self, trained: Trained, spec: Any, leaves: list[Any], grads: Params) -> None:
        indices = optree.tree_unflatten(spec, range(len(leaves)))
        params = trained[0]
        self.places = {name: place(indices, [name], params) for name in params}
        self.kind_of = self.kinds(params)
        self.one_of_each = list({kind: name for name, kind in self.kind_of.items()}.values())
        sizes: Counter[Hashable] = Counter()
        for name, param in params.items():
            sizes[self.kind_of[name]] += param.numel()
        if self.thrifty:
            self.few = {kind for kind, n in sizes.items() if n < FEW * sizes.total()}
        self.groups = self._grouped(leaves, grads)
        self.shared = place(indices, self.one_of_each, params)
        if self.shared.common:
            update = self._of(self.shared, self.one_of_each, shared=True)
            self.update_shared = update if self.thrifty else compiled(update)

    def _grouped(self, leaves: list[Any], grads: Params) -> list[list[str]]:
        """Parameters of one kind together if they lie side by side or are small, others alone."""
        alike: dict[Hashable, list[str]] = {}
        for name, grad in grads.items():
            own = [leaves[i] for i in self.places[name].own]
            fits = self._fits_rows(own)
            key = self.kind_of[name], tuple(x.dtype for x in own), grad.dtype if fits else name
            alike.setdefault(key, []).append(name)
        groups: list[list[str]] = []
        for names in alike.values():
            params = [leaves[self.places[name].own[0]] for name in names]
            order = memory_order(params, self.lead)
            if order is not None:
                groups.append([names[i] for i in order])
                continue
            small = [n for n, x in zip(names, params, strict=True) if x.numel() <= SMALL]
            groups += [small] if small else []
            groups += [[name] for name in names if name not in small]
        return groups

    def __call__(
        self, trained: Trained, grads: Params, scale: Tensor | None, finite: Tensor
    ) -> Trained:
        leaves, spec, *_ = optree.tree_flatten(trained, namespace=NAMESPACE)  # pyright: ignore
        leaves: list[Any]
        if not self.places:
            self._prepare(trained, spec, leaves, grads)
        results = list(leaves)
        # What all share is read by every parameter's update: it is computed first, written last.
        own, common = ([leaves[i] for i in where] for where in self.shared[:2])
        some = [grads[name] for name in self.one_of_each]
        common = self.update_shared(own, common, some, scale, finite)
        with beside() as aside:
            for names in self.groups:
                few = self.donate and self.kind_of[names[0]] in self.few
                with aside() if few else nullcontext():
                    after = self._update(names, leaves, grads, scale, finite)
                if not self.donate:
                    where = [self.places[name].own for name in names]
                    for i, value in zip(itertools.chain(*where), after, strict=True):
                        results[i] = value.view(leaves[i].shape)
        for i, value in zip(self.shared.common, common, strict=True):
            results[i] = leaves[i].copy_(value) if self.donate else value
        after_all: Any = optree.tree_unflatten(spec, results)
        return after_all

    def _update(
        self,
        names: list[str],
        leaves: list[Tensor],
        grads: Params,
        scale: Tensor | None,
        finite: Tensor,
    ) -> list[Tensor]:
        """What belongs to each of `names` after the update, by one compiled call."""
        places = [self.places[name] for name in names]
        common = [leaves[i] for i in places[0].common]
        own = [[leaves[i] for i in at.own] for at in places]
        if len(names) == 1:
            return self._call(names[0], own[0], common, grads[names[0]], scale, finite)
        columns = [list(column) for column in zip(*own, strict=True)]
        found = [joined(column, self.lead) for column in columns]
        beside = [x for x in found if x is not None]
        lie_beside = len(beside) == len(columns)
        joint = beside if lie_beside else [self._copied(column) for column in columns]
        some = [grads[name] for name in names]
        grad = joined(some, self.lead)
        grad = self._copied(some) if grad is None else grad
        after = self._call(names[0], joint, common, grad, scale, finite)
        if self.donate and lie_beside:
            return []
        if self.donate:
            after = joint
        sizes = [x.shape[self.lead :].numel() for x in columns[0]]
        parts = [x.view(joint[0].shape).split(sizes, -1) for x in after]
        if self.donate:
            flat_columns = [[x.flatten(self.lead) for x in column] for column in columns]
            torch._foreach_copy_(
                list(itertools.chain(*flat_columns)), list(itertools.chain(*parts))
            )
        return list(itertools.chain(*zip(*parts, strict=True)))

    def _copied(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.flatten(self.lead) for x in tensors], -1)

    def _call(
        self,
        name: str,
        own: list[Tensor],
        common: list[Tensor],
        grad: Tensor,
        scale: Tensor | None,
        finite: Tensor,
    ) -> list[Tensor]:
        in_rows = self._fits_rows(own)
        if in_rows:
            view = (*grad.shape[: self.lead], -1, ROW)
            own, grad = [x.view(view) for x in own], grad.reshape(view)
        # A compiled function guards on the base of a view; detached, none of them is one.
        own, grad = [x.detach() for x in own], grad.detach()
        shapes = "rows" if in_rows else tuple(x.shape for x in own)
        key = (self.kind_of[name], shapes, tuple(x.dtype for x in own), grad.dtype)
        graph = self.graphs.get(key)
        if graph is None:
            update, plain = self._of(self.places[name], [name]), self.kind_of[name] in self.few
            graph = self.graphs[key] = update if plain else compiled(update)
            if in_rows and not plain:
                for x in (*own, grad):
                    torch._dynamo.maybe_mark_dynamic(x, self.lead)
        return graph(own, common, [grad], scale, finite)

    def _fits_rows(self, own: list[Tensor]) -> bool:
        """Whether all tensors of a parameter can be seen as (..., elements / 16, 16)."""
        shape = own[0].shape
        size = shape[self.lead :].numel()
        return (
            self.elementwise
            and size % ROW == 0
            and size > ROW
            and all(type(x) is Tensor and x.shape == shape and flat(x, self.lead) for x in own)
        )

    def _of(self, at: Place, names: list[str], shared: bool = False) -> Callable[..., Any]:
        """The update of what stands at one place."""
        update_fn, donate = self.update_fn, self.donate

        def update(
            own: list[Tensor],
            common: list[Tensor],
            grads: list[Tensor],
            scale: Tensor | None,
            finite: Tensor,
        ) -> list[Tensor] | None:
            given = own + common
            trained: Any = optree.tree_map(lambda i: given[i], at.tree, namespace=NAMESPACE)
            after: Any = update_fn(trained, dict(zip(names, grads, strict=True)), scale, finite)
            new: list[Any] = [None] * len(given)
            optree.tree_map(
                lambda i, x: new.__setitem__(i, x),
                at.tree,
                after,
                namespace=NAMESPACE,
            )
            if shared:
                return new[len(own) :]
            if not donate:
                return new[: len(own)]
            for old, x in zip(own, new, strict=False):
                old.copy_(x)
            return None

        return update
