"""Starting a compiled kernel by the CUDA driver itself, its arguments laid out once.

Triton's launcher takes Python objects apart at every call: some twenty microseconds for a kernel
with the shapes, strides and masks of an attention, more than all else that a small call does. A
launch that was prepared differs from its first one in addresses only. Here its arguments are
written into memory in the order and the types of the compiled kernel's signature, and a call
changes the addresses among them, and those in the copy engine's maps (`tensor_maps.py`), and asks
the driver (cuLaunchKernel, by ctypes).

What the kernel takes is read off its PTX: if the layout made from the signature does not agree
with it, or the kernel asks for anything unusual, Triton's launcher serves.
"""

import ctypes
import functools
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_kernels import tensor_maps
from msfs_kernels.tensor_maps import TensorMap

CELLS = {
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
}


@functools.cache
def driver() -> Any:
    """cuLaunchKernel(function, grid, block, shared bytes, stream, parameters, extra)."""
    launch = ctypes.CDLL("libcuda.so.1").cuLaunchKernel
    launch.argtypes = [ctypes.c_void_p] + [ctypes.c_uint] * 7 + [ctypes.c_void_p] * 3
    launch.restype = ctypes.c_int
    return launch


def parameters(types: Any, args: Any) -> Iterator[tuple[str, Any]]:
    """(type, argument) of what the kernel takes, tuples taken apart, constants left out."""
    for kind, arg in zip(types, args, strict=True):
        if isinstance(kind, tuple):
            yield from parameters(kind, arg)
        elif kind != "constexpr":
            yield kind, arg


def sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX module."""
    entry = re.search(r"\.entry[^(]*\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(
        r"\.param\s+\.(?:[a-z](\d+)|align\s+\d+\s+\.b8\s+\w+\[(\d+)\])",
        entry.group(1) if entry else "",
    )
    return [int(bits) // 8 if bits else int(bytes_) for bits, bytes_ in found]


class Layout(NamedTuple):
    """Memory for each parameter of the kernel, and which of the tensors' addresses is in it; of the
    copy engine's maps also what Triton makes them of.
    """

    cells: list[Any]
    numbers: list[int | None]
    maps: list[tuple[TensorMap, Any, Any]]  # map, descriptor, its entry in the metadata


def layout(compiled: Any, args: Sequence[Any], tensors: Sequence[Tensor | None]) -> Layout | None:
    """None where only Triton knows."""
    numbers_of = {id(x): number for number, x in enumerate(tensors) if x is not None}
    metas = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
    cells: list[Any] = []
    numbers: list[int | None] = []
    maps: list[tuple[TensorMap, Any, Any]] = []
    for kind, arg in parameters(compiled.src.signature.values(), args):
        described = kind.startswith("tensordesc")
        number = numbers_of.get(id(arg.base if described else arg))
        if described:  # the kernel takes the map, and sizes and strides once more
            meta = next(metas, None)
            if number is None or not tensor_maps.is_known(arg, meta):
                return None
            maps.append((tensor_maps.unfilled(), arg, meta))
            sizes_and_strides = [
                *(ctypes.c_int32(size) for size in arg.shape),
                *(ctypes.c_int64(stride) for stride in arg.strides),
            ]
            cells += [maps[-1][0], *sizes_and_strides]
            numbers += [number, *[None] * len(sizes_and_strides)]
        elif kind.startswith("*"):
            if number is None:
                return None
            cells.append(ctypes.c_uint64())
            numbers.append(number)
        elif kind in CELLS:
            cells.append(CELLS[kind](arg))
            numbers.append(None)
        else:
            return None
    # Behind the arguments Triton passes the addresses of two scratch memories, here of none.
    expected = sizes(compiled.asm["ptx"])
    scratch = expected[len(cells) :]
    cells += [ctypes.c_uint64() for _ in scratch]
    numbers += [None] * len(scratch)
    if len(scratch) > 2 or [ctypes.sizeof(cell) for cell in cells] != expected:
        return None
    return Layout(cells, numbers, maps)


class DriverLaunch:
    """One compiled kernel on one grid; a call gives it the tensors that its arguments are."""

    def __init__(
        self, compiled: Any, grid: Sequence[int], cells: list[Any], numbers: list[int | None]
    ):
        self.cells = cells  # kept alive: the driver reads them by the addresses below
        places = [(cell, n) for cell, n in zip(cells, numbers, strict=True) if n is not None]
        self.places = [(cell, n) for cell, n in places if not isinstance(cell, TensorMap)]
        self.maps = [(ctypes.addressof(x), n) for x, n in places if isinstance(x, TensorMap)]
        self.moved_to = [0] * len(self.maps)  # often the same as before, and asking takes 0.7 us
        self.move = tensor_maps.functions()[1] if self.maps else None
        self.parameters = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        block = (32 * compiled.metadata.num_warps, 1, 1)
        self.before = (compiled.function, *grid, *block, compiled.metadata.shared)
        self.launch, self.device = driver(), torch.cuda.current_device()
        self.one_at_a_time = threading.Lock()

    def run(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether the driver took it; without a context in this thread, say, it does not."""
        stream = torch._C._cuda_getCurrentRawStream(self.device)  # pyright: ignore[reportAttributeAccessIssue]
        with self.one_at_a_time:
            for cell, number in self.places:
                cell.value = tensors[number].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
            for place, (address, number) in enumerate(self.maps):
                data = tensors[number].data_ptr()  # pyright: ignore[reportOptionalMemberAccess]
                if data != self.moved_to[place]:
                    if self.move(address, data) != 0:  # pyright: ignore[reportOptionalCall]
                        return False
                    self.moved_to[place] = data
            return self.launch(*self.before, stream, self.parameters, None) == 0


def driver_launch(
    compiled: Any, grid: Sequence[int], args: Sequence[Any], tensors: Sequence[Tensor | None]
) -> DriverLaunch | None:
    """The launch of a compiled kernel whose tensor arguments are all among `tensors`; None where
    only Triton knows how.
    """
    if not hasattr(compiled, "asm"):  # interpreted
        return None
    meta = compiled.metadata
    unusual = (meta.num_ctas > 1, meta.launch_pdl, meta.launch_cooperative_grid)
    if any(unusual) or meta.global_scratch_size or meta.profile_scratch_size:
        return None
    found = layout(compiled, args, tensors)
    if found is None or not all(tensor_maps.fill(*one) for one in found.maps):
        return None
    return DriverLaunch(compiled, grid, found.cells, found.numbers)
