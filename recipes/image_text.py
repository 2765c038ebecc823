r"""Embed images and texts in one space (CLIP or SigLIP) and use it: classes by name, search.

    python recipes/image_text.py                                  # train, then measure and draw

    python recipes/image_text.py --loss sigmoid                   # SigLIP's loss, else CLIP's

    python recipes/image_text.py classify --images a.png b.jpg --classes "red circle" "blue square"

    # a local Hugging Face folder of CLIP (with merges.txt), as it is or trained further
    python recipes/image_text.py classify --published FOLDER --images a.png --classes cat dog
    python recipes/image_text.py --published FOLDER --data.name my_folder --data.size 224

    python recipes/image_text.py --data.name my_folder            # images beside a metadata.jsonl
    python recipes/image_text.py --data.name nlphuji/flickr30k    # or a data set of the Hub

    torchrun --nproc-per-node 4 recipes/image_text.py             # every rank's texts are negatives

Without arguments it learns pictures of coloured shapes that the project makes itself, from captions
such as "a small red circle above a large blue square". Three pairs of colour and kind never occur
in training. Measured on them and on the others:

    zero-shot      images of one shape, 18 classes by name, each in two sentences
    retrieval      recall@k among 1000 validation images and their captions

README.md has the figures. The loss is exact over the whole batch: of all ranks, and with
--train.chunk in the memory of so many pairs. Checkpoints hold all that the run is; --resume
--name NAME goes on bit for bit.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor

from msfs_functional import (
    agreement,
    errors,
    image_figures,
    images,
    meshes,
    optim,
    pictures,
    random,
    schedules,
    sharding,
    tracking,
    zero_shot,
)
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional import image_corpora as corpora
from msfs_functional.clip_tokenizer import ClipTokenizer
from msfs_functional.compiling import graphed
from msfs_functional.contrastive import in_chunks, sigmoid_loss, softmax_loss
from msfs_functional.data import Prefetch
from msfs_functional.gathering import Sharded, gathered, sharded
from msfs_functional.image_corpora import Pictured
from msfs_functional.layouts import TOWERS
from msfs_functional.models import vision_format, vit
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip
from msfs_functional.params import Functional, Params, cast
from msfs_functional.synthetic import shapes
from msfs_functional.tokenizer import PAD, Tokenizer, train_bpe
from msfs_functional.tracking import Tracker
from msfs_functional.train import init_state, make_step

MAY_BE_ZERO = ("seed", "warmup", "chunk")
Words = Tokenizer | ClipTokenizer
CHECKPOINTS, TOKENIZER = "checkpoints", "tokenizer.json"
# Seen in training: "a small red circle". A class is the mean of these sentences.
TEMPLATES = ("a small {}", "a large {}")


@dataclass(frozen=True)
class Data:
    """Where images and texts come from."""

    # "shapes" (made here), a local folder of images with a metadata.jsonl or .csv, or a data set of
    # the Hub
    name: str = "shapes"
    config: str | None = None  # configuration of the Hub's data set
    split: str = "train"  # of it, to train on
    valid: str | None = None  # split to measure on; None: cut off the training images
    valid_share: float = 0.1  # of the images, to cut off
    image: str | None = None  # column of images; None: what it is usually called
    text: str | None = None  # column of texts, the same
    fit: Literal["crop", "squash", "pad"] = "crop"  # what becomes of images that are not square
    limit: int | None = None  # images at most
    count: int = 16_000  # shapes to train on
    size: int = 32  # of a side [pixels]
    seed: int = 0  # of shapes, of splits and of the order, not of the model


@dataclass(frozen=True)
class Model:
    """Sizes of both towers."""

    width: int = 128  # of the residual streams
    depth: int = 4  # layers of the image tower
    text_depth: int = 2  # layers of the text tower
    heads: int = 4
    hidden: int = 384  # width inside the feed-forward layers
    patch: int = 4  # [pixels]
    embedding: int = 64  # dims of the common space; SigLIP's is the width
    vocabulary: int = 512  # most ids of the byte-level BPE [tokens]
    length: int = 16  # of a text, longer ones are cut [tokens]


@dataclass(frozen=True)
class Train:
    """Length and mechanics of training: AdamW, a cosine with warm-up."""

    steps: int = 500
    batch: int = 128  # pairs of one step, over all processes
    chunk: int = 0  # pairs that are embedded at once; 0: all
    learning_rate: float = 2e-3  # peak
    warmup: int = 50  # [steps]
    weight_decay: float = 0.05
    optimizer: Literal["adamw", "muon"] = "muon"  # of the matrices of blocks; AdamW for the rest
    muon_rate: float = 0.02  # peak, of Muon
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip
    log_every: int = 20  # [steps]
    eval_every: int = 250  # recall and a checkpoint [steps]
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
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    train: Train = field(default_factory=Train)


class Splits(NamedTuple):
    """What is trained on, what is measured on, and images of one shape with their class."""

    train: Pictured
    valid: Pictured
    # {"seen" or "unseen": (images, class of each)}; empty without classes
    labelled: dict[str, tuple[Tensor, Tensor]]
    classes: tuple[str, ...]


def read_data(data: Data, test: int) -> Splits:
    if data.name != "shapes":
        columns = {"image": data.image, "text": data.text, "fit": data.fit, "limit": data.limit}
        read = lambda split: corpora.from_table(  # noqa: E731
            corpora.load_table(data.name, data.config, split), data.size, **columns
        )
        whole = read(data.split)
        if data.valid is not None:
            return Splits(whole, read(data.valid), {}, ())
        return Splits(*corpora.hold_out(whole, data.valid_share, data.seed), {}, ())
    train, _ = corpora.shapes_world(data.seed, data.count, size=data.size)
    valid, _ = corpora.shapes_world(data.seed, test, "valid", size=data.size)
    classes = [f"{colour} {kind}" for colour in shapes.COLOURS for kind in shapes.KINDS]
    labelled = {}
    kinds: dict[str, shapes.Split] = {"seen": "valid", "unseen": "unseen"}
    for name, split in kinds.items():
        single, scenes = corpora.shapes_world(
            data.seed, test, split, size=data.size, scene_filter=lambda scene: len(scene.shapes) < 2
        )
        own = [classes.index(f"{s.shapes[0].colour} {s.shapes[0].kind}") for s in scenes]
        labelled[name] = single.images, torch.tensor(own)
    return Splits(train, valid, labelled, tuple(classes))


def make_tokenizer(config: Config, texts: Sequence[str]) -> Words:
    """CLIP's own for a published model, else byte-level BPE of these texts."""
    if config.published is not None:
        return ClipTokenizer.load(config.published)
    return train_bpe(texts, config.model.vocabulary)


