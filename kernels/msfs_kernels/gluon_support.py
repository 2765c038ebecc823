"""Where the Gluon kernels take over from the plain Triton kernels, and where they step back.

They do the common case on one generation of chips: 16-bit inputs of head dim 64 or 128 (the
forward: 40 and 80, too), causal or full, any lengths, strides and head groups, on Hopper, with a
Triton that can compile them (Gluon is young and renames things). All else is the plain kernels'
work.
"""

import functools
import warnings
from typing import Any

import torch
import triton
from torch import Tensor

from msfs_kernels import triton_decode, triton_forward
from msfs_kernels.launching import INTERPRETED, TENSOR_OPTIONS, Launch
from msfs_kernels.options import Options
from msfs_kernels.triton_common import tma_ready

gluon_forward: Any = None
gluon_dual: Any = None
try:
    from msfs_kernels import gluon_dual, gluon_forward
except (ImportError, AttributeError):  # a Triton without Gluon, or with other names
    pass

# (head dim, causal), kernels/LOG.md
FASTER = {(40, False), (64, False), (80, False), (128, False), (128, True)}
FASTER_DUAL = {(64, False), (64, True), (128, False), (128, True)}


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options
) -> Launch:
    """The forward launch for these tensors: Gluon's kernel where it can do the work and is faster.

    `launching.launch` remembers the answer for each shape.
    """
    if (q.shape[-1], options.causal) in FASTER and suits(q, k, v, options):
        return gluon_forward.plan_forward(q, k, v, o, lse, options)
    return triton_forward.plan_forward(q, k, v, o, lse, options)


def dual_is_faster(
    tq: Tensor, tk: Tensor, tv: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Options
) -> bool:
    """Whether Gluon's forward with its tangent can do this work, and is the faster way."""
    return (
        (q.shape[-1], options.causal) in FASTER_DUAL
        and min(q.numel(), k.numel()) > 0
        and not triton_decode.suits(q, k)
        and tma_ready(tq, tk, tv)
        and suits(q, k, v, options, "dual")
    )


def reads(x: Tensor, head_dim: int) -> bool:
    """Whether the forward, of lengths that are worth it, takes heads of x's dtype and device as
    they are, of this width: those between powers of two want zeros beside them elsewhere.
    """
    return (
        (head_dim, False) in FASTER
        and x.element_size() == 2
        and here("forward", x, head_dim, 4096, causal=False)
    )


def suits(q: Tensor, k: Tensor, v: Tensor, options: Options, kernel: str = "forward") -> bool:
    """Whether Gluon's forward, or that with its tangent, can do this work on this device."""
    return (
        q.shape[-1] in ((64, 128) if kernel == "dual" else (40, 64, 80, 128))
        and q.shape[-1] == v.shape[-1]
        and q.element_size() == 2
        and plain_options(options)
        and tma_ready(q, k, v)
        and here(kernel, q, q.shape[-1], q.shape[2], causal=options.causal)
    )


def here(kernel: str, x: Tensor, head_dim: int, T: int, *, causal: bool) -> bool:
    """Whether x's device runs what Gluon makes."""
    if not x.is_cuda or INTERPRETED or gluon_forward is None:
        return False
    consumers = gluon_forward.consumers_of(head_dim, T, causal) if kernel == "forward" else 2
    return compiled(kernel, x.dtype, head_dim, causal, x.device, consumers)


def plain_options(options: Options) -> bool:
    """Whether nothing is set but what the Gluon kernels know or 16-bit kernels ignore."""
    return (
        all(x is None for x in options[:TENSOR_OPTIONS])
        and options.window < 0
        and options.softcap == 0
        and options.dropout == 0
        and options.scale > 0
    )


@functools.cache
def compiled(
    kernel: str,
    dtype: torch.dtype,
    head_dim: int,
    causal: bool,
    device: torch.device,
    consumers: int = 2,
) -> bool:
    """Whether the kernel for this dtype, head dim and mask compiles here; it is kept if so."""
    if gluon_forward is None or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    with torch.cuda.device(device):
        length = 64 * consumers
        x = torch.empty((1, length, 1, head_dim), dtype=dtype, device=device).transpose(1, 2)
        rows = torch.empty((1, 1, length), device=device)
        options = Options(causal=causal)
        if kernel == "dual":
            results = (x, rows, x, rows)
            return compiles(gluon_dual.plan_dual(x, x, x, x, x, x, *results, options))
        return compiles(gluon_forward.plan_forward(x, x, x, x, rows, options, consumers))


def compiles(launch: Launch) -> bool:
    """Whether this Triton compiles the launch's kernel; says so if not."""
    try:
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    except Exception as problem:  # whatever a compiler may raise: other kernels do the same work
        warnings.warn(
            f"Triton {triton.__version__} does not compile {launch.kernel.__name__} of the Gluon"
            f" kernels ({type(problem).__name__}), so the plain Triton kernels run, which give the"
            " same results more slowly. Triton 3.6 compiles it.",
            stacklevel=2,
        )
        return False
    return True
