"""Questions about images as token sequences: samples, packed rows, answers, where they look.

    sample     <bos> i i i i   question <bos> answer <eos>   question <bos> answer <eos>
    turn         0   0 0 0 0       1      1      1     1         2      2      2     2
    learned                                      ^     ^                       ^     ^

i: an image's tokens. The turns of a sample share its image but do not see each other, so each
learns what it would learn alone. Several samples share a row, apart by segment ids.

Dimension key: R rows, T tokens of a row, S samples, M images, P tokens of an image, D width.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from msfs_functional.attention import attention, attention_weights
from msfs_functional.generation import GREEDY, Generator, Settings
from msfs_functional.images import resize
from msfs_functional.models.vlm import IGNORED, VLMConfig, prefill_inputs, with_image_tokens
from msfs_functional.packing import rows_of
from msfs_functional.params import Functional, Params
from msfs_functional.tokenizer import BOS, EOS, PAD, Tokenizer

LEARNED = 128  # labels of a batch are filled up to a multiple of so many: few shapes occur


class Sample(NamedTuple):
    """What is asked of an image and answered: one turn or several."""

    image: int  # which of the batch's
    ids: list[int]
    learned: list[bool]  # of each id, whether it is to be predicted
    turns: list[int]  # of each id, 0 for the image, then 1, 2, ...


def prompt_ids(question: Sequence[int], config: VLMConfig, images: int = 1) -> list[int]:
    """The ids of a prompt with one image before the question, or several tiles of it.

    Raises:
        ValueError: more tokens than the decoder takes.
    """
    ids = [BOS, *[config.image_token] * images, *question, BOS]
    return with_image_tokens(ids, config, images)


@functools.lru_cache(maxsize=16)
def _image_prompt(config: VLMConfig, images: int) -> tuple[int, ...]:
    """What every sample of so many tiles begins with."""
    return tuple(prompt_ids([], config, images)[:-1])


def sample_of(
    image: int,
    turns: Sequence[tuple[Sequence[int], Sequence[int]]],
    config: VLMConfig,
    images: int = 1,
) -> Sample:
    """The image, then each question with its answer; answers and their ends are learned.

    Args:
        turns: ids of questions and of answers, without marks.
        images: tiles that the image is cut into.
    """
    ids = list(_image_prompt(config, images))
    learned, numbers = [False] * len(ids), [0] * len(ids)
    for number, (question, answer) in enumerate(turns, start=1):
        turn = [*question, BOS, *answer, EOS]
        ids += turn
        learned += [False] * (len(question) + 1) + [True] * (len(answer) + 1)
        numbers += [number] * len(turn)
    return Sample(image, ids, learned, numbers)


def cut_tiles(images: UInt8[Tensor, "M C h h"], side: int) -> UInt8[Tensor, "N C s s"]:
    """A thumbnail of each image and its side x side tiles, row by row; the image itself for side 1.

    For images of one shape; `images.tiles` cuts one of any shape.

    Raises:
        ValueError: a side that does not divide the image's.
    """
    if side == 1:
        return images
    height, width = images.shape[-2:]
    if height % side or width % side:
        raise ValueError(f"{side} tiles must divide both sides of images {height, width}")
    size = height // side, width // side
    tiles = images.unflatten(-1, (side, size[1])).unflatten(-3, (side, size[0]))
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    return torch.cat([resize(images, size, fit="squash")[:, None], tiles], 1).flatten(0, 1)


def pack_samples(samples: Sequence[Sample], length: int, *, multiple: int = 4) -> dict[str, Tensor]:
    """Rows of several samples each.

    Args:
        length: T; none is cut, so none may be longer.
        multiple: the number of rows is rounded up to it, so that few shapes occur.

    Returns:
        tokens, labels (IGNORED but where a learned token follows), segments (0 is padding), turns
        and positions (each turn goes on from the image's), all int64 (R, T); images (S,): the image
        of each sample, in the order of the placeholders; learned (A,): where among the R * T tokens
        labels stand, and then 0, where none does: logits are needed nowhere else.

    Raises:
        ValueError: no samples, a sample longer than a row.
    """
    sizes = [len(sample.ids) - 1 for sample in samples]  # nothing follows the last
    if not sizes or max(sizes) > length:
        raise ValueError(
            f"{len(sizes)} samples of at most {max(sizes, default=0)} tokens must fit into rows of "
            f"{length}: give some, lengthen the rows or shorten the texts"
        )
    rows = rows_of(sizes, length)
    count = -(-len(rows) // multiple) * multiple
    tokens = np.full((count, length), PAD)
    labels = np.full((count, length), IGNORED)
    segments, turns, positions = (np.zeros((count, length), dtype=np.int64) for _ in range(3))
    images = []
    for r, row in enumerate(rows):
        at = 0
        for segment, i in enumerate(row, start=1):
            sample, here = samples[i], slice(at, at + sizes[i])
            tokens[r, here], segments[r, here] = sample.ids[:-1], segment
            labels[r, here] = np.where(sample.learned[1:], sample.ids[1:], IGNORED)
            number = turns[r, here] = np.array(sample.turns[:-1])
            first = np.searchsorted(number, number)  # where each token's turn begins
            own = number > 0
            positions[r, here] = np.arange(sizes[i]) - own * (first - own.argmax())
            images.append(sample.image)
            at += sizes[i]
    packed = {"tokens": tokens, "labels": labels, "segments": segments, "turns": turns}
    packed["positions"] = positions
    tensors = {name: torch.from_numpy(value.astype(np.int64)) for name, value in packed.items()}
    where = np.flatnonzero(labels != IGNORED)
    learned = np.pad(where, (0, -len(where) % LEARNED))
    return {**tensors, "images": torch.tensor(images), "learned": torch.from_numpy(learned)}


def turns_apart(segments: Int[Tensor, "R T"], turns: Int[Tensor, "R T"]) -> Bool[Tensor, "R 1 T T"]:
    """Where a token may look, causality aside: at its own sample's image, and at its own turn.

    turn   0 0 1 1 2      0   1 1 . . .
                          0   1 1 . . .
                          1   1 1 1 1 .
                          1   1 1 1 1 .
                          2   1 1 . . 1
    """
    sample = segments[:, :, None] == segments[:, None]
    own = turns[:, :, None] == turns[:, None]
    return (sample & (own | (turns == 0)[:, None]))[:, None]


class Answerer:
    """Answers questions about images: each image passes the tower once, decoding is cached.

    Args:
        model, params: of `vlm`.
        generate: of `language_model` with the same parameters.
        to_pixels: 8-bit images -> what the tower takes, on its device.
        tiles: along a side of an image, see `cut_tiles`.
        longest: answer, in tokens.
        batch: images, and questions, at a time.
    """

    def __init__(
        self,
        model: Functional,
        params: Params,
        generate: Generator,
        tokenizer: Tokenizer,
        to_pixels: Callable[[Tensor], Tensor],
        *,
        tiles: int = 1,
        longest: int = 24,
        batch: int = 256,
    ):
        self.model, self.params, self.generate = model, params, generate
        self.tokenizer, self.to_pixels = tokenizer, to_pixels
        self.config = cast(VLMConfig, model.skeleton.config)
        self.side, self.longest, self.batch = tiles, longest, batch

    @torch.no_grad()
    def image_tokens(self, images: UInt8[Tensor, "M C h w"]) -> Float[Tensor, "M N P D"]:
        """What the decoder sees of 8-bit images: P tokens of each of N tiles."""
        parts = [
            self.model.apply(
                self.params, self.to_pixels(cut_tiles(part, self.side)), method="image_tokens"
            ).unflatten(0, (len(part), -1))
            for part in images.split(self.batch)
        ]
        return torch.cat(parts)

    def __call__(
        self, seen: Float[Tensor, "M N P D"], asked: Iterable[tuple[int, str]]
    ) -> list[str]:
        """The answers, greedy.

        Args:
            seen: from `image_tokens`.
            asked: (image, question) pairs.
        """
        asked, answers = list(asked), []
        ids = self.tokenizer.encode([question for _, question in asked])
        prompts = [prompt_ids(question, self.config, seen.shape[1]) for question in ids]
        which = torch.tensor([i for i, _ in asked])
        settings = Settings(self.longest, sampling=GREEDY, stop_tokens=(EOS,))
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            images = seen[which[start : start + self.batch].to(seen.device)].flatten(0, 1)
            inputs = prefill_inputs(self.model, self.params, part, images=images)
            made = self.generate(part, settings, inputs=inputs)
            rows = zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)
            answers += self.tokenizer.decode([row[:n] for row, n in rows])
        return [answer.strip() for answer in answers]


@torch.no_grad()
def gaze(
    model: Functional,
    params: Params,
    prompt: Sequence[int],
    answer: Sequence[int],
    images: Float[Tensor, "N P D"],
) -> Float[Tensor, "A Q"]:
    """How much attention each token of an answer, when it is chosen, pays to each of the images.

    The mean over layers and heads of the attention from the token before it; a row sums to at most
    1, the rest goes to the text. Q = N * P.

    Args:
        prompt, answer: ids, the prompt with the images' tokens.
        images: what `image_tokens` gave.
    """
    config = cast(VLMConfig, model.skeleton.config)
    maps: list[Tensor] = []

    def recorded(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        maps.append(attention_weights(q, k, **options)[0].mean(0))
        return attention(q, k, v, **options, implementation="reference")

    ids = torch.tensor([[*prompt, *answer]], device=images.device)
    prefix = torch.tensor([len(prompt)], device=images.device) if config.prefix else None
    options = {"images": images, "prefix_lengths": prefix, "implementation": recorded}
    model.apply(params, ids, **options, method="hidden")
    weights = torch.stack(maps).mean(0)
    here = (ids[0] == config.image_token).nonzero()[:, 0]
    first = len(prompt) - 1
    return weights[first : first + len(answer)][:, here]
