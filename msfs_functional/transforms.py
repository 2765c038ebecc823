"""Transformations of functions: gradients, recomputation, ensembles, curvature products.

`torch.func` works on every model of this library directly. What stands here is what it lacks:

    value_and_grad      the training path, on the autograd engine: compiled losses, DTensor, remat
    accumulate          the same for a sum over microbatches, in the memory of one
    remat               forget activations, compute them again in the backward pass
    per_example_grads   one gradient for each example of a batch
    ensemble            one function over many stacked sets of parameters
    hvp, ggn_vp         Hessian and Gauss-Newton matrices times a vector, never built

Arguments are pytrees (optree, namespace "msfs_functional"): dicts of tensors, dicts of dicts, ...
"""

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from msfs_functional.params import Methods, Params, cast

NAMESPACE = "msfs_functional"

_active = threading.local()  # how many value_and_grad calls this thread is inside of


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return optree.tree_flatten(tree, namespace=NAMESPACE)  # pyright: ignore[reportReturnType]


def _check_differentiable(leaves: list[Any], argnum: int) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            what = str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"argument {argnum} holds a leaf of type {what}, which has no gradient: pass it in "
                f"an argument that is not differentiated"
            )


def _check_scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"gradients need a 0-d tensor from the function, got {what}")
    return value


