"""Cross-entropy of a linear layer's outputs without the N x V logits: value, gradient, curvature.

For hidden states h, weight W, bias b and labels y, with raw logits a = h W^T + b, logits s = a, or
s = c tanh(a / c) under a soft cap c, whose slope ds/da is m = 1 - (s / c)^2, and p = softmax(s),

    loss     = sum over items of  lse - (1 - e) s[y] - e mean(s) + z lse^2       lse = logsumexp(s)
    ds       = (1 + 2 z lse) p - (1 - e) onehot(y) - e / V                       da = m ds
    gradient   dh = da W            dW = da^T h               db = sum da
    second     ta = th W^T + h tW^T + tb                      ts = m ta
               tds = (1 + 2 z lse) p (ts - <p, ts>) + 2 z p <p, ts>
               tda = m tds - 2 s / c^2 ta da
               tdh = tda W + da tW  tdW = tda^T h + da^T th   tdb = sum tda

Items come in chunks, and of each chunk the logits live just long enough to become da, in place. The
forward computes the gradient along with the value: the logits are never computed a second time.

Four ops, closed under differentiation: the vjp of the loss is the gradient, its jvp the tangent
<gradient, t>, the derivatives of both are `second` (the Hessian is symmetric, so vjp and jvp are
one), a third derivative raises. Each is registered as the attention op is: a kernel, a fake, a vmap
rule, and one Python entry for autograd and torch.func alike. Rules of jvp call ops only: a plain
torch operation in them would lose the tangents of an outer forward mode without an error.

Dimension key: M independent losses (members of an ensemble, mapped examples), N items, D width,
V vocabulary. Source of the chunking: Hsu et al. 2024 (Liger kernel), section 3.2.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("msfs_kernels", "FRAGMENT")
OPS = torch.ops.msfs_kernels

INPUTS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
SCALARS = "float label_smoothing, int ignore_index, float z_loss, float softcap"  # 0: no cap
GRADIENTS = "(Tensor dhidden, Tensor dweight, Tensor dbias)"
CHUNK = {"cpu": 2**21, "cuda": 2**29}  # logits held at once: a cache's worth, 1 GiB in bf16


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float,
    ignore_index: int,
    z_loss: float,
    softcap: float,
) -> Tensor:
    """The summed loss of each of M problems, (M,) float32 (float64 for float64).

    Args:
        hidden: (M, N, D).
        weight: (M, V, D), of hidden's dtype.
        bias: (M, V) or None.
        labels: (M, N) int64 in [0, V), or ignore_index.
        softcap: logits become softcap * tanh(logits / softcap); 0 for none.
    """
    scalars = float(label_smoothing), ignore_index, float(z_loss), float(softcap)
    return OPS.linear_cross_entropy(hidden, weight, bias, labels, *scalars, False)[0]


# ----------------------------------------------------------------------------------------- kernels


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def kept_items(labels: Tensor, ignore_index: int, vocab: int) -> Tensor | None:
    """Indices of the items that count in any of the M problems; None where looking would wait."""
    if labels.device.type != "cpu":
        return None
    kept = labels != ignore_index
    wrong = kept & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        raise ValueError(
            f"label {int(labels[wrong][0])} must be in [0, {vocab}) or ignore_index"
            f" ({ignore_index}): check the vocabulary"
        )
    return None if kept.all() else kept.any(0).nonzero()[:, 0]


def chunks(hidden: Tensor, vocab: int) -> Iterator[slice]:
    """Slices of the N items, each with at most CHUNK logits."""
    M, N, _ = hidden.shape
    rows = max(1, CHUNK.get(hidden.device.type, CHUNK["cuda"]) // max(1, M * vocab))
    count = max(1, -(-N // rows))
    rows = -(-N // count)
    for start in range(0, N, max(1, rows)):
        yield slice(start, start + rows)


def times(a: Tensor, b: Tensor) -> Tensor:
    """Batched a b; a single problem as the plain product, which is faster."""
    return (a[0] @ b[0])[None] if a.shape[0] == 1 else a @ b


def plus_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, in total's memory if there is one. On a GPU the product of a single problem is
    summed where it is made, and its 16-bit rounding does not stand between the parts."""
    if not (a.is_cuda and a.itemsize == 2 and a.shape[0] == 1 and dtype != a.dtype):
        return times(a, b).to(dtype) if total is None else total.add_(times(a, b))
    if total is None:
        return torch.mm(a[0], b[0], out_dtype=dtype)[None]
    own = total[0]
    torch.addmm(own, a[0], b[0], out_dtype=dtype, out=own)  # one object: nothing is copied
    return total


