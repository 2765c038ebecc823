"""Optimizers as (init, update) pairs, each a chain of gradient transformations.

    optimizer = chain(clip_by_global_norm(1.0), adamw(cosine(1e-3, 10_000, warmup=500)))
    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params)  # pure
    params = apply_updates(params, updates)

    in_place(optimizer)(grads, state, params)  # donating: overwrites params and state

The learning rate is a number or a schedule (`schedules`). `decay` says by rules over names which
parameters decay: [("bias$|norm", False), ("", True)]; None means all. `updates` holds the links.
"""

from msfs_functional.params import Rules
from msfs_functional.updates import (
    Average,
    Schedule,
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
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_lion,
    scale_by_momentum,
)

__all__ = [
    "Average",
    "Schedule",
    "Transformation",
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
    "overwrite",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_momentum",
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
