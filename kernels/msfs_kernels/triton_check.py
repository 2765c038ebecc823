"""Randomised comparison of the Triton kernels with the textbook formula in float64, on a GPU or in
Triton's interpreter.

`random_case(seed)` draws shapes, strides, dtype and any combination of masks; `failures(case)` runs
forward, backward and tangent and says what disagrees. The yardstick is the same formula in the
inputs' dtype by plain PyTorch operations: ours may reach twice its error, plus two roundings of the
largest value.
"""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_kernels.options import Options
from msfs_kernels.philox import philox_4x32
from msfs_kernels.triton_backend import backward, forward, tangent


class Case(NamedTuple):
    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: Options


def visible(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """The mask drawn out, bool (B, 1 | H, T, S)."""
    (B, _, T, _), S = q.shape, k.shape[2]
    p = torch.arange(T, device=q.device)[:, None] + S - T
    j = torch.arange(S, device=q.device)[None, :]
    seen = torch.ones(B, 1, T, S, dtype=torch.bool, device=q.device)
    if options.causal:
        seen = seen & (j <= p)
    if options.window >= 0:
        seen = seen & (
            (p - j < options.window) if options.causal else ((p - j).abs() < options.window)
        )
    if options.prefix_lengths is not None:
        seen = seen | (j < options.prefix_lengths[:, None, None, None])
    if options.key_lengths is not None:
        seen = seen & (j < options.key_lengths[:, None, None, None])
    if options.q_segments is not None and options.k_segments is not None:
        seen = seen & (options.q_segments[:, None, :, None] == options.k_segments[:, None, None, :])
    if options.bias is not None and options.bias.dtype == torch.bool:
        seen = seen & options.bias
    return seen


def kept(q: Tensor, k: Tensor, options: Options) -> Tensor:
    """Dropout's factor 0 or 1 / (1 - dropout) for every entry, float64 (B, H, T, S)."""
    assert options.rng is not None
    (_, H, T, _), S = q.shape, k.shape[2]
    h, i, j = (
        torch.arange(n, device=q.device).view(shape)
        for n, shape in ((H, (1, -1, 1, 1)), (T, (1, 1, -1, 1)), (S, (1, 1, 1, -1)))
    )
    keys = options.rng[:, :, None, None, None]
    word = philox_4x32(j, i, h, torch.zeros_like(j), keys[:, 0], keys[:, 1])[0]
    return (word >= round(options.dropout * 2**32)).double() / (1 - options.dropout)


def textbook(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale q k^T) - alibi + bias) v, the mask drawn out, in q's dtype; (o, lse)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    T, S = q.shape[2], k.shape[2]
    s = q @ k.mT * options.scale
    if options.softcap > 0:
        s = options.softcap * torch.tanh(s / options.softcap)
    if options.alibi is not None:
        p = torch.arange(T, device=q.device)[:, None] + S - T
        distance = (p - torch.arange(S, device=q.device)).abs()
        s = s - options.alibi[:, :, None, None].to(s.dtype) * distance
    if bias is not None:
        s = s + bias
    seen = visible(q, k, options)
    if bias is not None:
        seen = seen & (bias > float("-inf"))
    some = seen.any(-1, keepdim=True)
    s = s.masked_fill(~seen & some, float("-inf")).masked_fill(~some, 0.0)
    p = s.softmax(-1) * some
    if options.dropout > 0:
        p = p * kept(q, k, options).to(p.dtype)
    return p @ v, s.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))


