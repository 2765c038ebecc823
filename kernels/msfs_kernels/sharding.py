"""The raw ops on DTensors: sharded by batch or by heads, replicated otherwise.

Importing this module registers the rules; flash_attention does so when it first meets a DTensor. On
one mesh dim:

    batch     every tensor on its first dim; what has batch size 1 (a bias) stays replicated, its
    gradient is partial
    heads     queries and keys on their heads, when the shards keep kv groups whole; what is kept
    for each batch row
              (lengths, segments) stays replicated

Meshes of several dims combine these. Random keys are made for each batch row and head, with the
head's number, before they are sharded, so that dropout gives the mask of one process.

What torch itself cannot, the plain formula included: the tangent of a gradient (jvp of grad) over
DTensors. `grad` of `jvp` is the same product with the Hessian and works, and so does a function of
local tensors under `torch.distributed.tensor.experimental.local_map`.
"""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from .batching import OF_BIAS, OF_OPTIONS
from .options import OPS

PER_ROW = tuple(name for name in OF_OPTIONS if name not in ("alibi", "rng"))  # no dim of heads
OPS_OF_ATTENTION = (
    "attention",
    "attention_backward",
    "attention_tangent",
    "attention_second_backward",
    "attention_second_tangent",
)


def head_shards(spec: Any) -> int:
    """Into how many parts a (B, heads, ...) is sharded by heads now."""
    placements = enumerate(spec.placements)
    return math.prod(spec.mesh.size(i) for i, p in placements if p.is_shard(1))


def strategies(op: Any):
    names = [argument.name for argument in op._schema.arguments]
    results = [result.name for result in op._schema.returns]

    def placements(*args):
        given = dict(zip(names, args, strict=True))
        # A pair is (placements of the results, placements of the arguments); numbers have None.
        replicated = (
            [Replicate()] * len(results),
            [Replicate() if is_tensor(x) else None for x in args],
        )
        choices = [replicated, by_batch(given, results)]
        shards = max(head_shards(given["q"]), head_shards(given["k"]))
        drops_by_head = given["rng"] is None or given["rng"].ndim == 3
        if shards > 1 and given["k"].shape[1] % shards == 0 and drops_by_head:
            choices.append(by_heads(given, results))
        return choices

    return placements


def is_tensor(x: Any) -> bool:
    return hasattr(x, "placements")


def of_dbias(given: dict[str, Any], dim: int):
    """dbias is empty where not asked for; a sum over shards of a dim that the bias broadcasts."""
    if given["bias"] is None or not given["need_dbias"]:
        return Replicate()
    return Partial() if given["bias"].shape[dim] == 1 else Shard(dim)


def by_batch(given: dict[str, Any], results: list[str]):
    arguments = [
        None
        if not is_tensor(x)
        else Replicate()
        if name in OF_BIAS and x.shape[0] == 1
        else Shard(0)
        for name, x in given.items()
    ]
    return [of_dbias(given, 0) if name == "dbias" else Shard(0) for name in results], arguments


def by_heads(given: dict[str, Any], results: list[str]):
    arguments = [
        None
        if not is_tensor(x)
        else Replicate()
        if name in PER_ROW
        or (name in OF_BIAS and x.shape[1] == 1)
        or (name == "rng" and x.ndim == 2)
        else Shard(1)
        for name, x in given.items()
    ]
    return [of_dbias(given, 1) if name == "dbias" else Shard(1) for name in results], arguments


for name in OPS_OF_ATTENTION:
    overload = getattr(OPS, name).default
    register_sharding(overload)(strategies(overload))


def same_local_storage(op: Any, args: tuple, kwargs: dict) -> bool:
    """aten._has_same_storage_numel, which forward mode asks and for which DTensor has no rule."""
    return op(*(x.to_local() if isinstance(x, DTensor) else x for x in args), **kwargs)


def refuse_tangents_of_gradients(op: Any, args: tuple, kwargs: dict) -> Any:
    """aten.to.dtype_layout, which tangents of torch's own gradients ask for: by the last letters of
    its name, DTensor takes it for an op that writes to `out`.
    """
    raise NotImplementedError(
        "torch cannot take the tangent of a gradient (jvp of grad) over DTensors: its DTensor has"
        " no rule for aten.to.dtype_layout. Take grad of jvp, which is the same Hessian-vector"
        " product, or wrap the function in torch.distributed.tensor.experimental.local_map"
    )


for op, handler in (
    (torch.ops.aten._has_same_storage_numel.default, same_local_storage),
    (torch.ops.aten.to.dtype_layout, refuse_tangents_of_gradients),
):
    DTensor._op_dispatcher._custom_op_handlers.setdefault(op, handler)
