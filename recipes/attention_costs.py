"""What calls of our attention cost: decoding against a cache, each mask, and the host's share."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from attention_peers import Attention, jvp_flash_if_installed, jvp_of, ours
from attention_timing import host_microseconds, milliseconds
from msfs_kernels import triton_backward, triton_forward, triton_tangent
from msfs_kernels.options import Options
from torch import Tensor


def bench_decode(args: argparse.Namespace) -> None:
    """A few new tokens of some rows, 32 heads over 8 kv heads of 128, against a cache of keys:
    ours beside what torch picks by itself and its FlashAttention-2.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    rows = []
    for batch in (1, 8):
        for length in args.lengths or (8192, 32_768, 65_536):
            k, v = (
                torch.randn(batch, 8, length, 128, device=args.device, dtype=torch.bfloat16)
                for _ in range(2)
            )
            gigabytes = 2 * k.numel() * k.element_size() / 1e9
            for T in (1, 4, 16):
                q = torch.randn(batch, 32, T, 128, device=args.device, dtype=torch.bfloat16)
                peer = functools.partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)
                calls: list[Callable[[], object]] = [
                    functools.partial(ours, q, k, v, False),
                    peer,
                ]
                with torch.no_grad():
                    error = (ours(q, k, v, False) - peer()).abs().max()
                    ms, peer_ms = milliseconds(calls, args)
                    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                        (flash_ms,) = milliseconds([peer], args)
                rows.append(
                    f"{batch:4d} {T:4d} {length:7d} {ms:9.3f} {gigabytes / ms * 1e3:7.0f}"
                    f" {peer_ms:9.3f} {flash_ms:9.3f} {peer_ms / ms:8.2f} {flash_ms / ms:8.2f}"
                    f" {float(error):10.2g}"
                )
    print("rows    T    keys   ours ms    GB/s   sdpa ms  flash ms  faster than either  difference")
    print("\n".join(rows))


def mask_rows(length: int, device: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name: (kv heads of 16, options), each leaving a part of the work of the first."""
    half = torch.full((1,), length // 2, device=device)
    ids = torch.arange(length, device=device) // (length // 8)
    return {
        "full": (16, {}),
        "causal": (16, {"is_causal": True}),
        "causal, window of 1k": (16, {"is_causal": True, "window": 1024}),
        "window of 1k, both sides": (16, {"window": 1024}),
        "keys half as long": (16, {"key_lengths": half}),
        "causal, 8 packed segments": (16, {"is_causal": True, "segment_ids": ids}),
        "causal, prefix of half": (16, {"is_causal": True, "prefix_lengths": half}),
        "4 kv heads": (4, {}),
        "1 kv head": (1, {}),
        "softcap": (16, {"softcap": 50.0}),
        "ALiBi": (16, {"is_causal": True, "alibi_slopes": torch.rand(16, device=device)}),
        "dropout 0.1": (
            16,
            {"dropout": 0.1, "dropout_key": torch.tensor([1, 2], device=device)},
        ),
    }


def bench_masks(args: argparse.Namespace) -> None:
    """What each option costs at 16k tokens, 16 heads of 128: time falls with the work left."""
    from msfs_kernels import flash_attention

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    for length in args.lengths or (16_384,):
        first: list[float] = []
        print(f"{length} tokens{'':14s} forward ms  of full  backward ms  of full")
        for name, (kv_heads, options) in mask_rows(length, args.device).items():
            q, k, v = (
                torch.randn(1, heads, length, 128, device=args.device, dtype=dtype).requires_grad_()
                for heads in (16, kv_heads, kv_heads)
            )
            o = flash_attention(q, k, v, **options)
            calls: list[Callable[[], object]] = [
                torch.no_grad()(functools.partial(flash_attention, q, k, v, **options)),
                functools.partial(torch.autograd.grad, o, (q, k, v), o, retain_graph=True),
            ]
            times = milliseconds(calls, args)
            first = first or times
            cells = (f"{ms:9.3f} {ms / full:7.1%}" for ms, full in zip(times, first, strict=True))
            print(f"{name:26s} " + "   ".join(cells), flush=True)


def bench_overhead(args: argparse.Namespace) -> None:
    """Time that the host takes to start a tiny attention, in microseconds a call."""
    q, k, v = (
        torch.randn(1, 2, 16, 64, device=args.device, dtype=torch.bfloat16) for _ in range(3)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    moves = tuple(torch.randn_like(x) for x in (q, k, v))

    def torchs(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    do = torch.randn_like(q)

    def with_backward(attention: Attention) -> object:
        return torch.autograd.grad(attention(leaves[0], leaves[1], leaves[2], False), leaves, do)

    calls: dict[str, list[Callable[[], object]]] = {
        "forward": [lambda: ours(q, k, v, False), lambda: torchs(q, k, v, False)],
        "forward that records": [
            lambda: ours(leaves[0], leaves[1], leaves[2], False),
            lambda: torchs(leaves[0], leaves[1], leaves[2], False),
        ],
        "forward and backward": [lambda: with_backward(ours), lambda: with_backward(torchs)],
        "jvp": [lambda: torch.func.jvp(lambda x, y, z: ours(x, y, z, False), (q, k, v), moves)],
    }
    if args.device == "cuda":
        lse, options = q.new_empty((1, 2, 16), dtype=torch.float32), Options(scale=0.125)
        point = (q, k, v, q, lse, options)
        calls["forward, kernel alone"] = [lambda: triton_forward.forward(q, k, v, options)]
        calls["backward, kernel alone"] = [lambda: triton_backward.backward(q, None, *point, False)]
        calls["tangent, kernel alone"] = [lambda: triton_tangent.tangent(q, k, v, None, *point)]
    peer = jvp_flash_if_installed()
    if args.device == "cuda" and peer is not None:
        x, t = (torch.randn(3, 1, 2, 128, 64, device="cuda", dtype=q.dtype) for _ in range(2))
        calls["jvp, jvp_flash_attention"] = [
            functools.partial(jvp_of, attention, tuple(x), tuple(t)) for attention in (ours, peer)
        ]
    print("microseconds a call          ours   peer  ratio (medians of rounds in turn)")
    for name, both in calls.items():
        times, ratio = host_microseconds(both, args)
        peer_and_ratio = f" {times[1]:6.1f} {ratio:6.2f}" if len(both) > 1 else ""
        print(f"{name:26s} {times[0]:6.1f}{peer_and_ratio}", flush=True)
