"""Graph rewriting: a batched product that is transposed at once is made transposed.

Of y = x W^T, mapped over the members of an ensemble, autograd makes the gradient

    dW = permute(bmm(x^T, dy))         (N, in, out) seen as (N, out, in)

whose strides are not the parameter's: every reader of many gradients at once (`side_by_side`, a
cast, a norm) would first copy it. This pass puts there what costs the same,

    dW = bmm(dy^T, x)                  (N, out, in)

A product reads its factors transposed or not at the same speed.
"""

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node, map_arg

from msfs_functional.epilogues import VIEWS, alone, arguments, insert

aten = torch.ops.aten
VIEWS_OF_PARTS = (
    *VIEWS,
    operator.getitem,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.permute.default,
    aten.transpose.int,
)


class TransposedProducts(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`."""

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))

    def __call__(self, graph: Graph) -> None:
        for turn in graph.find_nodes(op="call_function", target=aten.permute.default):
            if list(arguments(turn)[1]) == [0, 2, 1]:
                self.rewrite(graph, turn)
        for turn in graph.find_nodes(op="call_function", target=aten.transpose.int):
            if turn.meta["val"].ndim == 3 and {i % 3 for i in arguments(turn)[1:]} == {1, 2}:
                self.rewrite(graph, turn)
        graph.eliminate_dead_code()

    def rewrite(self, graph: Graph, turn: Node) -> None:
        product = alone(arguments(turn)[0], aten.bmm.default)
        if product is None or arguments(turn)[0].meta["val"].shape != product.meta["val"].shape:
            return
        first, second = arguments(product)
        with graph.inserting_before(product):
            turned = [
                insert(graph, product, aten.permute.default, x, [0, 2, 1]) for x in (second, first)
            ]
            new = insert(graph, product, aten.bmm.default, *turned)
        turn.replace_all_uses_with(new)
        renew_views(new)


def renew_views(node: Node) -> None:
    """Views of a node whose strides have changed get new values, too: Inductor gives outputs the
    strides that are written there, by a copy if need be."""
    for user in list(node.users):
        if callable(user.target) and user.target in VIEWS_OF_PARTS:
            args = map_arg(user.args, lambda x: x.meta["val"])
            target: Any = user.target
            user.meta["val"] = target(*args, **user.kwargs)
            user.meta.pop("tensor_meta", None)
            renew_views(user)
