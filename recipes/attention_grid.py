"""Forward and backward of every peer over head dims, masks and lengths: the grid of
bench_attention, on a GPU and on the CPU.
"""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from attention_peers import Attention, available
from attention_timing import interleaved_ms, median_ms
from torch import Tensor

WIDTH, TOKENS = 2048, 16_384


def inputs(head_dim: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, do as (B, H, T, K)."""
    shape = (TOKENS // length, WIDTH // head_dim, length, head_dim)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q, k, v, do


def exact_head(q: Tensor, k: Tensor, v: Tensor, do: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """o, dq, dk, dv of the first head in float64."""
    leaves = [x[:1, :1].double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    o = scores.softmax(-1) @ leaves[2]
    return o.detach(), *torch.autograd.grad(o, leaves, do[:1, :1].double())


def measure(
    attention: Attention,
    tensors: tuple[Tensor, ...],
    causal: bool,
    exact: tuple[Tensor, ...],
    rep_ms: int,
):
    """Forward and backward ms, largest errors of o and of the gradients, peak MiB above inputs;
    NaN for the backward of a forward kernel.
    """
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    do = tensors[3]

    def both() -> tuple[Tensor, ...]:
        o = attention(q, k, v, causal)
        return o, *(torch.autograd.grad(o, (q, k, v), do) if o.requires_grad else ())

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = both()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    errors = [
        float((x[:1, :1].detach().double() - y).abs().max())
        for x, y in zip(results, exact, strict=False)
    ]
    del results
    with torch.no_grad():
        forward_ms = median_ms(lambda: attention(q, k, v, causal), rep_ms)
    o = attention(q, k, v, causal)
    if not o.requires_grad:
        return forward_ms, float("nan"), errors[0], float("nan"), peak
    backward_ms = median_ms(
        lambda: torch.autograd.grad(o, (q, k, v), do, retain_graph=True), rep_ms
    )
    return forward_ms, backward_ms, errors[0], max(errors[1:], default=0.0), peak


def bench(args: argparse.Namespace) -> None:
    peers = available(args.peers)
    rows = []
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; "
        "forward / backward TFLOP/s (error o / grads, peak MiB)"
    )
    for head_dim in args.head_dims:
        for causal in args.causal:
            for length in args.lengths or (1024, 4096, 16_384):
                tensors = inputs(head_dim, length)
                exact = exact_head(*tensors, causal)
                flops = 4 * TOKENS * length * WIDTH / (2 if causal else 1)
                cells = []
                for name, attention in peers.items():
                    if name == "math" and length > 4096:
                        continue
                    try:
                        fwd, bwd, error, grad_error, peak = measure(
                            attention, tensors, causal, exact, args.rep
                        )
                    except Exception as problem:
                        cells.append(f"{name} failed: {str(problem).splitlines()[0][:60]}")
                        continue
                    row = dict(
                        head_dim=head_dim,
                        causal=causal,
                        length=length,
                        peer=name,
                        forward_ms=fwd,
                        backward_ms=bwd,
                        forward=flops / fwd / 1e9,
                        backward=2.5 * flops / bwd / 1e9,
                        error=error,
                        grad_error=grad_error,
                        peak_mib=peak,
                    )
                    rows.append(row)
                    cells.append(
                        f"{name} {row['forward']:.0f}/{row['backward']:.0f} "
                        f"({error:.1g}/{grad_error:.1g} {peak:.0f})"
                    )
                print(
                    f"{head_dim:4d} {'causal' if causal else 'full  '} {length:6d}  "
                    + "  ".join(cells),
                    flush=True,
                )
    save(args.out, "attention", rows)
    plot(args.out, rows)


def save(out: Path, name: str, rows: list[dict]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1))


def plot(out: Path, rows: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = sorted({(row["head_dim"], row["causal"]) for row in rows})
    if not groups:
        return
    figure, axes = plt.subplots(
        2, len(groups), figsize=(4 * len(groups), 6), squeeze=False, sharey="row"
    )
    for column, (head_dim, causal) in enumerate(groups):
        mine = [row for row in rows if (row["head_dim"], row["causal"]) == (head_dim, causal)]
        for axis, field in zip(axes[:, column], ("forward", "backward"), strict=True):
            for peer in dict.fromkeys(row["peer"] for row in mine):
                points = [(row["length"], row[field]) for row in mine if row["peer"] == peer]
                axis.plot(*zip(*points, strict=True), marker="o", label=peer)
            axis.set_xscale("log", base=2)
            axis.set_title(
                f"{field}, head dim {head_dim}{', causal' if causal else ''}", fontsize=9
            )
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    figure.tight_layout()
    figure.savefig(out / "attention.png", dpi=130)


def cpu_rows(length: int, masks: list[bool]) -> dict[str, tuple[int, dict, dict]]:
    """Name: (kv heads of 8, our options, torch's), the same work on both sides."""
    lengths = torch.tensor([length, 3 * length // 4])
    padded = (torch.arange(length) < lengths[:, None])[:, None, None]
    near = torch.ones(length, length, dtype=torch.bool).tril().triu(-31)
    plain = {"causal" if x else "full": (8, {"is_causal": x}, {"is_causal": x}) for x in masks}
    return {
        **plain,
        "2 kv heads": (2, {}, {"enable_gqa": True}),
        "padded": (8, {"key_lengths": lengths}, {"attn_mask": padded}),
        "window 32": (8, {"is_causal": True, "window": 32}, {"attn_mask": near}),
    }


def bench_cpu(args: argparse.Namespace) -> None:
    """Forward and backward in float32 on the CPU beside torch's own attention there."""
    from msfs_kernels import flash_attention

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; B 2, H 8, K 64, float32")
    for length in args.lengths or (128, 1024):
        for name, (kv_heads, options, peers) in cpu_rows(length, args.causal).items():
            q, k, v = (
                torch.randn(2, heads, length, 64, requires_grad=True)
                for heads in (8, kv_heads, kv_heads)
            )
            do = torch.randn(2, 8, length, 64)
            calls: list[Callable[[], object]] = []
            for attention in (
                functools.partial(flash_attention, **options),
                functools.partial(F.scaled_dot_product_attention, **peers),
            ):
                o = attention(q, k, v)
                calls.append(torch.no_grad()(functools.partial(attention, q, k, v)))
                calls.append(
                    functools.partial(torch.autograd.grad, o, (q, k, v), do, retain_graph=True)
                )
            fwd, bwd, peer_fwd, peer_bwd = interleaved_ms(calls, args.rep)
            print(
                f"{length:6d} {name:10s}"
                f"  forward {fwd:7.3f} ms, torch {peer_fwd:7.3f}, {fwd / peer_fwd:4.2f} times"
                f"  backward {bwd:7.3f} ms, torch {peer_bwd:7.3f}, {bwd / peer_bwd:4.2f} times",
                flush=True,
            )
