"""What curvature products give: solves without a matrix, influence of examples, trust regions.

    solve               (A + damping) x = v for a function v -> A v, by conjugate gradients
    influences          how much each training example moves another loss (Koh and Liang 2017)
    trust_region_step   the exact natural gradient within a KL ball (Schulman et al. 2015)

Vectors are flat dicts like parameters, whole or in shards (DTensors). No matrix is built: A v is a
Hessian or Gauss-Newton product of `transforms`.

Dimension key: N examples, ... T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad, jvp, vmap

from msfs_functional.checks import not_negative, positive
from msfs_functional.params import Params
from msfs_functional.sharding import inner_product
from msfs_functional.transforms import ggn_vp, hvp

Product = Callable[[Params], Params]


def dot(x: Params, y: Params) -> Float[Tensor, ""]:
    return inner_product(list(x.values()), [y[name] for name in x])


def axpy(a: Tensor | float, x: Params, y: Params) -> Params:
    """a x + y."""
    return {name: a * x[name] + y[name] for name in x}


class Solved(NamedTuple):
    """x, and how far A x is from v: |A x - v| / |v|."""

    x: Params
    residual: Float[Tensor, ""]
    steps: int


def solve(
    product: Product, v: Params, *, damping: float, steps: int = 20, tolerance: float = 1e-6
) -> Solved:
    """(A + damping) x = v by conjugate gradients.

    Args:
        product: u -> A u with A symmetric, and positive definite with the damping; where it is not
            (a Hessian far from a minimum), the iteration stops at the first negative curvature.
        steps: products at most.
        tolerance: of the residual, at which it stops before.

    Raises:
        ValueError: a negative damping, steps below 1.

    Source: Hestenes and Stiefel 1952.
    """
    not_negative("damping", damping)
    if steps < 1:
        raise ValueError(f"steps ({steps}) must be at least 1 product")
    x = {name: torch.zeros_like(value) for name, value in v.items()}
    r, p, count = dict(v), dict(v), 0
    rr = start = dot(r, r)
    while count < steps and rr > tolerance**2 * start:
        count += 1
        q = axpy(damping, p, product(p))
        curvature = dot(p, q)
        if not curvature > 0:
            break
        a = rr / curvature
        x, r = axpy(a, p, x), axpy(-a, q, r)
        before, rr = rr, dot(r, r)
        p = axpy(rr / before, p, r)
    return Solved(x, (rr / start.clamp(min=torch.finfo(rr.dtype).tiny)).sqrt(), count)


def influences(
    loss_fn: Callable[[Params, Any], Tensor],
    params: Params,
    examples: Any,
    target: Params,
    *,
    damping: float,
    steps: int = 20,
    chunk: int = 32,
    product: Product | None = None,
) -> tuple[Float[Tensor, "N"], Solved]:
    """What one more weight on each example does to another loss, to first order.

        influence_i = -target . (H + damping)^-1 grad loss(params, example_i)

    with H the Hessian of the mean loss over all examples: N times the change of the target's loss
    when example i is counted once more and training goes on to the new minimum. Above 0: it hurts.

    Args:
        loss_fn: of one example, without a batch dim; returns a 0-d tensor.
        examples: pytree of tensors with N in dim 0.
        target: gradient of the other loss, say the mean over held-out pairs.
        damping: added to H, whose eigenvalues may be 0 or below.
        steps: of conjugate gradients, one Hessian product each.
        chunk: examples that are computed at once.
        product: v -> H v in place of the Hessian's, such as the Gauss-Newton matrix's, which is
            positive where a network has not reached its minimum and the Hessian is not.

    Returns:
        (influences, the solve of (H + damping) x = target: look at its residual).

    Source: Koh and Liang 2017, equation 2.
    """

    def mean_loss(params: Params) -> Tensor:
        return vmap(loss_fn, in_dims=(None, 0), chunk_size=chunk)(params, examples).mean()

    hessian = product or (lambda v: hvp(mean_loss, params, v))
    solved = solve(hessian, target, damping=damping, steps=steps)

    def one(example: Any) -> Tensor:
        # the derivative of the example's loss along x: no gradient has to be kept
        return jvp(lambda p: loss_fn(p, example), (params,), (solved.x,))[1]

    return -vmap(one, chunk_size=chunk)(examples), solved


class TrustRegion(NamedTuple):
    """Parameters after the step and what was found."""

    params: Params
    kl: Float[Tensor, ""]  # nats a token, exact
    gain: Float[Tensor, ""]  # of the surrogate
    scale: float  # share of the full step that was taken; 0: none improved
    residual: Float[Tensor, ""]  # of the solve


def trust_region_step(
    surrogate_fn: Callable[[Params], Float[Tensor, ""]],
    logits_fn: Callable[[Params], Float[Tensor, "... V"]],
    params: Params,
    mask: Bool[Tensor, "..."],
    *,
    radius: float,
    damping: float = 1e-3,
    steps: int = 10,
    halvings: int = 8,
    total: Callable[[Tensor], Tensor] = lambda x: x,
) -> TrustRegion:
    """The step that raises the surrogate most within KL(old || new) <= radius, to second order.

        direction  x = (F + damping)^-1 g          F the exact Fisher matrix of the policy
        length     sqrt(2 radius / x.(F + damping) x), halved until the exact KL fits and the
                   surrogate rises

    F is the Gauss-Newton matrix of the KL at its minimum, the mean over tokens of
    J^T (diag p - p p^T) J: of the whole distribution, not of the tokens that were sampled.

    Args:
        surrogate_fn: to be raised, such as the mean of ratio x advantage.
        logits_fn: of the policy at the tokens that the KL counts.
        mask: which of them count.
        radius: nats a token, above 0.
        damping: added to F, which is singular.
        steps: of conjugate gradients.
        halvings: of the length before giving up.
        total: adds a number up over processes that hold other rows, params being shards of one
            model (`gathering.sharded`). The tokens of logits_fn and mask are this process's,
            surrogate_fn is its share of the sum that makes the surrogate: gradients of shards are
            sums over the processes by themselves. All processes take the same step.

    Raises:
        ValueError: a radius not above 0.

    Source: Schulman et al. 2015, section 6 and appendix C.
    """
    positive("radius", radius)
    with torch.no_grad():
        old = logits_fn(params).log_softmax(-1)
    weight = mask.to(old.dtype) / total(mask.sum()).clamp(min=1)

    def kl_fn(logits: Tensor) -> Tensor:
        return ((old.exp() * (old - logits.log_softmax(-1))).sum(-1) * weight).sum()

    def fisher(v: Params) -> Params:
        # forward mode takes tangents of shards only as they lie, which gradients do not
        v = {name: torch.empty_like(params[name]).copy_(x) for name, x in v.items()}
        return ggn_vp(logits_fn, kl_fn, params, v)

    with torch.no_grad():
        before = total(surrogate_fn(params))
    slope = grad(surrogate_fn)(params)
    solved = solve(fisher, slope, damping=damping, steps=steps, tolerance=1e-4)
    length = 2 * radius / dot(solved.x, axpy(damping, solved.x, fisher(solved.x)))
    full, scale = length.clamp(min=0).sqrt(), 1.0
    zero = torch.zeros_like(before)
    if not full.isfinite():
        return TrustRegion(params, zero, zero, 0.0, solved.residual)
    for _ in range(halvings):
        new = axpy(scale * full, solved.x, params)
        with torch.no_grad():
            kl, gain = total(kl_fn(logits_fn(new))), total(surrogate_fn(new)) - before
        if kl <= radius and gain > 0:
            return TrustRegion(new, kl, gain, scale, solved.residual)
        scale /= 2
    return TrustRegion(params, zero, zero, 0.0, solved.residual)
