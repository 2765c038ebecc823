"""Reward models trained on pairs, all members of an ensemble in one vmapped step.

Under torchrun a single one is trained on the mesh as any decoder is, in shards; the members of an
ensemble are whole on every process, and the rows of a batch differ from process to process.

    params = train_rewards(setup, start, pairs, stage, seed, members, folder, resume)   # stacked
    reward = RewardModel(setup, params, "uncertainty")          # a reward on tokens, as any other

Dimension key: E members, P pairs, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from msfs_functional import random
from msfs_functional.aligning import Setup, Stage, optimizer_of, step_of
from msfs_functional.pairs import Encoded, Ids, Shuffled, padded
from msfs_functional.params import Params, cast, stack
from msfs_functional.reward_models import HEAD, aggregate, bradley_terry, last_rewards, with_head
from msfs_functional.scoring import in_parts
from msfs_functional.stages import run_stage
from msfs_functional.train import init_state

PANELS = {  # of curves: label and metric
    "loss of reward models": "loss",
    "share of training pairs ranked right": "accuracy",
    "margin of rewards": "margin",
}


def lengths_of(mask: Bool[Tensor, "... T"]) -> Tensor:
    """Tokens of each row up to the last one of its answer."""
    return (mask * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax(-1)


def reward_loss(setup: Setup, centring: float = 0.01):
    """Bradley-Terry on a batch of pairs, the rewards pulled to mean zero, with dropout."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        own = setup.ready(params)
        rewards = last_rewards(
            setup.model,
            {**own, HEAD: setup.whole(own[HEAD])},
            batch["tokens"].flatten(0, 1),
            batch["lengths"].flatten(),
            key=key if setup.dropout else None,
            implementation=setup.implementation,
        ).unflatten(0, (-1, 2))
        losses = bradley_terry(*rewards.unbind(1), centring=centring)
        margin = rewards[:, 0] - rewards[:, 1]
        return losses.mean(), {"accuracy": (margin > 0).float().mean(), "margin": margin.mean()}

    return setup.over_ranks(loss_fn)


def train_rewards(
    setup: Setup,
    start: Params,
    pairs: Encoded,
    stage: Stage,
    seed: int,
    members: int,
    folder: Path,
    resume: str,
) -> Params:
    """Stacked parameters of `members` reward models, (E, ...) each.

    Members begin as the decoder `start` with heads of their own, and see the same batches.
    """
    width, ensemble = start["norm.weight"].shape[0], members > 1
    begun = [with_head(start, width, seed + i) for i in range(members)]
    keys = random.split(random.key(seed, device=setup.device), members)
    optimizer = optimizer_of(stage)
    if ensemble:
        setup, state = setup.for_members(), init_state(stack(begun), optimizer, keys)
    else:
        state = init_state(setup.enter(begun[0]), optimizer, keys[0])
    data = {"tokens": pairs.tokens, "lengths": lengths_of(pairs.mask)}
    trained = run_stage(
        folder,
        stage.steps,
        state,
        step_of(setup, reward_loss(setup), optimizer, members=members if ensemble else None),
        Shuffled(data, stage.batch, seed, setup.share),
        device=setup.device,
        resume=resume,
        tokens=lambda batch: batch["lengths"].sum(),
    ).params
    return trained if ensemble else stack([setup.leave(trained)])


def rewards_of(
    setup: Setup, params: Params, rows: Sequence[tuple[Ids, Ids]], batch: int = 256
) -> Float[Tensor, "E N"]:
    """Rewards of each member for (prompt, answer) rows."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens, mask = padded(rows, min(-(-width // 8) * 8, setup.length))
    data = {"tokens": tokens.to(setup.device), "lengths": lengths_of(mask).to(setup.device)}
    frozen = cast(params, setup.dtype)

    def one(params: Params, tokens: Tensor, lengths: Tensor) -> Tensor:
        return last_rewards(setup.plain, params, tokens, lengths, implementation="flash")

    def every(tokens: Tensor, lengths: Tensor) -> Tensor:
        return torch.vmap(one, in_dims=(0, None, None))(frozen, tokens, lengths).T

    return in_parts(every, data, batch).T


def accuracy(rewards: Float[Tensor, "E P2"]) -> Float[Tensor, "E"]:
    """Share of pairs (rows: chosen, rejected, chosen, ...) that each member ranks right."""
    pairs = rewards.unflatten(1, (-1, 2))
    return (pairs[..., 0] > pairs[..., 1]).float().mean(1)


class RewardModel:
    """An ensemble as a reward function on tokens."""

    on_tokens = True

    def __init__(
        self,
        setup: Setup,
        params: Params,
        how: Literal["mean", "min", "uncertainty"] = "mean",
        penalty: float = 1.0,
    ):
        self.setup, self.params, self.penalty = setup, params, penalty
        self.how: Literal["mean", "min", "uncertainty"] = how

    def __call__(
        self, prompts: Sequence[Ids], completions: Sequence[Ids], metadata: Any = None
    ) -> Tensor:
        rows = list(zip(prompts, completions, strict=True))
        rewards = rewards_of(self.setup, self.params, rows)
        return aggregate(rewards, self.how, penalty=self.penalty)
