"""Alignment on meshes equals one process: fine-tuning, preferences, rewards, reinforcement.

test_ranks.py runs the claims of TWO and FOUR on as many ranks.
"""

from dataclasses import replace

import pytest
import torch
from ranks import DEVICE

from msfs_functional import meshes, optim, random
from msfs_functional.aligning import Mesh, Model, set_up, step_of
from msfs_functional.config import Machine
from msfs_functional.gathering import Sharded
from msfs_functional.models.decoder import DecoderConfig
from msfs_functional.next_token import next_token_loss
from msfs_functional.packing import batch_of
from msfs_functional.params import stack
from msfs_functional.preference_training import Preferences
from msfs_functional.preference_training import make_loss as preference_loss
from msfs_functional.reinforcement import VALUE, Learning
from msfs_functional.reinforcement import make_loss as policy_loss
from msfs_functional.reward_models import HEAD, with_head
from msfs_functional.reward_training import reward_loss
from msfs_functional.sft import pack_answers
from msfs_functional.tokenizer import BOS, EOS
from msfs_functional.train import init_state
from msfs_functional.transforms import value_and_grad

# Rows of 11 tokens are no multiple of what a ring of two cuts, 29 tokens no multiple of two ranks.
P, T, NEW = 4, 11, 4
CONFIG = DecoderConfig(
    29, width=12, depth=1, heads=2, kv_heads=2, head_dim=6, hidden=18, max_length=16, qk_norm=True
)
CLOSE = 1e-5  # of the largest number in a tensor: float32, after other orders of sums
PAIRS = {name: Preferences(1, P, 1e-2, loss=name) for name in ("sigmoid", "kto", "aot")}
RULES = {
    "grpo": Learning(algorithm="grpo", kl=0.1),
    "ppo": Learning(algorithm="ppo", kl=0.1, temperature=0.7, entropy=0.01),
}


def close(found, wanted, said):
    """Two dicts of tensors hold the same."""
    assert found.keys() == wanted.keys(), said
    for name, x in found.items():
        most = float(wanted[name].abs().max())
        torch.testing.assert_close(
            x, wanted[name], rtol=0, atol=CLOSE * most, msg=lambda m, n=name: f"{said}, {n}: {m}"
        )


def setup_on(mesh: Mesh, config: DecoderConfig = CONFIG):
    meshes.join(DEVICE)
    machine = Machine(DEVICE, "float32", False)
    setup = set_up(Model(length=16), None, machine, mesh, config)  # pyright: ignore
    # flash on GPUs: each of these small shapes would be float32 kernels of its own to compile
    return setup._replace(implementation="sdpa")


def alone(setup):
    """The same on this process alone."""
    return setup._replace(model=setup.plain, share=(0, 1), groups=(), place=(0, 1), every=())


