"""Preference tuning of encoder-decoders: translations sampled, judged, and preferred.

    sentences -> sample_translations -> judged_pairs (quality against the references)
              -> pair_data (reference log-probabilities) -> pair_sums -> preference.dpo

A preference loss sees sums of log-probabilities only, so nothing of it knows of encoders.

Dimension key: P pairs, B sentences, S source tokens, T target tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from sacrebleu.metrics.bleu import BLEU
from torch import Tensor

from msfs_functional import metrics, random
from msfs_functional.decoding import sample
from msfs_functional.logps import sequence_logps, token_logps
from msfs_functional.models.transformer import output_weight
from msfs_functional.params import Functional, Params
from msfs_functional.scoring import in_parts
from msfs_functional.tokenizer import BOS, EOS, PAD

Ids = list[int]
SENTENCE = BLEU(effective_order=True)  # of the orders that a sentence has


class TranslationPair(NamedTuple):
    """Ids of a sentence and of two translations of it, end tokens included."""

    source: Ids
    chosen: Ids
    rejected: Ids


def padded(rows: Sequence[Sequence[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids padded on the right, lengths)."""
    width = width or max(map(len, rows))
    tokens = torch.full((len(rows), width), PAD)
    for n, row in enumerate(rows):
        tokens[n, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])


def sample_translations(
    model: Functional,
    params: Params,
    sources: Sequence[Ids],
    key: Tensor,
    *,
    samples: int,
    temperature: float = 1.0,
    extra: int = 10,
    batch: int = 64,
    implementation: str = "flash",
) -> list[list[Ids]]:
    """Samples of each sentence, with their end token where they have one.

    Args:
        sources: ids of the sentences, as the model reads them.
        extra: a translation has at most so many tokens more than its sentence.
    """
    device = next(iter(params.values())).device
    found: list[list[Ids]] = [[] for _ in sources]
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))  # like lengths together

    def step(params: Params, tokens: Tensor, cache, position: Tensor):
        logits, cache = model.apply(
            params, tokens[:, None], cache, position, method="decode", implementation=implementation
        )
        return logits[:, 0], cache

    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        tokens, lengths = (x.to(device) for x in padded([sources[i] for i in rows]))
        most = min(tokens.shape[1] + extra, model.skeleton.config.max_length)  # pyright: ignore
        with torch.no_grad():
            memory = model.apply(
                params, tokens, lengths, method="encode", implementation=implementation
            )
            cache = model.apply(params, memory, lengths, most, samples, method="init_cache")
            made = sample(
                partial(step, params),
                cache,
                random.fold_in(key, start).to(device),
                batch=len(rows) * samples,
                max_length=most,
                temperature=temperature,
                bos=BOS,
                eos=EOS,
                pad=PAD,
            )
        ids = [row[:n] for row, n in zip(made.tokens.tolist(), made.lengths.tolist(), strict=True)]
        for n, i in enumerate(rows):
            found[i] = ids[n * samples : (n + 1) * samples]
    return found


def quality(text: str, truth: str) -> float:
    """The mean of a sentence's chrF and BLEU [points of 100]: chrF alone prefers long ones."""
    return (metrics.chrf([text], [truth]).value + SENTENCE.sentence_score(text, [truth]).score) / 2


def judged_pairs(
    sources: Sequence[Ids],
    translations: Sequence[Sequence[Ids]],
    texts: Sequence[Sequence[str]],
    references: Sequence[str],
    *,
    gap: float = 5.0,
) -> list[TranslationPair]:
    """The best and the worst translation of each sentence, where their `quality` differs enough.

    Args:
        texts: of the translations; references: what people wrote.
        gap: least difference of the two, in points of 100.
    """
    pairs = []
    for source, ids, found, truth in zip(sources, translations, texts, references, strict=True):
        scores = [quality(text, truth) for text in found]
        order = sorted(range(len(found)), key=scores.__getitem__)
        worst, best = order[0], order[-1]
        if scores[best] - scores[worst] >= gap:
            pairs.append(TranslationPair(source, ids[best], ids[worst]))
    return pairs


def pair_sums(
    model: Functional,
    params: Params,
    batch: dict[str, Tensor],
    implementation: str = "flash",
    *,
    key: Tensor | None = None,
) -> tuple[Float[Tensor, "P 2"], Float[Tensor, "P 2"]]:
    """(sums of log-probabilities [nats], lengths) of chosen and rejected.

    Args:
        batch: source (P, S), source_lengths (P,), target (P, 2, 1 + T) that begins with BOS.
        key: of dropout; None: none.
    """
    target = batch["target"].flatten(0, 1)
    labels, twice = target[:, 1:], lambda x: x.repeat_interleave(2, 0)
    states = model.apply(
        params,
        twice(batch["source"]),
        target[:, :-1],
        source_lengths=twice(batch["source_lengths"]),
        key=key,
        implementation=implementation,
        method="hidden",
    )
    logps = token_logps(states, output_weight(params), labels)
    sums, lengths = sequence_logps(logps, labels != PAD)
    return sums.unflatten(0, (-1, 2)), lengths.unflatten(0, (-1, 2))


def pair_data(
    model: Functional,
    reference: Params,
    pairs: Sequence[TranslationPair],
    implementation: str = "flash",
) -> dict[str, Tensor]:
    """Batches' tensors of all pairs, with the reference's sums, computed once.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError(
            "0 pairs: no two translations of a sentence differ enough; sample more of each, or "
            "lower the gap"
        )
    device = next(iter(reference.values())).device
    source, lengths = padded([pair.source for pair in pairs])
    sides = [[BOS, *side] for pair in pairs for side in (pair.chosen, pair.rejected)]
    target = padded(sides)[0].unflatten(0, (-1, 2))
    data = {"source": source, "source_lengths": lengths, "target": target}
    data = {name: x.to(device) for name, x in data.items()}

    def sums(**batch: Tensor) -> Tensor:
        return pair_sums(model, reference, batch, implementation)[0]

    return {**data, "reference": in_parts(sums, data, 64)}
