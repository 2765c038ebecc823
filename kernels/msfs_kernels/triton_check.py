"""Randomised comparison of the Triton kernels with the textbook formula in float64, on a GPU or in
Triton's interpreter.

`random_case(seed)` draws shapes, strides, dtype and any combination of masks; `ratios(case)` runs
forward, backward and tangent and says how far from float64 they come out. The yardstick is the same
formula in the inputs' dtype by plain PyTorch operations: ours may reach twice its error. That error
is next to nothing by luck at times (a row of one key, a softmax that is 1 at one key), so the
yardstick is that error plus

    (eps / 4 + eps32 (1 + max |lse|)) * largest sum of summands

eps the rounding of the inputs' dtype, to which o, P and dS are rounded on the way; eps32 that of
float32, in which P is rebuilt as e^{s - lse} from an s and an lse that are rounded relative to
their own size, about log(row length). The sum of summands of an output is its formula with every
summand made positive (`magnitudes`): what rounding is relative to, in any algorithm.
"""

import math
import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_kernels import gluon_support
from msfs_kernels.launching import TENSOR_OPTIONS, Launch, launches_of
from msfs_kernels.options import Options
from msfs_kernels.philox import philox_4x32
from msfs_kernels.triton_backend import backward, dual, forward, tangent
from msfs_kernels.triton_common import MOST_QUERIES
from msfs_kernels.triton_decode import suits
from msfs_kernels.triton_dual import one_pass


class Case(NamedTuple):
    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    options: Options
    features: tuple[str, ...] = ()


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
    keys = (
        options.rng[..., None, None]
        if options.rng.ndim == 3
        else options.rng[:, None, :, None, None]
    )
    h = keys[:, :, 2] if options.rng.ndim == 3 else h
    word = philox_4x32(j, i, h, torch.zeros_like(j), keys[:, :, 0], keys[:, :, 1])[0]
    return (word >= round(options.dropout * 2**32)).double() / (1 - options.dropout)


def scores(q: Tensor, k: Tensor, bias: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """(s with -inf where hidden, whether a row sees some key); zeros in a row that sees none."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
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
    return s.masked_fill(~seen & some, float("-inf")).masked_fill(~some, 0.0), some


def textbook(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    """softmax(cap(scale q k^T) - alibi + bias) v, the mask drawn out, in q's dtype; (o, lse)."""
    s, some = scores(q, k, bias, options)
    p = s.softmax(-1) * some
    if options.dropout > 0:
        p = p * kept(q, k, options).to(p.dtype)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return p @ v, s.logsumexp(-1).masked_fill(~some[..., 0], float("-inf"))


def random_case(
    seed: int,
    device: str,
    largest: int = 300,
    dtypes: tuple[torch.dtype, ...] | None = None,
    sibling: int = 0,
) -> Case:
    """Shapes to `largest` tokens, any head grouping, any strides, any combination of options.

    Siblings have other lengths and values, and need (nearly always) no kernel that the first one
    did not compile (`of_sibling`).
    """
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed + 1_000_003 * sibling)
    dtype = draw.choice(dtypes or (torch.float16, torch.bfloat16, torch.bfloat16, torch.float32))
    B, G, group = draw.choice((1, 2, 3)), draw.choice((1, 2)), draw.choice((1, 1, 2, 3))
    H = G * group
    T = draw.choice((1, 3, 17, 64, 127, 128, draw.randint(1, largest)))
    S = T if draw.random() < 0.4 else draw.choice((1, 5, 64, 128, draw.randint(1, largest)))
    if T <= 16 and largest >= 300 and draw.random() < 0.5:
        S = draw.choice((512, 700, 1111))  # long enough for split-KV decoding
    K = draw.choice((8, 16, 24, 40, 64, 64, 72, 80, 96, 128, 128, 160, 256))
    V = K if draw.random() < 0.7 else draw.choice((8, 16, 40, 64, 96))
    if T > MOST_QUERIES:
        T, S = of_sibling(T, sibling), of_sibling(S, sibling)
    features = {str(dtype).removeprefix("torch."), f"head dim {K}"}
    features |= {"grouped heads"} if group > 1 else set()
    features |= {"value dim differs"} if V != K else set()
    features |= {"T < S"} if T < S else {"T > S"} if T > S else set()
    features |= {"one query"} if T == 1 else set()

    def tensor(heads: int, tokens: int, dim: int) -> Tensor:
        layout = draw.choice(
            ("heads first", "tokens first", "sliced", "strided dim", "broadcast batch")
        )
        features.add(layout)
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
        features.add("large logits")
    if q.numel() and k.numel() and suits(q, k):
        features.add("decoding")
    bias = fields.get("bias")
    if isinstance(bias, Tensor):
        features.add("boolean bias" if bias.dtype is torch.bool else "float bias")
    if not fields["causal"] and set(fields) == {"causal", "scale", "deterministic"}:
        features.add("no mask")
    features |= {NAMES[name] for name, x in fields.items() if name in NAMES and x is not False}
    said = {name: tuple(x.shape) if isinstance(x, Tensor) else x for name, x in fields.items()}
    return Case(
        f"seed {seed} sibling {sibling} {dtype} B{B} H{H} G{G} T{T} S{S} K{K} V{V} {said}",
        *(q, k, v, Options(**fields), tuple(sorted(features))),
    )


