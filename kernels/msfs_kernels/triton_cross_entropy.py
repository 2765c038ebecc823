"""Cross-entropy of a block of logits and its gradient, in place: one Triton program a row.

The row is read twice: once for its maximum and sum (online, as in attention, but of each lane: the
lanes meet once a row, not once a block, where there are several; a row of one block would only pay
for their exponentials, twice as many), once to be replaced by its gradient. A row of 32,768 bf16
logits is 64 KiB, and the second reading comes from the cache if few rows are on their way at once:
hence programs of many threads, four to a multiprocessor.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportOperatorIssue=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from .triton_common import LOG2E, tanh

BLOCK = 4096  # logits at a time; the first reading takes two such blocks
LOWEST = tl.constexpr(-3.0e38)  # where a lane's maximum begins; -inf would make NaN of -inf - -inf
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def exponential(x, FAST: tl.constexpr):
    """2^x by one instruction, which gives 0 for what is below float32's normal numbers; or e^x."""
    if not FAST:
        return tl.exp(x)
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def read(start, bias, j, vocab, softcap, CAP: tl.constexpr):
    """Logits j of a row, -inf beyond the vocabulary."""
    s = tl.load(start + j, mask=j < vocab, other=float("-inf")).to(tl.float32)
    if bias is not None:
        s += tl.load(bias + j, mask=j < vocab, other=0.0).to(tl.float32)
    if CAP:
        s = tl.where(j < vocab, softcap * tanh(s / softcap), float("-inf"))
    return s


@triton.jit
def row_kernel(
    logits, bias, labels, losses, rows, vocab, bias_stride, label_smoothing, ignore_index, z_loss,
    softcap, SMOOTH: tl.constexpr, Z: tl.constexpr, CAP: tl.constexpr, STORE: tl.constexpr,
    LANES: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses[row], and da over logits[row]; rows is the number of items of one problem.

    The arithmetic of an element takes as long as its way to memory and back, so it is kept short:
    what no option asks for is left out, and FAST, for 16-bit logits, counts in powers of two.
    """
    unit = LOG2E if FAST else 1.0  # of t and lse_t, which are s and lse in powers of two or of e
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    start = logits + row * vocab
    if bias is not None:
        bias += (row // rows) * bias_stride
    kept = label != ignore_index
    # To look whether a label is a class would make the CPU wait: of one that is none the loss and
    # the gradient are NaN, and nothing beyond the row is read.
    known = (label >= 0) & (label < vocab)
    label = label.to(tl.int32)
    if kept:
        top = float("-inf")
        total = 0.0
        added = 0.0
        if LANES:
            top = tl.full([BLOCK], LOWEST, tl.float32)
            total = tl.zeros([BLOCK], tl.float32)
            added = tl.zeros([BLOCK], tl.float32)
        for first in range(0, vocab, 2 * BLOCK if LANES else BLOCK):
            j = first + tl.arange(0, BLOCK)
            s = read(start, bias, j, vocab, softcap, CAP)
            t = s * unit
            if LANES:  # two logits to a correction of the sum
                s2 = read(start, bias, j + BLOCK, vocab, softcap, CAP)
                t2 = s2 * unit
                higher = tl.maximum(top, tl.maximum(t, t2))
                both = exponential(t - higher, FAST) + exponential(t2 - higher, FAST)
                total = total * exponential(top - higher, FAST) + both
                if SMOOTH:
                    added += tl.where(j < vocab, s, 0.0) + tl.where(j + BLOCK < vocab, s2, 0.0)
            else:
                higher = tl.maximum(top, tl.max(t, 0))
                total = total * exponential(top - higher, FAST)
                total += tl.sum(exponential(t - higher, FAST), 0)
                if SMOOTH:
                    added += tl.sum(tl.where(j < vocab, s, 0.0), 0)
            top = higher
        if LANES:
            most = tl.max(top, 0)
            total = tl.sum(total * exponential(top - most, FAST), 0)
            top = most
            added = tl.sum(added, 0)
        lse_t = tl.where(known, top + tl.log(total) * unit, float("nan"))
        lse = lse_t / unit
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
            for first in range(0, vocab, BLOCK):
                j = first + tl.arange(0, BLOCK)
                s = read(start, bias, j, vocab, softcap, CAP)
                ds = exponential(s * unit - lse_t, FAST)
                if Z:
                    ds *= 1 + 2 * z_loss * lse
                if SMOOTH:
                    ds -= label_smoothing / vocab
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
    # a row of at most two blocks is read as one; lanes would take twice its exponentials
    lanes = vocab > 2 * BLOCK
    block = BLOCK if lanes else triton.next_power_of_2(vocab)
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
        Z=z_loss != 0,
        CAP=softcap > 0,
        STORE=store,
        LANES=lanes,
        FAST=logits.itemsize == 2,
        BLOCK=block,
        num_warps=min(16, max(4, block // 256)),
    )
    return losses, logits


@triton.jit
def scale_kernel(x, g, out, size, BLOCK: tl.constexpr):
    """out = x g of one block of one problem's `size` numbers."""
    problem = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at, inside = problem * size + i, i < size
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * tl.load(g + problem)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def scaled(x: Tensor, g: Tensor) -> Tensor:
    """x (M, ...) times g (M,), in float32 and rounded once."""
    x, g = x.contiguous(), g.to(torch.float32).contiguous()
    out, size = torch.empty_like(x), x[:1].numel()
    if out.numel():
        scale_kernel[(triton.cdiv(size, BLOCK), len(x))](x, g, out, size, BLOCK=BLOCK)
    return out
