"""Parameters as a flat dict of tensors, and models as pure functions of it.

`functional(build, initializers)` turns an `nn.Module` class into two functions:

    init(seed)            -> params     {"encoder.0.self_attention.q.weight": Tensor, ...}
    apply(params, *args)  -> outputs    the module's forward (or any method), reading these params

The dict is a pytree, a state dict and a safetensors file at once. Whatever depends on a parameter's
name (initialiser, weight decay, learning-rate group, freezing, sharding) is an ordered list of
(regex, value): the first regex found in the name wins, a name that none matches is an error.

    [(r"norm\\.weight$", ones), (r"bias$", zeros), ("", xavier_uniform())]
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from msfs_functional import random
from msfs_functional.side_by_side import joined, lay, memory_order, parts

V = TypeVar("V")
Params = dict[str, Tensor]
Rules = Sequence[tuple[str, V]]
Initializer = Callable[..., Tensor]  # (key, shape) or (key, shape, window), see Window


class Window(NamedTuple):
    """A block of a tensor: the elements start[d] <= i[d] < start[d] + size[d].

    An initialiser that takes one as its third argument draws that block of the parameter alone,
    bit-equal to cutting it out of the whole, so that a shard is made without the rest.
    """

    start: tuple[int, ...]
    size: tuple[int, ...]


def block(shape: Sequence[int], window: Window | None, device: torch.device) -> dict[str, Any]:
    """`shape` and `offset` with which `random` draws the window of an array of this shape."""
    if window is None:
        return {"shape": shape, "offset": 0}
    first, whole = 0, True  # whole: the dims so far are cut to at most one index
    contiguous = True
    for size, start, length in zip(shape, window.start, window.size, strict=True):
        first = first * size + start
        contiguous = contiguous and (whole or length == size)
        whole = whole and length == 1
    if contiguous or 0 in window.size:
        return {"shape": window.size, "offset": first if 0 not in window.size else 0}
    flat = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, length in zip(shape, window.start, window.size, strict=True):
        flat = flat[..., None] * size + torch.arange(start, start + length, device=device)
    return {"shape": window.size, "offset": flat}


def match(rules: Rules[V], name: str) -> V:
    """Value of the first rule whose regex is found in `name` (`re.search`).

    Raises:
        ValueError: no rule matches.
    """
    for pattern, value in rules:
        if re.search(pattern, name):
            return value
    patterns = ", ".join(repr(pattern) for pattern, _ in rules) or "(no rules)"
    raise ValueError(
        f"no rule matches parameter {name!r}; rules: {patterns}; add one, or end with a default "
        f'("", value)'
    )


def by_rules(rules: Rules[V], names: Iterable[str], strict: bool = True) -> dict[str, V]:
    """{name: value of its first matching rule}, for params or plain names, in their order.

    Args:
        strict: also refuse a regex that is found in no name at all, which is nearly always a typo.

    Raises:
        ValueError: a name that no rule matches; if strict, a rule that matches no name.
    """
    names = list(names)
    if strict:
        for pattern, _ in rules:
            if not any(re.search(pattern, name) for name in names):
                some = ", ".join(repr(name) for name in names[:8])
                raise ValueError(
                    f"rule {pattern!r} matches none of the {len(names)} parameters ({some}, ...); "
                    f"correct the regex, drop the rule, or pass strict=False"
                )
    return {name: match(rules, name) for name in names}


def constant(value: float) -> Initializer:
    """Every element is `value`."""

    def initialize(key: Tensor, shape: Sequence[int], window: Window | None = None) -> Tensor:
        return torch.full(tuple(window.size if window else shape), value, device=key.device)

    return initialize


zeros = constant(0.0)
ones = constant(1.0)


def normal(std: float) -> Initializer:
    """N(0, std^2)."""

    def initialize(key: Tensor, shape: Sequence[int], window: Window | None = None) -> Tensor:
        return std * random.normal(key, **block(shape, window, key.device))

    return initialize


def truncated_normal(std: float) -> Initializer:
    """N(0, std^2) conditioned on [-2 std, 2 std], by the inverse distribution function."""
    edge = math.erf(2 / math.sqrt(2))

    def initialize(key: Tensor, shape: Sequence[int], window: Window | None = None) -> Tensor:
        part = block(shape, window, key.device)
        x = torch.erfinv(random.uniform(key, low=-edge, high=edge, **part))
        return (std * math.sqrt(2) * x).clamp(-2 * std, 2 * std)

    return initialize


def uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""

    def initialize(key: Tensor, shape: Sequence[int], window: Window | None = None) -> Tensor:
        return random.uniform(key, low=-bound, high=bound, **block(shape, window, key.device))

    return initialize


def variance_scaling(
    scale: float,
    fan: Literal["in", "out", "average"],
    distribution: Literal["normal", "uniform"],
) -> Initializer:
    """Variance scale / fan, where fan counts a weight's inputs, outputs, or their mean.

    A weight is (out, in, *kernel) as in nn.Linear and nn.Conv2d; the kernel's area counts in both.

    Raises:
        ValueError: when it meets a parameter with fewer than two dims.
    """

    def initialize(key: Tensor, shape: Sequence[int], window: Window | None = None) -> Tensor:
        if len(shape) < 2:
            raise ValueError(
                f"shape {tuple(shape)} has no fan: variance scaling needs at least two dims "
                f"(out, in); give biases and gains zeros, ones or normal(std)"
            )
        area = math.prod(shape[2:])
        fan_out, fan_in = shape[0] * area, shape[1] * area
        size = {"in": fan_in, "out": fan_out, "average": (fan_in + fan_out) / 2}[fan]
        std = math.sqrt(scale / max(size, 1))
        return (normal(std) if distribution == "normal" else uniform(std * math.sqrt(3)))(
            key, shape, window
        )

    return initialize


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """U(-a, a) with a = gain sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 16)."""
    return variance_scaling(gain**2, "average", "uniform")


def xavier_normal(gain: float = 1.0) -> Initializer:
    """N(0, 2 gain^2 / (fan_in + fan_out)) (Glorot and Bengio 2010, eq. 12)."""
    return variance_scaling(gain**2, "average", "normal")


def kaiming_uniform(gain: float = math.sqrt(2)) -> Initializer:
    """U(-a, a) with a = gain sqrt(3 / fan_in) (He et al. 2015); the default gain suits ReLU."""
    return variance_scaling(gain**2, "in", "uniform")


def kaiming_normal(gain: float = math.sqrt(2)) -> Initializer:
    """N(0, gain^2 / fan_in) (He et al. 2015, eq. 10); the default gain suits ReLU."""
    return variance_scaling(gain**2, "in", "normal")


class Methods(nn.Module):
    """Lets `functional_call`, which only knows forward, run any method of the skeleton."""

    def __init__(self, skeleton: nn.Module):
        super().__init__()
        self.skeleton = skeleton

    def forward(self, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        return getattr(self.skeleton, method)(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Functional:
    """A model as two pure functions, `init` and `apply`; made by `functional`.

    Attributes:
        skeleton: the module on the meta device; holds shapes and code, never values.
        shapes: {parameter name: shape}; a tensor tied to several places appears once.
        initializers: {parameter name: initialiser}.
    """

    skeleton: nn.Module
    shapes: dict[str, torch.Size]
    initializers: dict[str, Initializer]
    _methods: Methods
    _slots: tuple[
        tuple[str, str], ...
    ]  # (place inside _methods, parameter name); ties repeat names

    def init(
        self,
        seed: int | Int64[Tensor, "2"],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Params:
        """Fresh parameters: each is drawn with fold_in(key, hash of its name).

        So a parameter's values depend on the seed, its name and its shape only, not on the order of
        definition or on what else the model holds. `torch.vmap(model.init)(random.split(key, n))`
        draws n models at once, stacked.

        Args:
            seed: an integer or a key of `random`.
            device: where to draw; default: where the key is.
            dtype: drawn in float32, then cast.
        """
        key = random.key(seed) if isinstance(seed, int) else seed
        if device is not None:
            key = key.to(device)
        return {name: self.draw(name, parameter_key(key, name)).to(dtype) for name in self.shapes}

    def draw(
        self, name: str, key: Int64[Tensor, "2"], window: Window | None = None
    ) -> Float[Tensor, "..."]:
        """One parameter, or a window of it, as its initialiser makes it with this very key."""
        shape, initialize = self.shapes[name], self.initializers[name]
        windowed = window is not None and "window" in signature(initialize).parameters
        value = initialize(key, shape, window=window) if windowed else initialize(key, shape)
        expected = torch.Size(window.size) if windowed and window is not None else shape
        if value.shape != expected:
            raise ValueError(
                f"the initialiser of {name!r} returned shape {tuple(value.shape)}, expected "
                f"{tuple(expected)}"
            )
        if window is None or windowed:
            return value
        return value[tuple(slice(a, a + n) for a, n in zip(*window, strict=True))].clone()

    def apply(self, params: Params, /, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
        """Run the module's `method` with these parameters; pure, so it composes and compiles.

        Raises:
            ValueError: a parameter is missing, extra or misshapen; all of them are named.
        """
        fits = len(params) == len(self.shapes)
        for name, shape in self.shapes.items():
            fits = fits and name in params and params[name].shape == shape
        if not fits:
            raise ValueError(self._misfit(params))
        placed = {slot: params[name] for slot, name in self._slots}
        return functional_call(
            self._methods, placed, (method, args, kwargs), tie_weights=False, strict=False
        )

    def _misfit(self, params: Params) -> str:
        faults = [
            f"missing {name!r} {tuple(s)}" for name, s in self.shapes.items() if name not in params
        ]
        faults += [f"unexpected {name!r}" for name in params if name not in self.shapes]
        faults += [
            f"{name!r} has shape {tuple(params[name].shape)}, expected {tuple(shape)}"
            for name, shape in self.shapes.items()
            if name in params and params[name].shape != shape
        ]
        shown = "; ".join(faults[:8]) + (f"; and {len(faults) - 8} more" if len(faults) > 8 else "")
        return (
            f"params do not fit {type(self.skeleton).__name__}: {shown}; pass what init() returned "
            f"or a checkpoint of the same configuration"
        )


def functional(
    build: Callable[[], nn.Module], initializers: Rules[Initializer], *, strict: bool = True
) -> Functional:
    """A module's pure functions `init` and `apply`; `build` makes it, on the meta device.

    Args:
        build: returns the module; nothing is allocated, what its constructor initialises is lost.
        initializers: rules from parameter names to initialisers.
        strict: refuse a rule that matches no parameter (see `by_rules`).

    Raises:
        ValueError: the module holds buffers or modules that draw random numbers, which a pure
            function cannot have; a parameter that no rule matches.
    """
    with torch.device("meta"):
        skeleton = build()
    kind = type(skeleton).__name__
    for name, _ in skeleton.named_buffers():
        raise ValueError(
            f"{kind} holds the buffer {name!r}, but a pure function keeps no state: compute it in "
            f"forward, make it an nn.Parameter, or pass it in and out as an argument"
        )
    for name, module in skeleton.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(
                f"{kind}.{name} is {module}, whose randomness is hidden: call random.dropout(key, "
                f"x, rate) in forward instead"
            )
    names = {id(value): name for name, value in skeleton.named_parameters()}
    slots = tuple(
        (f"skeleton.{slot}", names[id(value)])
        for slot, value in skeleton.named_parameters(remove_duplicate=False)
    )
    shapes = {name: value.shape for name, value in skeleton.named_parameters()}
    chosen = by_rules(initializers, shapes, strict)
    return Functional(skeleton, shapes, chosen, Methods(skeleton), slots)


def parameter_key(key: Int64[Tensor, "2"], name: str) -> Int64[Tensor, "2"]:
    """The key of one parameter: fold_in(key, hash of its name)."""
    return random.fold_in(key, zlib.crc32(name.encode()))


def count(params: Params) -> int:
    """Number of scalars in `params`."""
    return sum(value.numel() for value in params.values())


class _Cast(torch.autograd.Function):
    """Each tensor in its new dtype; on a GPU one kernel for all instead of one for each."""

    @staticmethod
    def forward(dtypes: Sequence[torch.dtype], lead: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        order = memory_order(tensors, lead) if len(set(dtypes)) == 1 else None
        if order is None:
            copies = [torch.empty_like(x, dtype=to) for x, to in zip(tensors, dtypes, strict=True)]
            torch._foreach_copy_(copies, list(tensors))
            return tuple(copies)
        sorted_ = [tensors[i] for i in order]
        whole: Any = joined(sorted_, lead)
        copies = dict(zip(order, parts(whole.to(dtypes[0]), sorted_, lead), strict=True))
        return tuple(copies[i] for i in range(len(tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        _, ctx.lead, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in tensors]
        ctx.order = memory_order(tensors, ctx.lead)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients lie side by side where what was cast did."""
        found = {i: grad for i, grad in enumerate(grads) if grad is not None}
        if ctx.order is not None and len(found) == len(grads):
            found = {i: found[i] for i in ctx.order}
            found = dict(zip(found, lay(list(found.values()), ctx.lead), strict=True))
        dtypes = [ctx.dtypes[i] for i in found]
        casts: Any = _Cast.apply(dtypes, ctx.lead, *found.values())
        back = dict(zip(found, casts, strict=True))
        return None, None, *[back.get(i) for i in range(len(grads))]

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, dtypes: Sequence[torch.dtype], lead: int, *tensors: Tensor
    ) -> Any:
        lead = lead + 1 if set(in_dims[2:]) == {0} else 0
        return _Cast.apply(dtypes, lead, *tensors), tuple(in_dims[2:])


