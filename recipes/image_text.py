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
in training; a fifth of its pictures is in grey, with captions that name no colour, so that kinds
are learned apart from colours. Measured on the three and on the others:

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
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from image_text_settings import Config, Train, checked
from image_text_settings import command_line as settings_of
from torch import Tensor

from msfs_functional import (
    agreement,
    errors,
    image_figures,
    images,
    launching,
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
from msfs_functional.image_batches import Pairs
from msfs_functional.image_corpora import Pictured
from msfs_functional.layouts import TOWERS
from msfs_functional.models import vision_format, vit
from msfs_functional.models.clip import CLIPConfig, TextConfig, clip
from msfs_functional.models.families import Published
from msfs_functional.params import Functional, Params, cast
from msfs_functional.stages import CHECKPOINTS, run_stage
from msfs_functional.synthetic import shapes
from msfs_functional.tokenizer import PAD, Tokenizer, train_bpe
from msfs_functional.train import TrainState, init_state, make_step

Words = Tokenizer | ClipTokenizer
TOKENIZER = "tokenizer.json"
# Seen in training: "a small red circle". A class is the mean of these sentences.
TEMPLATES = ("a small {}", "a large {}")


class Splits(NamedTuple):
    """What is trained on, what is measured on, and images of one shape with their class."""

    train: Pictured
    valid: Pictured
    # {"seen" or "unseen": (images, class of each)}; empty without classes
    labelled: dict[str, tuple[Tensor, Tensor]]
    classes: tuple[str, ...]


def read_data(config: Config) -> Splits:
    """Images of all splits; of shapes as many as are measured at most, drawn by the seed."""
    data, test = config.data, config.test
    if data.name != "shapes":
        columns = {"image": data.image, "text": data.text, "fit": data.fit, "limit": data.limit}
        read = lambda split: corpora.from_table(  # noqa: E731
            corpora.load_table(data.name, data.config, split), data.size, **columns
        )
        whole = read(data.split)
        if data.valid is not None:
            return Splits(whole, read(data.valid), {}, ())
        return Splits(*corpora.hold_out(whole, data.valid_share, data.seed), {}, ())
    how: dict[str, Any] = {"size": data.size, "held_out": shapes.PAIRS[data.held_out]}
    train, _ = corpora.shapes_world(data.seed, data.count, **how)
    valid, _ = corpora.shapes_world(data.seed, test, "valid", **how)
    classes = [f"{colour} {kind}" for colour in shapes.COLOURS for kind in shapes.KINDS]
    labelled = {}
    kinds: dict[str, shapes.Split] = {"seen": "valid", "unseen": "unseen"}
    for name, split in kinds.items():
        single, scenes = corpora.shapes_world(
            data.seed, test, split, scene_filter=lambda scene: len(scene.shapes) < 2, **how
        )
        own = [classes.index(f"{s.shapes[0].colour} {s.shapes[0].kind}") for s in scenes]
        labelled[name] = single.images, torch.tensor(own)
    return Splits(train, valid, labelled, tuple(classes))


def make_tokenizer(config: Config, texts: Sequence[str]) -> Words:
    """CLIP's own for a published model, else byte-level BPE of these texts."""
    if config.published is not None:
        return ClipTokenizer.load(config.published)
    return train_bpe(texts, config.model.vocabulary)


def load_published(config: Config) -> Published:
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
    # CLIP's own, x * sigmoid(1.702 x), is an approximation of gelu that takes longer on a CPU.
    common["activation"] = "gelu"
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


def train(config: Config) -> None:
    """data -> model -> loss -> step -> loop -> report"""
    begin = time.perf_counter()
    with agreement.together():
        config = checked(config)
    config = replace(config, name=agreement.from_all(config.name)[0])
    run, device, settings = config.out / str(config.name), str(config.device), config.train
    rank, world = agreement.rank(), agreement.world()
    with agreement.together():
        if not config.resume and not rank:
            configs.check_free(run, overwrite=config.overwrite)
        splits = read_data(config)
        texts = [text for texts in splits.train.captions for text in texts]
        if not texts:
            raise ValueError(
                f"--data.name {config.data.name} has no texts beside its images: name their column "
                "by --data.text (questions and answers are for caption.py)"
            )
        tokenizer = make_tokenizer(config, texts)
        plain = model = make_model(config, tokenizer)
    share = (0, 1)
    if world > 1:
        agreement.start_alike({"configuration": {**asdict(config), "device": device.split(":")[0]}})
        on = meshes.mesh(dp_shard=-1, device=torch.device(device).type)
        share, dtype = meshes.data_rank(on), getattr(torch, str(config.dtype))
        model = sharded(plain, TOWERS, on, dtype=dtype, reduce_dtype=torch.float32)
    with agreement.together():
        data, length = config.data, config.model.length
        uncoloured = [re.sub(rf"(?:{data.coloured})\s*", "", text).strip() for text in texts]
        pairs = Pairs(
            splits.train,
            encode(tokenizer, texts, length),
            settings.batch,
            grey=data.grey or 0.0,
            colourless=encode(tokenizer, uncoloured, length) if data.grey else None,
            seed=data.seed,
            share=share,
        )
        if not config.resume and not rank:
            configs.new_run(run, config, overwrite=config.overwrite)
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

    def measured(count: int, state: TrainState) -> dict[str, float]:
        whole = sharding.gather(state.params)
        return evaluate(config, Embedded(config, plain, whole, tokenizer), splits)

    if not rank:
        size = sum(math.prod(shape) for shape in plain.shapes.values())
        print(f"{len(splits.train)} images to train, {len(splits.valid)} to measure")
        print(f"{size:,} parameters, {tokenizer.vocab_size} ids, {device}, {config.dtype}")
        if splits.train.unreadable.count:
            print(splits.train.unreadable)
    with contextlib.closing(Prefetch(pairs, device)) as batches:
        state = run_stage(
            run,
            settings.steps,
            init_state(params, optimizer, random.key(config.seed, device=device)),
            step,
            batches,
            device=device,
            resume=launching.resume_command("recipes/image_text.py", run),
            every=settings.log_every,
            save_every=settings.eval_every,
            keep=2,
            files={TOKENIZER: tokenizer.to_json(), configs.FILE: configs.to_json(config)},
            tokens=lambda batch: (batch["ids"] != PAD).sum(),  # of texts
            evaluate=measured,
            evaluate_every=settings.eval_every,
        )
    whole = sharding.gather(state.params)
    if not rank:
        report(run, Embedded(config, plain, whole, tokenizer), splits)
        print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def report(run: Path, embedded: Embedded, splits: Splits) -> None:
    """What the model knows of images it never saw, and pictures of it."""
    records = tracking.read_metrics(run / tracking.METRICS)
    last = [record for record in records if "retrieval/image_to_text@1" in record][-1]
    scores = {name: value for name, value in last.items() if "/" in name}
    (run / "results.json").write_text(f"{json.dumps(scores)}\n", encoding="utf-8")
    print("\n".join(f"{name:28} {value:.3f}" for name, value in scores.items()))
    pictures.save_png(similarity_figure(embedded, splits.valid), run / "similarity.png")
    panels = {
        "nats per pair": {"loss": "training"},
        "share": {
            "zero_shot/unseen": "zero-shot, unseen combinations",
            "retrieval/image_to_text@1": "image to text@1",
            "retrieval/text_to_image@1": "text to image@1",
        },
        "scale": {"scale": "1 / temperature"},
    }
    pictures.save_png(pictures.training_curves(records, panels), run / "curves.png")


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
    if not config.classes:
        raise ValueError("--classes (none) must name what the images may show, one text a class")
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


def main(config: Config) -> None:
    modes: dict[str, Callable[[Config], None]] = {"classify": classify, "export": export}
    if config.mode != "train":
        return modes[config.mode](config)
    with launching.joined(config.device, debug=config.debug):
        train(config)


def command_line(args: Sequence[str]) -> Config:
    return settings_of(args, str(__doc__))


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
