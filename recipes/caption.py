r"""A small vision-language model: captions of images, answers to questions about them.

    python recipes/caption.py                                  # train, then measure and draw

    python recipes/caption.py --chat my.png --ask "how many squares?" "what colour is the circle?"
    python recipes/caption.py --chat my.png                    # questions from the terminal

    python recipes/caption.py --preset gpu                     # longer, for a GPU
    python recipes/caption.py --preset easy_vqa --data.name FOLDER   # github.com/vzhou842/easy-VQA
    python recipes/caption.py --data.name my_folder            # images beside a metadata.jsonl
    python recipes/caption.py --vision runs/image_text-1       # the tower of image_text.py

    torchrun --nproc-per-node 4 recipes/caption.py --mesh.dp-shard 4

The patches of an image pass a ViT and a projector and become tokens of a decoder. Stage 1 trains
the projector alone, stage 2 everything, each group with its own learning rate: what is frozen has
no gradient and no optimizer state. Questions of one image share its tokens without seeing each
other, and samples are packed into rows.

Without arguments it learns coloured shapes that the project makes itself, from captions and from
questions drawn by a seeded generator. Three pairs of colour and kind never occur in training, in
pictures or in words; answers are measured on them and on the others (figures: README.md). Exact
match of answers stands beside what somebody gets who knows the training answers and does not look.
Every run leaves ten questions with answers and truth, and where an answer looked, as PNG.
Checkpoints hold all that the run is; --resume --name NAME goes on bit for bit.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from msfs_functional import (
    agreement,
    checkpoint,
    errors,
    image_figures,
    images,
    meshes,
    metrics,
    optim,
    pictures,
    random,
    schedules,
    sharding,
    tracking,
)
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional import image_corpora as corpora
from msfs_functional.answering import (
    Answerer,
    cut_tiles,
    gaze,
    pack_samples,
    prompt_ids,
    sample_of,
    turns_apart,
)
from msfs_functional.compiling import graphed
from msfs_functional.data import Prefetch
from msfs_functional.gathering import Sharded, gathered, sharded
from msfs_functional.generation import Generator
from msfs_functional.image_corpora import Pictured
from msfs_functional.layouts import TOWERS
from msfs_functional.losses import linear_cross_entropy
from msfs_functional.models import decoder as decoders
from msfs_functional.models import vit
from msfs_functional.models.vlm import (
    DECAY,
    IGNORED,
    STAGE_1,
    VLMConfig,
    language_model,
    output_weight,
    vlm,
)
from msfs_functional.params import Functional, Params, Rules, cast
from msfs_functional.params import split as split_params
from msfs_functional.synthetic import shapes
from msfs_functional.tokenizer import Tokenizer, train_bpe
from msfs_functional.tracking import Tracker
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.zero_shot import exact_match

MAY_BE_ZERO = ("seed", "warmup", "steps", "shift")
TOKENIZER = "tokenizer.json"
DESCRIBE = "describe the image."
STAGES: dict[str, Rules[bool]] = {"projector": STAGE_1, "all": [(r"", True)]}


@dataclass(frozen=True)
class Data:
    """Where images, captions and questions come from."""

    # "shapes" (made here), a folder in easy-VQA's layout, a local folder of images with a
    # metadata.jsonl or .csv, or a data set of the Hub
    name: str = "shapes"
    config: str | None = None  # configuration of the Hub's data set
    split: str = "train"  # of it, to train on
    valid: str | None = None  # split to measure on; None: cut off the training images
    valid_share: float = 0.1  # of the images, to cut off
    image: str | None = None  # column of images; None: what it is usually called
    text: str | None = None  # column of captions, the same
    question: str | None = None  # column of questions, the same
    answer: str | None = None  # column of answers, the same
    fit: Literal["crop", "squash", "pad"] = "crop"  # what becomes of images that are not square
    limit: int | None = None  # images at most
    count: int = 16_000  # shapes to train on
    size: int = 32  # of a side [pixels]
    flips: bool = False  # turn and mirror training images at random: not where left and up matter
    shift: int = 0  # move training images at random by at most so much [pixels]
    seed: int = 0  # of shapes, questions, splits and of the order, not of the model


@dataclass(frozen=True)
class Model:
    """Sizes of tower, projector and decoder."""

    width: int = 128  # of the tower
    depth: int = 3  # layers of the tower
    heads: int = 4  # of both
    hidden: int = 384  # width inside the feed-forward layers, of both
    patch: int = 8  # [pixels]
    stem: Literal["linear", "convolutions"] = "convolutions"  # what makes a patch a vector
    positions: Literal["learned", "sincos", "rotary"] = "learned"  # of patches
    shuffle: int = 1  # patches of the side of a square that becomes one token
    decoder_width: int = 128
    decoder_depth: int = 3  # blocks
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, in the decoder
    prefix: bool = False  # tokens of a prompt see each other (PaliGemma); needs rows of one sample
    vocabulary: int = 512  # most ids of the byte-level BPE [tokens]
    length: int = 240  # tokens of a packed row; no sample may be longer
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
    warmup: int = 100  # [steps]


@dataclass(frozen=True)
class Train:
    """Mechanics of training: AdamW, a cosine with warm-up."""

    images: int = 32  # of one step, over all processes
    questions: int = 8  # of each image in one step; captions count as one
    # questions that share an image's tokens in a row, without seeing each other
    turns: int = 8
    optimizer: Literal["adamw", "muon"] = "muon"  # of the matrices of blocks; AdamW for the rest
    muon_rate: float = 0.01  # peak, of Muon
    weight_decay: float = 0.05
    b2: float = 0.98
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip
    log_every: int = 20  # [steps]
    eval_every: int = 400  # exact match and a checkpoint [steps]
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
    # easy_vqa: the data set of that name
    preset: Literal["default", "gpu", "easy_vqa"] = "default"
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
    ask: tuple[str, ...] = ()  # chat: questions; none: read from the terminal
    vision: Path | None = None  # a run of image_text.py whose tower to begin with
    test: int = 250  # images whose questions are measured, at most, of each split
    debug: bool = False  # show tracebacks
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    projector: Stage = field(default_factory=lambda: Stage(20, warmup=5))
    all: Stage = field(default_factory=lambda: Stage(1100))
    train: Train = field(default_factory=Train)
    mesh: Mesh = field(default_factory=Mesh)


GPU = Config(
    preset="gpu",
    data=Data(count=40_000),
    model=Model(
        width=256,
        depth=6,
        hidden=768,
        patch=4,
        stem="linear",
        shuffle=2,
        decoder_width=256,
        decoder_depth=4,
    ),
    all=Stage(2000, rate=1e-3, vision_rate=1e-3),
    train=Train(images=128, muon_rate=0.02, eval_every=500),
)
EASY_VQA = Config(
    preset="easy_vqa",
    test=1000,
    data=Data(name="easy_vqa", size=64, flips=True, shift=4),
    model=Model(patch=8, shuffle=2),
    all=Stage(2000),
    train=Train(eval_every=500),
)
PRESETS = {"default": Config(), "gpu": GPU, "easy_vqa": EASY_VQA}


class Splits(NamedTuple):
    """What is trained on, and what answers are measured on, by name."""

    train: Pictured
    tests: dict[str, Pictured]


def read_data(data: Data, test: int) -> Splits:
    """Images of all splits; those that are measured are `test` at most, drawn by the seed."""
    if data.name == "shapes":
        train, _ = corpora.shapes_world(data.seed, data.count, size=data.size)
        kinds: tuple[shapes.Split, ...] = ("valid", "unseen")
        made = (corpora.shapes_world(data.seed, test, kind, size=data.size)[0] for kind in kinds)
        return Splits(train, dict(zip(kinds, made, strict=True)))
    if corpora.is_easy_vqa(Path(data.name)):
        read = lambda split: corpora.easy_vqa(  # noqa: E731
            Path(data.name), split, data.size, limit=data.limit
        )
        return Splits(read("train"), {"test": read("test").first(test)})
    columns = {name: getattr(data, name) for name in ("image", "text", "question", "answer")}
    read = lambda split: corpora.from_table(  # noqa: E731
        corpora.load_table(data.name, data.config, split),
        data.size,
        **columns,
        fit=data.fit,
        limit=data.limit,
    )
    whole = read(data.split)
    if data.valid is not None:
        return Splits(whole, {data.valid: read(data.valid).first(test)})
    train, valid = corpora.hold_out(whole, data.valid_share, data.seed)
    return Splits(train, {"valid": valid.first(test)})


def learn_tokenizer(config: Config, data: Pictured) -> Tokenizer:
    """Byte-level BPE of all captions, questions and answers to train on."""
    texts = {DESCRIBE: None}
    for captions, pairs in zip(data.captions, data.questions, strict=True):
        texts |= dict.fromkeys([*captions, *(text for pair in pairs for text in pair)])
    return train_bpe(texts, config.model.vocabulary)


def make_model(config: Config, tokenizer: Tokenizer) -> Functional:
    sizes = config.model
    common = {"heads": sizes.heads, "hidden": sizes.hidden}
    if config.vision is not None:
        vision, _ = tower_of(config.vision, "cpu")
    else:
        vision = vit.tiny(
            image=config.data.size // sizes.tiles,
            patch=sizes.patch,
            stem=sizes.stem,
            width=sizes.width,
            depth=sizes.depth,
            positions=sizes.positions,
            pooling=None,
            **common,
        )
    vocab = tokenizer.vocab_size
    decoder = decoders.tiny(
        vocab,
        width=sizes.decoder_width,
        depth=sizes.decoder_depth,
        qk_norm=sizes.qk_norm,
        max_length=max(sizes.length, 256),
        **common,
    )
    return vlm(VLMConfig(vision, decoder, vocab, shuffle=sizes.shuffle))  # id beyond the texts'


def to_pixels(pictures: Tensor, dtype: torch.dtype) -> Tensor:
    """8 bits to [-1, 1]: what the tower takes."""
    return (pictures.float() / 127.5 - 1).to(dtype)


def images_of(config: Config) -> int:
    """What the tower sees of one image: it alone, or a thumbnail and tiles."""
    return 1 if config.model.tiles == 1 else 1 + config.model.tiles**2


def make_loss(config: Config, model: Functional, frozen: Params):
    """Mean cross-entropy of the answers' tokens [nats/token]; frozen parameters are constants."""
    dtype = getattr(torch, str(config.dtype))
    whole_params = isinstance(model, Sharded)  # which casts what it gathers
    how = {"implementation": config.model.attention}
    each = images_of(config)

    def inner(params: Params, batch: dict[str, Tensor], key: Tensor | None):
        params = params if whole_params else cast(params, dtype)
        pixels = to_pixels(batch["pictures"], dtype)
        seen = model.apply(params, pixels, **how, method="image_tokens")
        states = model.apply(
            params,
            batch["tokens"],
            images=seen.unflatten(0, (-1, each))[batch["images"]].flatten(0, 1),
            visible=turns_apart(batch["segments"], batch["turns"]),
            positions=batch["positions"],
            **how,
            method="hidden",
        )
        states = states.flatten(0, 1)[batch["learned"]]
        labels = batch["labels"].flatten()[batch["learned"]]
        weight = output_weight(params)
        total, count = linear_cross_entropy(states, weight, labels, ignore_index=IGNORED)
        return total / count.clamp(min=1), {"weight": count}

    loss = gathered(inner, model) if isinstance(model, Sharded) else inner

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        return loss({**frozen, **params}, batch, key)

    return loss_fn


