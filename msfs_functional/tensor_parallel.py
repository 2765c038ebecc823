"""Tensor parallelism: ranks hold parts of each layer's matrices and compute parts of its middle.

    x -> enter -> columns: q, k, v of a rank's own heads; a rank's own hidden units
                  rows:    o, down, which give every rank a summand -> leave -> sum

Between `enter` and `leave` no rank needs anything from another, as heads and hidden units are
independent. What is added to x is the same on all ranks. These functions make a skeleton, whose
parameters are then the rank's parts, compute in this way; `sharded` gives them a copy.

Source: Shoeybi et al. 2019, section 3 (whose f is `enter`, a pvary, and g is `leave`, a psum).
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from msfs_functional.collectives import psum, pvary
from msfs_functional.params import Params


def split_transformer(skeleton: nn.Module, group: str) -> None:
    """For `models.transformer`: attention and feed-forward modules."""
    for path, module in skeleton.named_modules():
        if re.search(r"attention\.o$|feed_forward\.down$", path):
            replace(module, forward=lambda kind: rows(group))
        elif re.search(r"attention$", path):
            replace(module, forward=lambda kind: entering(kind.forward, group))
            replace(module, keys_values=lambda kind: entering(kind.keys_values, group))
        elif re.search(r"feed_forward$", path):
            replace(module, forward=lambda kind: entering(kind.forward, group))


def split_decoder(skeleton: nn.Module, group: str) -> None:
    """For `models.decoder`: the matrices of its blocks."""

    enter, leave = enter_over(group), leave_over(group)

    def around(kind: type) -> Any:
        def forward(self: nn.Module, x: Tensor, key: Any, context: Any, *rest: Any, **options: Any):
            context = context._replace(enter=enter, leave=leave)
            return kind.forward(self, x, key, context, *rest, **options)

        return forward

    for path, module in skeleton.named_modules():
        if re.search(r"^blocks\.\d+$", path):
            replace(module, forward=around)


def replace(module: nn.Module, **methods: Any) -> None:
    """Gives this one module other methods, each made from its class."""
    kind = type(module)
    own = {name: make(kind) for name, make in methods.items()}
    module.__class__ = type(kind.__name__, (kind,), own)


def entering(method: Any, group: str) -> Any:
    return lambda self, x, *args, **options: method(self, pvary(x, group), *args, **options)


def rows(group: str) -> Any:
    """The forward of a linear layer whose inputs are cut: a sum over ranks, then the bias."""

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        y = psum(F.linear(x, self.weight), group)
        return y if self.bias is None else y + self.bias

    return forward


@functools.cache
def enter_over(group: str) -> Callable[[Tensor], Tensor]:
    """One function for all blocks, so that what is compiled for one serves all."""
    return lambda x: pvary(x, group)


@functools.cache
def leave_over(group: str) -> Callable[[Params, str, Tensor], Tensor]:
    def leave(params: Params, name: str, x: Tensor) -> Tensor:
        y, bias = psum(F.linear(x, params[f"{name}.weight"]), group), params.get(f"{name}.bias")
        return y if bias is None else y + bias

    return leave
