"""The op's CPU backend."""

from torch import Tensor

from . import tiled
from .checks import check_lengths
from .options import Options
from .tiled import backward, tangent

__all__ = ["backward", "forward", "tangent"]


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    check_lengths("key_lengths", options.key_lengths, k.shape[2])
    check_lengths("prefix_lengths", options.prefix_lengths, k.shape[2])
    return tiled.forward(q, k, v, options)
