"""Regions: parts of a model that a training step compiles each on its own, once for all its calls.

Traced whole, a model of 24 equal blocks is compiled 24 times over. A `region` is a pure function
that a step made with compile="regions" compiles when it is first called and reuses for every later
call, while what lies between regions runs eagerly:

    block = Block(lambda: Layer(config))            # in the model's constructor
    x = block(layer, x, lengths)                    # in forward: layer(x, lengths), compiled once

    keys = region(random.split)(key, n)

Outside of such a step, under a torch.func transform and inside torch.compile a region is the plain
function. (torch.compiler.nested_compile_region promises the same inside one graph; on torch 2.13
gradients through it came out wrong without an error, so it is not used.)
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import optree
import torch
from torch import Tensor, nn
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
        leaves, spec, *_ = optree.tree_flatten((args, kwargs), namespace=NAMESPACE)  # pyright: ignore
        constants = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        graph = self.graphs.get((fn, spec, constants))
        if graph is None:

            def run(params: Any, call: tuple[tuple, dict]) -> Any:
                return fn(params, *call[0], **call[1])

            graph = self.graphs[fn, spec, constants] = compile_per_shape(run, self.dynamic)
        return graph(params, (args, kwargs))


def active() -> Regions | None:
    """The regions to use for a call made now, if any."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    return _active.get()


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

        self.run = run

    def __call__(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        regions = active()
        if regions is None:
            return layer(*args, **kwargs)
        return regions.call(self.run, dict(layer.named_parameters()), args, kwargs)
