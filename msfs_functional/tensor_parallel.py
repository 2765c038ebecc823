"""Tensor parallelism: ranks hold parts of each layer's matrices and compute parts of its middle.

    x -> enter -> columns: q, k, v of a rank's own heads; a rank's own hidden units
                  rows:    o, down, which give every rank a summand -> leave -> sum

Between `enter` and `leave` no rank needs anything from another, as heads and hidden units are
independent. What is added to x is the same on all ranks. Sequence parallelism has the ranks hold
parts of x in between, by tokens, where norms and residuals then take a part of the memory and time:

    enter   pvary (backward: sum)          or all_gather of tokens (backward: reduce_scatter)
    leave   sum (backward: nothing)        or reduce_scatter of tokens (backward: all_gather)

which is the same amount of communication. These functions make a skeleton, whose parameters are
then the rank's parts, compute in this way; `sharded` gives them a copy.

Source: Shoeybi et al. 2019, section 3 (whose f is `enter` and g is `leave`); Korthikanti et al.
2022, section 4.2.2.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from msfs_functional import random
from msfs_functional.collectives import (
    all_gather,
    group_rank,
    group_size,
    join,
    psum,
    pvary,
    reduce_scatter,
    split,
)
from msfs_functional.params import Params
from msfs_functional.vocabulary_parallel import lookup

Leave = Callable[[Params, str, Tensor], Tensor]


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
    """For `models.decoder`: the matrices of its blocks, the embedding and the output matrix."""
    split_blocks(skeleton, enter_over(group), leave_over(group))
    split_vocabulary(skeleton, group)


def split_decoder_and_tokens(skeleton: nn.Module, group: str) -> None:
    """`split_decoder` with x cut by tokens between the matrices, from the first block to the norm.

    Tokens of a sequence must be a multiple of the ranks; dropout differs from that of one process.
    """
    number = group_rank(group)
    split_blocks(skeleton, gather_over(group), scatter_over(group), number)
    split_vocabulary(skeleton, group)

    def start(kind: type) -> Any:
        def run(self: nn.Module, *args: Any, **options: Any) -> Any:
            x = kind._start(self, *args, **options)
            if isinstance(x, tuple):  # terms of a sum
                return tuple(part_of_tokens(term, group) for term in x)
            return part_of_tokens(x, group)

        return run

    def final(kind: type) -> Any:
        def run(self: nn.Module, x: Any) -> Tensor:
            x = kind._final(self, x)
            return join(x, x.ndim - 2, x.shape[-2] * group_size(group), group)

        return run

    replace(skeleton, _start=start, _final=final)


def split_blocks(skeleton: nn.Module, enter: Any, leave: Any, number: int | None = None) -> None:
    """Blocks enter and leave their sublayers so; a number sets their dropout apart."""

    def around(kind: type) -> Any:
        def forward(self: nn.Module, x: Tensor, key: Any, context: Any, *rest: Any, **options: Any):
            context = context._replace(enter=enter, leave=leave)
            if number is not None and key is not None:
                key = random.fold_in(key, number)
            return kind.forward(self, x, key, context, *rest, **options)

        return forward

    for path, module in skeleton.named_modules():
        if re.search(r"^blocks\.\d+$", path):
            replace(module, forward=around)


def split_vocabulary(skeleton: Any, group: str) -> None:
    """Each rank holds its rows of the embedding and the output matrix; logits come out whole."""
    vocab = skeleton.config.vocab

    def logits(kind: type) -> Any:
        def run(self: nn.Module, states: Tensor) -> Tensor:
            part = kind.logits(self, pvary(states, group))
            return join(part, part.ndim - 1, vocab, group)

        return run

    replace(skeleton, logits=logits)
    replace(
        skeleton.embedding,
        forward=lambda kind: lambda self, ids: lookup(ids, self.weight, vocab, group),
    )


def part_of_tokens(x: Tensor, group: str) -> Tensor:
    if x.shape[-2] % group_size(group):
        raise ValueError(
            f"tp ({group_size(group)}) must divide the tokens of a sequence ({x.shape[-2]}) where "
            f"it cuts them: pad it, or use a layout that does not cut tokens"
        )
    return split(x, x.ndim - 2, group)


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
def leave_over(group: str) -> Leave:
    return lambda params, name, x: biased(params, name, psum(partial(params, name, x), group))


@functools.cache
def gather_over(group: str) -> Callable[[Tensor], Tensor]:
    return lambda x: all_gather(x, x.ndim - 2, x.shape[-2] * group_size(group), group)


@functools.cache
def scatter_over(group: str) -> Leave:
    def leave(params: Params, name: str, x: Tensor) -> Tensor:
        return biased(params, name, reduce_scatter(partial(params, name, x), x.ndim - 2, group))

    return leave


def partial(params: Params, name: str, x: Tensor) -> Tensor:
    """This rank's summand of a matrix product whose inputs are cut."""
    return F.linear(x, params[f"{name}.weight"])


def biased(params: Params, name: str, x: Tensor) -> Tensor:
    bias = params.get(f"{name}.bias")
    return x if bias is None else x + bias
