"""Calling a raw op, past PyTorch's dispatcher where nothing stands in it that has to see the call.

A dispatcher that enters Python twice (Autograd, then the device's kernel) costs more than all the
rest of a small call. Where no transform, mode, tracer or tensor subclass is about, the kernel is
called as the function that it is; under torch.func.jvp, the op's rule is (forward_mode.py).
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

# pyright: reportAttributeAccessIssue=false
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .forward_mode import call_in_forward_mode, in_forward_mode, is_dual
from .options import OPS

KERNELS: dict[str, Callable] = {}  # the function behind each op, for CPU and CUDA alike
RULES: dict[str, Any] = {}  # the autograd.Function of each op
DIRECT_RULES: dict[str, Any] = {}  # autograd.Functions around the bare kernel


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor, also within torch.func's wrappers; imports nothing to find out."""
    if not torch.compiler.is_compiling():
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
    return type(x).__name__ == "DTensor"


def mixing_dtensors(args: Sequence[Any]) -> AbstractContextManager:
    """Lets plain options (lengths, keys: equal on every rank) stand beside DTensors, replicated."""
    if not any(type(x).__name__ == "DTensor" for x in args):
        return nullcontext()
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def traced() -> bool:
    """Whether a compiler, a tracer or another mode is active."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def is_lazy(x: Tensor) -> bool:
    """Whether x's memory does not hold its numbers: `.imag` of a conjugate reads as its negative,
    and torch has tangents of zeros without memory. The dispatcher makes them what they read as.
    """
    return x.is_neg() or x._is_zerotensor()


def call(name: str, *args: Any) -> Any:
    """torch.ops.msfs_kernels.<name>(*args)."""
    if traced():
        return getattr(OPS, name)(*args)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        if in_forward_mode():
            return call_in_forward_mode(call, RULES[name], name, args)
        return getattr(OPS, name)(*args)
    if forward_ad._current_level >= 0 and any(is_dual(x) for x in args):
        return getattr(OPS, name)(*args)
    grad_enabled = torch.is_grad_enabled()
    needs_grad = False
    for x in args:
        if isinstance(x, Tensor):
            plain = type(x) is Tensor or type(x) is torch.nn.Parameter
            if not plain or not (x.is_cpu or x.is_cuda) or is_lazy(x):
                return getattr(OPS, name)(*args)
            needs_grad = needs_grad or (grad_enabled and x.requires_grad)
    if not needs_grad:
        return KERNELS[name](*args)
    if name in DIRECT_RULES:
        return DIRECT_RULES[name].apply(*args)
    return getattr(OPS, name)(*args)
