"""Low-rank adaptation (Hu et al. 2021) as a transformation of parameters, for any model.

    W' = W + (alpha / rank) B A,    A (rank, in) random, B (out, rank) zeros at first

The adapters are parameters of their own; the model's are an argument like a batch: no gradient and
no optimizer state of theirs ever exists.

    adapters, adapt = lora(params, [(r"attention\\.[qv]\\.weight$", True), ("", False)], rank=8)
    loss_fn = lambda adapters, batch: loss(adapt(params, adapters), batch)
    merged, originals = merge(adapt, params, adapters)      # as fast as before, until
    params = unmerge(merged, originals)                      # the very same bits
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from msfs_functional import random
from msfs_functional.params import Params, Rules, by_rules, parameter_key

AdaptFn = Callable[[Params, Params], Params]  # (params, adapters) -> params of the same model


class Lora(NamedTuple):
    """What `lora` makes."""

    adapters: Params  # {"blocks.0.attention.q.weight.a": (rank, in), "... .b": (out, rank), ...}
    adapt: AdaptFn


def lora(
    params: Params,
    rules: Rules[bool],
    rank: int,
    *,
    alpha: float | None = None,
    seed: int | Int64[Tensor, "2"] = 0,
    dtype: torch.dtype = torch.float32,
) -> Lora:
    """Adapters for the parameters that the rules choose, and the function that adds them.

    At first nothing changes: B is zero.

    Args:
        rules: True for what is adapted, tensors of two dims or more (a convolution's counts as
            (out, rest)).
        rank: of B A, at most the smaller side of every chosen matrix.
        alpha: the product is scaled by alpha / rank; default: rank.
        seed: an integer or a key; A ~ N(0, 1 / in), drawn by the parameter's name.
        dtype: of the adapters, whatever that of the parameters.

    Raises:
        ValueError: a rank out of range, a vector chosen, nothing chosen, a rule that matches no
            name.
    """
    key = random.key(seed) if isinstance(seed, int) else seed
    adapters: Params = {}
    for name, chosen in by_rules(rules, params).items():
        if not chosen:
            continue
        value = params[name]
        if value.ndim < 2:
            raise ValueError(
                f"{name!r} has shape {tuple(value.shape)}: only matrices have a rank; let the "
                "rules choose weights, or train this one as it is"
            )
        rows, columns = value.shape[0], value[0].numel()
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(
                f"rank ({rank}) must be at least 1 and at most {min(rows, columns)}, the smaller "
                f"side of {name!r} ({rows}, {columns})"
            )
        own = parameter_key(key, name).to(value.device)
        adapters[f"{name}.a"] = (random.normal(own, (rank, columns)) * columns**-0.5).to(dtype)
        adapters[f"{name}.b"] = value.new_zeros((rows, rank), dtype=dtype)
    if not adapters:
        raise ValueError("the rules choose no parameter: give one of them True")
    return Lora(adapters, functools.partial(add, scale=(alpha or rank) / rank))


def add(params: Params, adapters: Params, *, scale: float) -> Params:
    """`params` with W + scale * B A in the place of every adapted W; differentiable in both.

    Raises:
        ValueError: adapters of a parameter that is not there, or of another shape.
    """
    adapted = dict(params)
    for name in {name.rpartition(".")[0]: None for name in adapters}:
        a, b = (adapters.get(f"{name}.{part}") for part in "ab")
        fits = name in params and a is not None and b is not None
        if a is None or b is None or not fits or (b.shape[0], a.shape[1]) != _sides(params[name]):
            raise ValueError(
                f"adapters of {name!r} do not fit the parameters; pass what lora() made for them"
            )
        value = params[name]
        product = (b @ a) if scale == 1 else scale * (b @ a)
        wide = torch.promote_types(value.dtype, product.dtype)
        adapted[name] = (value.to(wide) + product.to(wide).reshape(value.shape)).to(value.dtype)
    return adapted


def _sides(value: Tensor) -> tuple[int, int]:
    return value.shape[0], value[0].numel()


def merge(adapt: AdaptFn, params: Params, adapters: Params) -> tuple[Params, Params]:
    """(adapted parameters, the originals of those that changed): a model of the first's plain form.

    Sums of floating-point numbers cannot be undone, so the originals are kept, by reference.
    """
    with torch.no_grad():
        merged = adapt(params, adapters)
    return merged, {name: params[name] for name in params if merged[name] is not params[name]}


def unmerge(merged: Params, originals: Params) -> Params:
    """The parameters before `merge`, bit for bit.

    Raises:
        ValueError: originals of another model.
    """
    strange = [name for name in originals if name not in merged]
    if strange:
        raise ValueError(f"originals {strange[:4]} are not among the merged parameters")
    return {**merged, **originals}
