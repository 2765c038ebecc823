"""Kernels are compiled in threads before they are launched; a launch waits for them."""

import threading
import time

import pytest
import torch

pytest.importorskip("triton")

from msfs_kernels import ahead
from msfs_kernels.launching import Launch, launches_of


class Kernel:
    """Takes its time to compile; cannot be launched before."""

    def __init__(self, fails: bool = False):
        self.fails, self.ready, self.launched = fails, 0, 0

    def warmup(self, *args, grid, **constants):
        time.sleep(0.1)
        if self.fails:
            raise RuntimeError("no")
        self.ready += 1

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **constants):
        self.launched += 1
        return self.ready


def test_a_launch_waits_for_what_was_asked_for_its_kernel_alone():
    kernel, failing, other = Kernel(), Kernel(fails=True), Kernel()
    launches = [Launch(k, (1,), (), {}) for k in (kernel, kernel, failing)]
    begin = time.perf_counter()
    ahead.start(launches, torch.device("cpu"))
    assert Launch(other, (1,), (), {}).run() == 0
    assert time.perf_counter() - begin < 0.1
    assert launches[0].run() == 2  # both: the next call may be the second one
    assert launches[2].run() == 0 and failing.launched == 1  # and compiles for itself
    assert not {id(k) for k in (kernel, failing)} & ahead.pending.keys()


def test_what_a_graph_will_launch_is_asked_for_once_where_its_shapes_are_known(monkeypatch):
    """Without a GPU: tensors that say they are on one."""
    asked, kernel = [], Kernel()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ahead, "real_one", lambda x: torch.empty(x.shape, dtype=x.dtype))
    monkeypatch.setattr(ahead, "start", lambda launches, device: asked.extend(launches))
    monkeypatch.setattr(ahead, "seen", set())
    x = torch.empty(1, 2, 16, 32, dtype=torch.bfloat16, device="meta")

    def op(q, k, v):
        Launch(kernel, (q.shape[0],), (q, k, v), {}).run()

    class OnGpu(torch.Tensor):
        device = torch.device("cuda:0")  # pyright: ignore

    y = x.as_subclass(OnGpu)
    ahead.expect(op, (y, y, y))
    ahead.expect(op, (y, y, y))
    assert [launch.kernel for launch in asked] == [kernel]
    ahead.expect(op, (x, x, x))  # not on a GPU
    assert len(asked) == 1


def test_plans_of_one_thread_are_not_those_of_another():
    kernel, found = Kernel(), []
    inside, go_on = threading.Event(), threading.Event()

    def slow():
        inside.set()
        go_on.wait(5)

    thread = threading.Thread(target=lambda: found.append(launches_of(slow)))
    thread.start()
    inside.wait(5)
    assert Launch(kernel, (1,), (), {}).run() == 0 and kernel.launched == 1
    go_on.set()
    thread.join()
    assert found == [[]]


def test_the_first_norm_of_a_network_asks_for_all_its_kernels(monkeypatch):
    from msfs_kernels import triton_group_norm

    asked = []
    monkeypatch.setattr(ahead, "start", lambda launches, device: asked.append(launches))
    monkeypatch.setattr(triton_group_norm, "INTERPRETED", False)
    monkeypatch.setattr(triton_group_norm, "EXPECTED", set())
    x, gain = torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last), torch.ones(8)
    for trained in (False, True, True):
        triton_group_norm.expect(x, gain, gain, None, 2, trained)
    assert [len(launches) for launches in asked] == [7, 15]