def make_optimizer(config: Train, stage: Stage, names: Iterable[str]) -> optim.Transformation:
    """A learning rate for the tower and one for the rest of these parameters."""

    def rates(peak: float) -> schedules.Schedule:
        return schedules.cosine(peak, stage.steps, warmup=min(stage.warmup, stage.steps - 1))

    def group(rate: float) -> optim.Transformation:
        return optim.adamw(rates(rate), 0.9, config.b2, 1e-8, config.weight_decay, DECAY)

    groups = [(r"^vision\.", group(stage.vision_rate)), (r"", group(stage.rate))]
    if config.optimizer == "muon":
        muon = optim.muon(
            rates(config.muon_rate),
            weight_decay=config.weight_decay,
            matrices=[(r"", True)],
            dtype=torch.float32,
        )
        matrices = r"blocks\.\d+\.(attention|feed_forward)\.\w+\.weight$"
        groups.insert(0, (matrices, muon))
    names = list(names)
    return optim.by_group([g for g in groups if any(re.search(g[0], name) for name in names)])


class Batches:
    """Batch n is a function of the seed and n: which images, and what is asked of them."""

    def __init__(
        self, config: Config, data: Pictured, tokenizer: Tokenizer, model: VLMConfig, share: Any
    ):
        self.config, self.data, self.model, self.share = config, data, model, share
        self.size, self.seed = config.train.images, config.data.seed
        if len(data) < self.size or self.size % share[1]:
            raise ValueError(
                f"--train.images ({self.size}) must be at most the images to train on ({len(data)})"
                f" and a multiple of the {share[1]} data ranks"
            )
        texts = {DESCRIBE: None}
        for captions, pairs in zip(data.captions, data.questions, strict=True):
            texts |= dict.fromkeys([*captions, *(text for pair in pairs for text in pair)])
        self.ids = dict(zip(texts, tokenizer.encode(list(texts)), strict=True))
        self._order: tuple[int, np.ndarray] = -1, np.empty(0)
        self.number = 0

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, Tensor]:
        self.number += 1
        return self.batch(self.number)

    def state(self) -> dict[str, int]:
        return {"number": self.number}

    def restore(self, state: dict[str, int]) -> None:
        self.number = state["number"]

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number`, counted from 1; this process's share of it."""
        epoch, at = divmod(number - 1, len(self.data) // self.size)
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.data))
            self._order = epoch, order
        chosen = self._order[1][at * self.size : (at + 1) * self.size]
        each, turns = self.size // self.share[1], self.config.train.turns
        samples, moved = [], []
        for row in range(each):
            place = self.share[0] * each + row
            rng = np.random.default_rng((self.seed, 1, number, place))
            i = int(chosen[place])
            pairs = [(self.ids[q], self.ids[a]) for q, a in self.asked(i, rng)]
            for first in range(0, len(pairs), turns):
                part = pairs[first : first + turns]
                samples.append(sample_of(row, part, self.model, images_of(self.config)))
            moved.append(self.moved(self.data.images[i], rng))
        packed = pack_samples(samples, self.config.model.length)
        pictures_ = cut_tiles(torch.stack(moved), self.config.model.tiles)
        return {**packed, "pictures": pictures_}

    def asked(self, image: int, rng: np.random.Generator) -> list[tuple[str, str]]:
        """A caption, if there is one, and questions, none twice unless there are too few."""
        captions, pairs = self.data.captions[image], self.data.questions[image]
        found = [(DESCRIBE, captions[rng.integers(len(captions))])] if captions else []
        count = self.config.train.questions - len(found)
        if pairs and count > 0:
            rows = rng.choice(len(pairs), count, replace=len(pairs) < count)
            found += [pairs[i] for i in rows]
        return [found[i] for i in rng.permutation(len(found))]

    def moved(self, picture: Tensor, rng: np.random.Generator) -> Tensor:
        """The picture turned, mirrored and shifted (the edge repeated) as the settings allow."""
        data = self.config.data
        if data.flips:
            picture = torch.rot90(picture, int(rng.integers(4)), (-2, -1))
            picture = picture.flip(-1) if rng.integers(2) else picture
        if data.shift:
            steps = torch.from_numpy(rng.integers(-data.shift, data.shift + 1, 2))
            rows, columns = (
                (torch.arange(n) + step).clamp(0, n - 1)
                for n, step in zip(picture.shape[-2:], steps, strict=True)
            )
            picture = picture[:, rows][:, :, columns]
        return picture


def answerer(config: Config, model: Functional, params: Params, tokenizer: Tokenizer) -> Answerer:
    """The trained model as a function of images and questions."""
    dtype, device = getattr(torch, str(config.dtype)), str(config.device)
    params = cast(params, dtype)
    settings: Any = model.skeleton.config
    generate = Generator(language_model(settings, params), compile=False)
    ready = lambda part: to_pixels(part.to(device), dtype)  # noqa: E731
    return Answerer(model, params, generate, tokenizer, ready, tiles=config.model.tiles)


def without_looking(data: Pictured) -> dict[str, str]:
    """The commonest training answer of each question."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for pairs in data.questions:
        for question, answer in pairs:
            counts[question][answer] += 1
    return {question: found.most_common(1)[0][0] for question, found in counts.items()}


def evaluate(
    answer: Answerer, splits: Splits, blind: dict[str, str]
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """(scores by split, answers by split): exact match of questions, BLEU of captions."""
    scores, said = {}, {}
    for name, data in splits.tests.items():
        seen = answer.image_tokens(data.images)
        asked = [(i, pair[0]) for i, pairs in enumerate(data.questions) for pair in pairs]
        truths = [pair[1] for pairs in data.questions for pair in pairs]
        if asked:
            said[name] = answer(seen, asked)
            scores[f"{name}/exact_match"] = exact_match(said[name], truths)
            guesses = [blind.get(question, "") for _, question in asked]
            scores[f"{name}/without_looking"] = exact_match(guesses, truths)
        told = [i for i, captions in enumerate(data.captions) if captions]
        if told:
            captions = answer(seen, [(i, DESCRIBE) for i in told])
            references = [data.captions[i] for i in told]
            scores[f"{name}/bleu"] = metrics.bleu(captions, references).value
            scores[f"{name}/chrf"] = metrics.chrf(captions, references).value
            scores[f"{name}/captions_right"] = exact_match(captions, references)
    return scores, said


def initial_params(config: Config, model: Functional, device: str) -> Params:
    """Drawn from the seed; the tower from a run of image_text.py where one is named."""
    params = model.init(config.seed, device=device)
    if config.vision is None:
        return params
    _, tower = tower_of(config.vision, device)
    own = [name for name in params if name.startswith("vision.")]
    return {**params, **{name: tower[name.removeprefix("vision.")] for name in own}}


def tower_of(run: Path, device: str) -> tuple[vit.ViTConfig, Params]:
    """The tower of a run of image_text.py as part of this model: its states are what is seen."""
    import image_text

    settings, params = image_text.tower(run, device)
    return replace(settings, pooling=None, projection=None), params


def prepare(config: Config) -> tuple[Config, Path, Splits]:
    """What is wrong with any process is told here, and every process then ends."""
    with agreement.together():
        config = checked(config)
    config = replace(config, name=agreement.from_all(config.name)[0])
    run = config.out / str(config.name)
    with agreement.together():
        meshes.degrees(agreement.world(), **asdict(config.mesh))
        splits = read_data(config.data, config.test)
        if not config.resume and agreement.rank() == 0:
            configs.check_free(run, overwrite=config.overwrite)
    if agreement.world() > 1:
        own = {**asdict(config), "device": torch.device(str(config.device)).type}
        agreement.start_alike({"configuration": own})
    return config, run, splits


class Training(NamedTuple):
    """What both stages share."""

    config: Config
    run: Path
    splits: Splits
    tokenizer: Tokenizer
    plain: Functional
    model: Functional  # the same, or in shards
    share: tuple[int, int]
    blind: dict[str, str]


def train_stage(t: Training, name: str, params: Params) -> Params:
    """The loop of a stage, from its own checkpoints if there are some; returns all parameters."""
    config, settings = t.config, t.config.train
    stage: Stage = getattr(config, name)
    device, rank, world = str(config.device), agreement.rank(), agreement.world()
    params, frozen = split_params(params, STAGES[name])
    optimizer = make_optimizer(settings, stage, params)
    step = make_step(
        make_loss(config, t.model, frozen),
        optimizer,
        clip_norm=settings.clip or None,
        compile="regions" if settings.compile else False,
        dynamic=False,
    )
    if settings.graph and device.startswith("cuda") and world == 1:
        step = graphed(step)
    state = init_state(params, optimizer, random.key(config.seed, device=device))
    root = t.run / name / "checkpoints"
    if agreement.from_all(bool(checkpoint.checkpoints(root)))[0]:
        state = checkpoints.load(root, state).state
    first = int(state.step)
    if first >= stage.steps:
        return {**frozen, **state.params}
    settings_of: Any = t.plain.skeleton.config
    batches = Batches(config, t.splits.train, t.tokenizer, settings_of, t.share)
    batches.restore({"number": first})
    stream = Prefetch(batches, device)  # pyright: ignore[reportArgumentType]
    writer = checkpoints.Writer(root, keep_last=2)
    tracker = Tracker(
        t.run / name, stage.steps, name=name, step=first, every=settings.log_every, rank=rank
    )

    def save(count: int, state: TrainState) -> None:
        tracker.flush()
        writer.save(count, state, files={TOKENIZER: t.tokenizer.to_json()})

    with tracker, writer, contextlib.closing(stream), errors.interruptible() as stop:
        size = sum(p.numel() for p in params.values())
        tracker.note(
            f"{size:,} parameters learn, {sum(p.numel() for p in frozen.values()):,} are frozen; "
            f"{device}, {config.dtype}, {'compiled' if settings.compile else 'eager'}, "
            f"{world} processes"
        )
        for count in range(first + 1, stage.steps + 1):
            state, values = step(state, next(stream))
            tracker.log(count, values, tokens=values.pop("weight"))
            halt = agreement.highest(stop.received or 0)
            last = count == stage.steps
            if count % settings.eval_every == 0 and not last:
                with tracker.paused():
                    whole = sharding.gather({**frozen, **state.params})
                    some = answerer(config, t.plain, whole, t.tokenizer)
                    tests = {n: data.first(64) for n, data in t.splits.tests.items()}
                    scores, _ = evaluate(some, Splits(t.splits.train, tests), t.blind)
                    tracker.record(count, scores)
            if halt or last or count % settings.eval_every == 0:
                save(count, state)
            if halt and not last:
                writer.wait()
                again = f"--resume --out {config.out} --name {config.name}"
                tracker.note(f"saved; go on with: python recipes/caption.py {again}")
                raise SystemExit(0 if halt == signal.SIGTERM else 128 + halt)
    return {**frozen, **state.params}


def train(config: Config) -> None:
    """data -> model -> stages -> report"""
    begin = time.perf_counter()
    config, run, splits = prepare(config)
    device, world = str(config.device), agreement.world()
    with agreement.together():
        tokenizer = learn_tokenizer(config, splits.train)
        plain = model = make_model(config, tokenizer)
    share = (0, 1)
    params = initial_params(config, plain, device)
    if world > 1:
        on = meshes.mesh(**asdict(config.mesh), device=torch.device(device).type)
        share, dtype = meshes.data_rank(on), getattr(torch, str(config.dtype))
        model = sharded(plain, TOWERS, on, dtype=dtype, reduce_dtype=torch.float32)
        params = sharding.shard(params, TOWERS.rules, on)
    with agreement.together():
        if not config.resume and not agreement.rank():
            configs.new_run(run, config, overwrite=config.overwrite)
    blind = without_looking(splits.train)
    training = Training(config, run, splits, tokenizer, plain, model, share, blind)
    if not agreement.rank():
        counts = ", ".join(f"{len(data)} {name}" for name, data in splits.tests.items())
        print(f"{len(splits.train)} images to train, {counts}; {tokenizer.vocab_size} ids")
        if splits.train.unreadable.count:
            print(splits.train.unreadable)
    for name in STAGES:
        params = train_stage(training, name, params)
    whole = sharding.gather(params)
    if not agreement.rank():
        report(training, whole)
        print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def report(t: Training, params: Params) -> None:
    """Scores on what was never seen; leaves results.json, answers.json and pictures."""
    answer = answerer(t.config, t.plain, params, t.tokenizer)
    scores, said = evaluate(answer, t.splits, t.blind)
    (t.run / "results.json").write_text(f"{json.dumps(scores)}\n", encoding="utf-8")
    for name, value in scores.items():
        print(f"{name:28} {value:.3f}")
    for name, answers in said.items():
        data = t.splits.tests[name]
        asked = [(i, *pair) for i, pairs in enumerate(data.questions) for pair in pairs]
        right: dict[str, list[bool]] = defaultdict(list)
        for (_, question, truth), found in zip(asked, answers, strict=True):
            right[" ".join(question.split()[:2])].append(found == truth)
        kinds = ", ".join(f"{kind} {np.mean(marks):.0%}" for kind, marks in sorted(right.items()))
        print(f"{name} by kind of question: {kinds}")
        rows = [asked[i] for i in range(0, len(asked), max(1, len(asked) // 10))][:10]
        ten = [answers[asked.index(row)] for row in rows]
        shown = [data.images[i].permute(1, 2, 0).numpy() for i, *_ in rows]
        figure = image_figures.answers(shown, [q for _, q, _ in rows], ten, [a for *_, a in rows])
        pictures.save_png(figure, t.run / f"answers_{name}.png")
        looks(answer, data.images[rows[-1][0]], rows[-1][1], t.run / f"gaze_{name}.png")
    records = tracking.read_metrics(t.run / "all" / tracking.METRICS)
    splits = list(t.splits.tests)
    panels = {
        "nats per answer token": {"loss": "training"},
        "exact match": {f"{name}/exact_match": name for name in splits},
    }
    pictures.save_png(pictures.training_curves(records, panels), t.run / "curves.png")


def looks(answer: Answerer, picture: Tensor, question: str, path: Path) -> str:
    """Answers a question and draws where each word of the answer looked."""
    seen = answer.image_tokens(picture[None])
    said = answer(seen, [(0, question)])[0]
    prompt, words = (answer.tokenizer.encode([text])[0] for text in (question, said))
    prompt = prompt_ids(prompt, answer.config, seen.shape[1])
    weights = gaze(answer.model, answer.params, prompt, words, seen[0]).float().cpu()
    rows, columns = (n // answer.config.shuffle for n in answer.config.vision.grid)
    maps = weights[:, : rows * columns].unflatten(-1, (rows, columns)).numpy()  # the whole's, first
    labels = answer.tokenizer.tokens(words)
    figure = image_figures.gaze(
        picture.permute(1, 2, 0).numpy(), list(maps), labels, title=f"{question} {said}"
    )
    pictures.save_png(figure, path)
    return said


def trained(config: Config) -> tuple[Functional, Params, Tokenizer]:
    """What the run that `config` names has learned, from its latest checkpoint."""
    found = checkpoints.load(config.out / str(config.name) / "all" / "checkpoints")
    tokenizer = Tokenizer.from_json(found.files[TOKENIZER].decode())
    model = make_model(config, tokenizer)
    like = {"params": dict(model.shapes)}
    params = checkpoints.load(found.path, like, partial=True).state["params"]
    return model, {name: p.to(config.device) for name, p in params.items()}, tokenizer


def chat(config: Config) -> None:
    """Answers questions about one image: those given, or a line each from the terminal."""
    config = checked(config)
    if config.chat is None:
        raise ValueError("--chat (none) must name an image file")
    answer = answerer(config, *trained(config))
    picture = images.read(config.chat)
    picture = images.resize(picture, config.data.size, fit=config.data.fit)
    seen = answer.image_tokens(picture[None])  # once, for all questions
    questions = config.ask or (line.strip() for line in sys.stdin)
    for question in questions:
        if question:
            print(answer(seen, [(0, question)])[0], flush=True)


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range, options that exclude each other.
    """
    configs.check_numbers(replace(config, mesh=Mesh(dp_shard=1)), MAY_BE_ZERO)
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    if not 0 < config.data.valid_share < 1:
        raise ValueError(f"--data.valid-share ({config.data.valid_share}) must be in (0, 1)")
    if config.all.steps < 1:
        raise ValueError(f"--all.steps ({config.all.steps}) must be at least 1")
    machine = configs.machine(config.device, config.dtype, config.train.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    attention = config.model.attention or ("flash" if "cuda" in machine.device else "sdpa")
    return replace(
        config,
        model=replace(config.model, attention=attention),
        name=config.name or configs.free_name(config.out, "caption"),
        device=machine.device,
        dtype=machine.dtype,
        train=replace(config.train, compile=machine.compile),
    )


def main(config: Config) -> None:
    modes: dict[str, Callable[[Config], None]] = {"chat": chat}
    if config.mode != "train":
        return modes[config.mode](config)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        meshes.join(torch.device(config.device).type if config.device else None)
    with agreement.said_once() if not config.debug else contextlib.nullcontext():
        train(config)
    if several:
        dist.destroy_process_group()


def command_line(args: Sequence[str]) -> Config:
    if configs.option(args, "--chat") is not None and args[:1] != ["chat"]:
        args = ["chat", *args]
    start = configs.starting_point(args, PRESETS, modes=("chat",))
    return configs.parse(start, args, description=str(__doc__), prog="caption.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
