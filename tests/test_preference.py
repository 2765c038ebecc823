"""Preference losses equal hand-worked numbers, finite differences and TRL; padding is nothing."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from msfs_functional import logps as module
from msfs_functional import preference_variants as variants
from msfs_functional.logps import sequence_logps, token_logps, token_logps_and_entropies
from msfs_functional.preference import (
    check_pairs,
    check_reference,
    dpo,
    dpo_hinge,
    ipo,
    kto,
    kto_kl,
    orpo,
    robust_dpo,
    simpo,
)
from msfs_functional.reward_models import bradley_terry, plackett_luce

REFERRED: dict[str, Any] = {
    "dpo": dpo,
    "cdpo": lambda *x: dpo(*x, label_smoothing=0.2),
    "robust": lambda *x: robust_dpo(*x, label_smoothing=0.2),
    "hinge": dpo_hinge,
    "ipo": ipo,
}
ALONE: dict[str, Any] = {"simpo": simpo, "orpo": orpo}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of three tokens, so that every test runs several."""
    monkeypatch.setitem(module.CHUNK, "cpu", 34)


def logps(count, batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = -torch.rand(count, batch, generator=generator, dtype=torch.float64) * 3 - 0.1
    return [row.clone().requires_grad_() for row in x]


def problem(batch=2, length=4, width=5, vocab=11):
    torch.manual_seed(0)
    h, w, b = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((batch, length, width), (vocab, width), (vocab,))
    )
    return h, w, b, torch.randint(0, vocab, (batch, length))


# log-probabilities


def test_token_logps_and_entropies_equal_the_plain_formula():
    h, w, b, labels = problem()
    plain = ((h @ w.T + b) / 0.7).log_softmax(-1)
    expected = plain.gather(-1, labels[..., None])[..., 0]
    entropy = torch.distributions.Categorical(logits=plain).entropy()
    values, entropies = token_logps_and_entropies(h, w, labels, bias=b, temperature=0.7)
    torch.testing.assert_close(token_logps(h, w, labels, bias=b, temperature=0.7), expected)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(entropies, entropy)
    cotangent = torch.randn(2, 4, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((values * cotangent + entropies).sum(), (h, w, b)),
        torch.autograd.grad((expected * cotangent + entropy).sum(), (h, w, b)),
    )


def test_token_logps_have_first_and_second_derivatives():
    h, w, b, labels = problem(1, 4, 2, 3)

    def fn(h, w, b):
        return token_logps_and_entropies(h, w, labels, bias=b)

    assert gradcheck(fn, (h, w, b))
    assert gradgradcheck(fn, (h, w, b))


def test_token_logps_under_torch_func_equal_autograd():
    h, w, _, labels = problem()
    expected = torch.autograd.grad(token_logps(h, w, labels).square().sum(), w)[0]
    h, w = h.detach(), w.detach()

    def loss(w, h, labels):
        return token_logps(h, w, labels).square().sum()

    torch.testing.assert_close(grad(loss)(w, h, labels), expected)
    rows = vmap(grad(loss), (None, 0, 0))(w, h, labels)
    torch.testing.assert_close(rows.sum(0), expected)
    tangent = torch.randn_like(w)
    moved = jvp(lambda w: loss(w, h, labels), (w,), (tangent,))[1]
    torch.testing.assert_close(moved, (tangent * expected).sum())


def test_no_tensor_of_all_logits_is_ever_made():
    h, w, _, labels = problem(4, 30)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    with Watch():
        token_logps(h, w, labels).sum().backward()
    assert largest == h.numel() < labels.numel() * w.shape[0]


def test_half_precision_states_give_float32():
    h, w, _, labels = problem()
    assert token_logps(h.bfloat16(), w.bfloat16(), labels).dtype == torch.float32


def test_sequence_logps_of_a_hand_worked_row():
    x = torch.tensor([[1.0, 2.0, 4.0, math.nan, 16.0, 32.0]])
    mask = torch.tensor([[False, True, True, False, True, False]])
    sums, lengths = sequence_logps(x, mask)
    assert sums.tolist() == [22.0]
    assert lengths.tolist() == [3.0]
    ids = torch.tensor([[0, 0, 0, 1, 1, 2]])
    sums, lengths = sequence_logps(x, mask, segment_ids=ids, segments=2)
    assert sums.tolist() == [[6.0, 16.0]]
    assert lengths.tolist() == [[2.0, 1.0]]


