"""Published vision-language models answer questions about images: a local Hugging Face folder.

    config.json + model.safetensors + tokenizer.json (+ preprocessor_config.json)

    LLaVA        USER: <image>\\nquestion ASSISTANT:       images as CLIP prepares them
    PaliGemma    <image><bos>question\\n                   images as SigLIP does

Each image has one placeholder in a text; its id is repeated once for each of the image's tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from msfs_functional import images as files
from msfs_functional.generation import GREEDY, Generator, Settings
from msfs_functional.models import vlm_format
from msfs_functional.models.vlm import language_model, prefill_inputs, vlm, with_image_tokens

PLACEHOLDER = "<image>"


class PublishedVLM:
    """LLaVA or PaliGemma from a folder.

    Args:
        folder: of the model.
        device, dtype: of the parameters.
        longest: answer, in tokens.

    Raises:
        ValueError: a folder without a tokenizer, of another kind of model, or broken.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        longest: int = 128,
    ):
        found = vlm_format.load(folder, dtype=dtype, device=device)
        if found.tokenizer is None:
            raise ValueError(f"{folder} has no tokenizer.json: export the tokenizer into it")
        self.config, self.params, self.longest = found.config, found.params, longest
        self.tokenizer = tokenizers.Tokenizer.from_str(found.tokenizer)
        known = self.tokenizer.token_to_id(PLACEHOLDER)
        if known != self.config.image_token:
            raise ValueError(
                f"{PLACEHOLDER} is token {known} of {folder}'s tokenizer, but config.json says "
                f"{self.config.image_token}: they do not belong together"
            )
        self.model = vlm(self.config)
        self.generate = Generator(language_model(self.config, self.params), compile=False)
        self.stops = _stops(Path(folder), found.hub)
        self.mean, self.std = _scales(Path(folder), self.config.vision.class_token)
        self.device, self.dtype = device, dtype

    def pixels(self, pictures: Sequence[UInt8[Tensor, "3 _ _"]]) -> Float[Tensor, "N 3 h w"]:
        """Images as the tower takes them: CLIP's are cropped to a square, SigLIP's squashed."""
        fit = "crop" if self.config.vision.class_token else "squash"
        sized = [files.resize(picture, self.config.vision.size, fit=fit) for picture in pictures]
        return files.normalize(torch.stack(sized), self.mean, self.std).to(self.device, self.dtype)

    def prompt(self, question: str, images: int = 1) -> list[int]:
        """The ids of a question about so many images.

        Raises:
            ValueError: a question that holds a placeholder itself; more tokens than fit.
        """
        if PLACEHOLDER in question:
            raise ValueError(f"the question holds {PLACEHOLDER}, which stands before it: leave out")
        if self.config.prefix:
            text = f"{PLACEHOLDER * images}<bos>{question}\n"
        else:
            marks = f"{PLACEHOLDER}\n" * images
            text = f"USER: {marks}{question} ASSISTANT:"
        ids = self.tokenizer.encode(text, add_special_tokens=not self.config.prefix).ids
        return with_image_tokens(ids, self.config, images)

    @torch.no_grad()
    def answer(self, pictures: Sequence[UInt8[Tensor, "3 _ _"]], question: str) -> str:
        """The model's answer to a question about these images, greedy.

        Raises:
            ValueError: no image; see `prompt`.
        """
        if not pictures:
            raise ValueError("pictures (none) must hold at least one image")
        prompts = [self.prompt(question, len(pictures))]
        inputs = prefill_inputs(self.model, self.params, prompts, self.pixels(pictures))
        room = self.config.decoder.max_length - len(prompts[0])
        settings = Settings(min(self.longest, room), sampling=GREEDY, stop_tokens=self.stops)
        made = self.generate(prompts, settings, inputs=inputs)
        ids = made.tokens[0, : int(made.lengths[0])].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from None


def _stops(folder: Path, hub: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer: those of generation_config.json, or of config.json."""
    places = (_read(folder / "generation_config.json"), hub, hub.get("text_config") or {})
    found = next((p["eos_token_id"] for p in places if p.get("eos_token_id") is not None), ())
    return (found,) if isinstance(found, int) else tuple(found)


def _scales(folder: Path, clip: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel."""
    said = _read(folder / "preprocessor_config.json")
    mean, std = (files.CLIP_MEAN, files.CLIP_STD) if clip else (files.HALF, files.HALF)
    return tuple(said.get("image_mean", mean)), tuple(said.get("image_std", std))
