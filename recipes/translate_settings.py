"""Settings of recipes/translate.py: every option with its default, unit and meaning; the presets.

`python recipes/translate.py --help` shows them; a run keeps its own in runs/<name>/config.json.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from msfs_functional import config as configs
from msfs_functional import schedules

MAY_BE_ZERO = ("seed", "warmup", "extra_length", "valid_sentences")


@dataclass(frozen=True)
class Data:
    """Where the sentence pairs come from."""

    # "english_italian" (made here, no network) or a Hugging Face dataset such as opus_books; not
    # used when `train` names files
    name: str = "english_italian"
    config: str | None = None  # configuration of that Hugging Face dataset, such as en-it
    # splits of the Hugging Face dataset to train, to validate and to test on; what is not named is
    # cut off the training data
    splits: tuple[str, ...] = ("train",)
    # local training data: one .tsv, .jsonl or .parquet file, or two aligned text files, source then
    # target; .gz and .zip are read as they are
    train: tuple[Path, ...] = ()
    # the same for validation; left out, it is cut off the training data
    valid: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()  # the same for the test
    source: str | None = None  # column or language to translate from; None: the first
    target: str | None = None  # column or language to translate into; None: the second
    # source sentences to cut off for validation: a count, or a fraction below 1; None: 5%, at most
    # 1000
    valid_size: float | None = None
    # source sentences to cut off for the test: a count, or a fraction below 1
    test_size: float | None = None
    max_length: int = 128  # longest sentence [tokens]; longer pairs are dropped and counted
    batch: int = 2048  # padded source and target tokens of one step [tokens]
    buckets: int = 6  # most shapes that a batch can have
    seed: int = 0  # of the splits and the order of batches, not of the model


@dataclass(frozen=True)
class Vocabulary:
    """How text becomes ids; learned from the training split only."""

    # byte-level BPE, which spells every text, or whole words with <unk> for the rest
    kind: Literal["bpe", "word"] = "bpe"
    size: int = 4000  # most ids [tokens], specials included
    joint: bool = True  # one vocabulary for both languages, which lets all embeddings be shared


@dataclass(frozen=True)
class Model:
    """Size of the Transformer; None keeps what the size says."""

    # tiny: 4 + 4 layers of 128; base and big: as in the paper
    size: Literal["tiny", "base", "big"] = "tiny"
    width: int | None = None  # of the residual stream [channels]
    depth: int | None = None  # encoder layers
    decoder_depth: int | None = None  # decoder layers; None: as the encoder
    heads: int | None = None  # attention heads; must divide the width
    hidden: int | None = None  # width inside the feed-forward layers [channels]
    dropout: float | None = None  # probability, on embeddings and on what each sublayer adds
    # normalise after each sum, as in the paper, or before each sublayer
    norm: Literal["post", "pre"] = "post"
    attention: Literal["flash", "sdpa", "reference"] = "flash"  # implementation of attention


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates: AdamW."""

    # learning rate over the steps
    schedule: schedules.Name = "cosine"
    learning_rate: float = 3e-3  # peak, reached after the warm-up
    warmup: int = 100  # steps in which the learning rate rises from 0 [steps]
    weight_decay: float = 0.0  # decoupled, on matrices only [1/update, times the learning rate]
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.98  # decay of the second moment
    eps: float = 1e-9  # added to the root of the second moment
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip


@dataclass(frozen=True)
class Train:
    """Length and mechanics of training."""

    steps: int = 600  # length of the training [optimizer steps]
    accumulation: int = 1  # microbatches of one step
    label_smoothing: float = 0.1  # probability mass spread over the vocabulary
    # weight of R-Drop, which predicts each batch under two dropout masks that must agree
    consistency: float = 0.0
    # decay of the average of the parameters that evaluation uses [1/step]; 0: no average
    ema: float = 0.0
    log_every: int = 50  # write loss, gradient norm and speed so often [steps]
    eval_every: int = 150  # validate and save a checkpoint so often [steps]
    keep: int = 3  # newest checkpoints to keep, besides the best [checkpoints]
    # validation sentences to translate greedily at each evaluation, for the BLEU that chooses the
    # best checkpoint; 0: the loss chooses
    valid_sentences: int = 100
    compile: bool | None = None  # compile the step; None: on a GPU


