"""Gradient transformations that see matrices: Muon and Adafactor.

Dimension key: N matrices of one shape, R rows, C columns.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
from msfs_kernels.dispatch import is_sharded
from torch import Tensor

from msfs_functional.updates import (
    MomentumState,
    Transformation,
    Tree,
    alike,
    check_decay,
    stateless,
    tree_map,
    whole_map,
    widen,
    zero_count,
    zeros_like,
)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(
    matrix_NRC: Tensor,
    *,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NEWTON_SCHULZ,
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Each matrix G = U S V^T with its singular values moved to about 1, by `steps` products.

    Newton-Schulz: X <- G / |G|, then `steps` times X <- a X + (b A + c A A) X, A = X X^T. The
    coefficients (Jordan et al. 2024) grow small singular values fastest: five steps take all above
    0.002 |G| into [0.68, 1.2].

    Args:
        matrix_NRC: any number of leading dims; all matrices go through the same products.
        dtype: of the products; bfloat16 is exact enough, as the result is only near orthogonal.
    """
    a, b, c = coefficients
    tall = matrix_NRC.shape[-2] > matrix_NRC.shape[-1]
    wide = matrix_NRC.mT if tall else matrix_NRC
    x = wide.reshape(-1, *wide.shape[-2:]).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x.reshape(wide.shape).to(matrix_NRC.dtype)
    return x.mT if tall else x


def orthogonal_updates(matrices: list[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Matrices of one shape, orthogonalised and scaled; DTensors come back cut as they were."""
    make = functools.partial(orthogonalize, dtype=dtype)
    if not is_sharded(matrices[0]):
        return list((make(torch.stack(matrices)) * scale).unbind())
    from msfs_functional.sharding import share_out  # one process needs none of it

    made = share_out(make, tree_map(lambda x: x.to(dtype), matrices))  # as `make` begins
    return tree_map(lambda x, like: x.to(like.dtype) * scale, made, matrices)


def scale_by_muon(
    momentum: float = 0.95,
    nesterov: bool = True,
    *,
    match_adamw: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Transformation:
    """Momentum, orthogonalised (Jordan et al. 2024, "Muon").

    mu <- momentum mu + (1 - momentum) g
    u = momentum mu + (1 - momentum) g with nesterov, else mu
    update = orthogonalize(u) sqrt(max(1, R / C)), or with match_adamw
    update = orthogonalize(u) 0.2 sqrt(max(R, C)), as large as AdamW's (Liu et al. 2025, eq. 4)

    Parameters are (..., R, C), leading dims count matrices. Equal shapes are stacked and go through
    the same batched products, so the number of kernels grows with the number of shapes only. On a
    mesh the momentum stays in shards, and the ranks that cut a matrix share the stack out: each
    makes whole matrices of its own (Liu et al. 2025, section 2.3, without the redundant products).
    """
    check_decay(momentum=momentum)

    def init(params: dict[str, Tensor]) -> MomentumState:
        for name, p in params.items():
            if p.ndim < 2:
                raise ValueError(
                    f"muon needs matrices, {name!r} is {tuple(p.shape)}: send it to the rest"
                )
        return MomentumState(zeros_like(params))

    def update(grads: dict[str, Tensor], state: MomentumState, params: dict[str, Tensor]):
        grads = widen(grads)
        mu = tree_map(lambda m, g: torch.lerp(m, g, 1 - momentum), state.mu, grads)
        u = tree_map(lambda m, g: torch.lerp(g, m, momentum), mu, grads) if nesterov else mu
        names: dict[Any, list[str]] = {}
        for name, p in params.items():
            placed = p.placements if is_sharded(p) else None  # pyright: ignore
            names.setdefault((tuple(p.shape), placed), []).append(name)
        updates = {}
        for ((*_, rows, columns), _), group in names.items():
            scale = (
                0.2 * math.sqrt(max(rows, columns))
                if match_adamw
                else math.sqrt(max(1, rows / columns))
            )
            orthogonal = orthogonal_updates([u[name] for name in group], scale, dtype)
            updates.update(zip(group, orthogonal, strict=True))
        return {name: updates[name] for name in grads}, MomentumState(mu)

    return Transformation(init, update, alike)


class FactoredState(NamedTuple):
    count: Tensor  # updates made so far
    rows: Tree  # (..., R, 1) mean square of each row; for a vector its squares, (C,)
    columns: Tree  # (..., 1, C) mean square of each column; for a vector 0-d and unused


def scale_by_factored_rms(
    beta2_decay: float = -0.8, eps: float | None = None, clip: float = 1.0
) -> Transformation:
    """Gradient over its root mean square, kept as rows times columns, then clipped.

    With w = t**beta2_decay: rows <- (1 - w) rows + w mean_C g**2, columns likewise over R,
    v = rows columns / mean_R rows, u = g / sqrt(max(v, eps**2)), update = u / max(1, rms(u) / clip)
    (Shazeer and Stern 2018, Algorithms 4 and 5, with w of section 7.2). A matrix of R x C needs
    R + C numbers of state. eps None: the machine epsilon of the parameter's dtype.
    """
    if not beta2_decay <= 0:
        raise ValueError(f"beta2_decay ({beta2_decay}) must not be positive: the weight is t**it")
    if not clip > 0:
        raise ValueError(f"clip ({clip}) must be positive")

    def init(params: Tree) -> FactoredState:
        full = zeros_like(params)
        rows = whole_map(lambda v: torch.zeros_like(v[..., :1]) if v.ndim > 1 else v, full)
        columns = whole_map(
            lambda v: torch.zeros_like(v[..., :1, :]) if v.ndim > 1 else v.new_zeros(()), full
        )
        return FactoredState(zero_count(params), rows, columns)

    def update(grads: Tree, state: FactoredState, params: Tree) -> tuple[Tree, FactoredState]:
        count, grads = state.count + 1, widen(grads)

        def average(old: Tensor, g: Tensor, dim: int) -> Tensor:
            square = g.square()
            if g.ndim > 1:
                square = square.mean(dim, keepdim=True)
            return old + count.to(old.dtype) ** beta2_decay * (square - old)

        def scale(g: Tensor, row: Tensor, column: Tensor, p: Tensor) -> Tensor:
            tiny = torch.finfo(p.dtype).eps if eps is None else eps
            v = row
            if g.ndim > 1:
                v = row * column / row.mean(-2, keepdim=True).clamp_min(tiny)
            u = torch.rsqrt(v.clamp_min(tiny**2)) * g
            return u / torch.clamp(rms(u) / clip, min=1.0)

        rows = whole_map(lambda r, g: average(r, g, -1), state.rows, grads)
        columns = whole_map(
            lambda c, g: average(c, g, -2) if g.ndim > 1 else c, state.columns, grads
        )
        return whole_map(scale, grads, rows, columns, params), FactoredState(count, rows, columns)

    return Transformation(init, update, alike)


def scale_by_parameter_rms(minimum: float = 1e-3) -> Transformation:
    """updates * max(minimum, rms(params)): steps relative to each parameter (ibid., section 8)."""
    return stateless(
        lambda grads, params: whole_map(lambda u, p: u * rms(p).clamp_min(minimum), grads, params),
        alike,
    )


def rms(x: Tensor) -> Tensor:
    return torch.sqrt(widen(x).square().mean())
