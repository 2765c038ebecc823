"""Passes between convolutions: the formulas' numbers, odd sizes; on a GPU or in the interpreter."""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from msfs_kernels import image_passes as passes
from msfs_kernels import triton_group_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def by_kernels():
    return mock.patch.object(passes, "fused", lambda x: x.dtype is torch.float32)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 + 2 * torch.randn(shape, generator=generator)).to(DEVICE)


def doubles(tree):
    if isinstance(tree, torch.Tensor) and tree.dtype is torch.float32:
        return tree.double()
    return type(tree)(map(doubles, tree)) if type(tree) in (list, tuple) else tree


def check(fn, *args, **kwargs):
    """fn by kernels is fn by the formula in float64."""
    with by_kernels():
        found = fn(*args, **kwargs)
        expected = fn(*doubles(args), **{k: doubles(v) for k, v in kwargs.items()})
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def normed(sizes, groups, shifts, added, phases):
    """The norm of an image, or of two as one, through sums that whoever wrote them left."""
    B, H, W = 4, *sizes[0][1:]
    C = sum(C for C, *_ in sizes)
    gain, beta = 1 + some(C, seed=5), some(C, seed=6)
    shift = some(shifts, C + 3, seed=7)[:, 3:] if shifts else None

    def run(gain, beta, shift, images, more, bias):
        made = []
        for image, other in zip(images, more, strict=True):
            own = bias[: image.shape[-1] // (4 if phases else 1)]
            if phases:
                made.append(passes.interleave(image, own))
            elif added:
                made.append(passes.add(image, own, other))
            else:
                made.append((image, passes.sums_of(image)))
        of_sums = [one[1] for one in made]
        scale, offset = passes.affine(of_sums, gain, beta, shift, groups, 1e-5)
        return passes.scaled([one[0] for one in made], scale, offset, silu=bool(shifts))

    images = [some(B >> i, H, W, size[0] * (4 if phases else 1), seed=i)
              for i, size in enumerate(sizes)]  # fmt: skip
    more = [100 * some(max(1, len(image) // 2), H, W, image.shape[-1]) for image in images]
    check(run, gain, beta, shift, images, more, some(C, seed=8))


@pytest.mark.parametrize(
    ("sizes", "groups", "shifts", "added", "phases"),
    (
        (((12, 5, 7),), 3, 0, False, False),
        (((40, 20, 17),), 4, 4, True, False),
        (((36, 6, 5), (24, 6, 5)), 4, 2, True, False),
        (((12, 5, 4),), 3, 0, False, True),
    ),
)
def test_norms_by_sums_that_were_left_are_the_formula_s(
    on_kernels, sizes, groups, shifts, added, phases
):
    on_kernels(normed, sizes, groups, shifts, added, phases)


def check_group_norm():
    """Against torch's own, in several parts of an image."""
    x = some(2, 33, 31, 8)
    gain, bias = some(8, seed=1), some(8, seed=2)
    with by_kernels(), mock.patch.object(triton_group_norm, "MOST_PARTS", 3):
        y, sums = passes.add(x, bias)
        found = passes.scaled([y], *passes.affine([sums], gain, bias, None, 2, 1e-6), silu=True)
    right = F.group_norm((x + bias).permute(0, 3, 1, 2).double(), 2, *doubles((gain, bias)), 1e-6)
    expected = F.silu(right).permute(0, 2, 3, 1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_sums_of_parts_give_torch_s_norm(on_kernels):
    on_kernels(check_group_norm)


def check_rows():
    y, more = some(6, 40), some(12, 40, seed=1)
    gain, bias = some(40, seed=2), some(40, seed=3)

    def run(y, more, gain, bias, shift):
        out = more.new_zeros(12, 50)
        total, inside = passes.add_norm(y, more, gain, bias, 1e-5, out[:, 3:43])
        alone, first = passes.add_norm(y, None, gain, bias, 1e-5)
        assert torch.equal(total, out[:, 3:43]) and not out[:, :3].any() and alone is y
        same, moved = passes.add_norm(y, more, gain, bias, 1e-5, shift=shift)
        assert torch.equal(same, total)
        return torch.cat([total, inside, first, moved])

    check(run, y, more, gain, bias, some(40, seed=4))

    def gated(x):
        out = x.new_zeros(5, 45)
        passes.geglu(x, out[:, 2:42])
        return out

    check(gated, 3 * some(5, 80) - 9)


def test_rows_are_the_formula_s(on_kernels):
    on_kernels(check_rows)
