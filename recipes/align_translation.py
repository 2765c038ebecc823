r"""Tune a translation model by preferences: its own samples, judged by the references.

    python recipes/align_translation.py                      # trains a translator first
    python recipes/align_translation.py --run runs/translate-1
    python recipes/align_translation.py --resume --name align_translation-1

    python recipes/translate.py translate --out runs/align_translation-1 --name tuned

A model that recipes/translate.py has trained translates training sentences several times, once
greedily. Of each sentence the best and the worst translation are a pair, so that the preferred
one is never worse than what the model would say; DPO on log-probabilities a token, and imitation of
the preferred ones, learn from them. Of the parameters on the way those are kept that translate the
validation split best, greedily (BLEU); the start is one of them. They are left as a run of
translate.py, `tuned`.
The report is BLEU and chrF of greedy and of sampled translations of held-out sentences: of the
validation split, by which that and the settings were chosen, and of the test split.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in recipe.py; must stand before torch

import datasets
import translate as recipe
import tyro
from torch import Tensor

from msfs_functional import checkpoint, errors, launching, metrics, random
from msfs_functional import config as configs
from msfs_functional.aligning import Stage, optimizer_of
from msfs_functional.pairs import Shuffled
from msfs_functional.params import Functional, Params
from msfs_functional.preference import dpo
from msfs_functional.stages import CHECKPOINTS, run_stage
from msfs_functional.tokenizer import PAD
from msfs_functional.train import TrainState, init_state, make_step
from msfs_functional.translation import Tokenizers
from msfs_functional.translation_preference import (
    TranslationPair,
    judged_pairs,
    pair_data,
    pair_sums,
    sample_translations,
)

NAME = "align_translation"


def shorter() -> recipe.Config:
    """A translator that leaves something to learn: half of the default's steps."""
    start = recipe.Config()
    return replace(start, train=replace(start.train, steps=300))


@dataclass(frozen=True)
class Config:
    """What to tune, and how."""

    # what to do; must come first
    mode: tyro.conf.Positional[Literal["train"]] = "train"
    run: Path | None = None  # of translate.py; None: train one first, with these settings:
    translate: recipe.Config = field(default_factory=shorter)
    out: Path = Path("runs")
    name: str | None = None  # of this run; None: a new number, the newest to go on with
    resume: bool = False  # go on with the run from where it was stopped
    overwrite: bool = False  # delete the run of this name first
    sentences: int = 6000  # of the training split, to translate
    samples: int = 5  # translations of each, beside the greedy one
    # of the samples; at 1 even the best of them is worse than the greedy translation
    temperature: float = 0.5
    gap: float = 5.0  # least difference of the two of a pair [points of chrF and BLEU]
    held_out: int = 600  # sentences of each split to report on
    beta: float = 5.0  # strength of the pull to the reference, on nats a token
    preference: float = 1.0  # weight of DPO's loss; 0: imitation of the best translations alone
    imitation: float = 3.0  # weight of the chosen translations' mean negative log-probability
    dpo: Stage = field(default_factory=lambda: Stage(150, 64, 1e-3, 20))
    every: int = 25  # steps from one look at the validation split to the next
    seed: int = 0
    debug: bool = False  # show tracebacks


@dataclass(frozen=True)
class Kept:
    """The best parameters so far, on disk as a run that translate.py can use."""

    root: Path  # of its checkpoints
    tokenizers: Tokenizers

    def save(self, step: int, params: Params, score: float) -> None:
        files, state = self.tokenizers.to_files(), {"params": params}
        options: dict[str, Any] = {"keep_last": 1, "keep_best": 0}
        checkpoint.save(self.root, step, state, files=files, metric=score, **options)

    def load(self, like: Params) -> tuple[int, Params, float] | None:
        """(step, parameters, their score); None: nothing was saved."""
        if not checkpoint.checkpoints(self.root):
            return None
        found = checkpoint.load(self.root, {"params": like})
        assert found.metric is not None
        return found.step, found.state["params"], found.metric


