"""CLIP's byte-pair tokenizer: lower case, words end in "</w>", merges published as a text file.

    "A photo" -> <|startoftext|> a</w> photo</w> <|endoftext|> -> 49406 320 1125 49407

Made from `bpe_simple_vocab_16e6.txt.gz` (openai/CLIP) or a `merges.txt` with the same merges.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int64
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # of the many in the file; ids are 2 * 256 + merges + 2 specials
FILES = ("bpe_simple_vocab_16e6.txt.gz", "bpe_simple_vocab_16e6.txt", "merges.txt")
_PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)


class ClipTokenizer:
    """Texts to ids and back, as CLIP was trained; made by `load`.

    Text in which the marks are spelled out gives their ids, as in the published tokenizer.
    """

    def __init__(self, merges: Sequence[tuple[str, str]]):
        letters = byte_letters()
        words = [*letters, *(f"{letter}</w>" for letter in letters)]
        words += ["".join(pair) for pair in merges]
        vocab = {word: i for i, word in enumerate([*words, START, END])}
        model = models.BPE(vocab, list(merges), end_of_word_suffix="</w>", unk_token=END)
        backend = tokenizers.Tokenizer(model)
        backend.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        # The published tokenizer finds the first mark in lowered text, the second in text as it is.
        marks = [AddedToken(START, normalized=True), AddedToken(END, normalized=False)]
        backend.add_special_tokens(marks)
        self.start, self.end = vocab[START], vocab[END]
        backend.post_processor = processors.RobertaProcessing(
            (END, self.end), (START, self.start), trim_offsets=False, add_prefix_space=False
        )
        self._backend = backend

    @classmethod
    def load(cls, path: str | Path) -> "ClipTokenizer":
        """The tokenizer whose merges lie at `path`, or in the folder of that name.

        Raises:
            ValueError: no such file, or none of merges.
        """
        path = Path(path)
        if path.is_dir():
            found = [path / name for name in FILES if (path / name).is_file()]
            if not found:
                raise ValueError(f"no file of CLIP's merges in {path}: one of {list(FILES)}")
            path = found[0]
        try:
            data = path.read_bytes()
            text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} holds no merges ({error}): fetch {FILES[0]}") from None
        lines = text.split("\n")[1 : MERGES + 1]  # after a line with the version
        pairs = [(parts[0], parts[1]) for parts in map(str.split, lines) if len(parts) == 2]
        if len(pairs) != MERGES:
            raise ValueError(
                f"{path} holds {len(pairs)} merges, CLIP has {MERGES}: fetch {FILES[0]} again"
            )
        return cls(pairs)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the two marks among them."""
        return self._backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, between the marks of its start and end."""
        if isinstance(texts, str):
            raise ValueError(f"texts is one str ({texts[:40]!r}), not a list of them: pass [text]")
        return [text.ids for text in self._backend.encode_batch_fast(list(texts))]

    def batch(
        self, texts: Sequence[str], length: int = 77, pad: int | None = None
    ) -> Int64[Tensor, "B T"]:
        """Ids as one tensor; longer texts are cut, but for the mark of their end.

        Args:
            length: tokens of every row.
            pad: fills up short rows; default: the end mark, as transformers (0 in open_clip).
        """
        if length < 2:
            raise ValueError(f"length ({length}) must be at least 2: a start and an end")
        pad = self.end if pad is None else pad
        rows = [
            ids if len(ids) <= length else [*ids[: length - 1], self.end]
            for ids in self.encode(texts)
        ]
        return torch.tensor([ids + [pad] * (length - len(ids)) for ids in rows]).reshape(-1, length)

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Text of each list of ids, without the marks: lower case, words with one space between."""
        texts = self._backend.decode_batch([[int(i) for i in row] for row in ids])
        return [text.replace("</w>", " ").strip() for text in texts]

    def save(self, folder: str | Path, *, length: int = 77, pad: int | None = None) -> None:
        """Writes a folder that `load`, transformers and diffusers read: vocabulary, merges, marks.

        Args:
            length: tokens of the context.
            pad: id that fills up short rows; default: the end mark.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        model = json.loads(self._backend.to_str())["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        filling = self._backend.id_to_token(self.end if pad is None else pad)
        marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": filling}
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **marks}
        files = {"vocab.json": self._backend.get_vocab(), "special_tokens_map.json": marks}
        for name, content in (files | {"tokenizer_config.json": settings}).items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        text = "\n".join(["#version: 0.2", *merges]) + "\n"
        (folder / "merges.txt").write_text(text, encoding="utf-8")

    def to_json(self) -> str:
        """The whole tokenizer in the format of the `tokenizers` library, a tokenizer.json."""
        return json.dumps(json.loads(self._backend.to_str()), ensure_ascii=False)


def byte_letters() -> list[str]:
    """A printable character for every byte, in the order of CLIP's (and GPT-2's) first 256 ids."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    own += range(ord("®"), ord("ÿ") + 1)
    others = 256 - len(own)
    return [*map(chr, own), *(chr(256 + i) for i in range(others))]