def random_case(
    seed: int, device: str, largest: int = 300, dtypes: tuple[torch.dtype, ...] | None = None
) -> Case:
    """Shapes to `largest` tokens, any head grouping, any strides, any combination of options."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dtype = draw.choice(dtypes or (torch.float16, torch.bfloat16, torch.bfloat16, torch.float32))
    B, G, group = draw.choice((1, 2, 3)), draw.choice((1, 2)), draw.choice((1, 1, 2, 3))
    H = G * group
    T = draw.choice((1, 3, 17, 64, 127, 128, draw.randint(1, largest)))
    S = T if draw.random() < 0.4 else draw.choice((1, 5, 64, 128, draw.randint(1, largest)))
    if T <= 16 and largest >= 300 and draw.random() < 0.5:
        S = draw.choice((512, 700, 1111))  # long enough for split-KV decoding
    K = draw.choice((8, 16, 24, 40, 64, 64, 72, 80, 96, 128, 128, 160, 256))
    V = K if draw.random() < 0.7 else draw.choice((8, 16, 40, 64, 96))

    def tensor(heads: int, tokens: int, dim: int) -> Tensor:
        layout = draw.choice(
            ("heads first", "tokens first", "sliced", "strided dim", "broadcast batch")
        )
        rows = 1 if layout == "broadcast batch" else B
        if layout == "tokens first":
            x = torch.randn(rows, tokens, heads, dim, generator=generator).transpose(1, 2)
        elif layout == "sliced":
            x = torch.randn(rows, heads, tokens + 3, dim + 5, generator=generator)[:, :, 1:-2, 2:-3]
        elif layout == "strided dim":
            x = torch.randn(rows, heads, dim, tokens, generator=generator).mT
        else:
            x = torch.randn(rows, heads, tokens, dim, generator=generator)
        return preserved(x, dtype, device).expand(B, -1, -1, -1)

    def chance(p: float) -> bool:
        return draw.random() < p

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32).to(device)

    fields: dict[str, Any] = {"causal": chance(0.5), "scale": draw.choice((K**-0.5, 1.0, 0.3))}
    if chance(0.3):
        fields["window"] = draw.choice((1, 7, 64, draw.randint(1, largest)))
    if chance(0.3):
        fields["key_lengths"] = integers(0, S + 1, B)
    if chance(0.2):
        fields["prefix_lengths"] = integers(0, S + 1, B)
    if chance(0.2):
        fields["q_segments"] = (
            integers(0, 3, B, T).sort(-1).values if chance(0.5) else integers(0, 3, B, T)
        )
        fields["k_segments"] = (
            integers(0, 3, B, S).sort(-1).values if chance(0.5) else integers(0, 3, B, S)
        )
    if chance(0.2):
        fields["softcap"] = draw.choice((1.5, 20.0))
    if chance(0.2):
        fields["alibi"] = torch.rand(B, H, generator=generator).to(device)
    if chance(0.3):
        shape = [n if chance(0.6) else 1 for n in (B, H, T, S)]
        bias = torch.randn(shape, generator=generator).to(device)
        fields["bias"] = bias > -0.7 if chance(0.4) else bias.to(dtype)
    if chance(0.2):
        fields["dropout"] = draw.choice((0.1, 0.5))
        fields["rng"] = torch.randint(0, 2**32, (B, 2), generator=generator).to(device)
    fields["deterministic"] = chance(0.3)
    q, k, v = tensor(H, T, K), tensor(G, S, K), tensor(G, S, V)
    if chance(0.1):
        q = q * 30  # row log-sum-exps far outside float16's and e^88's range
    said = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return Case(
        f"seed {seed} {dtype} B{B} H{H} G{G} T{T} S{S} K{K} V{V} {said}", q, k, v, Options(**fields)
    )


def preserved(x: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """x on the device in the dtype with the same strides, gaps included."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    storage = torch.as_strided(x, (extent,), (1,), x.storage_offset()).to(device, dtype)
    return torch.as_strided(storage, x.shape, x.stride())


