"""Attention a tile of query rows at a time, in plain torch, on any device: what is never held is
the T x S matrix.

A tile is some batch rows, some kv heads and some query tokens against every key that one of these
can see. Its logits fit a fixed budget, so memory stays linear in T and S, and keys that are hidden
from the whole tile are never multiplied. A row sees all its keys in one tile, so softmax is one
pass and needs no running maximum.

Within a tile the R = H / G query heads that share a kv head are laid under one another, and
products are plain
batched matrix products: (b, g, R t, K) x (b, g, s, K). b, g, t, s are the tile's share of B, G, T,
    S.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .options import Options, accumulate_dtype
from .philox import philox_4x32

CPU_TILE = 1 << 19  # logits in a tile: 2 MiB of float32, about an L2 cache
CUDA_TILE = 1 << 24


class Logits(NamedTuple):
    s: Tensor  # (b, g, R t, s), -inf where hidden
    slope: Tensor | None  # d s / d a of the soft cap, a = scale * q.k; None is 1
    tau: Tensor | None  # tanh(a / softcap)


class Tile:
    """One tile of a call, and the reading and writing of every tensor's share of it."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        options: Options,
        batch: slice,
        groups: slice,
        rows: slice,
        keys: slice,
        poison: Tensor | None = None,
    ):
        self.q, self.k, self.options = q, k, options
        self.batch, self.groups, self.rows, self.keys = batch, groups, rows, keys
        self.poison = poison
        self.dtype = accumulate_dtype(q.dtype)
        self.repeat = q.shape[1] // k.shape[1]
        self.heads = slice(groups.start * self.repeat, groups.stop * self.repeat)
        self.shape = (
            batch.stop - batch.start,
            groups.stop - groups.start,
            self.repeat,
            rows.stop - rows.start,
            keys.stop - keys.start,
        )

    @property
    def empty(self) -> bool:
        return self.keys.start >= self.keys.stop

    def of_queries(self, x: Tensor) -> Tensor:
        """(B, H, T, D) -> (b, g, R t, D)."""
        x = x[self.batch, self.heads, self.rows].to(self.dtype)
        return x.unflatten(1, (-1, self.repeat)).flatten(2, 3)

    def of_rows(self, x: Tensor) -> Tensor:
        """(B, H, T) -> (b, g, R t, 1)."""
        return self.of_queries(x[..., None])

    def of_keys(self, x: Tensor) -> Tensor:
        """(B, G, S, D) -> (b, g, s, D)."""
        return x[self.batch, self.groups, self.keys].to(self.dtype)

    def put_queries(self, out: Tensor, value: Tensor) -> None:
        b, g, r, t, _ = self.shape
        out[self.batch, self.heads, self.rows] = value.view(b, g * r, t, -1)

    def put_rows(self, out: Tensor, value: Tensor) -> None:
        b, g, r, t, _ = self.shape
        out[self.batch, self.heads, self.rows] = value.view(b, g * r, t)

    def clear(self, *outs: Tensor) -> None:
        for out in outs:
            out[self.batch, self.heads, self.rows] = 0

    def add_keys(self, out: Tensor, value: Tensor) -> None:
        out[self.batch, self.groups, self.keys] += value

    def share_of_bias(self, x: Tensor) -> Tensor:
        """The tile's part of a (B | 1, H | 1, T | 1, S | 1)."""
        index = (self.batch, self.heads, self.rows, self.keys)
        return x[tuple(slice(None) if n == 1 else i for n, i in zip(x.shape, index, strict=True))]

    def of_bias(self, x: Tensor) -> Tensor:
        """The same, dtype of the sums, broadcastable to (b, g, R, t, s)."""
        x = self.share_of_bias(x)
        x = x[:, :, None] if x.shape[1] == 1 else x.unflatten(1, (-1, self.repeat))
        return x if x.dtype is torch.bool else x.to(self.dtype)

    def add_bias(self, out: Tensor, value: Tensor) -> None:
        """Adds (b, g, R t, s), summed over the dims that the bias broadcasts."""
        b, g, r, t, s = self.shape
        share = self.share_of_bias(out)
        share += value.view(b, g * r, t, s).sum_to_size(share.shape)

    def pairs(self, x: Tensor) -> Tensor:
        """View (b, g, R t, s) as (b, g, R, t, s)."""
        return x.view(self.shape)

    def raw(self, x: Tensor, y: Tensor) -> Tensor:
        """scale * x.y for query-like x and key-like y of this tile."""
        return (x * self.options.scale) @ y.mT

    def over_queries(self, x: Tensor, y: Tensor) -> Tensor:
        """x^T y summed over the tile's queries, (b, g, s, D): each head of a group by itself first,
        as the plain formula sums; one long sum of few keys would lose more digits.
        """
        if self.repeat == 1:
            return x.mT @ y
        by_head = (2, (self.repeat, -1))
        return (x.unflatten(*by_head).mT @ y.unflatten(*by_head)).sum(2)

    def offsets(self) -> Tensor:
        """p - j, (t, s): how far key j lies behind query i."""
        device = self.q.device
        p = torch.arange(self.rows.start, self.rows.stop, device=device) + (
            self.k.shape[2] - self.q.shape[2]
        )
        return p[:, None] - torch.arange(self.keys.start, self.keys.stop, device=device)

    def visible(self) -> Tensor | None:
        """True where a query may attend, broadcastable to (b, g, R, t, s); None when everywhere."""
        o, seen = self.options, None
        last = (
            self.rows.start + self.k.shape[2] - self.q.shape[2]
        )  # the last key of the tile's first row
        if (o.causal and self.keys.stop - 1 > last) or o.window >= 0:
            behind = self.offsets()
            if o.causal:
                seen = behind >= 0
            if o.window >= 0:
                near = behind < o.window if o.causal else behind.abs() < o.window
                seen = near if seen is None else seen & near
        j = torch.arange(self.keys.start, self.keys.stop, device=self.q.device)
        if seen is not None and o.prefix_lengths is not None:
            prefix = j < o.prefix_lengths[self.batch, None]
            seen = seen | prefix[:, None, None, None, :]
        conditions = [] if seen is None else [seen]
        if o.key_lengths is not None:
            conditions.append((j < o.key_lengths[self.batch, None])[:, None, None, None, :])
        if o.q_segments is not None and o.k_segments is not None:
            same = (
                o.q_segments[self.batch, self.rows, None]
                == o.k_segments[self.batch, None, self.keys]
            )
            conditions.append(same[:, None, None])
        if o.bias is not None and o.bias.dtype is torch.bool:
            conditions.append(self.of_bias(o.bias))
        if not conditions:
            return None
        seen = conditions[0]
        for condition in conditions[1:]:
            seen = seen & condition
        return seen

    def logits(self) -> Logits:
        o = self.options
        q = self.of_queries(self.q)
        if self.poison is not None:
            q = q + self.poison[self.batch, None, None, None]
        s = self.raw(q, self.of_keys(self.k))
        slope = tau = None
        if o.softcap > 0:
            tau = (s / o.softcap).tanh_()
            slope = 1 - tau * tau
            s = tau * o.softcap
        pairs = self.pairs(s)
        if o.alibi is not None:
            slopes = o.alibi[self.batch, self.heads].to(self.dtype).unflatten(1, (-1, self.repeat))
            pairs -= slopes[..., None, None] * self.offsets().abs()
        if o.has_float_bias and o.bias is not None:
            pairs += self.of_bias(o.bias)
        seen = self.visible()
        if seen is not None:
            pairs.masked_fill_(~seen, float("-inf"))
        return Logits(s, slope, tau)

    def weights(self, logits: Logits, lse: Tensor) -> Tensor:
        """P = softmax(s), zeros in a row without a key.

        The tile holds a row's keys whole, so P need not be rebuilt as exp(s - lse), whose error
        grows with lse. logits.s is written to in rows without a key.
        """
        empty = self.of_rows(lse)[..., 0] == float("-inf")
        logits.s[..., 0].masked_fill_(empty, 0.0)  # a key for the softmax, taken back after it
        weights = logits.s.softmax(-1)
        weights[..., 0].masked_fill_(empty, 0.0)
        return weights

    def drop(self) -> Tensor | None:
        """Z: 0 where dropped, 1 / (1 - dropout) where kept; a function of the row's key and of (h,
        i, j) only.
        """
        o = self.options
        if o.dropout == 0 or o.rng is None:
            return None
        b, g, r, t, s = self.shape
        device = self.q.device
        h = torch.arange(self.heads.start, self.heads.stop, device=device)[:, None, None]
        i = torch.arange(self.rows.start, self.rows.stop, device=device)[:, None]
        j = torch.arange(self.keys.start, self.keys.stop, device=device)
        if o.rng.ndim == 3:
            k0, k1, h = o.rng[self.batch, self.heads, :, None, None].unbind(2)
        else:
            k0, k1 = o.rng[self.batch, :, None, None, None].unbind(1)
        word = philox_4x32(j, i, h, torch.zeros((), dtype=torch.int64, device=device), k0, k1)[0]
        kept = (word >= o.drop_threshold).to(self.dtype).div_(1 - o.dropout)
        return kept.expand(b, g * r, t, s).reshape(b, g, r * t, s)


