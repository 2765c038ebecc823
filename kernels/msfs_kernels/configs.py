"""Tile sizes by chip, kernel, dtype, head dim and mask: a small measured table with safe defaults
for unknown chips.

`python recipes/bench_attention.py --tune` measures candidates on the machine at hand and rewrites
configs.json. Nothing is tuned at a first call.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

TABLE = Path(__file__).with_name("configs.json")
SIZES = {"tiny": 64, "short": 2048, "long": math.inf}  # name: longest of queries and keys


class Config(NamedTuple):
    """Query and key tile, warps a program, pipeline stages, whether tiles come through the copy
    engine.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False


def key(
    kernel: str, chip: str, dtype: torch.dtype, head_dim: int, causal: bool, length: int
) -> str:
    width = "32" if dtype == torch.float32 else "16"
    size = next(name for name, most in SIZES.items() if length <= most)
    return f"{chip}/{kernel}/{width}bit/{head_dim}/{'causal' if causal else 'full'}/{size}"


@functools.cache
def table() -> dict[str, Config | None]:
    if not TABLE.exists():
        return {}
    entries = json.loads(TABLE.read_text()).items()
    return {name: None if values is None else Config(*values) for name, values in entries}


@functools.cache
def chip() -> str:
    """Name of the device's generation as the table knows it, "any" without a GPU."""
    if not torch.cuda.is_available():
        return "any"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@functools.cache
def choose(kernel: str, dtype: torch.dtype, head_dim: int, causal: bool, length: int) -> Config:
    """The configuration for a launch; head_dim is the padded one (a power of two)."""
    return entry(kernel, dtype, head_dim, causal, length) or default(kernel, dtype, head_dim)


def entry(
    kernel: str, dtype: torch.dtype, head_dim: int, causal: bool, length: int
) -> Config | None:
    """The table's; tiny lengths without one of their own have that of short ones."""
    name = key(kernel, chip(), dtype, head_dim, causal, length)
    if name not in table():
        name = key(kernel, chip(), dtype, head_dim, causal, max(length, int(SIZES["tiny"]) + 1))
    return table().get(name, default(kernel, dtype, head_dim))


def fitted(config: Config, queries: int, keys: int) -> Config:
    """The configuration with tiles no larger than the problem needs: of a sentence of 20 tokens, a
    tile of 128 x 128 is almost all padding. Warps go down with the tile.
    """
    sides = [
        min(side, max(16, 1 << (n - 1).bit_length()))
        for side, n in ((config.block_m, queries), (config.block_n, keys))
    ]
    if sides == [config.block_m, config.block_n]:
        return config
    warps = min(config.warps, max(1, sides[0] * sides[1] // 512))
    return config._replace(block_m=sides[0], block_n=sides[1], warps=warps)


def is_fastest(kernel: str, dtype: torch.dtype, head_dim: int, causal: bool, length: int) -> bool:
    """Whether a kernel that does the work of two at once ("fused", "dual") is faster than they: the
    table has null where it is not.
    """
    return entry(kernel, dtype, head_dim, causal, length) is not None


def default(kernel: str, dtype: torch.dtype, head_dim: int) -> Config:
    """Fits every chip from sm_80 on: at most 96 KB of shared memory and no register spills to speak
    of.
    """
    if dtype == torch.float32:  # products unroll: a compilation takes as long as a tile is large
        if head_dim <= 64:
            return Config(32, 32, 4, 1)
        return Config(16, 16, 4, 1) if head_dim <= 128 else Config(16, 16, 8, 1)
    if kernel == "decode":
        return Config(16, 64, 4, 3 if head_dim <= 128 else 2)
    if kernel == "forward":
        return Config(64, 64 if head_dim <= 128 else 32, 4, 2)
    return Config(64 if head_dim <= 128 else 32, 64 if head_dim <= 64 else 32, 4, 2)
