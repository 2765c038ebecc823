"""Distances of feature clouds: by hand, against slow formulas, and what moves them."""

import itertools
import math

import pytest
import torch

from msfs_functional import random
from msfs_functional.fidelity import (
    features_of,
    frechet_distance,
    kernel_distance,
    precision_recall,
)


def cloud(seed: int, n: int, d: int) -> torch.Tensor:
    mix = random.normal(random.key(seed + 100), (d, d), dtype=torch.float64)
    return random.normal(random.key(seed), (n, d), dtype=torch.float64) @ mix


def test_frechet_distance_of_one_feature_is_that_of_means_and_deviations():
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [4.0], [8.0]])
    std, std_fake = math.sqrt(2), math.sqrt(7)
    expected = (1 - 5) ** 2 + (std - std_fake) ** 2
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_equals_the_formula_with_a_matrix_root():
    real, fake = cloud(0, 40, 5), cloud(1, 50, 5)
    a, b = torch.cov(real.T), torch.cov(fake.T)
    root = torch.linalg.eigvals(a @ b).sqrt().sum().real  # trace of the root of a product
    expected = (real.mean(0) - fake.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(fake, real) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_stands_features_that_hang_together():
    real = cloud(0, 30, 3) @ torch.ones(3, 6, dtype=torch.float64)  # rank 1 of 6
    assert frechet_distance(real, real + 2) == pytest.approx(24, rel=1e-6)


def test_kernel_distance_equals_the_double_loop():
    real, fake = cloud(2, 7, 4), cloud(3, 7, 4)

    def kernel(x, y):
        return float((x @ y / 4 + 1) ** 3)

    within = sum(
        sum(kernel(x[i], x[j]) for i, j in itertools.permutations(range(7), 2)) / 42
        for x in (real, fake)
    )
    across = sum(kernel(x, y) for x in real for y in fake) / 49
    found = kernel_distance(real, fake, random.key(0), subsets=3)
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert found.std == pytest.approx(0, abs=1e-9 * found.mean)  # a subset is everything


def test_kernel_distance_is_unbiased_and_its_subsets_are_drawn_by_the_key():
    real, fake = cloud(4, 400, 3), cloud(4, 800, 3)[400:]
    found = kernel_distance(real, fake, random.key(0), subsets=200, size=50)
    assert abs(found.mean) < 4 * found.std / math.sqrt(200) + 0.05 * found.std
    assert found == kernel_distance(real, fake, random.key(0), subsets=200, size=50)
    assert found != kernel_distance(real, fake, random.key(1), subsets=200, size=50)


def test_precision_and_recall_by_hand():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # 1st neighbours: 1, 1, 1, 8 away
    fake = torch.tensor([[1.5], [2.5], [30.0]])  # 1, 1, 27.5
    found = precision_recall(real, fake, k=1, chunk=2)
    assert found.precision == pytest.approx(2 / 3)  # 30 lies in no reach
    assert found.recall == pytest.approx(1.0 * 3 / 4)  # 0 does not: 1.5 reaches to 0.5
    assert precision_recall(real, real, k=1) == (1.0, 1.0)


def test_features_are_made_in_batches():
    pictures = torch.arange(5 * 3, dtype=torch.uint8).view(5, 3, 1, 1)
    found = features_of(pictures, lambda x: x.flatten(1).float(), batch=2)
    assert found.dtype == torch.float64 and torch.equal(found, pictures.flatten(1).double())


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    (
        (torch.ones(1, 3), torch.ones(5, 3), "at least 2: take more pictures"),
        (torch.ones(4, 3), torch.ones(5, 2), "one extractor makes both"),
        (torch.ones(4, 3), torch.full((5, 3), math.nan), "must be finite"),
        (torch.ones(4), torch.ones(5), r"must be \(count, D\)"),
    ),
)
def test_clouds_that_cannot_be_compared_are_refused(real, fake, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, fake)


def test_other_bad_calls_are_refused():
    with pytest.raises(ValueError, match="in uint8: rounding"):
        features_of(torch.ones(2, 3, 4, 4), lambda x: x)
    with pytest.raises(ValueError, match=r"subsets \(0\)"):
        kernel_distance(cloud(0, 5, 2), cloud(1, 5, 2), random.key(0), subsets=0)
    with pytest.raises(ValueError, match=r"k \(0\)"):
        precision_recall(cloud(0, 5, 2), cloud(1, 5, 2), k=0)
    with pytest.raises(ValueError, match="at least 4"):
        precision_recall(cloud(0, 3, 2), cloud(1, 5, 2))
