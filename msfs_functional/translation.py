"""From sentences to sentences: a trained encoder-decoder Transformer and its tokenizers at work.

    translate = translator(model, params, source_tokenizer, target_tokenizer, beams=5)
    translate(["The old woman sees a red house."])[0][0].text

Dimension key: M members of an ensemble, B sentences, S source tokens, L target tokens at most.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from matplotlib.figure import Figure
from torch import Tensor

from msfs_functional import metrics, pictures
from msfs_functional.attention import Implementation
from msfs_functional.batches import TokenBatches
from msfs_functional.corpora import Splits
from msfs_functional.decoding import (
    Runner,
    beam_search,
    ensemble_reorder,
    ensemble_step,
    greedy,
    run_eager,
)
from msfs_functional.models.transformer import Cache, reorder_cache
from msfs_functional.params import Functional, Params
from msfs_functional.tokenizer import BOS, EOS, PAD, Tokenizer, train_bpe, train_word_level

ROUNDING = 16  # source tokens
LEARN = {"bpe": train_bpe, "word": train_word_level}


class Tokenizers(NamedTuple):
    """Of both languages; one and the same when joint."""

    source: Tokenizer
    target: Tokenizer

    @classmethod
    def learn(cls, pairs: datasets.Dataset, kind: str, size: int, joint: bool) -> "Tokenizers":
        """From the training split only: what validation and test hold must be news."""
        sides = list(pairs["source"]), list(pairs["target"])
        if joint:
            both = LEARN[kind]([*sides[0], *sides[1]], size)
            return cls(both, both)
        return cls(*(LEARN[kind](side, size) for side in sides))

    def to_files(self) -> dict[str, str]:
        """{file name: text}, to be kept in every checkpoint."""
        return {f"{side}_tokenizer.json": each.to_json() for side, each in self._asdict().items()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> "Tokenizers":
        """What `to_files` has made."""
        names = (f"{side}_tokenizer.json" for side in cls._fields)
        return cls(*(Tokenizer.from_json(files[name].decode()) for name in names))


class Translation(NamedTuple):
    """One hypothesis; score: log-probability / tokens ** length_penalty [nats]."""

    text: str
    score: float


Translate = Callable[[Sequence[str]], list[list[Translation]]]


def _pieces(ids: list[int], limit: int) -> list[list[int]]:
    """`ids` cut into as few parts of like lengths as have, with EOS, at most `limit` ids."""
    parts = -(-len(ids) // (limit - 1))
    edges = [len(ids) * i // parts for i in range(parts + 1)] if parts else [0]
    return [[*ids[i:j], EOS] for i, j in itertools.pairwise(edges)]


def translator(
    model: Functional,
    params: Params,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    *,
    members: int = 1,
    beams: int = 4,
    n_best: int = 1,
    length_penalty: float = 1.0,
    max_length: int = 128,
    extra_length: int = 40,
    batch: int = 64,
    implementation: Implementation = "flash",
    runner: Runner = run_eager,
) -> Translate:
    """A function from sentences to the n_best translations of each, the best first.

    Args:
        model, params: of `models.transformer`; params decide dtype and device, and are stacked when
            there are members, which then score each token by the mean of their probabilities.
        beams: hypotheses kept side by side; 1 is greedy.
        length_penalty: scores are divided by tokens ** length_penalty.
        max_length: longest source and target [tokens]. A longer sentence is cut into pieces, which
            are translated one by one.
        extra_length: a target has at most this many tokens more than its source, rounded up to 16.
        batch: sentences decoded at once; like lengths are put together.
        runner: what makes the steps of a search; a `decoding.Compiled` is kept for all of them.

    Raises:
        ValueError: n_best is not from 1 to beams.
    """
    if not 1 <= n_best <= beams:
        raise ValueError(f"n_best ({n_best}) must be from 1 to beams ({beams}): use more beams")
    device = next(iter(params.values())).device

    def start(params: Params, source: Tensor, lengths: Tensor, steps: int) -> Cache:
        memory = model.apply(
            params, source, lengths, method="encode", implementation=implementation
        )
        return model.apply(params, memory, lengths, steps, beams, method="init_cache")

    def step(params: Params, tokens: Tensor, cache: Cache, position: Tensor):
        logits, cache = model.apply(
            params,
            tokens[:, None],
            cache,
            position,
            method="decode",
            implementation=implementation,
        )
        return logits[:, 0], cache

    if members > 1:
        start_fn = torch.vmap(start, in_dims=(0, None, None, None))
        step_fn, reorder_fn = ensemble_step(step, params), ensemble_reorder(reorder_cache)
    else:
        start_fn, step_fn, reorder_fn = start, partial(step, params), reorder_cache

    @torch.no_grad()
    def search(ids_BS: list[list[int]], width: int) -> list[list[Translation]]:
        lengths = torch.tensor([len(ids) for ids in ids_BS], device=device)
        rows = [ids + [PAD] * (width - len(ids)) for ids in ids_BS]
        source = torch.tensor(rows, device=device)
        steps = min(width + extra_length, max_length)
        cache = start_fn(params, source, lengths, steps)
        options: dict[str, Any] = {"batch": len(rows), "max_length": steps}
        options |= {"bos": BOS, "eos": EOS, "pad": PAD, "runner": runner}
        if beams == 1:
            found = greedy(step_fn, cache, **options)
            scores = found.scores / found.lengths.clamp(min=1) ** length_penalty
            tokens_BnL, scores_Bn = found.tokens[:, None], scores[:, None]
        else:
            found = beam_search(
                step_fn,
                cache,
                beams=beams,
                n_best=n_best,
                length_penalty=length_penalty,
                reorder_fn=reorder_fn,
                **options,
            )
            tokens_BnL, scores_Bn = found.tokens, found.scores
        texts = target_tokenizer.decode(tokens_BnL.flatten(0, 1).tolist())
        found = list(map(Translation, texts, scores_Bn.flatten().tolist()))
        return [found[i : i + n_best] for i in range(0, len(found), n_best)]

    def translate(sentences: Sequence[str]) -> list[list[Translation]]:
        encoded = source_tokenizer.encode(list(sentences))
        pieces = [(i, ids) for i, e in enumerate(encoded) for ids in _pieces(e, max_length)]
        # Widths are rounded up, so that shapes are few and a translation depends on no other.
        width_of = [-(-len(ids) // ROUNDING) * ROUNDING for _, ids in pieces]
        translated: dict[int, list[Translation]] = {}
        for width in sorted(set(width_of)):
            alike = [i for i in range(len(pieces)) if width_of[i] == width]
            for first in range(0, len(alike), batch):
                chosen = alike[first : first + batch]
                found = search([pieces[i][1] for i in chosen], width)
                translated.update(zip(chosen, found, strict=True))
        results = [[Translation("", 0.0)] * n_best for _ in sentences]
        for i, (sentence, _) in enumerate(pieces):
            results[sentence] = [
                Translation(f"{before.text} {new.text}".strip(), before.score + new.score)
                for before, new in zip(results[sentence], translated[i], strict=True)
            ]
        return results

    return translate


def describe(splits: Splits, stream: TokenBatches, max_length: int) -> str:
    """Of what a run is made, for its first lines."""
    dropped = {**splits.dropped, f"longer than {max_length} tokens": stream.dropped}
    left_out = [f"{number} {reason}" for reason, number in dropped.items() if number]
    return (
        f"{len(splits.train)} pairs to train, {len(splits.valid)} to validate, "
        f"{len(splits.test)} to test\nleft out: {', '.join(left_out) or 'none'}\n"
        f"{stream.steps_per_epoch} batches an epoch in {len(stream.shapes)} shapes, "
        f"{stream.padding:.0%} padding"
    )


class Assessment(NamedTuple):
    """Translations of a test split and what they are worth: BLEU, chrF, seconds to make them."""

    texts: list[str]
    scores: dict[str, Any]


def assess(
    translate: Translate, pairs: datasets.Dataset, note: Callable[[str], None] = print
) -> Assessment:
    """Translates all sources; notes ten samples, at most five of them wrong, and the scores."""
    sources, references = list(pairs["source"]), list(pairs["target"])
    begin = time.perf_counter()
    texts = [best.text for best, *_ in translate(sources)]
    seconds = time.perf_counter() - begin
    rows = list(zip(sources, references, texts, strict=True))
    right = [row for row in rows if row[1] == row[2]]
    wrong = [row for row in rows if row[1] != row[2]]
    few = max(min(5, len(wrong)), 10 - len(right))
    note(f"{len(right)} of {len(rows)} translations equal the reference; some of both kinds:")
    for source, reference, text in (right[: 10 - few] + wrong)[:10]:
        verdict = "" if text == reference else f"\n    WRONG, the reference is: {reference}"
        note(f"  {source}\n    {text}{verdict}")
    bleu, chrf = metrics.bleu(texts, references), metrics.chrf(texts, references)
    note(f"test BLEU {bleu}\ntest chrF {chrf}\n{len(rows)} sentences in {seconds:.1f} seconds")
    return Assessment(texts, {"bleu": bleu._asdict(), "chrf": chrf._asdict(), "seconds": seconds})


def read_lines(path: Path | None = None) -> Iterator[str]:
    """Lines of a file, or of stdin as they arrive.

    Raises:
        ValueError: bytes that are not UTF-8, named by line.
    """
    if path is None and sys.stdin.isatty():
        print("one sentence a line; Ctrl-D ends", file=sys.stderr)
    with sys.stdin.buffer if path is None else path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path or 'stdin'}, line {number}: byte 0x{line[error.start]:02x} is not "
                    "UTF-8: convert the text, for example with iconv -f latin1 -t utf-8"
                ) from None


def print_translations(
    translate: Translate, lines: Iterator[str], *, at_once: int, scores: bool = False
) -> tuple[str, str] | None:
    """Prints the translations of each line, with `scores` each as score, tab, text.

    Args:
        at_once: lines to read before any is translated; 1 answers a person line by line.

    Returns:
        The first line and its best translation; None where there is no line.
    """
    first = None
    while block := list(itertools.islice(lines, at_once)):
        found = translate(block)
        for hypotheses in found:
            for text, score in hypotheses:
                print(f"{score:.4f}\t{text}" if scores else text, flush=True)
        first = first or (block[0], found[0][0].text)
    return first


def attention_figure(
    model: Functional,
    params: Params,
    source_tokenizer: Tokenizer,
    target_tokenizer: Tokenizer,
    source: str,
    target: str,
    *,
    layer: int = -1,
) -> Figure:
    """How each token of a translation looks at the source, in every head of one decoder layer.

    Row i shows the step that writes token i; the last one writes <eos>. What exceeds the model's
    max_length is left out.
    """
    config: Any = model.skeleton.config
    limit = config.max_length
    source_ids = source_tokenizer.encode([source], eos=True)[0][:limit]
    target_ids = target_tokenizer.encode([target], bos=True, eos=True)[0][: limit + 1]
    device = next(iter(params.values())).device
    inputs = [torch.tensor([ids], device=device) for ids in (source_ids, target_ids[:-1])]
    with torch.no_grad():
        cross = model.apply(params, *inputs, method="attention_maps")["cross"][layer, 0]
    written, read = target_tokenizer.tokens(target_ids[1:]), source_tokenizer.tokens(source_ids)
    return pictures.attention_map(cross.float().cpu().numpy(), written, read)
