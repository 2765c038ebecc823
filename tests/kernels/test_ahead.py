"""What a traced graph will launch is compiled beside Inductor, by its processes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

pytest.importorskip("triton")

from msfs_kernels import ahead, triton_backward, triton_forward
from msfs_kernels.options import Options
from msfs_kernels.triton_compile import compile_launch
from triton import knobs

SHAPE = (1, 32, 2, 16)  # tokens before heads


class AtOnce:
    """A pool that does the work where it is given."""

    def submit(self, fn, *args):
        with unset_fake_temporarily():
            fn(*args)
        return self

    def result(self, timeout):
        return None


@pytest.fixture
def one_process(monkeypatch, tmp_path):
    from torch._inductor import async_compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MSFS_COMPILE_AHEAD", "1")
    monkeypatch.setattr(ahead, "asked", set())
    monkeypatch.setattr(ahead, "pending", {})
    monkeypatch.setattr(async_compile, "get_compile_threads", lambda: 2)
    monkeypatch.setattr(async_compile.AsyncCompile, "process_pool", staticmethod(AtOnce))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr("msfs_kernels.configs.chip", lambda: "sm_90")  # which `compile_one` sets
    monkeypatch.setattr("msfs_kernels.gluon_support.here", lambda *args: True)


def test_a_traced_call_finds_its_kernels_in_the_cache(one_process, monkeypatch):
    hits = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda cache_hit=None, **rest: hits.append(cache_hit)
    )
    with FakeTensorMode():
        x = torch.empty(SHAPE, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        options = (*(None,) * 6, True, -1, 0.25, 0.0, 0.0, "ieee", False)
        o, lse = torch.ops.msfs_kernels.attention(x, x, x, None, *options)
        torch.ops.msfs_kernels.attention_backward(o, None, x, x, x, None, o, lse, *options, False)
    assert set(ahead.pending) == {"attention", "attention_backward"} and not any(hits)
    made = len(hits)
    assert made >= 3
    x = torch.empty(SHAPE, dtype=torch.bfloat16).transpose(1, 2)
    full, lse = Options(causal=True, scale=0.25), torch.empty(1, 2, 32)
    forward = triton_forward.plan_forward(x, x, x, x, lse, full)
    delta = triton_backward.plan_delta(x, x, None, lse, Options())
    for launch in (forward, delta):
        compile_launch(launch, 90)
    assert hits[made:] == [True, True]
    ahead.wait("attention")
    assert set(ahead.pending) == {"attention_backward"}
