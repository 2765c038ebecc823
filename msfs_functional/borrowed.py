"""A published decoder with its own tokenizer, in the ids that training code here expects.

Padding is id 0 and the end token id 2 everywhere here, elsewhere in a published vocabulary. `load`
exchanges those two with whatever stands at 0 and 2, in the tokenizer's ids and in the rows of the
embedding alike, so that nothing else has to know:

    local = load("SmolLM2-135M")
    local.tokenizer.encode(["Hello"], bos=True)          # ids of the exchanged vocabulary
    decoder(local.config).apply(local.params, tokens)    # the same numbers as before
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from torch import Tensor

from msfs_functional.models import pretrained
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.params import Params
from msfs_functional.tokenizer import EOS, PAD

ROWS = ("embedding.weight", "output.weight")  # that stand for tokens


class Borrowed:
    """Somebody's tokenizer with the methods of `tokenizer.Tokenizer`.

    Args:
        backend: of the `tokenizers` library.
        size: ids of the model, at least the tokenizer's.
        pad, end, begin: their ids in the published vocabulary; begin may be None, or the end token.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, size: int, pad: int, end: int, begin: int | None
    ):
        self._backend, self.vocab_size = backend, size
        self.theirs = list(range(size))  # the published id at each of ours
        for own, published in ((PAD, pad), (EOS, end)):
            here = self.theirs.index(published)
            self.theirs[own], self.theirs[here] = self.theirs[here], self.theirs[own]
        self.ours = [0] * size
        for own, published in enumerate(self.theirs):
            self.ours[published] = own
        self.begin = [] if begin is None else [self.ours[begin]]

    def encode(
        self, lines: Sequence[str], *, bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """Ids of each line, between the begin and the end token where asked."""
        before, after = self.begin if bos else [], [EOS] if eos else []
        found = self._backend.encode_batch_fast(list(lines), add_special_tokens=False)
        return [[*before, *(self.ours[i] for i in line.ids), *after] for line in found]

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """Text of each list of ids, without padding, begin and end tokens."""
        left_out = {PAD, EOS, *self.begin}
        kept = [[self.theirs[int(i)] for i in line if int(i) not in left_out] for line in ids]
        texts = self._backend.decode_batch(kept, skip_special_tokens=False)
        return [text.removeprefix(" ") for text in texts]


class Local(NamedTuple):
    """A folder's decoder, ready to be trained on."""

    tokenizer: Borrowed
    config: DecoderConfig
    params: Params


def special(folder: Path, hub: dict[str, Any], backend: tokenizers.Tokenizer, name: str) -> Any:
    """The id of the folder's "pad", "eos" or "bos" token; None where it has none."""
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    token = known.get(f"{name}_token")
    token = token["content"] if isinstance(token, dict) else token
    if token is not None:
        return backend.token_to_id(token)
    number = hub.get(f"{name}_token_id")
    return number[0] if isinstance(number, list) else number


def load(
    folder: str | Path, *, pad: str | None = None, device: torch.device | str = "cpu"
) -> Local:
    """The decoder and the tokenizer of a local Hugging Face folder, float32.

    Args:
        pad: the token to pad with, where the tokenizer names none.

    Raises:
        ValueError: no tokenizer.json; a tokenizer without an end token, without one to pad with, or
            with one for both; a decoder whose logits are capped.
    """
    folder = Path(folder)
    config, params, hub, text = pretrained.load(folder, dtype=torch.float32, device=device)
    if text is None:
        raise ValueError(f"{folder} has no tokenizer.json: save the model's tokenizer beside it")
    if config.logit_softcap is not None:
        raise ValueError(
            f"{folder} caps its logits at {config.logit_softcap}, which log-probabilities in "
            "chunks do not: choose a decoder that does not"
        )
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    end, begin = (special(folder, hub, backend, name) for name in ("eos", "bos"))
    if end is None:
        raise ValueError(
            f"the tokenizer of {folder} has no end token, so no answer would end: name one as "
            '"eos_token" in its tokenizer_config.json'
        )
    filler = special(folder, hub, backend, "pad") if pad is None else backend.token_to_id(pad)
    if filler is None or filler == end:
        found = "none" if filler is None else "its end token, whose label would be lost"
        found = f"{pad!r}, which it does not know" if pad and filler is None else found
        raise ValueError(
            f"the tokenizer of {folder} has for a pad token {found}: name one that no text uses "
            "with --model.pad"
        )
    tokenizer = Borrowed(backend, config.vocab, filler, end, begin)
    order = torch.tensor(tokenizer.theirs, device=device)
    exchanged: dict[str, Tensor] = {n: params[n][order] for n in ROWS if n in params}
    return Local(tokenizer, config, {**params, **exchanged})
