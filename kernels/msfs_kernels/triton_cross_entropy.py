"""Cross-entropy of a block of logits and its gradient, in place: one Triton program a row.

The row is read twice: once for its maximum and sum (online, as in attention, but of each lane: the
lanes meet once a row, not once a block, where there are several; a row of one block would only pay
for their exponentials, twice as many), once to be replaced by its gradient. A row of 32,768 bf16
logits is 64 KiB, and the second reading comes from the cache if few rows are on their way at once:
hence programs of many threads, four to a multiprocessor.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import tanh

BLOCK = 8192  # logits at a time
LOWEST = tl.constexpr(-3.0e38)  # where a lane's maximum begins; -inf would make NaN of -inf - -inf


@triton.jit
def row_kernel(
    logits, bias, labels, losses, rows, vocab, bias_stride, label_smoothing, ignore_index, z_loss,
    softcap, SMOOTH: tl.constexpr, CAP: tl.constexpr, STORE: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[row], and da over logits[row]; rows is the number of items of one problem."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * vocab
    if bias is not None:
        bias += (row // rows) * bias_stride
    kept = label != ignore_index
    if kept:
        top = float("-inf")
        total = 0.0
        added = 0.0
        if LANES:
            top = tl.full([BLOCK], LOWEST, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            added = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, BLOCK):
            j = first + tl.arange(0, BLOCK)
            s = tl.load(start + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
            if bias is not None:
                s += tl.load(bias + j, mask=j < vocab, other=0.0).to(tl.float32)
            if CAP:
                s = tl.where(j < vocab, softcap * tanh(s / softcap), float("-inf"))
            if LANES:
                higher = tl.maximum(top, s)
                total = total * tl.exp(top - higher) + tl.exp(s - higher)
            else:
                higher = tl.maximum(top, tl.max(s, 0))
                total = total * tl.exp(top - higher) + tl.sum(tl.exp(s - higher), 0)
            top = higher
            if SMOOTH:
                real = tl.where(j < vocab, s, 0.0)
                added += real if LANES else tl.sum(real, 0)
        if LANES:
            most = tl.max(top, 0)
            total = tl.sum(total * tl.exp(top - most), 0)
            top = most
            added = tl.sum(added, 0)
        # To look whether a label is a class would make the CPU wait: of one that is none the loss
        # and the gradient are NaN, and nothing beyond the row is read.
        known = (label >= 0) & (label < vocab)
        lse = tl.where(known, top + tl.log(total), float("nan"))
        chosen = tl.load(start + label, mask=known, other=0.0).to(tl.float32)
        if bias is not None:
            chosen += tl.load(bias + label, mask=known, other=0.0).to(tl.float32)
        if CAP:
            chosen = softcap * tanh(chosen / softcap)
        loss = lse - (1 - label_smoothing) * chosen + z_loss * lse * lse
        if SMOOTH:
            loss -= label_smoothing * added / vocab
        tl.store(losses + row, loss)
        if STORE:
            tl.debug_barrier()  # every thread has read the label's logit before it is overwritten
            grown = 1 + 2 * z_loss * lse
            for first in range(0, vocab, BLOCK):
                j = first + tl.arange(0, BLOCK)
                s = tl.load(start + j, mask=j < vocab, other=0.0).to(tl.float32)
                if bias is not None:
                    s += tl.load(bias + j, mask=j < vocab, other=0.0).to(tl.float32)
                if CAP:
                    s = softcap * tanh(s / softcap)
                ds = tl.exp(s - lse) * grown - label_smoothing / vocab
                ds = tl.where(j == label, ds - (1 - label_smoothing), ds)
                if CAP:
                    ds *= 1.0 - (s / softcap) * (s / softcap)
                tl.store(start + j, ds.to(logits.dtype.element_ty), mask=j < vocab)
    else:
        tl.store(losses + row, 0.0)
        if STORE:
            for first in range(0, vocab, BLOCK):
                j = first + tl.arange(0, BLOCK)
                zero = tl.zeros([BLOCK], tl.float32).to(logits.dtype.element_ty)
                tl.store(start + j, zero, mask=j < vocab)


def gradient_of_logits_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_smoothing: float,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    store: bool,
) -> tuple[Tensor, Tensor]:
    """(losses (M, N) float32, da): logits (M, N, V), contiguous, become da where `store`."""
    M, N, vocab = logits.shape
    losses = torch.empty((M, N), dtype=torch.float32, device=logits.device)
    if losses.numel() == 0:
        return losses, logits
    bias = None if bias is None else bias.contiguous()
    block = min(BLOCK, triton.next_power_of_2(vocab))
    row_kernel[(M * N,)](
        logits,
        bias,
        labels.contiguous(),
        losses,
        N,
        vocab,
        vocab,
        label_smoothing,
        ignore_index,
        z_loss,
        softcap,
        SMOOTH=label_smoothing > 0,
        CAP=softcap > 0,
        STORE=store,
        LANES=vocab > block,
        BLOCK=block,
        num_warps=max(4, block // 512),
    )
    return losses, logits