def forward_mode() -> bool:
    """Whether tangents may be on their way, for which `_Cast` and `layers._Lookup` have no rule."""
    stack = torch._C._functorch.get_interpreter_stack() or []  # pyright: ignore
    jvp = torch._C._functorch.TransformType.Jvp  # pyright: ignore
    return forward_ad._current_level >= 0 or any(level.key() == jvp for level in stack)


def cast(params: Params, dtype: torch.dtype) -> Params:
    """`params` with every floating-point tensor in `dtype`; differentiable, for use in losses."""
    changed = {k: v for k, v in params.items() if v.is_floating_point() and v.dtype != dtype}
    together = (
        changed
        and not torch.compiler.is_compiling()
        and not forward_mode()
        and all(type(x) in (Tensor, nn.Parameter) for x in changed.values())
    )
    if together:
        casts: Any = _Cast.apply([dtype] * len(changed), 0, *changed.values())
        changed = dict(zip(changed, casts, strict=True))
    else:
        changed = {name: value.to(dtype) for name, value in changed.items()}
    return params | changed


def stack(members: Sequence[Params]) -> Params:
    """Members of an ensemble as one dict, each tensor with a new leading dim of len(members).

    Raises:
        ValueError: no members; names or shapes differ.
    """
    if not members:
        raise ValueError("stack needs at least one member, got none")
    first = members[0]
    for i, member in enumerate(members[1:], start=1):
        different = sorted(first.keys() ^ member.keys())
        if different:
            raise ValueError(f"members 0 and {i} differ in the parameters {different[:8]}")
        for name, value in first.items():
            if member[name].shape != value.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(value.shape)} in member 0 and "
                    f"{tuple(member[name].shape)} in member {i}: only equal shapes stack"
                )
    return {name: torch.stack([member[name] for member in members]) for name in first}


