"""Batches of images and texts: the n-th is a function of the seed and n, however many share it.

    Pairs       image and text, for two towers
    Questions   images and what is asked of them, packed into rows, for a vision-language model

Every epoch has an order of its own. A process takes its share of a batch; all shares together are
what one process would have taken.

Dimension key: B images of a batch, T tokens of a text, C channels, h w height and width in pixels.
"""

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from msfs_functional.answering import cut_tiles, pack_samples, sample_of
from msfs_functional.image_corpora import Pictured
from msfs_functional.models.vlm import VLMConfig
from msfs_functional.pairs import Shuffled
from msfs_functional.tokenizer import Tokenizer

DESCRIBE = "describe the image."
LOOKS = 8  # random numbers for an image: grey, turn, mirror, two shifts, tint of three colours
Mix = Sequence[tuple[str, float]]  # regexes of questions and how often they are asked


class Numbered(ABC):
    """Batch n, counted from 1, of `count` images, and where this process's share of it lies.

    Raises:
        ValueError: fewer things than a batch has, ranks that do not divide it.
    """

    def __init__(self, count: int, size: int, seed: int, share: tuple[int, int]):
        if count < size or size % share[1]:
            raise ValueError(
                f"a batch ({size}) must be at most the images to train on ({count}) and a multiple "
                f"of the {share[1]} data ranks: give more images, or change the batch"
            )
        self.order = Shuffled({"row": torch.arange(count)}, size, seed)
        self.size, self.seed, self.number = size, seed, 0
        each = size // share[1]
        self.own = range(share[0] * each, (share[0] + 1) * each)  # places in a batch

    def chosen(self, number: int) -> np.ndarray:
        """What is in batch `number`, (B,), the same for every process."""
        self.order.restore({"done": number - 1})
        return next(self.order)["row"].numpy()

    @abstractmethod
    def batch(self, number: int) -> dict[str, Tensor]:
        """This process's share of batch `number`."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.number += 1
        return self.batch(self.number)

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def restore(self, state: dict[str, int]) -> None:
        self.number = state["number"]


def grey_of(picture: UInt8[Tensor, "*N 3 h w"]) -> UInt8[Tensor, "*N 3 h w"]:
    """The picture without colours: Rec. 601's luma in each channel."""
    luma = torch.einsum("c, ...chw -> ...hw", torch.tensor([0.299, 0.587, 0.114]), picture.float())
    return luma.round().clamp_(max=255).byte()[..., None, :, :].expand_as(picture)


