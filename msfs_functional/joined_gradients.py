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
from torch.fx import Graph, Node, map_arg

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
        if len(parts) != 3 or dim not in (-1, value.ndim - 1):
            return
        found = [heads_of(part) for part in parts]
        backward = found[0][0]
        if backward is None or [one[:2] for one in found] != [(backward, i) for i in range(3)]:
            return
        *args, need_dbias = arguments(backward)
        q, k, v = (x.meta["val"] for x in args[2:5])
        same = q.shape[2] == k.shape[2] and q.shape[3] == v.shape[3]
        if need_dbias or not same or not (self.everywhere or q.is_cuda):
            return
        joined = kernel.fake(*[x.meta["val"] if isinstance(x, Node) else x for x in args])
        heads = joined.transpose(1, 2).split([x.shape[1] for x in (q, k, v)], 1)
        whole = joined.view(value.shape).split([x.meta["val"].shape[-1] for x in parts], -1)
        for (_, _, views), head, part in zip(found, heads, whole, strict=True):
            if not is_same_view(through(head, views), part):
                return
        with graph.inserting_before(backward):
            joined = insert(graph, backward, OPS.attention_backward_joined.default, *args)
        with graph.inserting_before(cat):
            view = insert(graph, cat, aten.view.default, joined, list(value.shape))
        cat.replace_all_uses_with(view)


def heads_of(x: Any) -> tuple[Node | None, int, list[Node]]:
    """(node, i, views): x is views of result i of an attention_backward, used by nothing else."""
    views: list[Node] = []
    turns = (aten.permute.default, aten.transpose.int)
    while isinstance(x, Node) and len(x.users) == 1 and x.target in (*VIEWS, *turns):
        views.insert(0, x)
        x = arguments(x)[0]
    if not is_call(x, operator.getitem) or len(x.users) != 1:
        return None, 0, []
    node, i = arguments(x)
    return (node, i, views) if is_call(node, OPS.attention_backward.default) else (None, 0, [])


def through(x: torch.Tensor, views: list[Node]) -> torch.Tensor:
    """x seen through the same views; a copy where its memory cannot be seen so."""
    for node in views:
        target: Any = aten.reshape.default if node.target in VIEWS else node.target
        _, *args = map_arg(node.args, lambda y: y.meta["val"])
        x = target(x, *args) if args else x
    return x


def is_same_view(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers of the same memory in the same order."""
    storages = [t.untyped_storage()._cdata for t in (x, y)]
    where = [(t.shape, t.stride(), t.storage_offset()) for t in (x, y)]
    return storages[0] == storages[1] and where[0] == where[1]
