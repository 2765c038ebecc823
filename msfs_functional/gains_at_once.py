"""Graph rewriting: a block's two gains go into their matrices, and come back, by one kernel each.

    w0' = w0 * g0, w1' = w1 * g1      ->   scaled_columns(w0, g0, w1, g1)
    their gradients                   ->   scaled_columns_gradient(dw0', w0, g0, dw1', w1, g1)

Found in the joint graph of forward and backward, where all transforms have been applied before; a
graph in which the pattern is not found, twice, stays as it is. The pattern is what torch itself
makes of the formula and of its derivative, traced anew (as in `gelu_in_products`).
"""

import functools
import operator
from typing import Any

import torch
from msfs_kernels import scaled_columns as kernel
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx

from msfs_functional.epilogues import arguments, behind_views, insert
from msfs_functional.gelu_in_products import matched

aten = torch.ops.aten
OPS = torch.ops.msfs_kernels
CONVERT = torch.ops.prims.convert_element_type.default
Pairs = dict[Node, tuple[Node, Node]]


class GainsAtOnce(CustomGraphPass):
    """The pass, for Inductor's option `joint_custom_pre_pass`.

    Args:
        everywhere: rewrite on every device, for tests; else on GPUs.
    """

    def __init__(self, everywhere: bool = False):
        self.everywhere = everywhere

    def uuid(self) -> Any:
        return get_hash_for_files((__file__, str(kernel.__file__)), str(self.everywhere))

    def __call__(self, graph: Graph) -> None:
        forward = [one for one in self.found(graph, 0) if is_scaled(*one[1])]
        if len(forward) != 2 or len({inputs[0].meta["val"].shape[1] for _, inputs in forward}) > 1:
            return
        # by gain: (matrix, result) forward, (gradient of the result, what flows back) backward
        scaled = {inputs[1]: (inputs[0], out) for out, inputs in forward}
        dw = {g: (d, out) for out, (d, g) in self.found(graph, 1) if g in scaled}
        gain_of = {w: g for g, (w, _) in scaled.items()}
        dg = {gain_of[w]: (d, out) for out, (d, w) in self.found(graph, 2) if w in gain_of}
        same = all(dw[g][0] is dg[g][0] for g in dw.keys() & dg.keys())
        if same and len(scaled) == len(gain_of) == 2 and dw.keys() == dg.keys() == scaled.keys():
            rewrite(graph, scaled, dw, dg)

    def found(self, graph: Graph, which: int) -> list[tuple[Node, tuple[Node, ...]]]:
        """(result, inputs) of every place where part `which` of the pattern stands."""
        places = []
        for node in graph.find_nodes(op="call_function", target=CONVERT):
            value = node.meta["val"]
            if value.dtype is not torch.bfloat16 or value.ndim != (1 if which == 2 else 2):
                continue
            result = behind_views(arguments(node)[0]) if which == 2 else node
            inputs = matched(result, *pattern(which)) if self.everywhere or value.is_cuda else None
            if inputs is not None:
                places.append((node, inputs))
        return places


def rewrite(graph: Graph, scaled: Pairs, dw: Pairs, dg: Pairs) -> None:
    place = {node: i for i, node in enumerate(graph.nodes)}
    old = [out for pairs in (dw, dg) for _, out in pairs.values()]
    last = max(old, key=place.__getitem__)
    if any(place[user] < place[last] for out in old for user in out.users):
        return
    first = min((out for _, out in scaled.values()), key=place.__getitem__)
    with graph.inserting_before(first):
        args = [x for g, (w, _) in scaled.items() for x in (w, g)]
        both = insert(graph, first, OPS.scaled_columns.default, *args)
        outs = [insert(graph, first, operator.getitem, both, i) for i in (0, 1)]
    for (_, out), new in zip(scaled.values(), outs, strict=True):
        out.replace_all_uses_with(new)
    with graph.inserting_before(last):
        args = [x for g, (w, _) in scaled.items() for x in (dw[g][0], w, g)]
        all_three = insert(graph, last, OPS.scaled_columns_gradient.default, *args)
        *grads, parts = (insert(graph, last, operator.getitem, all_three, i) for i in range(3))
        sums = insert(graph, last, aten.sum.dim_IntList, parts, [0])
        for i, (g, grad) in enumerate(zip(scaled, grads, strict=True)):
            own = insert(graph, last, aten.select.int, sums, 0, i)
            dtype = dg[g][1].meta["val"].dtype
            own = insert(graph, last, CONVERT, own, dtype)
            dw[g][1].replace_all_uses_with(grad)
            dg[g][1].replace_all_uses_with(own)
    graph.eliminate_dead_code()


def is_scaled(w: Node, g: Node) -> bool:
    """Whether these are a matrix that the graph is given, and a number for each of its columns."""
    return w.op == g.op == "placeholder" and g.meta["val"].shape == w.meta["val"].shape[1:]


@functools.cache
def pattern(which: int) -> tuple[Node, tuple[Node, ...]]:
    """What torch makes of w * g (0), and of what flows back from its gradient d to w (1) and, as a
    row and not rounded yet, to g (2): the result and (w, g), (d, g) or (d, w)."""

    def value(w: Tensor, g: Tensor) -> Tensor:
        return (w * g.float()).to(w.dtype)

    def to_matrix(d: Tensor, g: Tensor) -> Tensor:
        return (d.float() * g.float()).to(d.dtype)

    def to_gain(d: Tensor, w: Tensor) -> Tensor:
        return (d.float() * w).sum(0, keepdim=True)

    d, w, g = (torch.empty(size, dtype=torch.bfloat16) for size in ((3, 2), (3, 2), (2,)))
    fn, args = ((value, (w, g)), (to_matrix, (d, g)), (to_gain, (d, w)))[which]
    graph = make_fx(fn, select_decomp_table(), tracing_mode="fake")(*args).graph
    result: Any = graph.output_node().args[0]
    return result, tuple(graph.find_nodes(op="placeholder"))
