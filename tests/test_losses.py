"""Losses equal the formula; the fused one equals the plain one under every transform."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from msfs_kernels import linear_cross_entropy as fused
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from msfs_functional.losses import cross_entropy, disagreement, linear_cross_entropy

OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"label_smoothing": 0.1, "z_loss": 1e-2},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 1.5},
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of three rows, so that every test runs several."""
    monkeypatch.setitem(fused.CHUNK, "cpu", 40)


def problem(dtype=torch.float64, items=8, width=5, vocab=11, bias=True):
    torch.manual_seed(0)
    h, w, b = (torch.randn(s, dtype=dtype) for s in ((items, width), (vocab, width), (vocab,)))
    labels = torch.randint(1, vocab, (items,))
    labels[2] = labels[5] = 0  # ignored
    return h, w, b if bias else None, labels


def test_cross_entropy_of_a_hand_worked_row():
    logits = torch.tensor([[0.0, 0.0, torch.log(torch.tensor(2.0))]])
    total, count = cross_entropy(logits, torch.tensor([2]))
    assert count == 1
    torch.testing.assert_close(total, torch.tensor(2.0).log())  # softmax = 1/4, 1/4, 1/2


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_torch(smoothing):
    _, _, _, labels = problem()
    logits = torch.randn(8, 11, dtype=torch.float64)
    total, count = cross_entropy(logits, labels, label_smoothing=smoothing)
    expected = F.cross_entropy(
        logits, labels, ignore_index=0, label_smoothing=smoothing, reduction="sum"
    )
    assert count == 6
    torch.testing.assert_close(total, expected)


def test_z_loss_is_the_squared_log_partition():
    h, w, _, labels = problem()
    logits = h @ w.T
    plain, _ = cross_entropy(logits, labels)
    total, _ = cross_entropy(logits, labels, z_loss=0.5)
    expected = 0.5 * logits.logsumexp(-1).square()[labels != 0].sum()
    torch.testing.assert_close(total - plain, expected)


def losses(labels, **options):
    """The fused loss and the plain one as functions of (h, w, b)."""

    softcap = options.get("softcap")
    others = {name: value for name, value in options.items() if name != "softcap"}

    def ours(h, w, b):
        return linear_cross_entropy(h, w, labels, bias=b, **options)[0]

    def plain(h, w, b):
        logits = h @ w.T if b is None else h @ w.T + b
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return cross_entropy(logits, labels, **others)[0]

    return ours, plain


def compositions(h, w, b):
    """Name -> functional of a loss; what is compared is a pytree of tensors."""
    th, tw, tb = (torch.randn_like(x) for x in (h, w, b))
    H, W = torch.stack([h, th]), torch.stack([w, tw])
    every = (0, 1, 2)

    def squares(f):
        return lambda h, w: sum(g.square().sum() for g in grad(f, every)(h, w, b))

    return {
        "value": lambda f: f(h, w, b),
        "grad": lambda f: grad(f, every)(h, w, b),
        "jvp": lambda f: jvp(f, (h, w, b), (th, tw, tb)),
        "vmap": lambda f: vmap(f, (0, None, None))(H, w, b),
        "vmap(grad)": lambda f: vmap(grad(f, every), (0, None, None))(H, w, b),
        "vmap(grad) of stacked weights": lambda f: vmap(grad(f, every), (0, 0, None))(H, W, b),
        "grad(vmap)": lambda f: grad(lambda w: vmap(f, (0, None, None))(H, w, b).sum())(w),
        "vmap(vmap)": lambda f: vmap(vmap(f, (None, 0, None)), (0, None, None))(H, W, b),
        "grad(grad)": lambda f: grad(squares(f), (0, 1))(h, w),
        "jvp(grad)": lambda f: jvp(grad(f, every), (h, w, b), (th, tw, tb))[1],
        "grad(jvp)": lambda f: grad(
            lambda h, w: jvp(lambda *x: f(*x, b), (h, w), (th, tw))[1], (0, 1)
        )(h, w),
        "jvp(jvp)": lambda f: jvp(
            lambda w: jvp(lambda w: f(h, w, b), (w,), (tw,))[1], (w,), (tw.flip(0),)
        )[1],
        "jacrev": lambda f: jacrev(f)(h, w, b),
        "jacfwd": lambda f: jacfwd(f)(h, w, b),
        "hessian": lambda f: hessian(f)(h, w, b),
        "vmap(jvp(grad))": lambda f: vmap(lambda t: jvp(grad(lambda w: f(h, w, b)), (w,), (t,))[1])(
            W
        ),
    }


