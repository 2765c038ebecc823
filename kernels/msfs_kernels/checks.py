"""What can be wrong with a call of flash_attention, found before any kernel starts.

Everything that shapes, dtypes and devices tell is found here, in the public function. Lengths are
values: the CPU kernel checks them (`check_lengths`) before it computes, on other devices looking
would make the host wait.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .dispatch import is_sharded

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
PRECISIONS = ("ieee", "tf32")


def broadcasts(shape: Any, target: Any) -> bool:
    """Whether a tensor of `shape` expands to `target`."""
    missing = len(target) - len(shape)
    return missing >= 0 and all(
        n == 1 or n == m for n, m in zip(shape, target[missing:], strict=True)
    )


def dims(shape: Any) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(x, bool)


def problem_with_inputs(q: Any, k: Any, v: Any) -> str | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            return f"{name} ({type(x).__name__}) must be a tensor"
        if x.ndim < 3:
            return f"{name} {dims(x.shape)} needs at least 3 dims: (..., heads, tokens, head_dim)"
        if x.dtype not in FLOATS:
            return (
                f"{name}'s dtype ({x.dtype}) must be float16, bfloat16, float32 or float64: cast it"
            )
        if x.dtype is not q.dtype:
            return f"q and {name} differ in dtype ({q.dtype}, {x.dtype}): cast them to one"
        if x.device != q.device:
            return f"q and {name} are on different devices ({q.device}, {x.device}): move one"
    if k.shape[-1] != q.shape[-1]:
        return (
            f"q and k differ in head dim ({q.shape[-1]}, {k.shape[-1]}): q.k needs one;"
            " only v's may differ"
        )
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        return f"head dims ({q.shape[-1]} of q and k, {v.shape[-1]} of v) must be at least 1"
    if k.shape[-3] != v.shape[-3]:
        return f"k and v differ in heads ({k.shape[-3]}, {v.shape[-3]}): they need the same"
    if k.shape[-2] != v.shape[-2]:
        return f"k and v differ in tokens ({k.shape[-2]}, {v.shape[-2]}): each key needs one value"
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3] != 0:
        return (
            f"kv heads ({k.shape[-3]}) must divide heads ({q.shape[-3]}): kv head g serves"
            " heads g H/G to (g + 1) H/G - 1"
        )
    lead = q.shape[:-3]
    for name, x in (("k", k), ("v", v)):
        if not broadcasts(x.shape[:-3], lead):
            return (
                f"{name}'s batch dims {dims(x.shape[:-3])} do not broadcast to q's {dims(lead)}:"
                " expand q, or give equal batch dims"
            )
    return None


def problem_with_sharding(q: Tensor, others: dict[str, Any]) -> str | None:
    for name, x in others.items():
        if x is not None and is_sharded(x) != is_sharded(q):
            one, other = ("q", name) if is_sharded(q) else (name, "q")
            return (
                f"{one} is a DTensor and {other} is not: distribute_tensor({other}, mesh, ...)"
                " says which part of it each rank holds"
            )
    return None


def problem_with_numbers(
    scale: Any, window: Any, softcap: Any, dropout: Any, dropout_key: Any, precision: Any
) -> str | None:
    if scale is not None and not is_number(scale):
        return f"scale ({type(scale).__name__}) must be a number: multiply q by a tensor instead"
    if scale is not None and not math.isfinite(scale):
        return f"scale ({scale}) must be finite"
    if window is not None and (not is_number(window) or isinstance(window, float) or window < 1):
        return f"window ({window}) must be an integer of at least 1 token, or None for no window"
    if softcap is not None and not (is_number(softcap) and 0 < softcap < math.inf):
        return f"softcap ({softcap}) must be a positive number, or None for no cap"
    if not is_number(dropout) or not 0 <= dropout < 1:
        return f"dropout ({dropout}) must be in [0, 1): it is the share of weights set to zero"
    if dropout > 0 and dropout_key is None:
        return f"dropout ({dropout}) needs a dropout_key: pass a random key, Int64[2]"
    if dropout > 0 and (
        not isinstance(dropout_key, Tensor)
        or dropout_key.dtype is not torch.int64
        or dropout_key.shape != (2,)
    ):
        return "dropout_key must be a random key, an int64 tensor of shape (2,)"
    if precision not in PRECISIONS:
        return f"precision ({precision!r}) must be one of {', '.join(map(repr, PRECISIONS))}"
    return None


def problem_with_integers(name: str, x: Any, q: Tensor, target: Any, meaning: str) -> str | None:
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        return f"{name} ({kind}) must be an integer tensor"
    if x.device != q.device:
        return f"q and {name} are on different devices ({q.device}, {x.device}): move one"
    if not broadcasts(x.shape, target):
        return f"{name} {dims(x.shape)} must broadcast to {meaning} {dims(target)}"
    return None


def problem_with_masks(
    q: Tensor,
    k: Tensor,
    key_lengths: Any,
    prefix_lengths: Any,
    segment_ids: Any,
    alibi_slopes: Any,
    bias: Any,
) -> str | None:
    lead, (H, T), S = q.shape[:-3], q.shape[-3:-1], k.shape[-2]
    for name, x in (("key_lengths", key_lengths), ("prefix_lengths", prefix_lengths)):
        if x is not None:
            problem = problem_with_integers(name, x, q, lead, "the batch dims")
            if problem is not None:
                return problem
    if segment_ids is not None:
        if not isinstance(segment_ids, tuple) and T != S:
            return (
                f"segment_ids is one tensor, but there are {T} queries and {S} keys:"
                " pass a pair (ids of queries, ids of keys)"
            )
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        if len(pair) != 2:
            return f"segment_ids has {len(pair)} parts: pass (ids of queries, ids of keys)"
        for x, tokens, which in ((pair[0], T, "query"), (pair[1], S, "key")):
            meaning = f"the batch dims and {which} tokens"
            problem = problem_with_integers("segment_ids", x, q, (*lead, tokens), meaning)
            if problem is not None:
                return problem
    for name, x, target, meaning in (
        ("alibi_slopes", alibi_slopes, (*lead, H), "(..., heads)"),
        ("bias", bias, (*lead, H, T, S), "(..., heads, queries, keys)"),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            return f"{name} ({type(x).__name__}) must be a tensor"
        if x.dtype not in FLOATS and not (name == "bias" and x.dtype is torch.bool):
            allowed = "floating point or bool" if name == "bias" else "floating point"
            return f"{name}'s dtype ({x.dtype}) must be {allowed}: cast it"
        if x.device != q.device:
            return f"q and {name} are on different devices ({q.device}, {x.device}): move one"
        if not broadcasts(x.shape, target):
            return f"{name} {dims(x.shape)} must broadcast to {meaning} {dims(target)}"
    return None


MOST_SIGNATURES = 4096
RIGHT: set[tuple] = set()  # signatures in which no problem was found


def plain(x: Any) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def untransformed() -> bool:
    """Whether neither a compiler is about nor torch.func, whose wrappers look like tensors."""
    compiling = torch.compiler.is_compiling()
    return not compiling and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]


def find_problem(
    q: Any,
    k: Any,
    v: Any,
    scale: Any,
    window: Any,
    key_lengths: Any,
    prefix_lengths: Any,
    segment_ids: Any,
    softcap: Any,
    alibi_slopes: Any,
    bias: Any,
    dropout: Any,
    dropout_key: Any,
    precision: Any,
) -> str | None:
    """The first problem as value, rule and remedy, or None.

    Calls with key lengths or no further options are looked at once for each signature: looking
    takes longer than all else that a small call does before its kernel.
    """
    signature = None
    if (
        untransformed()
        and (prefix_lengths is None and segment_ids is None)
        and (key_lengths is None or plain(key_lengths))
        and (alibi_slopes is None and bias is None and dropout_key is None)
        and (window is None and softcap is None and precision == "ieee")
        and (type(dropout) is float and dropout == 0 and (scale is None or type(scale) is float))
        and (plain(q) and plain(k) and plain(v))
    ):
        signature = (
            *(q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
            scale,
            None if key_lengths is None else (key_lengths.shape, key_lengths.dtype),
            None if key_lengths is None else key_lengths.device,
        )
        if signature in RIGHT:
            return None
    problem = (
        problem_with_inputs(q, k, v)
        or problem_with_sharding(q, {"k": k, "v": v, "bias": bias})
        or problem_with_numbers(scale, window, softcap, dropout, dropout_key, precision)
        or problem_with_masks(q, k, key_lengths, prefix_lengths, segment_ids, alibi_slopes, bias)
    )
    if problem is None and signature is not None:
        if len(RIGHT) >= MOST_SIGNATURES:
            RIGHT.clear()
        RIGHT.add(signature)
    return problem


def check_lengths(name: str, lengths: Tensor | None, tokens: int) -> None:
    """Raises for a length outside [0, tokens]; reads the values."""
    if lengths is None or lengths.numel() == 0:
        return
    low, high = (int(x) for x in lengths.aminmax())
    if low < 0 or high > tokens:
        wrong = low if low < 0 else high
        raise ValueError(f"{name} ({wrong}) must be in [0, {tokens}], the number of keys: clamp it")