def test_padding_and_packing_change_nothing():
    x = -torch.rand(2, 5, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
    plain = sequence_logps(x, mask)
    padded = sequence_logps(F.pad(x, (2, 3), value=math.nan), F.pad(mask, (2, 3)))
    ids = torch.arange(2).repeat_interleave(5)[None]
    packed = sequence_logps(x.reshape(1, 10), mask.reshape(1, 10), segment_ids=ids, segments=3)
    for a, b, c in zip(plain, padded, packed, strict=True):
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(c[0], torch.cat([a, a.new_zeros(1)]))


def test_masked_tokens_get_no_gradient():
    x = torch.tensor([[-1.0, math.nan]], requires_grad=True)
    sequence_logps(x, torch.tensor([[True, False]]))[0].sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0]]


# reward models


def test_bradley_terry_of_hand_worked_rewards():
    loss = bradley_terry(torch.tensor([2.0]), torch.tensor([1.0]), margin=1.0, centring=0.5)
    torch.testing.assert_close(loss, torch.tensor([math.log(2) + 0.5 * 9]))


def test_plackett_luce_of_two_is_bradley_terry():
    c, r = logps(2)
    for options in ({}, {"margin": 0.3, "centring": 0.1}):
        torch.testing.assert_close(
            plackett_luce(torch.stack([c, r], 1), **options), bradley_terry(c, r, **options)
        )


def test_plackett_luce_of_equal_rewards_is_the_log_of_the_number_of_rankings():
    torch.testing.assert_close(plackett_luce(torch.zeros(1, 4)), torch.tensor([math.log(24)]))


def test_plackett_luce_ignores_padding_columns():
    r = torch.stack(logps(3), 1)
    gap = r.new_full((6, 1), math.nan)
    wide = torch.cat([r[:, :1], gap, r[:, 1:], gap], 1)
    mask = torch.tensor([True, False, True, True, False]).expand(6, 5)
    torch.testing.assert_close(
        plackett_luce(wide, mask=mask, margin=0.2, centring=0.3),
        plackett_luce(r, margin=0.2, centring=0.3),
    )


def test_reward_losses_equal_finite_differences():
    c, r, s = logps(3)
    assert gradcheck(lambda c, r: bradley_terry(c, r, margin=0.3, centring=0.1), (c, r))
    mask = torch.tensor([[True, True, True], [True, False, True]] * 3)
    assert gradcheck(
        lambda *x: plackett_luce(torch.stack(x, 1), mask=mask, margin=0.3, centring=0.1), (c, r, s)
    )


# preference optimization


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_loss_is_log2_when_policy_is_reference(beta):
    c, r = logps(2)
    for smoothing in (0.0, 0.3):
        out = dpo(c, r, c, r, beta=beta, label_smoothing=smoothing)
        torch.testing.assert_close(out.losses, torch.full_like(c, math.log(2)))
        assert not out.margins.any()


def test_losses_of_a_hand_worked_pair():
    c, r, rc, rr = (torch.tensor([x], dtype=torch.float64) for x in (-1.0, -4.0, -2.0, -3.0))
    beta = math.log(3) / 2  # d = 2 beta = log 3, sigmoid(d) = 3/4
    expected = {
        "dpo": -math.log(3 / 4),
        "cdpo": -0.8 * math.log(3 / 4) - 0.2 * math.log(1 / 4),
        "robust": (-0.8 * math.log(3 / 4) + 0.2 * math.log(1 / 4)) / 0.6,
        "hinge": 0.0,
        "ipo": (2 - 1 / math.log(3)) ** 2,
    }
    values = {
        "dpo": dpo(c, r, rc, rr, beta=beta),
        "cdpo": dpo(c, r, rc, rr, beta=beta, label_smoothing=0.2),
        "robust": robust_dpo(c, r, rc, rr, beta=beta, label_smoothing=0.2),
        "hinge": dpo_hinge(c, r, rc, rr, beta=beta),
        "ipo": ipo(c, r, rc, rr, beta=beta),
    }
    for name, value in expected.items():
        assert values[name].losses.item() == pytest.approx(value), name
        assert values[name].margins.item() == pytest.approx(math.log(3)), name
    # beta c - beta r - margin = log 3
    assert simpo(c, r, beta=1.0, margin=3 - math.log(3)).losses.item() == pytest.approx(
        -math.log(3 / 4)
    )
    # odds 1 and 1/3: sigmoid(log 3) = 3/4
    half, quarter = (torch.tensor([math.log(p)]) for p in (0.5, 0.25))
    assert orpo(half, quarter, beta=0.5).losses.item() == pytest.approx(
        math.log(2) - 0.5 * math.log(3 / 4)
    )