def load_published(config: Config) -> vision_format.Published:
    """A published CLIP, in float32.

    Raises:
        ValueError: no such folder, another kind of model, images or texts of another size.
    """
    found = vision_format.load(str(config.published), dtype=torch.float32)
    settings = found.config
    if not isinstance(settings, CLIPConfig) or settings.bias is not None:
        raise ValueError(f"--published ({config.published}) must hold a CLIP, not {settings}")
    size, length = settings.image.size, settings.text.max_length
    if (config.data.size,) * 2 != size or config.model.length > length:
        raise ValueError(
            f"--published takes images of {size} pixels and at most {length} tokens: pass "
            f"--data.size {size[0]} and --model.length {length}, or less"
        )
    return found


def make_model(config: Config, tokenizer: Words) -> Functional:
    """CLIP's towers or SigLIP's, as published ones are built, so that transformers loads them."""
    if config.published is not None:
        return clip(load_published(config).config)
    assert isinstance(tokenizer, Tokenizer)
    sizes = config.model
    common: dict[str, Any] = {"width": sizes.width, "heads": sizes.heads, "hidden": sizes.hidden}
    place = {"image": config.data.size, "patch": sizes.patch, "depth": sizes.depth}
    words: dict[str, Any] = {
        "depth": sizes.text_depth,
        "vocab": tokenizer.vocab_size + 1,  # and the end mark
        "max_length": sizes.length,
    }
    if config.loss == "sigmoid":
        kind: dict[str, Any] = {"activation": "gelu_tanh", "norm_eps": 1e-6}
        text = TextConfig(
            **common,
            **words,
            **kind,
            is_causal=False,
            pooling="last",
            projection=sizes.width,
            projection_bias=True,
        )
        image = vit.siglip_vision(**common, **place)
        # At first all pairs look alike: then each is as likely as one of a batch (Zhai's 32k: -10).
        bias = -math.log(config.train.batch)
        return clip(CLIPConfig(image, text, scale=10.0, bias=bias))
    text = TextConfig(**common, **words, eos=tokenizer.vocab_size, projection=sizes.embedding)
    image = vit.clip_vision(**common, **place, projection=sizes.embedding)
    return clip(CLIPConfig(image, text))


