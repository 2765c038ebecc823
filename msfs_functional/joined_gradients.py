"""Graph rewriting: the gradients of q, k and v are written where one matrix's gradient wants them.

Where one product makes q, k and v, the graph of the backward joins what attention gives it,

    dq, dk, dv = attention_backward(...)
    cat([heads_of(dq), heads_of(dk), heads_of(dv)], -1)  ->  view(attention_backward_joined(...))

and the copy goes. As in `epilogues`, the pass sees the joint graph, after all transforms; a graph
in which the pattern is not found (rotary positions stand between) stays as it is.
"""

import operator
from typing import Any

import torch
from msfs_kernels import joined_backward as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from msfs_functional.epilogues import VIEWS, arguments, insert, is_call

aten = torch.ops.aten
OPS = torch.ops.msfs_kernels


class GradientsSideBySide(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Args:
        everywhere: rewrite on the CPU, too, for tests: its kernels would copy all the same.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        for cat in graph.find_nodes(op="call_function", target=aten.cat.default):
            self.rewrite(graph, cat)
        graph.eliminate_dead_code()

    def rewrite(self, graph: Graph, cat: Node) -> None:
        parts, dim = arguments(cat)[0], (*arguments(cat)[1:], 0)[0]
        value = cat.meta["val"]
        if len(parts) != 3 or dim not in (-1, value.ndim - 1) or value.ndim != 3:
            return
        found = [heads_of(part) for part in parts]
        backward = found[0][0]
        if backward is None or found != [(backward, i) for i in range(3)]:
            return
        *args, need_dbias = arguments(backward)
        q, k, v = (x.meta["val"] for x in args[2:5])
        same = q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]
        if need_dbias or not same or not (self.everywhere or q.is_cuda):
            return
        with graph.inserting_before(backward):
            joined = insert(graph, backward, OPS.attention_backward_joined.default, *args)
        with graph.inserting_before(cat):
            view = insert(graph, cat, aten.view.default, joined, list(value.shape))
        cat.replace_all_uses_with(view)


def heads_of(x: Any) -> tuple[Node | None, int]:
    """(node, i) where x (B, T, H K) is result i of an attention_backward, used by nothing else."""
    while isinstance(x, Node) and len(x.users) == 1 and x.target in VIEWS:
        x = arguments(x)[0]
    permuted = is_call(x, aten.permute.default) and list(arguments(x)[1]) == [0, 2, 1, 3]
    transposed = is_call(x, aten.transpose.int) and arguments(x)[1:] == (1, 2)
    if not (permuted or transposed):
        return None, 0
    result = arguments(x)[0]
    if len(x.users) != 1 or not is_call(result, operator.getitem) or len(result.users) != 1:
        return None, 0
    node, i = arguments(result)
    return (node, i) if is_call(node, OPS.attention_backward.default) else (None, 0)
