"""The CUDA C++ forward is as near to the fp64 formula as plain PyTorch in the same dtype is."""

import pytest
import torch
from msfs_kernels import cuda_forward
from msfs_kernels.options import Options


def formula(q, k, v, causal, scale):
    T, S = q.shape[2], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = (q @ k.mT) * scale
    if causal:
        hidden = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(S - T + 1)
        s = s.masked_fill(hidden, float("-inf"))
    return s.softmax(-1).nan_to_num(0.0) @ v, s.logsumexp(-1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "S", "heads", "groups"),
    [(1, 1, 2, 2), (64, 64, 4, 4), (129, 129, 4, 2), (77, 300, 4, 1), (300, 77, 2, 2)],
)
def test_cuda_forward_equals_the_formula(dtype, head_dim, causal, T, S, heads, groups):
    torch.manual_seed(0)
    B, scale = 2, head_dim**-0.5
    q = torch.randn(B, T, heads, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    k = torch.randn(B, groups, S, head_dim, device="cuda", dtype=dtype)
    v = torch.randn(B, S, groups, head_dim, device="cuda", dtype=dtype).transpose(1, 2)
    o, lse = cuda_forward.forward(q, k, v, Options(causal=causal, scale=scale))
    expected, expected_lse = formula(q.double(), k.double(), v.double(), causal, scale)
    plain, _ = formula(q, k, v, causal, scale)
    bound = 2 * (plain.double() - expected).abs().max() + torch.finfo(dtype).eps
    assert (o.double() - expected).abs().max() <= bound
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_what_the_cuda_kernel_does_not_know_is_refused_by_name():
    q = torch.randn(1, 2, 3, 64)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        cuda_forward.forward(q, q, q, Options())
