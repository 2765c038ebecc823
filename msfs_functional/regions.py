"""Regions: parts of a model that a training step compiles each on its own, once for all its calls.

Traced whole, a model of 24 equal blocks is compiled 24 times over. A `region` is a pure function
that a step made with compile="regions" compiles when it is first called and reuses for every later
call, while what lies between regions runs eagerly:

    block = Block(lambda: Layer(config))            # in the model's constructor
    x = block(layer, x, lengths)                    # in forward: layer(x, lengths), compiled once

    keys = region(random.split)(key, n)

Outside of such a step, inside torch.compile and under torch.func transforms other than the one vmap
over an ensemble's members a region is the plain function. (torch.compiler.nested_compile_region has
the same aim inside one graph; on torch 2.13 gradients through it came out wrong without an error,
so it is not used.)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import optree
import torch
import torch._functorch.config as functorch_config
from msfs_kernels.dispatch import is_sharded
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import functional_call

from msfs_functional.compiling import compile_per_shape
from msfs_functional.transforms import NAMESPACE

F = TypeVar("F", bound=Callable[..., Any])
_active: ContextVar["Regions | None"] = ContextVar("regions", default=None)


class Regions:
    """The graphs of one training step's regions; `with regions.compiled():` uses them."""

    def __init__(self, dynamic: bool | None):
        self.dynamic = dynamic
        self.graphs: dict[Any, Callable[..., Any]] = {}

    @contextmanager
    def compiled(self) -> Iterator[None]:
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def call(self, fn: Callable[..., Any], params: Any, args: tuple, kwargs: dict) -> Any:
        call = (args, kwargs)
        stack = torch._C._functorch.get_interpreter_stack()  # pyright: ignore
        if not stack:
            return self.graph(fn, call, None)(params, call)
        # Members of an ensemble: the region is compiled mapped over them and called outside of the
        # vmap that is going on.
        level = stack[0].level()
        (params, call), dims = unwrapped((params, call), level)
        with temporarily_clear_interpreter_stack():
            out = self.graph(fn, call, dims)(params, call)
        return optree.tree_map(
            lambda x: torch._C._functorch._add_batch_dim(x, 0, level),  # pyright: ignore
            out,
            namespace=NAMESPACE,
        )

    def graph(self, fn: Callable[..., Any], call: Any, dims: Any) -> Callable[..., Any]:
        leaves, spec, *_ = optree.tree_flatten((call, dims), namespace=NAMESPACE)  # pyright: ignore
        key = fn, spec, tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        if key not in self.graphs:

            def run(params: Any, call: tuple[tuple, dict]) -> Any:
                return fn(params, *call[0], **call[1])

            one = run if dims is None else mapped(run, dims)
            self.graphs[key] = compile_per_shape(lambda *args: one(*args), self.dynamic)
        return self.graphs[key]


def mapped(fn: Callable[..., Any], dims: Any) -> Callable[..., Any]:
    """vmap(fn, in_dims=dims) of a function whose result may hold None, which torch's refuses."""

    def run(*args: Any) -> Any:
        spec: Any = None

        def tensors(*args: Any) -> tuple[Tensor, ...]:
            nonlocal spec
            leaves, spec, *_ = optree.tree_flatten(fn(*args), namespace=NAMESPACE)
            return tuple(leaves)

        leaves = torch.func.vmap(tensors, in_dims=dims)(*args)
        return optree.tree_unflatten(spec, leaves)

    return run


def unwrapped(tree: Any, level: int) -> tuple[Any, Any]:
    """The tensors that vmap at `level` maps, whole, and which dim of each it maps (None: none)."""
    leaves, spec, *_ = optree.tree_flatten(tree, namespace=NAMESPACE)  # pyright: ignore
    dims: list[Any] = [None] * len(leaves)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i], dims[i] = torch._C._functorch._unwrap_batched(leaf, level)  # pyright: ignore
    return optree.tree_unflatten(spec, leaves), optree.tree_unflatten(spec, dims)


def active() -> Regions | None:
    """The regions to use for a call made now, if any."""
    if torch.compiler.is_compiling() or _active.get() is None:
        return None
    stack = torch._C._functorch.get_interpreter_stack() or []  # pyright: ignore
    members = len(stack) == 1 and stack[0].key() == torch._C._functorch.TransformType.Vmap  # pyright: ignore
    return _active.get() if members or not stack else None


def region(fn: F) -> F:
    """fn, compiled on its own inside a step made with compile="regions".

    Args:
        fn: a pure function of its arguments, pytrees of tensors and of hashable constants.
    """

    def with_params(params: None, *args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        regions = active()
        if regions is None:
            return fn(*args, **kwargs)
        return regions.call(with_params, None, args, kwargs)

    return run  # pyright: ignore[reportReturnType]


def bound(fn: F) -> F:
    """fn, whose regions are those that are active now, also when it is called later.

    A recomputation in the backward pass runs in a thread of its own on a GPU: without this it would
    find no active regions, run plain code and save other tensors than the forward pass did.
    """
    regions = active()
    if regions is None:
        return fn

    def run(*args: Any, **kwargs: Any) -> Any:
        with regions.compiled():
            return fn(*args, **kwargs)

    return run  # pyright: ignore[reportReturnType]


def region_of(fn: Callable[..., Any], *, thrifty: bool = False) -> Callable[..., Any]:
    """A pure function of (params, ...) as a region, compiled once for all params of a shape.

    Args:
        thrifty: what one pass over memory makes (a norm, a product of two tensors) is made again in
            the backward, also where a matrix product then has to wait for it. Left to itself
            torch's partitioner keeps it: of a UNet's transformer a quarter of all that is kept.
    """

    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        regions = active()
        if regions is None:
            return fn(params, *args, **kwargs)
        with functorch_config.patch(ban_recompute_materialized_backward=not thrifty):
            return regions.call(fn, params, args, kwargs)

    return run


class Block:
    """A layer that a model holds many times over, as one region: block(layer, x) is layer(x).

    Args:
        build: makes a layer just like those that will be given; it only lends its code.
    """

    def __init__(self, build: Callable[[], nn.Module]):
        with torch.device("meta"):
            template = build()

        def run(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return functional_call(template, params, args, kwargs, strict=True)

        self.run = region_of(run)

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        params = dict(layer.named_parameters())
        if active() is None or any(map(is_sharded, params.values())):  # gathers them by itself
            return layer(*args, **kwargs)
        return self.run(params, *args, **kwargs)
