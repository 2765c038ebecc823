"""Options of caption.py: a dataclass for each part of a run, presets, and what is refused."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from pictured_settings import Pictured, settled

from msfs_functional import config as configs

MAY_BE_ZERO = ("seed", "warmup", "steps", "shift")
GREY = 0.1  # of rendered pictures, where nothing else is said: chosen on the rehearsal pairs


@dataclass(frozen=True)
class Data(Pictured):
    """Where images, captions and questions come from, and how training images are changed."""

    question: str | None = None  # column of questions; None: what it is usually called
    answer: str | None = None  # column of answers, the same
    lessons: bool = False  # shapes: more to learn from, see `shapes.lessons`
    flips: bool = False  # turn and mirror training images at random: not where left and up matter
    shift: int = 0  # move training images at random by at most so much [pixels]
    tint: float = 0.0  # scale each colour of training images at random by at most so much


@dataclass(frozen=True)
class Model:
    """Sizes of tower, projector and decoder."""

    width: int = 64  # of the tower
    depth: int = 3  # layers of the tower
    heads: int = 4  # of both
    hidden: int = 192  # width inside the tower's feed-forward layers
    patch: int = 4  # [pixels]
    stem: Literal["linear", "convolutions"] = "convolutions"  # what makes a patch a vector
    positions: Literal["learned", "sincos", "rotary"] = "learned"  # of patches
    shuffle: int = 2  # patches of the side of a square that becomes one token
    decoder_width: int = 64
    decoder_depth: int = 3  # blocks
    decoder_hidden: int = 192  # width inside its feed-forward layers
    # matrices of blocks and projector begin as N(0, gain^2 / inputs); None: as N(0, 0.02^2)
    gain: float | None = 0.5
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, in the decoder
    vocabulary: int = 512  # most ids of the byte-level BPE [tokens]
    # tokens of a packed row; no sample may be longer; None: of the longest that may be drawn
    length: int | None = None
    # implementation of attention; None: flash on a GPU, sdpa on a CPU
    attention: Literal["flash", "sdpa", "reference"] | None = None
    # tiles along a side that a large image is cut into, beside a thumbnail; 1: the image alone
    tiles: int = 1


@dataclass(frozen=True)
class Stage:
    """Length of a stage and its peak learning rates."""

    steps: int
    rate: float = 2e-3  # of the decoder and the projector
    vision_rate: float = 2e-3  # of the tower
    warmup: int = 30  # [steps]


@dataclass(frozen=True)
class Train:
    """Mechanics of training: AdamW, a cosine with warm-up."""

    images: int = 32  # of one step, over all processes
    questions: int = 4  # of each image in one step; captions count as one
    # questions that share an image's tokens in a row, without seeing each other
    turns: int = 4
    # how often questions are asked, by the first regex that is found in them; others: 1
    mix: tuple[tuple[str, float], ...] = ()
    optimizer: Literal["adamw", "muon"] = "muon"  # of the matrices of blocks; AdamW for the rest
    muon_projector: bool = False  # the projector's matrices by Muon, too
    muon_rate: float = 0.01  # peak, of Muon
    weight_decay: float = 0.2
    b2: float = 0.98
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip
    log_every: int = 20  # [steps]
    eval_every: int = 800  # exact match and a checkpoint [steps]
    compile: bool = False  # compile the blocks, for large models
    graph: bool = True  # on one GPU: a step is one CUDA graph


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism, whose product is the number of processes; one may be -1."""

    dp_replicate: int = 1  # processes with equal parameters and other images
    dp_shard: int = -1  # processes with a shard of each parameter and other images


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "chat"]] = "train"
    # settings that the other options start from: default: minutes on a CPU; gpu: minutes on a GPU;
    # easy_vqa: the data set of that name on a GPU; easy_vqa_cpu: on a CPU
    preset: Literal["default", "gpu", "easy_vqa", "easy_vqa_cpu"] = "default"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoint
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of initial parameters
    device: str | None = None  # cpu, cuda, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16"] | None = None
    threads: int | None = None  # CPU threads; None: all cores
    chat: Path | None = None  # answer questions about this image with a run's model
    published: Path | None = None  # chat: a local folder with LLaVA or PaliGemma instead of a run
    ask: tuple[str, ...] = ()  # chat: questions; none: read from the terminal
    vision: Path | None = None  # a run of image_text.py whose tower to begin with
    test: int = 250  # images whose questions are measured, at most, of each split
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=lambda: Data(count=48_000, lessons=True))
    model: Model = field(default_factory=Model)
    projector: Stage = field(default_factory=lambda: Stage(20, warmup=5))
    all: Stage = field(default_factory=lambda: Stage(1550))
    train: Train = field(
        default_factory=lambda: Train(
            mix=(("^describe", 3.0), ("^is there", 2.0)), muon_projector=True, eval_every=775
        )
    )
    mesh: Mesh = field(default_factory=Mesh)


GPU = Config(
    preset="gpu",
    data=Data(count=64_000, grey=0.2),
    model=Model(
        width=192,
        depth=4,
        hidden=576,
        decoder_width=128,
        decoder_hidden=384,
        gain=None,  # 0.5 learns relations sooner, but takes more unseen pairs for seen ones
        length=160,
    ),
    all=Stage(4500),
    train=Train(images=128, eval_every=1500),
)
# Half as wide a circle covers 2 pixels at 32 x 32: its kind is only seen at full size.
EASY_VQA = replace(
    GPU,
    preset="easy_vqa",
    test=1000,
    data=Data(name="easy_vqa", size=64),
    model=replace(GPU.model, patch=8, gain=0.5),
    all=Stage(1000),
    train=Train(
        images=128,
        eval_every=500,
        mix=((r"what shape|circle|rectangle|triangle", 3.0),),
        muon_projector=True,
    ),
)
EASY_VQA_CPU = replace(
    EASY_VQA,
    preset="easy_vqa_cpu",
    model=replace(
        EASY_VQA.model, width=96, hidden=288, depth=3, decoder_width=64, decoder_hidden=192
    ),
    all=Stage(3200),
    train=replace(EASY_VQA.train, images=32, eval_every=1600),
)
PRESETS = {
    "default": Config(),
    "gpu": GPU,
    "easy_vqa": EASY_VQA,
    "easy_vqa_cpu": EASY_VQA_CPU,
}


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range, options that exclude each other.
    """
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), MAY_BE_ZERO)
    config = replace(config, data=settled(config.data, GREY))
    if config.mode == "train" and (config.ask or config.published):
        raise ValueError(
            f"--ask {config.ask} and --published ({config.published}) go with --chat IMAGE"
        )
    if config.data.size % config.model.tiles:
        raise ValueError(
            f"--model.tiles ({config.model.tiles}) must divide --data.size ({config.data.size})"
        )
    if config.all.steps < 1:
        raise ValueError(f"--all.steps ({config.all.steps}) must be at least 1")
    config = configs.settled(config, "caption")
    attention = config.model.attention or ("flash" if "cuda" in str(config.device) else "sdpa")
    return replace(config, model=replace(config.model, attention=attention))


def command_line(args: Sequence[str], description: str) -> Config:
    """The settings that `args` make of a preset, or of those that a run has kept."""
    if configs.option(args, "--chat") is not None and args[:1] != ["chat"]:
        args = ["chat", *args]
    if args[:1] == ["chat"] and configs.option(args, "--published"):  # of no run
        start = Config(mode="chat", name="published")
        return configs.parse(start, args, description=description, prog="caption.py")
    start = configs.starting_point(args, PRESETS, modes=("chat",))
    return configs.parse(start, args, description=description, prog="caption.py")
