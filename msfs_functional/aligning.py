"""A policy before it is aligned: the decoder, how it is computed, what it reads and imitates.

    task = alignment_tasks.built_in(Data(), seed)             # prompts and demonstrations as ids
    setup = set_up(Model(), task, machine)                    # the decoder and how it is computed
    params = fine_tune(setup, task, Stage(...), seed, folder, resume)

What it answers and how that is judged is in `answering_prompts`, the recipes' runs and reports in
`alignment_runs`.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from msfs_functional import agreement, borrowed, meshes, optim, random, schedules
from msfs_functional.alignment_tasks import Data, Task, TaskFn
from msfs_functional.collectives import group_size, psum, pvary
from msfs_functional.compiling import graphed
from msfs_functional.config import Machine
from msfs_functional.gathering import Sharded, gather_steps, gathered, gathered_param, sharded
from msfs_functional.layouts import DECODER
from msfs_functional.models import decoder as models
from msfs_functional.next_token import next_token_loss
from msfs_functional.packing import PackedBatches
from msfs_functional.params import Functional, Params, cast
from msfs_functional.sft import AnswerBatches
from msfs_functional.sharding import gather, shard
from msfs_functional.stages import run_stage
from msfs_functional.tokenizer import PAD
from msfs_functional.train import LossFn, init_state, make_step


@dataclass(frozen=True)
class Model:
    """Size of the decoder."""

    width: int = 96
    depth: int = 3  # blocks
    heads: int = 4
    length: int = 64  # tokens of a packed row, the most that a prompt and its answer have
    dropout: float = 0.0  # probability, while imitating and in reward models
    # a local Hugging Face folder: its decoder and tokenizer to start from, at its own sizes
    folder: Path | None = None
    pad: str | None = None  # with a folder whose tokenizer names no token to pad with


@dataclass(frozen=True)
class Stage:
    """Training of one stage; the learning rate warms up and falls to 0 as a cosine."""

    steps: int
    batch: int  # rows: packed ones of fine-tuning, pairs of preferences
    rate: float  # peak learning rate
    warmup: int = 30  # steps


class Setup(NamedTuple):
    """A decoder and how it is computed.

    Stages take and return whole parameters; between them, under torchrun, a step works on shards:
    `enter` cuts them, `leave` puts them together. What works on whole parameters (answers to
    prompts, members of an ensemble) is shared out among all processes, along every axis.
    """

    model: Functional  # that losses call: of sharded parameters on a mesh
    device: str
    dtype: torch.dtype  # of the computation
    compile: bool
    implementation: str  # of attention
    length: int  # most tokens of a row
    dropout: bool
    plain: Functional  # of whole parameters
    share: tuple[int, int] = (0, 1)  # (number, count) of this process among those with other rows
    groups: tuple[str, ...] = ()  # names of the process groups along which rows differ
    place: tuple[int, int] = (0, 1)  # (number, count) of this process among all
    every: tuple[str, ...] = ()  # names of the process groups along all axes

    def ready(self, params: Params) -> Params:
        """Parameters in the dtype of the computation; a sharded model casts what it gathers."""
        return params if isinstance(self.model, Sharded) else cast(params, self.dtype)

    @property
    def rank(self) -> int:
        return self.place[0]

    def for_members(self) -> "Setup":
        """Of an ensemble whose members are whole on every process, under vmap.

        Torch's own attention is slow there; rows differ along all axes of the mesh.
        """
        apart = {"share": self.place, "groups": self.every}
        return self._replace(model=self.plain, implementation="flash", **apart)

    def over_ranks(self, loss_fn: LossFn) -> LossFn:
        """The loss over the rows of all processes, of one that calls `model`."""
        return gathered(loss_fn, self.model) if isinstance(self.model, Sharded) else loss_fn

    def enter(self, params: Params) -> Params:
        """What a donating step may write into: copies, or this rank's shards."""
        if isinstance(self.model, Sharded):
            return shard(params, self.model.layout.rules, self.model.mesh)
        return {name: value.clone() for name, value in params.items()}

    def whole(self, param: Tensor) -> Tensor:
        """A sharded parameter that the loss itself reads, not the model."""
        if not isinstance(self.model, Sharded):
            return param
        steps = gather_steps(param.shape, param.placements, meshes.active(self.model.mesh), False)  # pyright: ignore
        return gathered_param(param, steps, None, torch.float32)

    def leave(self, params: Params) -> Params:
        """Whole parameters, on every rank; all ranks call it together."""
        return gather(params)


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism under torchrun, whose product is the number of processes."""

    dp_replicate: int = 1  # processes with equal parameters and other rows
    dp_shard: int = -1  # processes with a shard of each parameter and other rows; -1: the rest
    tp: int = 1  # processes with parts of each layer and of the vocabulary, and the same rows
    cp: int = 1  # processes with parts of the same rows


def check_room(data: Data, own: Model, mesh: Mesh) -> None:
    """Raises ValueError where an answer fills the context, a file of the data is not there, or the
    mesh is not one for these processes and rows."""
    if data.new >= own.length:
        raise ValueError(
            f"--data.new ({data.new}) leaves no room for a prompt in --model.length ({own.length})"
        )
    meshes.degrees(agreement.world(), **dataclasses.asdict(mesh))
    if own.folder is None and own.heads % mesh.tp:
        raise ValueError(
            f"--mesh.tp ({mesh.tp}) must divide --model.heads ({own.heads}): change one"
        )
    if mesh.cp > 1 and own.length % (2 * mesh.cp):
        raise ValueError(
            f"twice --mesh.cp (2 x {mesh.cp}) must divide --model.length ({own.length}): change one"
        )
    for path in (*data.files, *data.texts):
        if not path.is_file():
            raise ValueError(f"{path} does not exist: check the path")


class Prepared(NamedTuple):
    """What every stage works with."""

    task: Task
    setup: Setup
    start: Params | None  # of a local folder; None: random ones


def prepare(
    task_of: TaskFn, data: Data, own: Model, machine: Machine, mesh: Mesh, seed: int
) -> Prepared:
    """The task in a tokenizer's ids and a decoder for them.

    Raises:
        ValueError: files or a folder that cannot be used, and why.
    """
    if own.folder is None:
        task = task_of(data, seed, own.length, None)
        return Prepared(task, set_up(own, task, machine, mesh), None)
    local = borrowed.load(own.folder, pad=own.pad, device=machine.device)
    task = task_of(data, seed, own.length, local.tokenizer)
    return Prepared(task, set_up(own, task, machine, mesh, local.config), local.params)


def set_up(
    own: Model,
    task: Task,
    machine: Machine,
    mesh: Mesh | None = None,
    config: models.DecoderConfig | None = None,
) -> Setup:
    """A decoder for the task's vocabulary; under torchrun its steps are on the mesh.

    Args:
        config: of the decoder, in place of the sizes in `own`.

    Raises:
        ValueError: rows beyond the decoder's context; a mesh that cannot cut the decoder.
    """
    config = config or models.tiny(
        task.tokenizer.vocab_size,
        width=own.width,
        depth=own.depth,
        heads=own.heads,
        kv_heads=own.heads,
        hidden=3 * own.width,
        max_length=own.length,
        qk_norm=True,
        dropout=own.dropout,
    )
    if own.length > config.max_length:
        raise ValueError(
            f"--model.length ({own.length}) is beyond the context of the decoder "
            f"({config.max_length}): lower it"
        )
    attention = "flash" if machine.device.startswith("cuda") else "sdpa"
    dtype, plain = getattr(torch, machine.dtype), models.decoder(config)
    model, share, groups, every = plain, (0, 1), (), ()
    if agreement.world() > 1:
        degrees = dataclasses.asdict(mesh or Mesh())
        on = meshes.mesh(**degrees, device=torch.device(machine.device).type)
        windows = sorted({w for w in config.windows if w is not None})
        if meshes.axis_size(on, "cp") > 1 and windows:
            raise ValueError(
                f"--mesh.cp ({meshes.axis_size(on, 'cp')}) with a decoder whose tokens see windows "
                f"of {windows} tokens: a ring of processes attends to all, use --mesh.cp 1"
            )
        model = sharded(plain, DECODER, on, dtype=dtype, reduce_dtype=torch.float32)
        share = meshes.data_rank(on)
        names = {
            axis: on.get_group(axis).group_name
            for axis in meshes.AXES
            if meshes.axis_size(on, axis) > 1
        }
        groups = tuple(name for axis, name in names.items() if axis in meshes.DATA_AXES)
        every = tuple(names.values())
    return Setup(
        model,
        machine.device,
        dtype,
        machine.compile,
        attention,
        own.length,
        config.dropout > 0,
        plain,
        share,
        groups,
        (agreement.rank(), agreement.world()),
        every,
    )


def say(text: str) -> None:
    """Prints on rank 0."""
    if agreement.rank() == 0:
        print(text, flush=True)


# ------------------------------------------------------------------------------------- fine-tuning


def optimizer_of(stage: Stage) -> optim.Transformation:
    warmup = min(stage.warmup, stage.steps // 2)
    rate = schedules.cosine(stage.rate, stage.steps, warmup=warmup)
    return optim.adamw(rate, 0.9, 0.98, weight_decay=0.1, decay=models.DECAY)


def step_of(
    setup: Setup,
    loss_fn: LossFn,
    optimizer: optim.Transformation,
    *,
    members: int | None = None,
) -> Any:
    """The step as this machine runs it best: on a GPU one CUDA graph for each set of shapes.

    Args:
        setup: for an ensemble `for_members`.
        loss_fn: over the rows of all processes (`Setup.over_ranks`); for an ensemble of this one's.
        members: params are a stack of so many.
    """
    compile, gradient = "regions" if setup.compile else False, None
    if members is not None:
        loss_fn = over_processes(loss_fn, setup.groups)
    elif isinstance(setup.model, Sharded):
        gradient = setup.model.gradient  # gathers and sums beside the computation
    options: dict[str, Any] = {"clip_norm": 1.0, "dynamic": False, "members": members}
    step = make_step(loss_fn, optimizer, compile=compile, gradient=gradient, **options)
    alone = not isinstance(setup.model, Sharded)
    graph = alone and setup.compile and setup.device.startswith("cuda")
    return graphed(step) if graph else step


def over_processes(loss_fn: LossFn, groups: tuple[str, ...]) -> LossFn:
    """The mean of loss_fn over processes with equal whole parameters and as many rows each.

    Gradients are summed over the processes, under vmap and in every derivative, as `collectives`
    do. Metrics are means, too.
    """
    if not groups:
        return loss_fn

    def run(params: Params, batch: Any, key: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        for group in groups:
            params = {name: pvary(value, group) for name, value in params.items()}
        loss, metrics = loss_fn(params, batch, key)
        terms = torch.stack([loss, *(value.to(loss) for value in metrics.values())])
        for group in groups:
            terms = psum(terms, group) / group_size(group)
        loss, *means = terms.unbind()
        return loss, dict(zip(metrics, means, strict=True))

    return run


def pretrain(ready: Prepared, stage: Stage, seed: int, folder: Path, resume: str) -> Params | None:
    """A decoder that has read the task's texts, from random parameters; None if it has none.

    A local folder's has read enough, and comes back as it is.
    """
    task, setup, start = ready
    if start is not None or not task.texts:
        return start
    batches = PackedBatches(task.texts, setup.length, stage.batch, seed, setup.share)
    return imitate(setup, batches, stage, seed, folder, resume, None)


def fine_tune(
    setup: Setup,
    task: Task,
    stage: Stage,
    seed: int,
    folder: Path,
    resume: str,
    start: Params | None = None,
) -> Params:
    """A policy that imitates the demonstrations, from `start` or from random parameters."""
    documents = [[*prompt, *answer] for prompt, answer in task.demonstrations]
    prompts = [len(prompt) for prompt, _ in task.demonstrations]
    batches = AnswerBatches(
        documents, setup.length, stage.batch, seed, setup.share, prompts=prompts
    )
    return imitate(setup, batches, stage, seed, folder, resume, start)


def imitate(
    setup: Setup,
    batches: PackedBatches,
    stage: Stage,
    seed: int,
    folder: Path,
    resume: str,
    start: Params | None,
) -> Params:
    optimizer = optimizer_of(stage)
    params = start or setup.plain.init(seed, device=setup.device)
    attention: Any = setup.implementation
    loss_fn = next_token_loss(setup.model, dtype=setup.dtype, implementation=attention)
    trained = run_stage(
        folder,
        stage.steps,
        init_state(setup.enter(params), optimizer, random.key(seed, device=setup.device)),
        step_of(setup, loss_fn, optimizer),
        batches,
        device=setup.device,
        resume=resume,
        tokens=lambda batch: (batch["labels"] != PAD).sum(),
    )
    return setup.leave(trained.params)
