r"""Translate with an encoder-decoder Transformer (Vaswani et al. 2017), from raw text to BLEU.

    python recipes/translate.py                                    # train, evaluate, show, draw

    echo "The old woman sees a red house." | python recipes/translate.py translate

    python recipes/translate.py evaluate --decode.beam 8

    python recipes/translate.py --data.train pairs.tsv.gz          # or two aligned text files

    python recipes/translate.py --preset multi30k --data.train train.en.gz train.de.gz \
        --data.valid val.en.gz val.de.gz --data.test test_2016_flickr.en.gz test_2016_flickr.de.gz

Without arguments it learns English to Italian on a corpus that the project makes itself: test BLEU
90.5, 90.4 and 91.0 with --seed 0, 1 and 2, each after 600 steps of 2048 tokens. The whole command
takes 160 to 200 seconds of CPU time, 135 seconds by the clock where both cores are free (AMD EPYC,
torch 2.13).

Every run leaves runs/<name>/ with config.json, metrics.jsonl, TensorBoard events, checkpoints and
pictures. Put the mode first; `evaluate`, `translate` and `--resume` start from the run's settings.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace

# CPU threads that wait must soon sleep, or on a busy machine they take the cores from those that
# work: ten times slower with three other processes on two cores. Must stand before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import datasets
import torch
from datasets import Dataset
from torch import Tensor
from translate_settings import Config, Data, Optimizer, checked, command_line

from msfs_functional import (
    checkpoint,
    errors,
    launching,
    losses,
    metrics,
    optim,
    pictures,
    random,
    schedules,
    tracking,
    translation,
)
from msfs_functional import config as configs
from msfs_functional.compiling import graphed
from msfs_functional.data import Prefetch, Splits, TokenBatches, encode_pairs, load_pairs
from msfs_functional.models import transformer as models
from msfs_functional.params import Functional, Params, cast, count, unstack
from msfs_functional.tokenizer import PAD
from msfs_functional.train import Step, TrainState, first_state, make_step, mean_loss
from msfs_functional.translation import Assessment, Tokenizers, Translate

CHECKPOINTS = "checkpoints"
NOT_FINITE = "their loss or gradient was not finite: lower --optimizer.learning-rate if they go on"


def read_data(data: Data) -> Splits:
    """Train, validation and test pairs, split before anything is fitted."""
    split, valid, test = (*(() if data.train else data.splits), None, None, None)[:3]
    return load_pairs(
        list(data.train) or data.name,
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


def make_batches(data: Data, pairs: Dataset, tokenizers: Tokenizers, **options) -> TokenBatches:
    options = {"tokens": data.batch, "buckets": data.buckets, **options}
    return TokenBatches(*encode_pairs(pairs, *tokenizers), max_length=data.max_length, **options)


def make_model(config: Config, tokenizers: Tokenizers) -> Functional:
    given = {k: v for k, v in asdict(config.model).items() if v is not None}
    size, _ = models.PRESETS[given.pop("size")], given.pop("attention")
    return models.transformer(
        size(
            tokenizers.source.vocab_size,
            target_vocab=tokenizers.target.vocab_size,
            tie="all" if config.vocabulary.joint else "none",
            max_length=config.data.max_length,
            **given,
        )
    )


def make_loss(
    config: Config, model: Functional, label_smoothing: float = 0.0, consistency: float = 0.0
):
    """The mean cross-entropy of the next target token [nats/token]; padding does not count.

    With `consistency` each batch is predicted under two dropout masks, p and q, and
    consistency / 4 (KL(p, q) + KL(q, p)) is added to their mean (R-Drop, Liang et al. 2021, eq. 4).
    """

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor | None):
        params, labels = cast(params, getattr(torch, str(config.dtype))), batch["target"][:, 1:]
        weight, tokens = models.output_weight(params), (labels != PAD).sum()
        count = tokens.clamp(min=1)  # a microbatch of filling rows alone is no 0 / 0

        def predicted(key: Tensor | None) -> tuple[Tensor, Tensor]:
            states = model.apply(
                params,
                batch["source"],
                batch["target"][:, :-1],
                source_lengths=batch["source_lengths"],
                target_lengths=batch["target_lengths"],
                key=key,
                implementation=config.model.attention,
                method="hidden",
            )
            loss, _ = losses.linear_cross_entropy(
                states, weight, labels, label_smoothing=label_smoothing
            )
            return states, loss

        if not consistency or key is None:
            return predicted(key)[1] / count, {"weight": tokens}
        (p, first), (q, second) = map(predicted, random.split(key).unbind())
        apart = losses.disagreement(p @ weight.T, q @ weight.T, labels)
        return ((first + second) / 2 + consistency / 4 * apart) / count, {"weight": tokens}

    return loss_fn


def make_optimizer(config: Optimizer, steps: int) -> optim.Transformation:
    rate = schedules.named(config.schedule, config.learning_rate, steps, warmup=config.warmup)
    decay = config.weight_decay
    return optim.adamw(rate, config.b1, config.b2, config.eps, decay, models.DECAY)


def make_train_step(
    config: Config, model: Functional, optimizer: optim.Transformation
) -> tuple[Step, TrainState]:
    """The step of this run, compiled a block at a time and on a GPU one CUDA graph for each shape;
    and the state that it begins with."""
    settings, many = config.train, config.members > 1
    step = make_step(
        make_loss(config, model, settings.label_smoothing, settings.consistency),
        optimizer,
        accumulation=settings.accumulation,
        ema_decay=settings.ema or None,
        members=config.members if many else None,
        clip_norm=config.optimizer.clip or None,
        compile="regions" if settings.compile else False,
        dynamic=not many,
    )
    if settings.compile and str(config.device).startswith("cuda"):
        step = graphed(step)
    seeds = range(config.seed, config.seed + config.members)
    ema = settings.ema or None
    return step, first_state(model, optimizer, seeds, device=config.device, ema_decay=ema)


def validate(
    config: Config, model: Functional, tokenizers: Tokenizers, params: Params, pairs: Dataset
) -> dict[str, Tensor | float]:
    """Loss [nats/token] without label smoothing, and BLEU of greedy translations."""
    batches = make_batches(config.data, pairs, tokenizers, shuffle=False, epochs=1)
    members = config.members if config.members > 1 else None
    resident = Prefetch(batches, str(config.device))
    loss = mean_loss(make_loss(config, model), params, resident, members=members)
    scores: dict[str, Tensor | float] = {"valid/loss": loss}
    if sentences := min(config.train.valid_sentences, len(pairs)):
        greedily = replace(config, decode=replace(config.decode, beam=1, nbest=1))
        translate = make_translate(greedily, model, tokenizers, params)
        found = [best.text for best, *_ in translate(pairs["source"][:sentences])]
        scores["valid/bleu"] = metrics.bleu(found, pairs["target"][:sentences]).value
    return scores


def train(config: Config) -> None:
    """data -> model -> loss -> step -> loop -> report"""
    begin, settings, run = time.perf_counter(), config.train, config.out / str(config.name)
    if not config.resume:
        configs.check_free(run, overwrite=config.overwrite)
    saved = checkpoint.load(run / CHECKPOINTS) if config.resume else None
    splits = read_data(config.data)
    tokenizers = (
        Tokenizers.from_files(saved.files)
        if saved
        else Tokenizers.learn(splits.train, **asdict(config.vocabulary))
    )
    rows = {"row_multiple": settings.accumulation}
    stream = make_batches(config.data, splits.train, tokenizers, seed=config.data.seed, **rows)
    batches = Prefetch(stream, str(config.device))

    model = make_model(config, tokenizers)
    optimizer = make_optimizer(config.optimizer, settings.steps)
    step, state = make_train_step(config, model, optimizer)
    if saved:
        state = checkpoint.load(saved.path, state).state
        batches.restore(saved.extra["batches"])
        (run / configs.FILE).write_text(configs.to_json(config), encoding="utf-8")
    else:
        configs.new_run(run, config, overwrite=config.overwrite)
    first, left_out = int(state.step), int(state.skipped.sum())

    def save(number: int, score: Tensor | float | None) -> None:
        checkpoint.save(
            run / CHECKPOINTS,
            number,
            state,
            extra={"batches": batches.state()},
            files=tokenizers.to_files(),
            metric=None if score is None else float(torch.as_tensor(score).mean()),
            keep_last=settings.keep,
        )

    tracker = tracking.Tracker(
        run, settings.steps, name="translate", step=first, every=settings.log_every
    )
    with tracker:
        tracker.note(translation.describe(splits, stream, config.data.max_length))
        size, how = count(state.params), "compiled" if settings.compile else "eager"
        tracker.note(f"{size:,} parameters, {config.device}, {config.dtype}, {how}")
        with errors.interruptible() as stop:
            for number in range(first + 1, settings.steps + 1):
                batch = next(batches)
                state, values = step(state, batch)
                values.pop("weight")
                tokens = batch["source"].numel() + batch["target"].numel()
                tracker.log(number, values, tokens=tokens)
                if number % settings.eval_every == 0 or number == settings.steps:
                    if (skipped := int(state.skipped.sum())) > left_out:
                        tracker.note(f"{skipped - left_out} updates left out, {NOT_FINITE}")
                        left_out = skipped
                    with tracker.paused():
                        params = state.ema or state.params
                        scores = validate(config, model, tokenizers, params, splits.valid)
                        tracker.record(number, scores)
                        save(number, scores.get("valid/bleu", -scores["valid/loss"]))
                elif stop:
                    with tracker.paused():
                        save(number, None)
                if stop:
                    resume = launching.resume_command("recipes/translate.py", run)
                    tracker.note(f"saved after step {number}; go on with: {resume}")
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
    places = checkpoint.to_evaluate(root, decode.which, decode.average)
    tokenizers = Tokenizers.from_files(checkpoint.load(places[-1]).files)
    model = make_model(config, tokenizers)
    members = (config.members,) if config.members > 1 else ()
    shapes = {name: (*members, *shape) for name, shape in model.shapes.items()}
    part = "ema" if config.train.ema else "params"
    return model, tokenizers, checkpoint.mean(places, part, shapes, device=config.device)


def make_translate(
    config: Config, model: Functional, tokenizers: Tokenizers, params: Params
) -> Translate:
    decode, members = config.decode, config.decode.members or config.members
    if members < config.members:
        params = {name: x[:members] if members > 1 else x[0] for name, x in params.items()}
    return translation.translator(
        model,
        cast(params, getattr(torch, str(config.dtype))),
        *tokenizers,
        members=members,
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
    return translation.assess(make_translate(config, *load_trained(config)), splits.test, note)


def attention_figure(
    config: Config, model: Functional, tokenizers: Tokenizers, params: Params, *texts: str
):
    """How a translation looks at its source; of an ensemble, the first member's."""
    one = unstack(params)[0] if config.members > 1 else params
    return translation.attention_figure(model, one, *tokenizers, *texts)


