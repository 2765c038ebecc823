"""The Gluon kernels compile for Hopper without a GPU, are right on one, and step back elsewhere."""

import os
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")

from msfs_kernels import gluon_support, triton_common  # noqa: E402
from msfs_kernels.launching import Launch  # noqa: E402
from msfs_kernels.options import Options  # noqa: E402
from msfs_kernels.triton_compile import compile_launch, resources  # noqa: E402
from parameters import parameters_agree  # noqa: E402
from textbook import textbook  # noqa: E402

needs_gluon = pytest.mark.skipif(
    gluon_support.gluon_forward is None,
    reason=f"Triton {triton.__version__} has no Gluon, or none with the names of Triton 3.6 to 3.9",
)


def make(B: int, heads: int, length: int, head_dim: int, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(B, length, heads, head_dim, device=device).to(dtype).transpose(1, 2)


@needs_gluon
@pytest.mark.parametrize(
    ("head_dim", "causal", "dtype", "consumers"),
    [
        (64, True, torch.bfloat16, 2),
        (128, False, torch.float16, 2),
        (40, False, torch.bfloat16, 3),
    ],
)
def test_the_forward_compiles_for_hopper(head_dim, causal, dtype, consumers):
    q, o = (make(2, 4, 300, head_dim, dtype) for _ in range(2))
    k, v = (make(2, 2, 300, head_dim, dtype) for _ in range(2))
    options = Options(causal=causal, scale=head_dim**-0.5)
    plan, lse = gluon_support.gluon_forward.plan_forward, torch.empty(2, 4, 300)
    launch = plan(q, k, v, o, lse, options, consumers)
    compiled = compile_launch(launch, 90)
    assert parameters_agree(launch, compiled)
    took = resources(compiled, 90)
    assert took.wgmma > 0
    assert took.shared <= 227 * 1024
    # Bytes a thread, none of them in the loop over keys. Three consumers have 160 registers each: 8
    # with Triton 3.6, 80 with 3.9.
    assert took.spills <= (128 if consumers == 3 else 64)


@needs_gluon
def test_the_forward_with_its_tangent_compiles_for_hopper():
    q, o = (make(2, 4, 300, 128) for _ in range(2))
    k, lse = make(2, 2, 300, 128), torch.empty(2, 4, 300)
    plan = gluon_support.gluon_dual.plan_dual
    launch = plan(q, k, k, q, k, k, o, lse, o, lse, Options(causal=True, scale=0.1))
    compiled = compile_launch(launch, 90)
    assert parameters_agree(launch, compiled)
    took = resources(compiled, 90)
    assert took.wgmma > 0
    assert took.shared <= 227 * 1024
    assert took.spills <= 128  # bytes a thread: 24 with Triton 3.6, 96 with 3.9


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize(
    ("head_dim", "causal", "consumers"),
    [(d, causal, 2) for d in (40, 64, 80, 128) for causal in (False, True)]
    + [(40, False, 3), (64, False, 3)],
)
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S"),
    [(1, 1, 1, 1, 1), (2, 4, 4, 127, 300), (1, 4, 1, 300, 200), (2, 40, 8, 257, 513)],
)
def test_the_forward_equals_the_formula(monkeypatch, head_dim, B, H, G, T, S, causal, consumers):
    monkeypatch.setattr(triton_common, "LEAST_LOGITS_FOR_TMA", 0)  # small work is work here
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for compute capability 9.0")
    options = Options(causal=causal, scale=head_dim**-0.5)
    q = make(B, H, T, head_dim, device="cuda")
    k, v = (make(B, G, S, head_dim, device="cuda") for _ in range(2))
    assert gluon_support.compiled("forward", q.dtype, head_dim, causal, q.device, consumers)
    o = torch.full_like(q, float("nan"))
    lse = torch.full((B, H, T), float("nan"), device="cuda")
    gluon_support.gluon_forward.plan_forward(q, k, v, o, lse, options, consumers).run()
    masks = {"is_causal": causal, "scale": options.scale, "return_lse": True}
    exact, exact_lse = textbook(*(x.double() for x in (q, k, v)), **masks)
    plain, _ = textbook(q, k, v, **masks)
    assert (o - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "G", "T", "S"),
    [(1, 1, 1, 1, 1), (2, 4, 4, 127, 300), (1, 4, 1, 300, 200), (2, 40, 8, 257, 513)],
)
def test_the_forward_with_its_tangent_equals_the_formula(
    monkeypatch, head_dim, B, H, G, T, S, causal
):
    monkeypatch.setattr(triton_common, "LEAST_LOGITS_FOR_TMA", 0)
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for compute capability 9.0")
    masks = {"is_causal": causal, "scale": head_dim**-0.5, "return_lse": True}
    x, t = (
        [make(B, h, n, head_dim, device="cuda") for h, n in ((H, T), (G, S), (G, S))]
        for _ in range(2)
    )
    assert gluon_support.compiled("dual", x[0].dtype, head_dim, causal, x[0].device)
    o, to = (torch.full_like(x[0], float("nan")) for _ in range(2))
    lse, tlse = (torch.full((B, H, T), float("nan"), device="cuda") for _ in range(2))
    options = Options(causal=causal, scale=head_dim**-0.5)
    gluon_support.gluon_dual.plan_dual(*t, *x, o, lse, to, tlse, options).run()

    def moved(dtype: torch.dtype):
        def attention(q, k, v):
            return textbook(q, k, v, **masks)

        point, direction = (tuple(y.to(dtype) for y in z) for z in (x, t))
        (plain, plain_lse), (t_plain, t_plain_lse) = torch.func.jvp(attention, point, direction)
        return plain, plain_lse, t_plain, t_plain_lse

    exact, plain = moved(torch.float64), moved(torch.bfloat16)
    # One key: P is 1, so its logit's tangent m leaves tO = (m v + tv) - m v, and the formula, which
    # takes the mean of m off before it meets v, gives tv with no error at all. The kernel knows the
    # mean only after its last key, where m v was already made from m rounded to 16 bits. Two
    # roundings, each of at most 2^-8 (half of bfloat16's eps): of m, and of the result.
    rounding = torch.finfo(torch.bfloat16).eps / 2
    left = rounding * float(exact[3].abs().max() * x[2].abs().max())
    cancelled = left + rounding * (float(exact[2].abs().max()) + left) if S == 1 else 0.0
    for got, i, least in ((o, 0, 0.0), (to, 2, cancelled)):
        error = (plain[i] - exact[i]).abs().max()
        assert (got - exact[i]).abs().max() <= max(2 * float(error), least) + 1e-6
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-4, rtol=1e-4)
    hidden = exact[1] == float("-inf")
    error = (plain[3] - exact[3]).masked_fill(hidden, 0.0).abs().max()
    assert (tlse - exact[3]).masked_fill(hidden, 0.0).abs().max() <= 2 * error + 1e-4
    assert not tlse[hidden].any()