def by_formula(
    case: Case, dtype: torch.dtype, given: dict[str, Tensor], tangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """o, lse, gradients and tangents of the textbook formula computed in `dtype`."""
    inputs = {"q": case.q, "k": case.k, "v": case.v}
    if case.options.has_float_bias and case.options.bias is not None:
        inputs["bias"] = case.options.bias
    leaves = {
        name: x.detach().to(dtype).contiguous().clone().requires_grad_()
        for name, x in inputs.items()
    }

    def formula(*args: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = args[:3]
        return textbook(q, k, v, args[3] if len(args) > 3 else None, case.options)

    o, lse = formula(*leaves.values())
    finite = lse > float("-inf")
    seeded = (o * given["o"].to(dtype)).sum() + (
        lse.masked_fill(~finite, 0.0) * given["lse"].to(dtype)
    ).sum()
    grads = torch.autograd.grad(seeded, list(leaves.values()))
    out = {"o": o.detach(), "lse": lse.detach()}
    out |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    moves = tuple(tangents[name].to(dtype) for name in leaves)
    fixed = tuple(x.detach() for x in leaves.values())
    to, tlse = torch.func.jvp(formula, fixed, moves)[1]
    return out | {"to": to, "tlse": tlse}


def by_kernels(
    case: Case, given: dict[str, Tensor], tangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    q, k, v, options = case.q, case.k, case.v, case.options
    o, lse = forward(q, k, v, options)
    out = {"o": o, "lse": lse}
    biased = options.has_float_bias
    dq, dk, dv, dbias = backward(given["o"], given["lse"], q, k, v, o, lse, options, biased)
    out |= {"dq": dq, "dk": dk, "dv": dv}
    if dbias is not None:
        out["dbias"] = dbias
    to, tlse = tangent(
        tangents["q"], tangents["k"], tangents["v"], tangents.get("bias"), q, k, v, o, lse, options
    )
    return out | {"to": to, "tlse": tlse}


def failures(case: Case, seed: int = 0) -> list[str]:
    """One line for each output that is further from float64 than twice the plain formula's own
    error.
    """
    q, k, v, options = case.q, case.k, case.v, case.options
    generator = torch.Generator().manual_seed(seed)

    def like(x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x.device, dtype)

    o_like = q.new_empty(*q.shape[:3], v.shape[-1])
    given = {"o": like(o_like, q.dtype), "lse": like(o_like[..., 0], torch.float32)}
    tangents = {"q": like(q, q.dtype), "k": like(k, q.dtype), "v": like(v, q.dtype)}
    if options.has_float_bias and options.bias is not None:
        tangents["bias"] = like(options.bias, q.dtype)
    exact = by_formula(case, torch.float64, given, tangents)
    plain = by_formula(case, q.dtype, given, tangents)
    ours = by_kernels(case, given, tangents)
    wrong = []
    lse = exact["lse"]
    lse_size = lse.masked_fill(lse == float("-inf"), 0.0).abs().amax() if lse.numel() else 0.0
    for name, truth in exact.items():
        got, peer = ours[name].double(), plain[name].double()
        if got.shape != truth.shape:
            wrong.append(f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
            continue
        infinite = truth == float("-inf")
        same = torch.equal(got == float("-inf"), infinite)
        got, peer, truth = (x.masked_fill(infinite, 0.0) for x in (got, peer, truth))
        error, allowed = (got - truth).abs(), (peer.nan_to_num(0.0) - truth).abs()
        # Differences such as dP - delta round relative to their terms: the floor is the size of a
        # product of unit vectors. P = e^(s - lse) carries the rounding of lse relative to 1.
        floor = 16.0 if q.dtype == torch.float32 else 1e-2
        scale = truth.abs().max().clamp(min=floor) if truth.numel() else torch.ones(())
        rounding = torch.finfo(torch.float32 if name in ("lse", "tlse") else q.dtype).eps
        growth = 4 + 2 * float(lse_size) if q.dtype == torch.float32 else 4.0
        bound = 2 * allowed.max() + growth * rounding * scale if truth.numel() else scale
        if name == "to" and truth.numel():
            # (P * tS) V and tlse o cancel; each carries the rounding of its own size.
            bound += (
                2 * torch.finfo(q.dtype).eps * exact["tlse"].abs().max() * v.abs().max().double()
            )
        worst = error.max() if truth.numel() else torch.zeros(())
        if not same or not bool(worst <= bound):
            wrong.append(
                f"{name}: error {worst:.3g}, allowed {bound:.3g}, largest value {scale:.3g}"
            )
    return wrong
