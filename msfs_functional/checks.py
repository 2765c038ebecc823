"""Checks of values that several files of algorithms share: value, rule, remedy."""

import torch
from torch import Tensor


def check_mask(mask: Tensor, like: Tensor, name: str) -> None:
    """Raises ValueError unless mask is boolean and of the shape of `like`, called `name`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask is {mask.dtype}, expected bool: True for what counts")
    if mask.shape != like.shape:
        raise ValueError(
            f"the mask {tuple(mask.shape)} must have the shape of {name}, {tuple(like.shape)}"
        )


def same_shape(**tensors: Tensor) -> None:
    """Raises ValueError unless all have the shape of the first one."""
    (first, like), *others = tensors.items()
    for name, x in others:
        if x.shape != like.shape:
            raise ValueError(
                f"{name} {tuple(x.shape)} must have the shape of {first} {tuple(like.shape)}: one "
                "value an example"
            )


def positive(name: str, value: float | Tensor) -> None:
    """Raises ValueError for a number not above 0; a tensor, as in sweeps, is not looked at."""
    if not isinstance(value, Tensor) and not value > 0:
        raise ValueError(f"{name} ({value}) must be above 0")


def not_negative(name: str, value: float) -> None:
    if not value >= 0:
        raise ValueError(f"{name} ({value}) must not be negative")
