"""Byte-pair merges by the textbook (Sennrich et al. 2016): join the most frequent pair, again.

    low low low lower newer newer         pieces with their counts, each cut into bytes

    l o: 4, o w: 4, e r: 3, ...           (l, o) and (o, w) tie: the greater pair of bytes is joined
    l ow: 4, e r: 3, ...                  merges: (o, w), then (l, ow), then ...

The rule for ties makes the merges a function of the counts alone. (The trainer of the `tokenizers`
library, which `tokenizer.train_bpe` uses unless it is asked for this one, takes the pair whose ids
are lower: as good a vocabulary, other merges.) A merge changes only the pieces that hold its pair,
so each costs what they cost.
"""

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Mapping

Pair = tuple[bytes, bytes]


def letters() -> list[str]:
    """The printable letter of each byte in files of byte-level BPE (Radford et al. 2019): itself
    where it is visible, the others from U+0100 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(byte if byte in visible else next(rest)) for byte in range(256)]


class Greatest:
    """A pair that a min-heap gives first when it is the greater one."""

    __slots__ = ("pair",)

    def __init__(self, pair: Pair):
        self.pair = pair

    def __lt__(self, other: "Greatest") -> bool:
        return self.pair > other.pair


def pairs(symbols: list[bytes]) -> Counter[Pair]:
    return Counter(itertools.pairwise(symbols))


def joined(symbols: list[bytes], pair: Pair) -> list[bytes]:
    """With every such pair as one symbol, from left to right."""
    found: list[bytes] = []
    at = 0
    while at < len(symbols):
        here = tuple(symbols[at : at + 2]) == pair
        found.append(pair[0] + pair[1] if here else symbols[at])
        at += 1 + here
    return found


def learn_merges(pieces: Mapping[bytes, int], most: int) -> list[Pair]:
    """The first `most` merges, fewer if no pair is left: the pair that stands most often, of equals
    the one whose bytes are greater, joined everywhere before the next is looked for.

    Args:
        pieces: what merges stay inside of (words with the space before them) -> how often.

    Raises:
        ValueError: most below 0, a count below 1.
    """
    if most < 0:
        raise ValueError(f"most ({most}) must be at least 0 merges")
    if wrong := next((piece for piece, count in pieces.items() if count < 1), None):
        raise ValueError(f"piece {wrong!r} has count {pieces[wrong]}: it must be at least 1")
    words = [[bytes([byte]) for byte in piece] for piece in pieces]
    counts = list(pieces.values())
    total: Counter[Pair] = Counter()
    holders: defaultdict[Pair, set[int]] = defaultdict(set)  # words that hold, or once held, a pair
    for number, word in enumerate(words):
        for pair, times in pairs(word).items():
            total[pair] += times * counts[number]
            holders[pair].add(number)
    heap = [(-count, Greatest(pair)) for pair, count in total.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < most:
        count, entry = heapq.heappop(heap)
        pair = entry.pair
        if total[pair] != -count or not count:  # counted anew since, and then pushed again
            continue
        merges.append(pair)
        changed: set[Pair] = set()
        for number in holders.pop(pair):
            before, after = words[number], joined(words[number], pair)
            difference = pairs(after)
            difference.subtract(pairs(before))
            for other, times in difference.items():
                if times:
                    total[other] += times * counts[number]
                    holders[other].add(number)
                    changed.add(other)
            words[number] = after
        for other in changed:
            heapq.heappush(heap, (-total[other], Greatest(other)))
    return merges