def rows(count: int):
    """Tokens of prompts and answers, and where the answers are."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 29, (count, T), generator=generator)
    at = torch.arange(T)
    first = torch.randint(2, 6, (count, 1), generator=generator)
    last = first + torch.randint(1, NEW + 1, (count, 1), generator=generator)
    return tokens * (at < last), (at >= first) & (at < last)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def case(name, setup, params):
    """(loss over all ranks, params, the whole batch)."""
    tokens, mask = rows(2 * P)
    if name == "sft":
        documents = [[BOS, *range(4, 7 + n), EOS] for n in range(2 * P)]
        packed = batch_of(pack_answers(documents, [2] * len(documents), 16), 0, 4)
        return next_token_loss(setup.model, implementation="sdpa"), params, packed
    pairs = {"tokens": tokens.unflatten(0, (P, 2)), "mask": mask.unflatten(0, (P, 2))}
    if name == "rewards":
        ends = {"tokens": pairs["tokens"], "lengths": (tokens > 0).sum(1).unflatten(0, (P, 2))}
        return reward_loss(setup), with_head(params, 12, 0), ends
    if name in PAIRS:
        pairs |= {"wrong": tokens[:P], "wrong_mask": mask[:P]}
        pairs |= {"reference": numbers(P, 2) - 9, "wrong_reference": numbers(P) - 9}
        return preference_loss(PAIRS[name], setup), params, pairs
    if name == "ppo":
        params = {**params, VALUE: numbers(12).to(DEVICE)}
    logps = torch.where(mask, numbers(2 * P, T) - 3, 0.0)
    buffer = {"tokens": tokens, "mask": mask, "logps": logps, "reference": logps.roll(1, 1)}
    buffer |= {name: numbers(2 * P, T).roll(n) for n, name in enumerate(("advantages", "values"))}
    buffer |= {"returns": buffer["values"] + 0.3, "weights": numbers(2 * P, T).exp()}
    buffer["coefficient"] = torch.full((2 * P,), 0.1)
    return policy_loss(RULES[name], setup, NEW), params, buffer


def equal_one_process(*names: str, steps: tuple[str, ...] = (), **degrees: int):
    """Value, figures and gradient of these losses, and where three steps by some of them lead."""
    setup = setup_on(Mesh(**degrees))
    assert isinstance(setup.model, Sharded)
    params = {name: 3 * x for name, x in setup.plain.init(0, device=DEVICE).items()}
    # a large eps inflates gradients that are rounding alone less
    optimizer = optim.adamw(1e-2, eps=1e-1)
    share, shares = setup.share
    for name in names:
        loss_fn, start, batch = case(name, setup, params)
        plain_fn, _, _ = case(name, alone(setup), params)
        whole = {n: x.to(DEVICE) for n, x in batch.items()}
        own = {n: x.tensor_split(shares)[share] for n, x in whole.items()}
        key, said = random.key(0, device=DEVICE), f"{name} on {degrees}"
        (got, metrics), grads = value_and_grad(loss_fn, has_aux=True)(setup.enter(start), own, key)
        (want, expected), plain = value_and_grad(plain_fn, has_aux=True)(start, whole, key)
        if shares == 1 or name in PAIRS:
            for figures in (metrics, expected):
                figures.pop("weight", None)  # of all shares, and of one
            close({"loss": got, **metrics}, {"loss": want, **expected}, said)
        close({"loss": got, **setup.leave(grads)}, {"loss": want, **plain}, said)
        ends = []
        for each, fn, data in ((setup, loss_fn, own), (alone(setup), plain_fn, whole)):
            if name in steps:
                state = init_state(each.enter(start), optimizer, key)
                step = step_of(each, fn, optimizer)
                for _ in range(3):
                    state, _ = step(state, data)
                ends.append(each.leave(state.params))
        if ends:
            close(ends[0], ends[1], f"{said}, after three steps")


def members_share_out_the_rows_of_a_batch():
    """Stacked parameters are whole on every process, of whichever axis; rows are not."""
    setup, optimizer = setup_on(Mesh(dp_shard=1, tp=2)), optim.adamw(1e-2, eps=1e-1)
    keys = random.split(random.key(0, device=DEVICE), 2)
    starts = [{n: 3 * x for n, x in setup.plain.init(i, device=DEVICE).items()} for i in (0, 1)]
    for name in ("kto", "rewards"):
        ends = []
        for each in (setup.for_members(), alone(setup).for_members()):
            _, begun, batch = case(name, each, starts[0])
            own = {**starts[1], HEAD: -begun[HEAD]} if name == "rewards" else starts[1]
            share, shares = each.share
            rows_ = {n: x.to(DEVICE).tensor_split(shares)[share] for n, x in batch.items()}
            step = step_of(each, case(name, each, begun)[0], optimizer, members=2)
            state = init_state(stack([begun, own]), optimizer, keys)
            for _ in range(2):
                state, metrics = step(state, rows_)
            ends.append({**state.params, "loss": metrics["loss"]})
        close(ends[0], ends[1], f"members, {name}")


EVERY = ("sft", "rewards", *PAIRS, *RULES)


def alignment_by_tensors():
    equal_one_process(*EVERY, steps=("ppo",), dp_shard=1, tp=2)


def alignment_in_context():
    equal_one_process(*EVERY, steps=("ppo",), dp_shard=1, cp=2)


def windows_are_not_for_a_ring():
    with pytest.raises(
        ValueError, match=r"cp \(2\) with a decoder whose tokens see windows of \[8"
    ):
        setup_on(Mesh(dp_shard=1, cp=2), replace(CONFIG, windows=(8, None)))


def alignment_on_mixed_meshes():
    equal_one_process("kto", "ppo", steps=("kto",), dp_shard=2, tp=2)
    equal_one_process("aot", "rewards", dp_replicate=2, dp_shard=1, cp=2)
    equal_one_process("sigmoid", "ppo", dp_shard=1, tp=2, cp=2)


GPUS = [alignment_by_tensors, alignment_in_context]
TWO = [
    alignment_by_tensors,
    alignment_in_context,
    members_share_out_the_rows_of_a_batch,
    windows_are_not_for_a_ring,
]
FOUR = [alignment_on_mixed_meshes]
