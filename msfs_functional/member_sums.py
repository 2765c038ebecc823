"""Graph rewriting: gradients of an ensemble's biases and norms are sums over rows by a kernel.

    sum(x, rows)                                     ->  sum(members_sums(x), parts)
    sum(dy, rows), sum(dy (x - mean) rstd, rows)     ->  sum(members_norm_sums(dy, x, ...), parts)

for x (N, ..., D), N members. Inductor sums a single model's rows fast enough; with members in the
first dim its reductions take several times as long as reading does (`msfs_kernels.members_sums`).
"""

from typing import Any

import torch
from msfs_kernels import members_sums as kernel
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from msfs_functional.epilogues import (
    arguments,
    comes_before,
    insert,
    is_call,
    on_hopper_in_16_bits,
)

aten, prims, OPS = torch.ops.aten, torch.ops.prims, torch.ops.msfs_kernels
CASTS = prims.convert_element_type.default, aten._to_copy.default, aten.clone.default
FEW = 512  # rows of a member; so few are summed in no time


class MemberSums(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Args:
        everywhere: rewrite on every device, in every dtype and however few the rows, for tests;
            else on Hopper GPUs and in 16 bits.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        sums = [
            total
            for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)
            if self.suits(total)
        ]
        for total in list(sums):
            found = of_a_norm(arguments(total)[0])
            if found is not None and self.join(graph, total, sums, *found):
                sums.remove(total)
        for total in sums:
            if total.users:
                self.plain(graph, total)
        graph.eliminate_dead_code()

    def suits(self, total: Node) -> bool:
        """Whether `total` is a sum over all dims but the first and the last."""
        value = arguments(total)[0].meta["val"]
        if value.ndim < 3 or not all(isinstance(n, int) for n in value.shape):
            return False
        dims = sorted(dim % value.ndim for dim in arguments(total)[1])
        if dims != list(range(1, value.ndim - 1)) or total.kwargs or value.shape[0] == 1:
            return False
        many = value.shape[1:-1].numel() >= FEW and on_hopper_in_16_bits(total)
        return value.is_floating_point() and (self.everywhere or many)

    def plain(self, graph: Graph, total: Node) -> None:
        x = arguments(total)[0]
        with graph.inserting_before(total):
            parts = insert(graph, total, OPS.members_sums.default, by_rows(graph, total, x, 3))
            settle(graph, total, insert(graph, total, aten.sum.dim_IntList, parts, [1]))

    def join(self, graph: Graph, total: Node, sums: list[Node], dy: Node, *norm: Node) -> bool:
        """Gradients of gain (`total`) and, if it is there, bias, by one kernel."""
        same = [other for other in sums if arguments(other)[0] is dy and other is not total]
        first = min([total, *same], key=list(graph.nodes).index)
        if not all(comes_before(graph, x, first) for x in norm):
            return False
        with graph.inserting_before(first):
            args = [
                by_rows(graph, first, x, n) for x, n in zip((dy, *norm), (3, 3, 2, 2), strict=True)
            ]
            parts = insert(graph, first, OPS.members_norm_sums.default, *args)
            both = insert(graph, first, aten.sum.dim_IntList, parts, [2])
            grads = [insert(graph, first, aten.select.int, both, 0, i) for i in (0, 1)]
            settle(graph, total, grads[1])
            for other in same:
                settle(graph, other, grads[0])
        return True


def of_a_norm(x: Any) -> tuple[Node, Node, Node, Node] | None:
    """(dy, x, mean, rstd) of x = dy ((x - mean) rstd)."""
    if not is_call(x, aten.mul.Tensor):
        return None
    for dy, normed in (arguments(x), arguments(x)[::-1]):
        scaled = behind_casts(normed)
        if not is_call(scaled, aten.mul.Tensor) or not isinstance(dy, Node):
            continue
        centred, rstd = arguments(scaled)
        if not is_call(centred, aten.sub.Tensor) or len(arguments(centred)) != 2:
            continue
        value, mean = behind_casts(arguments(centred)[0]), arguments(centred)[1]
        shapes = [s.meta["val"].shape for s in (dy, value)]
        stats = [s.meta["val"].shape if isinstance(s, Node) else None for s in (mean, rstd)]
        if shapes[0] == shapes[1] and stats == [(*shapes[0][:-1], 1)] * 2:
            return dy, value, mean, rstd
    return None


def behind_casts(x: Any) -> Any:
    while any(is_call(x, cast) for cast in CASTS):
        x = arguments(x)[0]
    return x


def by_rows(graph: Graph, like: Node, x: Node, ndim: int) -> Node:
    """x (N, ..., D) as (N, M, D), or (N, ..., 1) as (N, M)."""
    shape = x.meta["val"].shape
    to = [shape[0], shape[1:-1].numel(), shape[-1]][:ndim]
    return insert(graph, like, aten.reshape.default, x, to)


def settle(graph: Graph, total: Node, found: Node) -> None:
    """`found` takes the place of `total`, in its dtype and shape."""
    value = total.meta["val"]
    cast = insert(graph, total, prims.convert_element_type.default, found, value.dtype)
    new = insert(graph, total, aten.reshape.default, cast, list(value.shape))
    total.replace_all_uses_with(new)
