"""Attention, its backward and its tangent in plain torch, in memory linear in T and S.

With logits s, weights P = exp(s - lse), dropout factors Z and o = (P Z) v (products elementwise):

    backward   dv = (P Z)^T do      dP = Z (do v^T)     ds = P (dP - rowsum(P dP) + dlse)
               da = ds * slope      dq = scale da k     dk = scale da^T q     dbias = ds
    tangent    ts = slope * scale (tq k^T + q tk^T) + tbias     tlse = rowsum(P ts)
               to = (P Z (ts - tlse)) v + (P Z) tv

`slope` is the derivative of the soft cap. The backward recomputes P from q, k and lse instead of
keeping it, and sums rowsum(P dP), which is rowsum(do o) but for rounding, from the dP that it is
subtracted from.
"""

import torch
from torch import Tensor

from .options import Options, accumulate_dtype, empty_tokens_first
from .tiles import Logits, Tile, tiles, times


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """o (B, H, T, Kv) and lse (B, H, T); a row that sees no key has o = 0, lse = -inf."""
    B, H, T, _ = q.shape
    o = empty_tokens_first(q, B, H, T, v.shape[3])
    lse = q.new_empty((B, H, T), dtype=accumulate_dtype(q.dtype))
    for tile in tiles(q, k, options):
        if tile.empty:
            tile.clear(o)
            lse[tile.batch, tile.heads, tile.rows] = float("-inf")
            continue
        logits = tile.logits()
        lse_rows = logits.s.logsumexp(-1)
        tile.put_rows(lse, lse_rows)
        weights = times(tile.weights(logits, lse), tile.drop())
        tile.put_queries(o, weights @ tile.of_keys(v))
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and (in the bias's own, unexpanded shape) of the bias."""
    grads = Gradients(q, k, v, options, need_dbias)
    for tile in tiles(q, k, options):
        if tile.empty:
            tile.clear(grads.dq)
            continue
        logits = tile.logits()
        weights, kept = tile.weights(logits, lse), tile.drop()
        do_rows, k_keys = tile.of_queries(do), tile.of_keys(k)
        tile.add_keys(grads.dv, tile.over_queries(times(weights, kept), do_rows))
        ds = centred(weights, times(do_rows @ tile.of_keys(v).mT, kept))
        if dlse is not None:
            ds.addcmul_(weights, tile.of_rows(dlse))
        if grads.dbias is not None:
            tile.add_bias(grads.dbias, ds)
        da = times(ds, logits.slope).mul_(options.scale)
        tile.put_queries(grads.dq, da @ k_keys)
        tile.add_keys(grads.dk, tile.over_queries(da, tile.of_queries(q)))
    return grads.result()


def tangent(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tbias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Directional derivatives of o and lse."""
    to, tlse = empty_tokens_first(q, *o.shape), torch.empty_like(lse)
    for tile in tiles(q, k, options):
        if tile.empty:
            tile.clear(to, tlse)
            continue
        logits = tile.logits()
        weights = tile.weights(logits, lse)
        ts = logit_tangent(tile, logits, raw_tangent(tile, tq, tk), tbias)
        tlse_rows = (weights * ts).sum(-1, keepdim=True)
        tile.put_rows(tlse, tlse_rows)
        kept_weights = times(weights, tile.drop())
        value = ts.sub_(tlse_rows).mul_(kept_weights) @ tile.of_keys(v)
        tile.put_queries(to, value.add_(kept_weights @ tile.of_keys(tv)))
    return to, tlse


def centred(weights: Tensor, x: Tensor) -> Tensor:
    """C(x) = P (x - rowsum(P x)): how P moves with its logits, and by symmetry its gradient."""
    return torch.ops.aten._softmax_backward_data(x, weights, -1, weights.dtype)


def raw_tangent(tile: Tile, tq: Tensor, tk: Tensor) -> Tensor:
    """ta = scale (tq k^T + q tk^T)."""
    ta = tile.raw(tile.of_queries(tq), tile.of_keys(tile.k))
    return ta.add_(tile.raw(tile.of_queries(tile.q), tile.of_keys(tk)))


def logit_tangent(tile: Tile, logits: Logits, ta: Tensor, tbias: Tensor | None) -> Tensor:
    """ts = slope ta + tbias."""
    ts = times(ta, logits.slope)
    return ts if tbias is None else (tile.pairs(ts) + tile.of_bias(tbias)).view(ts.shape)


class Gradients:
    """Sums of dq, dk, dv and dbias over tiles, handed out in the inputs' dtypes and the common
    layout.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, options: Options, need_dbias: bool):
        dtype = accumulate_dtype(q.dtype)
        self.dtype, self.bias = q.dtype, options.bias
        self.dq = empty_tokens_first(q, *q.shape)
        self.dk = empty_tokens_first(k, *k.shape, dtype=dtype).zero_()
        self.dv = empty_tokens_first(v, *v.shape, dtype=dtype).zero_()
        wanted = need_dbias and options.bias is not None
        self.dbias = (
            q.new_zeros(options.bias.shape, dtype=dtype)
            if wanted and options.bias is not None
            else None
        )

    def result(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        dbias = None if self.dbias is None or self.bias is None else self.dbias.to(self.bias.dtype)
        return self.dq, self.dk.to(self.dtype), self.dv.to(self.dtype), dbias
