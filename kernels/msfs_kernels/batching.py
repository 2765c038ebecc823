"""vmap of the raw ops: the mapped dim becomes part of one call, its batch or its heads, never a
loop.

N is the size of the mapped dim. As batch, (N, B, ...) is flattened to (N B, ...): a view where the
strides allow it, which they do for every tensor when B is 1, mapped or not. As heads, for mapped
queries against unmapped keys and values with B > 1, the N copies of the R = H / G heads of a kv
head become N R heads: keys and values stay as they are, where a batch would need N copies of them.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

OF_BIAS = ("bias", "tbias", "ubias")
OF_KEYS = ("k", "v", "tk", "tv", "uk", "uv")
OF_OPTIONS = ("key_lengths", "prefix_lengths", "q_segments", "k_segments", "alibi", "rng")


def mapped_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def fits_heads(given: dict[str, Any], dims: dict[str, int | None]) -> bool:
    """Whether only query-side tensors are mapped, and nothing tells one head from another."""
    if "need_dbias" in given or given["alibi"] is not None or given["dropout"] > 0:
        return False
    if any(dims[name] is not None for name in (*OF_BIAS, *OF_KEYS, *OF_OPTIONS) if name in dims):
        return False
    biases = [given[name] for name in OF_BIAS if given.get(name) is not None]
    return given["k"].shape[0] > 1 and all(bias.shape[1] == 1 for bias in biases)


def call_on_heads(op: Callable, given: dict[str, Any], dims: dict[str, int | None], size: int):
    kv_heads = given["k"].shape[1]
    folded = []
    for name, x in given.items():
        if isinstance(x, Tensor) and name not in (*OF_BIAS, *OF_KEYS, *OF_OPTIONS):
            x = mapped_first(x, dims[name], size).unflatten(2, (kv_heads, -1))  # (N, B, G, R, ...)
            x = x.movedim(0, 2).flatten(1, 3)
        folded.append(x)
    results = (x.unflatten(1, (kv_heads, size, -1)) for x in op(*folded))  # (B, G, N, R, ...)
    return tuple(x.movedim(2, 0).flatten(2, 3) for x in results)


def call_on_batch(op: Callable, given: dict[str, Any], dims: dict[str, int | None], size: int):
    own_gradient = given.get("need_dbias", False) and given["bias"] is not None
    batch = given["q"].movedim(dims["q"], 0).shape[1] if dims["q"] is not None else len(given["q"])
    narrow = False  # whether the bias had batch size 1: its gradient is summed back to it
    folded = []
    for name, x in given.items():
        if isinstance(x, Tensor):
            if name in OF_BIAS and dims[name] is None and len(x) == 1 and not own_gradient:
                folded.append(x)  # broadcasts over the folded batch by itself
                continue
            x = mapped_first(x, dims[name], size)
            if name in OF_BIAS and x.shape[1] != batch:
                narrow = narrow or name == "bias"
                x = x.expand(size, batch, *x.shape[2:])
            x = x.flatten(0, 1)
        folded.append(x)
    results = list(op(*folded))
    for i, x in enumerate(results):
        if i < 3 or own_gradient:
            results[i] = x.unflatten(0, (size, batch))
    if narrow and own_gradient:
        results[3] = results[3].sum(1, keepdim=True)
    return tuple(results)


def vmap_rule(op: Callable, names: list[str]) -> Callable:
    """The `vmap` staticmethod of an autograd.Function for an op with these argument names."""

    def rule(info, in_dims, *args):
        given = dict(zip(names, args, strict=True))
        dims = dict(zip(names, in_dims, strict=True))
        call = call_on_heads if fits_heads(given, dims) else call_on_batch
        results = call(op, given, dims, info.batch_size)
        absent = given.get("need_dbias") is False or given["bias"] is None
        return results, tuple(None if i == 3 and absent else 0 for i in range(len(results)))

    return staticmethod(rule)
