"""The vision-language recipe: stages, a report with pictures, resume, chat, ranks, bad options."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msfs_functional import checkpoint, config, distributed_checkpoint, errors, tracking
from msfs_functional.synthetic import shapes

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import caption  # noqa: E402

TINY = """--model.width 16 --model.heads 2 --model.hidden 16 --model.depth 1
    --model.decoder-width 16 --model.decoder-depth 1 --model.decoder-hidden 16
    --data.count 40 --test 2 --train.images 4 --projector.steps 3 --model.qk-norm
    --projector.warmup 1 --all.steps 6 --all.warmup 2 --train.eval-every 3 --train.log-every 1
    --device cpu --threads 1""".split()


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of the time of a tiny run; `trained`, which is made before, has them."""
    monkeypatch.setattr(caption.pictures, "save_png", lambda *args: None)


def recipe(*args: object) -> None:
    words = [str(arg) for arg in args]
    errors.run(caption.main, lambda: caption.command_line(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained")
    recipe(*TINY, "--out", out, "--name", "whole")
    return out / "whole"


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.checkpoints(run / "all/checkpoints")[-1].path
    records = distributed_checkpoint._metadata(newest).state_dict_metadata
    like = {name: torch.empty(r.size, dtype=r.properties.dtype) for name, r in records.items()}
    return distributed_checkpoint.load(newest, like).state


def losses(run: Path) -> list[float]:
    records = [
        record
        for stage in ("projector", "all")
        for record in tracking.read_metrics(run / stage / tracking.METRICS)
    ]
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_leaves_both_stages_scores_and_pictures(trained):
    assert config.load(caption.Config, trained / config.FILE).all.steps == 6
    assert len(losses(trained)) == 9
    scores = json.loads((trained / "results.json").read_text())
    kinds = ("exact_match", "without_looking", "bleu", "chrf", "captions_right")
    assert set(scores) == {f"{split}/{kind}" for split in ("valid", "unseen") for kind in kinds}
    for name in ("curves", "answers_valid", "answers_unseen", "gaze_valid", "gaze_unseen"):
        assert (trained / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_stage_1_trains_and_keeps_nothing_but_the_projector(trained):
    newest = checkpoint.checkpoints(trained / "projector/checkpoints")[-1].path
    names = set(distributed_checkpoint._metadata(newest).state_dict_metadata)
    kept = {name for name in names if "weight" in name or "bias" in name}
    assert kept and all("projector." in name for name in kept)


def test_a_run_that_was_killed_goes_on_bit_exactly(trained, tmp_path, monkeypatch):
    save, calls = distributed_checkpoint.Writer.save, []

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        calls.append(1)
        if len(calls) == 2:  # the projector's, then the first of the others'
            raise ValueError("killed")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed_checkpoint.Writer, "save", save_and_die)
        recipe(*TINY, "--out", tmp_path, "--name", "killed")
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "killed/all/checkpoints")] == [3]
    recipe("--resume", "--out", tmp_path, "--name", "killed")
    assert losses(trained) == losses(tmp_path / "killed")
    one, other = final_state(trained), final_state(tmp_path / "killed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert (trained / "results.json").read_text() == (tmp_path / "killed/results.json").read_text()


def test_chat_answers_each_question_about_any_image_file(trained, tmp_path, capsys, monkeypatch):
    image = shapes.render(shapes.scenes(0, 1)[0])
    Image.fromarray(np.asarray(image)).resize((90, 60)).convert("CMYK").save(tmp_path / "a.jpg")
    run = ["--out", trained.parent, "--name", "whole", "--chat", tmp_path / "a.jpg"]
    recipe(*run, "--ask", "how many squares?", "what is it?")
    given = capsys.readouterr().out.splitlines()
    assert len(given) == 2
    monkeypatch.setattr(sys, "stdin", iter(["how many squares?\n", "\n"]))
    recipe(*run)
    assert capsys.readouterr().out.splitlines() == given[:1]
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(SystemExit):
        recipe(*run[:4], "--chat", tmp_path / "b.png", "--ask", "what?")
    assert "is no image that can be read" in capsys.readouterr().err


def test_a_folder_trains_without_its_broken_images_which_are_named(tmp_path, capsys):
    rows = []
    for i in range(12):
        path = tmp_path / "data" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (40, 30), 20 * i).save(path)
        rows.append({"file_name": path.name, "question": "how dark?", "answer": f"{20 * i}"})
    path.write_bytes(b"nothing")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data/metadata.jsonl").write_text(lines)
    options = ["--data.name", tmp_path / "data", "--data.valid-share", 0.3, "--all.steps", 3]
    options += ["--train.muon-projector", "--model.gain", "None"]
    recipe(*TINY, *options, "--model.tiles", 2, "--model.patch", 4, "--out", tmp_path)
    said = capsys.readouterr().out
    assert "8 images to train, 2 valid" in said
    assert "1 images could not be read" in said and "11.png" in said
    scores = json.loads((tmp_path / "caption-1/results.json").read_text())
    assert set(scores) == {"valid/exact_match", "valid/without_looking"}


def two_processes() -> None:
    recipe(*TINY, "--out", os.environ["RECIPES_OUT"], "--name", "captions", "--mesh.dp-shard", 2)


def equal_one_process(out: Path) -> None:
    """What `two_processes` left in `out` is what one process learns: for test_ranks."""
    recipe(*TINY, "--out", out, "--name", "one-captions")
    one, two = out / "one-captions", out / "captions"
    assert losses(one) == pytest.approx(losses(two), rel=2e-5)
    assert final_state(one).keys() == final_state(two).keys()


TWO = [two_processes]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.images", 41], r"a batch \(41\) must be at most the images"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--all.steps", 0], r"--all.steps \(0\) must be at least 1"),
        (["--data.valid-share", 1.0], r"must be in \(0, 1\)"),
        (["--model.length", 20], "must fit into rows of 20"),
        (["--data.size", 33], "must divide image"),
        (["--model.shuffle", 3], r"shuffle \(3\)"),
        (["--name", "a/b"], "plain name"),
        (["--vision", "nowhere"], "nowhere"),
        (["chat"], "--chat"),
        (["--ask", "what?"], "go with --chat"),
        (["--data.grey", 2.0], r"--data.grey \(2.0\) is a share"),
        (["--data.coloured", "(red"], "must be a regular expression"),
        (["--model.tiles", 3], r"--model.tiles \(3\) must divide"),
    ],
)
def test_bad_options_say_value_rule_remedy(args, message, tmp_path, capsys, trained):
    on_a_run = args[0] in ("chat", "--resume")
    place = ["--out", trained.parent if on_a_run else tmp_path]
    with pytest.raises(SystemExit) as ended:
        recipe(*args, *place) if on_a_run else recipe(*TINY, *args, *place)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_tenth_of_rendered_pictures_is_grey_and_none_of_others():
    asked = lambda *args: caption.checked(caption.command_line(args)).data.grey  # noqa: E731
    assert (asked(), asked("--data.name", "folder"), asked("--data.grey", "0.3")) == (0.1, 0.0, 0.3)
    assert asked("--preset", "easy_vqa", "--data.name", "easy_vqa") == 0
