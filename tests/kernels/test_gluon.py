"""The Gluon kernels compile for Hopper without a GPU, are right on one, and step back elsewhere."""

import pytest
import torch

triton = pytest.importorskip("triton")

from msfs_kernels import gluon_support, triton_common  # noqa: E402
from msfs_kernels.launching import Launch  # noqa: E402
from msfs_kernels.options import Options  # noqa: E402
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
def test_the_forward_compiles_for_hopper(head_dim, causal, dtype):
    q, o = (make(2, 4, 300, head_dim, dtype) for _ in range(2))
    k, v = (make(2, 2, 300, head_dim, dtype) for _ in range(2))
    options = Options(causal=causal, scale=head_dim**-0.5)
    launch = gluon_support.gluon_forward.plan_forward(q, k, v, o, torch.empty(2, 4, 300), options)
    took = resources(compile_launch(launch, 90), 90)
    assert took.wgmma > 0
    assert took.shared <= 227 * 1024
    assert took.spills <= 64  # bytes a thread, none of them in the loop over keys


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S"),
    [(1, 1, 1, 1, 1), (2, 4, 4, 127, 300), (1, 4, 1, 300, 200), (2, 40, 8, 257, 513)],
)
def test_the_forward_equals_the_formula(monkeypatch, head_dim, B, H, G, T, S, causal):
    monkeypatch.setattr(triton_common, "LEAST_LOGITS_FOR_TMA", 0)  # small work is work here
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for compute capability 9.0")
    options = Options(causal=causal, scale=head_dim**-0.5)
    q = make(B, H, T, head_dim, device="cuda")
    k, v = (make(B, G, S, head_dim, device="cuda") for _ in range(2))
    assert gluon_support.compiled(q.dtype, head_dim, causal, q.device)
    o = torch.full_like(q, float("nan"))
    lse = torch.full((B, H, T), float("nan"), device="cuda")
    gluon_support.gluon_forward.plan_forward(q, k, v, o, lse, options).run()
    masks = {"is_causal": causal, "scale": options.scale, "return_lse": True}
    exact, exact_lse = textbook(*(x.double() for x in (q, k, v)), **masks)
    plain, _ = textbook(q, k, v, **masks)
    assert (o - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-4)


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
