"""Compiles kernel launches for a chip without running them, also where there is no GPU: for tests
and for the tuner.

Triton asks its driver only for the target and a device number before it compiles; `CompileOnly`
answers both. What comes out lands in Triton's cache on disk, so that a later launch of the same
thing finds it there.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from msfs_kernels.launching import Launch


class CompileOnly:
    """A driver for a chip that is not there."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


class Resources(NamedTuple):
    """What one program takes: registers and spilled bytes a thread, shared memory in bytes."""

    registers: int
    spills: int
    shared: int
    wgmma: int  # matrix instructions of sm_90 in the PTX


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's compiled kernel of a launch for sm_`capability`, arguments specialised exactly as a
    real call would.
    """
    before = driver._active
    driver.set_active(CompileOnly(capability))  # pyright: ignore[reportArgumentType]
    try:
        launch.kernel.device_caches.clear()
        return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    finally:
        launch.kernel.device_caches.clear()
        driver._active = before


def resources(compiled: Any, capability: int) -> Resources:
    """Reads registers and spills from the machine code by the cuobjdump that Triton carries."""
    tool = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True
        ).stdout
    registers = max((int(n) for n in re.findall(r"REG:(\d+)", usage)), default=0)
    spills = max((int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)), default=0)
    return Resources(
        registers, spills, compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async")
    )
