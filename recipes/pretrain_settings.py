"""Settings of recipes/pretrain.py: every option with its default, unit and meaning.

`python recipes/pretrain.py --help` shows them; a run keeps its own in runs/<name>/config.json.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from msfs_functional import config as configs
from msfs_functional import meshes

MAY_BE_ZERO = ("seed", "warmup", "profile")


@dataclass(frozen=True)
class Data:
    """Where the documents come from."""

    # .txt (documents stand between blank lines) or .jsonl files, also .gz, held in memory; without
    # files and stream: the stories of this project
    files: tuple[Path, ...] = ()
    # a dataset of the Hugging Face Hub, or a path or pattern of .jsonl, .parquet or .txt files:
    # read as it is needed
    stream: str | None = None
    config: str | None = None  # of the dataset on the Hub
    split: str = "train"  # of it
    # files for validation, as `files`; none: some of the training documents, set aside
    valid: tuple[Path, ...] = ()
    valid_share: float = 0.05  # of the documents, to set aside
    valid_documents: int = 200  # of a stream's that are set aside, or stories
    field: str = "text"  # column or key of the text
    # independent parts of a stream, a multiple of the processes that read; None: one for each.
    # Resuming with other processes takes the same number
    lanes: int | None = None
    stories: int = 24_000  # to train on, where there is nothing else
    length: int = 224  # tokens of a packed row, the most that attention spans
    batch: int = 6  # rows of one step, over all processes
    seed: int = 0  # of the stories, of splits and of the order, not of the model


@dataclass(frozen=True)
class Vocabulary:
    """Learned from the training documents only."""

    # byte-level BPE, which spells any text, or whole words; None: words for the stories, which have
    # 200 of them, else bpe
    kind: Literal["bpe", "words"] | None = None
    size: int = 8_000  # most ids [tokens]: 4 specials, 256 bytes of bpe, merges or words
    documents: int = 10_000  # of a stream, to learn from
    file: Path | None = None  # a tokenizer that was saved before, in place of learning one


@dataclass(frozen=True)
class Model:
    """Size of the decoder; None keeps what the size says."""

    size: Literal["nano", "tiny", "small", "gpt2", "large"] = "nano"
    vocab: int | None = None  # rows of the embedding; None: as many as the vocabulary has ids
    width: int | None = None  # of the residual stream
    depth: int | None = None  # blocks
    heads: int | None = None  # attention heads
    kv_heads: int | None = None  # key heads, must divide the heads
    hidden: int | None = None  # width inside the feed-forward layers
    qk_norm: bool = False  # RMSNorm of each head's queries and keys
    dropout: float = 0.0  # probability
    # implementation of attention; None: flash on a GPU, sdpa on a CPU
    attention: Literal["flash", "sdpa", "reference"] | None = None


@dataclass(frozen=True)
class Optimizer:
    """AdamW, or Muon for the matrices of blocks and AdamW beside it; a cosine with warm-up."""

    kind: Literal["adamw", "muon"] = "muon"
    learning_rate: float = 5e-3  # peak, of AdamW
    muon_rate: float = 0.02  # peak, of Muon
    warmup: int = 100  # [steps]
    weight_decay: float = 0.1  # decoupled, on matrices only [1/update, times the learning rate]
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip


@dataclass(frozen=True)
class Train:
    """Length and mechanics of training."""

    steps: int = 2_500  # optimizer steps
    accumulation: int = 1  # microbatches of one step
    log_every: int = 40  # [steps]
    eval_every: int = 500  # validation loss and a checkpoint [steps]
    keep: int = 2  # checkpoints to keep besides the best
    compile: bool | None = None  # compile the step; None: on a GPU
    # replay a compiled step as one CUDA graph, collectives included; None: on a single GPU
    graph: bool | None = None
    # steps to trace with torch's profiler, after three others; leaves trace-<rank>.json.gz
    profile: int = 0


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism, whose product is the number of processes; one may be -1."""

    dp_replicate: int = 1  # processes with equal parameters and other rows
    dp_shard: int = -1  # processes with a shard of each parameter and other rows
    tp: int = 1  # processes that share each layer and the vocabulary
    cp: int = 1  # processes that share the tokens of each row and attend around a ring
    # processes that share layers hold parts of the tokens between them; tp must divide the length
    sequence: bool = True
    # what parameters and gradients travel by; auto: copies between the GPUs of one host where they
    # can see one another's memory, else collectives (NCCL, gloo)
    transport: Literal["auto", "copies", "collectives"] = "auto"
    timeout: float = 600.0  # the run ends when nothing has happened for so long [s]


