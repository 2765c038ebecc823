"""The Triton kernels of `embedding_gradient`: sums within chunks of sorted items, and across them.

A run is all that one token has in a chunk. With CHUNK = 4 and the sorted tokens

    chunk 0        chunk 1        chunk 2
    3  3  5  7     7  7  7  7     7  8  8  9

token 7 has the last run of chunk 0 (its part 1 there), all of chunk 1 and the first run of chunk 2
(part 0 of each, as they go on what began before); the rest is written at once.
"""

# Device functions are Python to pyright: tiles, constants and pointers have no types of theirs.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl
from torch import Tensor

from msfs_kernels.launching import Launch

CHUNK = 32  # items of a program, and the most runs that it can have
COLUMNS, WARPS = 128, 4


@triton.jit
def chunk_kernel(
    grad, found, order, out, parts, n, D, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    token = tl.load(found + at, mask=at < n, other=-1)
    before = tl.load(found + at - 1, mask=(at > 0) & (at <= n), other=-2)
    item = tl.load(order + at, mask=at < n, other=0)
    inside = (at < n)[:, None] & (column < D)[None, :]
    rows = tl.load(grad + item[:, None] * D + column[None, :], mask=inside, other=0.0)

    # A run starts where the token is another than the one before, and at the chunk's first item.
    starts = (token != before) | (at == chunk * CHUNK)
    run = tl.cumsum(starts.to(tl.int32), 0) - 1
    number = tl.arange(0, CHUNK)
    belongs = number[:, None] == run[None, :]
    sums = tl.dot(belongs.to(rows.dtype), rows, input_precision=PRECISION)

    head = belongs & starts[None, :]
    token_of = tl.sum(tl.where(head, token[None, :], 0), 1)  # of each run
    exists = tl.sum(head.to(tl.int32), 1) > 0
    exists = exists & (token_of >= 0)
    last = tl.max(tl.where(at < n, run, 0), 0)
    first_token = tl.load(found + chunk * CHUNK)
    goes_on = tl.load(found + chunk * CHUNK - 1, mask=chunk > 0, other=-1) == first_token
    end = tl.minimum(chunk * CHUNK + CHUNK, n)
    last_token = tl.load(found + end - 1)
    continues = tl.load(found + end, mask=end < n, other=-1) == last_token
    # Where a run goes: 0, to its part if it began before; 1, if it goes on and began here; 2, out.
    to = tl.where((number == last) & continues, 1, 2)
    to = tl.where((number == 0) & goes_on, 0, to)[:, None]
    wide = (column < D)[None, :] & exists[:, None]
    rows_out = out + token_of.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(rows_out, sums.to(out.dtype.element_ty), mask=wide & (to == 2))
    rows_parts = parts + (chunk * 2 + to).to(tl.int64) * D + column[None, :]
    tl.store(rows_parts, sums, mask=wide & (to < 2))


@triton.jit
def joint_kernel(found, out, parts, n, D, CHUNK: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds up the token whose last run of this chunk goes on, if it began here."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = chunk * CHUNK
    token = tl.load(found + start + CHUNK - 1)  # there is a chunk after this one
    began = (tl.load(found + start - 1, mask=chunk > 0, other=-1) != token) | (
        tl.load(found + start) != token
    )
    low = start + CHUNK
    if began & (tl.load(found + low) == token):
        # The token's items end before `low`, found by halving what is left.
        high = n
        for _ in range(32):
            inside = low < high
            middle = (low + high) // 2
            here = tl.load(found + middle, mask=inside, other=0)
            up = inside & (here <= token)
            high = tl.where(inside & (here > token), middle, high)
            low = tl.where(up, middle + 1, low)
        part = parts + (chunk.to(tl.int64) * 2 + 1) * D + column
        total = tl.load(part, mask=column < D, other=0.0)
        part += D
        for _ in range(chunk + 1, (low - 1) // CHUNK + 1):
            total += tl.load(part, mask=column < D, other=0.0)
            part += 2 * D
        to = out + token.to(tl.int64) * D + column
        tl.store(to, total.to(out.dtype.element_ty), mask=column < D)


def plan_chunks(grad: Tensor, found: Tensor, order: Tensor, out: Tensor, parts: Tensor) -> Launch:
    n, D = grad.shape
    columns = min(COLUMNS, max(16, triton.next_power_of_2(D)))
    return Launch(
        chunk_kernel,
        (triton.cdiv(n, CHUNK), triton.cdiv(D, columns)),
        (grad, found, order, out, parts, n, D),
        dict(CHUNK=CHUNK, COLUMNS=columns, PRECISION="ieee", num_warps=WARPS),
    )


def plan_joints(found: Tensor, out: Tensor, parts: Tensor) -> Launch:
    D, joints = out.shape[1], parts.shape[0] - 1
    columns = min(COLUMNS, triton.next_power_of_2(D))
    return Launch(
        joint_kernel,
        (joints, triton.cdiv(D, columns)),
        (found, out, parts, found.shape[0], D),
        dict(CHUNK=CHUNK, COLUMNS=columns, num_warps=WARPS),
    )
