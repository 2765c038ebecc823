r"""Tune a translation model by preferences: its own samples, judged by chrF against the references.

    python recipes/align_translation.py                      # trains a translator first
    python recipes/align_translation.py --run runs/translate-1

A model that recipes/translate.py has trained translates training sentences several times; of each
sentence the best and the worst translation are a pair; DPO learns from the pairs. The report is
BLEU and chrF of greedy translations of the test split before and after, and the KL that it cost.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in recipe.py; must stand before torch

import datasets
import translate as recipe
import tyro
from torch import Tensor

from msfs_functional import config as configs
from msfs_functional import errors, metrics, random
from msfs_functional.aligning import Stage, optimizer_of
from msfs_functional.pairs import Shuffled
from msfs_functional.params import Functional, Params
from msfs_functional.preference import dpo
from msfs_functional.stages import run_stage
from msfs_functional.tokenizer import PAD
from msfs_functional.train import init_state, make_step
from msfs_functional.translation import Tokenizers
from msfs_functional.translation_preference import (
    judged_pairs,
    pair_data,
    pair_sums,
    sample_translations,
)


def shorter() -> recipe.Config:
    """A translator that leaves something to learn: half of the default's steps."""
    start = recipe.Config()
    return replace(start, train=replace(start.train, steps=300))


@dataclass(frozen=True)
class Config:
    """What to tune, and how."""

    run: Path | None = None  # of translate.py; None: train one first, with these settings:
    translate: recipe.Config = field(default_factory=shorter)
    out: Path = Path("runs")
    name: str | None = None  # of this run; None: a new number
    sentences: int = 1500  # of the training split, to translate
    samples: int = 6  # translations of each
    gap: float = 5.0  # least difference of the two of a pair [points of chrF]
    test: int = 300  # sentences of the test split to report on
    beta: float = 0.5  # strength of the pull to the reference
    imitation: float = 1.0  # weight of the chosen translations' mean negative log-probability
    dpo: Stage = field(default_factory=lambda: Stage(120, 32, 1e-4, 10))
    seed: int = 0
    debug: bool = False  # show tracebacks


def tune(
    config: Config, model: Functional, params: Params, data: dict[str, Tensor], folder: Path
) -> Params:
    """DPO from `params`, which stay as they are."""

    def loss_fn(params: Params, batch: dict[str, Tensor], key: Tensor):
        sums, lengths = pair_sums(model, params, batch)
        out = dpo(*sums.unbind(1), *batch["reference"].unbind(1), beta=config.beta)
        imitation = -sums[:, 0].sum() / lengths[:, 0].sum()
        right = (out.margins > 0).float().mean()
        return out.losses.mean() + config.imitation * imitation, {
            "margin": out.margins.mean(),
            "accuracy": right,
        }

    optimizer = optimizer_of(config.dpo)
    own = {name: value.clone() for name, value in params.items()}
    device = str(next(iter(params.values())).device)
    return run_stage(
        folder,
        config.dpo.steps,
        init_state(own, optimizer, random.key(config.seed, device=device)),
        make_step(loss_fn, optimizer, clip_norm=1.0, compile=False),
        Shuffled(data, config.dpo.batch, config.seed),
        device=device,
        resume="the same command",
        tokens=lambda batch: (batch["target"] != PAD).sum(),
    ).params


def score(
    own: recipe.Config,
    model: Functional,
    tokenizers: Tokenizers,
    params: Params,
    splits: recipe.Splits,
    count: int,
) -> tuple[dict[str, float], list[str]]:
    """BLEU and chrF of greedy translations of test sentences."""
    greedy = replace(own, decode=replace(own.decode, beam=1, nbest=1))
    say = recipe.make_translate(greedy, model, tokenizers, params)
    texts = [best.text for best, *_ in say(splits.test["source"][:count])]
    truths = splits.test["target"][:count]
    figures = {"bleu": metrics.bleu(texts, truths).value, "chrf": metrics.chrf(texts, truths).value}
    return figures, texts


def main(config: Config) -> None:
    begin = time.perf_counter()
    datasets.disable_progress_bars()
    if config.run is None:
        own = recipe.checked(replace(config.translate, out=config.out))
        recipe.train(own)
    else:
        saved = configs.load(recipe.Config, config.run / configs.FILE)
        own = replace(saved, out=config.run.parent, name=config.run.name)
    if own.members > 1:
        raise ValueError(f"{own.name} has {own.members} members: give the run of a single model")
    run = config.out / (config.name or configs.free_name(config.out, "align_translation"))
    configs.new_run(run, config)
    model, tokenizers, params = recipe.load_trained(own)
    splits = recipe.read_data(own.data)
    before, first = score(own, model, tokenizers, params, splits, config.test)
    texts = splits.train["source"][: config.sentences]
    sources = tokenizers.source.encode(list(texts))
    key = random.key(config.seed)
    made = sample_translations(model, params, sources, key, samples=config.samples)
    said = [tokenizers.target.decode(each) for each in made]
    truths = splits.train["target"][: config.sentences]
    pairs = judged_pairs(sources, made, said, truths, gap=config.gap)
    print(f"{len(pairs)} pairs of {len(sources)} sentences", flush=True)
    tuned = tune(config, model, params, pair_data(model, params, pairs), run / "dpo")
    after, last = score(own, model, tokenizers, tuned, splits, config.test)
    shown = zip(splits.test["source"], first, last, strict=False)
    for source, a, b in [each for each in shown if each[1] != each[2]][:5]:
        print(f"{source}\n  before: {a}\n  after:  {b}")
    print(
        f"{config.test} test sentences, greedy: BLEU {before['bleu']:.1f} before, "
        f"{after['bleu']:.1f} after; chrF {before['chrf']:.1f} before, {after['chrf']:.1f} after"
    )
    figures = {"pairs": len(pairs), "before": before, "after": after}
    (run / "results.json").write_text(json.dumps(figures) + "\n", encoding="utf-8")
    print(f"{time.perf_counter() - begin:.0f} seconds; everything is in {run}")


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__, args=sys.argv[1:]))
