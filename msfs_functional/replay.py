"""A function of parameters and tensors as one CUDA graph, for networks called many times over.

predict_fn = replayed(torch.compile(predict))   # predict(params, x, t, context) -> tensor

A replay is one launch where a compiled UNet of Stable Diffusion needs about a thousand, which take
the host longer than a small batch takes the GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor


@dataclass
class Recording:
    """A graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    params: Mapping[str, Tensor]
    args: tuple[Any, ...]
    given: list[Any]  # what the arguments' memory holds
    out: Tensor


def replayed(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fn(params, *args), one graph for each set of shapes and parameters.

    The first call with some shapes runs fn as it is (and compiles it), the second is recorded, the
    later ones replay. Arguments are copied into the graph's memory and the result out of it;
    parameters are read where they lie, so what is written into them in place is seen. Without a
    gradient, and on a GPU; anywhere else it is fn.

    Args:
        fn: of parameters and of tensors or pytrees of tensors, the first a tensor. A pytree is
            copied if it is another object than in the call before: what does not change from step
            to step (keys and values of a prompt) costs nothing, and is not to be written into.
    """
    recordings: dict[object, Recording | None] = {}

    def run(params: Mapping[str, Tensor], *args: Any) -> Tensor:
        if not args[0].is_cuda or torch.is_grad_enabled():
            return fn(params, *args)
        where = tuple(value.data_ptr() for value in params.values())
        key = where, tuple((x.shape, x.stride(), x.dtype) for x in optree.tree_leaves(args))  # pyright: ignore
        if key not in recordings:
            recordings[key] = None
            return fn(params, *args)
        found = recordings[key]
        if found is None:
            own: Any = optree.tree_map(torch.clone, args)  # pyright: ignore[reportArgumentType]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = fn(params, *own)
            recordings[key] = found = Recording(graph, params, own, list(args), out)
        for i, (mine, given) in enumerate(zip(found.args, args, strict=True)):
            if isinstance(given, Tensor):
                mine.copy_(given, non_blocking=True)
            elif given is not found.given[i]:
                optree.tree_map_(Tensor.copy_, mine, given)
            found.given[i] = given if not isinstance(given, Tensor) else None
        found.graph.replay()
        return found.out.clone()

    return run