def draw(config: Config, splits: Splits, tracker: tracking.Tracker) -> None:
    """Leaves the curves of the run and the attention map of a test sentence."""
    panels = {
        "nats per token": {"loss": "training, smoothed labels", "valid/loss": "validation"},
        "BLEU": {"valid/bleu": "validation, greedy"},
    }
    records = tracking.read_metrics(tracker.run_dir / tracking.METRICS)
    tracker.figure("curves", pictures.training_curves(records, panels))
    trained = load_trained(config)
    source = max(splits.test["source"][:100], key=lambda text: min(len(text), 60))
    text = make_translate(config, *trained)([source])[0][0].text
    tracker.figure("attention", attention_figure(config, *trained, source, text))


def evaluate(config: Config) -> None:
    """Adds a line to the run's evaluations.jsonl; what training left stays as it was."""
    scores = report(config, read_data(config.data)).scores
    line = json.dumps({"decode": asdict(config.decode), **scores})
    with (config.out / str(config.name) / "evaluations.jsonl").open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def translate_lines(config: Config) -> None:
    """Prints the translation of each line, or its n best as score, tab, text."""
    trained, decode = load_trained(config), config.decode
    first = translation.print_translations(
        make_translate(config, *trained),
        translation.read_lines(config.input),
        at_once=1 if config.input is None and sys.stdin.isatty() else 16 * decode.batch,
        scores=decode.nbest > 1,
    )
    if first is None:
        raise ValueError(f"{config.input or 'stdin'} holds no line: give one sentence a line")
    if config.attention_map:
        pictures.save_png(attention_figure(config, *trained, *first), config.attention_map)


def main(config: Config) -> None:
    datasets.disable_progress_bars()  # the tracker's is enough
    modes = {"train": train, "evaluate": evaluate, "translate": translate_lines}
    modes[config.mode](checked(config))


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:], str(__doc__)))
