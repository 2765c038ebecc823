"""Text to ids and back: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) and whole words.

Both cut a line into the same pieces first: words with the space before them, punctuation, digits,
and Italian or French elisions on their own (`dell'` + `uomo`, but English `John` + `'s`). BPE then
merges bytes inside a piece, so that it spells any text and decodes to exactly the text it was
given; the word-level vocabulary of the classic recipe has one id a piece and UNK for the rest.

A line is treated as if one space stood before it: a word has the same ids wherever it stands.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from msfs_functional.byte_pairs import learn_merges, letters

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>"]
BYTES = 256

# Letters with their accents, and an apostrophe after them unless it starts an English ending.
_PIECES = (
    r" ?[\p{L}\p{M}]+(?:['’](?=\p{L})(?!(?:s|t|re|ve|m|ll|d)(?!\p{L})))?"
    r"|['’](?:s|t|re|ve|m|ll|d)(?!\p{L})"
    r"| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Lines to ids and back; the first four ids are PAD, BOS, EOS, UNK.

    Made by `train_bpe`, `train_word_level`, `Tokenizer.load` or `Tokenizer.from_json`.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        # The text "<pad>" in a corpus is five characters, never the padding id.
        backend.encode_special_tokens = True
        self._backend = backend

    @property
    def vocab_size(self) -> int:
        """Number of ids, the four specials among them."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(
        self, lines: Sequence[str], *, bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """Ids of each line, with BOS before and EOS after where asked.

        Args:
            lines: text without newlines; one line gives one list of ids.
            bos, eos: whether to add the marks.
        """
        if isinstance(lines, str):
            raise ValueError(f"lines is one str ({lines[:40]!r}), not a list of them: pass [line]")
        before, after = [BOS] * bos, [EOS] * eos
        encoded = self._backend.encode_batch_fast(list(lines), add_special_tokens=False)
        return [before + line.ids + after for line in encoded]

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Text of each list of ids, without the specials; UNK shows as "<unk>".

        `decode(encode(lines)) == lines` for every BPE tokenizer and every text.
        """
        kept = [[int(i) for i in line if i not in (PAD, BOS, EOS)] for line in ids]
        texts = self._backend.decode_batch(kept, skip_special_tokens=False)
        unknown = SPECIALS[UNK]
        texts = [
            text.replace(unknown, " " + unknown) if UNK in line else text
            for text, line in zip(texts, kept, strict=True)
        ]
        return [text.removeprefix(" ") for text in texts]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """One printable string an id, for pictures: "▁" marks the space before a word."""
        texts = self._backend.decode_batch([[int(i)] for i in ids], skip_special_tokens=False)
        return ["▁" + text[1:] if text.startswith(" ") else text for text in texts]

    def to_json(self) -> str:
        """The whole tokenizer as JSON text, in the format of the `tokenizers` library."""
        return self._backend.to_str()

    def save(self, path: str | Path) -> None:
        """Writes `to_json()` to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """The tokenizer that `to_json` wrote.

        Raises:
            ValueError: the text is no tokenizer, or its first four ids are not our specials.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"not a tokenizer in JSON form ({error}): pass what Tokenizer.save wrote"
            ) from None
        found = [backend.id_to_token(i) for i in range(len(SPECIALS))]
        if found != SPECIALS:
            raise ValueError(
                f"the first ids are {found}, not {SPECIALS}: train one with train_bpe or "
                "train_word_level"
            )
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer that `save` wrote; ValueError names a file that holds none."""
        path = Path(path)
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"no tokenizer at {path}: save one there or check the path") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _train(backend: tokenizers.Tokenizer, lines: Iterable[str], trainer) -> Tokenizer:
    lines = list(lines)
    if not any(lines):
        raise ValueError(f"{len(lines)} lines without text: a tokenizer needs some to learn from")
    backend.train_from_iterator(lines, trainer, length=len(lines))
    return Tokenizer(backend)


def _textbook(backend: tokenizers.Tokenizer, lines: Iterable[str], merges: int) -> Tokenizer:
    """The backend with merges of `learn_merges`."""
    alphabet = letters()
    byte_of = {letter: byte for byte, letter in enumerate(alphabet)}
    spell = lambda piece: "".join(alphabet[byte] for byte in piece)  # noqa: E731
    counts: Counter[str] = Counter()
    for line in lines:
        text: str = backend.normalizer.normalize_str(line)
        counts.update(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    if not counts:
        raise ValueError("no text in the lines: a tokenizer needs some to learn from")
    pieces = {bytes(byte_of[letter] for letter in piece): n for piece, n in counts.items()}
    learned = [(spell(a), spell(b)) for a, b in learn_merges(pieces, merges)]
    joined = dict.fromkeys(a + b for a, b in learned)  # two merges can make the same
    symbols = [*SPECIALS, *sorted(alphabet), *joined]
    backend.model = models.BPE({symbol: i for i, symbol in enumerate(symbols)}, learned)
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIALS])
    return Tokenizer(backend)


def train_bpe(
    lines: Iterable[str], vocab_size: int, *, ties: Literal["lower", "greater"] = "lower"
) -> Tokenizer:
    """Learns byte-level BPE: the same lines and size always give the same tokenizer.

    Pass the lines of both languages for a joint vocabulary, of one for a separate one; of the
    training split only. A small corpus can run out of pairs to merge before `vocab_size`.

    Args:
        lines: text, one sentence each.
        vocab_size: most ids to have: 4 specials, 256 bytes, then the merges.
        ties: of pairs that are equally frequent, merge the one whose ids are lower (fast), or whose
            bytes are greater (`byte_pairs`, in Python: the textbook's merges).

    Raises:
        ValueError: vocab_size leaves no room for a single merge, or there is no text.
    """
    smallest = len(SPECIALS) + BYTES
    if vocab_size <= smallest:
        raise ValueError(
            f"vocab_size ({vocab_size}) must exceed {smallest} = 4 specials + 256 bytes: "
            "pass 1000 or more"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Prepend(" ")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if ties == "greater":
        return _textbook(backend, lines, vocab_size - smallest)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return _train(backend, lines, trainer)


def train_word_level(lines: Iterable[str], vocab_size: int, *, min_frequency: int = 1) -> Tokenizer:
    """Learns one id a piece for the most frequent pieces; every other piece is UNK.

    Decoding puts the spaces back where they were; text is put in Unicode form NFC first.

    Args:
        lines: text, one sentence each.
        vocab_size: most ids to have, the 4 specials among them.
        min_frequency: rarer pieces become UNK.

    Raises:
        ValueError: vocab_size leaves no room for a word, or there is no text.
    """
    if vocab_size <= len(SPECIALS):
        raise ValueError(
            f"vocab_size ({vocab_size}) must exceed the {len(SPECIALS)} specials: pass 1000 or more"
        )
    backend = tokenizers.Tokenizer(models.WordLevel({}, unk_token=SPECIALS[UNK]))
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(" ")])
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    backend.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIALS,
        show_progress=False,
    )
    return _train(backend, lines, trainer)
