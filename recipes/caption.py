r"""A small vision-language model: captions of images, answers to questions about them.

    python recipes/caption.py                                  # train, then measure and draw

    python recipes/caption.py --chat my.png --ask "how many squares?" "what colour is the circle?"
    python recipes/caption.py --chat my.png                    # questions from the terminal
    python recipes/caption.py --chat my.png --published FOLDER   # LLaVA or PaliGemma answers

    python recipes/caption.py --preset gpu                     # longer, for a GPU
    python recipes/caption.py --preset easy_vqa --data.name FOLDER   # github.com/vzhou842/easy-VQA;
                                                               # on a CPU: --preset easy_vqa_cpu
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
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in translate.py; must stand before torch

import numpy as np
import torch
from caption_settings import Config, Stage, Train, checked
from caption_settings import command_line as settings_of
from torch import Tensor

from msfs_functional import (
    agreement,
    errors,
    image_figures,
    images,
    launching,
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
from msfs_functional.answering import Answerer, gaze, prompt_ids, turns_apart
from msfs_functional.compiling import graphed
from msfs_functional.data import Prefetch
from msfs_functional.fan_in import by_fan_in
from msfs_functional.gathering import Sharded, gathered, sharded
from msfs_functional.generation import Generator
from msfs_functional.image_batches import DESCRIBE, Questions, texts_of
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
from msfs_functional.published_vlm import PublishedVLM
from msfs_functional.stages import CHECKPOINTS, run_stage
from msfs_functional.synthetic import shapes
from msfs_functional.tokenizer import Tokenizer, train_bpe
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.zero_shot import exact_match

TOKENIZER = "tokenizer.json"
STAGES: dict[str, Rules[bool]] = {"projector": STAGE_1, "all": [(r"", True)]}


class Splits(NamedTuple):
    """What is trained on, and what answers are measured on, by name."""

    train: Pictured
    tests: dict[str, Pictured]


def read_data(config: Config) -> Splits:
    """Images of all splits; those that are measured are `test` at most, drawn by the seed."""
    data, test = config.data, config.test
    if data.name == "shapes":
        how: dict[str, Any] = {"size": data.size, "held_out": shapes.PAIRS[data.held_out]}
        train, _ = corpora.shapes_world(data.seed, data.count, lessons=data.lessons, **how)
        kinds: tuple[shapes.Split, ...] = ("valid", "unseen")
        made = (corpora.shapes_world(data.seed, test, kind, **how)[0] for kind in kinds)
        return Splits(train, dict(zip(kinds, made, strict=True)))
    if corpora.is_easy_vqa(Path(data.name)):
        read = lambda split: corpora.easy_vqa(  # noqa: E731
            Path(data.name), split, data.size, limit=data.limit
        )
        if data.held_out == "rehearsal":
            train, valid = corpora.hold_out(read("train"), data.valid_share, data.seed)
            return Splits(train, {"valid": valid.first(test)})
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


def make_model(config: Config, tokenizer: Tokenizer) -> Functional:
    """The tower, or that of a run of image_text.py, a projector and a decoder."""
    sizes = config.model
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
            heads=sizes.heads,
            hidden=sizes.hidden,
            pooling=None,
        )
    vocab = tokenizer.vocab_size
    decoder = decoders.tiny(
        vocab,
        width=sizes.decoder_width,
        depth=sizes.decoder_depth,
        qk_norm=sizes.qk_norm,
        max_length=max(sizes.length or 0, 256),
        heads=sizes.heads,
        hidden=sizes.decoder_hidden,
    )
    model = vlm(VLMConfig(vision, decoder, vocab, shuffle=sizes.shuffle))  # id beyond the texts'
    return model if sizes.gain is None else by_fan_in(model, sizes.gain)


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
        blocks = r"blocks\.\d+\.(attention\.[qkvo]|feed_forward\.\w+)\.weight$"
        matrices = rf"{blocks}|^projector\.\w+\.weight$" if config.muon_projector else blocks
        groups.insert(0, (matrices, muon))
    names = list(names)
    return optim.by_group([g for g in groups if any(re.search(g[0], name) for name in names)])


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


class Training(NamedTuple):
    """What both stages share."""

    config: Config
    run: Path
    splits: Splits
    tokenizer: Tokenizer
    plain: Functional
    model: Functional  # the same, or in shards
    share: tuple[int, int]  # (number of this process, processes), of the data
    blind: dict[str, str]


def train_stage(t: Training, name: str, params: Params) -> Params:
    """All parameters after a stage, which goes on from its own checkpoints if there are some."""
    config, settings, data = t.config, t.config.train, t.config.data
    stage: Stage = getattr(config, name)
    params, frozen = split_params(params, STAGES[name])
    optimizer = make_optimizer(settings, stage, params)
    step = make_step(
        make_loss(config, t.model, frozen),
        optimizer,
        clip_norm=settings.clip or None,
        compile="regions" if settings.compile else False,
        dynamic=False,
    )
    if settings.graph and str(config.device).startswith("cuda") and agreement.world() == 1:
        step = graphed(step)
    questions = Questions(
        t.splits.train,
        t.tokenizer,
        getattr(t.plain.skeleton, "config"),  # noqa: B009
        settings.images,
        questions=settings.questions,
        turns=settings.turns,
        length=config.model.length,
        tiles=config.model.tiles,
        mix=settings.mix,
        flips=data.flips,
        shift=data.shift,
        tint=data.tint,
        grey=data.grey or 0.0,
        coloured=data.coloured,
        seed=data.seed,
        share=t.share,
    )

    def measured(count: int, state: TrainState) -> dict[str, float]:
        whole = sharding.gather({**frozen, **state.params})
        few = {split: some.first(64) for split, some in t.splits.tests.items()}
        answer = answerer(config, t.plain, whole, t.tokenizer)
        return evaluate(answer, Splits(t.splits.train, few), t.blind)[0]

    say(f"{name}: {count_of(params):,} parameters learn, {count_of(frozen):,} are frozen")
    with contextlib.closing(Prefetch(questions, str(config.device))) as batches:
        state = run_stage(
            t.run / name,
            stage.steps,
            init_state(params, optimizer, random.key(config.seed, device=config.device)),
            step,
            batches,
            device=str(config.device),
            resume=launching.resume_command("recipes/caption.py", t.run),
            every=settings.log_every,
            save_every=settings.eval_every,
            keep=2,
            files={TOKENIZER: t.tokenizer.to_json()},
            tokens=lambda batch: (batch["labels"] != IGNORED).sum(),
            evaluate=measured if name == "all" else None,
            evaluate_every=settings.eval_every,
        )
    return {**frozen, **state.params}


def train(config: Config) -> None:
    """data -> model -> stages -> report"""
    begin = time.perf_counter()
    with agreement.together():
        config = checked(config)
    config = replace(config, name=agreement.from_all(config.name)[0])
    run, device = config.out / str(config.name), str(config.device)
    with agreement.together():
        meshes.degrees(agreement.world(), **asdict(config.mesh))
        if not config.resume and not agreement.rank():
            configs.check_free(run, overwrite=config.overwrite)
        splits = read_data(config)
        tokenizer = train_bpe(texts_of(splits.train), config.model.vocabulary)
        plain = model = make_model(config, tokenizer)
    params, share = initial_params(config, plain, device), (0, 1)
    if agreement.world() > 1:
        agreement.start_alike({"configuration": {**asdict(config), "device": device.split(":")[0]}})
        on = meshes.mesh(**asdict(config.mesh), device=torch.device(device).type)
        share, dtype = meshes.data_rank(on), getattr(torch, str(config.dtype))
        model = sharded(plain, TOWERS, on, dtype=dtype, reduce_dtype=torch.float32)
        params = sharding.shard(params, TOWERS.rules, on)
    with agreement.together():
        if not config.resume and not agreement.rank():
            configs.new_run(run, config, overwrite=config.overwrite)
    counts = ", ".join(f"{len(data)} {name}" for name, data in splits.tests.items())
    say(f"{len(splits.train)} images to train, {counts}; {tokenizer.vocab_size} ids")
    say(str(splits.train.unreadable) if splits.train.unreadable.count else "")
    blind = without_looking(splits.train)
    training = Training(config, run, splits, tokenizer, plain, model, share, blind)
    for name in STAGES:
        params = train_stage(training, name, params)
    whole = sharding.gather(params)
    if not agreement.rank():
        report(training, whole)
    say(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def say(text: str) -> None:
    if text and not agreement.rank():
        print(text, flush=True)


def count_of(params: Params) -> int:
    return sum(p.numel() for p in params.values())


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
    found = checkpoints.load(config.out / str(config.name) / "all" / CHECKPOINTS)
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
    picture = images.read(config.chat)
    if config.published is not None:
        dtype = getattr(torch, str(config.dtype))
        theirs = PublishedVLM(config.published, device=str(config.device), dtype=dtype)
        reply = lambda question: theirs.answer([picture], question)  # noqa: E731
    else:
        answer = answerer(config, *trained(config))
        small = images.resize(picture, config.data.size, fit=config.data.fit)
        seen = answer.image_tokens(small[None])  # once, for all questions
        reply = lambda question: answer(seen, [(0, question)])[0]  # noqa: E731
    questions = config.ask or (line.strip() for line in sys.stdin)
    for question in questions:
        if question:
            print(reply(question), flush=True)


def main(config: Config) -> None:
    if config.mode == "chat":
        return chat(config)
    with launching.joined(config.device, debug=config.debug):
        train(config)


def command_line(args: Sequence[str]) -> Config:
    return settings_of(args, str(__doc__))


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
