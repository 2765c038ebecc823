"""The gradient of an embedding: rows of a gradient, summed for each token that they belong to.

    out[v] = sum over items i with tokens[i] = v of grad[i]

Tokens are sorted once. A program then takes CHUNK of the sorted items and sums the rows of each
token among them by one small matrix product. A token whose items all lie in one chunk is done with
that; the parts of others, at most two of a chunk, are added by a second kernel. Sums are in float32
and every one has one order: the same numbers each time. An infinity or NaN makes NaN of all rows
whose items share its chunk, as the product there multiplies it by zeros.

Dimension key: n items, V rows of the embedding, D width.
"""

import torch
from torch import Tensor


def embedding_gradient(grad: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """(V, D), the sums of grad's rows by token, in grad's dtype.

    Args:
        grad: (n, D), 16 or 32 bits a number.
        tokens: (n,) integers in [0, V).
        rows: V.
    """
    from .triton_embedding_gradient import CHUNK, plan_chunks, plan_joints

    n, D = grad.shape
    out = torch.zeros(rows, D, dtype=grad.dtype, device=grad.device)
    if grad.numel() == 0:
        return out
    found, order = torch.sort(tokens.to(torch.int32), stable=True)
    parts = torch.empty(-(-n // CHUNK), 2, D, dtype=torch.float32, device=grad.device)
    plan_chunks(grad.contiguous(), found, order, out, parts).run()
    if len(parts) > 1:
        plan_joints(found, out, parts).run()
    return out
