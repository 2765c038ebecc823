"""The raw ops as torch sees them: opcheck, fakes, export, compiled without break or recompile."""

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msfs_kernels import flash_attention
from msfs_kernels.options import Options
from torch import Tensor, nn

OPS = torch.ops.msfs_kernels


def randn(*shape, seed=0, requires_grad=True) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def samples(bias: Tensor | None) -> dict[str, tuple]:
    """Arguments of each op: odd sizes, grouped heads, strided queries, every option."""
    B, H, G, T, S, K, Kv = 2, 4, 2, 3, 5, 8, 6
    options = Options(
        bias=bias,
        key_lengths=torch.tensor([5, 2], dtype=torch.int32),
        prefix_lengths=torch.tensor([0, 3], dtype=torch.int32),
        q_segments=torch.zeros(B, T, dtype=torch.int32),
        k_segments=torch.zeros(B, S, dtype=torch.int32),
        alibi=torch.rand(B, H, dtype=torch.float64),
        rng=torch.tensor([[1, 2], [3, 4]]),
        causal=True,
        window=4,
        scale=0.3,
        softcap=3.0,
        dropout=0.25,
    )
    rest = options[1:]

    def inputs(seed):
        q = randn(B, T, H, K, seed=seed, requires_grad=False).transpose(1, 2).requires_grad_()
        floating = bias is not None and bias.is_floating_point()
        tbias = randn(*bias.shape, seed=seed + 3) if floating and bias is not None else None
        return q, randn(B, G, S, K, seed=seed + 1), randn(B, G, S, Kv, seed=seed + 2), tbias

    q, k, v, _ = inputs(0)
    x, t, u = (q, k, v, bias), inputs(10), inputs(20)
    o, lse = (y.detach() for y in OPS.attention(*x, *rest))
    do, dlse = randn(*o.shape, seed=5), randn(*lse.shape, seed=6)
    need = bias is not None and bias.is_floating_point()
    second = (do, dlse, *t, *x, lse, *rest, need)
    return {
        "attention": (*x, *rest),
        "attention_backward": (do, dlse, *x, o, lse, *rest, need),
        "attention_tangent": (*t, *x, o, lse, *rest),
        "attention_second_backward": detached(second),
        "attention_second_tangent": detached((*t, *u, *x, lse, *rest)),
    }


def detached(args: tuple) -> tuple:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in args)


@pytest.mark.parametrize("name", list(samples(None)))
@pytest.mark.parametrize("bias", ["none", "broadcast"])
def test_opcheck(name, bias):
    value = None if bias == "none" else randn(1, 4, 1, 5, seed=4)
    torch.library.opcheck(getattr(OPS, name).default, samples(value)[name])


def samples_of_other_ops() -> dict[str, tuple]:
    """Arguments of the library's other ops: gradients in one tensor, losses over a vocabulary, one
    row of a decoder, what graphs are rewritten to.
    """

    def asked(*tensors):
        return tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors)

    x = (randn(1, 5, 8), randn(1, 11, 8, seed=1), randn(1, 11, seed=2))
    x = (*x, torch.tensor([[1, 2, -100, 10, 0]]))
    t, scalars = (
        (randn(1, 5, 8, seed=3), randn(1, 11, 8, seed=4), randn(1, 11, seed=5)),
        (0.1, -100),
    )
    scalars = (0.1, -100, 1e-3, 5.0)
    grads = [y.detach() for y in OPS.linear_cross_entropy(*x, *scalars, True)[1:]]
    g, (row, gain, shift) = randn(1, seed=6), randn(3, 8, requires_grad=False)
    w, b, residual = (randn(*n, requires_grad=False) for n in ((12, 8), (12,), (6,)))
    caches = (randn(1, 2, 9, 8, requires_grad=False) for _ in range(2))
    qkv, turns = randn(64, requires_grad=False), randn(2, 4, requires_grad=False)
    q, k = (randn(2, n, 3, 8, requires_grad=False) for n in (4, 2))
    rest = Options(causal=True, scale=0.3)[1:]
    o, lse = OPS.attention(q, k, k, None, *rest)
    a, h, d = (randn(*n, requires_grad=False) for n in ((4, 12), (4, 8), (12, 8)))
    return {
        "attention_backward_joined": (o, None, q, k, k, None, o, lse, *rest),
        "linear_cross_entropy": (*asked(*x), *scalars, True),
        "linear_cross_entropy_gradient": (*asked(g, *x), *grads, *scalars),
        "linear_cross_entropy_tangent": (*asked(*t, *x), *grads, *scalars),
        "linear_cross_entropy_second": detached((g, *t, *x, *scalars)),
        "row_linear": (row, w, b, gain, shift, residual, "layer", 1e-5, 0.0, "gelu", True),
        "row_attention": (qkv, *caches, torch.tensor([4]), *turns, 4, 0.3, 0.0, 0),
        "product_gelu": (a, w, gain),
        "product_gelu_gradient": (a, w, h),
        "scaled_columns": (w, gain, w[:5], shift),
        "scaled_columns_gradient": (d, w, gain, d[:5], w[:5], shift),
    }


