"""The gradients of attention's q, k and v in one tensor, as the matrix that made them wants it.

Where one product makes q, k and v, its gradient wants theirs side by side. As tensors of their own
they are copied together: for 32,768 tokens of width 768 that takes an H100 a tenth of the time of
the gradients themselves. This op has the kernels write where the copies would go. It is for graphs
in which all transforms are applied (`msfs_functional.joined_gradients`); it has no derivative.

Dimension key: B batch, T tokens, H query heads, G key heads, K head dim.
"""

import torch
from torch import Tensor

from msfs_kernels import cpu, ops, tiled
from msfs_kernels.options import LIBRARY, OPTION_SCHEMA, Options

NAME = "attention_backward_joined"


def attention_backward_joined(do, dlse, q, k, v, bias, o, lse, *options) -> Tensor:
    """dq, dk and dv as (B, T, H + 2 G, K); arguments as of `attention_backward`.

    There are as many keys as queries, values are as long as keys, and the bias has no gradient.
    """
    (B, H, T, K), G = q.shape, k.shape[1]
    joined = q.new_empty(B, T, H + 2 * G, K)
    parts = joined.transpose(1, 2).split([H, G, G], 1)
    full, backend = Options(bias, *options), ops.backend(q, v)
    if backend in (cpu, tiled):
        grads = backend.backward(do, dlse, q, k, v, o, lse, full, False)
        for part, grad in zip(parts, grads[:3], strict=True):
            part.copy_(grad)
    else:
        backend.backward(do, dlse, q, k, v, o, lse, full, False, out=parts)
    return joined


def fake(do, dlse, q, k, v, *rest) -> Tensor:
    B, H, T, K = q.shape
    return q.new_empty(B, T, H + 2 * k.shape[1], K)


ARGUMENTS = f"Tensor do, Tensor? dlse, {ops.INPUTS}, Tensor o, Tensor lse, {OPTION_SCHEMA}"
LIBRARY.define(f"{NAME}({ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl(NAME, attention_backward_joined, "CPU")
LIBRARY.impl(NAME, attention_backward_joined, "CUDA")
torch.library.register_fake(f"msfs_kernels::{NAME}", fake, lib=LIBRARY)
