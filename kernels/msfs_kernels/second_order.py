"""Second derivatives of attention in memory linear in T and S, a tile at a time, on any device.

Let J(x) be the derivative of x = (q, k, v, bias) -> (o, lse). Backward is J^T d, tangent is J t.
Only two more maps are needed for every second-order composition, because mixed second derivatives
commute:

    second_backward  (d, t) -> grad_x <d, J t>     the new part of: backward of backward, tangent of
    backward,
                                                   backward of tangent
    second_tangent   (t, u) -> D_u (J t)           the new part of: tangent of tangent

In the notation of tiled.py, with C(x) = P (x - rowsum(P x)), the tangent along t of the backward
with do and dlse held fixed:

    tP = C(ts)      tdP = Z (do tv^T)      w = tP (dP - rowsum(P dP) + dlse)
    tds = w - P rowsum(w) + C(tdP)
    tda = slope tds + curve ta ds                       curve: second derivative of the soft cap
    dq = scale (tda k + da tk)     dk = scale (tda^T q + da^T tq)     dv = (tP Z)^T do
    dbias = tds

and the tangent along u of the tangent along t:

    uts = slope scale (tq uk^T + uq tk^T) + curve ua ta
    w = C(us) (ts - rowsum(P ts)) + P uts     utlse = rowsum(w)
    uto = ((w - P utlse) Z) v + (C(ts) Z) uv + (C(us) Z) tv

Every mean that is subtracted is summed from the very numbers it is subtracted from. From the
outputs o, to and tlse of the first-order kernels it could be had without a sum, but rounding then
leaves something where nothing should be left: with few keys in view, three times the plain
formula's error.
"""

import torch
from torch import Tensor

from .options import Options, empty_tokens_first
from .tiled import Gradients, centred, logit_tangent, raw_tangent
from .tiles import Logits, tiles, times


def curve(logits: Logits, options: Options) -> Tensor | None:
    """Second derivative of softcap * tanh(a / softcap)."""
    if logits.tau is None or logits.slope is None:
        return None
    return logits.tau * logits.slope * (-2 / options.softcap)


def second_backward(
    do: Tensor,
    dlse: Tensor | None,
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tbias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    options: Options,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradient over q, k, v, bias of <do, to> + <dlse, tlse>; (to, tlse): the tangent along t."""
    grads = Gradients(q, k, v, options, need_dbias)
    for tile in tiles(q, k, options):
        if tile.empty:
            tile.clear(grads.dq)
            continue
        logits = tile.logits()
        weights, kept = tile.weights(logits, lse), tile.drop()
        do_rows, k_keys, q_rows = tile.of_queries(do), tile.of_keys(k), tile.of_queries(q)
        ta = raw_tangent(tile, tq, tk)
        tweights = centred(weights, logit_tangent(tile, logits, ta, tbias))
        tile.add_keys(grads.dv, times(tweights, kept).mT @ do_rows)
        dp = times(do_rows @ tile.of_keys(v).mT, kept)
        dp -= (weights * dp).sum(-1, keepdim=True)
        if dlse is not None:
            dp += tile.of_rows(dlse)
        ds, tds = weights * dp, tweights * dp
        tds -= weights * tds.sum(-1, keepdim=True)
        tds += centred(weights, times(do_rows @ tile.of_keys(tv).mT, kept))
        if grads.dbias is not None:
            tile.add_bias(grads.dbias, tds)
        da, tda = times(ds, logits.slope), times(tds, logits.slope)
        bend = curve(logits, options)
        if bend is not None:
            tda = tda + bend * ta * ds
        da, tda = da * options.scale, tda * options.scale
        tile.put_queries(grads.dq, tda @ k_keys + da @ tile.of_keys(tk))
        tile.add_keys(grads.dk, tda.mT @ q_rows + da.mT @ tile.of_queries(tq))
    return grads.result()


def second_tangent(
    tq: Tensor,
    tk: Tensor,
    tv: Tensor,
    tbias: Tensor | None,
    uq: Tensor,
    uk: Tensor,
    uv: Tensor,
    ubias: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Derivative along u of the tangent along t, t held fixed."""
    B, H, T, _ = q.shape
    uto = empty_tokens_first(q, B, H, T, v.shape[3])
    utlse = torch.empty_like(lse)
    for tile in tiles(q, k, options):
        if tile.empty:
            tile.clear(uto, utlse)
            continue
        logits = tile.logits()
        weights, kept = tile.weights(logits, lse), tile.drop()
        ta, ua = raw_tangent(tile, tq, tk), raw_tangent(tile, uq, uk)
        uta = tile.raw(tile.of_queries(tq), tile.of_keys(uk))
        uta.add_(tile.raw(tile.of_queries(uq), tile.of_keys(tk)))
        uts = times(uta, logits.slope)
        bend = curve(logits, options)
        if bend is not None:
            uts = uts + bend * ua * ta
        ts = logit_tangent(tile, logits, ta, tbias)
        ts -= (weights * ts).sum(-1, keepdim=True)
        uweights = centred(weights, logit_tangent(tile, logits, ua, ubias))
        moved = uts.mul_(weights).addcmul_(uweights, ts)
        utlse_rows = moved.sum(-1, keepdim=True)
        tile.put_rows(utlse, utlse_rows)
        value = times(moved.sub_(weights * utlse_rows), kept) @ tile.of_keys(v)
        value += times(weights * ts, kept) @ tile.of_keys(uv)
        value += times(uweights, kept) @ tile.of_keys(tv)
        tile.put_queries(uto, value)
    return uto, utlse
