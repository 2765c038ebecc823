"""The pretraining recipe through its command line: training, resuming, ranks, refusing."""

import gzip
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ranks import check_claims

from msfs_functional import checkpoint, config, distributed_checkpoint, errors, tracking
from msfs_functional.models import pretrained
from msfs_functional.models.decoder import DecoderConfig, decoder
from msfs_functional.synthetic.stories import judge, stories
from msfs_functional.tokenizer import Tokenizer
from msfs_functional.utilisation import flops_per_token

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import pretrain  # noqa: E402

TINY = """--model.width 16 --model.heads 2 --model.kv-heads 2 --model.hidden 24 --model.depth 1
    --vocabulary.size 400 --data.stories 60 --data.valid-documents 8 --data.length 200
    --data.batch 4 --train.steps 6 --train.eval-every 3 --train.log-every 1 --optimizer.warmup 2
    --sample.number 2 --device cpu --threads 1""".split()


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of the time of a tiny run; `trained`, which is made before, has them."""
    monkeypatch.setattr(pretrain, "draw", lambda *args: None)


def recipe(*args: object) -> None:
    """`python recipes/pretrain.py ...` without the seconds that a process takes to start."""
    words = [str(arg) for arg in args]
    errors.run(pretrain.main, lambda: pretrain.command_line(words, ""))


def refused(capsys, *args: object) -> str:
    """The one line with which the command line `args` ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        recipe(*args)
    assert ended.value.code not in (0, None)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1 and not any("Traceback" in line for line in lines)
    return said[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run of six steps, with dropout."""
    out = tmp_path_factory.mktemp("trained")
    recipe(*TINY, "--model.dropout", 0.1, "--out", out, "--name", "whole")
    return out / "whole"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.checkpoints(run / "checkpoints")[-1].path
    records = distributed_checkpoint._metadata(newest).state_dict_metadata
    like = {name: torch.empty(r.size, dtype=r.properties.dtype) for name, r in records.items()}
    return distributed_checkpoint.load(newest, like).state


def metrics_without_time(run: Path) -> list[dict]:
    clocked = ("seconds", "tokens/s", "tokens/s/rank", "mfu", "data_wait")
    records = tracking.read_metrics(run / tracking.METRICS)
    return [{k: v for k, v in record.items() if k not in clocked} for record in records]


def test_run_leaves_config_metrics_checkpoints_samples_and_curves(trained):
    saved = config.load(pretrain.Config, trained / config.FILE)
    assert saved.train.steps == 6 and saved.model.width == 16
    records = tracking.read_metrics(trained / tracking.METRICS)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["grad_norm"] > 0 and record["tokens/s"] > 0 for record in steps)
    scored = [record for record in records if "valid/loss" in record]
    assert [record["step"] for record in scored] == [3, 6]
    assert all(0 < record["mfu"] and 0 <= record["data_wait"] <= 1 for record in scored)
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [c.step for c in checkpoint.verified(trained / "checkpoints")] == [3, 6]
    results = json.loads((trained / "results.json").read_text())
    assert 0 <= results["judge/begun/consistent"] <= 1 and "valid/bits_per_byte" in results


def test_killed_and_resumed_run_is_bit_equal_to_one_that_was_not(trained, tmp_path, monkeypatch):
    save = distributed_checkpoint.Writer.save

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        raise ValueError("killed")

    args = [*TINY, "--model.dropout", 0.1, "--out", tmp_path, "--name", "killed"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed_checkpoint.Writer, "save", save_and_die)
        recipe(*args)
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "killed/checkpoints")] == [3]
    recipe("--resume", "--out", tmp_path, "--name", "killed")
    assert metrics_without_time(trained) == metrics_without_time(tmp_path / "killed")
    one, other = final_state(trained), final_state(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (trained / "samples.txt").read_bytes() == (tmp_path / "killed/samples.txt").read_bytes()


def test_processes_that_start_again_pass_over_a_damaged_checkpoint(
    trained, tmp_path, monkeypatch, capsys
):
    """Nobody is there to choose; who asks for --resume is told in place of it."""
    run = shutil.copytree(trained, tmp_path / "whole")
    newest = run / "checkpoints/step_00000006"
    (newest / "__0_0.distcp").write_bytes(b"")
    where = [*TINY, "--model.dropout", 0.1, "--out", tmp_path, "--name", "whole"]
    line = refused(capsys, "--resume", *where)
    assert f"delete {newest} to go on from the last good one, " in line
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    recipe(*where)
    assert f"note: passed over: {newest}/__0_0.distcp is truncated" in capsys.readouterr().err
    assert metrics_without_time(trained) == metrics_without_time(run)
    one, other = final_state(trained), final_state(run)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_samples_of_a_trained_run_go_on_with_the_prompt(trained, capsys):
    prompt = "One cold day, Mia and Tom were on the farm."
    where = ["--out", trained.parent, "--name", trained.name]
    recipe("sample", *where, "--sample.prompt", prompt, "--sample.temperature", 0.5)
    assert capsys.readouterr().out.count(prompt) == 2


def test_a_trained_run_is_exported_as_a_folder_that_others_load(trained, capsys):
    recipe("export", "--out", trained.parent, "--name", trained.name)
    assert capsys.readouterr().out.endswith(f"tensors in {trained / 'export'}\n")
    config, params, hub, tokenizer = pretrained.load(trained / "export")
    state = final_state(trained)
    assert params.keys() == decoder(config).shapes.keys() and hub["model_type"] == "llama"
    assert all(torch.equal(value, state[f"params/{name}"]) for name, value in params.items())
    assert Tokenizer.from_json(str(tokenizer)).vocab_size == config.vocab


def test_a_profiled_run_leaves_a_trace(tmp_path):
    recipe(*TINY, "--train.profile", 1, "--out", tmp_path, "--name", "traced")
    with gzip.open(tmp_path / "traced/trace-0.json.gz", "rt") as file:
        assert any("aten::mm" in event["name"] for event in json.load(file)["traceEvents"])


def test_a_model_that_knows_one_story_by_heart_is_confirmed(tmp_path):
    story = min(stories(0, 50), key=len)
    path = tmp_path / "one.jsonl"
    path.write_text(f"{json.dumps({'story': story})}\n" * 40)
    recipe(
        *TINY, "--data.files", path, "--data.valid", path, "--data.field", "story", "--out",
        tmp_path, "--name", "heart", "--train.steps", 100, "--train.eval-every", 100,
        "--model.width", 48, "--model.depth", 2, "--optimizer.learning-rate", 0.01,
        "--data.length", 100, "--sample.temperature", 0,
    )  # fmt: skip
    told = (tmp_path / "heart/samples.txt").read_text().splitlines()
    assert told == [story, story] and judge(told[0])["consistent"]
    results = json.loads((tmp_path / "heart/results.json").read_text())
    assert results["valid/bits_per_byte"] < 0.2


def test_flops_of_a_token_by_hand():
    config = DecoderConfig(10, width=4, depth=2, heads=2, kv_heads=1, hidden=6, max_length=8)
    matrices = 2 * (4 * 4 + 2 * 2 * 4 + 4 * 4 + 3 * 4 * 6) + 10 * 4
    assert flops_per_token(decoder(config), 8) == 6 * matrices + 6 * 2 * 4 * 8


def two_ranks() -> None:
    out = os.environ["PRETRAIN_OUT"]
    recipe(*TINY, "--out", out, "--name", "two", "--mesh.dp-shard", 2)


def two_ranks_of_one_layer() -> None:
    out = os.environ["PRETRAIN_OUT"]
    recipe(*TINY, "--out", out, "--name", "tp", "--mesh.tp", 2, "--train.accumulation", 2)


def two_ranks_of_one_row() -> None:
    out = os.environ["PRETRAIN_OUT"]
    recipe(*TINY, "--out", out, "--name", "cp", "--mesh.cp", 2)


@pytest.mark.ranks
def test_two_processes_train_what_one_does(tmp_path, monkeypatch):
    recipe(*TINY, "--out", tmp_path, "--name", "one")
    monkeypatch.setenv("PRETRAIN_OUT", str(tmp_path))
    check_claims(*(([run], 2) for run in (two_ranks, two_ranks_of_one_layer, two_ranks_of_one_row)))
    runs = [metrics_without_time(tmp_path / name) for name in ("one", "two", "tp", "cp")]
    one, two, *_ = runs
    assert [r["tokens"] for r in one if "tokens" in r] == [
        r["tokens"] for r in two if "tokens" in r
    ]
    for name in ("loss", "grad_norm", "valid/loss"):
        alone, *others = ([record[name] for record in run if name in record] for run in runs)
        assert all(other == pytest.approx(alone, rel=2e-5) for other in others)
    a, b = final_state(tmp_path / "one"), final_state(tmp_path / "two")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "args, said",
    [
        ("--model.vocab 100", r"the vocabulary has \d+ ids, more than .*--model.vocab \(100\)"),
        ("--data.batch 500", "fewer than one batch of 500 x 200"),
        ("--mesh.dp-shard 3", "multiply to 3, but 1 processes run"),
        ("--mesh.tp 3", r"--mesh.tp \(3\) must divide --data.length \(200\)"),
        ("--mesh.cp 3", r"twice --mesh.cp \(2 x 3\) must divide --data.length \(200\)"),
        ("--mesh.cp 2 --model.attention sdpa", "a ring attends by flash"),
        ("--train.graph True", "this one is on cpu, not compiled: leave it out"),
        ("--mesh.timeout 0", r"--mesh.timeout \(0.0\) must be positive"),
        ("--model.heads 3", r"heads \(3\) must divide width"),
        ("--vocabulary.kind bpe --vocabulary.size 100", r"vocab_size \(100\) must exceed 260"),
        ("--vocabulary.file nowhere.json", "no tokenizer at nowhere.json"),
        ("--data.files nowhere.txt", "nowhere.txt"),
        ("--data.files table.csv", "must be .txt or .jsonl"),
        ("--data.stream nowhere.jsonl", "no file nowhere.jsonl"),
        ("--data.stream nowhere.jsonl --data.files a.txt", "are two sources"),
        ("--data.valid-share 1.5", r"--data.valid-share \(1.5\) must be in"),
        ("--train.steps 0", r"--train.steps \(0\) must be at least 1"),
        ("--train.accumulation 3", r"accumulation \(3\) must divide the batch"),
        ("--name a/b", r"--name \(a/b\) must be a plain name"),
        ("--resume --overwrite", "holds no run"),
    ],
)
def test_bad_input_ends_with_one_line(args, said, tmp_path, capsys):

    line = refused(capsys, *TINY, "--out", tmp_path, *args.split())
    assert re.search(said, line), line


@pytest.mark.parametrize(
    "content, said",
    [
        (b"one document", "0 documents to train and 1 to validate on"),
        (b'{"text": "a"}\n{"body": "b"}\n', "line 2 is no JSON object with 'text'"),
        (b"\xff\xfe", "is not UTF-8"),
        (b'{"text": "short"}\n' * 5, "fewer than one batch"),
    ],
)
def test_bad_files_end_with_one_line(content, said, tmp_path, capsys):
    path = tmp_path / ("a.jsonl" if content.startswith(b"{") else "a.txt")
    path.write_bytes(content)
    assert said in refused(capsys, *TINY, "--out", tmp_path, "--data.files", path)


def test_a_stream_shorter_than_one_sequence_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "short {i}"}}\n' for i in range(40)))
    sizes = ["--vocabulary.size", 270, "--data.length", 4000]
    line = refused(capsys, *TINY, *sizes, "--data.stream", tmp_path / "a.jsonl", "--out", tmp_path)
    assert re.search("lane 0 of 1 holds .* fewer than one sequence of 4000", line), line


def test_a_streamed_run_goes_on_where_it_stopped(tmp_path):
    """Documents of two files, with other columns, as the Hub's are laid out."""
    some = stories(0, 120)
    for number in range(2):
        records = ({"id": i, "text": text} for i, text in enumerate(some[number::2]))
        lines = "".join(f"{json.dumps(record)}\n" for record in records)
        (tmp_path / f"part-{number}.jsonl").write_text(lines)
    args = [*TINY, "--data.stream", tmp_path / "part-*.jsonl", "--out", tmp_path]
    recipe(*args, "--name", "whole")
    recipe(*args, "--name", "parts", "--train.steps", 3)
    recipe("--resume", "--out", tmp_path, "--name", "parts", "--train.steps", 6)
    whole, parts = (metrics_without_time(tmp_path / name) for name in ("whole", "parts"))
    assert [r["step"] for r in whole] == [r["step"] for r in parts]
    place = [
        checkpoint.checkpoints(tmp_path / name / "checkpoints")[-1].path / "meta.json"
        for name in ("whole", "parts")
    ]
    assert place[0].read_text() == place[1].read_text()
    assert '"lane 0"' in place[0].read_text()


def test_a_run_is_not_overwritten_unasked(trained, capsys):
    where = ["--out", trained.parent, "--name", trained.name]
    assert "exists and is not overwritten" in refused(capsys, *TINY, *where)