def of_sibling(tokens: int, sibling: int) -> int:
    """Another length that takes the same tiles and the same divisibility by 16: 128 tokens more
    where that is another tile; less, within the tile, where that still needs it.
    """
    if tokens > 128:
        return tokens + 128 * sibling
    other = tokens - 16 * sibling
    same_tile = (other - 1).bit_length() == (tokens - 1).bit_length()
    return other if other > MOST_QUERIES and same_tile else tokens


NAMES = {
    "causal": "causal",
    "window": "window",
    "key_lengths": "key lengths",
    "prefix_lengths": "prefix lengths",
    "q_segments": "segments",
    "softcap": "softcap",
    "alibi": "ALiBi",
    "dropout": "dropout",
    "deterministic": "deterministic",
}


def fuzz_set(count: int, first: int = 0, largest: int = 300) -> list[int]:
    """Seeds of `count` cases, chosen one by one among 8 times as many so that each adds the most
    pairs of features that no earlier one has.
    """
    pairs = {}
    for seed in range(first, first + 8 * count):
        features = random_case(seed, "meta", largest).features
        pairs[seed] = {(a, b) for a in features for b in features if a <= b}
    chosen, seen = [], set()
    for _ in range(count):
        best = max(pairs, key=lambda seed: len(pairs[seed] - seen))
        seen |= pairs.pop(best)
        chosen.append(best)
    return chosen


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
    out |= {"to": to, "tlse": tlse}
    moves = (tangents["q"], tangents["k"], tangents["v"])
    if is_plain(options) and (
        gluon_support.dual_is_faster(*moves, q, k, v, options) or one_pass(q, k, v, options)
    ):
        both = dual(*moves, q, k, v, options)
        names = ("o", "lse", "to", "tlse")
        out |= {f"{ONE_PASS}{name}": x for name, x in zip(names, both, strict=True)}
    return out


ONE_PASS = "one pass "  # before the names of what forward and tangent together give


def is_plain(options: Options) -> bool:
    """Whether nothing is asked for but causal, scale, precision and deterministic."""
    given = Options(
        causal=options.causal,
        scale=options.scale,
        precision=options.precision,
        deterministic=options.deterministic,
    )
    return all(x is None for x in options[:TENSOR_OPTIONS]) and options == given