@dataclass(frozen=True)
class Sample:
    """What to sample at the end."""

    number: int = 100  # samples without a beginning, and as many that go on with validation stories
    temperature: float = 0.5  # 0 is greedy
    top_p: float = 1.0  # probability that the kept candidates hold
    show: int = 4  # of each kind
    prompt: str | None = None  # `sample` goes on with this text


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "sample", "export"]] = "train"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    # go on with the run from its latest checkpoint, also with other processes and degrees
    resume: bool = False
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of initial parameters, dropout and samples
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int | None = None  # CPU threads; None: all cores
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=Data)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)
    sample: Sample = field(default_factory=Sample)


def degrees(mesh: Mesh) -> dict[str, int]:
    return {axis: n for axis, n in asdict(mesh).items() if axis in meshes.AXES}


def checked(config: Config) -> Config:
    """The configuration with what the machine decides filled in.

    Raises:
        ValueError: a size below its least value, a device that is not there, options that exclude
            each other.
    """
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), may_be_zero=MAY_BE_ZERO)
    configs.check_run(config)
    if not config.name and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ValueError(
            "--max-restarts needs a --name: processes that start again find their run by it"
        )
    own = config.data.length // config.mesh.cp
    if config.mesh.sequence and config.mesh.tp > 1 and own % config.mesh.tp:
        shared = f" / --mesh.cp ({config.mesh.cp})" if config.mesh.cp > 1 else ""
        raise ValueError(
            f"--mesh.tp ({config.mesh.tp}) must divide --data.length ({config.data.length})"
            f"{shared}: change one, or pass --mesh.no-sequence"
        )
    if config.mesh.cp > 1 and config.data.length % (2 * config.mesh.cp):
        raise ValueError(
            f"twice --mesh.cp (2 x {config.mesh.cp}) must divide --data.length "
            f"({config.data.length}): change one"
        )
    if config.mesh.cp > 1 and config.model.attention not in (None, "flash"):
        raise ValueError(
            f"--model.attention {config.model.attention} with --mesh.cp {config.mesh.cp}: a ring "
            f"attends by flash, leave the option out"
        )
    if not config.mesh.timeout > 0:
        raise ValueError(f"--mesh.timeout ({config.mesh.timeout}) must be positive [s]")
    if not 0 < config.data.valid_share < 1:
        raise ValueError(f"--data.valid-share ({config.data.valid_share}) must be in (0, 1)")
    machine = configs.machine(config.device, config.dtype, config.train.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.train.graph and not ("cuda" in machine.device and machine.compile):
        raise ValueError(
            f"--train.graph replays a compiled step on a GPU, this one is on {machine.device}, "
            f"{'compiled' if machine.compile else 'not compiled'}: leave it out"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    kind = "bpe" if config.data.files or config.data.stream else "words"
    by_flash = "cuda" in machine.device or config.mesh.cp > 1
    attention = config.model.attention or ("flash" if by_flash else "sdpa")
    return replace(
        config,
        device=machine.device,
        dtype=machine.dtype,
        name=config.name or configs.free_name(config.out, "pretrain"),
        vocabulary=replace(config.vocabulary, kind=config.vocabulary.kind or kind),
        model=replace(config.model, attention=attention),
        train=replace(config.train, compile=machine.compile),
    )


def command_line(args: Sequence[str], description: str) -> Config:
    """The settings that `args` make of the defaults, or of those that a run has kept."""
    start = configs.starting_point(args, {"default": Config()}, modes=("sample", "export"))
    return configs.parse(start, args, description=description, prog="pretrain.py")
