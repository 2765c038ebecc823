"""Training a decoder on preference pairs with any of the losses of `preference`.

    data = as_data(own, setup, reference, pairs)       # the reference's sums are part of the data
    params = optimise(own, setup, reference, data, seed, folder, resume)

Dimension key: P pairs, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from msfs_functional import preference_variants as variants
from msfs_functional import random
from msfs_functional.aligning import Setup, Stage, optimizer_of, step_of
from msfs_functional.collectives import all_gather, group_size
from msfs_functional.logps import sequence_logps
from msfs_functional.pairs import Pair, Shuffled, encode_pairs, padded
from msfs_functional.params import Params, cast
from msfs_functional.preference import dpo, dpo_hinge, ipo, kto, kto_kl, orpo, robust_dpo, simpo
from msfs_functional.scoring import answer_logps, in_parts
from msfs_functional.stages import run_stage
from msfs_functional.train import init_state

Loss = Literal[
    "sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "kto",
    "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "aot",
]  # fmt: skip
FUNCTIONS = {  # of sums and the reference's
    "sigmoid": dpo, "cdpo": dpo, "hinge": dpo_hinge, "robust": robust_dpo, "exo": variants.exo,
    "nca": variants.nca, "bco": variants.bco, "sppo": variants.sppo, "aot": variants.aot,
    "apo_zero": variants.apo_zero, "apo_down": variants.apo_down,
}  # fmt: skip
BETA = "beta"  # a member's own, in sweeps: a leaf that the optimizer leaves alone
PANELS = {  # of curves: label and metric
    "loss": "loss",
    "margin of implicit rewards": "margin",
    "share of pairs agreed with": "accuracy",
    "log-ratio of the chosen [nats]": "chosen_logratio",
}
BETAS = {"ipo": 0.1, "simpo": 2.0, "orpo": 1.0}  # of losses that are not on the scale of DPO


@dataclass(frozen=True)
class Preferences(Stage):
    """The stage of preferences."""

    loss: Loss = "sigmoid"
    beta: float | None = None  # strength of the pull to the reference; None: one that suits
    label_smoothing: float = 0.1  # cdpo, robust: share of preferences believed to be flipped
    margin: float = 1.0  # simpo: between mean log-probabilities, times beta
    # log-probabilities a token in place of an answer's, which simpo, orpo and ipo take anyway
    normalised: bool = False
    # weight of the mean negative log-probability of the chosen answer's tokens (RPO, Pang et al.
    # 2024), which keeps the chosen answers from becoming improbable beside the rejected ones
    imitation: float = 0.2
    right: bool = True  # whether the chosen answer must be right, or only better than the other
    rounds: int = 2  # times that the policy answers, its answers are judged and it learns
    samples: int = 4  # answers to each prompt, which pairs are made of
    flipped: float = 0.0  # share of pairs to swap on purpose, for cdpo, robust and --influence


def beta_of(own: Preferences) -> float:
    """The configured beta, or one that suits the loss."""
    usual = 1.0 if own.normalised else 0.1  # on nats a token there are fewer of them
    return own.beta or BETAS.get(own.loss, usual)


def check(own: Preferences, *betas: float) -> None:
    """Raises ValueError for options out of range; betas: further ones to try."""
    for name, beta in [("dpo.beta", own.beta), *(("sweep", beta) for beta in betas)]:
        if beta is not None and not beta > 0:
            raise ValueError(f"--{name} ({beta}) must be above 0: leave it out for one that suits")
    smoothing = own.label_smoothing
    if own.loss in ("cdpo", "robust") and not 0 <= smoothing < 0.5:
        raise ValueError(f"--dpo.label-smoothing ({smoothing}) must be in [0, 0.5)")
    if own.normalised and own.loss == "kto":
        raise ValueError(
            "--dpo.normalised does not go with kto, whose reference point is of whole answers: "
            "leave it out"
        )
    if not 0 <= own.flipped < 1:
        raise ValueError(f"--dpo.flipped ({own.flipped}) must be in [0, 1)")


def preference_loss(
    own: Preferences,
    sums: Tensor,
    lengths: Tensor,
    reference: Tensor,
    wrong: Tensor | None = None,
    wrong_reference: Tensor | None = None,
    beta: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(losses, margins of the implicit rewards) of B pairs.

    Args:
        sums, lengths, reference: (B, 2), chosen then rejected.
        wrong, wrong_reference: (B,), answers under another prompt, for KTO.
        beta: in place of the configured one.
    """
    beta = beta if beta is not None else beta_of(own)
    means = (sums / lengths).unbind(1)
    if own.normalised:
        sums, reference = sums / lengths, reference / lengths
    sides, before = sums.unbind(1), reference.unbind(1)
    options: dict[str, Any] = {"beta": beta}
    if own.loss in ("cdpo", "robust"):
        options["label_smoothing"] = own.label_smoothing
    if own.loss == "kto":
        assert wrong is not None and wrong_reference is not None
        good = torch.tensor([True, False], device=sums.device).repeat(len(sums))
        kl = kto_kl(wrong, wrong_reference)
        losses, rewards = kto(sums.flatten(), reference.flatten(), good, kl, **options)
        rewards = rewards.unflatten(0, (-1, 2))
        return losses.unflatten(0, (-1, 2)).sum(1), rewards[:, 0] - rewards[:, 1]
    if own.loss == "simpo":
        out = simpo(*means, margin=own.margin, **options)
    elif own.loss == "orpo":
        out = orpo(*means, **options)
    elif own.loss == "ipo":  # on means, which keeps its target independent of the lengths
        before = before if own.normalised else (reference / lengths).unbind(1)
        out = ipo(*means, *before, **options)
    else:
        out = FUNCTIONS[own.loss](*sides, *before, **options)
    return out.losses, out.margins


