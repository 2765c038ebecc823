"""Graph rewriting: linear layers of an ensemble take bias and ReLU into their batched product.

Mapped over members, y = relu(x W^T + b) becomes a batched product and a kernel that reads its
result to add b, for which cuBLAS has no epilogue. This pass finds, in the joint graph,

    y = relu(bmm(x, permute(W)) + b[:, None])      ->  y = members_linear(x, W, b, relu=True)
    y = bmm(x, permute(W)) + b[:, None]            ->  y = members_linear(x, W, b, relu=False)
    dz = where(y <= 0, 0, bmm(dy, V))              ->  dz, sums = members_masked_product(dy, V, y)
    db = sum(dz, rows)                             ->  db = sums

the second where attention reads y; elsewhere the addition is part of a kernel that runs anyway. The
other two are what `epilogues` does for a single model.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from msfs_kernels import members_linear as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from msfs_functional.epilogues import (
    VIEWS,
    alone,
    arguments,
    behind_views,
    insert,
    is_call,
    masked_by_relu,
    on_hopper_in_16_bits,
)
from msfs_functional.transposed_products import VIEWS_OF_PARTS

aten = torch.ops.aten
ATTENTION = (
    torch.ops.msfs_kernels.attention.default,
    torch.ops.msfs_kernels.attention_backward.default,
)


class MemberLayers(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Args:
        everywhere: rewrite on every device and in every dtype, for tests; else on Hopper GPUs and
            in 16 bits.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            found = self.layer(total)
            if found is not None:
                self.rewrite(graph, total, *found)
        for where in graph.find_nodes(op="call_function", target=aten.where.self):
            self.backward(graph, where)
        graph.eliminate_dead_code()

    def layer(self, total: Node) -> tuple[Node, Node, Node] | None:
        """(x, W^T, b) if `total` is a batched product plus each member's bias."""
        for one, other in (arguments(total), arguments(total)[::-1]):
            product = alone(one, aten.bmm.default)
            if product is None or one.meta["val"].shape != product.meta["val"].shape:
                continue
            bias, (N, _, O) = bias_of(other), product.meta["val"].shape  # noqa: E741
            fits = (
                bias is not None
                and not total.kwargs
                and tuple(other.meta["val"].shape) == (N, 1, O)
                and tuple(bias.meta["val"].shape) == (N, O)
                and len({x.meta["val"].dtype for x in (bias, product, total)}) == 1
                and self.suits(product)
            )
            if fits and bias is not None:
                x, w = arguments(product)
                return x, w, bias
        return None

    def rewrite(self, graph: Graph, total: Node, x: Node, w: Node, b: Node) -> None:
        relu = only_relu(total)
        if relu is None and not all(user.target in ATTENTION for user in readers(total)):
            return
        with graph.inserting_before(total):
            turned = insert(graph, total, aten.permute.default, w, [0, 2, 1])
            op = torch.ops.msfs_kernels.members_linear.default
            new = insert(graph, total, op, x, turned, b, relu is not None)
            total.replace_all_uses_with(new)
        if relu is not None:
            relu.replace_all_uses_with(arguments(relu)[0])

    def backward(self, graph: Graph, where: Node) -> None:
        found = masked_by_relu(graph, where, aten.bmm.default)
        if found is None or not self.suits(found[1]):
            return
        y, product = found
        shape = list(product.meta["val"].shape)
        if not all(isinstance(n, int) for n in shape):
            return
        with graph.inserting_before(product):
            y = insert(graph, product, aten.reshape.default, y, shape)
            op = torch.ops.msfs_kernels.members_masked_product.default
            pair = insert(graph, product, op, *product.args, y)
            out, sums = (insert(graph, product, operator.getitem, pair, i) for i in (0, 1))
        product.replace_all_uses_with(out)
        where.replace_all_uses_with(arguments(where)[2])
        for total in list(sums_over_rows(out, shape)):
            with graph.inserting_before(total):
                value = total.meta["val"]
                new = insert(
                    graph, total, torch.ops.prims.convert_element_type.default, sums, value.dtype
                )
                new = insert(graph, total, aten.reshape.default, new, list(value.shape))
            total.replace_all_uses_with(new)

    def suits(self, product: Node) -> bool:
        return self.everywhere or on_hopper_in_16_bits(product)


def bias_of(x: Any) -> Node | None:
    """What is behind views of x, and behind the product with 1 that decompositions leave."""
    x = behind_views(x)
    if is_call(x, aten.unsqueeze.default):
        x = behind_views(arguments(x)[0])
    if is_call(x, aten.mul.Scalar) or is_call(x, aten.mul.Tensor):
        x = behind_views(arguments(x)[0]) if arguments(x)[1] == 1 else x
    return x if isinstance(x, Node) else None


def only_relu(x: Node) -> Node | None:
    """The ReLU of x or of a view of it, if nothing else reads x."""
    while len(x.users) == 1:
        (user,) = x.users
        if is_call(user, aten.relu.default):
            return user
        if user.target not in VIEWS:
            return None
        x = user
    return None


def sums_over_rows(x: Node, shape: list[int]) -> Iterator[Node]:
    """Sums over dim 1 of views of x that have its shape, (N, M, O)."""
    for user in x.users:
        if user.op != "call_function":
            continue
        if user.target is aten.sum.dim_IntList:
            same = list(x.meta["val"].shape) == shape
            if same and list(arguments(user)[1]) == [1] and not user.kwargs:
                yield user
        elif user.target in VIEWS:
            yield from sums_over_rows(user, shape)


def readers(x: Node) -> Iterator[Node]:
    """What reads x or views of it."""
    for user in x.users:
        if user.op == "call_function" and user.target in VIEWS_OF_PARTS:
            yield from readers(user)
        else:
            yield user
