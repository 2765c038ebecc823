"""Maps for the copy engine say what Triton's own say, by a driver that only takes notes."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from msfs_kernels import tensor_maps


@pytest.fixture
def notes(monkeypatch) -> list[tuple]:
    """What cuTensorMapEncodeTiled was called with, pointers read."""
    taken: list[tuple] = []

    def encode(address, dtype, rank, base, shape, strides, box, steps, *rest):
        taken.append(
            (address, dtype, base, list(shape), list(strides), list(box), list(steps), *rest)
        )
        assert rank == len(shape)
        return 0

    monkeypatch.setattr(tensor_maps, "functions", lambda: (encode, None))
    return taken


META = dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 1, 64, 32], fp4_padded=False)


def described(x: torch.Tensor) -> SimpleNamespace:
    return SimpleNamespace(base=x, shape=list(x.shape), strides=list(x.stride()), padding="zero")


def test_a_map_has_dims_from_the_innermost_outwards_and_strides_in_bytes(notes):
    x = torch.empty(2, 300, 4, 64, dtype=torch.bfloat16).transpose(1, 2)  # B H T K
    made = tensor_maps.unfilled()
    assert ctypes.addressof(made) % 64 == 0 and ctypes.sizeof(made) == 128
    assert tensor_maps.fill(made, described(x), META)
    ((address, dtype, base, shape, strides, box, steps, *rest),) = notes
    assert (address, base) == (ctypes.addressof(made), x.data_ptr())
    assert dtype == 9  # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
    assert shape == [64, 300, 4, 2]
    assert strides[:3] == [2 * 4 * 64, 2 * 64, 2 * 300 * 4 * 64]  # of T, H and B; K's is an element
    assert box == [32, 64, 1, 1] and steps == [1, 1, 1, 1]
    assert rest == [0, 3, 2, 0]  # not interleaved, swizzled by 128 bytes, cached by 128, zeros


@pytest.mark.parametrize(
    ("change", "meta"),
    [
        ({}, None),
        ({}, {**META, "fp4_padded": True}),
        ({}, {**META, "is_im2col": True}),
        ({}, {**META, "something_new": 1}),
        ({"padding": "nan"}, META),
        ({"round_f32_to_tf32": True}, META),
        ({"strides": [1, 1, 1, 2]}, META),
        ({"base": torch.empty(1, 1, 64, 32, dtype=torch.int32)}, META),
    ],
)
def test_other_maps_are_left_to_triton(change, meta):
    usual = described(torch.empty(1, 1, 64, 32, dtype=torch.float16))
    assert tensor_maps.is_known(usual, META)
    assert not tensor_maps.is_known(SimpleNamespace(**{**vars(usual), **change}), meta)