def encode(tokenizer: Words, texts: Sequence[str], length: int) -> Tensor:
    """Ids (N, length), padded on the right; what is longer loses its end."""
    if isinstance(tokenizer, ClipTokenizer):
        return tokenizer.batch(texts, length)
    end = tokenizer.vocab_size  # an id of its own: published CLIPs take id 2 for another sign
    rows = [[*row[: length - 1], end] for row in tokenizer.encode(list(texts), bos=True)]
    ids = torch.full((len(rows), length), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def to_pixels(config: Config, pictures: Tensor) -> Tensor:
    """8 bits to what the tower takes: [-1, 1], or with CLIP's own mean and deviation."""
    dtype = getattr(torch, str(config.dtype))
    if config.published is None:
        return (pictures.float() / 127.5 - 1).to(dtype)
    scales = zip(images.CLIP_MEAN, images.CLIP_STD, strict=True)
    parts = [(pictures[:, c] / 255 - m) / s for c, (m, s) in enumerate(scales)]
    return torch.stack(parts, 1).to(dtype)


def embedder(config: Config, model: Functional) -> Callable[..., tuple[Tensor, Tensor]]:
    """(params, batch, key) -> unit vectors of the images and of the texts."""
    dtype = getattr(torch, str(config.dtype))

    def embed(params: Params, batch: Any, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not isinstance(model, Sharded):  # which casts what it gathers
            params = cast(params, dtype)
        u = model.apply(params, to_pixels(config, batch["images"]), method="embed_image")
        v = model.apply(params, batch["ids"], method="embed_text")
        return u, v

    return in_chunks(embed, config.train.chunk) if config.train.chunk else embed


def make_loss(config: Config, model: Functional):
    """The contrastive loss over everybody's pairs [nats a pair]."""
    embed = embedder(config, model)
    group = dist.group.WORLD.group_name if isinstance(model, Sharded) else None  # pyright: ignore

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor | None):
        u, v = embed(params, batch, key)
        scale = params["logit_scale"].float().exp().clamp(max=100.0)
        if config.loss == "sigmoid":
            bias = params["logit_bias"].float()
            total, count = sigmoid_loss(u, v, scale, bias, group=group)
        else:
            total, count = softmax_loss(u, v, scale, group=group)
        weight = torch.full((), float(count), device=u.device)
        return total / count, {"weight": weight, "scale": scale.detach()}

    return gathered(loss_fn, model) if isinstance(model, Sharded) else loss_fn


def make_optimizer(config: Train) -> optim.Transformation:
    def rates(peak: float) -> schedules.Schedule:
        return schedules.cosine(peak, config.steps, warmup=min(config.warmup, config.steps - 1))

    decay = config.weight_decay
    rules = [(r"logit|norm|bias|positions|class_token|probe|embedding", False), (r"", True)]
    adamw = optim.adamw(rates(config.learning_rate), 0.9, 0.98, 1e-8, decay, rules)
    if config.optimizer == "adamw":
        return adamw
    muon = optim.muon(
        rates(config.muon_rate), weight_decay=decay, matrices=[(r"", True)], dtype=torch.float32
    )
    matrices = r"blocks\.\d+\.(attention|feed_forward)\.\w+\.weight$"
    return optim.by_group([(matrices, muon), (r"", adamw)])


class Pairs:
    """Batch n is a function of the seed and n: which images, and which of an image's texts."""

    def __init__(self, config: Config, data: Pictured, tokenizer: Words, share: tuple[int, int]):
        self.size, self.seed, self.share = config.train.batch, config.data.seed, share
        rows = [i for i, texts in enumerate(data.captions) if texts]
        if len(rows) < self.size or self.size % share[1]:
            raise ValueError(
                f"--train.batch ({self.size}) must be at most the images with a text ({len(rows)})"
                f" and a multiple of the {share[1]} data ranks"
            )
        self.images, self.rows = data.images, rows
        counts = [len(data.captions[i]) for i in rows]
        self.starts = np.concatenate([[0], np.cumsum(counts)])
        flat = [text for i in rows for text in data.captions[i]]
        self.texts = encode(tokenizer, flat, config.model.length)
        self._order: tuple[int, np.ndarray] = -1, np.empty(0)
        self.number = 0

    def __iter__(self) -> "Pairs":
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
        each = len(self.rows) // self.size
        epoch, at = divmod(number - 1, each)
        if self._order[0] != epoch:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
            self._order = epoch, order
        chosen = self._order[1][at * self.size : (at + 1) * self.size]
        rng = np.random.default_rng((self.seed, 1, number))
        counts = self.starts[chosen + 1] - self.starts[chosen]
        which = self.starts[chosen] + (rng.random(self.size) * counts).astype(int)
        part = slice(
            self.share[0] * self.size // self.share[1],
            (self.share[0] + 1) * self.size // self.share[1],
        )
        picked = torch.tensor([self.rows[i] for i in chosen[part]])
        texts = torch.from_numpy(which[part])
        return {"images": self.images[picked], "ids": self.texts[texts]}


class Embedded:
    """A trained model as two functions of raw images and texts."""

    def __init__(self, config: Config, model: Functional, params: Params, tokenizer: Words):
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.params = cast(params, getattr(torch, str(config.dtype)))
        self.length, self.device = config.model.length, str(config.device)

    @torch.no_grad()
    def images(self, pictures: Tensor, batch: int = 256) -> Tensor:
        """Unit vectors, (N, E) in float32, of 8-bit images."""
        parts = [
            self.model.apply(
                self.params, to_pixels(self.config, part.to(self.device)), method="embed_image"
            )
            for part in pictures.split(batch)
        ]
        return torch.cat(parts).float()

    @torch.no_grad()
    def texts(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """Unit vectors, (N, E) in float32."""
        ids = encode(self.tokenizer, texts, self.length).to(self.device)
        parts = [
            self.model.apply(self.params, part, method="embed_text") for part in ids.split(batch)
        ]
        return torch.cat(parts).float()


def retrieval(embedded: Embedded, data: Pictured, most: int) -> dict[str, float]:
    """Recall@k among at most so many images and their texts; equal texts count as one."""
    rows = [i for i, texts in enumerate(data.captions) if texts][:most]
    texts = [text for i in rows for text in data.captions[i]]
    owner = [n for n, i in enumerate(rows) for _ in data.captions[i]]
    # Images with a text in common are right answers of each other's texts.
    first: dict[str, int] = {}
    group = list(range(len(rows)))
    for n, text in zip(owner, texts, strict=True):
        group[n] = min(group[n], group[first.setdefault(text, n)])
    ids = torch.tensor([group[n] for n in range(len(rows))])
    found = zero_shot.recall(
        embedded.images(data.images[rows]).cpu(), embedded.texts(texts).cpu(), ids, ids[owner]
    )
    return {f"retrieval/{name}": value for name, value in found.items()}


def zero_shot_accuracy(embedded: Embedded, splits: Splits, templates: Sequence[str]) -> dict:
    """Share of images of one shape whose class is the nearest of all, by split."""
    if not splits.classes:
        return {}
    classes = zero_shot.class_vectors(embedded.texts, splits.classes, templates)
    scores = {}
    for name, (pictures_, own) in splits.labelled.items():
        found = zero_shot.classify(embedded.images(pictures_), classes)[:, 0].cpu()
        scores[f"zero_shot/{name}"] = (found == own).float().mean().item()
    return scores


def evaluate(config: Config, embedded: Embedded, splits: Splits) -> dict[str, float]:
    templates = config.templates or TEMPLATES
    return {
        **zero_shot_accuracy(embedded, splits, templates),
        **retrieval(embedded, splits.valid, config.test),
    }


def similarity_figure(embedded: Embedded, data: Pictured, count: int = 12):
    """Cosines of so many images and their texts: a bright diagonal."""
    rows = [i for i, texts in enumerate(data.captions) if texts]
    seen: dict[str, int] = {}
    for i in rows:
        seen.setdefault(data.captions[i][0], i)
    texts, rows = list(seen)[:count], list(seen.values())[:count]
    shown = data.images[rows]
    cosines = (embedded.images(shown) @ embedded.texts(texts).mT).cpu().numpy()
    return image_figures.similarity_matrix(cosines, shown.permute(0, 2, 3, 1).numpy(), texts)


def prepare(config: Config) -> tuple[Config, Path, Splits, Any]:
    """(config, run, data, the checkpoint to go on from or None); errors are every rank's."""
    with agreement.together():
        config = checked(config)
    config = replace(config, name=agreement.from_all(config.name)[0])
    run = config.out / str(config.name)
    with agreement.together():
        splits = read_data(config.data, config.test)
        if not config.resume and agreement.rank() == 0:
            configs.check_free(run, overwrite=config.overwrite)
    own = {**asdict(config), "device": torch.device(str(config.device)).type}
    if agreement.world() > 1:
        agreement.start_alike({"configuration": own})
    saved = checkpoints.load(run / CHECKPOINTS) if config.resume else None
    return config, run, splits, saved


def train(config: Config) -> None:
    """data -> model -> loss -> step -> loop -> report"""
    begin = time.perf_counter()
    config, run, splits, saved = prepare(config)
    settings, device = config.train, str(config.device)
    rank, world = agreement.rank(), agreement.world()
    texts = [text for texts in splits.train.captions for text in texts]
    with agreement.together():
        if saved and config.published is None:
            tokenizer = Tokenizer.from_json(saved.files[TOKENIZER].decode())
        else:
            tokenizer = make_tokenizer(config, texts)
        plain = model = make_model(config, tokenizer)
    share = (0, 1)
    if world > 1:
        on = meshes.mesh(dp_shard=-1, device=torch.device(device).type)
        share, dtype = meshes.data_rank(on), getattr(torch, str(config.dtype))
        model = sharded(plain, TOWERS, on, dtype=dtype, reduce_dtype=torch.float32)
    with agreement.together():
        pairs = Pairs(config, splits.train, tokenizer, share)
    optimizer = make_optimizer(settings)
    step = make_step(
        make_loss(config, model),
        optimizer,
        clip_norm=settings.clip or None,
        compile="regions" if settings.compile else False,
        dynamic=False,
    )
    if settings.graph and device.startswith("cuda") and world == 1:
        step = graphed(step)
    if config.published is None:
        params = plain.init(config.seed, device=device)
    else:
        params = {name: p.to(device) for name, p in load_published(config).params.items()}
    if isinstance(model, Sharded):
        params = sharding.shard(params, TOWERS.rules, model.mesh)
    state = init_state(params, optimizer, random.key(config.seed, device=device))
    if saved:
        state = checkpoints.load(saved.path, state).state
    first = int(state.step)
    pairs.restore({"number": first})
    stream = Prefetch(pairs, device)  # pyright: ignore[reportArgumentType]
    with agreement.together():
        if not saved and not rank:
            configs.new_run(run, config, overwrite=config.overwrite)
    writer = checkpoints.Writer(run / CHECKPOINTS, keep_last=2)
    tracker = Tracker(
        run, settings.steps, name="image_text", step=first, every=settings.log_every, rank=rank
    )

    def measured() -> dict[str, float]:
        whole = sharding.gather(state.params)
        return evaluate(config, Embedded(config, plain, whole, tokenizer), splits)

    def save(count: int) -> None:
        tracker.flush()
        files = {TOKENIZER: tokenizer.to_json(), configs.FILE: configs.to_json(config)}
        writer.save(count, state, files=files)

    with tracker, writer, contextlib.closing(stream), errors.interruptible() as stop:
        size = sum(math.prod(shape) for shape in plain.shapes.values())
        tracker.note(
            f"{len(splits.train)} images to train, {len(splits.valid)} to measure, "
            f"{tokenizer.vocab_size} ids\n{size:,} parameters, {device}, {config.dtype}, "
            f"{'compiled' if settings.compile else 'eager'}, {world} processes"
        )
        if splits.train.unreadable.count:
            tracker.note(str(splits.train.unreadable))
        for count in range(first + 1, settings.steps + 1):
            state, values = step(state, next(stream))
            tracker.log(count, values, tokens=values.pop("weight"))
            halt = agreement.highest(stop.received or 0)
            if count % settings.eval_every == 0 and count < settings.steps:
                with tracker.paused():
                    tracker.record(count, measured())
            if halt or count % settings.eval_every == 0 or count == settings.steps:
                save(count)
            if halt and count < settings.steps:
                writer.wait()
                again = f"--resume --out {config.out} --name {config.name}"
                tracker.note(f"saved; go on with: python recipes/image_text.py {again}")
                raise SystemExit(0 if halt == signal.SIGTERM else 128 + halt)
        writer.wait()
        whole = sharding.gather(state.params)
        if not rank:
            report(config, Embedded(config, plain, whole, tokenizer), splits, tracker)
            seconds = time.perf_counter() - begin
            tracker.note(f"{seconds:.0f} seconds; everything is in {run}")


def report(config: Config, embedded: Embedded, splits: Splits, tracker: Tracker) -> None:
    """What the model knows of images it never saw; leaves results.json and pictures."""
    scores = evaluate(config, embedded, splits)
    tracker.record(config.train.steps, scores)
    (tracker.run_dir / "results.json").write_text(f"{json.dumps(scores)}\n", encoding="utf-8")
    tracker.note("\n".join(f"{name:28} {value:.3f}" for name, value in scores.items()))
    tracker.figure("similarity", similarity_figure(embedded, splits.valid))
    records = tracking.read_metrics(tracker.run_dir / tracking.METRICS)
    panels = {
        "nats per pair": {"loss": "training"},
        "share": {
            "zero_shot/unseen": "zero-shot, unseen combinations",
            "retrieval/image_to_text@1": "image to text@1",
            "retrieval/text_to_image@1": "text to image@1",
        },
        "scale": {"scale": "1 / temperature"},
    }
    tracker.figure("curves", pictures.training_curves(records, panels))


def trained(config: Config) -> tuple[Functional, Params, Words]:
    """What the run that `config` names has learned, from its latest checkpoint."""
    found = checkpoints.load(config.out / str(config.name) / CHECKPOINTS)
    tokenizer: Words = (
        Tokenizer.from_json(found.files[TOKENIZER].decode())
        if config.published is None
        else make_tokenizer(config, ())
    )
    model = make_model(config, tokenizer)
    like = {"params": dict(model.shapes)}
    params = checkpoints.load(found.path, like, partial=True).state["params"]
    return model, {name: p.to(config.device) for name, p in params.items()}, tokenizer


def tower(run: Path, device: str) -> tuple[vit.ViTConfig, Params]:
    """The image tower of a run, for caption.py.

    Raises:
        ValueError: no such run.
    """
    saved = configs.load(Config, run / configs.FILE)
    where = {"out": run.parent, "name": run.name, "device": device}
    model, params, _ = trained(replace(saved, **where))
    settings: Any = model.skeleton.config
    own = {n.removeprefix("image."): p for n, p in params.items() if n.startswith("image.")}
    return settings.image, own


def classify(config: Config) -> None:
    """Prints the nearest classes of each image, and the probability of each."""
    config = checked(config)
    if not config.images:
        raise ValueError("--images (none) must name the files to classify")
    if config.published is not None:
        found = load_published(config)
        params = {name: p.to(config.device) for name, p in found.params.items()}
        model, tokenizer = clip(found.config), make_tokenizer(config, ())
    else:
        model, params, tokenizer = trained(config)
    embedded = Embedded(config, model, params, tokenizer)
    own = zero_shot.TEMPLATES if config.published else ("a {}",)
    templates = config.templates or own
    classes = zero_shot.class_vectors(embedded.texts, config.classes, templates)
    for path in config.images:
        picture = images.resize(images.read(path), config.data.size, fit=config.data.fit)
        cosines = (embedded.images(picture[None]) @ classes.mT)[0]
        probabilities = F.softmax(params["logit_scale"].exp().clamp(max=100.0) * cosines, -1)
        best = probabilities.topk(min(3, len(config.classes)))
        named = (
            f"{config.classes[i]} {p:.0%}"
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        print(f"{path}: {', '.join(named)}")


def export(config: Config) -> None:
    """Writes the towers into the run's folder `export`, as transformers loads them."""
    config = checked(config)
    model, params, tokenizer = trained(config)
    folder = config.out / str(config.name) / "export"
    settings: Any = model.skeleton.config
    vision_format.save(folder, settings, params, tokenizer=tokenizer.to_json())
    print(f"{len(params)} tensors in {folder}")


def checked(config: Config) -> Config:
    """The configuration with what was left to the machine filled in.

    Raises:
        ValueError: a number out of range, options that exclude each other.
    """
    configs.check_numbers(config, MAY_BE_ZERO)
    if config.name and Path(config.name).name != config.name:
        raise ValueError(f"--name ({config.name}) must be a plain name: put folders into --out")
    if config.resume and config.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes it: give one of them")
    if not 0 < config.data.valid_share < 1:
        raise ValueError(f"--data.valid-share ({config.data.valid_share}) must be in (0, 1)")
    if config.model.length < 2:
        raise ValueError(f"--model.length ({config.model.length}) must hold BOS and EOS: 2 or more")
    if config.loss == "softmax" and config.train.batch < 2:
        raise ValueError(f"--train.batch ({config.train.batch}) must be 2 or more pairs")
    machine = configs.machine(config.device, config.dtype, config.train.compile)
    if machine.note:
        print(f"note: {machine.note}", file=sys.stderr)
    if config.threads:
        torch.set_num_threads(config.threads)
    return replace(
        config,
        name=config.name or configs.free_name(config.out, "image_text"),
        device=machine.device,
        dtype=machine.dtype,
        train=replace(config.train, compile=machine.compile),
    )


def main(config: Config) -> None:
    modes: dict[str, Callable[[Config], None]] = {"classify": classify, "export": export}
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
    if args[:1] == ["classify"] and configs.option(args, "--published"):  # of no run
        data, model = Data(size=224), Model(length=77)
        start = Config(mode="classify", name="published", data=data, model=model)
        return configs.parse(start, args, description=str(__doc__), prog="image_text.py")
    start = configs.starting_point(args, {"default": Config()}, modes=("classify", "export"))
    return configs.parse(start, args, description=str(__doc__), prog="image_text.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