def test_the_other_ops_pass_opcheck_and_no_op_is_forgotten():
    from msfs_kernels import (  # noqa: F401
        gelu_product,
        joined_backward,
        linear_cross_entropy,
        one_row,
        scaled_columns,
    )

    others = samples_of_other_ops()
    for name, args in others.items():
        torch.library.opcheck(getattr(OPS, name).default, args)
    # These are checked by tests of their own, or their CPU form is; the last one only raises.
    elsewhere = {"philox_words", "philox_words_triton", "dropout_bits", "dropout_bits_triton"}
    elsewhere |= {"masked_product", "members_linear", "members_masked_product", "attention_refused"}
    elsewhere |= {"members_sums", "members_norm_sums"}
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("msfs_kernels::")}  # fmt: skip
    assert names <= {*samples(None), *others, *elsewhere}


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("repeat", [1, 2])
def test_fakes_tell_the_strides_of_the_kernels(T, causal, repeat):
    from torch._subclasses import FakeTensorMode

    q, k = randn(2, 2 * repeat, T, 8), randn(2, 2, 6, 8, seed=1)
    rest = Options(causal=causal, scale=0.3)[1:]
    real = OPS.attention(q, k, k, None, *rest)
    real = (*real, *OPS.attention_backward(real[0], None, q, k, k, None, *real, *rest, False))
    with FakeTensorMode() as mode:
        q, k = mode.from_tensor(q), mode.from_tensor(k)
        fake = OPS.attention(q, k, k, None, *rest)
        fake = (*fake, *OPS.attention_backward(fake[0], None, q, k, k, None, *fake, *rest, False))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        strides = zip(a.shape, a.stride(), b.stride(), strict=True)
        assert all(mine == theirs for n, mine, theirs in strides if n > 1)


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        return flash_attention(q, k, k, is_causal=True, key_lengths=lengths).transpose(1, 2) + 1


def block_inputs(batch=2, T=3, S=5):
    q, k = randn(batch, 4, T, 8, requires_grad=False), randn(batch, 2, S, 8, requires_grad=False)
    return q, k, torch.tensor([S, 2])[:batch]


def test_export_keeps_the_op_whole():
    dims = {0: torch.export.Dim("batch", max=64)}
    inputs = block_inputs()
    program = torch.export.export(Block(), inputs, dynamic_shapes=(dims, dims, dims))
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(OPS.attention.default) == 1
    torch.testing.assert_close(program.module()(*inputs), Block()(*inputs))
    decomposed = program.run_decompositions()
    called = [node.target for node in decomposed.graph.nodes if node.op == "call_function"]
    assert called.count(OPS.attention.default) == 1


SECONDS = 240  # one H200's host took more than 75 to compile a package, beside other programs


def packaged(which: str, device: str, folder: Path) -> tuple[int | None, list[str], str]:
    """aot_package.py's exit code (None: it did not end in time), words and errors."""
    script = Path(__file__).with_name("aot_package.py")
    command = [sys.executable, str(script), which, device, str(folder)]
    options: dict = {"env": {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}}
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **options) as process:
        try:
            words, errors = process.communicate(timeout=SECONDS)
            return process.returncode, words.split(), errors
        except subprocess.TimeoutExpired:
            process.kill()
            words, errors = process.communicate()
            return None, words.split(), errors


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.timeout(600)
def test_aot_inductor_runs_the_op(device, tmp_path):
    """Where torch's loader crashes for plain torch, too, in the same run, this is left out."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ours = pool.submit(packaged, "flash", device, tmp_path)
        plain = pool.submit(packaged, "plain", device, tmp_path) if device == "cuda" else None
        code, words, errors = ours.result()
        crashed = code is not None and code < 0 and words[-1:] == ["loading"]
        if crashed:
            theirs = plain.result() if plain else packaged("plain", device, tmp_path)
            if theirs[:2] == (code, words):
                pytest.skip(f"plain torch crashes at loading too, signal {-code} on {device}")
    if code is None:
        pytest.fail(f"compiling, loading and running did not end in {SECONDS} s, after {words}")
    assert code == 0 and words[-1] == "equal", errors[-2000:]


def test_new_shapes_recompile_at_most_once():
    frames = 0

    def backend(graph, _):
        nonlocal frames
        frames += 1
        return graph

    compiled = torch.compile(Block(), fullgraph=True, backend=backend)
    for T in (3, 4, 5, 7, 9):
        inputs = block_inputs(T=T, S=T + 2)
        torch.testing.assert_close(compiled(*inputs), Block()(*inputs))
    assert frames == 2  # the first shape, then one graph for all


def test_there_is_no_graph_break():
    explained = torch._dynamo.explain(Block())(*block_inputs())
    assert explained.graph_break_count == 0 and explained.graph_count == 1
