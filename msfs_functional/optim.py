"""Optimizers as (init, update) pairs, each a chain of gradient transformations.

    optimizer = chain(clip_by_global_norm(1.0), adamw(cosine(1e-3, 10_000, warmup=500)))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)  # pure
    params = apply_updates(params, updates)

    in_place(optimizer)(grads, state, params)  # donating: overwrites params and state

The learning rate is a number or a schedule (`schedules`). `decay` says by rules over names which
parameters decay: [("bias$|norm", False), ("", True)]; None means all. `updates` holds the links.
"""

import torch
from torch import Tensor

from msfs_functional.matrix_updates import (
    scale_by_factored_rms,
    scale_by_muon,
    scale_by_parameter_rms,
)
from msfs_functional.params import Rules, by_rules
from msfs_functional.schedules import Schedule, constant
from msfs_functional.updates import (
    Average,
    Transformation,
    add_decayed_weights,
    apply_updates,
    by_group,
    chain,
    clip_by_global_norm,
    ema,
    global_norm,
    in_place,
    overwrite,
    partition,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_momentum,
)

__all__ = [
    "Average",
    "Schedule",
    "Transformation",
    "adafactor",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "by_group",
    "chain",
    "clip_by_global_norm",
    "ema",
    "global_norm",
    "in_place",
    "lion",
    "muon",
    "overwrite",
    "scale_by_adam",
    "scale_by_factored_rms",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_momentum",
    "scale_by_muon",
    "scale_by_parameter_rms",
    "sgd",
]


def adamw(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    decay: Rules[bool] | None = None,
) -> Transformation:
    """AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019, Algorithm 2).

    p <- p - learning_rate (adam(g) + weight_decay p); equal to torch.optim.AdamW.
    """
    return chain(
        scale_by_adam(b1, b2, eps),
        add_decayed_weights(weight_decay, decay),
        scale_by_learning_rate(learning_rate),
    )


def sgd(
    learning_rate: float | Schedule,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: Rules[bool] | None = None,
) -> Transformation:
    """Stochastic gradient descent; equal to torch.optim.SGD.

    The decay is coupled: it is added to the gradient, before the momentum.
    """
    if nesterov and momentum == 0.0:
        raise ValueError("nesterov needs momentum > 0, got momentum 0")
    return chain(
        add_decayed_weights(weight_decay, decay),
        *([scale_by_momentum(momentum, nesterov)] if momentum else []),
        scale_by_learning_rate(learning_rate),
    )


def lion(
    learning_rate: float | Schedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.01,
    decay: Rules[bool] | None = None,
) -> Transformation:
    """Lion: the sign of the momentum, with decoupled weight decay (Chen et al. 2023, Algorithm 2).

    Every element moves by learning_rate: choose it 3 to 10 times smaller than for AdamW, and
    weight_decay as many times larger (their section 5).
    """
    return chain(
        scale_by_lion(b1, b2),
        add_decayed_weights(weight_decay, decay),
        scale_by_learning_rate(learning_rate),
    )


def muon(
    learning_rate: float | Schedule,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.1,
    decay: Rules[bool] | None = None,
    *,
    match_adamw: bool = False,
    matrices: Rules[bool] | None = None,
    rest: Transformation | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Transformation:
    """Muon for matrices, another optimizer for the rest (Jordan et al. 2024); see scale_by_muon.

    Args:
        learning_rate, weight_decay, decay: of the matrices; equal to torch.optim.Muon.
        match_adamw: scale updates so that AdamW's learning rate and decay fit (Liu et al. 2025).
        matrices: rules saying which parameters are matrices; None: those of exactly two dims.
            Embeddings and output projections do better in the rest:
            [("embedding|output", False), ("weight$", True), ("", False)]
        rest: what updates the others; None: adamw(learning_rate) with match_adamw, for which
            one rate fits both, else adamw(3e-4).
        dtype: of the products that orthogonalise.
    """

    def assign(params: dict[str, Tensor], strict: bool) -> dict[str, int]:
        if matrices is None:
            return {name: 0 if p.ndim == 2 else 1 for name, p in params.items()}
        return {name: 0 if yes else 1 for name, yes in by_rules(matrices, params, strict).items()}

    orthogonal = chain(
        scale_by_muon(momentum, nesterov, match_adamw=match_adamw, dtype=dtype),
        add_decayed_weights(weight_decay, decay),
        scale_by_learning_rate(learning_rate),
    )
    if rest is None:
        rest = adamw(learning_rate if match_adamw else 3e-4)
    return partition(assign, [orthogonal, rest])


def adafactor(
    learning_rate: float | Schedule = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    clip: float = 1.0,
    weight_decay: float = 0.0,
    decay: Rules[bool] | None = None,
) -> Transformation:
    """Adafactor: second moments as rows times columns (Shazeer and Stern 2018, Algorithms 4, 5).

    p <- p - max(eps[1], rms(p)) rho u - learning_rate weight_decay p,
    rho = min(learning_rate, 1 / sqrt(t)), u from scale_by_factored_rms; as torch.optim.Adafactor.
    """
    rate = learning_rate if callable(learning_rate) else constant(learning_rate)
    return chain(
        scale_by_factored_rms(beta2_decay, eps[0], clip),
        scale_by_parameter_rms(eps[1]),
        scale_by_learning_rate(
            lambda count: torch.minimum(rate(count), torch.rsqrt(count.to(torch.float32) + 1))
        ),
        add_decayed_weights(lambda count: -weight_decay * rate(count), decay)
        if weight_decay
        else chain(),
    )
