"""Gathers and reductions that run beside the computation, block by block, without a graph of all.

    model = sharded(decoder(config), DECODER, mesh(dp_shard=-1))
    step = make_step(
        gathered(loss_fn, model), optimizer, compile="regions", gradient=model.gradient
    )

A training step in which every block is compiled once and run 24 times has no compiler that sees all
of it, so a Pipeline orders what stands between the blocks (as FSDP does, Zhao et al. 2023):

    computes    | block 0 | block 1 | block 2 | loss | block 2' | block 1' | block 0' |
    gathers     0    1         2                  1          0
    sums                                            output     2          1          0, embedding

While a block computes, the parameters of the next one are gathered, each straight into the tensor
that the block will read, on a stream of their own; after the block they are forgotten, and gathered
again in the backward pass one block ahead. Gradients of whole parameters are cast, summed over
ranks and scattered on another stream while the block before computes its own. What is saved for the
backward pass of whole parameters is their place only. By what they travel is another file's matter:
collectives (`transport`) or copies between the GPUs of a host (`peer_copies`).

On a CPU, where there are no streams, the same happens in the same order.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from msfs_functional.collectives import chunk_bounds
from msfs_functional.params import Params
from msfs_functional.peer_copies import PeerCopies
from msfs_functional.transport import Collectives, Term, Way, Whole, side_by_side


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together: of a block, or of all that is outside of blocks."""

    names: Mapping[str, str]  # {name inside of the block: name of the parameter}
    ways: Mapping[str, Way]  # by name inside

    def part(self, names: Sequence[str]) -> "Unit":
        """The same of some of its names inside."""
        return Unit({n: self.names[n] for n in names}, {n: self.ways[n] for n in names})


@dataclass(eq=False)
class Use:
    """One call of a unit in a step."""

    unit: Unit
    number: int  # among the calls of this step
    whole: dict[str, Tensor] | None = None  # while they are there or on the way
    arrived: Any = None  # the event after which they are there
    places: dict[int, str] = field(default_factory=dict)  # {address of a whole one: name inside}


Transport = Literal["copies", "collectives"]
AT_ONCE = 2**62  # above the numbers of all nodes that a process can make
_active: ContextVar["Pipeline | None"] = ContextVar("pipeline", default=None)


def active() -> "Pipeline | None":
    """The pipeline of the step that is going on in this thread, if a transform does not hide it."""
    pipeline = _active.get()
    if pipeline is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    return None if hooks or torch._C._are_functorch_transforms_active() else pipeline


