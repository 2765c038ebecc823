"""Many ways to train on Multi30k English-German, several at once on one GPU; one table at the end.

    python recipes/sweep_translate.py --data ../multi30k --jobs 4

    python recipes/sweep_translate.py --data ../multi30k --variants small tiny-ensemble --steps 4000

Each variant is `recipes/translate.py --preset multi30k` with its own options, so every line of the
table can be repeated alone. The validation set chooses, the test set (test_2016_flickr) is shown.
"""

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import translate
import translate_settings as settings
import tyro

from msfs_functional import config as configs
from msfs_functional import errors, metrics, tracking

TINY = "--model.width 128 --model.depth 4 --model.hidden 256 --optimizer.learning-rate 5e-3"
SINGLE = "--train.consistency 0"
WIDE = "--model.width 512 --model.hidden 1024 --model.heads 8 --optimizer.learning-rate 1e-3"
VARIANTS = {  # what differs from the preset
    "preset": "",
    "tiny": f"{TINY} {SINGLE}",
    "tiny-consistent": TINY,
    "small": SINGLE,
    "small-dropout4": f"{SINGLE} --model.dropout 0.4",
    "bpe4k": "--vocabulary.size 4000",
    "bpe16k": "--vocabulary.size 16000",
    "dropout2": "--model.dropout 0.2",
    "no-average": "--train.ema 0",
    "dropout4": "--model.dropout 0.4",
    "deep": "--model.depth 6",
    "wide": f"{WIDE} --model.dropout 0.4",
    "tiny-ensemble": f"{TINY} {SINGLE} --members 8 --data.buckets 3",
}
FILES = {
    "train": ("train.en.gz", "train.de.gz"),
    "valid": ("val.en.gz", "val.de.gz"),
    "test": ("test_2016_flickr.en.gz", "test_2016_flickr.de.gz"),
}


@dataclass(frozen=True)
class Config:
    """What to try."""

    data: Path
    """folder of Multi30k task 1, raw: train, val and test_2016_flickr as .en.gz and .de.gz"""
    variants: tuple[str, ...] = tuple(name for name in VARIANTS if name != "tiny-ensemble")
    """which of the settings in VARIANTS to try"""
    steps: int | None = None
    """optimizer steps of each; None: the preset's"""
    options: str = ""
    """further options of recipes/translate.py for all of them, as --options='--seed 1 ...'"""
    jobs: int = 4
    """trainings at once"""
    out: Path = Path("runs/sweep")
    """folder of the runs; finished ones are not repeated"""
    minutes: float = 20.0
    """no training starts after this long, and what still runs then is stopped [minutes]"""
    debug: bool = False
    """show tracebacks"""


def command(config: Config, variant: str) -> list[str]:
    words = [sys.executable, str(Path(__file__).with_name("translate.py")), "--preset", "multi30k"]
    for split, names in FILES.items():
        words += [f"--data.{split}", *(str(config.data / name) for name in names)]
    words += ["--out", str(config.out), "--name", variant, "--overwrite"]
    words += [] if config.steps is None else ["--train.steps", str(config.steps)]
    return words + shlex.split(VARIANTS[variant]) + shlex.split(config.options)


def train_all(config: Config) -> list[str]:
    """At most config.jobs processes at a time, each with its share of the cores and its own log.

    Returns the variants that failed.
    """
    waiting = [v for v in config.variants if not (config.out / v / "results.json").exists()]
    running: dict[str, subprocess.Popen] = {}
    failed: list[str] = []
    cores = max(1, (os.cpu_count() or 1) // config.jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(cores)
    config.out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    while waiting or running:
        late = time.monotonic() - begin > 60 * config.minutes
        while waiting and len(running) < config.jobs and not late:
            name = waiting.pop(0)
            log = (config.out / f"{name}.log").open("w")
            running[name] = subprocess.Popen(
                command(config, name), stdout=log, stderr=subprocess.STDOUT, env=environment
            )
            print(f"{time.monotonic() - begin:5.0f} s  {name} begins", flush=True)
        for name, process in list(running.items()):
            if late and process.poll() is None:
                process.terminate()  # it saves and can be resumed
                process.wait()
            if process.poll() is not None:
                del running[name]
                how = "ended" if process.returncode == 0 else f"failed ({process.returncode})"
                if process.returncode != 0 and not late:
                    failed.append(name)
                print(f"{time.monotonic() - begin:5.0f} s  {name} {how}", flush=True)
        if late:
            break
        time.sleep(0.2)
    return failed


def scores(config: settings.Config, decode: settings.Decode) -> tuple[float, float]:
    """BLEU on validation and test set with these settings of the search."""
    config = replace(config, decode=decode)
    run = translate.make_translate(config, *translate.load_trained(config))
    splits = translate.read_data(config.data)
    found = []
    for part in (splits.valid, splits.test):
        texts = [best.text for best, *_ in run(part["source"][:])]
        found.append(metrics.bleu(texts, part["target"][:]).value)
    return found[0], found[1]


def table(config: Config) -> str:
    """A line for each run that has ended, the best on the validation set first."""
    rows = []
    for variant in config.variants:
        run = config.out / variant
        if not (run / "results.json").exists():
            continue
        saved = configs.load(settings.Config, run / configs.FILE)
        saved = settings.checked(saved)
        last = tracking.read_metrics(run / tracking.METRICS)[-1]
        decodings = {
            "best, beam 5": replace(saved.decode, beam=5, batch=256),
            "best, beam 5, penalty 0.6": replace(
                saved.decode, beam=5, length_penalty=0.6, batch=256
            ),
            "mean of 3, beam 5": replace(saved.decode, beam=5, average=3, batch=256),
        }
        for name, decode in decodings.items():
            valid, test = scores(saved, decode)
            rows.append((valid, test, variant, name, last["seconds"] / 60))
    lines = ["| settings | checkpoint and search | valid BLEU | test BLEU | minutes |"]
    lines.append("|---|---|---|---|---|")
    for valid, test, variant, name, minutes in sorted(rows, reverse=True):
        options = f"{variant}: `{VARIANTS[variant]}`" if VARIANTS[variant] else variant
        lines.append(f"| {options} | {name} | {valid:.2f} | {test:.2f} | {minutes:.1f} |")
    return "\n".join(lines)


def main(config: Config) -> None:
    for variant in config.variants:
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}: choose from {', '.join(VARIANTS)}")
    for name in (name for names in FILES.values() for name in names):
        if not (config.data / name).exists():
            raise ValueError(
                f"{config.data} has no {name}: name the folder of Multi30k with --data"
            )
    configs.check_numbers(config, may_be_zero=())
    failed = train_all(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = f"{table(config)}\n\n{device}, torch {torch.__version__}, {config.jobs} at a time\n"
    print(text)
    (config.out / "table.md").write_text(text, encoding="utf-8")
    if failed:
        logs = ", ".join(str(config.out / f"{name}.log") for name in failed)
        raise ValueError(f"{len(failed)} trainings failed, they are missing above: read {logs}")


if __name__ == "__main__":
    errors.run(main, lambda: tyro.cli(Config, description=__doc__))
