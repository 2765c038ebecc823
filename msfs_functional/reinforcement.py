"""PPO, GRPO, Dr. GRPO, RLOO and REINFORCE++ on a decoder: rollouts in, experience and losses out.

    found = opinions(rl, setup, params, reference, rollout, new)  # policy, critic, reference
    buffer = experience(rl, found, scores, coefficient)          # advantages, weights
    state, metrics = step(state, minibatch(rl, buffer, ...))     # step_of(setup, make_loss(...))

The algorithms differ in how advantages are made and averaged, and in nothing else. `ppo` and
`advantages` hold the formulas; this is what stands around them.

Dimension key: N rows, T tokens, D width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from msfs_functional import advantages as adv
from msfs_functional import masked, ppo, random
from msfs_functional.aligning import Setup
from msfs_functional.collectives import psum
from msfs_functional.curvature import trust_region_step
from msfs_functional.gathering import Sharded, sharded
from msfs_functional.params import Params, cast
from msfs_functional.rollouts import Rollout
from msfs_functional.scoring import answer_logps, answer_statistics
from msfs_functional.train import TrainState

VALUE = "value.weight"  # of the critic, which reads the policy's states
Buffer = dict[str, Tensor]


@dataclass(frozen=True)
class Learning:
    """The stage of reinforcement."""

    # ppo: with a critic; grpo, dr_grpo: advantages within the answers to a prompt; rloo: the same,
    # leave-one-out, ratios of whole answers; reinforce: REINFORCE++, whitened returns
    algorithm: Literal["ppo", "grpo", "dr_grpo", "rloo", "reinforce"] = "grpo"
    # "rule" (the checker), "model" (an ensemble trained on its preferences) or FILE.py:FUNCTION
    reward: str = "rule"
    iterations: int = 40  # rollouts
    prompts: int = 32  # of a rollout
    samples: int = 8  # answers to each
    epochs: int = 1  # passes over a rollout
    minibatches: int = 4  # updates of a pass
    rate: float = 5e-4  # peak learning rate
    warmup: int = 10  # updates
    # KL of an update [nats a token]: a natural gradient step by the exact Fisher matrix in place of
    # the optimizer's; None: the optimizer
    trust_region: float | None = None
    temperature: float = 1.0  # of the rollouts
    clip: float = 0.2  # of ratios
    clip_high: float | None = None  # above 1, where it differs
    # coefficient of the pull to the reference; None: 0.02, and 1 against a reward model, which is
    # not to be believed far from the answers that it was trained on
    kl: float | None = None
    # where the pull is; None: loss for grpo and dr_grpo, reward for the others
    kl_in: Literal["reward", "loss"] | None = None
    estimator: Literal["k1", "k2", "k3"] = "k3"  # of the pull in the loss; in the reward it is k1
    target_kl: float | None = None  # nats an answer that the coefficient is steered to; None: fixed
    horizon: int = 2000  # answers over which a full error moves the coefficient by 20%
    gamma: float = 1.0  # discount of a token
    lam: float = 0.95  # of GAE
    value_weight: float = 0.1  # of the critic's loss
    value_clip: float = 0.2  # of the critic's step
    entropy: float = 0.0  # weight of the bonus [1/nat]
    truncation: float = 2.0  # most that a token's trainer / sampler ratio may weigh
    members: int = 4  # reward models
    aggregate: Literal["mean", "min", "uncertainty"] = "min"  # of their rewards
    penalty: float = 1.0  # of their variance, with "uncertainty"
    # fresh: prompts are answered by the newest parameters; ahead: by those before the last updates;
    # beside: the same numbers, made by a process of its own while this one updates
    rollouts: Literal["fresh", "ahead", "beside"] = "fresh"
    # of that process: cuda:1, cpu; None: a GPU that no process of the run has, if there is one
    beside_on: str | None = None
    patience: int = 3  # rollouts in a row without a usable reward before the run stops

    @property
    def pull(self) -> float:
        """The coefficient that `kl` stands for."""
        return self.kl if self.kl is not None else 1.0 if self.reward == "model" else 0.02


# ------------------------------------------------------------------------------------- experience


def kl_in_reward(rl: Learning) -> bool:
    return (rl.kl_in or ("loss" if "grpo" in rl.algorithm else "reward")) == "reward"


def body(params: Params) -> Params:
    """The policy without its critic."""
    return {name: value for name, value in params.items() if name != VALUE}


def opinions(
    rl: Learning, setup: Setup, params: Params, reference: Params, rollout: Rollout, new: int
) -> Buffer:
    """What policy, critic and reference think of each token, without gradients.

    Args:
        new: tokens of the longest answer.
    """
    tokens, mask = rollout.tokens, rollout.mask
    own, before = cast(params, setup.dtype), cast(reference, setup.dtype)
    options: dict[str, Any] = {
        "most": len(tokens) * new,  # prompts cost nothing
        "temperature": rl.temperature,
        "implementation": setup.implementation,
    }
    with torch.no_grad():
        logps, entropies, values = answer_statistics(
            setup.plain, body(own), tokens, mask, head=own.get(VALUE), **options
        )
        return {
            "tokens": tokens,
            "mask": mask,
            "logps": logps,
            "reference": answer_logps(setup.plain, before, tokens, mask, **options),
            "entropies": entropies,
            # the sampler computes in another order, and says what it thinks at temperature 1
            "sampler": rollout.logps if rl.temperature == 1 else logps,
            "values": values,
        }


def experience(rl: Learning, found: Buffer, scores: Tensor, coefficient: Tensor) -> Buffer:
    """All that updates need of a rollout: opinions, and the advantages of the rewards."""
    mask, logps, values = found["mask"], found["logps"], found["values"]
    kl = ppo.kl_estimate(logps, found["reference"], "k1")
    penalty = coefficient if kl_in_reward(rl) else 0.0
    per_token = adv.token_rewards(scores, mask, kl=kl, kl_coefficient=penalty)
    returns = torch.zeros_like(logps)
    if rl.algorithm == "ppo":
        advantages, returns = adv.gae(per_token, values, mask, gamma=rl.gamma, lam=rl.lam)
        advantages = masked.whiten(advantages, mask)
    elif rl.algorithm == "reinforce":
        advantages = adv.discounted_returns(per_token, mask, gamma=rl.gamma)
        advantages = masked.whiten(advantages, mask)
    else:
        whole = per_token.sum(-1)
        if rl.algorithm == "rloo":
            each = adv.leave_one_out_advantages(whole, rl.samples)
        else:
            scale = "group" if rl.algorithm == "grpo" else "none"
            each = adv.group_advantages(whole, rl.samples, scale=scale)
        advantages = torch.where(mask, each[:, None], 0.0)
    weights = ppo.importance_weights(logps, found["sampler"], mask, maximum=rl.truncation)
    kept = {name: value for name, value in found.items() if name != "sampler"}
    return {**kept, "advantages": advantages, "returns": returns, "weights": weights}


def empty_buffer(rl: Learning, width: int, device: str) -> Buffer:
    """A buffer of the shapes that every rollout has."""
    shape = (rl.prompts * rl.samples, width)
    buffer = {
        name: torch.zeros(shape, device=device)
        for name in (
            "logps", "reference", "advantages", "values", "returns", "weights", "entropies",
        )
    }  # fmt: skip
    buffer["tokens"] = torch.zeros(shape, dtype=torch.int64, device=device)
    buffer["mask"] = torch.zeros(shape, dtype=torch.bool, device=device)
    return buffer


def empty_answers(rl: Learning, width: int, device: str) -> Buffer:
    """Answers in flight (`answerers`) where there are none."""
    buffer = empty_buffer(rl, width, device)
    found = {name: buffer[name] for name in ("tokens", "mask", "logps")}
    return {**found, "ended": found["mask"][:, 0].clone(), "scores": found["logps"][:, 0].clone()}


def minibatch(
    rl: Learning, buffer: Buffer, key: Tensor, iteration: int, part: int, share: tuple[int, int]
) -> Buffer:
    """This process's rows of update `part` of a rollout, in an order of their own each pass."""
    epoch, number = divmod(part, rl.minibatches)
    rows = len(buffer["tokens"])
    order = random.permutation(random.fold_in(random.fold_in(key, iteration), 2 + epoch), rows)
    size = rows // rl.minibatches
    chosen = order[number * size : (number + 1) * size].tensor_split(share[1])[share[0]]
    return {name: value[chosen] for name, value in buffer.items()}