@functools.cache
def streams(device: torch.device) -> tuple[Any, Any]:
    """(for gathers, for sums); None on a CPU."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.Stream(device, priority=-1), torch.cuda.Stream(device, priority=-1)


class Pipeline:
    """One forward and backward pass over parameters in shards.

    Args:
        params: {name: DTensor}, all that the units name.
        units: in the order in which the model calls them; the first are those outside of blocks.
        outside: the names of the first unit, in groups whose gradients are summed together: those
            of an output matrix are there long before those of an embedding.
        dtype: of whole parameters; None: that of the shards.
        reduce_dtype: in which gradients are summed; None: that of the shards.
        transport: what parameters and gradients travel by (see `gathering.sharded`).
    """

    def __init__(
        self,
        params: Params,
        units: Sequence[Unit],
        outside: Sequence[Sequence[str]],
        dtype: torch.dtype | None,
        reduce_dtype: torch.dtype | None,
        transport: Transport = "collectives",
    ):
        self.params, self.units, self.outside = params, units, outside
        self.dtype, self.reduce_dtype = dtype, reduce_dtype
        self.shards = {n: p.to_local() for n, p in params.items() if isinstance(p, DTensor)}
        some = next(iter(self.shards.values()))
        self.device = some.device
        self.gathers, self.sums = streams(some.device)
        self.anchor = torch.zeros((), device=some.device, requires_grad=True)
        self.uses: list[Use] = []
        self.ahead: dict[int, Use] = {}  # gathered before they were called, by place of the unit
        self.grads: dict[str, list[Tensor]] = {}  # of shards, by name of the parameter
        self.summing: tuple[Any, Any] | None = None  # what a sum reads, until it is done
        self.transport = self._transport(transport)

    def _transport(self, kind: Transport) -> Collectives:
        if kind == "collectives":
            return Collectives()
        wholes = [
            self._to_gather(name, unit.ways[inside], torch.device("meta"))
            for unit in self.units
            for inside, name in unit.names.items()
        ]
        first, *blocks = self.units
        outside = [first.part(names).names.values() for names in self.outside]
        return PeerCopies(wholes, self.device, outside, [unit.names.values() for unit in blocks])

    def _to_gather(self, name: str, way: Way, device: torch.device) -> Whole:
        shard = self.shards[name]
        out = torch.empty(way.padded(shard), dtype=self.dtype or shard.dtype, device=device)
        return Whole(name, out, shard.movedim(way.dim, 0) if way.group else shard, way)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def knows(self, place: int, held: Params) -> bool:
        """Whether these are the step's own parameters, and not others that it computes with."""
        names = self.units[place].names
        return all(held.get(inside) is self.params[name] for inside, name in names.items())

    def run(self, place: int, fn: Callable[..., Any], held: Params, args: tuple) -> Any:
        """fn(held with whole parameters, *args)."""
        use = self.ahead.pop(place, None) or Use(self.units[place], -1)
        use.number = len(self.uses)
        self.uses.append(use)
        if use.whole is None:
            self._gather(use)
        if place + 1 < len(self.units) and place + 1 not in self.ahead:
            following = self.ahead[place + 1] = Use(self.units[place + 1], -1)
            self._gather(following)
        self._arrive(use)
        assert use.whole is not None
        if place == 0:  # in use until the end of the step
            parts = [Use(use.unit.part(names), -1) for names in self.outside]
            for part in parts:
                part.whole = {name: use.whole[name] for name in part.unit.names}
            use.whole = None
            return fn({**held, **self._taken(parts)}, *args)
        whole = {**held, **self._taken([use])}
        use.places = {x.untyped_storage().data_ptr(): n for n, x in use.whole.items() if x.numel()}

        def pack(x: Tensor) -> Any:
            name = use.places.get(x.untyped_storage().data_ptr()) if type(x) is Tensor else None
            return x if name is None else (name, x.shape, x.stride(), x.storage_offset())

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            name, shape, stride, offset = packed
            return self._again(use)[name].as_strided(shape, stride, offset)

        with saved_tensors_hooks(pack, unpack):
            out = fn(whole, *args)
        use.places = {}
        if place + 1 < len(self.units):  # the last one's backward comes soon
            use.whole = None
        return out

    def _taken(self, uses: Sequence[Use]) -> Params:
        """Their whole parameters as parts of the graph; each use's gradients are summed apart."""
        taken: Params = {}
        for use in uses:
            assert use.whole is not None
            out: Any = Taken.apply(self.anchor, self, use)
            taken |= dict(zip(use.whole, out, strict=True))
            # The engine takes the node that was made last first: these stood at the very beginning,
            # but shall be summed as soon as their gradients are there.
            out[0].grad_fn._set_sequence_nr(AT_ONCE)
        return taken

    def _again(self, use: Use) -> dict[str, Tensor]:
        """The whole parameters in the backward pass, and those of the use before on their way."""
        with torch.no_grad():
            if use.whole is None:
                self._gather(use)
            self._arrive(use)
            before = self.uses[use.number - 1] if use.number else None
            if before is not None and before.whole is None and before.unit is not self.units[0]:
                self._gather(before)
        assert use.whole is not None
        return use.whole

    @torch.no_grad()
    def _gather(self, use: Use) -> None:
        """Starts to make the unit's parameters whole."""
        whole, wholes = {}, []
        for inside, name in use.unit.names.items():
            way = use.unit.ways[inside]
            wholes.append(self._to_gather(name, way, self.device))
            x = wholes[-1].out
            # A view only where it must be: compiled code guards on the base of a view, too.
            if way.group and len(x) > way.size:
                x = x.narrow(0, 0, way.size)
            whole[inside] = x.movedim(0, way.dim) if way.dim else x
        with self._beside(self.gathers):
            self.transport.gather(wholes)
            use.arrived = event(self.gathers)
        use.whole = whole

    def _arrive(self, use: Use) -> None:
        if use.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(use.arrived)
            use.arrived = None

    def _sum(self, use: Use, grads: Sequence[Tensor | None]) -> None:
        """Starts to add up the gradients of the unit's whole parameters over ranks."""
        use.whole = None
        ways = [use.unit.ways[inside] for inside in use.unit.names]
        shards = [self.shards[name] for name in use.unit.names.values()]
        outs = self._room(shards, ways)
        terms = []
        for out, g, shard, way in zip(outs, grads, shards, ways, strict=True):
            g = g.movedim(way.dim, 0) if g is not None and way.group else g
            terms.append(Term(out, g, way.padded(shard), way))
        with self._beside(self.sums):
            self.transport.sum(terms)
            done = event(self.sums)
        self._settle()
        self.summing = (grads, done)
        for name, way, out in zip(use.unit.names.values(), ways, outs, strict=True):
            if way.group:
                start, stop = chunk_bounds(way.size, way.parts, way.rank)
                out = out.narrow(0, 0, stop - start).movedim(0, way.dim)
            self.grads.setdefault(name, []).append(out)

    def _room(self, shards: Sequence[Tensor], ways: Sequence[Way]) -> list[Tensor]:
        """For this rank's parts of sums; those of one group lie side by side."""
        kinds = {self.reduce_dtype or shard.dtype for shard in shards}
        dtype, outs = functools.reduce(torch.promote_types, kinds), {}
        for group in {way.group for way in ways}:
            those = [i for i, way in enumerate(ways) if way.group == group]
            parts = [ways[i].part(shards[i]) for i in those]
            outs |= dict(zip(those, side_by_side(parts, dtype, self.device), strict=True))
        return [outs[i] for i in range(len(ways))]

    def _settle(self) -> None:
        """From here on the last sum is done, and what it read may be overwritten."""
        if self.summing is not None and self.summing[1] is not None:
            torch.cuda.current_stream(self.device).wait_event(self.summing[1])
        self.summing = None

    def gradients(self) -> dict[str, Tensor]:
        """{name: gradient of the shard} of the parameters that the backward pass came to."""
        self._settle()
        if self.gathers is not None:  # also of what was gathered for nothing
            torch.cuda.current_stream(self.device).wait_stream(self.gathers)
        return {
            name: functools.reduce(torch.add, found).to(self.shards[name].dtype)
            for name, found in self.grads.items()
        }

    @contextlib.contextmanager
    def _beside(self, stream: Any) -> Iterator[None]:
        """What follows runs on the stream, after all that was asked for so far."""
        if stream is None:
            yield
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield


class Taken(torch.autograd.Function):
    """Whole parameters into the graph; their gradients out of it, on their way to be summed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, pipeline: Pipeline, use: Use) -> tuple[Tensor, ...]:
        assert use.whole is not None
        ctx.pipeline, ctx.use = pipeline, use
        ctx.set_materialize_grads(False)
        return tuple(use.whole.values())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # pyright: ignore
        with torch.no_grad():
            ctx.pipeline._sum(ctx.use, grads)
        return None, None, None


def event(stream: Any) -> Any:
    return None if stream is None else stream.record_event()
