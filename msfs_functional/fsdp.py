"""The FSDP2 path: the same skeleton under torch's `fully_shard`, behind the same step.

    model = fully_sharded(decoder(config), DECODER, mesh(dp_shard=-1))
    params = model.init(seed)                                    # the module's own shards, DTensors
    step = make_step(gathered(loss_fn, model), optimizer, gradient=model.gradient)

`fully_shard` owns its parameters and gathers them in hooks around each module's forward, and
`functional_call` would silently do without them: here `apply` calls the module itself, and what it
is given as params must be what `init` returned (in which a donating step writes in place).
"""

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from msfs_functional import sharding
from msfs_functional.gathering import Layout, Plan
from msfs_functional.meshes import axis_size
from msfs_functional.params import Functional, Params
from msfs_functional.transforms import add_terms


@dataclass(frozen=True, eq=False)
class FullySharded(Functional):
    """A Functional that runs a module under `fully_shard`; made by `fully_sharded`.

    Attributes:
        module: under `fully_shard`; it holds this rank's shards once `init` was called.
        mesh: as given.
        root: a plan that gathers nothing, as the module does.
    """

    module: nn.Module
    mesh: DeviceMesh
    root: Plan

    def init(
        self,
        seed: int | Int64[Tensor, "2"],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Params:
        """The module's own parameters, filled with this rank's shards of the unsharded init."""
        self.module.to_empty(device=self.mesh.device_type)
        shards = sharding.init(self, seed, sharding.FULLY_SHARDED, self.mesh, dtype=dtype)
        self._write(shards)
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def apply(self, params: Params, /, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
        """The module's method; `params` must be its own."""
        call = self.module if method == "forward" else getattr(self.module, method)
        return call(*args, **kwargs)

    def gradient(self, fn: Callable[..., Any], params: Params, calls: Iterable[tuple]) -> Any:
        """As `transforms.accumulate`; gradients are summed over ranks in the last call only."""
        module, pending, total = self.module, list(calls), None
        assert isinstance(module, FSDPModule)
        self._write(params)
        for i, call in enumerate(pending):
            module.set_requires_gradient_sync(i == len(pending) - 1)
            value, aux = fn(params, *call)
            value.backward()
            total = add_terms(total, (value.detach(), aux))
        grads = {}
        for name, p in module.named_parameters():
            grads[name] = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
        return total, grads

    @torch.no_grad()
    def _write(self, params: Params) -> None:
        """Into the module, unless they are its own already (other ones come from a checkpoint)."""
        for name, p in self.module.named_parameters():
            mine, theirs = (x.to_local() for x in (p, params[name]) if isinstance(x, DTensor))
            if mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)


def fully_sharded(
    model: Functional,
    layout: Layout,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> FullySharded:
    """The model under `fully_shard`, one unit for each of the layout's blocks.

    Args:
        dtype, reduce_dtype: as in `gathering.sharded`.

    Raises:
        ValueError: a mesh with tp or cp, which only the functional path has.
    """
    if taken := [axis for axis in ("tp", "cp") if axis_size(mesh, axis) > 1]:
        raise ValueError(f"fully_shard goes with data axes only, the mesh has {taken}: use sharded")
    data = (
        mesh["dp_replicate", "dp_shard"]
        if axis_size(mesh, "dp_replicate") > 1
        else mesh["dp_shard"]
    )
    policy = MixedPrecisionPolicy(
        param_dtype=dtype,
        reduce_dtype=reduce_dtype or torch.float32,
        cast_forward_inputs=False,  # tables of rotary positions stay float32
    )
    module = copy.deepcopy(model.skeleton)
    units = [part for path, part in module.named_modules() if re.search(layout.blocks, path)]
    for unit in (*(units if layout.blocks else ()), module):
        fully_shard(unit, mesh=data, mp_policy=policy, shard_placement_fn=lambda p: Shard(0))
        for name in layout.methods:
            if name != "forward" and hasattr(unit, name):
                register_fsdp_forward_method(unit, name)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)  # `gathered` weighs the shares: gradients are sums
        unit.set_force_sum_reduction_for_comms(True)
    inherited = {f.name: getattr(model, f.name) for f in fields(Functional)}
    return FullySharded(**inherited, module=module, mesh=mesh, root=Plan({}, None, None))
