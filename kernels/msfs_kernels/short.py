"""The short way of a plain call: no masks beyond causal, a kind that came before, nobody about who
has to see the op. Also of its gradient, and on a GPU of its tangent under one torch.func.jvp.

Checking arguments, choosing tiles and describing launches depend on shapes, strides and scalars
only. The first call of a kind goes the long way while its kernel launches are recorded; from then
on a call is a look-up, the allocation of its results and those launches with other addresses. What
does more than launch kernels on its inputs and results goes the long way always. On the CPU a kind
that is one call of torch's kernel is remembered as that call.
"""

from collections.abc import Callable, Sequence
from typing import Any

# pyright: reportAttributeAccessIssue=false
import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu, ops
from .dispatch import KERNELS, call, is_lazy, traced
from .forward_mode import in_forward_mode, tangent_of
from .options import Options

MOST = 4096  # kinds of calls that are remembered


def empty(shape: tuple, stride: tuple, dtype: torch.dtype) -> Tensor:
    """torch.empty_strided on the current device."""
    return torch.empty_strided(shape, stride, dtype=dtype, device="cuda")


# What Inductor's code allocates by: the same without the dispatcher and a parser of arguments.
allocate = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", empty)


class Replay:
    """Recorded launches, on other tensors of the same shapes, strides and alignment."""

    def __init__(self, launches: list[tuple[Any, list[int]]], made: list[tuple], results: int):
        self.launches, self.results = launches, results
        # Tuples, where torch.Size would not do for `allocate`.
        self.made = [(tuple(shape), tuple(stride), dtype) for shape, stride, dtype, _ in made]
        self.device_index = made[0][3].index
        self.options = Options()  # of a forward
        self.backwards: dict[tuple, Replay] = {}  # of a forward

    def here(self) -> bool:
        """Whether the current device is the one that this was recorded on."""
        return self.device_index == torch._C._cuda_getDevice()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        made: list = [allocate(*facts) for facts in self.made]
        tensors = (*inputs, *made, None)
        for prepared, numbers in self.launches:
            prepared.run([tensors[n] for n in numbers])
        return made[: self.results]


class OneCall:
    """A forward on the CPU that is one call of torch's kernel, as its gradient is."""

    def __init__(self, options: Options):
        self.options = options

    def here(self) -> bool:
        return True

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cpu.plain_forward(q, k, v, self.options)


def facts(x: Tensor) -> tuple:
    return x.shape, x.stride(), x.dtype, x.device


def record(
    kernel: Callable, inputs: Sequence[Tensor], scratch: torch.Size | None = None
) -> tuple[Any, Any]:
    """kernel()'s results, and their Replay if it only launches kernels on the inputs, its results
    and uninitialised tensors (of the shape `scratch`, if given: others it fills); else None.
    """
    from .launching import recorded

    with recorded() as launches:
        results = kernel()
    outputs = [x for x in results if x is not None and x.numel() > 0]
    known = [*inputs, *outputs]
    places = {x.data_ptr(): n for n, x in enumerate(known)}
    if len(places) < len(known):  # one tensor twice: which is which?
        return results, None
    found, touched = [], set()
    for prepared, tensors in launches:
        numbers = []
        for x in tensors:
            if x is None:
                numbers.append(-1)
                continue
            number = places.get(x.data_ptr())
            if number is None and (scratch is None or x.shape == scratch):
                number = places[x.data_ptr()] = len(known)
                known.append(x)
            if number is None or facts(x) != facts(known[number]):
                return results, None
            numbers.append(number)
        if prepared is None:
            return results, None
        touched.update(numbers)
        found.append((prepared, numbers))
    first = len(inputs)
    if not outputs or not touched.issuperset(range(first, first + len(outputs))):
        return results, None
    return results, Replay(found, [facts(x) for x in known[first:]], len(outputs))


REPLAYS: dict[tuple, Replay | OneCall] = {}  # forwards by kind
DUALS: dict[tuple, Replay] = {}  # forwards with their tangents


def remember(replays: dict, kind: tuple, replay: Replay | OneCall | None) -> None:
    if replay is not None:
        if len(replays) >= MOST:
            replays.clear()
        replays[kind] = replay


def are_plain(*tensors: Any) -> bool:
    """Whether these are aligned tensors of torch itself on a GPU."""
    addresses = 0
    for x in tensors:
        if type(x) is not Tensor or not x.is_cuda or is_lazy(x):
            return False
        addresses |= x.data_ptr()
    return addresses % 16 == 0


def are_plain_on_cpu(*tensors: Any) -> bool:
    for x in tensors:
        if type(x) is not Tensor or not x.is_cpu:
            return False
    return True


