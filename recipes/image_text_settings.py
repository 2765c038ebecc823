"""Options of image_text.py: a dataclass for each part of a run, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from pictured_settings import Pictured, settled

from msfs_functional import config as configs

MAY_BE_ZERO = ("seed", "warmup", "chunk")
GREY = 0.2  # of rendered pictures, where nothing else is said: chosen on the rehearsal pairs


@dataclass(frozen=True)
class Model:
    """Sizes of both towers."""

    width: int = 96  # of the residual streams
    depth: int = 3  # layers of the image tower
    text_depth: int = 2  # layers of the text tower
    heads: int = 4
    hidden: int = 288  # width inside the feed-forward layers
    patch: int = 4  # [pixels]
    embedding: int = 64  # dims of the common space; SigLIP's is the width
    vocabulary: int = 512  # most ids of the byte-level BPE [tokens]
    length: int = 16  # of a text, longer ones are cut [tokens]


@dataclass(frozen=True)
class Train:
    """Length and mechanics of training: AdamW, a cosine with warm-up."""

    steps: int = 1000
    batch: int = 128  # pairs of one step, over all processes
    chunk: int = 0  # pairs that are embedded at once; 0: all
    learning_rate: float = 2e-3  # peak
    warmup: int = 50  # [steps]
    weight_decay: float = 0.2
    optimizer: Literal["adamw", "muon"] = "muon"  # of the matrices of blocks; AdamW for the rest
    muon_rate: float = 0.01  # peak, of Muon
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip
    log_every: int = 20  # [steps]
    eval_every: int = 500  # recall and a checkpoint [steps]
    compile: bool = False  # compile the blocks, for large models
    graph: bool = True  # on one GPU: a step is one CUDA graph


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "classify", "export"]] = "train"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoint
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of initial parameters
    loss: Literal["softmax", "sigmoid"] = "softmax"  # CLIP's or SigLIP's
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int | None = None  # CPU threads; None: all cores
    published: Path | None = None  # local folder of a published CLIP to begin with, or to use
    images: tuple[Path, ...] = ()  # classify: files
    classes: tuple[str, ...] = ()  # classify: their names
    # sentences around a class's name; none: "a {}", for a published model seven that suit it
    templates: tuple[str, ...] = ()
    test: int = 1000  # images that retrieval and zero-shot are measured on, at most
    debug: bool = False  # show tracebacks
    data: Pictured = field(default_factory=Pictured)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range, options that exclude each other.
    """
    configs.check_numbers(config, MAY_BE_ZERO)
    config = replace(config, data=settled(config.data, GREY))
    if config.mode != "classify" and (config.images or config.classes):
        raise ValueError(
            f"--images and --classes ({len(config.images)} and {len(config.classes)} given) go "
            "with the mode classify, which must come first"
        )
    if config.model.length < 2:
        raise ValueError(f"--model.length ({config.model.length}) must hold BOS and EOS: 2 or more")
    if config.loss == "softmax" and config.train.batch < 2:
        raise ValueError(f"--train.batch ({config.train.batch}) must be 2 or more pairs")
    return configs.settled(config, "image_text")


def command_line(args: Sequence[str], description: str) -> Config:
    """The settings that `args` make of the defaults, or of those that a run has kept."""
    if args[:1] == ["classify"] and configs.option(args, "--published"):  # of no run
        data, model = Pictured(size=224), Model(length=77)
        start = Config(mode="classify", name="published", data=data, model=model)
    else:
        start = configs.starting_point(args, {"default": Config()}, modes=("classify", "export"))
    return configs.parse(start, args, description=description, prog="image_text.py")