def told(buffer: Buffer, scores: Tensor, ended: Tensor, seconds: float) -> dict[str, Any]:
    """Figures of a rollout."""
    mask = buffer["mask"]
    made = mask.sum()
    drift = (buffer["logps"] - buffer["reference"]).sum(-1)
    return {
        "reward": scores.mean(),
        "reward_spread": scores.std(),
        "kl": drift.mean(),
        "rollout_entropy": masked.masked_mean(buffer["entropies"], mask),
        "length": mask.sum(-1).float().mean(),
        "ended": ended.float().mean(),
        "rollout_tokens/s": float(made) / seconds,
    }


def collected(setup: Setup, rows: Tensor) -> Tensor:
    """The rows of all processes, in the order that one process would have them."""
    if setup.place[1] == 1:
        return rows
    plain = rows.to(torch.uint8) if rows.dtype == torch.bool else rows.contiguous()
    parts = [torch.empty_like(plain) for _ in range(setup.place[1])]
    dist.all_gather(parts, plain)
    return torch.cat(parts).to(rows.dtype)


# ----------------------------------------------------------------------------------------- updates


def make_loss(rl: Learning, setup: Setup, new: int):
    """The clipped surrogate of a minibatch, with what the algorithm adds to it.

    Args:
        new: tokens of the longest answer.
    """
    over = {"grpo": "sequences", "rloo": "sequences", "dr_grpo": "constant"}.get(
        rl.algorithm, "tokens"
    )
    level = "sequence" if rl.algorithm == "rloo" else "token"

    def loss_fn(params: Params, batch: Buffer, key: Tensor):
        own, mask = setup.ready(params), batch["mask"]
        logps, entropies, values = answer_statistics(
            setup.model,
            body(own),
            batch["tokens"],
            mask,
            head=setup.whole(params[VALUE]) if VALUE in params else None,
            most=len(mask) * new,
            temperature=rl.temperature,
            implementation=setup.implementation,
        )
        out = ppo.policy_loss(
            logps,
            batch["logps"],
            batch["advantages"],
            mask,
            clip=rl.clip,
            clip_high=rl.clip_high,
            level=level,
        )
        losses = out.losses * batch["weights"]
        if not kl_in_reward(rl):
            losses = losses + batch["coefficient"][0] * ppo.kl_estimate(
                logps, batch["reference"], rl.estimator
            )
        loss = masked.average(losses, mask, over=over, length=new)  # pyright: ignore
        entropy = masked.masked_mean(entropies, mask)
        drift = (batch["logps"] - logps).detach()
        rows = (mask.any(-1) if over != "constant" else torch.ones_like(mask[:, 0])).sum()
        metrics = {
            "weight": mask.sum() if over == "tokens" else rows,  # of this process's rows
            "policy_loss": loss.detach(),
            "entropy": entropy.detach(),
            "clip_fraction": masked.masked_mean(out.clipped.float(), mask),
            "ratio_max": torch.where(mask, out.ratio, 1.0).max(),
            "ratio_min": torch.where(mask, out.ratio, 1.0).min(),
            "step_kl": masked.masked_mean(drift, mask),
        }
        if rl.entropy:
            loss = loss - rl.entropy * entropy
        if VALUE in params:
            errors_ = ppo.value_loss(
                values, batch["values"], batch["returns"], mask, clip=rl.value_clip
            )
            critic = masked.masked_mean(errors_, mask)
            metrics["value_loss"] = critic.detach()
            metrics["explained_variance"] = adv.explained_variance(
                values.detach(), batch["returns"], mask
            )
            loss = loss + rl.value_weight * critic
        return loss, metrics

    return setup.over_ranks(loss_fn)


