"""Claims of msfs_functional.transforms, in float64 against torch.func and explicit matrices."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, hessian, jacrev, jvp, vmap

from msfs_functional import params as P
from msfs_functional.transforms import (
    accumulate,
    ensemble,
    ggn_vp,
    hvp,
    per_example_grads,
    remat,
    value_and_grad,
)

D64 = torch.float64
both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def fresh_fake_tensors():
    """In torch 2.13, after a compiled `jvp`, compiling `jvp(jvp)` of any plain function fails on a
    poisoned cache entry of the fake tensors."""
    FakeTensorMode.cache_clear()


def maybe_compile(fn, compiled):
    return torch.compile(fn, fullgraph=True, backend="aot_eager") if compiled else fn


@pytest.fixture
def mlp():
    g = torch.Generator().manual_seed(0)
    sizes = {"a": (5, 3), "b": (5,), "c": (2, 5)}
    return {name: torch.randn(size, generator=g, dtype=D64) for name, size in sizes.items()}


@pytest.fixture
def vector():
    g = torch.Generator().manual_seed(2)
    sizes = {"a": (5, 3), "b": (5,), "c": (2, 5)}
    return {name: torch.randn(size, generator=g, dtype=D64) for name, size in sizes.items()}


X = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=D64)


def model(p, x):
    return (x @ p["a"].T + p["b"]).tanh() @ p["c"].T


def loss(p, x):
    return model(p, x).square().mean() + model(p, x).sin().sum()


def flat(tree):
    return torch.cat([tree[name].reshape(-1) for name in sorted(tree)])


def unflat(like, vector):
    sizes = [like[name].numel() for name in sorted(like)]
    pieces = vector.split(sizes)
    return {name: v.view_as(like[name]) for name, v in zip(sorted(like), pieces, strict=True)}


def matrix(fn, params):
    """d fn / d params as an explicit matrix, columns in the order of `flat`."""
    return jacrev(lambda v: fn(unflat(params, v)))(flat(params))


@both
def test_value_and_grad_equals_finite_differences(mlp, vector, compiled):
    value, grads = maybe_compile(value_and_grad(loss), compiled)(mlp, X)
    step = 1e-6
    up = {n: mlp[n] + step * vector[n] for n in mlp}
    down = {n: mlp[n] - step * vector[n] for n in mlp}
    slope = (loss(up, X) - loss(down, X)) / (2 * step)
    torch.testing.assert_close(value, loss(mlp, X))
    torch.testing.assert_close((flat(grads) * flat(vector)).sum(), slope, rtol=1e-8, atol=1e-8)


@both
def test_value_and_grad_takes_argnums_aux_pytrees_and_keywords(mlp, compiled):
    class Pair(NamedTuple):
        p: dict
        scale: torch.Tensor

    def fn(x, pair, *, power):
        y = (pair.scale * model(pair.p, x)) ** power
        return y.sum(), {"y": y, "none": None}

    pair = Pair(mlp, torch.tensor(0.5, dtype=D64))
    run = maybe_compile(value_and_grad(fn, argnums=(1, 0), has_aux=True), compiled)
    (value, aux), (in_pair, in_x) = run(X, pair, power=3)
    expected = grad(lambda pair, x: fn(x, pair, power=3)[0], argnums=(0, 1))(pair, X)
    torch.testing.assert_close(value, fn(X, pair, power=3)[0])
    torch.testing.assert_close((in_pair, in_x), expected)
    assert isinstance(in_pair, Pair) and aux["none"] is None
    assert not aux["y"].requires_grad and not value.requires_grad


def test_gradient_of_what_is_not_used_is_zero(mlp):
    _, grads = value_and_grad(lambda p: p["a"].sum())(mlp)
    assert torch.equal(grads["b"], torch.zeros(5, dtype=D64))
    value, grads = value_and_grad(lambda p: torch.tensor(2.0))(mlp)
    assert value == 2 and all(not g.any() for g in grads.values())


def test_value_and_grad_works_without_grad_mode_and_leaves_no_graph(mlp):
    with torch.no_grad():
        value, grads = value_and_grad(loss)(mlp, X)
    torch.testing.assert_close(grads, grad(loss)(mlp, X))
    assert not value.requires_grad and not any(g.requires_grad for g in grads.values())
    assert not any(p.requires_grad or p.grad is not None for p in mlp.values())


@both
def test_value_and_grad_nests_also_through_closures(mlp, compiled):
    def inner(p, x):  # differentiates x while p, from the closure, is differentiated outside
        return value_and_grad(lambda x: loss(p, x))(x)[1].square().sum()

    run = maybe_compile(value_and_grad(inner), compiled)
    expected = grad(lambda p: grad(loss, argnums=1)(p, X).square().sum())(mlp)
    torch.testing.assert_close(run(mlp, X)[1], expected)


def test_value_and_grad_is_differentiable_where_its_argument_requires_grad(mlp):
    leaves = {name: value.clone().requires_grad_() for name, value in mlp.items()}
    _, grads = value_and_grad(loss)(leaves, X)
    flat(grads).square().sum().backward()
    expected = grad(lambda p: flat(grad(loss)(p, X)).square().sum())(mlp)
    torch.testing.assert_close({n: v.grad for n, v in leaves.items()}, expected)


@both
def test_value_and_grad_composes_with_vmap_and_jvp(mlp, vector, compiled):
    one = lambda p, x: loss(p, x[None])  # noqa: E731
    rows = maybe_compile(vmap(value_and_grad(one), (None, 0)), compiled)(mlp, X)
    torch.testing.assert_close(rows[1], vmap(grad(one), (None, 0))(mlp, X))
    push = lambda p, v: jvp(lambda p: value_and_grad(loss)(p, X)[1], (p,), (v,))[1]  # noqa: E731
    product = maybe_compile(push, compiled)(mlp, vector)
    explicit = hessian(lambda v: loss(unflat(mlp, v), X))(flat(mlp)) @ flat(vector)
    torch.testing.assert_close(flat(product), explicit)


def test_value_and_grad_takes_a_compiled_function(mlp):
    counted = CompileCounterWithBackend("aot_eager")
    run = value_and_grad(torch.compile(loss, fullgraph=True, backend=counted))
    for scale in (1.0, 2.0, 3.0):
        p = {name: scale * value for name, value in mlp.items()}
        torch.testing.assert_close(run(p, X)[1], grad(loss)(p, X))
    assert counted.frame_count == 1


def test_what_has_no_gradient_is_refused():
    with pytest.raises(ValueError, match=r"argument 0 holds a leaf of type torch\.int64"):
        value_and_grad(lambda p: p["n"].sum())({"n": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match="argument 1 holds a leaf of type float"):
        value_and_grad(lambda x, y: x.sum(), argnums=1)(torch.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"0-d tensor from the function, got shape \(2,\)"):
        value_and_grad(lambda x: x)(torch.ones(2))


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_accumulated_gradient_equals_the_gradient_of_the_sum(mlp, calls):
    def fn(p, x, scale):
        y = scale * model(p, x)
        return y.square().sum(), {"count": torch.tensor(len(x)), "sum": y.sum()}

    rows = [(X[i : i + 1 + i % 2], i + 1.0) for i in range(calls)]
    (value, aux), grads = accumulate(fn, mlp, rows)
    total = lambda p: sum(fn(p, *row)[0] for row in rows)  # noqa: E731
    torch.testing.assert_close((value, grads), (total(mlp), grad(total)(mlp)))
    assert aux["count"] == sum(len(x) for x, _ in rows)


def test_accumulation_survives_gradients_that_share_memory():
    p = {"a": torch.ones(3), "b": torch.ones(3)}
    fn = lambda p, c: ((p["a"] + p["b"]).sum() * c, None)  # noqa: E731  autograd returns one tensor twice
    _, grads = accumulate(fn, p, [(1.0,), (2.0,), (3.0,), (4.0,)])
    assert torch.equal(grads["a"], torch.full((3,), 10.0)) and torch.equal(grads["b"], grads["a"])
    with pytest.raises(ValueError, match="at least one call"):
        accumulate(fn, p, [])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 3)

    def residual(self, x, *, scale=1.0):
        return x + scale * self.outer(self.inner(x).tanh())

    def forward(self, x):
        return self.residual(x)


class Tower(nn.Module):
    """Blocks that recompute: a module, a method with keywords, a function of its inputs."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.wrap(self.blocks[0])(x)
        x = self.wrap(self.blocks[1].residual)(x, scale=0.5)
        last = self.blocks[2]
        weights = (last.inner.weight, last.outer.weight)
        return self.wrap(lambda x, a, b: x + (x @ a.T).sin() @ b.T)(x, *weights)


