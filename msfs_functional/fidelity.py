"""How near generated pictures are to real ones: distances between two clouds of features.

    real, fake = features_of(pictures, feature_fn), features_of(samples, feature_fn)
    frechet_distance(real, fake)       FID: of two Gaussians with these means and covariances
    kernel_distance(real, fake, key)   KID: mean and std over subsets, unbiased
    precision_recall(real, fake)       share of fakes that look real, of reals that are covered

A figure means something only beside others of the same extractor, the same real pictures and the
same number of samples: say all three. The published FIDs use Inception's 2048 features and 50,000
samples; `features.py` has that one and smaller ones.

Dimension key: N real, M fake, D features.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from msfs_functional import random

FeatureFn = Callable[[Tensor], Tensor]  # uint8 (B, C, H, W) -> (B, D)


@torch.no_grad()
def features_of(
    pictures: UInt8[Tensor, "N C H W"],
    feature_fn: FeatureFn,
    *,
    batch: int = 500,
    device: torch.device | str | None = None,
) -> Float[Tensor, "N D"]:
    """The features of all pictures, a batch at a time, in float64.

    Raises:
        ValueError: no pictures, or not in uint8.
    """
    if not len(pictures) or pictures.dtype != torch.uint8:
        raise ValueError(
            f"pictures {tuple(pictures.shape)} {pictures.dtype} must be some, in uint8: rounding "
            "to 8 bits is part of the measure"
        )
    parts = [feature_fn(rows.to(device or rows.device)).double() for rows in pictures.split(batch)]
    return torch.cat(parts)


def frechet_distance(real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"]) -> float:
    """|mean - mean'| ** 2 + trace(C + C' - 2 (C C') ** 0.5), covariances with N - 1.

    Biased upwards, by about D / N of the spread: with fewer samples than features it says little.

    Raises:
        ValueError: fewer than two of either, other features, values that are not finite.

    Source: Heusel et al. 2017, equation 6.
    """
    real, fake = _pair(real, fake, least=2)
    apart = (real.mean(0) - fake.mean(0)).square().sum()
    C, C_fake = (
        torch.cov(real.T).reshape(len(real.T), -1),
        torch.cov(fake.T).reshape(len(fake.T), -1),
    )
    # C C' has the eigenvalues of the symmetric R C' R with R = C ** 0.5.
    values, vectors = torch.linalg.eigh(C)
    R = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(R @ C_fake @ R).clamp(min=0).sqrt().sum()
    return float(apart + C.trace() + C_fake.trace() - 2 * shared)


class Estimate(NamedTuple):
    """A mean, and the standard deviation of what it is the mean of."""

    mean: float
    std: float


def kernel_distance(
    real: Float[Tensor, "N D"],
    fake: Float[Tensor, "M D"],
    key: Int64[Tensor, "2"],
    *,
    subsets: int = 100,
    size: int = 1000,
) -> Estimate:
    """The squared MMD under the kernel (x . y / D + 1) ** 3, over subsets of `size` of each.

    Unbiased, so it may be below 0, and its mean does not depend on the number of samples.

    Raises:
        ValueError: fewer than two of either, other features; subsets or size out of range.

    Source: Binkowski et al. 2018, section 3.
    """
    real, fake = _pair(real, fake, least=2)
    size = min(size, len(real), len(fake))
    if subsets < 1 or size < 2:
        raise ValueError(f"subsets ({subsets}) must be at least 1, size ({size}) at least 2")

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k = kernel(x, x)
        return (k.sum() - k.diagonal().sum()) / (len(x) * (len(x) - 1))

    found = []
    for i in range(subsets):
        keys = random.split(random.fold_in(key, i)).to(real.device)
        x = real[random.uniform(keys[0], (len(real),)).argsort()[:size]]
        y = fake[random.uniform(keys[1], (len(fake),)).argsort()[:size]]
        found.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    each = torch.stack(found)
    return Estimate(float(each.mean()), float(each.std()) if subsets > 1 else 0.0)


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float  # of fakes inside the real ones' neighbourhoods: do they look right
    recall: float  # of reals inside the fakes' neighbourhoods: is everything there made


def precision_recall(
    real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"], *, k: int = 3, chunk: int = 2000
) -> PrecisionRecall:
    """A cloud covers what lies no farther from one of its points than its k-th neighbour there.

    Args:
        chunk: rows of distances held at once.

    Raises:
        ValueError: not more than k of either, other features.

    Source: Kynkäänniemi et al. 2019, equations 1 and 2.
    """
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1: 3 is the paper's")
    real, fake = _pair(real, fake, least=k + 1)

    def radii(x: Tensor) -> Tensor:
        rows = [torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(chunk)]
        return torch.cat(rows)  # the first neighbour of a point is itself

    def covered(points: Tensor, cloud: Tensor) -> float:
        reach = radii(cloud)
        rows = [(torch.cdist(part, cloud) <= reach).any(1) for part in points.split(chunk)]
        return float(torch.cat(rows).double().mean())

    return PrecisionRecall(covered(fake, real), covered(real, fake))


def evenly(count: int, most: int) -> Int64[Tensor, "_"]:
    """At most so many rows of `count`, evenly: sets often lie class by class."""
    n = min(count, most)
    return torch.arange(n) * count // n


def scores(
    real: Float[Tensor, "N D"], fake: Float[Tensor, "M D"], key: Int64[Tensor, "2"], **options: Any
) -> dict[str, float]:
    """All of the above by name: fid, kid, kid_std, precision and recall.

    Precision and recall compare as many real samples as there are fake ones, taken evenly.

    Args:
        key, options: of `kernel_distance`.
    """
    kid = kernel_distance(real, fake, key, **options)
    near = precision_recall(real[evenly(len(real), len(fake))], fake)
    found = {"fid": frechet_distance(real, fake), "kid": kid.mean, "kid_std": kid.std}
    return found | near._asdict()


def _pair(real: Tensor, fake: Tensor, least: int) -> tuple[Tensor, Tensor]:
    for name, x in (("real", real), ("fake", fake)):
        if x.ndim != 2 or len(x) < least:
            raise ValueError(
                f"{name} features {tuple(x.shape)} must be (count, D) with a count of at least "
                f"{least}: take more pictures"
            )
        if not bool(x.isfinite().all()):
            raise ValueError(f"{name} features must be finite: look at the pictures for NaN")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(
            f"real {tuple(real.shape)} and fake {tuple(fake.shape)} must have as many features: "
            "one extractor makes both"
        )
    return real.double(), fake.double().to(real.device)
