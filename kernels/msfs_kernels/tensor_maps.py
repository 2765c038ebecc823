"""How the copy engine finds tiles of a tensor: CUtensorMap, made once and moved to other tensors.

Triton makes one for each descriptor at each launch, from Python lists: some 4 us each. A launch
that was prepared differs from its first one in addresses only, and the driver can change the
address in a map (cuTensorMapReplaceAddress).
"""

import ctypes
import functools
from typing import Any

import torch

TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}  # CUtensorMapDataType
NO_INTERLEAVE, PROMOTE_TO_128_BYTES, FILL_WITH_ZEROS = 0, 2, 0  # as Triton has them


class TensorMap(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint64 * 16)]


@functools.cache
def functions() -> tuple[Any, Any]:
    """cuTensorMapEncodeTiled, cuTensorMapReplaceAddress."""
    driver = ctypes.CDLL("libcuda.so.1")
    encode, move = driver.cuTensorMapEncodeTiled, driver.cuTensorMapReplaceAddress
    pointer, number = ctypes.c_void_p, ctypes.c_int
    encode.argtypes = [pointer, number, ctypes.c_uint] + [pointer] * 5 + [number] * 4
    move.argtypes = [pointer, pointer]
    return encode, move


def unfilled() -> TensorMap:
    """At an address that 64 divides, as the driver wants it."""
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 63)
    return TensorMap.from_buffer(memory, -ctypes.addressof(memory) % 64)


def is_known(descriptor: Any, meta: Any) -> bool:
    """Whether this is a plain tiled map: Triton has others, and may get more."""
    return (
        meta is not None
        and set(meta)
        <= {"swizzle", "elem_size", "elem_type", "block_size", "fp4_padded"} | {"is_im2col"}
        and not (meta["fp4_padded"] or meta.get("is_im2col", False))
        and descriptor.padding == "zero"
        and not getattr(descriptor, "round_f32_to_tf32", False)
        and descriptor.base.dtype in TYPES
        and descriptor.strides[-1] == 1
    )


def fill(tensor_map: TensorMap, descriptor: Any, meta: Any) -> bool:
    """Writes the map of a Triton descriptor, for tiles as the compiled kernel's `meta` has them;
    whether the driver did so. Dims go from the innermost outwards.
    """
    rank = len(descriptor.shape)
    size = descriptor.base.element_size()
    shape = (ctypes.c_uint64 * rank)(*reversed(descriptor.shape))
    strides = (ctypes.c_uint64 * rank)(*(size * x for x in reversed(descriptor.strides[:-1])))
    box = (ctypes.c_uint32 * rank)(*reversed(meta["block_size"]))
    steps = (ctypes.c_uint32 * rank)(*[1] * rank)
    result = functions()[0](
        *(ctypes.addressof(tensor_map), TYPES[descriptor.base.dtype], rank),
        *(descriptor.base.data_ptr(), shape, strides, box, steps),
        *(NO_INTERLEAVE, meta["swizzle"], PROMOTE_TO_128_BYTES, FILL_WITH_ZEROS),
    )
    return result == 0