def value_and_grad(
    fn: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """fn's value and its gradient: `(value, grads)`, or `((value, aux), grads)` with has_aux.

        loss, grads = value_and_grad(loss_fn)(params, batch)

    At the top it runs `torch.autograd.grad` on detached leaves, so it takes all that the autograd
    engine takes: a compiled fn, remat, DTensor. Called inside another value_and_grad, inside a
    `torch.func` transform or inside torch.compile it uses `torch.func`, which nests. Gradients of
    leaves that fn does not use are zeros.

    Args:
        fn: returns a 0-d tensor, or (0-d tensor, aux) with has_aux; aux is any pytree.
        argnums: which positional arguments to differentiate; each a pytree of floating tensors.
            A tuple of them gives a tuple of gradients.

    Returns:
        a function of fn's arguments. Value, aux and gradients are detached where the engine made
        them; a gradient has the structure, shapes and dtypes of its argument.

    Raises:
        ValueError: a differentiated leaf is no floating tensor; fn's value is no 0-d tensor.
    """
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        leaves, specs = [], []
        for argnum in chosen:
            own, spec = _flatten(args[argnum])
            _check_differentiable(own, argnum)
            leaves += own
            specs.append((spec, len(own)))

        def rebuild(leaves: Any) -> list[Any]:
            trees, start = [], 0
            for spec, size in specs:
                trees.append(optree.tree_unflatten(spec, leaves[start : start + size]))
                start += size
            return trees

        def call(leaves: Any) -> tuple[Tensor, Any]:
            full = list(args)
            for argnum, tree in zip(chosen, rebuild(leaves), strict=True):
                full[argnum] = tree
            out = fn(*full, **kwargs)
            value, aux = out if has_aux else (out, None)
            return _check_scalar(value), aux

        if _must_nest(leaves):
            value, aux, grads = _functorch(call, leaves)
        else:
            value, aux, grads = _engine(call, leaves)
        trees = rebuild(grads)
        result = trees[0] if isinstance(argnums, int) else tuple(trees)
        return ((value, aux) if has_aux else value), result

    return run


def _must_nest(leaves: list[Tensor]) -> bool:
    """Whether somebody outside may differentiate or map the result, or trace it."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if getattr(_active, "depth", 0):
        return True
    return torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)


def _functorch(call: Callable, leaves: list[Tensor]) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    rest: list[Any] = []  # aux without its tensors, which alone may leave torch.func

    def tensors_only(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value, aux = call(leaves)
        parts, spec = _flatten(aux)
        rest[:] = [spec, [None if isinstance(part, Tensor) else part for part in parts]]
        return value, tuple(part for part in parts if isinstance(part, Tensor))

    grads, (value, tensors) = grad_and_value(tensors_only, has_aux=True)(tuple(leaves))
    spec, parts = rest
    remaining = iter(tensors)
    parts = [next(remaining) if part is None else part for part in parts]
    return value, optree.tree_unflatten(spec, parts), grads


def _engine(call: Callable, leaves: list[Tensor]) -> tuple[Tensor, Any, tuple[Tensor, ...]]:
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    _active.depth = getattr(_active, "depth", 0) + 1
    try:
        with torch.enable_grad():
            value, aux = call(inputs)
            if not value.requires_grad:
                return value, aux, tuple(torch.zeros_like(leaf) for leaf in leaves)
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
    finally:
        _active.depth -= 1
    leaves, spec = _flatten(aux)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return value.detach(), optree.tree_unflatten(spec, leaves), grads


def accumulate(fn: Callable[..., tuple[Tensor, Any]], params: Any, calls: Iterable[tuple]) -> Any:
    """Sums over `calls` of fn's value, aux and gradient, in the memory of one call.

        ((value, aux), grads) = accumulate(fn, params, [(batch_0, key_0), (batch_1, key_1)])

    Every leaf equals value_and_grad of `sum(fn(params, *call) for call in calls)` to rounding.

    Args:
        fn: fn(params, *call) -> (0-d tensor, aux pytree of tensors): sums, not means.
        params: pytree to differentiate.
        calls: the other arguments, call by call.

    Raises:
        ValueError: no calls.
    """
    gradient = value_and_grad(fn, has_aux=True)
    totals: list[Any] = []
    spec: Any = None
    i = -1
    for i, call in enumerate(calls):
        terms, spec = _flatten(gradient(params, *call))
        if i == 0:
            totals = terms
        elif i == 1:  # autograd may return one tensor for two leaves: only sums of ours are ours
            for j, term in enumerate(terms):
                totals[j], terms[j] = totals[j] + term, None
        else:
            torch._foreach_add_(totals, terms)
    if i < 0:
        raise ValueError("accumulate needs at least one call, got none")
    return optree.tree_unflatten(spec, totals)


def in_dtype(dtype: torch.dtype) -> Callable[..., Any]:
    """`accumulate` by parameters cast to `dtype`, whose gradients stay so until the optimizer.

        make_step(loss_fn, optimizer, compile="regions", gradient=in_dtype(torch.bfloat16))

    The same numbers as a loss that casts its parameters first: the gradient of a cast is a cast.
    But the optimizer reads half the bytes, and nothing writes them anew. Several microbatches are
    summed in the parameters' own dtype, as by `accumulate`.
    """

    def gradient(fn: Callable[..., tuple[Tensor, Any]], params: Any, calls: Iterable[tuple]) -> Any:
        calls = list(calls)
        if len(calls) > 1:
            return accumulate(lambda p, *call: fn(cast(p, dtype), *call), params, calls)
        return accumulate(fn, cast(params, dtype), calls)

    return gradient


def add_terms(total: Any, terms: Any) -> Any:
    """The sum of two pytrees of tensors; total None is nothing yet."""
    return terms if total is None else optree.tree_map(torch.add, total, terms, namespace=NAMESPACE)


def remat(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, whose inner activations are forgotten and computed again in the backward pass.

    Same values and gradients for the memory of fn's inputs; costs one more forward pass of fn.
    Eager it checkpoints; inside torch.compile the partitioner recomputes. Under `torch.func`
    transforms, whose engine takes no saved-tensor hooks, fn runs as it is: right, nothing saved.

    Args:
        fn: a pure function (random numbers only from keys), an nn.Module, or a method of one; a
            module is recomputed with the parameters it has now, so blocks inside a `functional`
            model can be wrapped where they are called.
    """
    owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
    methods = Methods(owner if isinstance(owner, nn.Module) else nn.Identity())
    name = "__call__" if isinstance(fn, nn.Module) else getattr(fn, "__name__", "")

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active() or not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        again = functools.partial(fn, **kwargs)
        if isinstance(owner, nn.Module) and not torch.compiler.is_compiling():
            held: Params = dict(methods.named_parameters(remove_duplicate=False))

            def again(*args: Any) -> Any:
                return functional_call(methods, held, (name, args, kwargs), tie_weights=False)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    return run


def per_example_grads(
    loss_fn: Callable[..., Tensor],
    in_dims: int | tuple = (None, 0),
    *,
    chunk_size: int | None = None,
) -> Callable[..., Any]:
    """The gradient of loss_fn in its first argument for each example: leaves (B, *shape).

        grads = per_example_grads(loss_fn)(params, batch)


    Args:
        loss_fn: returns a 0-d tensor for one example, which it sees without its batch dim.
        in_dims: for each argument the dim that counts examples (a pytree of them, as in
            `torch.vmap`), or None for an argument that all examples share.
        chunk_size: examples at a time; bounds the activations held.
    """
    return vmap(grad(loss_fn), in_dims=in_dims, chunk_size=chunk_size)


def ensemble(fn: Callable[..., Any], argnums: int | Sequence[int] = 0) -> Callable[..., Any]:
    """fn for N members at once: arguments in `argnums` carry a leading dim N, so does the result.

        logits = ensemble(model.apply)(stack([params_0, params_1]), x)             # (2, B, V)
        losses = ensemble(loss_fn, argnums=(0, 2))(stacked, batch, keys)           # one key each

    Args:
        fn: any function of tensors, pytrees and plain values.
        argnums: positional arguments that are stacked; the others, and keywords, are shared.
    """
    stacked = {argnums} if isinstance(argnums, int) else set(argnums)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        in_dims = tuple(0 if i in stacked else None for i in range(len(args)))
        return vmap(functools.partial(fn, **kwargs), in_dims=in_dims)(*args)

    return run


def hvp(fn: Callable[[Any], Tensor], primals: Any, tangents: Any) -> Any:
    """Hessian-vector product H v with H = d^2 fn / d primals^2, forward over reverse.

    H v = d/de grad fn(primals + e v) at e = 0 (Pearlmutter 1994): exact, for about twice the cost
    of a gradient, in memory linear in the parameters. H is symmetric and linear in v.

    Args:
        fn: maps the pytree `primals` to a 0-d tensor.
        tangents: v, a pytree of the same structure, shapes and dtypes as primals.

    Returns:
        H v, a pytree like primals.
    """
    x, v, spec = _paired(primals, tangents)

    def flat(*leaves: Tensor) -> Tensor:
        return _check_scalar(fn(optree.tree_unflatten(spec, leaves)))

    gradient = grad(flat, argnums=tuple(range(len(x))))
    return optree.tree_unflatten(spec, jvp(gradient, x, v)[1])


def ggn_vp(
    model_fn: Callable[[Any], Any], loss_fn: Callable[[Any], Tensor], params: Any, tangents: Any
) -> Any:
    """Gauss-Newton-vector product G v with G = J^T L J (Schraudolph 2002).

    J = d model_fn / d params, L = Hessian of loss_fn at the model's outputs. G is the Hessian of
    loss_fn(model_fn(params)) without the curvature of the model; for a convex loss it is positive
    semi-definite, for softmax cross-entropy and squared error it is the Fisher matrix.

    Args:
        model_fn: maps the pytree `params` to outputs, a tensor or pytree of tensors.
        loss_fn: maps outputs to a 0-d tensor.
        tangents: v, a pytree of the same structure, shapes and dtypes as params.

    Returns:
        G v, a pytree like params.
    """
    x, v, spec = _paired(params, tangents)

    def flat(*leaves: Tensor) -> Any:
        return model_fn(optree.tree_unflatten(spec, leaves))

    outputs, pull_back, *_ = vjp(flat, *x)
    pushed = jvp(flat, x, v)[1]
    return optree.tree_unflatten(spec, pull_back(hvp(loss_fn, outputs, pushed)))


def _paired(primals: Any, tangents: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Any]:
    x, spec = _flatten(primals)
    v, other = _flatten(tangents)
    if len(x) != len(v):
        raise ValueError(f"the vector has structure {other}, expected that of the primals: {spec}")
    _check_differentiable(x, 0)
    for here, there in zip(x, v, strict=True):
        if here.shape != there.shape:
            raise ValueError(
                f"the vector has a leaf of shape {tuple(there.shape)} where the primals have "
                f"{tuple(here.shape)}; it must be a pytree like the primals"
            )
    return tuple(x), tuple(v), spec