def gradient_of_logits_(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(loss of each item, da), da in the memory of the raw logits where the dtype allows."""
    vocab = logits.shape[-1]
    dtype = logits.dtype
    s, slope = logits.to(accumulate_dtype(dtype)), None
    if softcap:
        tau = s.div_(softcap).tanh_()
        slope = 1 - tau.square()
        s = tau.mul_(softcap)
    kept = labels != ignore_index
    index = torch.where(kept, labels, 0)[..., None]
    lse = s.logsumexp(-1, keepdim=True)
    loss = lse - (1 - label_smoothing) * s.gather(-1, index)
    if label_smoothing:
        loss = loss - label_smoothing * s.mean(-1, keepdim=True)
    if z_loss:
        loss = loss + z_loss * lse.square()
    ds = s.sub_(lse).exp_()
    if z_loss:
        ds.mul_(1 + 2 * z_loss * lse)
    if label_smoothing:
        ds.sub_(label_smoothing / vocab)
    ds.scatter_add_(-1, index, torch.full_like(lse, label_smoothing - 1))
    ds.masked_fill_(~kept[..., None], 0.0)
    if slope is not None:
        ds.mul_(slope)
    return loss[..., 0].masked_fill(~kept, 0.0), ds.to(dtype)


def chunk_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scalars: tuple, store: bool
) -> tuple[Tensor, Tensor]:
    """Loss of each item of a chunk, and da (rubbish unless `store`)."""
    logits = times(hidden, weight.mT)
    if logits.device.type == "cuda" and logits.dtype is not torch.float64:
        from .triton_cross_entropy import gradient_of_logits_ as fused

        label_smoothing, ignore_index, z_loss, softcap = scalars
        return fused(logits, bias, labels, label_smoothing, ignore_index, z_loss, softcap, store)
    if bias is not None:
        logits += bias[:, None]
    return gradient_of_logits_(logits, labels, *scalars)


def value_kernel(hidden, weight, bias, labels, *rest):
    *scalars, with_gradient = rest
    if with_gradient:
        return _value_and_gradient(hidden, weight, bias, labels, tuple(scalars))
    vocab, dtype = weight.shape[1], accumulate_dtype(hidden.dtype)
    items = kept_items(labels, scalars[1], vocab)
    if items is not None:
        hidden, labels = hidden[:, items], labels[:, items]
    loss = hidden.new_zeros(hidden.shape[0], dtype=dtype)
    for rows in chunks(hidden, vocab):
        part = (hidden[:, rows], weight, bias, labels[:, rows])
        loss += chunk_gradient(*part, tuple(scalars), False)[0].sum(-1)
    empty = hidden.new_empty(0)
    return loss, empty, empty.clone(), empty.clone()


def _value_and_gradient(hidden, weight, bias, labels, scalars):
    M, vocab, dtype = hidden.shape[0], weight.shape[1], accumulate_dtype(hidden.dtype)
    items = kept_items(labels, scalars[1], vocab)
    h, y = (hidden, labels) if items is None else (hidden[:, items], labels[:, items])
    loss = hidden.new_zeros(M, dtype=dtype)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dw = None
    db = hidden.new_zeros((M, vocab) if bias is not None else (0,), dtype=dtype)
    slices = list(chunks(h, vocab))
    sum_dtype = dtype if len(slices) > 1 else weight.dtype  # one product needs no sum
    for rows in slices:
        losses, da = chunk_gradient(h[:, rows], weight, bias, y[:, rows], scalars, True)
        loss += losses.sum(-1)
        if M == 1:
            torch.mm(da[0], weight[0], out=dh[0, rows])
        else:
            dh[:, rows] = da @ weight
        dw = plus_product(dw, da.mT, h[:, rows], sum_dtype)
        if bias is not None:
            db += da.sum(1, dtype=dtype)
        del da  # before the next chunk's logits come
    if items is not None:
        dh = dh.new_zeros(hidden.shape).index_copy_(1, items, dh)
    if dw is None:  # no item at all
        dw = hidden.new_zeros(weight.shape, dtype=dtype)
    return loss, dh, dw.to(weight.dtype), db if bias is None else db.to(bias.dtype)


def scaled(x: Tensor, g: Tensor) -> Tensor:
    """x times g of its problem, rounded once: g, one over the number of items, has no 16 bits."""
    if x.is_cuda and x.itemsize == 2:
        from .triton_cross_entropy import scaled as fused

        return fused(x, g)
    return (x * g.reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)


def gradient_kernel(g, hidden, weight, bias, labels, dh, dw, db, *scalars):
    if dh.numel() == 0:
        _, dh, dw, db = _value_and_gradient(hidden, weight, bias, labels, scalars)
    db = scaled(db, g) if bias is not None else hidden.new_empty(0)
    return scaled(dh, g), scaled(dw, g), db


def tangent_kernel(th, tw, tb, hidden, weight, bias, labels, dh, dw, db, *scalars):
    if dh.numel() == 0:
        _, dh, dw, db = _value_and_gradient(hidden, weight, bias, labels, scalars)
    return dot((dh, dw, db), (th, tw, tb), accumulate_dtype(hidden.dtype))


def dot(xs: tuple, ys: tuple, dtype: torch.dtype) -> Tensor:
    """<xs, ys> for each of the M problems."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
    return torch.stack([(x.to(dtype) * y.to(dtype)).flatten(1).sum(1) for x, y in pairs]).sum(0)


def second_kernel(g, th, tw, tb, hidden, weight, bias, labels, *scalars):
    _, ignore_index, z_loss, softcap = scalars
    (M, _, _), vocab, dtype = hidden.shape, weight.shape[1], accumulate_dtype(hidden.dtype)
    g = g.to(dtype)[:, None, None]
    tdh = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    tdw = hidden.new_zeros(weight.shape, dtype=dtype)
    tdb = hidden.new_zeros((M, vocab) if bias is not None else (0,), dtype=dtype)
    for rows in chunks(hidden, vocab):
        h, y, t = hidden[:, rows], labels[:, rows], th[:, rows]
        a = times(h, weight.mT).to(dtype)
        ta = times(t, weight.mT).to(dtype) + times(h, tw.mT).to(dtype)
        if bias is not None:
            a, ta = a + bias[:, None], ta + tb[:, None]
        s, ts, tau = a, ta, None
        if softcap:
            tau = (a / softcap).tanh()
            s, ts = softcap * tau, ta * (1 - tau.square())
        lse = s.logsumexp(-1, keepdim=True)
        p = (s - lse).exp()
        mean = (p * ts).sum(-1, keepdim=True)
        kept = (y != ignore_index)[..., None]
        tda = p * ((1 + 2 * z_loss * lse) * (ts - mean) + 2 * z_loss * mean)
        tda = torch.where(kept, tda * g, 0.0)
        _, da = gradient_of_logits_(a, y, *scalars)
        da = da * g
        if tau is not None:
            tda = tda * (1 - tau.square()) - (2 / softcap) * tau * ta * da
        da = da.to(h.dtype)
        if bias is not None:
            tdb += tda.sum(1)
        tda = tda.to(h.dtype)
        tdh[:, rows] = times(tda, weight) + times(da, tw)
        tdw += times(tda.mT, h) + times(da.mT, t)
    return tdh, tdw.to(weight.dtype), tdb if bias is None else tdb.to(bias.dtype)


# ------------------------------------------------------------------------------------------- rules


def filled(tangents: tuple, primals: tuple) -> tuple:
    """Zeros for tangents that are None, except where there is no primal."""
    return tuple(
        t if t is not None or x is None else torch.zeros_like(x)
        for t, x in zip(tangents, primals, strict=True)
    )


def refuse_third_derivative(*_: Any) -> Any:
    raise RuntimeError(
        "linear_cross_entropy has first and second derivatives, and a third was asked for: use"
        " cross_entropy of the logits where third derivatives are needed"
    )


class Value(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        h, w, b, y, *scalars, _ = inputs
        ctx.scalars = tuple(scalars)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(h, w, b, y, *output[1:])
        ctx.save_for_forward(h, w, b, y, *output[1:])

    @staticmethod
    def backward(ctx, g, *_):
        dh, dw, db = OPS.linear_cross_entropy_gradient(g, *ctx.saved_tensors, *ctx.scalars)
        has_bias = ctx.saved_tensors[2] is not None
        return dh, dw, db if has_bias else None, *(None,) * 6

    @staticmethod
    def jvp(ctx, th, tw, tb, *_):
        tangents = filled((th, tw, tb), ctx.saved_tensors[:3])
        tangent = OPS.linear_cross_entropy_tangent(*tangents, *ctx.saved_tensors, *ctx.scalars)
        return tangent, None, None, None


class Tangent(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scalars = inputs[10:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:10])
        ctx.save_for_forward(*inputs[:10])

    @staticmethod
    def backward(ctx, g):
        t, x_and_gradient = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        dth, dtw, dtb = OPS.linear_cross_entropy_gradient(g, *x_and_gradient, *ctx.scalars)
        dh, dw, db = OPS.linear_cross_entropy_second(g, *t, *x_and_gradient[:4], *ctx.scalars)
        has_bias = t[2] is not None
        return dth, dtw, dtb if has_bias else None, dh, dw, db if has_bias else None, *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        t, x_and_gradient = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        x, parts = x_and_gradient[:4], []
        if any(u is not None for u in tangents[:3]):
            u = filled(tangents[:3], x[:3])
            parts.append(OPS.linear_cross_entropy_tangent(*u, *x_and_gradient, *ctx.scalars))
        if any(u is not None for u in tangents[3:6]):
            u = filled(tangents[3:6], x[:3])
            dtype = accumulate_dtype(x[0].dtype)
            one = x[0].new_ones(x[0].shape[0], dtype=dtype)
            rows = OPS.linear_cross_entropy_second(one, *u, *x, *ctx.scalars)
            parts.append(dot(rows, t, dtype))
        return sum(parts)


class Gradient(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scalars = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def backward(ctx, *cotangents):
        g, *x_and_gradient = ctx.saved_tensors
        h, w, b, y = x_and_gradient[:4]
        c = filled(cotangents if b is not None else (*cotangents[:2], None), (h, w, b))
        dg = None
        if ctx.needs_input_grad[0]:
            one = torch.ones_like(g)
            whole = OPS.linear_cross_entropy_gradient(one, *x_and_gradient, *ctx.scalars)
            dg = dot(whole, c, g.dtype)
        dh, dw, db = OPS.linear_cross_entropy_second(g, *c, h, w, b, y, *ctx.scalars)
        return dg, dh, dw, db if b is not None else None, *(None,) * 8

    @staticmethod
    def jvp(ctx, tg, th, tw, tb, *_):
        g, *x_and_gradient = ctx.saved_tensors
        h, w, b, y = x_and_gradient[:4]
        parts = []
        if tg is not None:
            parts.append(OPS.linear_cross_entropy_gradient(tg, *x_and_gradient, *ctx.scalars))
        if any(t is not None for t in (th, tw, tb)):
            t = filled((th, tw, tb), (h, w, b))
            parts.append(OPS.linear_cross_entropy_second(g, *t, h, w, b, y, *ctx.scalars))
        return tuple(sum(column) for column in zip(*parts, strict=True))


class Second(torch.autograd.Function):
    """g H t: linear in g and t, where it has derivatives; those in h, W and b are third ones."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scalars = inputs[8:]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])

    @staticmethod
    def backward(ctx, *cotangents):
        if any(ctx.needs_input_grad[4:7]):
            refuse_third_derivative()
        g, th, tw, tb, h, w, b, y = ctx.saved_tensors
        x = (h, w, b, y)
        c = filled(cotangents if b is not None else (*cotangents[:2], None), (h, w, b))
        dh, dw, db = OPS.linear_cross_entropy_second(g, *c, *x, *ctx.scalars)
        unit = OPS.linear_cross_entropy_second(torch.ones_like(g), *c, *x, *ctx.scalars)
        dg = dot(unit, (th, tw, tb), g.dtype)
        return dg, dh, dw, db if b is not None else None, *(None,) * 8

    @staticmethod
    def jvp(ctx, tg, uh, uw, ub, *rest):
        if any(t is not None for t in rest[:3]):
            refuse_third_derivative()
        g, th, tw, tb, h, w, b, y = ctx.saved_tensors
        x = (h, w, b, y)
        parts = []
        if tg is not None:
            parts.append(OPS.linear_cross_entropy_second(tg, th, tw, tb, *x, *ctx.scalars))
        if any(t is not None for t in (uh, uw, ub)):
            u = filled((uh, uw, ub), (h, w, b))
            parts.append(OPS.linear_cross_entropy_second(g, *u, *x, *ctx.scalars))
        return tuple(sum(column) for column in zip(*parts, strict=True))


# ------------------------------------------------------------------------------------ registration


def fold(x: Any, dim: int | None, size: int) -> Any:
    """The mapped dim in front of M, or the tensor repeated by a stride of zero."""
    if not isinstance(x, Tensor) or (dim is None and x.numel() == 0):
        return x
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.flatten(0, 1)


def vmap_rule(op: Callable) -> Callable:
    def rule(info, in_dims, *args):
        size = info.batch_size
        results = op(*(fold(x, d, size) for x, d in zip(args, in_dims, strict=True)))
        if isinstance(results, Tensor):
            return results.unflatten(0, (size, -1)), 0
        absent = [x.ndim == 1 and x.numel() == 0 for x in results]
        outs = tuple(
            x if gone else x.unflatten(0, (size, -1))
            for x, gone in zip(results, absent, strict=True)
        )
        return outs, tuple(None if gone else 0 for gone in absent)

    return rule


def fake_value(hidden, weight, bias, labels, *rest):
    loss = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden.dtype))
    if not rest[-1]:
        return loss, hidden.new_empty(0), hidden.new_empty(0), hidden.new_empty(0)
    return loss, *fake_gradients(hidden, weight, bias)


def fake_gradients(hidden, weight, bias):
    dbias = hidden.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), dbias


def register(
    name: str, schema: str, kernel: Callable, fake: Callable, rule: Any, prepare: Callable
) -> None:
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(OPS, name)

    def forward(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    rule.forward = staticmethod(forward)
    rule.vmap = staticmethod(vmap_rule(op))
    LIBRARY.impl(name, kernel, "CPU")
    LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"msfs_kernels::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, lambda *args: rule.apply(*prepare(args, False)), "Autograd")
    LIBRARY.impl(
        name, lambda *args: rule.apply(*prepare(args, True)), "FuncTorchDynamicLayerFrontMode"
    )


def decide_gradient(args: tuple, transformed: bool) -> tuple:
    """The value's last argument: whether to compute the gradient along with it."""
    differentiated = transformed or any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return *args[:-1], args[-1] or (torch.is_grad_enabled() and differentiated)


def as_it_is(args: tuple, transformed: bool) -> tuple:
    return args


register(
    "linear_cross_entropy",
    f"({INPUTS}, {SCALARS}, bool with_gradient) -> (Tensor loss, {GRADIENTS[1:]}",
    value_kernel,
    fake_value,
    Value,
    decide_gradient,
)
register(
    "linear_cross_entropy_gradient",
    f"(Tensor g, {INPUTS}, Tensor dh, Tensor dw, Tensor db, {SCALARS}) -> {GRADIENTS}",
    gradient_kernel,
    lambda g, h, w, b, *_: fake_gradients(h, w, b),
    Gradient,
    as_it_is,
)
register(
    "linear_cross_entropy_tangent",
    f"(Tensor th, Tensor tw, Tensor? tb, {INPUTS}, Tensor dh, Tensor dw, Tensor db, {SCALARS})"
    " -> Tensor",
    tangent_kernel,
    lambda th, tw, tb, h, *_: h.new_empty(h.shape[0], dtype=accumulate_dtype(h.dtype)),
    Tangent,
    as_it_is,
)
register(
    "linear_cross_entropy_second",
    f"(Tensor g, Tensor th, Tensor tw, Tensor? tb, {INPUTS}, {SCALARS}) -> {GRADIENTS}",
    second_kernel,
    lambda g, th, tw, tb, h, w, b, *_: fake_gradients(h, w, b),
    Second,
    as_it_is,
)
