"""Where the Gluon kernels take over from the plain Triton kernels, and where they step back.

They do the common case on one generation of chips: 16-bit inputs, head dim 64 or 128, causal or
full, any lengths and head groups, on Hopper, with a Triton that can compile them (Gluon is young
and renames things). All else is the plain kernels' work. The question is asked once for each shape:
`triton_common.launch` remembers the answer as part of the launch.
"""

import warnings
from typing import Any

import torch
import triton
from torch import Tensor

from msfs_kernels import triton_forward
from msfs_kernels.options import Options
from msfs_kernels.triton_common import INTERPRETED, TENSOR_OPTIONS, Launch, tma_ready

gluon_forward: Any
try:
    from msfs_kernels import gluon_forward
except (ImportError, AttributeError):  # a Triton without Gluon, or with other names
    gluon_forward = None

HEAD_DIMS = (64, 128)


def plain_options(options: Options) -> bool:
    """Whether nothing but the causal mask, the scale and what no 16-bit forward reads is set."""
    if any(x is not None for x in options[:TENSOR_OPTIONS]):
        return False
    return options.scale > 0 and options == Options(
        causal=options.causal,
        scale=options.scale,
        precision=options.precision,
        deterministic=options.deterministic,
    )


def suits(q: Tensor, k: Tensor, v: Tensor, options: Options) -> bool:
    """Whether the Gluon kernels can do this work on this device."""
    return (
        gluon_forward is not None
        and not INTERPRETED
        and q.is_cuda
        and torch.cuda.get_device_capability(q.device) == (9, 0)
        and q.element_size() == 2
        and q.shape[-1] == v.shape[-1]
        and q.shape[-1] in HEAD_DIMS
        and plain_options(options)
        and tma_ready(q, k, v)
    )


REFUSED: set[Any] = set()  # kernels that this Triton could not compile


def compiles(launch: Launch) -> bool:
    """Whether this Triton compiles the launch's kernel, which then is kept; says once if not."""
    if launch.kernel in REFUSED:
        return False
    try:
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    except (
        Exception
    ) as problem:  # whatever a compiler may raise: the plain kernels do the same work
        REFUSED.add(launch.kernel)
        warnings.warn(
            f"Triton {triton.__version__} does not compile {launch.kernel.__name__} of the Gluon"
            f" kernels ({type(problem).__name__}); the plain Triton kernels, which are slower, run"
            " in its place. Triton 3.6 compiles it.",
            stacklevel=2,
        )
        return False
    return True


def plan_forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, options: Options
) -> Launch:
    """The forward launch for these tensors: the faster kernel of those that can do the work."""
    if suits(q, k, v, options):
        launch = gluon_forward.plan_forward(q, k, v, o, lse, options)
        if compiles(launch):
            return launch
    return triton_forward.plan_forward(q, k, v, o, lse, options)
