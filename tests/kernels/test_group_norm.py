"""Kernels of image networks: values and gradients, odd sizes, slices; on a GPU, or in Triton's
interpreter without one."""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from msfs_kernels import group_norm, triton_group_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def by_kernels(fused: bool = True):
    """Within, images go to the kernels, or all to the formula."""
    return mock.patch.object(group_norm, "fused", lambda *images: fused)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator)
    return x.to(DEVICE, memory_format=torch.channels_last)


def check_gradients(size, groups, silu):
    C = size[1]
    wide = image(size[0], 2 * C, *size[2:])
    dy = image(*size, seed=1)
    # a slice of channels: what comes back from a join; and a gradient that is one
    x, dy_slice = wide[:, C:], image(size[0], C + 3, *size[2:], seed=1)[:, 3:]
    gain, bias = 1 + 0.1 * dy[0, :, 0, 0], 0.1 * dy[0, :, 1, 1]
    shift = image(size[0], C, 1, 1, seed=2)[:, :, 0, 0].contiguous()
    given = [t.detach().clone().requires_grad_() for t in (x, gain, bias, shift)]
    given[0] = x.detach().requires_grad_()
    given[1] = gain.detach().repeat_interleave(2)[::2].requires_grad_()  # no two side by side
    with by_kernels():
        y = group_norm.group_norm(*given[:3], groups, 1e-5, shift=given[3], silu=silu)
    grads = torch.autograd.grad(y, given, dy_slice)
    exact = [t.detach().double().requires_grad_() for t in given]
    right = group_norm.plain_group_norm(*exact, groups, 1e-5, silu)
    expected = torch.autograd.grad(right, exact, dy_slice.double())
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-5)
    for name, one, other in zip(("x", "gain", "bias", "shift"), grads, expected, strict=True):
        scale = float(other.abs().max())
        assert float((one.double() - other).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("silu", (False, True))
@pytest.mark.parametrize(("size", "groups"), (((2, 12, 5, 7), 3), ((1, 96, 20, 17), 4)))
def test_norm_and_its_gradients_are_the_formula_s(on_kernels, size, groups, silu):
    on_kernels(check_gradients, size, groups, silu)


def check_parts():
    x = image(1, 4, 33, 31)
    with mock.patch.object(triton_group_norm, "MOST_PARTS", 3):
        _, found = triton_group_norm.forward(x, x[0, :, 0, 0], x[0, :, 0, 1], None, 2, 1e-6, True)
    groups = x.double().unflatten(1, (2, 2)).flatten(2)
    torch.testing.assert_close(found.mean.double(), groups.mean(-1))
    variance = groups.var(-1, unbiased=False)
    torch.testing.assert_close(found.rstd.double(), (variance + 1e-6).rsqrt(), rtol=1e-6, atol=0)


def test_many_parts_of_an_image_give_the_statistics_of_the_whole(on_kernels):
    on_kernels(check_parts)


def check_far_means():
    """Means of 500 deviations, and one pixel, the first of its lane, far off."""
    x = 1000 + image(1, 4, 20, 15)
    x[:, 1:3, 0, 3] += 500
    _, found = triton_group_norm.forward(x, x[0, :, 0, 0], x[0, :, 0, 1], None, 4, 1e-6, True)
    pixels = x.double().flatten(2)
    torch.testing.assert_close(found.mean.double(), pixels.mean(-1), rtol=1e-6, atol=0)
    deviation = (pixels.var(-1, unbiased=False) + 1e-6).rsqrt()
    torch.testing.assert_close(found.rstd.double(), deviation, rtol=1e-4, atol=0)


def test_a_mean_far_from_zero_leaves_the_variance_right(on_kernels):
    on_kernels(check_far_means)


def check_second_derivatives():
    x = image(2, 4, 3, 3)
    gain, bias = x[0, :, 0, :2].detach().T  # neither side by side, as the time below
    found = []
    for fused in (True, False):
        given = [t.detach().requires_grad_() for t in (x, gain, bias, x[0, :, 1, 1])]
        one, *rest, time = given
        with by_kernels(fused):
            y = group_norm.group_norm(one, *rest, 2, 1e-5, shift=time.expand(2, -1), silu=True)
            first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
            loss = torch.stack([each.square().mean() for each in first]).sum()
            found.append(torch.autograd.grad(loss, given))
    for name, ours, formula in zip(("x", "gain", "bias", "shift"), *found, strict=True):
        assert (ours - formula).abs().max() <= 1e-5 * formula.abs().max(), name


def test_second_derivatives_are_the_formula_s(on_kernels):
    on_kernels(check_second_derivatives)


def check_joins():
    with by_kernels():
        x, skip = image(2, 5, 3, 4).requires_grad_(), image(2, 70, 3, 4, seed=1).requires_grad_()
        joined, dy = group_norm.join(x, skip), image(2, 75, 3, 4, seed=2)
        dx, dskip = torch.autograd.grad(joined, (x, skip), dy)
        assert torch.equal(joined, torch.cat([x, skip], 1))
        assert torch.equal(dx, dy[:, :5]) and torch.equal(dskip, dy[:, 5:])
        assert dskip.is_contiguous(memory_format=torch.channels_last)
        bias = torch.arange(5.0, device=DEVICE).requires_grad_()
        for other in (x.detach(), None):
            bias = bias.detach().repeat_interleave(3)[::3].requires_grad_()  # no two side by side
            total = group_norm.residual(x, bias, other)
            expected = x + bias[:, None, None] + (0 if other is None else other)
            torch.testing.assert_close(total, expected)
            dx, dbias = torch.autograd.grad(total, (x, bias), dy[:, :5])
            torch.testing.assert_close(dbias, dy[:, :5].sum((0, 2, 3)))
            assert torch.equal(dx, dy[:, :5])


def test_a_join_gives_its_gradient_back_in_whole_pieces_and_a_residual_adds(on_kernels):
    on_kernels(check_joins)


def check_doubles():
    x = image(2, 70, 3, 5).requires_grad_()
    dy = image(2, 70, 6, 10, seed=1)
    plain = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    with by_kernels():
        y = group_norm.double(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        weight = image(2, 70, 6, 10, seed=2).requires_grad_()
        (inner,) = torch.autograd.grad(group_norm.double(x), x, weight, create_graph=True)
        (second,) = torch.autograd.grad(inner, weight, dx)
    assert torch.equal(y, plain) and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(dx, torch.autograd.grad(plain, x, dy)[0])
    assert torch.equal(second, torch.nn.functional.interpolate(dx, scale_factor=2.0))


def test_a_doubled_image_repeats_pixels_and_sums_their_gradients(on_kernels):
    on_kernels(check_doubles)


def check_passing():
    """Both gradients of x are in one, also where one of the results is not used."""
    x = image(2, 8, 3, 5)
    gain, bias = 1 + x[0, :, 0, 0].detach(), x[0, :, 1, 1].detach()
    for loss in (
        lambda y, x: (y * x.square()).sum(),
        lambda y, x: (x.square() + y.detach()).sum(),
        lambda y, x: y.square().sum(),
    ):
        found = []
        for fused in (True, False):
            given = [t.detach().requires_grad_() for t in (x, gain, bias)]
            with by_kernels(fused):
                y, same = group_norm.group_norm(*given, 2, 1e-5, silu=True, passes=True)
            assert torch.equal(same, x)
            first = torch.autograd.grad(loss(y, same), given[0], create_graph=fused)
            alone = [t.detach().requires_grad_() for t in (x, gain, bias)]
            with by_kernels(fused):
                y, same = group_norm.group_norm(*alone, 2, 1e-5, silu=True, passes=True)
            found.append((first[0], torch.autograd.grad(loss(y, same), alone[0])[0]))
        for ours in (*found[0], found[1][1]):
            torch.testing.assert_close(ours, found[1][0], rtol=1e-4, atol=1e-4)


def test_what_passes_a_norm_brings_its_gradient_along(on_kernels):
    on_kernels(check_passing)


def check_sums():
    wide = image(3, 70, 19, 17)
    for x in (wide, wide[:, 3:68], wide.contiguous(), wide[1:, :, :7]):
        with mock.patch.object(triton_group_norm, "PROGRAMS", 8):
            ours = triton_group_norm.sums_of_channels(x, torch.float32)
        torch.testing.assert_close(ours.double(), x.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-3)


def test_sums_of_channels_over_parts_of_all_images_are_the_whole(on_kernels):
    on_kernels(check_sums)


def test_bad_groups_and_shifts_are_refused():
    x, one = torch.ones(1, 6, 2, 2), torch.ones(6)
    with pytest.raises(ValueError, match=r"groups \(4\) must divide the channels \(6\)"):
        group_norm.group_norm(x, one, one, 4, 1e-5)
    with pytest.raises(ValueError, match=r"shift \(6,\) must be \(1, 6\)"):
        group_norm.group_norm(x, one, one, 3, 1e-5, shift=one)
    with pytest.raises(ValueError, match=r"gain \(6,\) and bias \(5,\) must be \(6,\)"):
        group_norm.group_norm(x, one, one[:5], 3, 1e-5)
    with pytest.raises(ValueError, match=r"bias \(5,\) and x None must be \(6,\)"):
        group_norm.residual(x, one[:5])