def magnitudes(
    case: Case, given: dict[str, Tensor], tangents: dict[str, Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """For each output, its largest element when every summand of its formula is made positive."""
    options = case.options
    repeat = case.q.shape[1] // case.k.shape[1]

    def size(x: Tensor) -> Tensor:
        x = x.double().abs()
        return x.repeat_interleave(repeat, 1) if x.shape[1] == case.k.shape[1] else x

    bias = options.bias.double() if options.has_float_bias and options.bias is not None else None
    s, some = scores(case.q.double(), case.k.double(), bias, options)
    p = s.softmax(-1) * some
    z = kept(case.q, case.k, options) if options.dropout > 0 else torch.ones_like(p)
    q, k, v, do, o = (size(x) for x in (case.q, case.k, case.v, given["o"], exact["o"]))
    tq, tk, tv = (size(tangents[name]) for name in "qkv")
    scale = abs(options.scale)
    ds = p * (z * (do @ v.mT) + (do * o).sum(-1, keepdim=True) + size(given["lse"])[..., None])
    ts = scale * (tq @ k.mT + q @ tk.mT)
    if "bias" in tangents:
        ts = ts + tangents["bias"].double().abs()
    tlse = (p * ts).sum(-1, keepdim=True)
    found = {
        "o": (p * z) @ v,
        "lse": exact["lse"].masked_fill(exact["lse"] == -math.inf, 0.0).abs() + 1,
        "dq": scale * ds @ k,
        "dk": scale * (ds.mT @ q).unflatten(1, (-1, repeat)).sum(2),
        "dv": ((p * z).mT @ do).unflatten(1, (-1, repeat)).sum(2),
        "tlse": tlse,
        "to": (p * z * ts) @ v + tlse * o + (p * z) @ tv,
    }
    if "dbias" in exact:
        found["dbias"] = ds.sum_to_size(exact["dbias"].shape)
    return {name: float(x.max()) if x.numel() else 0.0 for name, x in found.items()}


def directions(case: Case, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Cotangents of o and lse, tangents of q, k, v and a float bias."""
    q, k, v, options = case.q, case.k, case.v, case.options
    generator = torch.Generator().manual_seed(seed)

    def like(shape: Any, dtype: torch.dtype) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(q.device, dtype)

    given = {
        "o": like((*q.shape[:3], v.shape[3]), q.dtype),
        "lse": like(q.shape[:3], torch.float32),
    }
    tangents = {name: like(x.shape, q.dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    if options.has_float_bias and options.bias is not None:
        tangents["bias"] = like(options.bias.shape, q.dtype)
    return given, tangents


def ratios(case: Case, seed: int = 0) -> dict[str, float]:
    """For each output the largest error over the yardstick; at most 2 is right, inf is a wrong
    shape, a NaN or an infinity out of place.
    """
    given, tangents = directions(case, seed)
    exact = by_formula(case, torch.float64, given, tangents)
    plain = by_formula(case, case.q.dtype, given, tangents)
    ours = by_kernels(case, given, tangents)
    size = magnitudes(case, given, tangents, exact)
    rounding = torch.finfo(case.q.dtype).eps / 4 + torch.finfo(torch.float32).eps * size["lse"]
    found = {}
    for called, got in ours.items():
        name = called.removeprefix(ONE_PASS)
        got, peer, truth = got.double(), plain[name].double(), exact[name]
        infinite = truth == -math.inf
        if got.shape != truth.shape or not torch.equal(got == -math.inf, infinite):
            found[called] = math.inf
            continue
        got, peer, truth = (x.masked_fill(infinite, 0.0) for x in (got, peer, truth))
        if truth.numel():
            error, allowed = (float((x - truth).abs().max()) for x in (got, peer.nan_to_num(0.0)))
            ratio = error / (allowed + rounding * size[name] + 1e-30)
            found[called] = math.inf if math.isnan(ratio) else ratio
    return found


def failures(case: Case) -> list[str]:
    """One line for each output that is wrong."""
    return [
        f"{name}: {ratio:.3g} times the plain formula's error"
        for name, ratio in ratios(case).items()
        if not ratio <= 2
    ]


def launches(case: Case) -> list[Launch]:
    """The kernel launches of a case, for compiling ahead of time; the case may be on the CPU."""
    return launches_of(lambda: by_kernels(case, *directions(case, 0)))
