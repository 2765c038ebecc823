"""Products by cuBLASLt: on a GPU each of its algorithms gives what torch gives."""

import pytest
import torch
from msfs_kernels import cublaslt
from msfs_kernels import product as products


def test_the_op_is_the_product_and_registered_right():
    a, b = torch.randn(5, 8), torch.randn(8, 16)
    torch.testing.assert_close(products.product(a, b), a @ b)
    torch.library.opcheck(products.product, (a, b), test_utils=("test_faketensor",))


def test_which_way_a_matrix_lies():
    x = torch.empty(4, 6)
    assert not cublaslt.transposed(x) and cublaslt.transposed(x.T)
    assert not cublaslt.transposed(x[:, :3]) and cublaslt.transposed(x[:, :3].T)
    with pytest.raises(ValueError, match="copy it"):
        cublaslt.transposed(x[:, ::2])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_every_algorithm_is_as_exact_as_torchs(dtype):
    for turned in ((False, False), (False, True), (True, False), (True, True)):
        a, b = (
            torch.randn(shape[::-1], device="cuda").T if turn else torch.randn(shape, device="cuda")
            for shape, turn in zip(((272, 136), (136, 264)), turned, strict=True)
        )
        a, b = a.to(dtype), b.to(dtype)
        exact, plain = a.double() @ b.double(), a @ b
        plan, out = products.planned(a, b), torch.empty_like(plain)
        assert plan is not None
        for choice in range(len(plan.choices)):
            cublaslt.run(plan, a, b, out.fill_(7), choice=choice)
            assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()
        torch.testing.assert_close(products.product(a, b), plain)
        assert plan.chosen is not None
