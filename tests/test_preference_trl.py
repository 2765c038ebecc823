"""Compositions of the losses on preferences and demonstrations, against TRL's own."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_preference import close, outputs, stand_in, tokens, trl_dpo

from msfs_functional import preference_variants as variants
from msfs_functional.logps import sequence_logps
from msfs_functional.masked import masked_mean
from msfs_functional.preference import dpo, dpo_hinge, ipo, kto, simpo
from msfs_functional.sft import dynamic_losses


def test_a_weighted_mixture_with_fine_tuning_equals_trl():
    """MPO (Wang et al. 2024): sigmoid + 0.5 bco_pair + 0.3 sft."""
    x, mask, reference = tokens()
    theirs = trl_dpo("sigmoid+bco_pair+sft", x, mask, reference)
    sums = sequence_logps(x, mask)[0].chunk(2)
    ours = dpo(*sums, *reference.chunk(2), beta=0.4).losses.mean()
    ours = ours + 0.5 * variants.bco(*sums, *reference.chunk(2), beta=0.4).losses.mean()
    close(ours - 0.3 * masked_mean(x.chunk(2)[0], mask.chunk(2)[0]), theirs, (x,))


def test_apo_zero_on_single_answers_equals_trl():
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    x, mask, reference = tokens()
    good = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    own = {"calculate_KL": False, "_compute_kl_logps": lambda *_: None}
    trl = stand_in(beta=0.4, loss_type="apo_zero_unpaired", **own, **weights)
    shifted = F.pad(mask, (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": None,
    }
    given = outputs(torch.where(mask, x, 0.0))
    theirs = trainer._compute_loss(trl, lambda **_: given, inputs, False)
    sums, none = sequence_logps(x, mask)[0], torch.zeros((), dtype=torch.float64)
    losses, _ = kto(sums, reference, good, none, beta=0.4, **weights)
    close(losses.mean(), theirs, (x,))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_triples_with_a_gold_answer_equal_trl(loss_type, alpha):
    """TPO (Saeidi et al. 2024): the losses without a reference, and the gold answer imitated."""
    trainer = pytest.importorskip("trl.experimental.tpo.tpo_trainer").TPOTrainer
    generator = torch.Generator().manual_seed(3)
    rows = 9 if alpha else 6
    logits = torch.randn(rows, 5, 7, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(7, (rows, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 2, 5, 3, 4, 4, 2])[:rows, None]
    mask = mask & (torch.arange(5) > 0)
    smoothing = 0.0 if loss_type in ("hinge", "ipo") else 0.1
    trl = stand_in(
        loss_type=loss_type, tpo_alpha=alpha, beta=0.6, label_smoothing=smoothing, tpo_l_gamma=0.4
    )
    inputs = {"input_ids": ids, "completion_mask": mask.long(), "attention_mask": mask.long()}
    theirs = trainer._compute_loss(trl, lambda **_: SimpleNamespace(logits=logits), inputs, False)
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    sums, lengths = sequence_logps(logps, mask[:, 1:])
    sides = (sums / lengths if loss_type in ("ipo", "tpo-l") else sums)[:6].chunk(2)
    none = [torch.zeros_like(x) for x in sides]
    ours: Any = {
        "sigmoid": lambda: dpo(*sides, *none, beta=0.6, label_smoothing=0.1),
        "hinge": lambda: dpo_hinge(*sides, *none, beta=0.6),
        "ipo": lambda: ipo(*sides, *none, beta=0.6),
        "tpo-l": lambda: simpo(*sides, beta=0.6, margin=0.4, label_smoothing=0.1),
    }[loss_type]()
    loss = ours.losses.mean()
    if alpha:
        loss = loss - alpha * masked_mean(logps[6:], mask[6:, 1:])
    close(loss, theirs, (logits,))


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_fine_tuning_equals_trl(loss_type):
    trainer = pytest.importorskip("trl.trainer.sft_trainer").SFTTrainer
    x, mask, _ = tokens()
    logps = torch.where(mask, x, 0.0)
    trl = stand_in(
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        compute_loss_func=None,
        label_smoother=None,
    )
    trl.accelerator.parallelism_config = None
    given = SimpleNamespace(**vars(outputs(logps)), label_mask=mask)
    inputs = {"labels": None, "attention_mask": mask.long()}
    theirs = trainer.compute_loss(trl, lambda **_: given, inputs)
    losses = dynamic_losses(x) if loss_type == "dft" else -x
    close(masked_mean(losses, mask), theirs, (x,))
