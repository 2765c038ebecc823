"""One level of torch.func.jvp by an op's own rule, without torch's machinery for Functions.

Under torch.func.jvp an autograd.Function costs a new class, a dozen walks over trees of arguments
and two more calls through the dispatcher, a millisecond for an attention that takes a tenth of one.
What has to happen is little: take primals and tangents out of their wrappers, call the op and its
rule one level below, and pair the results. Whatever is below (vmap, grad, another jvp, DTensors,
nothing) is met there by `dispatch.call` as it is anywhere else.
"""

from collections.abc import Callable
from typing import Any

# pyright: reportAttributeAccessIssue=false
import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import JvpInterpreter
from torch.autograd import forward_ad


class Context:
    """What a rule's setup_context writes and its jvp reads."""

    saved_tensors: tuple = ()

    def set_materialize_grads(self, _: bool) -> None:
        pass

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward


def in_forward_mode() -> bool:
    """Whether torch.func.jvp is the innermost transform, and its forward mode is on."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return (
        interpreter is not None
        and interpreter.key() == torch._C._functorch.TransformType.Jvp
        and forward_ad._is_fwd_grad_enabled()
    )


def tangent_of(x: Tensor) -> Tensor | None:
    """forward_ad.unpack_dual(x).tangent, in a tenth of the time."""
    return torch._VF._unpack_dual(x, level=forward_ad._current_level)[1]


def is_dual(x: Any) -> bool:
    """Of forward_ad.dual_level: within torch.func.jvp, which has a level of its own and lets no
    other in, what lies below its wrappers is never dual.
    """
    return isinstance(x, Tensor) and eager_transforms.JVP_NESTING == 0 and tangent_of(x) is not None


def pair(x: Any, level: int) -> tuple[Any, Tensor | None]:
    """(primal, tangent or None), both of the level below."""
    if not isinstance(x, Tensor):
        return x, None
    unwrap = torch._C._functorch._unwrap_for_grad
    tangent = tangent_of(x)
    return unwrap(x, level), None if tangent is None else unwrap(tangent, level)


def call_in_forward_mode(call: Callable, rule: Any, name: str, args: tuple) -> Any:
    """call(name, *args) and its tangents, where `in_forward_mode`."""
    interpreter = JvpInterpreter(torch._C._functorch.peek_interpreter_stack())
    level = interpreter.level()
    primals, tangents = zip(*(pair(x, level) for x in args), strict=True)
    with interpreter.lower():
        results = call(name, *primals)
        if all(t is None for t in tangents):
            return results
        ctx = Context()
        rule.setup_context(ctx, primals, results)
        moves = rule.jvp(ctx, *tangents)
    make_dual, at = torch._VF._make_dual, forward_ad._current_level
    return tuple(
        x if t is None else make_dual(x, t, level=at) for x, t in zip(results, moves, strict=True)
    )
