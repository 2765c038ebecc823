"""Transforms of flash_attention against the same transforms of the textbook formula.

A fast share of the truth table (truth_table.py makes the whole one), and what that table does not
ask.
"""

import pytest
import torch
from msfs_kernels import flash_attention, ops
from torch import Tensor
from torch.func import grad, jacfwd, jvp, vmap
from truth_table import COMPOSITIONS, cell, options_by_name

F64 = torch.float64


def randn(*shape, seed=0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@pytest.mark.parametrize("composition", COMPOSITIONS)
def test_eager_composition_equals_the_textbooks(composition):
    names = ["all"] if composition == "linearize" else options_by_name()  # it traces for seconds
    wrong = {name: cell(composition, name, "eager") for name in names}
    assert {name: r for name, r in wrong.items() if r[0] != "ok"} == {}


@pytest.mark.parametrize(
    "composition", ["grad", "jvp(grad)", "grad(jvp)", "jvp(jvp)", "grad(grad)"]
)
def test_float32_composition_is_as_exact_as_the_textbooks(composition):
    for name in ("none", "grouped heads", "all"):
        assert cell(composition, name, "eager", dtype=torch.float32)[0] == "ok"


@pytest.mark.parametrize(
    "composition",
    ["grad", "vmap over some arguments", "jvp", "grad(grad)", "vmap(jvp(grad))", "grad(jvp)"],
)
def test_compiled_composition_equals_the_textbooks(composition):
    assert cell(composition, "all", "compiled", backend="aot_eager")[0] == "ok"


def test_compiled_by_inductor_equals_the_textbook():
    assert cell("grad", "none", "compiled")[0] == "ok"


def test_third_derivatives_raise_and_say_what_to_do():
    q = randn(1, 2, 3, 4)

    def loss(q):
        return flash_attention(q, q, q).sin().sum()

    def d(f):
        return lambda x: jvp(f, (x,), (x,))[1]

    for third in (
        d(d(d(loss))),
        grad(lambda x: grad(lambda y: grad(loss)(y).sum())(x).sum()),
        d(lambda x: d(grad(loss))(x).sum()),
        grad(lambda x: d(d(loss))(x)),
    ):
        with pytest.raises(RuntimeError, match=r"first and second derivatives.*reference"):
            third(q)


def test_alibi_slopes_that_ask_for_a_gradient_raise():
    q, slopes = randn(1, 2, 3, 4), torch.ones(2)

    def loss(slopes):
        return flash_attention(q, q, q, alibi_slopes=slopes).sum()

    for derivative in (
        lambda: grad(loss)(slopes),
        lambda: jvp(loss, (slopes,), (slopes,)),
        lambda: loss(slopes.clone().requires_grad_()).backward(),
    ):
        with pytest.raises(RuntimeError, match="no derivative with respect to alibi_slopes"):
            derivative()


def test_the_log_sum_exp_alone_is_differentiable():
    q, k, v = randn(1, 2, 3, 4), randn(1, 2, 5, 4, seed=1), randn(1, 2, 5, 4, seed=2)

    def ours(q, k):
        return flash_attention(q, k, v, return_lse=True)[1].sin().sum()

    def plain(q, k):
        return (q @ k.mT / 2).logsumexp(-1).sin().sum()

    torch.testing.assert_close(grad(ours, (0, 1))(q, k), grad(plain, (0, 1))(q, k))
    torch.testing.assert_close(
        jvp(ours, (q, k), (k[:, :, :3], k)), jvp(plain, (q, k), (k[:, :, :3], k))
    )
    torch.testing.assert_close(jacfwd(grad(ours))(q, k), jacfwd(grad(plain))(q, k))


def test_gradients_of_a_bias_come_in_its_own_shape():
    q = randn(2, 4, 3, 4)
    for shape in [(3, 3), (4, 1, 3), (2, 1, 1, 3), (1, 4, 3, 1)]:
        bias = randn(*shape, seed=3)

        def ours(bias):
            return (flash_attention(q, q, q, bias=bias) * q).sum()

        def plain(bias):
            return (((q @ q.mT / 2 + bias).softmax(-1) @ q) * q).sum()

        torch.testing.assert_close(grad(ours)(bias), grad(plain)(bias))
        torch.testing.assert_close(
            vmap(grad(ours))(torch.stack([bias, -bias])),
            vmap(grad(plain))(torch.stack([bias, -bias])),
        )


class Spy:
    """The CPU backend's forward, noting the tensors that it was called with."""

    def __init__(self, monkeypatch):
        self.calls = []
        forward = ops.cpu.forward

        def spy(q, k, v, options):
            self.calls.append((q, k, v))
            return forward(q, k, v, options)

        monkeypatch.setattr(ops.cpu, "forward", spy)


def test_vmap_is_one_call_and_copies_no_unmapped_keys(monkeypatch):
    spy = Spy(monkeypatch)
    k = randn(3, 2, 6, 4, seed=1)
    queries = randn(5, 3, 4, 7, 4)
    o = vmap(lambda q: flash_attention(q, k, k, is_causal=True))(queries)
    ((q_seen, k_seen, v_seen),) = spy.calls
    assert k_seen.data_ptr() == k.data_ptr() == v_seen.data_ptr()
    assert q_seen.shape == (3, 20, 7, 4)  # the mapped dim went to the heads
    want = torch.stack([flash_attention(q, k, k, is_causal=True) for q in queries])
    torch.testing.assert_close(o, want)


def test_vmap_of_single_examples_is_a_view(monkeypatch):
    spy = Spy(monkeypatch)
    q, k = randn(5, 4, 7, 4), randn(2, 6, 4, seed=1)
    vmap(lambda q: flash_attention(q, k, k))(q)
    ((q_seen, k_seen, _),) = spy.calls
    assert q_seen.shape == (5, 4, 7, 4) and q_seen.data_ptr() == q.data_ptr()
    assert k_seen.data_ptr() == k.data_ptr() and k_seen.stride(0) == 0


def test_checkpointing_and_saved_tensor_hooks_see_the_op():
    from torch.utils.checkpoint import checkpoint

    q = randn(1, 2, 5, 4).requires_grad_()
    key = torch.tensor([1, 2])

    def block(q):
        return flash_attention(q, q, q, dropout=0.5, dropout_key=key).sin().sum()

    (want,) = torch.autograd.grad(block(q), q)
    (got,) = torch.autograd.grad(checkpoint(block, q, use_reentrant=False), q)
    assert torch.equal(got, want)


def test_inference_mode_and_no_grad():
    q = randn(1, 2, 5, 4).requires_grad_()
    want = flash_attention(q, q, q).detach()
    with torch.inference_mode():
        assert torch.equal(flash_attention(q, q, q), want)
    with torch.no_grad():
        assert not flash_attention(q, q, q).requires_grad
