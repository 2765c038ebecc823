"""A policy's answers to prompts, and what a checker says of them.

    answers = answer(setup, params, task, prompts, key)       # texts, ids, log-probabilities
    figures = assess(setup, params, reference, task, seed)    # what the checker finds right, KL
    pairs = own_pairs(setup, task, params, prompts, seed, 4)  # better and worse answers

Dimension key: N rows, T tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional import agreement, random
from msfs_functional.aligning import Setup
from msfs_functional.alignment_tasks import Prompt, Task
from msfs_functional.generation import GREEDY, Sampling, Settings
from msfs_functional.pairs import Pair
from msfs_functional.params import Params, cast
from msfs_functional.preference import check_reference
from msfs_functional.rewards import called
from msfs_functional.rollouts import Roller, Rollout
from msfs_functional.scoring import answer_logps
from msfs_functional.tokenizer import EOS, PAD


class Answers(NamedTuple):
    """Completions of prompts, in their order, samples of a prompt one after the other."""

    texts: list[str]
    ids: list[list[int]]
    rollouts: list[Rollout]


def answer(
    setup: Setup,
    params: Params,
    task: Task,
    prompts: Sequence[Prompt],
    key: Tensor,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    batch: int = 256,
    first: int = 0,
) -> Answers:
    """Answers of a policy; every batch has `batch` rows of prompts, the last one filled up.

    Args:
        first: number of the first prompt among all that the key is for.
    """
    kind = Sampling(temperature) if temperature else GREEDY
    settings = Settings(task.new, kind, samples=samples, stop_tokens=(EOS,), pad=PAD)
    batch = min(batch, len(prompts))
    roll = roller(setup._replace(compile=False), params, settings)  # compiling takes longer
    ids: list[list[int]] = []
    rollouts = []
    for start in range(0, len(prompts), batch):
        rows = [min(i, len(prompts) - 1) for i in range(start, start + batch)]
        keys = torch.stack([random.fold_in(key, first + i) for i in range(start, start + batch)])
        rollouts.append(roll([prompts[i].ids for i in rows], keys))
        ids += rollouts[-1].completions()
    ids = ids[: len(prompts) * samples]
    return Answers(task.tokenizer.decode(ids), ids, rollouts)


def roller(setup: Setup, params: Params, settings: Settings, **options: Any) -> Roller:
    return Roller(
        setup.plain,
        params,
        settings,
        dtype=setup.dtype,
        compile=setup.compile,
        implementation=setup.implementation,
        **options,
    )


def drift(
    setup: Setup, params: Params, reference: Params, rollouts: Sequence[Rollout], rows: int
) -> float:
    """KL(policy || reference) [nats an answer], from `rows` of the policy's own answers (k1)."""
    check_reference(params, reference)
    total, left = 0.0, rows
    with torch.no_grad():
        both = cast(params, setup.dtype), cast(reference, setup.dtype)
        for rollout in rollouts:
            part = Rollout(*(x[:left] for x in rollout))
            left -= len(part.tokens)
            after, before = (
                answer_logps(
                    setup.plain, p, part.tokens, part.mask, implementation=setup.implementation
                )
                for p in both
            )
            total += float((after - before).sum())
    return total / rows


class Figures(NamedTuple):
    """Of a policy on held-out prompts."""

    sampled: float  # share of right answers at temperature 1
    greedy: float
    kl: float  # nats an answer, to the policy before
    length: float  # tokens of a sampled answer
    texts: list[str]  # greedy


def assess(setup: Setup, params: Params, reference: Params, task: Task, seed: int) -> Figures:
    """The checker's verdict on answers to held-out prompts."""
    assert task.right is not None
    key, asked = random.key(seed + 1000, device=setup.device), task.held_out
    both = [
        answer(setup, params, task, asked, key, temperature=temperature)
        for temperature in (1.0, 0.0)
    ]
    texts, metadata = [p.text for p in asked], [p.metadata for p in asked]
    sampled, greedy = (
        float(called(task.right, texts, each.texts, metadata).mean()) for each in both
    )
    kl = drift(setup, params, reference, both[0].rollouts, len(asked))
    length = sum(map(len, both[0].ids)) / len(asked)
    return Figures(sampled, greedy, kl, length, both[1].texts)


def own_pairs(
    setup: Setup,
    task: Task,
    params: Params,
    prompts: Sequence[Prompt],
    seed: int,
    samples: int,
    *,
    right: bool = True,
) -> list[Pair]:
    """Pairs of a policy's answers to each prompt, of which the checker's grades prefer one.

    Each process answers a part of the prompts; all get all pairs.

    Args:
        right: whether the preferred answer must be right in all; else the better grade will do.
    """
    key = random.key(seed, device=setup.device)
    number, count = setup.place
    first, last = (len(prompts) * i // count for i in (number, number + 1))
    mine, pairs = prompts[first:last], []
    with agreement.together():
        if mine:
            answers = answer(setup, params, task, mine, key, samples=samples, first=first)
            asked = [prompt for prompt in mine for _ in range(samples)]
            texts, metadata = [p.text for p in asked], [p.metadata for p in asked]
            assert task.graded is not None
            scores = called(task.graded, texts, answers.texts, metadata).tolist()
            pairs = best_with_worst(mine, answers, scores, least=1.0 if right else -math.inf)
    return [pair for part in agreement.from_all(pairs) for pair in part]


def best_with_worst(
    prompts: Sequence[Prompt],
    answers: Answers,
    scores: Sequence[float],
    *,
    most: int = 2,
    least: float = -math.inf,
) -> list[Pair]:
    """Pairs of answers to one prompt whose scores differ: the best with the worst, then the next.

    Args:
        scores: of each answer.
        most: pairs of one prompt.
        least: score that the better answer must have.
    """
    samples = len(answers.ids) // len(prompts)
    pairs = []
    for i, prompt in enumerate(prompts):
        mine = range(i * samples, (i + 1) * samples)
        order = sorted(mine, key=lambda n: scores[n], reverse=True)
        for high, low in list(zip(order, order[::-1], strict=True))[: min(most, samples // 2)]:
            if scores[high] > scores[low] and scores[high] >= least:
                pairs.append(Pair(prompt.ids, answers.ids[high], answers.ids[low]))
    return pairs
