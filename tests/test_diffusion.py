"""Diffusion: conversions, weights, schedules, samplers beside exact Gaussians and diffusers."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from msfs_functional import diffusion as df
from msfs_functional import guidance, likelihood, published_process, random, samplers
from msfs_functional import noise_schedules as ns
from msfs_functional.attention import attention

TARGETS = ("eps", "x0", "v", "flow")
MEAN, STD = 0.5, 0.8  # of the Gaussian data whose denoiser is known
KEY = random.key(7)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return random.normal(random.key(seed), shape, dtype=dtype)


def gaussian(coordinates: ns.Coordinates) -> df.DenoiseFn:
    """E[x_0 | x] for x_0 of N(MEAN, STD ** 2)."""

    def denoise_fn(x: Tensor, level: Tensor) -> Tensor:
        alpha, sigma = coordinates(level.double())
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x - alpha * MEAN)

    return denoise_fn


exploding = gaussian(ns.variance_exploding)
preserving = gaussian(ns.variance_preserving)


# Targets and conversions


@given(source=st.sampled_from(TARGETS), target=st.sampled_from(TARGETS), angle=st.floats(0.05, 1.5))
def test_conversions_round_trip(source: df.Target, target: df.Target, angle: float):
    angles = torch.tensor([angle, 0.7, 1.5], dtype=torch.float64)
    for level in (ns.Level(angles.cos(), angles.sin()), ns.rectified_flow(angles / 1.6)):
        x_0, eps = normal(1, 3, 4, 2), normal(2, 3, 4, 2)
        x_t = df.add_noise(x_0, eps, level)
        y = df.target_of(x_0, eps, level, source)
        there = df.convert(y, x_t, level, source, target)
        torch.testing.assert_close(there, df.target_of(x_0, eps, level, target), rtol=0, atol=1e-12)
        back = df.convert(there, x_t, level, target, source)
        torch.testing.assert_close(back, y, rtol=0, atol=1e-12)


def test_targets_by_hand():
    level = ns.Level(torch.tensor([0.6]), torch.tensor([0.8]))
    x_0, eps = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert df.add_noise(x_0, eps, level).item() == pytest.approx(2.0)
    got = [df.target_of(x_0, eps, level, target).item() for target in TARGETS]
    assert got == pytest.approx([1.0, 2.0, 0.6 * 1 - 0.8 * 2, 1 - 2])


def test_v_x0_and_flow_give_x0_from_pure_noise():
    level = ns.variance_preserving(torch.zeros(1, dtype=torch.float64))
    x_0, eps = normal(1, 1, 3), normal(2, 1, 3)
    for target in ("x0", "v", "flow"):
        y = df.target_of(x_0, eps, level, target)
        torch.testing.assert_close(df.to_x0_eps(y, eps, level, target)[0], x_0)


# Loss weights


def test_weights_of_every_target_measure_the_same_error():
    """A wrong denoiser has one error; said in any target, times its weight, it is one loss."""
    level = ns.variance_preserving(torch.tensor([0.99, 0.6, 0.1], dtype=torch.float64))
    x_0, eps, wrong = normal(1, 3, 5), normal(2, 3, 5), normal(3, 3, 5)
    x_t = df.add_noise(x_0, eps, level)
    for weight_fn in (df.min_snr_weight, df.p2_weight):
        losses = [
            df.weighted_mse(
                df.convert(wrong, x_t, level, "x0", target),
                df.target_of(x_0, eps, level, target),
                weight_fn(level, target),
            )
            for target in TARGETS
        ]
        torch.testing.assert_close(torch.stack(losses), losses[0].expand(4))


def test_min_snr_weights_by_hand():
    level = ns.variance_preserving(torch.tensor([0.9, 0.5]))  # SNR 9 and 1
    close = torch.testing.assert_close
    close(df.min_snr_weight(level, "x0"), torch.tensor([5.0, 1.0]))
    close(df.min_snr_weight(level, "eps"), torch.tensor([5 / 9, 1.0]))
    close(df.min_snr_weight(level, "v"), torch.tensor([5 / 10, 1 / 2]))
    close(df.p2_weight(level, "eps"), torch.tensor([1 / 10, 1 / 2]))
    ends = ns.variance_preserving(torch.tensor([0.0, 1.0]))
    close(df.min_snr_weight(ends, "eps"), torch.tensor([1.0, 0.0]))
    close(df.min_snr_weight(ends, "v"), torch.tensor([0.0, 0.0]))
    close(df.min_snr_weight(ends, "x0"), torch.tensor([0.0, 5.0]))


# EDM


def test_edm_s_network_sees_and_learns_variance_1_at_every_sigma():
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    x_0 = 0.5 * normal(1, 4, 20000)
    x = x_0 + sigma[:, None] * normal(2, 4, 20000)
    seen = {}

    def model_fn(x: Tensor, time: Tensor) -> Tensor:
        seen["x"], seen["time"] = x, time
        return torch.zeros_like(x)

    skipped = df.edm_denoiser(model_fn)(x, sigma)
    torch.testing.assert_close(seen["x"].std(1), torch.ones(4).double(), rtol=0.02, atol=0)
    torch.testing.assert_close(seen["time"], sigma.log() / 4)
    # Where F is 0 the error of x_0 is c_out F's target, whose variance is to be 1.
    weighted = (x_0 - skipped).square().mean(1) * df.edm_weight(sigma)
    torch.testing.assert_close(weighted, torch.ones(4).double(), rtol=0.03, atol=0)
    ones = df.edm_denoiser(lambda x, time: torch.ones_like(x))(x, sigma)
    torch.testing.assert_close(
        (ones - skipped)[:, 0].square() * df.edm_weight(sigma), torch.ones(4).double()
    )


def test_edm_s_denoiser_of_a_perfect_network_samples_the_gaussian():
    def model_fn(x: Tensor, time: Tensor) -> Tensor:
        sigma = (4 * time).exp()[:, None]
        total = (sigma**2 + 0.25).sqrt()
        x = x * total
        return (exploding(x, sigma) - 0.25 / total**2 * x) / (0.5 * sigma / total)

    x, sigma = normal(1, 3, 5), torch.tensor(0.7, dtype=torch.float64)
    torch.testing.assert_close(df.edm_denoiser(model_fn)(x, sigma), exploding(x, sigma))
    each = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(df.edm_denoiser(model_fn)(x, each), exploding(x, each[:, None]))


# Schedules


@pytest.mark.parametrize("schedule", (ns.linear, ns.scaled_linear, ns.cosine, ns.sigmoid))
def test_schedules_fall_and_rescale_to_pure_noise(schedule):
    alpha_bar = schedule(100)
    assert alpha_bar.shape == (100,) and 0 < alpha_bar[-1] < alpha_bar[0] < 1
    rescaled = ns.zero_terminal_snr(alpha_bar)
    assert rescaled[-1] == 0
    torch.testing.assert_close(rescaled[0], alpha_bar[0])
    steps = torch.arange(100)
    assert torch.equal(ns.step_of(alpha_bar, alpha_bar), steps.double())
    assert torch.equal(ns.step_of(rescaled, rescaled), steps.double())
    assert 49 < ns.step_of(alpha_bar, alpha_bar[49:51].mean()) < 50


def test_spacings_by_hand():
    rows = {"leading": [8, 6, 4, 2, 0], "linspace": [9, 7, 4, 2, 0], "trailing": [9, 7, 5, 3, 1]}
    for spacing, row in rows.items():
        assert ns.spaced_steps(10, 5, spacing).tolist() == row


def test_grids_by_hand():
    sigmas = ns.karras_sigmas(3, sigma_min=1.0, sigma_max=3.0**7)
    torch.testing.assert_close(sigmas, torch.tensor([3.0**7, 2.0**7, 1.0, 0.0]).double())
    times = ns.flow_times(2, shift=3.0)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.75, 0.0]).double())
    t = ns.logit_normal_times(KEY, (20000,), mean=1.0, std=0.5)
    logits = torch.logit(t)
    assert 0 < t.min() and t.max() < 1
    assert logits.mean().item() == pytest.approx(1.0, abs=0.02)
    assert logits.std().item() == pytest.approx(0.5, abs=0.02)
    logs = ns.log_normal_sigmas(KEY, (20000,)).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert logs.std().item() == pytest.approx(1.2, abs=0.03)


# Samplers on a Gaussian


def orders(errors: list[float]) -> list[float]:
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize(
    ("sampler", "order"),
    (
        (samplers.euler, 1),
        (samplers.heun, 2),
        (samplers.dpmpp_2m, 2),
        (samplers.euler_ancestral, 1),
    ),
)
def test_ode_samplers_over_sigma_have_their_order(sampler, order):
    x = 10 * normal(1, 5)
    exact = MEAN + (x - MEAN) * math.sqrt((STD**2 + 0.1**2) / (STD**2 + 10**2))
    options = {"eta": 0.0} if sampler is samplers.euler_ancestral else {}
    errors = []
    for n in (32, 64, 128):
        sigmas = torch.logspace(1, -1, n + 1, dtype=torch.float64)
        errors.append((sampler(exploding, x, sigmas, KEY, **options) - exact).abs().max().item())
    assert orders(errors) == pytest.approx([order] * 2, abs=0.25)


def test_ddim_and_flow_euler_have_order_1():
    x = normal(1, 5)
    for sampler, coordinates, ends in (
        (samplers.ddim, ns.variance_preserving, (0.001, 0.999)),
        (samplers.flow_euler, ns.rectified_flow, (1.0, 0.0)),
    ):
        first, last = (coordinates(torch.tensor(end, dtype=torch.float64)) for end in ends)

        def std(level: ns.Level) -> Tensor:
            return (level.alpha**2 * STD**2 + level.sigma**2).sqrt()

        exact = last.alpha * MEAN + (x - first.alpha * MEAN) * std(last) / std(first)
        errors = []
        for n in (50, 100, 200):
            grid = torch.linspace(*ends, n + 1, dtype=torch.float64)
            if sampler is samplers.ddim:  # even in the angle whose sine is sigma
                angles = torch.linspace(
                    *(math.acos(math.sqrt(end)) for end in ends), n + 1, dtype=torch.float64
                )
                grid = angles.cos() ** 2
            out = sampler(gaussian(coordinates), x, grid, KEY)
            errors.append((out - exact).abs().max().item())
        assert orders(errors) == pytest.approx([1, 1], abs=0.2)


def moments(sampler, denoise_fn, grid, monkeypatch, **options) -> tuple[float, float]:
    """Exact mean and variance of a sampler's output at unit-normal noises, x_T and steps.

    On a Gaussian every sampler is affine in its noises: row 0 has none, row j + 1 only the j-th.
    """
    rows = torch.eye(len(grid) + 1, dtype=torch.float64)
    first = float(grid[0]) if grid[0] > 1 else 1.0
    monkeypatch.setattr(samplers, "step_noise", lambda key, i, x: rows[:, i + 2].clone())
    out = sampler(denoise_fn, first * rows[:, 1], grid, KEY, **options)
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


STOCHASTIC = (
    (samplers.euler_ancestral, {}, 1),
    (samplers.dpmpp_2m_sde, {}, 2),
    (samplers.ddpm, {}, 1),
    (samplers.ddpm, {"variance": "large"}, 1),
    (samplers.ddim, {"eta": 1.0}, 1),
    (samplers.ddim, {"eta": 0.5}, 1),
    (samplers.euler, {"churn": samplers.Churn(15.0)}, 1),
    (samplers.heun, {"churn": samplers.Churn(15.0)}, 2),
)


@pytest.mark.parametrize(("sampler", "options", "order"), STOCHASTIC)
def test_stochastic_samplers_converge_to_the_distribution(sampler, options, order, monkeypatch):
    errors = []
    for n in (64, 128, 256):
        sigmas = torch.logspace(3, -1, n + 1, dtype=torch.float64)
        if sampler in (samplers.ddpm, samplers.ddim):
            grid = 1 / (1 + sigmas**2)
            alpha, sigma = ns.variance_preserving(grid[-1])
            mean, variance = moments(sampler, preserving, grid, monkeypatch, **options)
        else:
            alpha, sigma = ns.variance_exploding(sigmas[-1])
            mean, variance = moments(sampler, exploding, sigmas, monkeypatch, **options)
        assert mean == pytest.approx((alpha * MEAN).item(), abs=2e-3)
        exact = (alpha**2 * STD**2 + sigma**2).item()
        errors.append(abs(variance - exact) / exact)
    assert errors[-1] < 0.07
    assert min(orders(errors)) > order - 0.3


def test_a_step_with_churn_by_hand(monkeypatch):
    """sigma 1 rises to 1.25, 3 of variance 9/16 are added, and one Euler step goes down to 0.5."""
    monkeypatch.setattr(samplers, "step_noise", lambda key, i, x: torch.full_like(x, 4.0))
    seen = []

    def denoise_fn(x: Tensor, level: Tensor) -> Tensor:
        seen.append((x.item(), level.item()))
        return torch.zeros_like(x)

    grid, x = torch.tensor([1.0, 0.5]).double(), torch.ones(1).double()
    out = samplers.euler(denoise_fn, x, grid, KEY, churn=samplers.Churn(0.25))
    assert seen == [pytest.approx((1 + 4 * 0.75, 1.25))]
    assert out.item() == pytest.approx(4.0 * 0.5 / 1.25)
    for churn in (samplers.Churn(0.0), samplers.Churn(9.0, low=1.1), samplers.Churn(9.0, high=0.9)):
        assert torch.equal(
            samplers.heun(exploding, x, grid, KEY, churn=churn),
            samplers.heun(exploding, x, grid),
        )


def test_ddim_at_eta_1_is_ddpm():
    grid = ns.alpha_bars_at(ns.zero_terminal_snr(ns.cosine(100)), ns.spaced_steps(100, 12))
    x = normal(1, 6, 3)
    ddpm = samplers.ddpm(preserving, x, grid, KEY)
    torch.testing.assert_close(ddpm, samplers.ddim(preserving, x, grid, KEY, eta=1.0))


def test_a_key_for_each_example_gives_the_same_image_in_any_batch():
    keys, x, sigmas = random.split(KEY, 4), normal(1, 4, 3), ns.karras_sigmas(6)
    whole = samplers.dpmpp_2m_sde(exploding, x, sigmas, keys)
    for b in range(4):
        alone = samplers.dpmpp_2m_sde(exploding, x[b : b + 1], sigmas, keys[b : b + 1])
        torch.testing.assert_close(whole[b], alone[0], rtol=0, atol=0)
    assert not torch.equal(whole, samplers.dpmpp_2m_sde(exploding, x, sigmas, KEY))


def test_one_denoiser_serves_all_coordinates():
    x, sigma = normal(1, 5), torch.tensor(0.7, dtype=torch.float64)
    exact = exploding(x, sigma)
    torch.testing.assert_close(df.preserving_to_exploding(preserving)(x, sigma), exact)
    flow = gaussian(ns.rectified_flow)
    torch.testing.assert_close(df.flow_to_exploding(flow)(x, sigma), exact)


# Guidance, image to image, inpainting


def conditional(x: Tensor, level: Tensor, condition: Tensor) -> Tensor:
    return x.tanh() * condition[:, None] + level


def test_classifier_free_guidance_by_hand():
    x, level = normal(1, 3, 4), torch.tensor(0.3, dtype=torch.float64)
    positive, negative = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, -1.0])

    def guided(scale: float, **options) -> Tensor:
        fn = guidance.classifier_free_guidance(conditional, positive, negative, scale, **options)
        return fn(x, level)

    y, n = conditional(x, level, positive), conditional(x, level, negative)
    torch.testing.assert_close(guided(1.0), y)
    torch.testing.assert_close(guided(0.0), n)
    torch.testing.assert_close(guided(4.0), n + 4 * (y - n))
    torch.testing.assert_close(guided(4.0, interval=(0.4, 1.0)), y)
    torch.testing.assert_close(guided(4.0, interval=(0.3, 1.0)), guided(4.0))
    torch.testing.assert_close(guided(4.0, rescale=1.0).std(1), y.std(1))

    def given_once(x: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        return conditional(torch.cat([x, x]), level, condition)

    fn = guidance.classifier_free_guidance(given_once, positive, negative, 4.0, repeat=False)
    torch.testing.assert_close(fn(x, level), guided(4.0))


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", ("dpmpp_2m", "ddim"))
def test_the_host_waits_for_no_step_of_a_guided_sampler(sampler):
    """More steps, no more copies between host and GPU that wait: the host runs ahead of them."""
    alpha_bar = ns.scaled_linear()
    condition = torch.ones(2, device="cuda")

    def predict(x: Tensor, time: Tensor, given: Tensor) -> Tensor:
        return conditional(x, (time / 1000)[:, None], given)

    fn = guidance.classifier_free_guidance(predict, condition, -condition, 3.0)
    denoise_fn = df.denoiser(fn, ns.variance_preserving, "eps", alpha_bar=alpha_bar.cuda())
    process, waits = published_process.Process(alpha_bar, "eps"), []
    for steps in (4, 4, 12):  # the first counts what is done once in a process, too
        walk_fn, grid, _ = published_process.steps_of(
            denoise_fn, process, sampler, steps, "trailing"
        )
        x = torch.ones(2, 3, device="cuda")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                getattr(samplers, sampler)(walk_fn, x, grid)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(one.message) for one in caught))
    assert waits[1] == waits[2]


def test_guidance_takes_a_level_and_a_tree_of_conditions_for_each_example():
    x, levels = normal(1, 2, 4), torch.tensor([0.2, 0.8], dtype=torch.float64)

    def predict_fn(x: Tensor, level: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return x * condition["a"][:, None] + level[:, None] * condition["b"][:, None]

    def tree(a: float, b: float) -> dict[str, Tensor]:
        return {"a": torch.full((2,), a), "b": torch.full((2,), b)}

    fn = guidance.classifier_free_guidance(
        predict_fn, tree(2.0, 1.0), tree(1.0, 0.0), 3.0, interval=(0.0, 0.5)
    )
    positive, negative = (
        predict_fn(x, levels, tree(2.0, 1.0)),
        predict_fn(x, levels, tree(1.0, 0.0)),
    )
    out = fn(x, levels)
    torch.testing.assert_close(out[0], (3 * positive - 2 * negative)[0])
    torch.testing.assert_close(out[1], positive[1])


def test_guidance_is_the_same_around_any_target():
    level = torch.tensor(0.4, dtype=torch.float64)
    x, positive, negative = normal(1, 2, 3), torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
    outs = []
    for target in TARGETS:

        def predict_fn(x: Tensor, alpha_bar: Tensor, condition: Tensor, target=target) -> Tensor:
            x_0 = conditional(x, torch.tensor(0.3), condition)
            return df.convert(x_0, x, ns.variance_preserving(alpha_bar), "x0", target)

        network_fn = guidance.classifier_free_guidance(predict_fn, positive, negative, 2.5)
        outs.append(df.denoiser(network_fn, ns.variance_preserving, target)(x, level))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])


def test_clipping_by_hand():
    x_0 = torch.tensor([[0.5, -2.0, 1.0, -4.0], [0.1, 0.2, -0.3, 0.9]])
    level = torch.tensor(0.3)
    clipped = guidance.clip_x0(lambda x, level: x)(x_0, level)
    assert clipped.tolist() == x_0.clamp(-1, 1).tolist()
    dynamic = guidance.clip_x0(lambda x, level: x, quantile=2 / 3)(x_0, level)
    torch.testing.assert_close(dynamic[0], torch.tensor([0.25, -1.0, 0.5, -1.0]))
    assert torch.equal(dynamic[1], x_0[1])


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("sampler", (samplers.ddpm, samplers.ddim))
def test_clipped_samplers_walk_as_diffusers(sampler, dynamic, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    theirs = {"thresholding": dynamic, "sample_max_value": 100.0, "clip_sample_range": 0.7}
    name = "DDPMScheduler" if sampler is samplers.ddpm else "DDIMScheduler"
    scheduler = getattr(diffusers, name)(
        **SCHEDULE, **theirs, dynamic_thresholding_ratio=0.8, clip_sample=not dynamic
    )
    scheduler.set_timesteps(20)
    alpha_bar = ns.scaled_linear()
    denoise_fn = df.denoiser(network, ns.variance_preserving, "eps", alpha_bar=alpha_bar)
    most, quantile = (1.0, 0.8) if dynamic else (0.7, None)
    clipped = guidance.clip_x0(denoise_fn, most, quantile=quantile)
    x = normal(1, 3, 4, 5, dtype=torch.float32)
    options = {} if sampler is samplers.ddpm else {"use_clipped_model_output": True}
    grid = ns.alpha_bars_at(alpha_bar, ns.spaced_steps(1000, 20, "leading"))
    ours = walk(sampler, clipped, x, grid)
    check_walks(ours, walk_diffusers(scheduler, x, monkeypatch, **options))


def test_gradient_guidance_on_a_gaussian_is_the_gradient_written_out():
    x, sigma = normal(1, 5, 1), torch.tensor(0.7, dtype=torch.float64)
    fn = guidance.gradient_guidance(
        exploding, lambda x_0: -0.5 * (x_0 - 2).square().sum(1), ns.variance_exploding, scale=3.0
    )
    x_0 = exploding(x, sigma)
    gain = STD**2 / (STD**2 + 0.7**2)
    torch.testing.assert_close(fn(x, sigma), x_0 + 3 * 0.7**2 * gain * (2 - x_0))


@pytest.mark.parametrize(
    "sampler", (samplers.heun, samplers.dpmpp_2m_sde, samplers.euler_ancestral)
)
def test_inpainting_keeps_the_known_and_changes_the_rest(sampler):
    known, mask = normal(1, 2, 6), torch.tensor([1.0, 1, 1, 0, 0, 0]).double()
    x, sigmas = 80 * normal(2, 2, 6), ns.karras_sigmas(8)
    out = sampler(guidance.inpaint(exploding, known, mask), x, sigmas, KEY)
    torch.testing.assert_close(out[:, :3], known[:, :3])
    free = sampler(exploding, x, sigmas, KEY)
    torch.testing.assert_close(out[:, 3:], free[:, 3:])


def test_image_to_image_starts_at_its_strength():
    x_0, grid = normal(1, 2, 3), ns.karras_sigmas(10)
    x, rest = guidance.image_to_image(x_0, grid, 0.3, KEY, ns.variance_exploding)
    assert torch.equal(rest, grid[7:])
    torch.testing.assert_close(x, x_0 + grid[7] * samplers.draw(KEY, x_0))
    assert torch.equal(guidance.image_to_image(x_0, grid, 1.0, KEY, ns.variance_exploding)[1], grid)


# Likelihood and MeanFlow


def test_log_likelihood_is_exact_at_order_2():
    x = MEAN + normal(1, 4, 3)
    variance = STD**2 + 0.05**2
    exact = -0.5 * ((x - MEAN) ** 2 / variance + math.log(2 * math.pi * variance)).sum(1)
    errors = []
    for n in (24, 48, 96):
        sigmas = torch.logspace(4, math.log10(0.05), n + 1, dtype=torch.float64)
        errors.append((likelihood.log_likelihood(exploding, x, sigmas) - exact).abs().max().item())
    assert errors[-1] < 0.1
    assert min(orders(errors)) > 1.9


def test_hutchinson_estimates_the_exact_divergence():
    mix = torch.eye(3, dtype=torch.float64) + 0.1 * normal(3, 3, 3)

    def denoise_fn(x: Tensor, sigma: Tensor) -> Tensor:
        return (x @ mix).tanh() / (1 + sigma**2)

    x, sigmas = normal(1, 2, 3), torch.logspace(1, -1, 9, dtype=torch.float64)
    exact = likelihood.log_likelihood(denoise_fn, x, sigmas)
    estimate = likelihood.log_likelihood(denoise_fn, x, sigmas, KEY, probes=2000, chunk=2000)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.05)
    # For a Jacobian that is a multiple of the identity one probe is exact.
    one = likelihood.log_likelihood(exploding, x, sigmas, KEY, probes=1)
    torch.testing.assert_close(one, likelihood.log_likelihood(exploding, x, sigmas))


def test_meanflow_target_by_hand():
    """u = a z + b t: du/dt along the flow is a v + b."""
    a, b = torch.tensor(0.3, requires_grad=True), -0.7
    x_0, eps, r, t = (normal(1, 4, 2), normal(2, 4, 2), torch.zeros(4), torch.full((4,), 0.6))

    def model_fn(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return a * z + b * t[:, None]

    errors = df.meanflow_errors(model_fn, x_0, eps, r.double(), t.double())
    loss = df.meanflow_loss(errors, power=0.0)
    z, v = 0.4 * x_0 + 0.6 * eps, eps - x_0
    residual = 0.3 * z + b * 0.6 - v + 0.6 * (0.3 * v + b)
    torch.testing.assert_close(loss, residual.square().sum(1).mean(), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(loss, a)  # the target is held fixed: only a z moves
    torch.testing.assert_close(grad.double(), (2 * residual * z).sum(1).mean(), rtol=1e-5, atol=0)


def test_meanflow_takes_a_guided_velocity():
    x_0, eps = normal(1, 2, 3), normal(2, 2, 3)
    r, t = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.5, 0.4]).double()
    v = eps - x_0

    def model_fn(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return 2 * z + t[:, None]

    def loss(velocity: Tensor | None) -> Tensor:
        return df.meanflow_errors(model_fn, x_0, eps, r, t, velocity=velocity).mean()

    assert torch.equal(loss(None), loss(v))
    z = df.add_noise(x_0, eps, ns.rectified_flow(t))
    fixed = 3 * v - (t - r)[:, None] * (2 * 3 * v + 1)  # du/dt along dz/dt = 3 v
    expected = (model_fn(z, r, t) - fixed).square().sum(1).mean()
    torch.testing.assert_close(loss(3 * v), expected)


def test_meanflow_loss_weighs_each_error_by_itself_held_fixed():
    errors = torch.tensor([0.5, 8.0], requires_grad=True)
    loss = df.meanflow_loss(errors, power=0.5, c=0.5)
    assert loss.item() == pytest.approx((0.5 / 1 + 8 / 8.5**0.5) / 2)
    (grad,) = torch.autograd.grad(loss, errors)
    torch.testing.assert_close(grad, torch.tensor([1.0, 8.5**-0.5]) / 2)


def test_exact_mean_velocity_has_no_meanflow_loss_and_samples_in_one_step():
    """For data at one point, u = (z - x_0) / t for all r, and one step lands on it."""
    point = normal(1, 1, 3)
    eps = normal(2, 5, 3)

    def model_fn(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return (z - point) / t[:, None]

    r, t = df.meanflow_times(KEY, 5, share=1.0)
    errors = df.meanflow_errors(model_fn, point.expand(5, 3), eps, r.double(), t.double())
    loss = df.meanflow_loss(errors)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(samplers.meanflow_sample(model_fn, eps), point.expand(5, 3))
    assert bool((r < t).all())
    r, t = df.meanflow_times(KEY, 4000)
    assert (r < t).double().mean().item() == pytest.approx(0.25, abs=0.03)


def test_meanflow_and_likelihood_go_through_flash_attention():
    """Loss, gradient and divergence with the op equal those with the formula written out."""
    weight = (0.3 * normal(3, 8, 24)).requires_grad_()
    x_0, eps = normal(1, 2, 5, 8), normal(2, 2, 5, 8)
    r, t = (times.double() for times in df.meanflow_times(KEY, 2, share=1.0))
    losses, grads, logps = [], [], []
    for implementation in ("flash", "reference"):

        def model_fn(z: Tensor, r: Tensor, t: Tensor, implementation=implementation) -> Tensor:
            h = (z + r.reshape(-1, 1, 1) * t.reshape(-1, 1, 1)) @ weight
            q, k, v = h.unflatten(-1, (2, 12)).transpose(-3, -2).split(4, -1)
            out = attention(q, k, v, implementation=implementation)
            return out.transpose(-3, -2).flatten(-2)

        losses.append(df.meanflow_loss(df.meanflow_errors(model_fn, x_0, eps, r, t)))
        grads.append(torch.autograd.grad(losses[-1], weight)[0])
        sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
        with torch.no_grad():
            logps.append(
                likelihood.log_likelihood(
                    lambda x, sigma, fn=model_fn: fn(x, sigma, sigma), x_0, sigmas
                )
            )
    for flash, reference in (losses, grads, logps):
        torch.testing.assert_close(flash, reference, rtol=1e-9, atol=1e-10)


# Beside diffusers


def network(x: Tensor, time: Tensor) -> Tensor:
    return torch.sin(2 * x + time.reshape(-1, *[1] * (x.ndim - 1)) / 300) + 0.2 * x


def walk(sampler, denoise_fn, x, grid, **options) -> list[Tensor]:
    """x before each call of the denoiser, and at the end."""
    seen = []

    def recorded(x: Tensor, level: Tensor) -> Tensor:
        seen.append(x)
        return denoise_fn(x, level)

    last = sampler(recorded, x, grid, KEY, **options)
    return [*seen, last]


def walk_diffusers(scheduler, x: Tensor, monkeypatch, model_fn=network, **options) -> list[Tensor]:
    """The same by a scheduler of diffusers, fed the noises of our keys."""
    count = itertools.count()
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    if hasattr(module, "randn_tensor"):

        def randn_tensor(shape, **kwargs):
            return samplers.step_noise(KEY, next(count), torch.empty(shape))

        monkeypatch.setattr(module, "randn_tensor", randn_tensor)
    seen = []
    for t in scheduler.timesteps:
        seen.append(x)
        inside = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        y = model_fn(inside, t.float().expand(x.shape[0]))
        x = scheduler.step(y, t, x, return_dict=False, **options)[0]
    return [*seen, x]


def check_walks(ours: list[Tensor], theirs: list[Tensor], scales: list[float] | None = None):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = scales[i] if scales else 1.0
        error = (a * scale - b).abs().max() / b.abs().max().clamp_min(1.0)
        assert error < 1e-5, (i, error.item())


NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


OVER_ALPHA_BAR = (
    ("DDPM", samplers.ddpm, {}, {}),
    ("DDPM", samplers.ddpm, {"variance": "large"}, {"variance_type": "fixed_large"}),
    ("DDIM", samplers.ddim, {}, {"set_alpha_to_one": True}),
    ("DDIM", samplers.ddim, {"eta": 0.6}, {"set_alpha_to_one": True}),
    ("DDIM", samplers.ddim, {"eta": 0.6}, {"rescale_betas_zero_snr": True}),
)


@pytest.mark.parametrize(
    ("name", "sampler", "ours", "theirs", "target"),
    (
        (*case, target)
        for case in OVER_ALPHA_BAR
        for target in ("eps", "x0", "v")
        if not (target == "eps" and "rescale_betas_zero_snr" in case[3])
    ),
)
def test_samplers_over_alpha_bar_walk_as_diffusers(
    name, sampler, ours, theirs, target, monkeypatch
):
    diffusers = pytest.importorskip("diffusers")
    alpha_bar, spacing = ns.scaled_linear(), "leading"
    if "rescale_betas_zero_snr" in theirs:
        alpha_bar, spacing = ns.zero_terminal_snr(alpha_bar), "trailing"
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **SCHEDULE,
        **theirs,
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=NAMES[target],
    )
    scheduler.set_timesteps(20)
    steps = ns.spaced_steps(1000, 20, spacing)
    assert torch.equal(steps, scheduler.timesteps)
    denoise_fn = df.denoiser(network, ns.variance_preserving, target, alpha_bar=alpha_bar)
    x = normal(1, 3, 4, 5, dtype=torch.float32)
    options = {"eta": ours["eta"]} if "eta" in ours else {}
    check_walks(
        walk(sampler, denoise_fn, x, ns.alpha_bars_at(alpha_bar, steps), **ours),
        walk_diffusers(scheduler, x, monkeypatch, **options),
    )


@pytest.mark.parametrize(
    ("name", "sampler", "theirs", "target"),
    (
        ("EulerDiscrete", samplers.euler, {}, "eps"),
        ("EulerDiscrete", samplers.euler, {}, "x0"),
        ("EulerDiscrete", samplers.euler, {}, "v"),
        ("EulerAncestralDiscrete", samplers.euler_ancestral, {}, "eps"),
        ("EulerAncestralDiscrete", samplers.euler_ancestral, {}, "v"),
        ("HeunDiscrete", samplers.heun, {}, "eps"),
        ("HeunDiscrete", samplers.heun, {}, "v"),
        *(
            ("DPMSolverMultistep", sampler, {"algorithm_type": algorithm}, target)
            for target in ("eps", "x0", "v")
            for sampler, algorithm in (
                (samplers.dpmpp_2m, "dpmsolver++"),
                (samplers.dpmpp_2m_sde, "sde-dpmsolver++"),
            )
        ),
    ),
)
def test_samplers_over_sigma_walk_as_diffusers(name, sampler, theirs, target, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        **SCHEDULE, **theirs, timestep_spacing="trailing", prediction_type=NAMES[target]
    )
    scheduler.set_timesteps(20)
    alpha_bar = ns.scaled_linear()
    sigmas = ns.sigmas_at(alpha_bar, ns.spaced_steps(1000, 20, "trailing"))
    inside = df.denoiser(network, ns.variance_preserving, target, alpha_bar=alpha_bar)
    x = sigmas[0].float() * normal(1, 3, 4, 5, dtype=torch.float32)
    ours = walk(sampler, df.preserving_to_exploding(inside), x, sigmas)
    scales = None
    if name == "DPMSolverMultistep":  # walks in variance-preserving coordinates
        scales = (1 / (1 + sigmas**2).sqrt()).tolist()
    check_walks(
        ours, walk_diffusers(scheduler, x * (scales[0] if scales else 1), monkeypatch), scales
    )


@pytest.mark.parametrize(
    ("sampler", "algorithm"),
    ((samplers.dpmpp_2m, "dpmsolver++"), (samplers.dpmpp_2m_sde, "sde-dpmsolver++")),
)
def test_flow_networks_walk_as_diffusers_under_samplers_over_sigma(sampler, algorithm, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        flow_shift=3.0,
        prediction_type="flow_prediction",
        algorithm_type=algorithm,
    )
    scheduler.set_timesteps(12)

    def timeless(x: Tensor, time: Tensor) -> Tensor:  # diffusers rounds the times, not the steps
        return network(x, 0 * time)

    times = scheduler.sigmas.double()
    scales = (1 - times).tolist()
    x = normal(1, 3, 4, 5, dtype=torch.float32)
    denoise_fn = df.flow_to_exploding(df.denoiser(timeless, ns.rectified_flow, "flow"))
    ours = walk(sampler, denoise_fn, x / scales[0], times / (1 - times))
    check_walks(ours, walk_diffusers(scheduler, x, monkeypatch, timeless), scales)


def test_flow_euler_walks_as_diffusers(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 10, 10).tolist())
    denoise_fn = df.denoiser(lambda x, t: network(x, 1000 * t), ns.rectified_flow, "flow")
    x = normal(1, 3, 4, 5, dtype=torch.float32)
    ours = walk(samplers.flow_euler, denoise_fn, x, ns.flow_times(10, shift=3.0))
    check_walks(ours, walk_diffusers(scheduler, x, monkeypatch))


@pytest.mark.parametrize(
    ("schedule", "name"),
    (
        (ns.linear, "linear"),
        (ns.cosine, "squaredcos_cap_v2"),
        (ns.sigmoid, "sigmoid"),
        (lambda: ns.zero_terminal_snr(ns.linear()), "zero"),
    ),
)
def test_schedules_equal_diffusers(schedule, name):
    diffusers = pytest.importorskip("diffusers")
    zero = name == "zero"
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="linear" if zero else name, rescale_betas_zero_snr=zero
    )
    theirs = scheduler.alphas_cumprod.double()  # a float32 product of 1000 factors
    torch.testing.assert_close(schedule(), theirs, rtol=1e-4, atol=1e-7)


def test_karras_sigmas_equal_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(**SCHEDULE, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    ends = ns.sigma_of(ns.scaled_linear())
    sigmas = ns.karras_sigmas(12, sigma_min=ends[0].item(), sigma_max=ends[-1].item())
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=2e-5, atol=0)


# Bad input


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: ns.karras_sigmas(0), r"steps \(0\) must be at least 1"),
        (lambda: ns.flow_times(0), r"steps \(0\)"),
        (lambda: ns.spaced_steps(10, 0), r"steps \(0\)"),
        (lambda: ns.spaced_steps(10, 11), r"steps \(11\) must not exceed the 10 .* take fewer"),
        (lambda: ns.spaced_steps(10, 10, "leading", offset=1), r"offset 1.*smaller offset"),
        (lambda: ns.linear(10, 0.5, 0.1), "beta_start"),
        (lambda: ns.log_normal_sigmas(KEY, (2,), std=0.0), r"std \(0.0\) must be positive"),
        (lambda: df.edm_denoiser(network, sigma_data=0.0), r"sigma_data \(0.0\)"),
        (lambda: guidance.clip_x0(exploding, 0.0), r"most \(0.0\) must be positive"),
        (lambda: guidance.clip_x0(exploding, quantile=1.5), r"quantile \(1.5\)"),
        (
            lambda: samplers.heun(
                exploding, torch.ones(1), ns.karras_sigmas(3), churn=samplers.Churn(5.0)
            ),
            r"key \(None\) must be given: churn",
        ),
        (
            lambda: samplers.heun(
                exploding, torch.ones(1), ns.karras_sigmas(3), KEY, churn=samplers.Churn(-5.0)
            ),
            "must not be negative",
        ),
        (lambda: ns.zero_terminal_snr(torch.tensor([0.1, 0.9])), "alpha_bar must fall"),
        (lambda: ns.karras_sigmas(3, sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: ns.shift_times(torch.ones(1), 0.0), r"shift \(0.0\) must be positive"),
        (lambda: samplers.euler(exploding, torch.ones(1), torch.ones(1)), "more steps"),
        (
            lambda: samplers.euler(
                exploding,
                torch.ones(1),
                ns.sigmas_at(ns.zero_terminal_snr(ns.linear()), ns.spaced_steps(1000, 4)),
            ),
            "sigmas must be finite, got inf.*use ddpm or ddim",
        ),
        (
            lambda: samplers.ddpm(
                preserving, torch.ones(3), torch.tensor([0.1, 0.9]), KEY.expand(2, 2)
            ),
            r"key \(2, 2\) must be \(2,\), or \(3, 2\)",
        ),
        (
            lambda: samplers.heun(exploding, torch.ones(1), torch.tensor([2.0, 3.0, 0.0])),
            r"sigmas must fall strictly, got 2 then 3 at step 0: sort",
        ),
        (
            lambda: samplers.ddpm(preserving, torch.ones(1), torch.tensor([0.9, 0.1]), KEY),
            "alpha_bars must rise strictly",
        ),
        (
            lambda: samplers.flow_euler(exploding, torch.ones(1), torch.tensor([2.0, 0.0])),
            r"times must lie in \[0, 1\]",
        ),
        (
            lambda: samplers.euler(exploding, torch.ones(1), torch.tensor([math.nan, 0.0])),
            "sigmas must fall strictly, got nan",
        ),
        (
            lambda: samplers.ddim(preserving, torch.ones(1), torch.tensor([0.1, 0.9]), eta=0.5),
            r"key \(None\) must be given",
        ),
        (
            lambda: samplers.ddim(preserving, torch.ones(1), torch.tensor([0.1, 0.9]), eta=2.0),
            r"eta \(2.0\)",
        ),
        (
            lambda: guidance.classifier_free_guidance(conditional, KEY, KEY, -1.0),
            r"guidance scale \(-1.0\) must be at least 0",
        ),
        (
            lambda: guidance.classifier_free_guidance(conditional, KEY, KEY, 2.0, rescale=1.5),
            r"rescale \(1.5\)",
        ),
        (
            lambda: guidance.image_to_image(
                torch.ones(1), ns.karras_sigmas(3), 0.0, KEY, ns.variance_exploding
            ),
            r"strength \(0.0\)",
        ),
        (
            lambda: likelihood.log_likelihood(exploding, torch.ones(1, 1), ns.karras_sigmas(3)),
            "drop the last level",
        ),
        (
            lambda: df.denoiser(
                network,
                ns.variance_preserving,
                "eps",
                alpha_bar=ns.zero_terminal_snr(ns.linear()),
            ),
            "says nothing of x_0.*train on v",
        ),
        (lambda: df.denoiser(network, ns.rectified_flow, "noise"), "'noise'.*one of eps, x0"),
        (
            lambda: df.min_snr_weight(ns.rectified_flow(torch.ones(1)), "v", gamma=0.0),
            r"gamma \(0.0\) must be positive",
        ),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()