NAMES = list(compositions(*problem()[:3]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smooth", "smooth+z", "smooth+z+cap"])
def test_fused_equals_plain_under(name, options):
    h, w, b, labels = problem()
    ours, plain = losses(labels, **options)
    compose = compositions(h, w, b)[name]
    torch.testing.assert_close(compose(ours), compose(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["grad", "vmap(grad)", "jvp", "jvp(grad)", "grad(grad)"])
def test_fused_equals_plain_compiled_under(name):
    h, w, b, labels = problem()
    ours, plain = losses(labels, label_smoothing=0.1, z_loss=1e-2, softcap=1.5)
    compose = compositions(h, w, b)[name]
    compiled = torch.compile(lambda: compose(ours), fullgraph=True)()
    torch.testing.assert_close(compiled, compose(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_autograd_equals_plain(compiled, bias):
    h, w, b, labels = problem(bias=bias)
    ours, plain = losses(labels, label_smoothing=0.1)
    leaves = [x.requires_grad_() for x in (h, w, b) if x is not None]
    run = torch.compile(ours, fullgraph=True) if compiled else ours
    got = torch.autograd.grad(3 * run(h, w, b), leaves, create_graph=True)
    expected = torch.autograd.grad(3 * plain(h, w, b), leaves, create_graph=True)
    torch.testing.assert_close(got, expected)
    if not compiled:
        twice = torch.autograd.grad(sum(g.square().sum() for g in got), leaves)
        exact = torch.autograd.grad(sum(g.square().sum() for g in expected), leaves)
        torch.testing.assert_close(twice, exact)


def test_gradient_is_that_of_finite_differences():
    h, w, b, labels = problem()
    leaves = tuple(x.requires_grad_() for x in (h, w, b))
    ours, _ = losses(labels, label_smoothing=0.1, z_loss=1e-2, softcap=1.5)
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


def test_third_derivatives_are_refused():
    h, w, b, labels = problem()
    ours, _ = losses(labels)
    third = grad(lambda w: hessian(lambda w: ours(h, w, b))(w).sum())
    with pytest.raises(RuntimeError, match="third was asked for"):
        third(w)


@given(
    items=st.integers(0, 9),
    vocab=st.integers(1, 12),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    ignored=st.floats(0, 1),
)
@settings(max_examples=30)
def test_fused_is_as_exact_as_plain_in_its_dtype(items, vocab, dtype, ignored):
    generator = torch.Generator().manual_seed(items * 100 + vocab)
    h, w = (torch.randn(n, 5, generator=generator) for n in (items, vocab))
    labels = torch.randint(0, vocab, (items,), generator=generator)
    labels[torch.rand(items, generator=generator) < ignored] = -1
    leaves = [h, w]
    exact_leaves = [x.double().requires_grad_() for x in leaves]
    exact, count = cross_entropy(exact_leaves[0] @ exact_leaves[1].T, labels, ignore_index=-1)
    exact = [exact, *torch.autograd.grad(exact, exact_leaves)]
    errors = []
    for run in ("ours", "plain"):
        h, w = (x.to(dtype).requires_grad_() for x in leaves)
        if run == "ours":
            total, kept = linear_cross_entropy(h, w, labels, ignore_index=-1)
            assert kept == count
        else:
            total, _ = cross_entropy(h @ w.T, labels, ignore_index=-1)
        got = [total, *torch.autograd.grad(total, (h, w))]
        errors.append([float((a - b).detach().norm()) for a, b in zip(got, exact, strict=True)])
    floors = [4 * torch.finfo(dtype).eps * (1 + float(x.detach().norm())) for x in exact]
    for ours, plain, floor in zip(*errors, floors, strict=True):
        assert ours <= 2 * plain + floor


def test_wrong_arguments_are_named():
    h, w, b, labels = problem()
    with pytest.raises(ValueError, match="must have the shape of the items"):
        linear_cross_entropy(h, w, labels[:3])
    with pytest.raises(ValueError, match="the width of hidden"):
        linear_cross_entropy(h, w[:, :2], labels)
    with pytest.raises(ValueError, match="one dtype"):
        linear_cross_entropy(h, w.float(), labels)
    with pytest.raises(ValueError, match="one per class"):
        linear_cross_entropy(h, w, labels, bias=b[:2])
    with pytest.raises(ValueError, match=r"label 11 must be in \[0, 11\)"):
        linear_cross_entropy(h, w, labels + 1, ignore_index=1)
    with pytest.raises(ValueError, match=r"softcap \(0\) must be a positive number"):
        linear_cross_entropy(h, w, labels, softcap=0)
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(h, labels, label_smoothing=1.5)


INTERPRETED = """
import torch
from msfs_kernels.linear_cross_entropy import gradient_of_logits_ as plain
from msfs_kernels import triton_cross_entropy
fused = triton_cross_entropy.gradient_of_logits_
triton_cross_entropy.BLOCK = 64
torch.manual_seed(0)
for vocab, bias in ((7, None), (130, torch.randn(2, 130))):
    logits, labels = torch.randn(2, 5, vocab) * 4, torch.randint(0, vocab, (2, 5))
    labels[0, 1] = labels[1, 4] = 0
    for options in ((0.0, 0, 0.0, 0.0), (0.1, 0, 0.01, 0.0), (0.1, 0, 0.01, 3.0)):
        full = logits.clone() if bias is None else logits + bias[:, None]
        expected = plain(full, labels, *options)
        got = fused(logits.clone(), bias, labels, *options, True)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        strange = labels.clone()  # no classes of these rows: the logits there are others'
        strange[1, 2], strange[1, 3] = vocab, -1
        losses, da = fused(logits.clone(), bias, strange, *options, True)
        wrong = torch.zeros(2, 5, dtype=torch.bool)
        wrong[1, 2:4] = True
        assert torch.equal(losses.isnan(), wrong) and da.isnan().all(-1).equal(wrong)
        torch.testing.assert_close(losses[~wrong], expected[0][~wrong], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(da[~wrong], expected[1][~wrong], rtol=1e-5, atol=1e-6)
        half = logits.bfloat16()  # counted in powers of two
        full = half.float() if bias is None else half.float() + bias[:, None]
        loss, gradient = plain(full, labels, *options)
        got = fused(half, bias, labels, *options, True)
        torch.testing.assert_close(got[0], loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1], gradient.bfloat16(), rtol=1e-2, atol=1e-6)
        g = torch.tensor([1 / 3, 5.0])
        expected = (half.float() * g[:, None, None]).bfloat16()
        got = triton_cross_entropy.scaled(half, g)
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=0)  # the interpreter truncates
"""


def test_the_triton_rows_equal_the_formula_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, timeout=120)


def test_disagreement_is_both_divergences_of_the_items_that_count():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.2, 0.8]])
    labels = torch.tensor([1, 0])  # the second row is ignored
    expected = 0.25 * math.log(0.5 / 0.25) - 0.25 * math.log(0.5 / 0.75)  # sum of (p - q) ln(p / q)
    assert float(disagreement(p.log(), q.log() + 3, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(disagreement(p.log(), p.log(), labels)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_plain_on_the_gpu(dtype, monkeypatch):
    """In three chunks, whose parts of the matrix's gradient are summed in float32."""
    monkeypatch.setitem(fused.CHUNK, "cuda", 300 * 5003)
    torch.manual_seed(0)
    h, w = (torch.randn(n, 64, device="cuda") for n in (700, 5003))
    labels = torch.randint(0, 5003, (700,), device="cuda")
    exact_leaves = [x.to(dtype).double().requires_grad_() for x in (h, w)]
    exact, _ = cross_entropy(exact_leaves[0] @ exact_leaves[1].T, labels, label_smoothing=0.1)
    expected = [exact, *torch.autograd.grad(exact, exact_leaves)]
    errors = []
    for fused_loss in (True, False):
        h_, w_ = (x.to(dtype).requires_grad_() for x in (h, w))
        if fused_loss:
            total, _ = linear_cross_entropy(h_, w_, labels, label_smoothing=0.1)
        else:
            total, _ = cross_entropy(h_ @ w_.T, labels, label_smoothing=0.1)
        got = [total, *torch.autograd.grad(total, (h_, w_))]
        errors.append(
            [float((a - b).detach().norm() / b.norm()) for a, b in zip(got, expected, strict=True)]
        )
    for ours, plain in zip(*errors, strict=True):
        assert ours <= 2 * plain + torch.finfo(dtype).eps
