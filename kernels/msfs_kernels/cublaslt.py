"""Matrix products by cuBLASLt with what torch has no name for: a GELU or its derivative at the end.

torch's own products go through the same library; this file calls the copy that torch has loaded,
through its C interface. Matrices are row-major here and column-major there, so that

    out = a b        (M, N)      is asked for as      out^T = b^T a^T

whose factors change places. Source: NVIDIA, cuBLAS 13, "cublasLt API".
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
COMPUTE_32F = 68  # products and sums in float32
TRANSA, TRANSB, EPILOGUE, BIAS, AUX, AUX_LD = 3, 4, 7, 8, 11, 12  # of a product
WORKSPACE = 1  # of a preference
WORKSPACE_BYTES = 32 * 2**20
REPEATS, MARGIN = 4, 1.02  # of measuring
PLAIN, GELU, DGELU = 1, 32 | 128, 64 | 128  # epilogues; the latter two with a matrix beside `out`
GELU_BIAS = GELU | 4


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

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
    choices: tuple[Heuristic, ...]  # algorithms, the most promising first
    chosen: int | None = None  # which of them was the fastest; None: not measured yet


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


def make_plan(a: Tensor, b: Tensor, out: Tensor, epilogue: int, count: int = 8) -> Plan | None:
    """The product of matrices that lie like these; None where cuBLASLt knows none."""
    lt = library()
    if lt is None:
        return None
    product, preference = ctypes.c_void_p(), ctypes.c_void_p()
    check(lt.cublasLtMatmulDescCreate(ctypes.byref(product), COMPUTE_32F, 0), "a product")
    turned = transposed(a), transposed(b)
    for name, value in ((TRANSA, turned[1]), (TRANSB, turned[0]), (EPILOGUE, epilogue)):
        set_attribute(lt, product, name, ctypes.c_int32(value))
    if epilogue != PLAIN:
        set_attribute(lt, product, AUX_LD, ctypes.c_int64(out.stride(0)))
        set_attribute(lt, product, AUX, ctypes.c_void_p(out.data_ptr()))  # it is aligned so
    layouts = layout(lt, b, turned[1]), layout(lt, a, turned[0]), layout(lt, out, False)
    check(lt.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "a preference")
    most, found = ctypes.c_size_t(WORKSPACE_BYTES), ctypes.c_int()
    lt.cublasLtMatmulPreferenceSetAttribute(
        preference, WORKSPACE, ctypes.byref(most), ctypes.c_size_t(8)
    )
    results = (Heuristic * count)()
    status = lt.cublasLtMatmulAlgoGetHeuristic(
        handle_of(a.device),
        product,
        *layouts,
        layouts[2],
        preference,
        count,
        results,
        ctypes.byref(found),
    )
    lt.cublasLtMatmulPreferenceDestroy(preference)
    good = tuple(one for one in results[: found.value] if one.status == 0)
    return Plan(product, layouts, good) if status == 0 and good else None


def run(
    plan: Plan,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    beside: Tensor | None = None,
    bias: Tensor | None = None,
    choice: int | None = None,
) -> None:
    """out = epilogue(a b), on the current stream.

    Args:
        beside: what an epilogue writes (GELU: a b itself) or reads (DGELU: what GELU was taken of).
        bias: (N,), which GELU_BIAS adds first.
        choice: of the plan's algorithms; default: the fastest, which the first call measures.
    """
    if choice is None and plan.chosen is None and not torch.cuda.is_current_stream_capturing():
        plan.chosen = fastest(plan, a, b, out, beside, bias)
    if choice is None:
        choice = plan.chosen or 0
    lt, chosen = library(), plan.choices[choice]
    for name, x in ((AUX, beside), (BIAS, bias)):
        if x is not None:
            set_attribute(lt, plan.product, name, ctypes.c_void_p(x.data_ptr()))
    space = torch.empty(chosen.workspace, dtype=torch.uint8, device=a.device)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    place = ctypes.c_void_p(out.data_ptr())
    status = lt.cublasLtMatmul(
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
        ctypes.byref(chosen.algorithm),
        ctypes.c_void_p(space.data_ptr() if chosen.workspace else None),
        ctypes.c_size_t(chosen.workspace),
        ctypes.c_void_p(torch.cuda.current_stream(a.device).cuda_stream),
    )
    check(status, "a product")


def fastest(plan: Plan, *tensors: Tensor | None) -> int:
    """The first of the plan's algorithms that is at most MARGIN slower than the best: what they are
    asked in is their order, so that it is the same one each time unless they are very close."""
    times = []
    for choice in range(len(plan.choices)):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(1 + REPEATS):
            if i == 1:
                start.record()
            run(plan, *tensors, choice=choice)  # pyright: ignore[reportArgumentType]
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / REPEATS)
    if os.environ.get("MSFS_SAY"):
        said = " ".join(
            f"{1e3 * t:.0f}:{config(one)}" for t, one in zip(times, plan.choices, strict=True)
        )
        shapes = [(tuple(x.shape), x.stride()) for x in tensors[:2] if x is not None]
        print(f"cuBLASLt {shapes} {said}", flush=True)
    return next(i for i, time in enumerate(times) if time <= MARGIN * min(times))


def config(one: Heuristic) -> str:
    """tile/stages/split/swizzle/custom/inner/cluster of an algorithm"""
    lt, found = library(), []
    for name in (1, 6, 2, 4, 5, 7, 8):
        value, size = ctypes.c_uint32(0), ctypes.c_size_t(0)
        width = 2 if name in (7, 8) else 4
        lt.cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(one.algorithm),
            name,
            ctypes.byref(value),
            ctypes.c_size_t(width),
            ctypes.byref(size),
        )
        found.append(str(value.value))
    return "/".join(found)
