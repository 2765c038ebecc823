"""Whether what the driver is given is what a kernel's machine code takes."""

from typing import Any

from msfs_kernels.driver_launch import layout
from msfs_kernels.launching import Launch
from torch import Tensor


def parameters_agree(launch: Launch, compiled: Any) -> bool:
    names = launch.kernel.arg_names[len(launch.args) :]
    args = [*launch.args, *(launch.constants[name] for name in names)]
    fields = [x for arg in args for x in (arg if isinstance(arg, tuple) else [arg])]
    tensors = [getattr(x, "base", x) for x in fields]
    return layout(compiled, args, [x for x in tensors if isinstance(x, Tensor)]) is not None