RULES = [(r"", P.normal(0.5))]
TOWER = P.functional(lambda: Tower(remat), RULES)
PLAIN = P.functional(lambda: Tower(lambda fn: fn), RULES)
COMPOSITIONS = {
    "value_and_grad": lambda f, p, x, t: value_and_grad(f)(p, x),
    "grad": lambda f, p, x, t: grad(f)(p, x),
    "vmap(grad)": lambda f, p, x, t: vmap(grad(f), (None, 0))(p, x[:, None]),
    "jvp": lambda f, p, x, t: jvp(lambda p: f(p, x), (p,), (t,)),
    "jvp(grad)": lambda f, p, x, t: jvp(lambda p: grad(f)(p, x), (p,), (t,)),
    "jvp(value_and_grad)": lambda f, p, x, t: jvp(lambda p: value_and_grad(f)(p, x), (p,), (t,)),
    "grad(grad)": lambda f, p, x, t: grad(lambda x: flat(grad(f)(p, x)).square().sum())(x),
    "jvp(jvp)": lambda f, p, x, t: jvp(
        lambda x: jvp(lambda p: f(p, x), (p,), (t,))[1], (x,), (x.cos(),)
    ),
    "vag(vag)": lambda f, p, x, t: value_and_grad(
        lambda x: flat(value_and_grad(f)(p, x)[1]).square().sum()
    )(x),
}


