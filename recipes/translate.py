r"""Translate with an encoder-decoder Transformer (Vaswani et al. 2017), from raw text to BLEU.

    python recipes/translate.py                                    # train, evaluate, show, draw

    echo "The old woman sees a red house." | python recipes/translate.py translate

    python recipes/translate.py evaluate --decode.beam 8

    python recipes/translate.py --data.train pairs.tsv.gz          # or two aligned text files

    python recipes/translate.py --preset multi30k --data.train train.en.gz train.de.gz \
        --data.valid val.en.gz val.de.gz --data.test test_2016_flickr.en.gz test_2016_flickr.de.gz

Without arguments it learns English to Italian on a corpus that the project makes itself: test BLEU
90.5, 90.4 and 91.0 with --seed 0, 1 and 2, each after 600 steps of 2048 tokens, which take 182 to
199 seconds of CPU time. On 2 cores of an AMD EPYC, torch 2.13, shared with other programs (load
2.5, 4.2, 4.8 and 5.7), the whole command ran 2:53, 4:08, 3:55 and 4:24 minutes.

Every run leaves runs/<name>/ with config.json, metrics.jsonl, TensorBoard events, checkpoints and
pictures. Put the mode first; `evaluate`, `translate` and `--resume` start from the run's settings.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

# CPU threads that wait must soon sleep, or on a busy machine they take the cores from those that
# work: ten times slower with three other processes on two cores. Must stand before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import datasets
import torch
import tyro
from datasets import Dataset
from torch import Tensor

from msfs_functional import (
    checkpoint,
    errors,
    metrics,
    optim,
    pictures,
    random,
    schedules,
    tracking,
)
from msfs_functional import config as configs
from msfs_functional.compiling import graphed
from msfs_functional.data import Prefetch, Splits, TokenBatches, encode_pairs, load_pairs
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models.transformer import DECAY, output_weight, transformer
from msfs_functional.models.transformer import PRESETS as SIZES
from msfs_functional.params import Functional, Params, cast, stack, unstack
from msfs_functional.tokenizer import PAD
from msfs_functional.tracking import Tracker
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.translation import (
    Assessment,
    Tokenizers,
    Translate,
    assess,
    attention_figure,
    read_lines,
    translator,
)

MAY_BE_ZERO = ("seed", "warmup", "extra_length", "valid_sentences")
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Data:
    """Where the sentence pairs come from."""

    # "english_italian" (made here, no network) or a Hugging Face dataset such as opus_books; not
    # used when `train` names files
    name: str = "english_italian"
    config: str | None = None  # configuration of the Hugging Face dataset, such as en-it
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
    seed: int = 0  # of splits and of the order, not of the model


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
    width: int | None = None  # of the residual stream
    depth: int | None = None  # encoder layers
    decoder_depth: int | None = None  # decoder layers; None: as the encoder
    heads: int | None = None  # attention heads; must divide the width
    hidden: int | None = None  # width inside the feed-forward layers
    dropout: float | None = None  # probability, on embeddings and on what each sublayer adds
    # normalise after each sum, as in the paper, or before each sublayer
    norm: Literal["post", "pre"] = "post"
    attention: Literal["flash", "sdpa", "reference"] = "flash"  # implementation of attention


@dataclass(frozen=True)
class Optimizer:
    """How gradients become updates: AdamW."""

    # learning rate over the steps
    schedule: Literal["inverse_square_root", "cosine", "linear", "wsd", "constant"] = "cosine"
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

    steps: int = 600  # optimizer steps
    accumulation: int = 1  # microbatches of one step
    label_smoothing: float = 0.1  # probability mass spread over the vocabulary
    # weight of R-Drop, which predicts each batch under two dropout masks that must agree
    consistency: float = 0.0
    # decay of the average of the parameters that evaluation uses [1/step]; 0: no average
    ema: float = 0.0
    log_every: int = 50  # [steps]
    eval_every: int = 150  # validation loss and a checkpoint [steps]
    keep: int = 3  # checkpoints to keep besides the best
    # validation sentences to translate greedily at each evaluation, for the BLEU that chooses the
    # best checkpoint; 0: the loss chooses
    valid_sentences: int = 100
    compile: bool | None = None  # compile the step; None: on a GPU


@dataclass(frozen=True)
class Decode:
    """How translations are searched."""

    beam: int = 4  # hypotheses kept side by side; 1 is greedy
    length_penalty: float = 1.0  # scores are divided by length ** this
    # longest translation: source tokens plus this, at most data.max_length [tokens]
    extra_length: int = 40
    nbest: int = 1  # translations to print for each line, at most the beam
    batch: int = 64  # sentences decoded at once
    average: int = 1  # average the parameters of this many last checkpoints
    which: Literal["best", "latest"] = "best"  # checkpoint to use when only one is


@dataclass(frozen=True)
class Config:
    """Everything a run needs; frozen, and written to runs/<name>/config.json."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train", "evaluate", "translate"]] = "train"
    # settings that the other options start from (their defaults below are this preset's): default:
    # minutes on a CPU; classic: the well-known tutorial recipe on opus_books; multi30k: English to
    # German on a GPU
    preset: Literal["default", "classic", "multi30k"] = "default"
    # of the run, its folder is <out>/<name>; None: a new number to train, the newest to use
    name: str | None = None
    out: Path = Path("runs")  # folder of the runs
    resume: bool = False  # go on with the run from its latest checkpoint
    overwrite: bool = False  # delete the run of this name first
    seed: int = 0  # of initial parameters and dropout; member i of an ensemble uses seed + i
    # seeds to train at once, stacked in one step; they decode with averaged probabilities
    members: int = 1
    device: str | None = None  # cpu, cuda, cuda:1, ...; None: cuda where there is one
    # of the computation, parameters stay float32; None: bfloat16 on a GPU
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    threads: int | None = None  # CPU threads; None: all cores
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


