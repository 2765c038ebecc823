"""The Gluon kernels compile for Hopper without a GPU, are right on one, and step back elsewhere."""

import pytest
import torch

triton = pytest.importorskip("triton")

from msfs_kernels import gluon_support, triton_backend  # noqa: E402
from msfs_kernels.options import Options  # noqa: E402
from msfs_kernels.triton_common import Launch, launches_of  # noqa: E402
from msfs_kernels.triton_compile import compile_launch, resources  # noqa: E402
from textbook import textbook  # noqa: E402

needs_gluon = pytest.mark.skipif(
    gluon_support.gluon_forward is None,
    reason=f"Triton {triton.__version__} has no Gluon, or none with the names of Triton 3.6 to 3.9",
)


def make(B: int, heads: int, length: int, head_dim: int, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(B, length, heads, head_dim, device=device).to(dtype).transpose(1, 2)


@needs_gluon
@pytest.mark.parametrize(
    ("head_dim", "causal", "dtype"), [(64, True, torch.bfloat16), (128, False, torch.float16)]
)
def test_every_gluon_kernel_compiles_for_hopper(head_dim, causal, dtype):
    q, do, o = (make(2, 4, 300, head_dim, dtype) for _ in range(3))
    k, v = (make(2, 2, 300, head_dim, dtype) for _ in range(2))
    lse = torch.zeros(2, 4, 300)
    options = Options(causal=causal, scale=head_dim**-0.5)
    launches = [gluon_support.gluon_forward.plan_forward(q, k, v, o, lse, options)]
    launches += launches_of(
        lambda: gluon_support.gluon_backward.backward(do, None, q, k, v, o, lse, options)
    )
    took = {x.kernel.__name__: resources(compile_launch(x, 90), 90) for x in launches}
    assert set(took) == {"forward_kernel", "prepare_kernel", "key_kernel", "finish_kernel"}
    assert all(x.shared <= 227 * 1024 for x in took.values())
    assert took["forward_kernel"].wgmma > 0 and took["key_kernel"].wgmma > 0


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S"),
    [(1, 1, 1, 129, 129), (2, 4, 4, 127, 300), (1, 4, 1, 300, 200), (2, 40, 8, 257, 513)],
)
@pytest.mark.parametrize("causal", [False, True])
def test_gluon_kernels_equal_the_formula(head_dim, B, H, G, T, S, causal):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for compute capability 9.0")
    options = Options(causal=causal, scale=head_dim**-0.5)
    q, do = (make(B, H, T, head_dim, device="cuda") for _ in range(2))
    k, v = (make(B, G, S, head_dim, device="cuda") for _ in range(2))
    dlse = torch.randn(B, H, T, device="cuda")
    assert gluon_support.suits(q, k, v, options)
    o, lse = triton_backend.forward(q, k, v, options)
    grads = triton_backend.backward(do, dlse, q, k, v, o, lse, options, False)[:3]

    def formula(dtype: torch.dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        o, lse = textbook(*leaves, is_causal=causal, scale=options.scale, return_lse=True)
        seen = ~lse.isinf()
        loss = (o * do.to(dtype)).sum() + (lse * dlse.to(dtype))[seen].sum()
        return o.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)

    exact, plain = formula(torch.float64), formula(torch.bfloat16)
    assert torch.equal(lse.isinf(), exact[1].isinf())
    close = ~lse.isinf()
    torch.testing.assert_close(lse[close].double(), exact[1][close], atol=1e-4, rtol=1e-4)
    for name, got, right, rounded in zip(
        ("o", "dq", "dk", "dv"), (o, *grads), (exact[0], *exact[2:]), (plain[0], *plain[2:]),
        strict=True,
    ):  # fmt: skip
        limit = 2 * (rounded.double() - right).abs().max() + 1e-6
        assert (got.double() - right).abs().max() <= limit, name


def test_other_work_is_left_to_the_plain_kernels():
    q = make(1, 2, 300, 64)
    lengths = torch.tensor([300], dtype=torch.int32)
    assert gluon_support.plain_options(Options(causal=True, scale=0.1, deterministic=True))
    for options in (
        Options(key_lengths=lengths),
        Options(window=3),
        Options(softcap=2.0),
        Options(dropout=0.1),
        Options(scale=-1.0),
    ):
        assert not gluon_support.plain_options(options)
    assert not gluon_support.suits(q, q, q, Options())  # on the CPU
    assert not gluon_support.suits(*[make(1, 2, 300, 72)] * 3, Options())


def test_a_kernel_that_does_not_compile_warns_and_is_not_used():
    class Broken:
        __name__ = "broken_kernel"

        def warmup(self, *args, **constants):
            raise RuntimeError("no such instruction")

    with pytest.warns(UserWarning, match="does not compile broken_kernel"):
        assert not gluon_support.compiles(Launch(Broken(), (1,), (), {}))