def natural_step(rl: Learning, setup: Setup):
    """An update by `curvature.trust_region_step`, in the form of a compiled step; in float32.

    Under torchrun each process has its own rows; vectors of the solve are in shards as the
    parameters are.
    """
    options = {"implementation": "flash", "method": "hidden"}
    assert rl.trust_region is not None
    radius, model = rl.trust_region, setup.model
    if isinstance(model, Sharded):
        model = sharded(setup.plain, model.layout, model.mesh)

    def total(x: Tensor) -> Tensor:
        for group in setup.groups:
            x = psum(x, group)
        return x

    def step(state: TrainState, batch: Buffer) -> tuple[TrainState, dict[str, Tensor]]:
        tokens, mask = batch["tokens"], batch["mask"][:, 1:]
        rows = {name: batch[name][:, 1:] for name in ("logps", "advantages", "weights")}

        def logits_fn(params: Params) -> Tensor:
            states = model.apply(params, tokens[:, :-1], **options)
            return model.apply(params, states, method="logits").float() / rl.temperature

        def surrogate(params: Params) -> Tensor:
            logps = logits_fn(params).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            out = ppo.policy_loss(logps, rows["logps"], rows["advantages"], mask, clip=None)
            return -(out.losses * rows["weights"]).sum() / count

        count = total(mask.sum()).clamp(min=1)
        found = trust_region_step(
            surrogate, logits_fn, state.params, mask, radius=radius, total=total
        )
        with torch.no_grad():
            for name, value in state.params.items():  # in place, as rollouts read this memory
                value.copy_(found.params[name])
            state.step.add_(1)
        scale = torch.tensor(found.scale)
        return state, {"loss": -found.gain, "step_kl": found.kl, "step_scale": scale}

    return step