def read_data(data: Data) -> Splits:
    split, valid, test = (*(() if data.train else data.splits), None, None, None)[:3]
    return load_pairs(
        list(data.train) if data.train else data.name,
        config=data.config,
        split=split or "train",
        valid=list(data.valid) or valid,
        test=list(data.test) or test,
        source=data.source,
        target=data.target,
        valid_size=data.valid_size,
        test_size=data.test_size,
        seed=data.seed,
    )


def learn_tokenizers(vocabulary: Vocabulary, splits: Splits) -> Tokenizers:
    return Tokenizers.learn(splits.train, **asdict(vocabulary))


def make_batches(data: Data, pairs: Dataset, tokenizers: Tokenizers, **options) -> TokenBatches:
    source, target = encode_pairs(pairs, *tokenizers)
    return TokenBatches(
        source,
        target,
        tokens=data.batch,
        max_length=data.max_length,
        buckets=data.buckets,
        **options,
    )


def make_model(config: Config, tokenizers: Tokenizers) -> Functional:
    sizes = ("width", "depth", "decoder_depth", "heads", "hidden", "dropout", "norm")
    chosen = {name: getattr(config.model, name) for name in sizes}
    return transformer(
        SIZES[config.model.size](
            tokenizers.source.vocab_size,
            target_vocab=tokenizers.target.vocab_size,
            tie="all" if config.vocabulary.joint else "none",
            max_length=config.data.max_length,
            **{name: value for name, value in chosen.items() if value is not None},
        )
    )