def test_kto_of_hand_worked_answers():
    x = torch.tensor([math.log(3), math.log(3)])
    good = torch.tensor([True, False])
    losses, rewards = kto(x, 0 * x, good, torch.tensor(0.0), beta=1.0, undesirable_weight=2.0)
    torch.testing.assert_close(losses, torch.tensor([1 / 4, 2 * 3 / 4]))
    torch.testing.assert_close(rewards, x)
    torch.testing.assert_close(kto_kl(x, 0 * x), torch.tensor(math.log(3)))
    assert kto_kl(-x, 0 * x) == 0


@pytest.mark.parametrize("name", [*REFERRED, *ALONE])
def test_swapping_chosen_and_rejected_negates_the_margin(name):
    c, r, rc, rr = logps(4)
    if name in ALONE:
        there, back = ALONE[name](c, r), ALONE[name](r, c)
    else:
        there, back = REFERRED[name](c, r, rc, rr), REFERRED[name](r, c, rr, rc)
    torch.testing.assert_close(back.margins, -there.margins)
    assert there.margins.any()


@pytest.mark.parametrize("name", [*REFERRED, *ALONE])
def test_preference_losses_equal_finite_differences(name):
    x = logps(4)
    fn = ALONE[name] if name in ALONE else REFERRED[name]
    x = x[:2] if name in ALONE else x
    assert gradcheck(lambda *x: fn(*x).losses, x)
    assert not fn(*x).chosen_rewards.requires_grad


def test_kto_equals_finite_differences_and_holds_its_reference_point_fixed():
    x, reference = logps(2)
    good = torch.arange(6) % 2 == 0
    kl = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: kto(x, reference, good, kl, desirable_weight=1.3)[0], (x,))
    assert torch.autograd.grad(kto(x, reference, good, kl)[0].sum(), kl, allow_unused=True) == (
        None,
    )


def test_robust_dpo_is_the_clean_loss_in_the_mean_over_flips():
    c, r, rc, rr = logps(4)
    e = 0.2
    mean = (1 - e) * robust_dpo(c, r, rc, rr, label_smoothing=e).losses
    mean = mean + e * robust_dpo(r, c, rr, rc, label_smoothing=e).losses
    torch.testing.assert_close(mean, dpo(c, r, rc, rr).losses)


def test_orpo_is_finite_at_both_ends_of_its_domain():
    c, r = (x.requires_grad_() for x in torch.tensor([[-1e-6, -50.0], [-50.0, -1e-6]]))
    orpo(c, r).losses.sum().backward()
    assert c.grad is not None and c.grad.isfinite().all()


def test_a_sweep_over_beta_is_one_vmap():
    x = [y.detach() for y in logps(4)]
    betas = torch.tensor([0.1, 0.5], dtype=torch.float64)
    swept = vmap(lambda beta: dpo(*x, beta=beta).losses)(betas)
    for beta, losses in zip(betas.tolist(), swept, strict=True):
        torch.testing.assert_close(losses, dpo(*x, beta=beta).losses)


def test_dpo_on_a_linear_model_raises_the_chosen_answers():
    h, w, _, labels = problem(4)
    model = torch.nn.Linear(5, 11, bias=False, dtype=torch.float64)
    mask = torch.ones_like(labels, dtype=torch.bool)

    def sides(params):
        weight = functional_call(model, params, (torch.eye(5, dtype=torch.float64),)).T
        return sequence_logps(token_logps(h.detach(), weight, labels), mask)[0].chunk(2)

    params = {"weight": w.detach()}
    reference = [x.detach() for x in sides(params)]
    for _ in range(20):
        slope = grad(lambda p: dpo(*sides(p), *reference).losses.sum())(params)
        params = {"weight": params["weight"] - 0.5 * slope["weight"]}
    assert (dpo(*sides(params), *reference).margins > 0).all()


