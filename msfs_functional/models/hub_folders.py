"""Local Hugging Face folders as they lie on the disk, whatever model is in them.

    config.json + model.safetensors (or shards and their index) (+ tokenizer.json)

What a configuration means and how weights are named is for `pretrained` and `families` to know.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from msfs_functional.models.weight_files import read_json
from msfs_functional.params import Params

C = TypeVar("C")
Hub = Mapping[str, Any]  # a config.json


class Published(NamedTuple, Generic[C]):
    """A folder's contents."""

    config: C  # DecoderConfig; ViTConfig, TextConfig, CLIPConfig; VLMConfig
    params: Params
    hub: dict[str, Any]  # config.json as it is: bos_token_id, eos_token_id, ...
    tokenizer: str | None  # tokenizer.json as text, for tokenizers.Tokenizer.from_str


def read_folder(
    folder: str | Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """config.json, the weights by name, and tokenizer.json's text (if any) of a local folder.

    Raises:
        ValueError: a missing or broken file.
    """
    folder = Path(folder)
    hub = read_json(folder / "config.json")
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.exists():
            raise ValueError(f"no {name} in {folder}: the download is not complete")
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is no safetensors file ({error}): fetch it again") from None
    path = folder / "tokenizer.json"
    return hub, weights, path.read_text(encoding="utf-8") if path.exists() else None


def write_folder(
    folder: str | Path, hub: Hub, weights: dict[str, Tensor], tokenizer: str | None = None
) -> None:
    """Writes what `read_folder` and transformers' from_pretrained read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub, indent=2) + "\n", encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
        settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
        (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")


def load_folder(
    folder: str | Path,
    from_hub: Callable[[Hub, dict[str, Tensor]], tuple[C, Params]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Published[C]:
    """A folder as configuration and parameters: what `from_hub` makes of config.json and weights.

    Args:
        dtype: of the parameters; default: as stored.

    Raises:
        ValueError: a missing or broken file, and what from_hub raises.
    """
    hub, weights, tokenizer = read_folder(folder, device)
    config, params = from_hub(hub, weights)
    if dtype is not None:
        params = {name: value.to(dtype) for name, value in params.items()}
    return Published(config, params, hub, tokenizer)


def check_shapes(params: Params, expected: Mapping[str, torch.Size]) -> None:
    """Raises a ValueError unless these are parameters of these shapes."""
    if wrong := sorted(params.keys() ^ expected.keys()):
        raise ValueError(f"params are not of this configuration: one of both lacks {wrong[:4]}")
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise ValueError(
                f"params are not of this configuration: {name!r} has shape "
                f"{tuple(params[name].shape)}, the configuration says {tuple(shape)}"
            )
