"""The translation recipe through its command line: training, resuming, translating, refusing."""

import dataclasses
import errno
import gzip
import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

from msfs_functional import checkpoint, config, errors, tracking
from msfs_functional.params import stack

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import translate  # noqa: E402
import translate_settings as settings  # noqa: E402

COLOURS = {"red": "rosso", "black": "nero", "white": "bianco", "yellow": "giallo"}
THINGS = {"book": "libro", "cat": "gatto", "hat": "cappello", "dog": "cane", "wine": "vino"}
TINY = """--model.width 16 --model.heads 2 --model.hidden 32 --model.depth 1 --vocabulary.size 300
    --data.batch 256 --data.buckets 2 --train.steps 8 --train.eval-every 4 --train.log-every 2
    --optimizer.warmup 2 --decode.beam 2 --decode.extra-length 4 --model.dropout 0.1 --device cpu
    --threads 1""".split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Forty pairs in a TSV."""
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    lines = [
        f"the {colour} {thing} {verb}\til {cosa} {colore} {verbo}"
        for colour, colore in COLOURS.items()
        for thing, cosa in THINGS.items()
        for verb, verbo in (("sleeps", "dorme"), ("is here", "è qui"))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of the time of a tiny run; `trained`, which is made before, has them."""
    monkeypatch.setattr(translate, "draw", lambda *args: None)


def recipe(*args: object) -> None:
    """`python recipes/translate.py ...` without the seconds that a process takes to start."""
    words = [str(arg) for arg in args]
    errors.run(translate.main, lambda: settings.command_line(words, str(translate.__doc__)))


def refused(capsys, *args: object) -> str:
    """The one line with which the command line `args` ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        recipe(*args)
    assert ended.value.code not in (0, None)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert "retrying" not in lines
    assert len(said) == 1 and not any("Traceback" in line for line in lines)
    return said[0]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A finished run of eight steps, with dropout."""
    out = tmp_path_factory.mktemp("trained")
    recipe(*TINY, "--data.train", corpus, "--out", out, "--name", "whole")
    return out / "whole"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(checkpoint.checkpoints(run / "checkpoints")[-1].path / "state.safetensors")


