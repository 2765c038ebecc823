"""How a kernel is launched: described first, so that it can be compiled, recorded or prepared too.

A plan (`plan_forward` and its like) is a function of tensors and options that describes a `Launch`:
kernel, grid, arguments, constants. `launch` runs a plan, and remembers for each signature what came
of it, so that a second call of the same shapes does not plan again.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs

from msfs_kernels import ahead
from msfs_kernels.driver_launch import DriverLaunch, driver_launch
from msfs_kernels.options import Options

INTERPRETED = knobs.runtime.interpret  # decided when the kernels are decorated
TENSOR_OPTIONS = 7  # the first fields of Options


class Launch(NamedTuple):
    """One kernel call, described before it happens, so that tests and the tuner can compile it
    without running it.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def run(self) -> Any:
        """Starts the kernel through Triton's front door and returns what Triton compiled."""
        if RECORDING.planned is not None:
            return RECORDING.planned.append(self)
        ahead.wait(self.kernel)
        return self.kernel[self.grid](*self.args, **self.constants)


class Place(NamedTuple):
    """Where a tensor stands: position among the arguments, field if that is a named tuple, and the
    tensor's number in the call.
    """

    position: int
    field: str | None
    number: int


class Threads(threading.local):
    awake = False


THREADS = Threads()


def wake_thread(device: torch.device) -> bool:
    """Makes the device's context this thread's by an ordinary launch of torch, once; whether this
    was now. Without one the driver refuses, and so does Triton where it makes maps for the copy
    engine.
    """
    if THREADS.awake:
        return False
    torch.zeros(1, device=device)
    THREADS.awake = True
    return True


class Prepared(NamedTuple):
    """A compiled launch whose tensors can be exchanged for others of the same shapes, strides and
    alignment.
    """

    direct: DriverLaunch | None  # where the driver can be asked without Triton's launcher
    start: Any
    args: list[Any]
    places: list[Place]

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        if self.direct is not None and self.direct.run(tensors):
            return
        device = next(x.device for x in tensors if x is not None)
        if wake_thread(device) and self.direct is not None and self.direct.run(tensors):
            return
        args = self.args.copy()
        for position, field, number in self.places:
            if field is None:
                args[position] = exchange(args[position], tensors[number])
            else:
                args[position] = args[position]._replace(**{field: tensors[number]})
        self.start(*args)


PREPARED: dict[Any, Prepared | None] = {}


class Recording(threading.local):
    """What `recorded` and `launches_of` collect: of this thread, as the backward has its own."""

    planned: list[Launch] | None = None  # where launches go in place of the device
    launches: list[tuple[Prepared | None, tuple[Tensor | None, ...]]] | None = None


RECORDING = Recording()


def launches_of(fn: Callable[[], object]) -> list[Launch]:
    """What fn() would launch, without a launch: for compiling ahead. Results stay uninitialised."""
    RECORDING.planned = planned = []
    try:
        fn()
    finally:
        RECORDING.planned = None
    return planned


@contextmanager
def recorded() -> Iterator[list[tuple[Prepared | None, tuple[Tensor | None, ...]]]]:
    """Collects (prepared launch, tensors) of every `launch` within."""
    before, RECORDING.launches = RECORDING.launches, []
    try:
        yield RECORDING.launches
    finally:
        RECORDING.launches = before


def distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same tensors, each a Python object of its own: one given twice, as q and as k say,
    is two arguments, which may be two tensors at the next call.
    """
    seen: set[int] = set()
    found = []
    for x in tensors:
        if x is not None and id(x) in seen:
            x = x.detach()
        seen.add(id(x))
        found.append(x)
    return tuple(found)


def exchange(arg: Any, x: Tensor | None) -> Any:
    """A descriptor like `arg` of another tensor, or that tensor."""
    if arg is None or isinstance(arg, Tensor):
        return x
    other = object.__new__(type(arg))
    other.__dict__.update(arg.__dict__, base=x)
    return other


def prepare(
    described: Launch, compiled: Any, tensors: tuple[Tensor | None, ...]
) -> Prepared | None:
    """None if the launch reads a tensor that the plan made itself: such launches are planned every
    time.
    """
    names = described.kernel.arg_names[len(described.args) :]
    args = [*described.args, *(described.constants[name] for name in names)]
    grid = (*described.grid, 1, 1)[:3]
    direct = driver_launch(compiled, grid, args, tensors)
    numbers = {id(x): number for number, x in enumerate(tensors) if x is not None}
    places: list[Place] = []
    for position, arg in enumerate(args):
        named = hasattr(arg, "_asdict")
        found = arg._asdict() if named else {None: getattr(arg, "base", arg)}
        found = {field: x for field, x in found.items() if isinstance(x, Tensor)}
        if any(id(x) not in numbers for x in found.values()):
            return None
        places += [Place(position, field, numbers[id(x)]) for field, x in found.items()]
        # What stays here keeps no tensor alive.
        if named:
            args[position] = arg._replace(**{str(field): None for field in found})
        elif found:
            args[position] = exchange(arg, None)
    return Prepared(direct, compiled[grid], args, places)


def launch(
    plan: Callable[..., Launch], tensors: tuple[Tensor | None, ...], options: Options
) -> None:
    """Runs plan(*tensors, options), and from the second time on without planning.

    Triton works out afresh at each call which kernel the arguments' types and values select, and
    describing the launch takes as long: some 200 microseconds in all. Calls that agree in shapes,
    strides, dtypes, alignment and scalars select the same kernel, so that only addresses change.
    """
    x = tensors[0]
    assert x is not None
    if INTERPRETED or RECORDING.planned is not None:
        plan(*tensors, options).run()
        return
    if x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return launch(plan, tensors, options)
    everything = (*tensors, *options[:TENSOR_OPTIONS])
    signatures = [
        None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)
        for x in everything
    ]
    key = (plan, x.device.index, options[TENSOR_OPTIONS:], *signatures)
    prepared = PREPARED.get(key)
    if prepared is None:
        everything = distinct(everything)
        options = Options._make((*everything[len(tensors) :], *options[TENSOR_OPTIONS:]))
        described = plan(*everything[: len(tensors)], options)
        wake_thread(x.device)
        compiled = described.run()
        if key not in PREPARED:
            PREPARED[key] = prepare(described, compiled, everything)
        if RECORDING.launches is not None:
            RECORDING.launches.append((PREPARED[key], tensors))
        return
    if RECORDING.launches is not None:
        RECORDING.launches.append((prepared, tensors))
    prepared.run(everything)
