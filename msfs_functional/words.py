"""Captions as ids of whole words, for a text tower trained from scratch on a set's own captions.

    words = Words.of(captions, most=4000, length=32)
    words.encode(["A red circle.", ""])    {"ids": (2, 32), "lengths": (2,)}

Ids: 0 padding, 1 the empty caption (what classifier-free guidance compares with), 2 a word that is
not known, then the words, commonest first.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, NOTHING, UNKNOWN = 0, 1, 2
FIRST = 3


def split(text: str) -> list[str]:
    """Words and single marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


@dataclass(frozen=True)
class Words:
    """Which words there are, and how many of a caption are read."""

    words: tuple[str, ...]
    length: int

    @staticmethod
    def of(captions: Iterable[str], *, most: int = 4000, length: int = 32) -> "Words":
        """The commonest words of some captions; none longer than `length`, nor than the longest.

        Raises:
            ValueError: no word in any caption; most or length below 1.
        """
        if most < 1 or length < 1:
            raise ValueError(f"words ({most}) and length ({length}) must be at least 1")
        parts = [split(caption) for caption in captions]
        counts = Counter(word for part in parts for word in part)
        if not counts:
            raise ValueError("all captions are empty: train on classes, or name another column")
        chosen = sorted(counts, key=lambda word: (-counts[word], word))[:most]
        return Words(tuple(chosen), min(length, max(map(len, parts))))

    @property
    def vocab(self) -> int:
        return FIRST + len(self.words)

    def strange(self, captions: Iterable[str]) -> list[str]:
        """The words of some captions that are not known, sorted."""
        return sorted({word for caption in captions for word in split(caption)} - set(self.words))

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Ids (B, length), padded on the right, and lengths (B,); longer captions are cut, which
        is told once a call."""
        ids_of = {word: i for i, word in enumerate(self.words, start=FIRST)}
        ids = torch.full((len(captions), self.length), PAD)
        lengths, cut = [], []
        for i, caption in enumerate(captions):
            row = [ids_of.get(word, UNKNOWN) for word in split(caption)] or [NOTHING]
            if len(row) > self.length:
                cut.append(caption)
            row = row[: self.length]
            ids[i, : len(row)] = torch.tensor(row)
            lengths.append(len(row))
        if cut:
            print(
                f"note: {len(cut):,} of {len(captions):,} captions are longer than {self.length} "
                f"words and are cut there, the first: {cut[0][:60]!r}",
                file=sys.stderr,
            )
        return {"ids": ids, "lengths": torch.tensor(lengths)}
