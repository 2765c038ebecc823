"""Graph rewriting: a ReLU between two linear layers is taken into the products beside it.

Inductor makes a kernel of its own out of a ReLU, and another out of its mask in the backward: each
carries the widest tensor of a Transformer to memory and back. This pass finds, in the joint graph
of forward and backward,

    y  = relu(addmm(b, x, W))            ->  y = _addmm_activation(b, x, W), cuBLASLt's epilogue
    dz = where(y <= 0, 0, mm(dy, V))     ->  dz, sums = masked_product(dy, V, y)
    db = sum(dz, rows)                   ->  db = sums

and puts there what computes the same in one kernel. The model stays the formula, and all transforms
have been applied before: there is no derivative to get wrong. A graph in which the pattern is not
found stays as it is.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from msfs_kernels import masked_product as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

aten = torch.ops.aten
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.detach.default,
)


class InTurn(CustomGraphPass):
    """Several passes as one, which is what Inductor's options take."""

    def __init__(self, *passes: CustomGraphPass):
        self.passes = passes

    def uuid(self) -> Any:
        return tuple(each.uuid() for each in self.passes)

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)


class ReluInProducts(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Args:
        everywhere: rewrite on every device and in every dtype, for tests; else on Hopper GPUs and
            in 16 bits, where it was measured to pay.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        for relu in graph.find_nodes(op="call_function", target=aten.relu.default):
            self.forward(graph, relu)
        for where in graph.find_nodes(op="call_function", target=aten.where.self):
            self.backward(graph, where)
        graph.eliminate_dead_code()

    def forward(self, graph: Graph, relu: Node) -> None:
        product = alone(relu.args[0], aten.addmm.default)
        if product is None or product.kwargs or not self.suits(product):
            return
        bias = arguments(product)[0]
        if bias.meta["val"].ndim != 1:
            return
        with graph.inserting_before(product):
            active = insert(graph, product, aten._addmm_activation.default, *product.args)
        product.replace_all_uses_with(active)
        relu.replace_all_uses_with(arguments(relu)[0])

    def backward(self, graph: Graph, where: Node) -> None:
        found = masked_by_relu(graph, where, aten.mm.default)
        if found is None or not self.suits(found[1]):
            return
        y, product = found
        columns = product.meta["val"].shape[1]
        if not isinstance(columns, int):
            return
        with graph.inserting_before(product):
            y = insert(graph, product, aten.reshape.default, y, [-1, columns])
            pair = insert(graph, product, torch.ops.msfs_kernels.masked_product.default,
                          *product.args, y)  # fmt: skip
            out, sums = (insert(graph, product, operator.getitem, pair, i) for i in (0, 1))
        product.replace_all_uses_with(out)
        where.replace_all_uses_with(arguments(where)[2])
        for total in sums_over_rows(out, columns):
            with graph.inserting_before(total):
                dtype = total.meta["val"].dtype
                new = insert(
                    graph, total, torch.ops.prims.convert_element_type.default, sums, dtype
                )
                if not (len(total.args) > 2 and total.args[2]):
                    new = insert(graph, total, aten.reshape.default, new, [columns])
            total.replace_all_uses_with(new)

    def suits(self, product: Node) -> bool:
        return self.everywhere or on_hopper_in_16_bits(product)


def on_hopper_in_16_bits(node: Node) -> bool:
    value = node.meta["val"]
    if value.device.type != "cuda" or value.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(value.device)[0] == 9


def arguments(call: Any) -> Any:
    return call.args


def is_call(x: Any, target: Any) -> bool:
    return isinstance(x, Node) and x.op == "call_function" and x.target is target


def is_zero(x: Any) -> bool:
    """Whether x is a 0-d tensor of 0, however the graph spells it."""
    if is_call(x, aten.scalar_tensor.default):
        return arguments(x)[0] == 0
    return is_call(x, aten.full.default) and list(arguments(x)[0]) == [] and arguments(x)[1] == 0


def behind_views(x: Any) -> Any:
    while isinstance(x, Node) and x.op == "call_function" and x.target in VIEWS:
        x = x.args[0]
    return x


def alone(x: Any, target: Any) -> Node | None:
    """The call of `target` behind views of x, if nothing else uses it or any of these."""
    while isinstance(x, Node) and x.op == "call_function" and len(x.users) == 1:
        if x.target is target:
            return x
        if x.target not in VIEWS:
            return None
        x = x.args[0]
    return None


def comes_before(graph: Graph, first: Any, second: Node) -> bool:
    if not isinstance(first, Node):
        return False
    for node in graph.nodes:
        if node is first:
            return True
        if node is second:
            return False
    return False


def masked_by_relu(graph: Graph, where: Node, target: Any) -> tuple[Node, Node] | None:
    """(y, product) if `where` is where(y <= 0, 0, product), the product behind views and no one
    else's: what flows back through y = relu(...)."""
    condition, zero, grad = arguments(where)
    if not (is_call(condition, aten.le.Scalar) and is_zero(zero) and arguments(condition)[1] == 0):
        return None
    y, product = behind_views(arguments(condition)[0]), alone(grad, target)
    if product is None or not comes_before(graph, y, product):
        return None
    return (y, product) if y.meta["val"].dtype == product.meta["val"].dtype else None


def sums_over_rows(x: Node, columns: int) -> Iterator[Node]:
    """Sums over dim 0 of x (M, columns), or of views of x that have its shape."""
    for user in list(x.users):
        if user.op != "call_function":
            continue
        flat = x.meta["val"].ndim == 2 and x.meta["val"].shape[1] == columns
        if user.target is aten.sum.dim_IntList and flat:
            if list(arguments(user)[1]) == [0] and not user.kwargs:
                yield user
        elif user.target in VIEWS:
            yield from sums_over_rows(user, columns)


def insert(graph: Graph, like: Node, target: Any, *args: Any) -> Node:
    """A new call that stands for `like` (its place in forward or backward) with its own value."""
    node = graph.call_function(target, args)
    node.meta = dict(like.meta)
    values = [x.meta["val"] if isinstance(x, Node) else x for x in args]
    node.meta["val"] = target(*values)
    for stale in ("tensor_meta", "eager_input_vals"):  # the latter are the arguments of `like`
        node.meta.pop(stale, None)
    return node