def make_loss(
    config: Config, model: Functional, label_smoothing: float = 0.0, consistency: float = 0.0
):
    """The mean cross-entropy of the next target token [nats/token]; padding does not count.

    With `consistency` each batch is predicted under two dropout masks, p and q, and
    consistency / 4 (KL(p, q) + KL(q, p)) is added to their mean (R-Drop, Liang et al. 2021, eq. 4).
    """
    dtype = getattr(torch, str(config.dtype))

    def decoder_states(params: Params, batch: dict[str, Tensor], key: Tensor | None) -> Tensor:
        return model.apply(
            params,
            batch["source"],
            batch["target"][:, :-1],
            source_lengths=batch["source_lengths"],
            target_lengths=batch["target_lengths"],
            key=key,
            implementation=config.model.attention,
            method="hidden",
        )

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor | None):
        params, labels = cast(params, dtype), batch["target"][:, 1:]
        weight, count = output_weight(params), (labels != PAD).sum()
        keys = random.split(key).unbind() if consistency and key is not None else [key]
        states = [decoder_states(params, batch, each) for each in keys]
        sums = [
            linear_cross_entropy(each, weight, labels, label_smoothing=label_smoothing)[0]
            for each in states
        ]
        total = sum(sums) / len(sums)
        if len(states) == 2:
            p, q = ((each @ weight.T).float().log_softmax(-1) for each in states)
            divergence = ((p.exp() - q.exp()) * (p - q)).sum(-1)
            total = total + consistency / 4 * divergence.masked_fill(labels == PAD, 0.0).sum()
        return total / count, {"weight": count}

    return loss_fn


