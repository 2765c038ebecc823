"""The graph pass that makes gradients of batched products in the layout of their parameters."""

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.transposed_products import TransposedProducts


def linear_and_gradients(x, w):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    y = torch.func.vmap(torch.nn.functional.linear)(x, w)
    return y, *torch.autograd.grad(y, (x, w), torch.ones_like(y).cumsum(-1))


def test_the_gradient_of_a_mapped_linear_layer_is_contiguous():
    torch.manual_seed(0)
    x, w = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    module = make_fx(linear_and_gradients, tracing_mode="fake")(x, w)
    before = module(x, w)
    TransposedProducts()(module.graph)
    module.graph.lint()
    module.recompile()
    after = module(x, w)
    assert not before[2].is_contiguous() and after[2].is_contiguous()
    torch.testing.assert_close(after, before)