def unstack(stacked: Params) -> list[Params]:
    """The inverse of `stack`: a list of dicts of views, one for each index of the leading dim.

    Raises:
        ValueError: the leading dims differ or a tensor has none.
    """
    sizes = {name: value.shape[0] if value.ndim else None for name, value in stacked.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise ValueError(f"stacked params need one common leading dim, got {sizes}")
    columns = {name: value.unbind(0) for name, value in stacked.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def split(params: Params, rules: Rules[bool]) -> tuple[Params, Params]:
    """(selected, rest) by rules of True and False: train one part, keep the other frozen.

    trained, frozen = split(params, [(r"^encoder", False), (r"", True)])
    loss = lambda trained: model.apply(merge(trained, frozen), ...)
    """
    chosen = by_rules(rules, params)
    selected = {name: value for name, value in params.items() if chosen[name]}
    return selected, {name: value for name, value in params.items() if not chosen[name]}


def merge(*parts: Params) -> Params:
    """One dict of all parts.

    Raises:
        ValueError: a name in more than one part.
    """
    merged: Params = {}
    for part in parts:
        twice = merged.keys() & part.keys()
        if twice:
            raise ValueError(
                f"parameters {sorted(twice)[:8]} are in more than one part; parts may not overlap"
            )
        merged.update(part)
    return merged