@both
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_remat_is_right_under_every_composition(name, compiled):
    params = PLAIN.init(0, dtype=D64)
    tangents = PLAIN.init(1, dtype=D64)
    x = torch.randn(4, 3, dtype=D64)
    objective = lambda model: lambda p, x: model.apply(p, x).square().sum()  # noqa: E731
    expected = COMPOSITIONS[name](objective(PLAIN), params, x, tangents)
    run = lambda p, x, t: COMPOSITIONS[name](objective(TOWER), p, x, t)  # noqa: E731
    torch.testing.assert_close(maybe_compile(run, compiled)(params, x, tangents), expected)


def test_remat_recomputes_and_holds_no_inner_activation():
    width, depth = 64, 6
    weights = [torch.randn(width, width) / 8 for _ in range(depth)]
    calls, saved = [], []

    def block(x, w):
        calls.append(1)
        return ((x @ w).tanh().exp().sin() @ w).tanh()

    def stored(wrap):
        saved.clear()
        seen = {w.data_ptr() for w in weights}

        def pack(t):
            saved.append(0 if t.data_ptr() in seen else t.numel())
            seen.add(t.data_ptr())
            return t

        def fn(ws, x):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                for w in ws:
                    x = wrap(block)(x, w)
            return x.sum()

        grads = value_and_grad(fn)(weights, torch.ones(32, width))[1]
        return sum(saved) / (32 * width), grads

    plain, expected = stored(lambda fn: fn)
    assert len(calls) == depth
    kept, grads = stored(remat)
    assert len(calls) == 3 * depth
    torch.testing.assert_close(grads, expected)
    assert plain >= 4 * depth and kept == depth  # only the input of each block


def test_compiled_loss_with_remat_keeps_only_the_inputs_of_blocks():
    """Seen through autograd's saved tensors: what the compiled forward hands to its backward."""
    params, x = PLAIN.init(0, dtype=D64), torch.randn(4, 3, dtype=D64)

    def run(model):
        fn = lambda p, x: model.apply(p, x).square().sum()  # noqa: E731
        torch._dynamo.reset()
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        shapes = []
        pack = lambda t: shapes.append(tuple(t.shape)) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            result = value_and_grad(compiled)(params, x)
        return [shape for shape in shapes if shape[0] == len(x)], result

    plain, expected = run(PLAIN)
    kept, result = run(TOWER)
    torch.testing.assert_close(result, expected)
    assert (4, 8) in plain and (4, 8) not in kept and len(kept) == 3