def sums_of(own: Preferences, setup: Setup, params: Params, batch: dict[str, Tensor]) -> Tensor:
    """Log-probabilities of the answers of P pairs: (2 P,), for KTO P more under other prompts."""
    rows, mask = batch["tokens"].flatten(0, 1), batch["mask"].flatten(0, 1)
    if own.loss == "kto":
        rows = torch.cat([rows, batch["wrong"]])
        mask = torch.cat([mask, batch["wrong_mask"]])
    params = setup.ready(params)
    logps = answer_logps(setup.model, params, rows, mask, implementation=setup.implementation)
    return sequence_logps(logps, mask)[0]


def loss_of(
    own: Preferences,
    sums: Tensor,
    batch: dict[str, Tensor],
    beta: Tensor | None = None,
    groups: Sequence[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss and figures of a batch, from what `sums_of` gives.

    Args:
        groups: of processes with other pairs, all of which then make the batch: KTO's reference
            point and AOT's order are of all of it.
    """

    def every(x: Tensor) -> Tensor:
        for group in groups if len(x) else ():
            x = all_gather(x, 0, len(x) * group_size(group), group)
        return x

    count = 2 * len(batch["tokens"])
    sides = every(sums[:count].unflatten(0, (-1, 2)))
    lengths, reference = every(batch["mask"].sum(-1)), every(batch["reference"])
    wrong = every(sums[count:]), every(batch.get("wrong_reference", sums[:0]))
    losses, margins = preference_loss(own, sides, lengths, reference, *wrong, beta)
    loss = losses.mean()
    if own.imitation and own.loss != "orpo":  # which has it already
        loss = loss - own.imitation * (sides / lengths)[:, 0].mean()
    return loss, {
        "margin": margins.mean(),
        "accuracy": (margins > 0).float().mean(),
        "chosen_logratio": (sides - reference)[:, 0].mean().detach(),
    }


def make_loss(own: Preferences, setup: Setup, *, half: bool = False):
    """Mean loss of a batch of pairs, whose reference log-probabilities are part of the data.

    Args:
        setup: the loss is over the rows of all processes of its model's mesh.
        half: of the batch's pairs a half counts, drawn by the key, so that members of a vmapped
            step that differ in their keys alone learn from other pairs.
    """

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        if half:
            rows = len(batch["tokens"])
            drawn = random.permutation(key, rows)[: rows // 2]
            batch = {name: x[drawn] for name, x in batch.items()}
        beta = params[BETA].detach() if BETA in params else None
        body = {name: value for name, value in params.items() if name != BETA}
        return loss_of(own, sums_of(own, setup, body, batch), batch, beta, setup.groups)

    return setup.over_ranks(loss_fn)


# -------------------------------------------------------------------------------------------- data


def flip(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], Tensor]:
    """The pairs with this share of them swapped, and which ones."""
    swapped = random.bernoulli(random.key(seed + 7), share, (len(pairs),))
    mixed = [
        pair._replace(chosen=pair.rejected, rejected=pair.chosen) if swap else pair
        for pair, swap in zip(pairs, swapped.tolist(), strict=True)
    ]
    return mixed, swapped


def as_data(own: Preferences, setup: Setup, params: Params, pairs: list[Pair]) -> dict[str, Tensor]:
    """Pairs as tensors, with the reference's log-probabilities."""
    encoded = encode_pairs(pairs, longest=setup.length)
    data = {"tokens": encoded.tokens, "mask": encoded.mask}
    if own.loss == "kto":  # each prompt with the chosen answer of the next pair
        wrong = [
            (one.prompt, other.chosen[: encoded.tokens.shape[-1] - len(one.prompt)])
            for one, other in zip(pairs, [*pairs[1:], pairs[0]], strict=True)
        ]
        data["wrong"], data["wrong_mask"] = padded(wrong, encoded.tokens.shape[-1])
    return with_reference(setup, params, data)


def with_reference(setup: Setup, params: Params, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The data with the sums of the reference's log-probabilities, computed once."""
    data = {name: x.to(setup.device) for name, x in data.items()}
    frozen = cast(params, setup.dtype)

    def sums(tokens: Tensor, mask: Tensor) -> Tensor:
        logps = answer_logps(setup.plain, frozen, tokens, mask, implementation=setup.implementation)
        return sequence_logps(logps, mask)[0]

    flat = {name: data[name].flatten(0, 1) for name in ("tokens", "mask")}
    data["reference"] = in_parts(sums, flat, 256).unflatten(0, (-1, 2))
    if "wrong" in data:
        wrong = {"tokens": data["wrong"], "mask": data["wrong_mask"]}
        data["wrong_reference"] = in_parts(sums, wrong, 256)
    return data


def implicit_accuracy(setup: Setup, params: Params, data: dict[str, Tensor]) -> float:
    """Share of pairs whose chosen answer the policy has come to prefer more than the reference."""
    after = with_reference(setup, params, {name: data[name] for name in ("tokens", "mask")})
    gain = after["reference"] - data["reference"]
    return float((gain[:, 0] > gain[:, 1]).float().mean())


def optimise(
    own: Preferences,
    setup: Setup,
    params: Params,
    data: dict[str, Tensor],
    seed: int,
    folder: Path,
    resume: str,
) -> Params:
    """The parameters move, the reference stays in the data."""
    optimizer = optimizer_of(own)
    trained = run_stage(
        folder,
        own.steps,
        init_state(setup.enter(params), optimizer, random.key(seed, device=setup.device)),
        step_of(setup, make_loss(own, setup), optimizer),
        Shuffled(data, own.batch, seed, setup.share),
        device=setup.device,
        resume=resume,
        tokens=lambda batch: batch["mask"].sum(),
    )
    return setup.leave(trained.params)
