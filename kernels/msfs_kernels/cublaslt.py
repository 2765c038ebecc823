"""Matrix products by cuBLASLt with what torch has no name for: a GELU or its derivative at the end.

torch's own products go through the same library; this file calls the copy that torch has loaded,
through its C interface. Matrices are row-major here and column-major there, so that

    out = a b        (M, N)      is asked for as      out^T = b^T a^T

whose factors change places. Of the algorithms it takes the one that cuBLASLt suggests first, as
torch does: another one may be a tenth faster (kernels/LOG.md), but a choice by timing would not be
the same in two runs, and results differ in their last bits.

Source: NVIDIA, cuBLAS 13, "cublasLt API".
"""

import ctypes
import functools
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
FLOAT32 = 0  # the same, of alpha and beta
COMPUTE_32F = 68  # products and sums in float32
TRANSA, TRANSB, EPILOGUE, BIAS, AUX, AUX_LD = 3, 4, 7, 8, 11, 12  # attributes of a product
WORKSPACE, ALIGNED_A, ALIGNED_B = 1, 5, 6  # attributes of a preference
WORKSPACE_BYTES = 32 * 2**20
GELU, DGELU = 32 | 128, 64 | 128  # epilogues, each with a matrix beside `out`
GELU_BIAS = GELU | 4


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm and what it needs."""

    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("status", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def library() -> Any:
    """cuBLASLt as torch has loaded it; None without it."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    torch.cuda.current_blas_handle()  # loads it
    try:
        return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    except OSError:
        return None


def check(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"cuBLASLt: {what} returned status {status}")


@dataclass
class Plan:
    """A product of one shape, ready to be called."""

    product: Any  # cublasLtMatmulDesc_t
    layouts: tuple[Any, Any, Any]  # of b, a and out, as cuBLASLt sees them
    best: Heuristic
    lt: Any = field(default_factory=library)
    lock: threading.Lock = field(default_factory=threading.Lock)  # `product` holds addresses

    def __del__(self) -> None:
        self.lt.cublasLtMatmulDescDestroy(self.product)
        for one in self.layouts:
            self.lt.cublasLtMatrixLayoutDestroy(one)


def transposed(x: Tensor) -> bool:
    """Whether x (rows, columns) lies column by column.

    Raises:
        ValueError: neither rows nor columns are contiguous.
    """
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1]:
        return False
    if x.stride(0) == 1 and x.stride(1) >= x.shape[0]:
        return True
    raise ValueError(f"a matrix of shape {tuple(x.shape)} has strides {x.stride()}: copy it")


def alignment(x: Tensor) -> int:
    """Bytes, at most 256, that x's address is a multiple of."""
    return min(x.data_ptr() & -x.data_ptr() or 256, 256)


def layout(lt: Any, x: Tensor, turned: bool) -> Any:
    """x as cuBLASLt sees it: (columns, rows), or (rows, columns) where it is turned."""
    rows, columns = x.shape
    handle = ctypes.c_void_p()
    first, second, apart = (rows, columns, 1) if turned else (columns, rows, 0)
    status = lt.cublasLtMatrixLayoutCreate(
        ctypes.byref(handle),
        TYPES[x.dtype],
        ctypes.c_uint64(first),
        ctypes.c_uint64(second),
        ctypes.c_int64(x.stride(apart)),
    )
    check(status, "a layout")
    return handle


def set_attribute(lt: Any, product: Any, name: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    status = lt.cublasLtMatmulDescSetAttribute(product, name, ctypes.byref(value), size)
    check(status, f"attribute {name}")


def handle_of(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return ctypes.c_void_p(torch.cuda.current_blas_handle())


def make_plan(a: Tensor, b: Tensor, out: Tensor, epilogue: int) -> Plan | None:
    """The product of matrices that lie like these; None where cuBLASLt knows none."""
    lt = library()
    if lt is None:
        return None
    product, preference = ctypes.c_void_p(), ctypes.c_void_p()
    check(lt.cublasLtMatmulDescCreate(ctypes.byref(product), COMPUTE_32F, FLOAT32), "a product")
    turned = transposed(a), transposed(b)
    for name, value in ((TRANSA, turned[1]), (TRANSB, turned[0]), (EPILOGUE, epilogue)):
        set_attribute(lt, product, name, ctypes.c_int32(value))
    set_attribute(lt, product, AUX_LD, ctypes.c_int64(out.stride(0)))
    set_attribute(lt, product, AUX, ctypes.c_void_p(out.data_ptr()))  # whose alignment counts here
    layouts = layout(lt, b, turned[1]), layout(lt, a, turned[0]), layout(lt, out, False)
    check(lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "a preference")
    for name, value in (
        (WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)),
        (ALIGNED_A, ctypes.c_uint32(alignment(b))),
        (ALIGNED_B, ctypes.c_uint32(alignment(a))),
    ):
        size = ctypes.c_size_t(ctypes.sizeof(value))
        status = lt.cublasLtMatmulPreferenceSetAttribute(
            preference, name, ctypes.byref(value), size
        )
        check(status, f"preference {name}")
    found, best = ctypes.c_int(), Heuristic()
    status = lt.cublasLtMatmulAlgoGetHeuristic(
        handle_of(a.device),
        product,
        *layouts,
        layouts[2],
        preference,
        1,
        ctypes.byref(best),
        ctypes.byref(found),
    )
    lt.cublasLtMatmulPreferenceDestroy(preference)
    plan = Plan(product, layouts, best)
    return plan if status == 0 and found.value and best.status == 0 else None


def run(
    plan: Plan, a: Tensor, b: Tensor, out: Tensor, beside: Tensor, bias: Tensor | None = None
) -> None:
    """out = epilogue(a b), on the current stream.

    Args:
        beside: what an epilogue writes (GELU: a b itself) or reads (DGELU: what GELU was taken of).
        bias: (N,), which GELU_BIAS adds first.
    """
    space = torch.empty(plan.best.workspace, dtype=torch.uint8, device=a.device)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    place = ctypes.c_void_p(out.data_ptr())
    with plan.lock:
        set_attribute(plan.lt, plan.product, AUX, ctypes.c_void_p(beside.data_ptr()))
        if bias is not None:
            set_attribute(plan.lt, plan.product, BIAS, ctypes.c_void_p(bias.data_ptr()))
        status = plan.lt.cublasLtMatmul(
            handle_of(a.device),
            plan.product,
            ctypes.byref(one),
            ctypes.c_void_p(b.data_ptr()),
            plan.layouts[0],
            ctypes.c_void_p(a.data_ptr()),
            plan.layouts[1],
            ctypes.byref(zero),
            place,
            plan.layouts[2],
            place,
            plan.layouts[2],
            ctypes.byref(plan.best.algorithm),
            ctypes.c_void_p(space.data_ptr() if plan.best.workspace else None),
            ctypes.c_size_t(plan.best.workspace),
            ctypes.c_void_p(torch.cuda.current_stream(a.device).cuda_stream),
        )
    check(status, "a product")
