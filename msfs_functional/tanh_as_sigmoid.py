"""Graph rewriting: GELU's hyperbolic tangent becomes a sigmoid, which costs a GPU less.

    1 + tanh(u)       =  2 sigmoid(2u)
    1 - tanh(u)^2     =  1 - (2 sigmoid(2u) - 1)^2

The left sides are GELU as GPT-2 and Gemma take it (Hendrycks and Gimpel 2016, section 2) and its
derivative, as torch spells them out. By its instructions a kernel of the first takes 29 an element
with CUDA's tanh, which has two branches, and 20 with a sigmoid, the second 37 and 28: no more than
the memory's speed allows. The first right side is the more exact one, too: nothing cancels.

It is done after forward and backward were cut apart: a sigmoid in the formula itself would be kept
for the backward, in float32, where a tangent is computed anew from what is kept anyway.
"""

from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from msfs_functional.epilogues import arguments, insert, is_call

aten = torch.ops.aten


class TanhAsSigmoid(CustomGraphPass):
    """The pass, for Inductor's option `post_grad_custom_pre_pass`."""

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))

    def __call__(self, graph: Graph) -> None:
        for tanh in graph.find_nodes(op="call_function", target=aten.tanh.default):
            raised = [user for user in tanh.users if is_one_more(user)]
            squared = [user for user in tanh.users if is_square(user)]
            if raised and len(raised) + len(squared) == len(tanh.users):
                rewrite(graph, tanh, raised, squared)


def is_one_more(x: Node) -> bool:
    """x = tanh + 1"""
    return is_call(x, aten.add.Tensor) and arguments(x)[1] == 1 and not x.kwargs


def is_square(x: Node) -> bool:
    """x = tanh * tanh"""
    return is_call(x, aten.mul.Tensor) and arguments(x)[0] is arguments(x)[1]


def rewrite(graph: Graph, tanh: Node, raised: list[Node], squared: list[Node]) -> None:
    with graph.inserting_before(tanh):
        double = insert(graph, tanh, aten.mul.Tensor, arguments(tanh)[0], 2)
        sigmoid = insert(graph, tanh, aten.sigmoid.default, double)
        twice = insert(graph, tanh, aten.mul.Tensor, sigmoid, 2)
        again = insert(graph, tanh, aten.sub.Tensor, twice, 1)
    for user in raised:
        user.replace_all_uses_with(twice)
        graph.erase_node(user)
    for user in squared:
        user.replace_input_with(tanh, again)
    for node in (tanh, again):
        if not node.users:
            graph.erase_node(node)