def times(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x * y


def key_range(
    options: Options,
    T: int,
    S: int,
    rows: slice,
    batch: slice,
    lengths: list[int] | None,
    prefixes: list[int] | None,
) -> slice:
    """The keys that some row of the tile may see: the mask's bounding interval."""
    first, last = rows.start + S - T, rows.stop - 1 + S - T
    start, stop = 0, S
    if options.causal:
        stop = min(stop, last + 1)
    if options.window >= 0:
        start = max(start, first - options.window + 1)
        if not options.causal:
            stop = min(stop, last + options.window)
    if options.prefix_lengths is not None and (options.causal or options.window >= 0):
        prefix = S if prefixes is None else max(prefixes[batch])
        if prefix > 0:
            start, stop = 0, max(stop, prefix)
    if lengths is not None:
        stop = min(stop, max(lengths[batch]))
    return slice(start, max(start, stop))


def poison_of_lengths(options: Options, S: int, dtype: torch.dtype) -> Tensor | None:
    """(B,), NaN for a batch row whose length is outside [0, S], else 0: what to add to its queries
    where the host does not look at lengths and so cannot raise.
    """
    poison = None
    for lengths in (options.key_lengths, options.prefix_lengths):
        if lengths is not None:
            wrong = (lengths < 0) | (lengths > S)
            own = torch.zeros_like(lengths, dtype=dtype).masked_fill_(wrong, float("nan"))
            poison = own if poison is None else poison + own
    return poison


def tiles(q: Tensor, k: Tensor, options: Options) -> Iterator[Tile]:
    """Every query row of every head once, in tiles of bounded size."""
    B, H, T, _ = q.shape
    G, S = k.shape[1], k.shape[2]
    if B * H * T == 0:
        return
    on_cpu = q.device.type == "cpu"  # elsewhere reading lengths would make the host wait
    lengths = options.key_lengths.tolist() if on_cpu and options.key_lengths is not None else None
    prefixes = (
        options.prefix_lengths.tolist() if on_cpu and options.prefix_lengths is not None else None
    )
    poison = None if on_cpu else poison_of_lengths(options, S, accumulate_dtype(q.dtype))
    budget = CPU_TILE if on_cpu else CUDA_TILE
    row = H // G * max(S, 1)
    t = min(T, max(1, budget // row))
    g = min(G, max(1, budget // (row * t)))
    b = min(B, max(1, budget // (row * t * g))) if g == G else 1
    for b0 in range(0, B, b):
        batch = slice(b0, min(B, b0 + b))
        for g0 in range(0, G, g):
            groups = slice(g0, min(G, g0 + g))
            for t0 in range(0, T, t):
                rows = slice(t0, min(T, t0 + t))
                keys = key_range(options, T, S, rows, batch, lengths, prefixes)
                yield Tile(q, k, options, batch, groups, rows, keys, poison)
