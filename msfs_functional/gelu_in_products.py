"""Graph rewriting: GELU between two linear layers is taken into the products beside it.

    h = x W;  y = gelu(h)         ->   h, y = product_gelu(x, W)
    dh = (dy V) gelu'(h)          ->   dh = product_gelu_gradient(dy, V, h)

As `epilogues` does for ReLU: found in the joint graph of forward and backward, where all transforms
have been applied before; a graph in which the pattern is not found stays as it is. The pattern is
what torch itself makes of GELU (tanh approximation) and of its derivative, traced anew.
"""

import functools
import operator
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from msfs_kernels import gelu_product as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.epilogues import (
    alone,
    arguments,
    behind_views,
    comes_before,
    insert,
    is_call,
    on_hopper_in_16_bits,
)

aten = torch.ops.aten
OPS = torch.ops.msfs_kernels


class GeluInProducts(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Where a region is thrifty (`regions.region_of`) it does nothing: y, made anew from h in the
    backward there, would be kept.

    Args:
        everywhere: rewrite on every device and in every dtype, for tests; else on Hopper GPUs and
            in 16 bits, where it was measured to pay.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        tangents = graph.find_nodes(op="call_function", target=aten.tanh.default)
        if not tangents or not functorch_config.ban_recompute_materialized_backward:
            return
        for rewrite, backward in ((self.forward, False), (self.backward, True)):
            for node in list(graph.nodes):
                if node.op != "call_function" or not node.users:
                    continue
                dtype = getattr(node.meta.get("val"), "dtype", None)
                if dtype not in (torch.bfloat16, torch.float16, torch.float32):
                    continue
                found = matched(node, *pattern(dtype, backward))
                if found is not None:
                    rewrite(graph, node, *found)
        graph.eliminate_dead_code()

    def forward(self, graph: Graph, y: Node, x: Node) -> None:
        """y = gelu(x)"""
        product = behind_views(x)
        if is_call(product, aten.mm.default):
            factors, bias = arguments(product), None
        elif is_call(product, aten.addmm.default) and not product.kwargs:
            bias, *factors = arguments(product)
            if bias.meta["val"].ndim != 1:
                return
        else:
            return
        if not self.suits(product):
            return
        with graph.inserting_before(product):
            pair = insert(graph, product, OPS.product_gelu.default, *factors, bias)
            h, active = (insert(graph, product, operator.getitem, pair, i) for i in (0, 1))
        with graph.inserting_before(y):
            shape = list(y.meta["val"].shape)
            active = insert(graph, y, aten.reshape.default, active, shape)
        product.replace_all_uses_with(h)
        y.replace_all_uses_with(active)

    def backward(self, graph: Graph, dx: Node, grad: Node, x: Node) -> None:
        """dx = grad gelu'(x)"""
        product, h = alone(grad, aten.mm.default), behind_views(x)
        if product is None or not self.suits(product) or not comes_before(graph, h, product):
            return
        columns = product.meta["val"].shape[1]
        with graph.inserting_before(product):
            h = insert(graph, product, aten.reshape.default, h, [-1, columns])
            args = (*arguments(product), h)
            out = insert(graph, product, OPS.product_gelu_gradient.default, *args)
        with graph.inserting_before(dx):
            out = insert(graph, dx, aten.reshape.default, out, list(dx.meta["val"].shape))
        dx.replace_all_uses_with(out)

    def suits(self, product: Node) -> bool:
        static = all(isinstance(size, int) for size in product.meta["val"].shape)
        return static and (self.everywhere or on_hopper_in_16_bits(product))


@functools.cache
def pattern(dtype: torch.dtype, backward: bool) -> tuple[Node, tuple[Node, ...]]:
    """What torch makes of gelu(x), or of its derivative times (grad, x): result and inputs."""

    def value(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    def gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return aten.gelu_backward(grad, x, approximate="tanh")

    x = torch.empty(2, 3, dtype=dtype)
    fn, args = (gradient, (torch.empty_like(x), x)) if backward else (value, (x,))
    graph = make_fx(fn, select_decomp_table(), tracing_mode="fake")(*args).graph
    result: Any = graph.output_node().args[0]
    return result, tuple(graph.find_nodes(op="placeholder"))


def matched(node: Any, result: Any, inputs: tuple[Node, ...]) -> tuple[Node, ...] | None:
    """What stands for the pattern's inputs in a graph whose `node` is its result; None if not."""
    bound: dict[Node, Any] = {}

    def same(x: Any, like: Any) -> bool:
        if not isinstance(like, Node):
            return not isinstance(x, Node) and type(x) is type(like) and x == like
        if like in bound:
            return bound[like] is x
        if not isinstance(x, Node):
            return False
        bound[like] = x
        if like in inputs:
            return True
        return (
            x.op == "call_function"
            and x.target is like.target
            and len(x.args) == len(like.args)
            and x.kwargs == like.kwargs
            and all(map(same, x.args, like.args))
        )

    return tuple(bound[x] for x in inputs) if same(node, result) else None
