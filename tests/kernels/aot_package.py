"""Exports attention, packages it by AOTInductor, loads the package and compares what it computes.

    python tests/kernels/aot_package.py flash | plain  cpu | cuda  FOLDER

A process of its own, as a loader that crashes takes its process along: torch's own does on some
machines, whatever the package holds. `plain` is the formula in torch's operations, which tells
whose fault that is; what is printed last tells where it happened.
"""

import sys
from pathlib import Path

import torch
from msfs_kernels import flash_attention
from torch import Tensor, nn


class Flash(nn.Module):
    """Nothing that Inductor would compile a kernel of its own for."""

    def forward(self, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        return flash_attention(q, k, k, is_causal=True, key_lengths=lengths)


class Plain(nn.Module):
    def forward(self, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
        k = k.repeat_interleave(2, 1)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ k + lengths[0]


def main(which: str, device: str, folder: str) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    q, k = (
        torch.randn(2, heads, tokens, 64, generator=generator).to(device, dtype)
        for heads, tokens in ((4, 33), (2, 71))
    )
    inputs = (q, k, torch.tensor([71, 20], device=device))
    module = {"flash": Flash, "plain": Plain}[which]()
    program = torch.export.export(module, inputs)
    if which == "flash":
        called = [node.target for node in program.graph.nodes if node.op == "call_function"]
        assert called.count(torch.ops.msfs_kernels.attention.default) == 1, called
    print("exported", flush=True)
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(Path(folder) / f"{which}.pt2"),
        inductor_configs={  # compiles sooner
            "aot_inductor.compile_wrapper_opt_level": "O0",
            "aot_inductor.precompile_headers": False,
        },
    )
    print("loading", flush=True)
    loaded = torch._inductor.aoti_load_package(path)
    print("loaded", flush=True)
    torch.testing.assert_close(loaded(*inputs), module(*inputs))
    print("equal", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
