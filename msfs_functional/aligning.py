"""What the alignment recipes share: the task's data, the policy's first training, what it answers.

    task = read_task(...)                    # prompts and demonstrations as ids, a checker
    params = fine-tuned on task.demonstrations
    answers = answer(model, params, task, prompts, key)       # texts, ids, log-probabilities

Dimension key: N rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional import random
from msfs_functional.generation import GREEDY, Sampling, Settings
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.decoder import output_weight
from msfs_functional.pairs import Ids, Pair
from msfs_functional.params import Functional, Params, cast
from msfs_functional.rollouts import Roller, Rollout
from msfs_functional.scoring import answer_logps
from msfs_functional.synthetic import instructions as synthetic
from msfs_functional.tokenizer import EOS, PAD, Tokenizer, train_word_level


class Prompt(NamedTuple):
    """One prompt as text and as ids, with what the data knows of it."""

    text: str
    ids: Ids  # begin token included
    metadata: Any = None


@dataclass(frozen=True)
class Task:
    """What is to be learned, and how answers are judged."""

    tokenizer: Tokenizer
    prompts: list[Prompt]  # to train on
    held_out: list[Prompt]
    demonstrations: list[tuple[Ids, Ids]]  # (prompt, answer) to imitate


def built_in(seed: int, demonstrations: int, prompts: int, held_out: int) -> Task:
    """The task of `synthetic.instructions`."""
    shown = synthetic.demonstrations(seed, demonstrations)
    tokenizer = train_word_level([text for pair in shown for text in pair], 1000)

    def encoded(split: synthetic.Split, count: int) -> list[Prompt]:
        texts = [one.prompt for one in synthetic.instructions(seed + 1, count, split)]
        ids = tokenizer.encode(texts, bos=True)
        return [Prompt(*both) for both in zip(texts, ids, strict=True)]

    asked, given = zip(*shown, strict=True)
    pairs = zip(tokenizer.encode(asked, bos=True), tokenizer.encode(given, eos=True), strict=True)
    train, valid = encoded("train", prompts), encoded("valid", held_out)
    return Task(tokenizer, train, valid, list(pairs))


def fine_tuning_loss(model: Functional, dtype: torch.dtype, implementation: str):
    """Mean cross-entropy of the answers' tokens in packed rows [nats/token]."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        params = cast(params, dtype)
        states = model.apply(
            params,
            batch["tokens"],
            segment_ids=batch["segments"],
            positions=batch["positions"],
            implementation=implementation,
            method="hidden",
        )
        weight = output_weight(params)
        total, count = linear_cross_entropy(states, weight, batch["labels"], ignore_index=PAD)
        return total / count.clamp(min=1), {"weight": count}

    return loss_fn


class Answers(NamedTuple):
    """Completions of prompts, in their order, samples of a prompt one after the other."""

    texts: list[str]
    ids: list[list[int]]
    rollouts: list[Rollout]


def answer(
    model: Functional,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    key: Tensor,
    *,
    new: int,
    samples: int = 1,
    temperature: float = 1.0,
    batch: int = 256,
    dtype: torch.dtype | None = None,
    implementation: str = "flash",
    compile: bool | None = None,
) -> Answers:
    """Answers of a policy; every batch has `batch` rows of prompts, the last one filled up."""
    kind = Sampling(temperature) if temperature else GREEDY
    settings = Settings(new, kind, samples=samples, stop_tokens=(EOS,), pad=PAD)
    roll = Roller(
        model, params, settings, dtype=dtype, compile=compile, implementation=implementation
    )
    batch = min(batch, len(prompts))
    ids: list[list[int]] = []
    rollouts = []
    for start in range(0, len(prompts), batch):
        rows = [min(i, len(prompts) - 1) for i in range(start, start + batch)]
        keys = torch.stack([random.fold_in(key, i) for i in range(start, start + batch)])
        rollouts.append(roll([prompts[i].ids for i in rows], keys))
        ids += rollouts[-1].completions()
    ids = ids[: len(prompts) * samples]
    return Answers(tokenizer.decode(ids), ids, rollouts)


def drift(
    model: Functional,
    params: Params,
    reference: Params,
    rollouts: Sequence[Rollout],
    rows: int,
    *,
    dtype: torch.dtype,
    implementation: str,
) -> float:
    """KL(policy || reference) [nats an answer], estimated from the policy's own answers (k1)."""
    total = 0.0
    with torch.no_grad():
        policy, before = cast(params, dtype), cast(reference, dtype)
        for rollout in rollouts:
            part = Rollout(*(x[:rows] for x in rollout))
            rows -= len(part.tokens)
            both = [
                answer_logps(model, p, part.tokens, part.mask, implementation=implementation)
                for p in (policy, before)
            ]
            total += float((both[0] - both[1]).sum())
    return total


def sampled_pairs(
    prompts: Sequence[Prompt],
    answers: Answers,
    scores: Sequence[float],
    *,
    most: int = 1,
) -> list[Pair]:
    """Pairs of answers to one prompt whose scores differ: the best with the worst, then the next.

    Args:
        scores: of each answer.
        most: pairs of one prompt.
    """
    samples = len(answers.ids) // len(prompts)
    pairs = []
    for i, prompt in enumerate(prompts):
        mine = range(i * samples, (i + 1) * samples)
        order = sorted(mine, key=lambda n: scores[n], reverse=True)
        for high, low in list(zip(order, order[::-1], strict=True))[: min(most, samples // 2)]:
            if scores[high] > scores[low]:
                pairs.append(Pair(prompt.ids, answers.ids[high], answers.ids[low]))
    return pairs
