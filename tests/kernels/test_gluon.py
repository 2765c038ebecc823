"""The Gluon kernels compile for Hopper without a GPU, and step back where they cannot run."""

import pytest
import torch

triton = pytest.importorskip("triton")

from msfs_kernels import gluon_support  # noqa: E402
from msfs_kernels.options import Options  # noqa: E402
from msfs_kernels.triton_common import Launch  # noqa: E402
from msfs_kernels.triton_compile import compile_launch, resources  # noqa: E402

needs_gluon = pytest.mark.skipif(
    gluon_support.gluon_forward is None,
    reason=f"Triton {triton.__version__} has no Gluon, or none with the names of Triton 3.6 to 3.9",
)


def tensors(head_dim: int, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, ...]:
    def make(heads: int) -> torch.Tensor:
        return torch.empty(2, length, heads, head_dim, dtype=dtype).transpose(1, 2)

    return make(4), make(2), make(2), make(4), torch.empty(2, 4, length)


@needs_gluon
@pytest.mark.parametrize(
    ("head_dim", "causal", "dtype", "length"),
    [
        (64, False, torch.bfloat16, 256),
        (64, True, torch.float16, 300),
        (128, False, torch.float16, 300),
        (128, True, torch.bfloat16, 256),
    ],
)
def test_forward_compiles_for_hopper(head_dim, causal, dtype, length):
    options = Options(causal=causal, scale=head_dim**-0.5)
    launch = gluon_support.gluon_forward.plan_forward(*tensors(head_dim, dtype, length), options)
    took = resources(compile_launch(launch, 90), 90)
    assert took.wgmma > 0
    assert took.shared <= 227 * 1024
    assert took.spills <= 16  # bytes a thread