class Pairs(Numbered):
    """Each image with one of its texts.

    Args:
        data: images without texts are left out.
        texts: ids of all captions of `data`, in order.
        size: images of a batch, over all processes.
        grey: share of images that are shown in grey, with a text of `colourless`, which are the ids
            of the same captions without their colours: so shapes are learned apart from colours.
        share: (number of this process, processes).
    """

    def __init__(
        self,
        data: Pictured,
        texts: Int[Tensor, "_ T"],
        size: int,
        *,
        grey: float = 0.0,
        colourless: Int[Tensor, "_ T"] | None = None,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        self.rows = [i for i, captions in enumerate(data.captions) if captions]
        super().__init__(len(self.rows), size, seed, share)
        self.images, self.texts = data.images, texts
        self.grey, self.colourless = grey, texts if colourless is None else colourless
        self.counts = np.array([len(data.captions[i]) for i in self.rows])
        self.starts = np.cumsum(self.counts) - self.counts

    def batch(self, number: int) -> dict[str, Tensor]:
        """images (B, C, h, w) of 8 bits, ids (B, T)."""
        chosen = self.chosen(number)
        rng = np.random.default_rng((self.seed, 1, number))
        texts = self.starts[chosen] + (rng.random(self.size) * self.counts[chosen]).astype(int)
        greyed = rng.random(self.size) < self.grey
        here = slice(self.own.start, self.own.stop)
        picked = torch.tensor([self.rows[i] for i in chosen[here]])
        images, rows = self.images[picked], torch.from_numpy(texts[here])
        ids, plain = self.texts[rows], torch.from_numpy(greyed[here])
        if plain.any():
            images[plain], ids[plain] = grey_of(images[plain]), self.colourless[rows[plain]]
        return {"images": images, "ids": ids}


def texts_of(data: Pictured) -> list[str]:
    """Every text of a data set once: what a tokenizer learns from."""
    texts = {DESCRIBE: None}
    for captions, pairs in zip(data.captions, data.questions, strict=True):
        texts |= dict.fromkeys([*captions, *(text for pair in pairs for text in pair)])
    return list(texts)


class Questions(Numbered):
    """Images, each with its caption and questions, as packed rows (`answering.pack_samples`).

    Args:
        size: images of a batch, over all processes.
        questions: of each image in a batch; its caption counts as one.
        turns: of them share the image's tokens, without seeing each other.
        length: tokens of a row; no sample may be longer. None: of the longest that may be drawn.
        tiles: along a side of an image, see `cut_tiles`.
        mix: how often a question is drawn, by the first regex that is found in it; default: all
            alike. The caption is asked for with `DESCRIBE`.
        flips: turn and mirror images at random.
        shift: move images at random by at most so much [pixels], the edge is repeated.
        tint: scale each colour of images at random by a factor in [1 - tint, 1 + tint].
        grey: share of images that are shown in grey, and asked nothing that matches `coloured`, a
            regex: so a model learns shapes apart from colours.
        share: (number of this process, processes).
    """

    def __init__(
        self,
        data: Pictured,
        tokenizer: Tokenizer,
        model: VLMConfig,
        size: int,
        *,
        questions: int = 8,
        turns: int = 8,
        length: int | None = 240,
        tiles: int = 1,
        mix: Mix = (),
        flips: bool = False,
        shift: int = 0,
        tint: float = 0.0,
        grey: float = 0.0,
        coloured: str = "",
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        super().__init__(len(data), size, seed, share)
        self.data, self.model = data, model
        self.questions, self.turns, self.tiles = questions, turns, tiles
        self.mix, self.flips, self.shift, self.tint = mix, flips, shift, tint
        self.grey, self.coloured = grey, re.compile(coloured)
        texts = texts_of(data)
        self.ids = dict(zip(texts, tokenizer.encode(texts), strict=True))
        self.weights: dict[str, float] = {}  # of questions so far
        self.speaks: dict[str, bool] = {}  # of colours, texts so far
        most = max(map(len, data.questions), default=0)
        self.draws = LOOKS + 2 + max(most, questions)  # random numbers for each image
        self.length = self.longest() if length is None else length

    def batch(self, number: int) -> dict[str, Tensor]:
        """What `pack_samples` gives, and pictures of 8 bits, tiles of one after another."""
        chosen, seen = self.chosen(number), 1 if self.tiles == 1 else 1 + self.tiles**2
        # Uniform numbers for each place of the whole batch: so ranks need not draw one by one.
        draws = np.random.default_rng((self.seed, 1, number)).random((self.size, self.draws))
        samples, moved = [], []
        greyed = draws[:, 0] < self.grey
        for row, place in enumerate(self.own):
            i = int(chosen[place])
            asked = self.asked(i, draws[place, LOOKS:], greyed[place])
            pairs = [(self.ids[q], self.ids[a]) for q, a in asked]
            for first in range(0, len(pairs), self.turns):
                part = pairs[first : first + self.turns]
                samples.append(sample_of(row, part, self.model, seen))
            moved.append(self.moved(self.data.images[i], draws[place, 1:5]))
        pictures, here = torch.stack(moved), slice(self.own.start, self.own.stop)
        plain = torch.from_numpy(greyed[here])
        if plain.any():
            pictures[plain] = grey_of(pictures[plain])
        if self.tint:
            each = draws[here, 5:LOOKS]
            scale = torch.from_numpy(1 + self.tint * (2 * each - 1))[..., None, None].float()
            pictures = (pictures * scale).round_().clamp_(max=255).byte()
        return {
            **pack_samples(samples, self.length),
            "pictures": cut_tiles(pictures, self.tiles),
        }

    def longest(self) -> int:
        """Tokens of the longest sample: an image with as many turns as share it, the longest ones.

        Raises:
            ValueError: more than the decoder takes.
        """
        size = {text: len(ids) for text, ids in self.ids.items()}
        count, most = min(self.turns, self.questions), 0
        for image, grey in itertools.product(range(len(self.data)), {False, self.grey > 0}):
            captions, pairs = self.told(image, grey)
            turns = sorted(size[question] + size[answer] for question, answer in pairs)
            if 0 < len(turns) < count:  # then some are asked twice
                turns = [turns[-1]] * count
            turns += [size[DESCRIBE] + size[text] for text in captions]
            most = max(most, sum(sorted(turns)[-count:]) + 2 * count)
        length = self.model.tokens_per_image * (1 if self.tiles == 1 else 1 + self.tiles**2) + most
        if length > self.model.decoder.max_length:
            raise ValueError(
                f"a sample may have {length} tokens, the decoder takes "
                f"{self.model.decoder.max_length}: give a length, fewer turns or shorter texts"
            )
        return length

    def weight(self, question: str) -> float:
        """How often this question is drawn, beside others."""
        if question not in self.weights:
            found = (weight for regex, weight in self.mix if re.search(regex, question))
            self.weights[question] = next(found, 1.0)
        return self.weights[question]

    def colours(self, text: str) -> bool:
        """Whether a text speaks of colours."""
        if text not in self.speaks:
            self.speaks[text] = self.coloured.search(text) is not None
        return self.speaks[text]

    def told(self, image: int, grey: bool) -> tuple[list[str], list[tuple[str, str]]]:
        """Captions and questions that may be drawn of an image; in grey none speak of colours."""
        captions, pairs = self.data.captions[image], self.data.questions[image]
        if grey:
            captions = [text for text in captions if not self.colours(text)]
            pairs = [pair for pair in pairs if not any(map(self.colours, pair))]
        return captions, [pair for pair in pairs if self.weight(pair[0])]

    def asked(
        self, image: int, draws: Float[np.ndarray, "U"], grey: bool = False
    ) -> list[tuple[str, str]]:
        """Questions with answers, none twice unless there are too few; of a grey image none that
        speak of colours.

        Without replacement the smallest of -log(u) / weight win (Efraimidis and Spirakis 2006).

        Args:
            draws: uniform numbers in [0, 1), at least 2 and one for each question of the image.
        """
        captions, pairs = self.told(image, grey)
        found = []
        if captions and draws[0] < self.weight(DESCRIBE):
            found.append((DESCRIBE, captions[int(draws[1] * len(captions))]))
        count = self.questions - len(found)
        weights = np.array([self.weight(question) for question, _ in pairs])
        if 0 < len(pairs) < count:
            shares = weights.cumsum() / weights.cumsum()[-1]  # up to 1, which no draw reaches
            found += [pairs[i] for i in shares.searchsorted(draws[2 : 2 + count], side="right")]
        elif count > 0:
            keys = -np.log1p(-draws[2 : 2 + len(pairs)]) / weights
            found += [pairs[i] for i in keys.argsort()[:count]]
        return found

    def moved(
        self, picture: UInt8[Tensor, "C h w"], draws: Float[np.ndarray, "4"]
    ) -> UInt8[Tensor, "C h w"]:
        """The picture turned, mirrored and shifted as the settings allow."""
        if self.flips:
            picture = torch.rot90(picture, int(draws[0] * 4), (-2, -1))
            picture = picture.flip(-1) if draws[1] < 0.5 else picture
        if self.shift:
            steps = np.floor(draws[2:] * (2 * self.shift + 1)).astype(int) - self.shift
            rows, columns = (
                (torch.arange(n) + int(step)).clamp(0, n - 1)
                for n, step in zip(picture.shape[-2:], steps, strict=True)
            )
            picture = picture[:, rows][:, :, columns]
        return picture
