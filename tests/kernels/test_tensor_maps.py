"""Maps for the copy engine say what Triton's own say, by a driver that only takes notes."""

import ctypes
from types import SimpleNamespace

import pytest
import torch
from msfs_kernels import driver_launch, tensor_maps


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


def test_a_map_is_moved_when_its_tensor_lies_elsewhere_than_last_time(monkeypatch):
    moved, launched, answers = [], [], [0, 0, 1, 0, 0]

    def move(address, data):
        moved.append(data)
        return answers[len(moved) - 1]

    monkeypatch.setattr(tensor_maps, "functions", lambda: (None, move))
    monkeypatch.setattr(driver_launch, "driver", lambda: lambda *args: launched.append(args) or 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    compiled = SimpleNamespace(function=1, metadata=SimpleNamespace(num_warps=4, shared=0))
    cells = [tensor_maps.unfilled(), tensor_maps.unfilled()]
    launch = driver_launch.DriverLaunch(compiled, (1, 1, 1), cells, [0, 1])
    x, y, z = (torch.empty(3) for _ in range(3))
    at = torch.Tensor.data_ptr
    taken = [launch.run(tensors) for tensors in ((x, y), (x, y), (x, z), (x, z), (y, z))]
    assert taken == [True, True, False, True, True] and len(launched) == 4
    assert moved == [at(x), at(y), at(z), at(z), at(y)]  # one that failed is moved again
