"""Maps for the copy engine say what Triton's own say, by a driver that only takes notes."""

import ctypes
import threading
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


@pytest.mark.parametrize("context", [None, 7, 8])
def test_a_thread_without_a_context_gets_that_of_the_launch(monkeypatch, context):
    """7 is that of the launch; with another one (8) the driver's refusal stands."""
    state = {"context": context}
    started = []

    def launch(*args) -> int:
        started.append(args)
        return 0 if state["context"] == 7 else 201  # CUDA_ERROR_INVALID_CONTEXT

    def set_context(new) -> bool:
        state["context"] = new
        return True

    monkeypatch.setattr(driver_launch, "current_context", lambda: state["context"])
    monkeypatch.setattr(driver_launch, "set_context", set_context)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    one = object.__new__(driver_launch.DriverLaunch)
    one.places, one.maps, one.before, one.parameters = [], [], (), None
    one.launch, one.device, one.context = launch, 0, 7
    one.one_at_a_time = threading.Lock()
    assert one.run([]) == (context != 8)
    assert len(started) == {None: 2, 7: 1, 8: 1}[context]