@both
def test_per_example_grads_equal_a_loop(mlp, compiled):
    labels = torch.arange(7) % 2

    def one(p, x, y):
        return nn.functional.cross_entropy(model(p, x), y)

    rows = maybe_compile(per_example_grads(one, in_dims=(None, 0, 0)), compiled)(mlp, X, labels)
    chunked = per_example_grads(one, in_dims=(None, 0, 0), chunk_size=3)(mlp, X, labels)
    loop = [grad(one)(mlp, x, y) for x, y in zip(X, labels, strict=True)]
    torch.testing.assert_close(rows, P.stack(loop))
    torch.testing.assert_close(chunked, rows)


@both
def test_ensemble_equals_its_members(mlp, compiled):
    members = [{n: (i + 1) * v for n, v in mlp.items()} for i in range(3)]
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=D64)
    fn = lambda p, x, s, *, shift=0.0: s * model(p, x) + shift  # noqa: E731
    run = maybe_compile(ensemble(fn, argnums=(0, 2)), compiled)
    out = run(P.stack(members), X, scales, shift=1.0)
    for member, scale, mine in zip(members, scales, out, strict=True):
        torch.testing.assert_close(mine, fn(member, X, scale, shift=1.0))
    torch.testing.assert_close(ensemble(model)(P.stack(members), X)[2], model(members[2], X))


@both
def test_hvp_equals_the_explicit_hessian_and_finite_differences(mlp, vector, compiled):
    run = maybe_compile(lambda p, v: hvp(lambda p: loss(p, X), p, v), compiled)
    product = flat(run(mlp, vector))
    explicit = hessian(lambda v: loss(unflat(mlp, v), X))(flat(mlp))
    torch.testing.assert_close(product, explicit @ flat(vector))
    step = 1e-5
    slope = lambda e: flat(grad(loss)({n: mlp[n] + e * vector[n] for n in mlp}, X))  # noqa: E731
    difference = (slope(step) - slope(-step)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-7)


@both
def test_ggn_vp_equals_the_explicit_gauss_newton_matrix(mlp, vector, compiled):
    labels = torch.arange(7) % 2
    cross_entropy = lambda z: nn.functional.cross_entropy(z, labels)  # noqa: E731
    run = maybe_compile(lambda p, v: ggn_vp(lambda p: model(p, X), cross_entropy, p, v), compiled)
    product = flat(run(mlp, vector))
    jacobian = matrix(lambda p: model(p, X).reshape(-1), mlp)
    curvature = hessian(lambda z: cross_entropy(z.view(7, 2)))(model(mlp, X).reshape(-1))
    torch.testing.assert_close(product, jacobian.T @ curvature @ jacobian @ flat(vector))
    assert flat(vector) @ product >= 0


def test_ggn_is_the_hessian_for_a_linear_model_and_takes_pytree_outputs(vector):
    w = {"w": torch.randn(3, 2, dtype=D64)}
    v = {"w": torch.randn(3, 2, dtype=D64)}
    outputs = lambda p: {"y": X @ p["w"], "n": (2 * p["w"],)}  # noqa: E731
    objective = lambda z: z["y"].logsumexp(1).sum() + z["n"][0].exp().sum()  # noqa: E731
    torch.testing.assert_close(
        ggn_vp(outputs, objective, w, v), hvp(lambda p: objective(outputs(p)), w, v)
    )


def test_curvature_products_refuse_a_vector_that_does_not_fit(mlp, vector):
    fn = lambda p: loss(p, X)  # noqa: E731
    with pytest.raises(ValueError, match=r"leaf of shape \(4,\) where the primals have \(5,\)"):
        hvp(fn, mlp, vector | {"b": torch.ones(4, dtype=D64)})
    with pytest.raises(ValueError, match="expected that of the primals"):
        hvp(fn, mlp, {"a": vector["a"]})
    with pytest.raises(ValueError, match="0-d tensor"):
        hvp(lambda p: p["b"], mlp, vector)
