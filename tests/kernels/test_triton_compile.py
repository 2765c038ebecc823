"""Every Triton kernel compiles for Ampere, Hopper and Blackwell, on a machine without a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton")

from msfs_kernels import (  # noqa: E402
    configs,
    launching,
    triton_backward,
    triton_bias,
    triton_decode,
    triton_dual,
    triton_forward,
    triton_rows,
    triton_tangent,
)
from msfs_kernels.configs import Config  # noqa: E402
from msfs_kernels.launching import Launch  # noqa: E402
from msfs_kernels.options import Options  # noqa: E402
from msfs_kernels.triton_common import padded  # noqa: E402
from msfs_kernels.triton_compile import compile_launch, resources  # noqa: E402
from parameters import parameters_agree  # noqa: E402

SHARED = {80: 163, 90: 227, 100: 227}  # KiB a program may take
KERNELS = ["forward", "few queries", "fused", "keys", "queries", "tangent", "bias", "decode"]
WITHOUT_OPTIONS = ["dual", "delta", "merge"]


def launch_of(
    kernel: str, K: int, options: Options, config: Config | None, dtype=torch.bfloat16
) -> Launch:
    B, H, G, T = 2, 4, 2, 256
    exact = dtype == torch.float32 and options.precision == "ieee"

    def tensor(heads: int) -> torch.Tensor:
        return torch.empty(B, T, heads, K, dtype=dtype).transpose(1, 2)

    q, k, v, o, lse = tensor(H), tensor(G), tensor(G), tensor(H), torch.empty(B, H, T)
    share = lse if exact else None
    if kernel == "few queries":
        return triton_forward.plan_forward(q[:, :, :5], k, v, o, lse, options, config)
    if kernel == "forward":
        return triton_forward.plan_forward(q, k, v, o, lse, options, config)
    if kernel == "decode":
        parts, part_lse = torch.empty(4 * B, H, T, K), torch.empty(4 * B, H, T)
        return triton_decode.plan_slices(q[:, :, :1], k, v, parts, part_lse, options, config)
    if kernel == "delta":
        return triton_rows.plan_delta(o, o, lse, lse, options)
    if kernel == "merge":
        parts, part_lse = torch.empty(4 * B, H, T, K), torch.empty(4 * B, H, T)
        return triton_decode.plan_merge(parts, part_lse, o, lse, options)
    if kernel == "dual":
        return triton_dual.plan_dual(q, k, v, q, k, v, o, lse, o, lse, options, config)
    if kernel == "tangent":
        return triton_tangent.plan_tangent(
            q, k, v, options.bias, q, k, v, o, lse, o, lse, options, config
        )
    if kernel == "queries":
        rest = (None, None) if exact else (o, lse)
        return triton_backward.plan_queries(q, k, v, o, *rest, lse, lse, share, q, options, config)
    if kernel == "mean":
        return triton_rows.plan_mean(q, k, v, o, lse, lse, lse, lse, options, config)
    if kernel == "bias":
        bias = torch.empty(1, H, T, T, dtype=dtype)
        options = options._replace(bias=bias)
        return triton_bias.plan_bias(q, k, v, o, lse, lse, share, options, config)[0]
    sums = torch.empty(B, H, T, K) if kernel == "fused" else None
    rest = (None, None, lse, lse, share, k, v, sums)
    return triton_backward.plan_keys(q, k, v, o, *rest, options, config)


def everything() -> Options:
    B, H, T = 2, 4, 256
    lengths = torch.empty(B, dtype=torch.int32)
    segments = torch.empty(B, T, dtype=torch.int32)
    return Options(
        bias=torch.empty(1, H, T, T, dtype=torch.bfloat16),
        key_lengths=lengths,
        prefix_lengths=lengths,
        q_segments=segments,
        k_segments=segments,
        alibi=torch.empty(B, H),
        rng=torch.empty(B, 2, dtype=torch.int64),
        causal=True,
        window=100,
        scale=0.1,
        softcap=20.0,
        dropout=0.1,
    )


def default_for(kernel: str) -> Config:
    return configs.default({"few queries": "decode"}.get(kernel, kernel), torch.bfloat16, 64)


def took(launch: Launch, capability: int):
    compiled = compile_launch(launch, capability)
    assert parameters_agree(launch, compiled)
    return resources(compiled, capability)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_with_all_options_compiles_with_the_default_tiles(kernel):
    config = default_for(kernel)
    assert took(launch_of(kernel, 64, everything(), config), 80).shared <= SHARED[80] * 1024


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_kernel_compiles_for_every_chip(capability):
    known = KERNELS if capability > 80 else []  # the test above has them on the oldest
    for kernel in [*known, *WITHOUT_OPTIONS]:
        config = default_for(kernel)
        used = took(launch_of(kernel, 64, Options(scale=0.125), config), capability)
        assert used.shared <= SHARED[capability] * 1024, kernel
        rows = config.block_m if kernel not in ("delta", "merge") else 0
        assert used.wgmma > 0 or capability != 90 or rows < 64, kernel


@pytest.mark.parametrize("K", [80, 256])
def test_padded_head_dims_fit_the_smallest_chip(K):
    for kernel in ("forward", "fused"):
        config = configs.default(kernel, torch.bfloat16, padded(K))
        assert (
            took(launch_of(kernel, K, Options(scale=0.1), config), 80).shared <= SHARED[80] * 1024
        )


@pytest.mark.parametrize(
    "kernel, precision",
    [("fused", "ieee"), ("fused", "tf32"), ("mean", "ieee"), ("tangent", "ieee")],
)
def test_float32_compiles_in_both_precisions(kernel, precision):
    config = configs.default(kernel, torch.float32, 32)
    options = Options(scale=0.1, precision=precision)
    used = took(launch_of(kernel, 32, options, config, torch.float32), 90)
    assert used.shared <= SHARED[90] * 1024


def test_a_thread_is_woken_once_and_a_refused_launch_tried_again(monkeypatch):
    made, tried, x = [], [], torch.empty(1)

    class Refuses:
        """Until torch has launched something in this thread."""

        def run(self, tensors) -> bool:
            tried.append(len(made))
            return bool(made)

    monkeypatch.setattr(launching.torch, "zeros", lambda *_, device: made.append(device))
    monkeypatch.setattr(launching, "THREADS", launching.Threads())
    prepared = launching.Prepared(Refuses(), None, [], [])  # pyright: ignore[reportArgumentType]
    prepared.run([None, x])
    prepared.run([None, x])
    assert tried == [0, 1, 1] and made == [x.device]