SAME_BITS = """
import torch
from msfs_kernels import gluon_dual, gluon_forward
from msfs_kernels.options import Options

for head_dim in (40, 64, 128):
    for B, H, G, T, S in (
        (1, 2, 2, 130, 1000), (2, 40, 8, 500, 700), (1, 16, 16, 2048, 2048), (1, 4, 2, 4100, 700)
    ):
        q, k, v = (
            torch.randn(B, n, h, head_dim, device="cuda").bfloat16().transpose(1, 2)
            for h, n in ((H, T), (G, S), (G, S))
        )
        for causal in (False, True):
            results = []
            for _ in range(20):
                o, lse = torch.full_like(q, float("nan")), torch.empty((B, H, T), device="cuda")
                options = Options(causal=causal, scale=head_dim**-0.5)
                gluon_forward.plan_forward(q, k, v, o, lse, options).run()
                results.append([o, lse])
                if head_dim == 40:  # the forward alone
                    continue
                p, to = (torch.full_like(q, float("nan")) for _ in range(2))
                rows = [torch.empty_like(lse) for _ in range(2)]
                x = (q, k, v)
                gluon_dual.plan_dual(*x, *x, p, rows[0], to, rows[1], options).run()
                results[-1] += [p, to, *rows]
            case = (head_dim, B, H, G, T, S, causal)
            outs = [x for x in results[0] if x.shape == q.shape]
            assert not any(x.isnan().any() for x in outs), case
            for found in results:
                assert all(torch.equal(a, b) for a, b in zip(found, results[0])), case
            print(case, "the same bits", flush=True)
"""


@pytest.mark.gpu
@needs_gluon
def test_twenty_launches_end_and_give_the_same_bits():
    """In a process of its own, the only thing that can be ended if the device waits for ever."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernels are for compute capability 9.0")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", SAME_BITS], check=True, env=environment, timeout=200)


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
