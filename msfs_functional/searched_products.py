"""Graph rewriting: products by the fastest of cuBLASLt's algorithms (`msfs_kernels.product`).

It is done after forward and backward were cut apart, where a product is what it will be.
"""

from typing import Any

import torch
from msfs_kernels import product as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from msfs_functional.epilogues import arguments, insert, on_hopper_in_16_bits

aten = torch.ops.aten
LARGE = 2**30  # multiplications: of smaller products it is the launch that takes time


class SearchedProducts(CustomGraphPass):
    """The pass, for Inductor's option `post_grad_custom_pre_pass`.

    Args:
        everywhere: rewrite on every device and in every dtype, for tests; else on Hopper GPUs and
            in 16 bits.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            a, b = (x.meta["val"] for x in arguments(node))
            sizes = (*a.shape, b.shape[1])
            if not all(isinstance(size, int) for size in sizes):
                continue
            if self.everywhere or (
                sizes[0] * sizes[1] * sizes[2] >= LARGE and on_hopper_in_16_bits(node)
            ):
                with graph.inserting_before(node):
                    op = torch.ops.msfs_kernels.product.default
                    new = insert(graph, node, op, *arguments(node))
                node.replace_all_uses_with(new)
                graph.erase_node(node)
