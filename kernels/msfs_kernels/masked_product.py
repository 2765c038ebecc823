"""A matrix product whose result is masked before it is written: the backward of a ReLU, for free.

For y = relu(x W^T + b), what flows back is dx W' where y > 0, and the bias gets its column sums:

    out = where(y > 0, a b, 0)        sums = out summed over rows

As three kernels (product, mask, sum) the tensor of M x N is written twice and read three times;
here it is written once, and y is read once. On Hopper tiles travel through the copy engine; other
devices, and the CPU, take the three steps.

Dimension key: M rows, K inner, N columns.
"""

import torch
from torch import Tensor

BM, BN, BK, WARPS, STAGES = 128, 128, 64, 8, 3  # see kernels/LOG.md, "ReLU in the products"


@torch.library.custom_op("msfs_kernels::masked_product", mutates_args=())
def masked_product(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(where(y <= 0, 0, a b), its sum over rows).

    Args:
        a: (M, K).
        b: (K, N), of a's dtype.
        y: (M, N), of a's dtype.

    Returns:
        out (M, N) of a's dtype; sums (1, N) float32, summed before out is rounded.
    """
    if a.is_cuda and torch.cuda.get_device_capability(a.device)[0] == 9 and fits(a, b):
        return tiled(a, b, y)
    out = torch.where(y <= 0, 0.0, a @ b)
    return out, out.sum(0, keepdim=True, dtype=torch.float32)


@masked_product.register_fake
def _(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    M, N = a.shape[0], b.shape[1]
    return a.new_empty(M, N), a.new_empty(1, N, dtype=torch.float32)


def fits(a: Tensor, b: Tensor) -> bool:
    """16 bits, rows of whole 16 bytes (what the copy engine asks), and something to do."""
    sizes = (a.shape[1], b.shape[1])
    return a.itemsize == 2 and a.numel() > 0 and all(n % 8 == 0 and n > 0 for n in sizes)


def tiled(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of `triton_masked_product`."""
    from .triton_masked_product import plan_product

    (M, _), N = a.shape, b.shape[1]
    out = torch.empty((M, N), dtype=a.dtype, device=a.device)
    blocks = -(-M // BM)
    sums = torch.empty((blocks, N), dtype=torch.float32, device=a.device)
    tensors = (a.contiguous(), b.contiguous(), y.contiguous(), out, sums)
    plan = plan_product(*tensors, BM, BN, BK, WARPS, STAGES)
    plan.kernel[plan.grid](*plan.args, **plan.constants)
    return out, sums.sum(0, keepdim=True)