def alone() -> bool:
    """Whether nobody is about who has to see the op: no tracer, no transform, no dual level."""
    return not (
        traced()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def kind_of(q: Any, k: Any, v: Any, *scalars: Any) -> tuple | None:
    """What the launch depends on but for addresses; None where this way is closed."""
    plain = alone() and (are_plain(q, k, v) or are_plain_on_cpu(q, k, v))
    return kind_of_plain(q, k, v, *scalars) if plain else None


def kind_of_plain(q: Tensor, k: Tensor, v: Tensor, *scalars: Any) -> tuple:
    return (
        *(q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride()),
        *(q.dtype, k.dtype, v.dtype, q.device, k.device, v.device),
        *scalars,
    )


def plain_options(head_dim: int, scalars: tuple) -> Options:
    """Of (is_causal, scale, precision, deterministic), as flash_attention takes them."""
    is_causal, scale, precision, deterministic = scalars
    options = Options(causal=is_causal, scale=head_dim**-0.5 if scale is None else scale)
    return options._replace(precision=precision, deterministic=deterministic)


class PlainAttention(torch.autograd.Function):
    """The rule of `attention` for a replayed forward: a few arguments in place of seventeen."""

    @staticmethod
    def forward(ctx, q, k, v, replay):
        o, lse = replay(q, k, v)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.set_materialize_grads(False)
        ctx.replay = replay
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, o, lse = ctx.saved_tensors
        of_forward = ctx.replay
        short = dlse is None and not torch.is_grad_enabled() and alone()
        if do is not None and short and type(of_forward) is OneCall and are_plain_on_cpu(do):
            return *cpu.plain_backward(do, q, k, v, o, lse, of_forward.options), None
        rest = (None, o, lse, *of_forward.options[1:], False)
        if do is None or not (short and are_plain(do, q, k, v, o, lse)):
            do = o.new_zeros(()).expand(o.shape) if do is None else do
            dq, dk, dv, _ = call("attention_backward", do, dlse, q, k, v, *rest)
            return dq, dk, dv, None
        kind = (do.stride(), do.dtype)
        replay = of_forward.backwards.get(kind)
        if replay is not None and replay.here():
            return *replay(do, q, k, v, o, lse), None

        def kernel():
            return KERNELS["attention_backward"](do, None, q, k, v, *rest)[:3]

        (dq, dk, dv), replay = record(kernel, (do, q, k, v, o, lse), lse.shape)
        remember(of_forward.backwards, kind, replay)
        return dq, dk, dv, None


# Function.apply of C++: what Python's does before it is for torch.func, which is not about here.
apply_plain_attention: Any = super(torch.autograd.Function, PlainAttention).apply


def attention(q: Tensor, k: Tensor, v: Tensor, kind: tuple) -> Sequence[Tensor] | None:
    """(o, lse) of a plain call whose kind is known, or None."""
    replay = REPLAYS.get(kind)
    if replay is None or not replay.here():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return apply_plain_attention(q, k, v, replay)
    return replay(q, k, v)


def remembered_attention(q: Tensor, k: Tensor, v: Tensor, kind: tuple, options: Options) -> Any:
    """The op's (o, lse), the long way; recorded for the next call of this kind."""
    if ops.backend(q, v) is cpu:
        as_given = (q.shape, k.shape, v.shape) == kind[:3]
        if as_given and cpu.in_one_call(q, k, v, options):
            remember(REPLAYS, kind, OneCall(options))
        return call("attention", q, k, v, *options)
    outputs, replay = record(lambda: call("attention", q, k, v, *options), (q, k, v))
    if replay is not None:
        replay.options = options
    remember(REPLAYS, kind, replay)
    return outputs


def attention_in_forward_mode(
    whole: Callable[..., Any], q: Any, k: Any, v: Any, scalars: tuple, return_lse: bool
) -> Any:
    """What flash_attention, which is `whole`, returns under one torch.func.jvp with tangents of q,
    k and v, replayed; None where this way is closed.
    """
    if (
        traced()
        or torch._C._functorch.get_dynamic_layer_stack_depth() != 1
        or not in_forward_mode()
    ):
        return None
    level = torch._C._functorch.maybe_current_level()
    unwrap = torch._C._functorch._unwrap_for_grad
    x = [unwrap(y, level) if isinstance(y, Tensor) else y for y in (q, k, v)]
    if not are_plain(*x):
        return None
    t = [tangent_of(y) for y in (q, k, v)]
    if any(y is None for y in t):
        return None
    t = [unwrap(y, level) for y in t]
    if not are_plain(*t) or any(y.requires_grad for y in (*x, *t)):
        return None
    kind = (*(y.stride() for y in t), *(y.dtype for y in t), *kind_of_plain(*x, *scalars))
    layer = torch._C._functorch.pop_dynamic_layer_stack()
    try:
        replay = DUALS.get(kind)
        if replay is not None and replay.here():
            results = replay(*t, *x)
        else:
            names = ("is_causal", "scale", "precision", "deterministic")
            if any(y.ndim != 4 or y.shape[0] != x[0].shape[0] for y in x):
                return None
            whole(*x, **dict(zip(names, scalars, strict=True)))  # looks at the arguments
            dual = getattr(ops.backend(x[0], x[2]), "dual", None)
            if dual is None:
                return None
            options = plain_options(x[0].shape[-1], scalars)
            results, replay = record(lambda: dual(*t, *x, options), (*t, *x))
            remember(DUALS, kind, replay)
    finally:
        torch._C._functorch.push_dynamic_layer_stack(layer)
    make_dual, at = torch._VF._make_dual, forward_ad._current_level
    o, lse, to, tlse = results
    o = make_dual(o, to, level=at)
    return (o, make_dual(lse, tlse, level=at)) if return_lse else o