def make_optimizer(config: Optimizer, steps: int) -> optim.Transformation:
    peak, warmup = config.learning_rate, config.warmup
    schedule = {
        "inverse_square_root": lambda: schedules.inverse_square_root(peak, warmup=warmup),
        "cosine": lambda: schedules.cosine(peak, steps, warmup=warmup),
        "linear": lambda: schedules.linear(peak, steps, warmup=warmup),
        "wsd": lambda: schedules.warmup_stable_decay(
            peak, steps, warmup=warmup, decay=max(1, steps // 5)
        ),
        "constant": lambda: schedules.constant(peak, warmup=warmup),
    }[config.schedule]()
    return optim.adamw(schedule, config.b1, config.b2, config.eps, config.weight_decay, DECAY)


def make_train_step(
    config: Config, model: Functional, optimizer: optim.Transformation
) -> Callable[[TrainState, dict[str, Tensor]], tuple[TrainState, dict[str, Tensor]]]:
    """The step of this run: compiled a block at a time; on a GPU one CUDA graph for each shape."""
    settings = config.train
    step = make_step(
        make_loss(config, model, settings.label_smoothing, settings.consistency),
        optimizer,
        accumulation=settings.accumulation,
        ema_decay=settings.ema or None,
        members=config.members if config.members > 1 else None,
        clip_norm=config.optimizer.clip or None,
        compile="regions" if settings.compile else False,
        dynamic=config.members == 1,
    )
    return graphed(step) if settings.compile and str(config.device).startswith("cuda") else step


def first_state(config: Config, model: Functional, optimizer: optim.Transformation) -> TrainState:
    """Member i of an ensemble starts, and drops out, as the run with seed + i alone."""
    seeds = range(config.seed, config.seed + config.members)
    members = [model.init(seed, device=config.device) for seed in seeds]
    keys = torch.stack([random.key(seed, device=config.device) for seed in seeds])
    alone = config.members == 1
    params, key = (members[0], keys[0]) if alone else (stack(members), keys)
    return init_state(params, optimizer, key, ema_decay=config.train.ema or None)


def describe(config: Config, splits: Splits, stream: TokenBatches, model: Functional) -> str:
    """What is about to be trained, on what: the first lines of a run."""
    dropped = {**splits.dropped, f"longer than {config.data.max_length} tokens": stream.dropped}
    left_out = [f"{number} {reason}" for reason, number in dropped.items() if number]
    parameters = sum(math.prod(shape) for shape in model.shapes.values())
    how = "compiled" if config.train.compile else "eager"
    members = f"{config.members} members of " if config.members > 1 else ""
    return (
        f"{len(splits.train)} pairs to train, {len(splits.valid)} to validate, "
        f"{len(splits.test)} to test\nleft out: {', '.join(left_out) or 'none'}\n"
        f"{stream.steps_per_epoch} batches an epoch in {len(stream.shapes)} shapes, "
        f"{stream.padding:.0%} padding\n"
        f"{members}{parameters:,} parameters, {config.device}, {config.dtype}, {how}"
    )


def validate(
    config: Config, model: Functional, tokenizers: Tokenizers, params: Params, pairs: Dataset
) -> dict[str, Tensor | float]:
    """Loss [nats/token] without label smoothing, and BLEU of greedy translations."""
    loss_fn = make_loss(config, model)
    if config.members > 1:
        loss_fn = torch.vmap(loss_fn, in_dims=(0, None, None))
    batches = make_batches(config.data, pairs, tokenizers, shuffle=False, epochs=1)
    losses, weights = [], []
    with torch.no_grad():
        for batch in Prefetch(batches, str(config.device)):
            loss, found = loss_fn(params, batch, None)
            losses.append(loss * found["weight"])
            weights.append(found["weight"])
    scores: dict[str, Tensor | float] = {"valid/loss": sum(losses) / sum(weights)}
    if sentences := min(config.train.valid_sentences, len(pairs)):
        greedily = replace(config, decode=replace(config.decode, beam=1, nbest=1))
        translate = make_translate(greedily, model, tokenizers, params)
        found = [best.text for best, *_ in translate(pairs["source"][:sentences])]
        scores["valid/bleu"] = metrics.bleu(found, pairs["target"][:sentences]).value
    return scores


def train(config: Config) -> None:
    """data -> model -> loss -> step -> loop -> report"""
    begin, settings = time.perf_counter(), config.train
    run = config.out / str(config.name)
    if not config.resume:
        configs.check_free(run, overwrite=config.overwrite)
    saved = checkpoint.load(run / CHECKPOINTS) if config.resume else None
    splits = read_data(config.data)
    known = Tokenizers.from_files(saved.files) if saved else None
    tokenizers = known or learn_tokenizers(config.vocabulary, splits)
    stream = make_batches(
        config.data,
        splits.train,
        tokenizers,
        seed=config.data.seed,
        row_multiple=settings.accumulation,
    )
    batches = Prefetch(stream, str(config.device))

    model = make_model(config, tokenizers)
    optimizer = make_optimizer(config.optimizer, settings.steps)
    step = make_train_step(config, model, optimizer)
    state = first_state(config, model, optimizer)
    if saved:
        state = checkpoint.load(saved.path, state).state
        batches.restore(saved.extra["batches"])
        (run / configs.FILE).write_text(configs.to_json(config), encoding="utf-8")
    else:
        configs.new_run(run, config, overwrite=config.overwrite)
    first = int(state.step)

    def save(count: int, score: Tensor | float | None) -> None:
        checkpoint.save(
            run / CHECKPOINTS,
            count,
            state,
            extra={"batches": batches.state()},
            files=tokenizers.to_files(),
            metric=None if score is None else float(torch.as_tensor(score).mean()),
            keep_last=settings.keep,
        )

    tracker = Tracker(run, settings.steps, name="translate", step=first, every=settings.log_every)
    with tracker, errors.interruptible() as stop:
        tracker.note(describe(config, splits, stream, model))
        for count in range(first + 1, settings.steps + 1):
            batch = next(batches)
            state, values = step(state, batch)
            values.pop("weight")
            tracker.log(count, values, tokens=batch["source"].numel() + batch["target"].numel())
            if count % settings.eval_every == 0 or count == settings.steps:
                with tracker.paused():
                    params = state.ema or state.params
                    scores = validate(config, model, tokenizers, params, splits.valid)
                    tracker.record(count, scores)
                    save(count, scores.get("valid/bleu", -scores["valid/loss"]))
            elif stop:
                save(count, None)
            if stop and count < settings.steps:
                resume = (
                    f"python recipes/translate.py --resume --out {config.out} --name {run.name}"
                )
                tracker.note(f"saved after step {count}; go on with: {resume}")
                raise SystemExit(128 + (stop.received or 0))
        batches.close()
        found = report(config, splits, tracker.note)
        (run / "results.json").write_text(f"{json.dumps(found.scores)}\n", encoding="utf-8")
        (run / "test.txt").write_text("".join(f"{text}\n" for text in found.texts), "utf-8")
        draw(config, splits, tracker)
        tracker.note(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def load_trained(config: Config) -> tuple[Functional, Tokenizers, Params]:
    """Model, tokenizers and parameters of a run: the moving average, if it kept one, of the best
    checkpoint or the mean of the last decode.average ones."""
    root, decode = config.out / str(config.name) / CHECKPOINTS, config.decode
    found = checkpoint.checkpoints(root)
    if decode.average > 1 and found:
        places = [each.path for each in found[-decode.average :]]
    else:
        scored = any(each.metric is not None for each in found)
        places = [checkpoint.load(root, which=decode.which if scored else "latest").path]
    tokenizers = Tokenizers.from_files(checkpoint.load(places[-1]).files)
    model = make_model(config, tokenizers)
    members = (config.members,) if config.members > 1 else ()
    like = {name: torch.Size((*members, *shape)) for name, shape in model.shapes.items()}
    kept = "ema" if config.train.ema else "params"
    loaded = [
        checkpoint.load(place, {kept: like}, partial=True, device=config.device).state[kept]
        for place in places
    ]
    return model, tokenizers, {n: torch.stack([p[n] for p in loaded]).mean(0) for n in like}


def make_translate(
    config: Config, model: Functional, tokenizers: Tokenizers, params: Params
) -> Translate:
    decode = config.decode
    return translator(
        model,
        cast(params, getattr(torch, str(config.dtype))),
        *tokenizers,
        members=config.members,
        beams=decode.beam,
        n_best=decode.nbest,
        length_penalty=decode.length_penalty,
        max_length=config.data.max_length,
        extra_length=decode.extra_length,
        batch=decode.batch,
        implementation=config.model.attention,
    )


def report(config: Config, splits: Splits, note: Callable[[str], None] = print) -> Assessment:
    """Translates the test split: ten samples, right and wrong ones, BLEU and chrF."""
    return assess(make_translate(config, *load_trained(config)), splits.test, note)


def draw(config: Config, splits: Splits, tracker: Tracker) -> None:
    """Leaves the curves of the run and the attention map of a test sentence."""
    panels = {
        "nats per token": {"loss": "training, smoothed labels", "valid/loss": "validation"},
        "BLEU": {"valid/bleu": "validation, greedy"},
    }
    records = tracking.read_metrics(tracker.run_dir / tracking.METRICS)
    tracker.figure("curves", pictures.training_curves(records, panels))
    model, tokenizers, params = load_trained(config)
    one = unstack(params)[0] if config.members > 1 else params
    source = max(splits.test["source"][:100], key=lambda text: min(len(text), 60))
    text = make_translate(config, model, tokenizers, params)([source])[0][0].text
    tracker.figure("attention", attention_figure(model, one, *tokenizers, source, text))


def evaluate(config: Config) -> None:
    """Adds a line to the run's evaluations.jsonl; what training left stays as it was."""
    scores = report(config, read_data(config.data)).scores
    line = json.dumps({"decode": asdict(config.decode), **scores})
    with (config.out / str(config.name) / "evaluations.jsonl").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def translate_lines(config: Config) -> None:
    """Prints the translation of each line, or its n best as score, tab, text."""
    model, tokenizers, params = load_trained(config)
    translate = make_translate(config, model, tokenizers, params)
    lines, first = read_lines(config.input), True
    together = 1 if config.input is None and sys.stdin.isatty() else 16 * config.decode.batch
    while block := list(itertools.islice(lines, together)):
        found = translate(block)
        for hypotheses in found:
            for text, score in hypotheses:
                print(text if config.decode.nbest == 1 else f"{score:.4f}\t{text}", flush=True)
        if config.attention_map and first:
            one = unstack(params)[0] if config.members > 1 else params
            figure = attention_figure(model, one, *tokenizers, block[0], found[0][0].text)
            pictures.save_png(figure, config.attention_map)
        first = False
    if first:
        raise ValueError(f"{config.input or 'stdin'} holds no line: give one sentence a line")


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
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
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


def main(config: Config) -> None:
    datasets.disable_progress_bars()  # the tracker's is enough
    modes = {"train": train, "evaluate": evaluate, "translate": translate_lines}
    modes[config.mode](checked(config))


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, PRESETS, modes=("evaluate", "translate"))
    return configs.parse(start, args, description=str(__doc__), prog="translate.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
