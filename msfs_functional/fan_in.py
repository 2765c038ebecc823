"""Matrices of narrow models begin as large as their width asks.

N(0, 0.02^2), which the models begin with, is GPT-2's choice for a width of 768, where 1 / sqrt(768)
is 0.036. At a width of 64 that would be 0.125: six times as much. Begun at 0.02 a vision-language
model of that width spends most of a short training on growing its matrices.
"""

import dataclasses
import math
import re

from msfs_functional.params import Functional, Initializer, variance_scaling

# (the stack of blocks, its block, the matrix)
BLOCK = re.compile(r"^(.*\b|)blocks\.(\d+)\.(?:attention|feed_forward)\.(\w+)\.weight$")
PROJECTOR = re.compile(r"^projector\.\w+\.weight$")
RESIDUAL = ("o", "down")  # write into the residual stream


def by_fan_in(model: Functional, gain: float) -> Functional:
    """The same model; matrices of blocks and projector begin as N(0, gain^2 / fan_in).

    Those that write into the residual stream begin at 1 / sqrt(2 depth) of that (Radford et al.
    2019, section 2.3), depth being the blocks of their stack. Embeddings, norms, biases, stems and
    whatever lies outside of blocks keep their initialisers.

    Args:
        gain: 1 keeps the variance of normalised inputs (LeCun et al. 1998); less begins nearer to
            the identity.

    Raises:
        ValueError: a gain that is not above 0.
    """
    if not gain > 0:
        raise ValueError(f"gain ({gain}) must be above 0: 1 keeps the variance of the inputs")
    matrices = [name for name, shape in model.shapes.items() if len(shape) > 1]
    found = {name: BLOCK.match(name) for name in matrices}
    depths: dict[str, int] = {}
    for match in filter(None, found.values()):
        stack, block = match[1], int(match[2])
        depths[stack] = max(depths.get(stack, 0), block + 1)

    def begun(factor: float) -> Initializer:
        return variance_scaling((gain * factor) ** 2, "in", "normal")

    changed = {name: begun(1.0) for name in matrices if PROJECTOR.match(name)}
    for name, match in found.items():
        if match:
            residual = match[3] in RESIDUAL
            changed[name] = begun(1 / math.sqrt(2 * depths[match[1]]) if residual else 1.0)
    return dataclasses.replace(model, initializers={**model.initializers, **changed})