@dataclass(frozen=True)
class Decode:
    """How translations are searched."""

    beam: int = 4  # hypotheses kept side by side; 1 is greedy
    length_penalty: float = 1.0  # scores are divided by length ** this
    # longest translation: its source, rounded up to a multiple of 16, plus this, and at most
    # data.max_length [tokens]
    extra_length: int = 40
    nbest: int = 1  # translations to print for each line, at most the beam
    batch: int = 64  # decoded at once [sentences]
    average: int = 1  # use the mean parameters of so many newest checkpoints [checkpoints]
    which: Literal["best", "latest"] = "best"  # checkpoint to use, where it is one alone
    members: int | None = None  # of an ensemble to decode with, from the first on; None: all


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # train (then evaluate and draw), evaluate a run on the test split, or translate lines with it;
    # must come first
    mode: tyro.conf.Positional[Literal["train", "evaluate", "translate"]] = "train"
    # settings that the other options start from (their defaults below are this preset's): default:
    # minutes on a CPU; classic: the well-known tutorial recipe on opus_books; multi30k: English to
    # German on a GPU
    preset: Literal["default", "classic", "multi30k"] = "default"
    # name of the run, whose folder is <out>/<name>; None: to train a new one, translate-1,
    # translate-2, ..., to evaluate, translate or resume the newest
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoint
    overwrite: bool = False  # delete an earlier run of this name first
    seed: int = 0  # of initial parameters and dropout; member i of an ensemble uses seed + i
    # seeds to train at once, stacked in one step; they decode with averaged probabilities
    members: int = 1
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: cuda where there is one
    # numbers of the computation, parameters stay float32; None: bfloat16 on a GPU, float32 on a
    # CPU
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threads: int | None = None  # CPU threads to compute with; None: all cores
    input: Path | None = None  # translate: text file with a sentence a line; None: stdin
    # translate: draw how the first sentence's translation attends to it into this PNG
    attention_map: Path | None = None
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=Data)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    model: Model = field(default_factory=lambda: Model(depth=2, hidden=512, dropout=0.0))
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    decode: Decode = field(default_factory=Decode)


HUB_SPLITS = ("train", "validation", "test")
MULTI30K = Config(
    preset="multi30k",
    data=Data("bentrevett/multi30k", None, HUB_SPLITS, batch=8192, buckets=8),
    vocabulary=Vocabulary(size=8000),
    model=Model("tiny", width=256, depth=3, hidden=1024, dropout=0.3),
    optimizer=Optimizer(schedule="inverse_square_root", learning_rate=2e-3, warmup=2000),
    train=Train(steps=8000, ema=0.999, consistency=3.0, eval_every=1000, valid_sentences=200),
    decode=Decode(beam=5),
)
CLASSIC = Config(
    preset="classic",
    data=Data(name="opus_books", config="en-it", batch=768, max_length=350),
    vocabulary=Vocabulary("word", size=30_000, joint=False),
    model=Model("base", dropout=0.1, norm="pre"),
    optimizer=Optimizer("constant", learning_rate=1e-4, warmup=0, b2=0.999, clip=0.0),
    train=Train(steps=45_000, eval_every=2_250, valid_sentences=200),
    decode=Decode(beam=1),
)
PRESETS = {"default": Config(), "classic": CLASSIC, "multi30k": MULTI30K}


def checked(config: Config) -> Config:
    """The configuration with what the machine decides filled in.

    Raises:
        ValueError: a size below its least value, a device that is not there, options that exclude
            each other.
    """
    configs.check_numbers(config, may_be_zero=MAY_BE_ZERO)
    if config.decode.nbest > config.decode.beam:
        raise ValueError(
            f"--decode.nbest ({config.decode.nbest}) must not exceed --decode.beam "
            f"({config.decode.beam}): use more beams"
        )
    if (config.decode.members or 1) > config.members:
        raise ValueError(
            f"--decode.members ({config.decode.members}) must not exceed --members "
            f"({config.members}): train more"
        )
    configs.check_run(config)
    machine = configs.machine(config.device, config.dtype, config.train.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(
        config,
        device=machine.device,
        dtype=machine.dtype,
        name=config.name or configs.free_name(config.out, "translate"),
        train=replace(config.train, compile=machine.compile),
    )


def command_line(args: Sequence[str], description: str) -> Config:
    """The settings that `args` make of a preset, or of those that a run has kept."""
    start = configs.starting_point(args, PRESETS, modes=("evaluate", "translate"))
    return configs.parse(start, args, description=description, prog="translate.py")