def tune(
    config: Config,
    model: Functional,
    params: Params,
    data: dict[str, Tensor],
    run: Path,
    kept: Kept,
    score_fn: Callable[[Params], float],
) -> tuple[int, Params]:
    """DPO from `params`, which stay as they are: the step and the parameters of the best score."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        sums, lengths = pair_sums(model, params, batch, key=key)
        means, before = sums / lengths, batch["reference"] / lengths
        out = dpo(*means.unbind(1), *before.unbind(1), beta=config.beta)
        imitation = -sums[:, 0].sum() / lengths[:, 0].sum()
        right = (out.margins > 0).float().mean()
        return config.preference * out.losses.mean() + config.imitation * imitation, {
            "margin": out.margins.mean(),
            "accuracy": right,
            "imitation": imitation.detach(),
        }

    before = kept.load(params)
    best = before or (0, params, score_fn(params))
    if before is None:
        kept.save(*best)

    def evaluate(count: int, state: TrainState) -> dict[str, float]:
        nonlocal best
        found = score_fn(state.params)
        if found > best[2]:
            best = count, {name: value.clone() for name, value in state.params.items()}, found
            kept.save(*best)
        return {"valid/greedy_bleu": found}

    optimizer = optimizer_of(config.dpo)
    own = {name: value.clone() for name, value in params.items()}
    device = str(next(iter(params.values())).device)
    run_stage(
        run / "dpo",
        config.dpo.steps,
        init_state(own, optimizer, random.key(config.seed, device=device)),
        make_step(loss_fn, optimizer, clip_norm=1.0, compile=False),
        Shuffled(data, config.dpo.batch, config.seed),
        device=device,
        resume=launching.resume_command(f"recipes/{NAME}.py", run),
        tokens=lambda batch: (batch["target"] != PAD).sum(),
        evaluate=evaluate,
        evaluate_every=config.every,
    )
    return best[:2]


def greedily(
    own: recipe.Config,
    model: Functional,
    tokenizers: Tokenizers,
    params: Params,
    texts: Sequence[str],
) -> list[str]:
    """Greedy translations."""
    greedy = replace(own, decode=replace(own.decode, beam=1, nbest=1))
    say = recipe.make_translate(greedy, model, tokenizers, params)
    return [best.text for best, *_ in say(texts)]


def score(
    own: recipe.Config,
    model: Functional,
    tokenizers: Tokenizers,
    params: Params,
    texts: Sequence[str],
    truths: Sequence[str],
) -> tuple[dict[str, float], list[str]]:
    """BLEU and chrF of greedy and of sampled translations, and the greedy ones."""
    sources = tokenizers.source.encode(list(texts))
    drawn = sample_translations(model, params, sources, random.key(1), samples=1)
    said = {
        "greedy": greedily(own, model, tokenizers, params, texts),
        "sampled": tokenizers.target.decode([ids for (ids,) in drawn]),
    }
    figures = {
        f"{how} {name}": fn(found, truths).value
        for how, found in said.items()
        for name, fn in (("BLEU", metrics.bleu), ("chrF", metrics.chrf))
    }
    return figures, said["greedy"]


def trained(config: Config, run: Path) -> recipe.Config:
    """The settings of the translator to tune; where none is given it is trained now, in the run."""
    if config.run is not None:
        saved = configs.load(recipe.Config, config.run / configs.FILE)
        own = replace(saved, out=config.run.parent, name=config.run.name)
    else:
        made = checkpoint.checkpoints(run / "translator" / CHECKPOINTS)
        place = {"out": run, "name": "translator", "resume": bool(made)}
        own = recipe.checked(replace(config.translate, **place))
        if not made or made[-1].step < own.train.steps:
            recipe.train(own)
    if own.members > 1:
        raise ValueError(f"{own.name} has {own.members} members: give the run of a single model")
    return own


def own_pairs(
    config: Config,
    own: recipe.Config,
    model: Functional,
    tokenizers: Tokenizers,
    params: Params,
    splits: recipe.Splits,
) -> list[TranslationPair]:
    """Pairs of the model's own translations of training sentences."""
    texts, truths = (splits.train[side][: config.sentences] for side in ("source", "target"))
    sources = tokenizers.source.encode(list(texts))
    made = sample_translations(
        model,
        params,
        sources,
        random.key(config.seed),
        samples=config.samples,
        temperature=config.temperature,
    )
    likely = tokenizers.target.encode(greedily(own, model, tokenizers, params, texts), eos=True)
    made = [[*found, greedy] for found, greedy in zip(made, likely, strict=True)]
    said = [tokenizers.target.decode(each) for each in made]
    pairs = judged_pairs(sources, made, said, truths, gap=config.gap)
    print(f"{len(pairs)} pairs of {len(sources)} sentences", flush=True)
    return pairs


def main(config: Config) -> None:
    begin = time.perf_counter()
    if launching.several():
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, but one trains and tunes a "
            f"translator: start it by python recipes/{NAME}.py"
        )
    datasets.disable_progress_bars()
    configs.check_run(config)
    run = config.out / (config.name or configs.free_name(config.out, NAME))
    if not config.resume:
        configs.new_run(run, config, overwrite=config.overwrite)
    own = trained(config, run)
    model, tokenizers, params = recipe.load_trained(own)
    splits = recipe.read_data(own.data)
    asked = {
        name: [getattr(splits, name)[side][: config.held_out] for side in ("source", "target")]
        for name in ("valid", "test")
    }
    before = {name: score(own, model, tokenizers, params, *asked[name]) for name in asked}
    told = run / "pairs.json"
    if not told.exists():
        pairs = own_pairs(config, own, model, tokenizers, params, splits)
        told.write_text(json.dumps(pairs), encoding="utf-8")
    pairs = [TranslationPair(*pair) for pair in json.loads(told.read_text(encoding="utf-8"))]

    def valid_bleu(params: Params) -> float:
        said = greedily(own, model, tokenizers, params, asked["valid"][0])
        return metrics.bleu(said, asked["valid"][1]).value

    data = pair_data(model, params, pairs)
    place = run / "tuned"
    if not place.exists():
        as_it_is = replace(own, out=run, name="tuned", train=replace(own.train, ema=0.0))
        configs.new_run(place, as_it_is)
    kept = Kept(place / CHECKPOINTS, tokenizers)
    step, tuned = tune(config, model, params, data, run, kept, valid_bleu)
    print(f"kept: step {step}", flush=True)
    after = {name: score(own, model, tokenizers, tuned, *asked[name]) for name in asked}
    shown = zip(asked["test"][0], before["test"][1], after["test"][1], strict=True)
    for source, first, last in [each for each in shown if each[1] != each[2]][:5]:
        print(f"{source}\n  before: {first}\n  after:  {last}")
    figures: dict[str, Any] = {"pairs": len(pairs), "kept": step}
    for split, ((old, _), (new, _)) in {n: (before[n], after[n]) for n in asked}.items():
        changes = ", ".join(f"{name} {old[name]:.1f} to {new[name]:.1f}" for name in old)
        print(f"{config.held_out} sentences, {split}: {changes}")
        figures[split] = {"before": old, "after": new}
    (run / "results.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


def command_line(args: Sequence[str]) -> Config:
    start = configs.starting_point(args, {"default": Config()}, modes=())
    return configs.parse(start, args, description=str(__doc__), prog=f"{NAME}.py")


if __name__ == "__main__":
    errors.run(main, lambda: command_line(sys.argv[1:]))