def test_a_reference_kept_beside_the_data_and_one_scored_in_the_step_are_one_loss():
    h, w, _, labels = problem(4)
    mask = torch.ones_like(labels, dtype=torch.bool)

    def sides(params):
        return sequence_logps(token_logps(h.detach(), params["weight"], labels), mask)[0].chunk(2)

    policy, reference = {"weight": w.detach()}, {"weight": w.detach().roll(1, 0)}
    kept = [x.detach() for x in sides(reference)]
    cached = grad(lambda p: dpo(*sides(p), *kept).losses.sum())(policy)
    loss = lambda p, r: dpo(*sides(p), *sides(r)).losses.sum()  # noqa: E731
    scored, other = grad(loss, argnums=(0, 1))(policy, reference)
    torch.testing.assert_close(scored, cached)
    assert other["weight"].abs().max() > 0  # a pytree like any other: grad decides what is constant


# TRL's own losses, on a stand-in for its trainer


def close(ours, theirs, inputs):
    """Values and gradients agree to 1e-5."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, check_dtype=False)
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def stand_in(**options):
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=False),
        _metrics={"eval": defaultdict(list)},
        aux_loss_enabled=False,
        _total_train_tokens=0,
        precompute_ref_logps=True,
        **options,
    )


def outputs(logps):
    return SimpleNamespace(
        log_probs=logps,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=torch.zeros_like(logps, dtype=torch.bool),
    )


def tokens():
    """Per-token logps of 3 pairs, their mask, references of sequences."""
    generator = torch.Generator().manual_seed(1)
    x = -torch.rand(6, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
    reference = -torch.rand(6, generator=generator, dtype=torch.float64) * 3
    return torch.where(mask, x, 0.0).requires_grad_(), mask, reference


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust", "sigmoid_norm"])
def test_dpo_losses_equal_trl(loss_type):
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    x, mask, reference = tokens()
    sums, lengths = sequence_logps(x, mask)
    if loss_type in ("ipo", "sigmoid_norm"):
        ours = torch.cat([sums / lengths, reference / lengths])
    else:
        ours = torch.cat([sums, reference])
    fn: Any = {
        "sigmoid": dpo,
        "hinge": dpo_hinge,
        "ipo": ipo,
        "robust": lambda *x, beta: robust_dpo(*x, beta=beta, label_smoothing=0.1),
        "sigmoid_norm": dpo,
    }[loss_type]
    trl = stand_in(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.1,
        beta=0.4,
        use_weighting=False,
    )
    chosen, rejected = reference.chunk(2)
    shifted = F.pad(mask, (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    theirs = trainer._compute_loss(
        trl, lambda **_: outputs(torch.where(mask, x, 0.0)), inputs, False
    )
    close(fn(*ours.chunk(4), beta=0.4).losses.mean(), theirs, (x,))


VARIANTS: dict[str, Any] = {
    "exo_pair": lambda *x: variants.exo(*x, beta=0.4, label_smoothing=0.1),
    "nca_pair": lambda *x: variants.nca(*x, beta=0.4),
    "bco_pair": lambda *x: variants.bco(*x, beta=0.4),
    "sppo_hard": lambda *x: variants.sppo(*x, beta=0.4),
    "aot": lambda *x: variants.aot(*x, beta=0.4, label_smoothing=0.1),
    "aot_unpaired": lambda *x: variants.aot(*x, beta=0.4, label_smoothing=0.1, paired=False),
    "apo_zero": lambda *x: variants.apo_zero(*x, beta=0.4),
    "apo_down": lambda *x: variants.apo_down(*x, beta=0.4),
    "discopop": lambda *x: variants.discopop(*x, beta=0.4),
    "sigmoid": lambda *x: dpo(*x, beta=0.4),
}


def trl_dpo(loss_type, x, mask, reference, **options):
    """TRL's own DPO loss, on a stand-in for its trainer."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    own = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False, **options}
    trl = stand_in(
        loss_types=loss_type.split("+"),
        loss_weights=[1.0, 0.5, 0.3][: len(loss_type.split("+"))],
        label_smoothing=0.1,
        beta=0.4,
        args=SimpleNamespace(discopop_tau=0.05),
        **own,
    )
    chosen, rejected = reference.chunk(2)
    shifted = F.pad(mask, (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    squares = SQUARES.expand_as(x)
    given = SimpleNamespace(
        **vars(outputs(torch.where(mask, x, 0.0))), log_sum_sq_probs=F.pad(squares, (1, 0))
    )
    return trainer._compute_loss(trl, lambda **_: given, inputs, False)


SQUARES = torch.tensor([-1.0, -0.4, -2.0, -0.7], dtype=torch.float64)


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_every_other_loss_equals_trl(loss_type):
    x, mask, reference = tokens()
    theirs = trl_dpo(loss_type, x, mask, reference)
    sums = sequence_logps(x, mask)[0]
    out = VARIANTS[loss_type](*sums.chunk(2), *reference.chunk(2))
    close(out.losses.mean(), theirs, (x,))
    assert not out.chosen_rewards.requires_grad


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences_equal_trl(divergence):
    x, mask, reference = (y.float() if y.is_floating_point() else y for y in tokens())
    x = x.detach().requires_grad_()
    name = {"js": "js_divergence", "alpha": "alpha_divergence"}.get(divergence, divergence)
    theirs = trl_dpo(
        "sigmoid", x, mask, reference, f_divergence_type=name, f_alpha_divergence_coef=0.5
    )
    ratio = sequence_logps(x, mask)[0] - reference
    scores = variants.divergence_score(ratio, divergence, alpha=0.5).chunk(2)
    zeros = [torch.zeros_like(score) for score in scores]
    close(dpo(*scores, *zeros, beta=0.4).losses.mean(), theirs, (x,))


def test_a_shorter_voice_for_the_tail_and_weights_by_confidence_equal_trl():
    x, mask, reference = tokens()
    sides = lambda y: torch.stack(y.chunk(2), 1)  # noqa: E731
    theirs = trl_dpo("sigmoid", x, mask, reference, ld_alpha=0.3)
    sums = variants.desensitised_logps(sides(x), sides(mask), alpha=0.3)
    close(dpo(*sums.unbind(1), *reference.chunk(2), beta=0.4).losses.mean(), theirs, (x,))
    theirs = trl_dpo("sigmoid", x, mask, reference, use_weighting=True)
    losses = dpo(*sequence_logps(x, mask)[0].chunk(2), *reference.chunk(2), beta=0.4).losses
    squares = sides(SQUARES.expand_as(x))
    weights = variants.confidence_weights(sides(x), squares, sides(mask))
    close((losses * weights).mean(), theirs, (x,))


def test_kto_equals_trl():
    trainer = pytest.importorskip("trl.trainer.kto_trainer").KTOTrainer
    x, mask, reference = tokens()
    drift = torch.linspace(-3, 0, 6, dtype=torch.float64)
    good = torch.tensor([1, 0, 1, 1, 0, 0]).bool()
    trl = stand_in(
        beta=0.4,
        loss_type="kto",
        calculate_KL=True,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        _compute_kl_logps=lambda model, batch: drift,
    )
    shifted = F.pad(mask, (1, 0)).long()
    inputs = {
        "input_ids": torch.zeros_like(shifted),
        "attention_mask": torch.ones_like(shifted),
        "completion_mask": shifted,
        "label": good,
        "ref_logps": reference,
        "ref_KL_logps": drift - 0.5,
    }
    theirs = trainer._compute_loss(
        trl, lambda **_: outputs(torch.where(mask, x, 0.0)), inputs, False
    )
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    kl = kto_kl(drift, drift - 0.5)
    losses, _ = kto(sequence_logps(x, mask)[0], reference, good, kl, beta=0.4, **weights)
    close(losses.mean(), theirs, (x,))


@pytest.mark.parametrize("alpha", [0.0, 0.3])  # above 0: AlphaPO
@pytest.mark.parametrize("loss_type", ["simpo", "sigmoid", "hinge", "ipo"])
def test_losses_without_a_reference_equal_trl(loss_type, alpha):
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    c, r = logps(2)
    smoothing = 0.0 if loss_type in ("hinge", "ipo") else 0.1
    options = {"alpha": alpha, "simpo_gamma": 0.7, "beta": 2.0, "label_smoothing": smoothing}
    theirs, chosen, rejected = trainer.cpo_loss(stand_in(loss_type=loss_type, **options), c, r)
    own = [variants.divergence_score(x, "alpha", alpha=1 - alpha) for x in (c, r)]
    none = torch.zeros_like(c)
    ours = {
        "simpo": lambda: simpo(*own, beta=2.0, margin=0.7, label_smoothing=0.1),
        "sigmoid": lambda: dpo(*own, none, none, beta=2.0, label_smoothing=0.1),
        "hinge": lambda: dpo_hinge(*own, none, none, beta=2.0),
        "ipo": lambda: ipo(*own, none, none, beta=2.0),
    }[loss_type]()
    close(ours.losses.mean(), theirs.mean(), (c, r))
    torch.testing.assert_close(ours.margins, chosen - rejected)


def test_orpo_odds_ratio_equals_trl():
    trainer = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    c, r = logps(2)
    theirs = trainer.odds_ratio_loss(stand_in(beta=0.4), c, r)[0]
    close(orpo(c, r, beta=0.4).losses.mean(), (-c - theirs).mean(), (c, r))


@pytest.mark.parametrize("margin", [None, 0.3])
def test_bradley_terry_equals_trl(margin):
    trainer = pytest.importorskip("trl.trainer.reward_trainer").RewardTrainer
    c, r = logps(2)
    trl = stand_in(args=SimpleNamespace(center_rewards_coefficient=0.1))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(12, 1)}
    if margin is not None:
        inputs["margin"] = torch.full((6,), margin, dtype=torch.float64)
    model = lambda **_: SimpleNamespace(logits=torch.cat([c, r])[:, None])  # noqa: E731
    theirs = trainer.compute_loss(trl, model, inputs)
    ours = bradley_terry(c, r, margin=margin or 0.0, centring=0.1)
    close(ours.mean(), theirs, (c, r))


# bad input


@pytest.mark.parametrize("name", [*REFERRED, *ALONE, "kto"])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_above_zero(name, beta):
    x = logps(4)
    fns = {"cdpo": dpo, "dpo": dpo, "robust": robust_dpo, "hinge": dpo_hinge, "ipo": ipo, **ALONE}
    with pytest.raises(ValueError, match=r"beta \(.*\) must be above 0"):
        if name == "kto":
            kto(x[0], x[1], torch.ones(6, dtype=torch.bool), x[2].sum(), beta=beta)
        else:
            fns[name](*(x[:2] if name in ALONE else x), beta=beta)


def test_what_does_not_fit_is_named():
    h, w, b, labels = problem()
    c, r, rc, rr = logps(4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    x = torch.zeros(2, 4)
    for message, call in {
        "labels .* shape of the tokens": lambda: token_logps(h, w, labels[:, 1:]),
        "expected integers": lambda: token_logps(h, w, labels.double()),
        "weight .* must be": lambda: token_logps(h, w.T, labels),
        "bias .* must be": lambda: token_logps(h, w, labels, bias=b[1:]),
        "one dtype": lambda: token_logps(h, w.float(), labels),
        "temperature .* above 0": lambda: token_logps(h, w, labels, temperature=0.0),
        "expected bool": lambda: sequence_logps(x, mask.long()),
        "mask .* shape of logps": lambda: sequence_logps(x, mask[:1]),
        "segments .* above 0": lambda: sequence_logps(x, mask, segment_ids=labels),
        "segment_ids .* shape": lambda: sequence_logps(x, mask, segment_ids=labels[:1], segments=2),
        "rejected .* shape of chosen": lambda: dpo(c, r[:3], rc, rr),
        "reference_logps .* shape": lambda: kto_kl(c, r[:3]),
        r"label_smoothing \(0.5\)": lambda: dpo(c, r, rc, rr, label_smoothing=0.5),
        "margin .* not be negative": lambda: simpo(c, r, margin=-1.0),
        "centring .* not be negative": lambda: bradley_terry(c, r, centring=-1.0),
        "K at least 2": lambda: plackett_luce(x[:, :1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_pairs_that_teach_nothing_are_named_by_row():
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    full = torch.ones(2, 3, dtype=torch.bool)
    none = torch.tensor([[True] * 3, [False] * 3])
    other = torch.tensor([[1, 2, 9, 0], [4, 5, 6, 0]])
    tail = torch.tensor([[True, True, True, False]]).expand(2, 4)
    with pytest.raises(ValueError, match=r"rows \[1\] have an empty rejected completion"):
        check_pairs(ids, full, ids, none)
    with pytest.raises(ValueError, match=r"rows \[1\] have equal chosen and rejected"):
        check_pairs(ids, full, other, tail)
    check_pairs(ids[:1], full[:1], other[:1], tail[:1])


def test_a_reference_of_another_architecture_is_named():
    policy = {"a": torch.zeros(2, 3), "b": torch.zeros(2)}
    check_reference(policy, {name: value + 1 for name, value in policy.items()})
    with pytest.raises(ValueError, match=r"a is \(2, 3\) in the policy, \(3, 2\) in the reference"):
        check_reference(policy, {"a": torch.zeros(3, 2), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"b is \(2,\) in the policy, absent in the reference"):
        check_reference(policy, {"a": policy["a"]})
