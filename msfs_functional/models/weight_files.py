"""Weights in files: read as data alone, and given the names that a model here has for them."""

import json
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from msfs_functional.params import Params

# Classes that Lightning's checkpoints of 2022 name in a dict beside the weights, and nothing more.
LIGHTNING = tuple(
    f"{package}.callbacks.model_checkpoint.ModelCheckpoint"
    for package in ("pytorch_lightning", "lightning.pytorch")
)
# What torch's reader of a damaged file runs into, beside its own error.
DAMAGED = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, LookupError, AssertionError),
    *(TypeError, ValueError, AttributeError, OverflowError, struct.error),
)


class Named:
    """Stands for a class that a file names; it does nothing."""


def translate(name: str, words: Mapping[str, str]) -> str:
    """A dotted name with each of its words, or runs of words, replaced; longer ones first."""
    choices = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    return re.sub(rf"(?<![^.])(?:{choices})(?![^.])", lambda match: words[match[0]], name)


def take(
    shapes: Mapping[str, torch.Size],
    weights: Mapping[str, Tensor],
    their_name: Callable[[str], str],
    *,
    kind: str,
) -> Params:
    """Parameters of these shapes out of weights by their names, all of them used.

    A matrix fits a 1 x 1 convolution and the other way round: files of different age differ in it.

    Raises:
        ValueError: weights that are missing, extra or misshapen.
    """
    params: Params = {}
    missing: list[str] = []
    used: set[str] = set()
    for name, shape in shapes.items():
        theirs = their_name(name)
        if theirs not in weights:
            missing.append(theirs)
            continue
        used.add(theirs)
        value = weights[theirs]
        if [n for n in value.shape if n > 1] == [n for n in shape if n > 1]:
            value = value.reshape(shape)
        if value.shape != shape:
            raise ValueError(
                f"{theirs} has shape {tuple(value.shape)}, the configuration of this {kind} says "
                f"{tuple(shape)}: the two files do not belong together"
            )
        params[name] = value.contiguous()
    extra = [name for name in weights if name not in used]
    if missing or extra:
        raise ValueError(
            f"weights do not fit the configuration of this {kind}: missing {missing[:4]}, "
            f"unexpected {extra[:4]} ({len(missing)} and {len(extra)} in all)"
        )
    return params


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file.

    Raises:
        ValueError: it is missing, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}: is it a model's folder?") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file read with weights_only=True.

    A training checkpoint's "state_dict" is taken out of what lies beside it.

    Raises:
        ValueError: no such file, a broken one, or one that holds anything but data.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no file {path}: check the name, or fetch it")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}): fetch it again") from None
    try:
        with torch.serialization.safe_globals([(Named, name) for name in LIGHTNING]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        # Torch tells first how to unpickle all the same; what it found comes after that.
        text = str(error).partition("WeightsUnpickler error:")[2].strip() or str(error)
        text = text.partition(" was not an allowed")[0] or type(error).__name__
        raise ValueError(
            f"{path} cannot be read as tensors alone ({text.splitlines()[0]}): nothing else is "
            f"unpickled; take its safetensors version"
        ) from None
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name: it must be a state dict")
    return tensors