def metrics_without_time(run: Path) -> list[dict]:
    records = tracking.read_metrics(run / tracking.METRICS)
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens/s")} for r in records]


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_without_time(one) == metrics_without_time(other)
    a, b = final_state(one), final_state(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (one / "test.txt").read_bytes() == (other / "test.txt").read_bytes()


def test_run_leaves_config_metrics_events_checkpoints_and_pictures(trained):
    saved = config.load(settings.Config, trained / config.FILE)
    assert saved.train.steps == 8 and saved.model.width == 16
    records = tracking.read_metrics(trained / tracking.METRICS)
    assert [r["step"] for r in records if "loss" in r] == [2, 4, 6, 8]
    assert [r["step"] for r in records if "valid/bleu" in r] == [4, 8]
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert [c.step for c in checkpoint.verified(trained / "checkpoints")] == [4, 8]
    for name in ("curves.png", "attention.png"):
        assert (trained / name).read_bytes().startswith(b"\x89PNG")
    results = json.loads((trained / "results.json").read_text())
    assert 0 <= results["bleu"]["value"] <= 100 and "tok:13a" in results["bleu"]["signature"]


def test_output_that_is_no_terminal_has_whole_plain_lines_and_ten_samples(corpus, tmp_path, capfd):
    recipe(*TINY, "--data.train", corpus, "--data.test-size", 12, "--out", tmp_path)
    out, err = capfd.readouterr()
    assert "\r" not in out + err and "\x1b" not in out + err
    assert "it/s" not in err
    shown = [line for line in out.splitlines() if line.startswith("  the ")]
    assert len(shown) == 10
    assert (tmp_path / "translate-1").is_dir()


def test_killed_and_resumed_run_is_bit_equal_to_one_that_was_not(corpus, trained, tmp_path):
    args = [*TINY, "--data.train", str(corpus), "--out", str(tmp_path), "--name", "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = RECIPES.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    process = subprocess.Popen(
        [sys.executable, str(RECIPES / "translate.py"), *args],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    first = tmp_path / "killed" / "checkpoints" / "step_00000004"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    recipe("--resume", "--out", tmp_path, "--name", "killed")
    assert_same_run(trained, tmp_path / "killed")


@pytest.mark.parametrize("last", [6, 8])  # of 8 steps
def test_interrupt_saves_says_how_to_resume_and_resuming_is_exact(
    last, corpus, trained, tmp_path, capsys, monkeypatch
):
    make_step = translate.make_step

    def interrupted(*args, **options):
        step = make_step(*args, **options)

        def run(state, batch):
            if int(state.step) == last - 1:
                os.kill(os.getpid(), signal.SIGINT)
            return step(state, batch)

        return run

    monkeypatch.setattr(translate, "make_step", interrupted)
    with pytest.raises(SystemExit) as ended:
        recipe(*TINY, "--data.train", corpus, "--out", tmp_path, "--name", "stopped")
    assert ended.value.code == 130
    said = capsys.readouterr().out.splitlines()[-1]
    assert f"saved after step {last}" in said
    command = said.partition("translate.py ")[2].split()
    monkeypatch.setattr(translate, "make_step", make_step)
    recipe(*command)
    assert_same_run(trained, tmp_path / "stopped")


def test_a_microbatch_of_filling_rows_alone_leaves_the_step_as_it_is(corpus):
    args = [*TINY, "--data.train", str(corpus), "--data.batch", "512", "--model.dropout", "0"]
    config = settings.checked(settings.command_line(args, ""))
    pairs = translate.read_data(config.data).train
    tokenizers = translate.Tokenizers.learn(pairs, "bpe", 300, True)
    stream = translate.make_batches(config.data, pairs, tokenizers, row_multiple=4)
    batches = [next(stream) for _ in range(stream.steps_per_epoch)]
    batch = next(b for b in batches if (b["source_lengths"][-len(b["source"]) // 4 :] == 0).all())
    model = translate.make_model(config, tokenizers)
    optimizer = translate.make_optimizer(config.optimizer, 8)
    found = []
    for n in (1, 4):
        train = dataclasses.replace(config.train, accumulation=n)
        changed = dataclasses.replace(config, train=train)
        step, state = translate.make_train_step(changed, model, optimizer)
        found.append(step(state, batch)[1])
    assert int(found[1]["skipped"]) == 0
    for name in ("loss", "grad_norm", "weight"):
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-5, atol=0)


def test_updates_that_are_left_out_are_told(corpus, tmp_path, capsys):
    recipe(*TINY, "--data.train", corpus, "--out", tmp_path, "--optimizer.learning-rate", 1e30)
    assert "updates left out, their loss or gradient was not finite" in capsys.readouterr().out


def test_each_member_of_an_ensemble_equals_the_run_with_its_seed_alone(corpus, trained, tmp_path):
    args = [*TINY, "--data.train", corpus, "--out", tmp_path]
    recipe(*args, "--name", "both", "--members", 2, "--seed", 0)
    recipe(*args, "--name", "one", "--seed", 1)
    both = final_state(tmp_path / "both")
    for member, run in enumerate((trained, tmp_path / "one")):
        alone = final_state(run)
        # Attention does not depend on the bias of its keys: rounding noise is all it learns.
        for name in (n for n in alone if n.startswith("params/") and "k.bias" not in n):
            torch.testing.assert_close(both[name][member], alone[name], atol=1e-5, rtol=1e-5)


def test_an_ensemble_translates_with_the_mean_of_its_members_probabilities(trained):
    saved = settings.checked(config.load(settings.Config, trained / config.FILE))
    saved = dataclasses.replace(saved, out=trained.parent, name="whole")
    model, tokenizers, one = translate.load_trained(saved)
    other = model.init(7)

    def score(*members: dict[str, torch.Tensor]) -> float:
        many = dataclasses.replace(saved, members=len(members))
        chosen = stack(list(members)) if len(members) > 1 else members[0]
        translated = translate.make_translate(many, model, tokenizers, chosen)
        return translated(["the red cat sleeps"])[0][0].score

    assert score(one, one) == pytest.approx(score(one), abs=1e-4)
    assert score(one, other) == pytest.approx(score(other, one), abs=1e-4)
    assert abs(score(one, other) - score(one)) > 1e-2
    decode = dataclasses.replace(saved.decode, members=1)
    first = dataclasses.replace(saved, members=2, decode=decode)
    alone = translate.make_translate(first, model, tokenizers, stack([one, other]))
    assert alone(["the red cat sleeps"])[0][0].score == pytest.approx(score(one), abs=1e-5)


def test_evaluate_repeats_the_test_score_and_leaves_what_training_left(trained, capsys):
    files = [trained / name for name in ("results.json", "test.txt", "metrics.jsonl", config.FILE)]
    before = [file.read_bytes() for file in files]
    log = trained / "evaluations.jsonl"
    log.unlink(missing_ok=True)
    args = ("evaluate", "--out", trained.parent, "--name", "whole")
    recipe(*args)
    score = json.loads((trained / "results.json").read_text())["bleu"]["value"]
    assert f"test BLEU {score:.2f}" in capsys.readouterr().out
    recipe(*args, "--decode.average", 2)
    recipe(*args, "--decode.beam", 1)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["decode"]["beam"], r["decode"]["average"]) for r in records] == [
        (2, 1), (2, 2), (1, 1),
    ]  # fmt: skip
    assert records[0]["bleu"]["value"] == score
    assert [file.read_bytes() for file in files] == before


def translated(monkeypatch, capsys, run: Path, text: str | bytes, *args: object) -> list[str]:
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    recipe("translate", "--out", run.parent, "--name", run.name, *args)
    return capsys.readouterr().out.splitlines()


def test_translate_keeps_the_order_of_lines_and_empty_ones(trained, monkeypatch, capsys):
    lines = ["the red cat sleeps", "", "the dog"]
    capsys.readouterr()
    together = translated(monkeypatch, capsys, trained, "\n".join(lines))
    alone = [translated(monkeypatch, capsys, trained, f"{line}\n")[0] for line in lines]
    assert together == alone and together[1] == ""


def test_translate_gives_n_best_with_scores_and_draws_attention(
    trained, monkeypatch, capsys, tmp_path
):
    capsys.readouterr()
    picture = tmp_path / "deep" / "map.png"
    args = ("--decode.beam", 3, "--decode.nbest", 3, "--attention-map", picture)
    lines = translated(monkeypatch, capsys, trained, "the red cat sleeps\n", *args)
    scores = [float(line.split("\t")[0]) for line in lines]
    assert len(lines) == 3 and scores == sorted(scores, reverse=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_translate_cuts_sentences_beyond_the_maximum_into_pieces(trained, monkeypatch, capsys):
    capsys.readouterr()
    long = " ".join(["the red cat sleeps"] * 30)
    assert len(translated(monkeypatch, capsys, trained, f"{long}\n")) == 1


def test_average_of_checkpoints_is_the_mean_of_their_parameters(trained):
    saved = config.load(settings.Config, trained / config.FILE)
    saved = dataclasses.replace(
        settings.checked(saved),
        out=trained.parent,
        name="whole",
        decode=settings.Decode(average=2),
    )
    _, _, mean = translate.load_trained(saved)
    states = [
        checkpoint.load(
            trained / "checkpoints", {"params": {n: p.shape for n, p in mean.items()}},
            which=step, partial=True,
        ).state["params"]
        for step in (4, 8)
    ]  # fmt: skip
    for name, value in mean.items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)


def test_classic_preset_trains_word_level_with_constant_rate_and_greedy(corpus, tmp_path):
    place = TINY.index("--decode.beam")
    small = TINY[:place] + TINY[place + 2 :]
    recipe("--preset", "classic", *small, "--data.train", corpus, "--out", tmp_path)
    saved = config.load(settings.Config, tmp_path / "translate-1" / config.FILE)
    assert saved.vocabulary.kind == "word" and not saved.vocabulary.joint
    assert saved.optimizer.schedule == "constant" and saved.decode.beam == 1


def test_classic_preset_and_default_are_compared_on_the_same_split(corpus):
    kinds = [dataclasses.replace(p.data, train=(corpus,)) for p in settings.PRESETS.values()]
    default, *others = map(translate.read_data, kinds)
    for other in others:
        for part in ("train", "valid", "test"):
            assert getattr(default, part)[:] == getattr(other, part)[:]


def test_presets_of_the_hub_ask_for_its_splits_and_columns(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        texts = [f"{split} {i}" for i in range(30)]
        if name == "opus_books":
            return datasets.Dataset.from_dict(
                {"id": texts, "translation": [{"en": t, "it": t.upper()} for t in texts]}
            )
        return datasets.Dataset.from_dict({"en": texts, "de": [t.upper() for t in texts]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = translate.read_data(settings.MULTI30K.data)
    assert [found.test["target"][0], found.valid["source"][0]] == ["TEST 0", "validation 0"]
    cut = translate.read_data(settings.CLASSIC.data)
    assert set(cut.test["target"]) <= {f"TRAIN {i}" for i in range(30)}
    name = "bentrevett/multi30k"
    splits = [(name, None, split) for split in ("train", "validation", "test")]
    assert asked == [*splits, ("opus_books", "en-it", "train")]


def test_moving_average_is_kept_and_used(corpus, tmp_path):
    recipe(*TINY, "--data.train", corpus, "--train.ema", 0.5, "--out", tmp_path, "--name", "ema")
    state = final_state(tmp_path / "ema")
    saved = config.load(settings.Config, tmp_path / "ema" / config.FILE)
    saved = settings.checked(dataclasses.replace(saved, decode=settings.Decode(which="latest")))
    _, _, used = translate.load_trained(saved)
    assert all(torch.equal(value, state[f"ema/{name}"]) for name, value in used.items())
    assert not all(torch.equal(value, state[f"params/{name}"]) for name, value in used.items())


def test_help_shows_every_option_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as ended:
        recipe("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(settings.Config):
        inner = field.default_factory  # type: ignore[attr-defined]
        group = inner() if inner is not dataclasses.MISSING else None
        names = [f"{field.name}.{f.name}" for f in dataclasses.fields(group)] if group else []
        for name in names or [field.name]:
            assert name == "mode" or f"--{name.replace('_', '-')}" in text, name
    help_words = " ".join(text.replace("│", " ").split())
    assert "decoupled, on matrices only" in help_words and "(default: 0.1)" in help_words


def test_help_of_a_preset_shows_its_defaults(capsys):
    with pytest.raises(SystemExit):
        recipe("--preset", "multi30k", "--help")
    assert "bentrevett/multi30k" in capsys.readouterr().out


# Bad input: one line that says value, rule and remedy, exit code other than 0.


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def bad_files(folder: Path) -> dict[str, tuple[list[Path], str]]:
    good = write(folder / "good.en", b"one\ntwo\nthree\nfour\n")
    short = write(folder / "short.it", b"uno\ndue\n")
    return {
        "missing": ([folder / "none.tsv"], "none.tsv"),
        "empty": ([write(folder / "empty.tsv", b"")], "empty"),
        "misaligned": ([good, short], "4 lines"),
        "latin1": ([write(folder / "latin.tsv", "caff\xe8\tcoffee\n".encode("latin1"))], "UTF-8"),
        "no tab": ([write(folder / "one.tsv", b"one\ntwo\n")], "one.tsv"),
        "damaged": ([write(folder / "bad.tsv.gz", gzip.compress(b"a\tb\n")[:-6])], "damaged"),
    }


@pytest.mark.parametrize("kind", ["missing", "empty", "misaligned", "latin1", "no tab", "damaged"])
def test_bad_files_are_named_in_one_line(kind, tmp_path, capsys):
    files, words = bad_files(tmp_path)[kind]
    said = refused(capsys, *TINY, "--data.train", *files, "--out", tmp_path / "runs")
    assert words in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model.heads", 3], "heads (3) must divide width (16)"),
        (["--model.depth", -1], "--model.depth (-1) must be at least 1"),
        (["--data.batch", -5], "--data.batch (-5) must be at least 1"),
        (["--train.steps", 0], "--train.steps (0) must be at least 1"),
        (["--optimizer.learning-rate", -1], "--optimizer.learning-rate"),
        (["--model.dropout", 1.5], "dropout (1.5)"),
        (["--vocabulary.size", 20], "vocab_size (20)"),
        (["--optimizer.warmup", 500], "warmup (500)"),
        (["--data.max-length", 2], "max_length (2)"),
        (["--decode.nbest", 9], "--decode.nbest (9)"),
        (["--decode.members", 2], "--decode.members (2)"),
        (["--device", "abacus"], "--device (abacus)"),
        (["--device", "cuda:99"], "--device (cuda:99)"),
        (["--data.test-size", 4000], "leave"),
        (["--resume"], "does not exist"),
        (["--name", "a/b"], "--name (a/b)"),
        (["--resume", "--overwrite"], "does not exist"),
    ],
)
def test_bad_options_are_refused_before_a_run_begins(options, words, corpus, tmp_path, capsys):
    args = [*TINY, "--data.train", corpus, "--out", tmp_path / "runs", "--name", "bad"]
    said = refused(capsys, *args, *options)
    assert words in said
    assert not (tmp_path / "runs").exists()


def test_unknown_dataset_split_and_no_network_are_told_apart(tmp_path, capsys, monkeypatch):
    def fails(error):
        def load(*args, **options):
            logging.getLogger("huggingface_hub.utils._http").warning("retrying")
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        return refused(capsys, *TINY, "--data.name", "no/such", "--out", tmp_path)

    assert "unknown dataset 'no/such'" in fails(datasets.exceptions.DatasetNotFoundError("gone"))
    assert "network" in fails(ConnectionError("no route"))
    assert "split" in fails(ValueError('Unknown split "dev". Should be one of [train]'))


def test_existing_run_is_overwritten_only_with_the_flag(corpus, trained, tmp_path, capsys):
    args = [*TINY, "--data.train", corpus, "--out", trained.parent, "--name", "whole"]
    before = (trained / "metrics.jsonl").read_bytes()
    assert "--overwrite" in refused(capsys, *args)
    assert (trained / "metrics.jsonl").read_bytes() == before
    keep = write(tmp_path / "thesis.txt", b"years of work")
    args = [*TINY, "--data.train", corpus, "--out", tmp_path.parent, "--name", tmp_path.name]
    assert "is no run" in refused(capsys, *args, "--overwrite")
    assert keep.read_bytes() == b"years of work"


def test_checkpoint_of_another_model_is_refused(trained, capsys):
    args = ["evaluate", "--out", trained.parent, "--name", "whole", "--model.width", 32]
    assert "checkpoint of another model" in refused(capsys, *args)
    args = ["--resume", "--out", trained.parent, "--name", "whole", "--model.depth", 2]
    before = (trained / config.FILE).read_bytes()
    refused(capsys, *args)
    assert (trained / config.FILE).read_bytes() == before


def test_full_disk_while_saving_keeps_the_previous_checkpoint(
    corpus, tmp_path, capsys, monkeypatch
):
    save, calls = checkpoint.save, []

    def full(*args, **options):
        calls.append(args)
        if len(calls) > 1:
            monkeypatch.setattr(checkpoint, "save_file", no_space)
        return save(*args, **options)

    def no_space(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    args = [*TINY, "--data.train", corpus, "--out", tmp_path, "--name", "full"]
    said = refused(capsys, *args)
    assert "free" in said and "step_00000004" in said
    assert [c.step for c in checkpoint.verified(tmp_path / "full" / "checkpoints")] == [4]


def test_translate_and_evaluate_without_a_run_say_so(tmp_path, capsys):
    for mode in ("translate", "evaluate"):
        assert "holds no run" in refused(capsys, mode, "--out", tmp_path)
        assert "does not exist" in refused(capsys, mode, "--out", tmp_path, "--name", "none")


def test_translate_refuses_bytes_that_are_not_utf8_and_no_input(trained, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ncaff\xe8\n")))
    args = ("translate", "--out", trained.parent, "--name", "whole")
    assert "stdin, line 2: byte 0xe8" in refused(capsys, *args)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert "holds no line" in refused(capsys, *args)
    assert "nothing.txt" in refused(capsys, *args, "--input", "nothing.txt")


def test_debug_shows_the_traceback(corpus, tmp_path):
    with pytest.raises(ValueError, match="heads"):
        recipe(*TINY, "--data.train", corpus, "--out", tmp_path, "--model.heads", 3, "--debug")
