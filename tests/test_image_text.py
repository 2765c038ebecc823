"""The two-tower recipe: scores and pictures, resume, classes by name, export, bad options."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from msfs_functional import (
    checkpoint,
    clip_tokenizer,
    config,
    distributed_checkpoint,
    errors,
    images,
    tracking,
)
from msfs_functional.models import vision_format
from msfs_functional.synthetic import shapes

RECIPES = Path(__file__).parents[1] / "recipes"
sys.path.insert(0, str(RECIPES))
import image_text  # noqa: E402

TINY = """--model.width 16 --model.heads 2 --model.hidden 16 --model.depth 1 --model.text-depth 1
    --data.count 40 --test 12 --train.batch 8 --train.steps 6 --train.warmup 2
    --train.eval-every 3 --train.log-every 1 --device cpu --threads 1""".split()


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """They take most of the time of a tiny run; `trained`, which is made before, has them."""
    monkeypatch.setattr(image_text.pictures, "save_png", lambda *args: None)


def recipe(*args: object) -> None:
    words = [str(arg) for arg in args]
    errors.run(image_text.main, lambda: image_text.command_line(words))


@pytest.fixture(scope="module", params=["softmax", "sigmoid"])
def trained(request, tmp_path_factory) -> Path:
    """A finished run of each loss."""
    out = tmp_path_factory.mktemp("trained")
    recipe(*TINY, "--loss", request.param, "--out", out, "--name", "whole")
    return out / "whole"


def final_params(run: Path) -> dict[str, torch.Tensor]:
    saved = config.load(image_text.Config, run / config.FILE)
    return image_text.trained(replace(saved, out=run.parent, device="cpu"))[1]


def losses(run: Path) -> list[float]:
    records = tracking.read_metrics(run / tracking.METRICS)
    return [record["loss"] for record in records if "loss" in record]


def test_a_run_leaves_scores_pictures_and_what_it_learned(trained):
    saved = config.load(image_text.Config, trained / config.FILE)
    assert saved.train.steps == 6 and len(losses(trained)) == 6
    scores = json.loads((trained / "results.json").read_text())
    names = {f"retrieval/{way}@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert set(scores) > {"zero_shot/seen", "zero_shot/unseen", *names}
    for name in ("curves", "similarity"):
        assert (trained / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_killed_goes_on_bit_exactly(trained, tmp_path, monkeypatch):
    save = distributed_checkpoint.Writer.save

    def save_and_die(self, *args, **kwargs):
        save(self, *args, **kwargs)
        self.wait()
        raise ValueError("killed")

    loss = config.load(image_text.Config, trained / config.FILE).loss
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(distributed_checkpoint.Writer, "save", save_and_die)
        recipe(*TINY, "--loss", loss, "--out", tmp_path, "--name", "killed")
    assert [c.step for c in checkpoint.checkpoints(tmp_path / "killed/checkpoints")] == [3]
    recipe("--resume", "--out", tmp_path, "--name", "killed")
    assert losses(trained) == losses(tmp_path / "killed")
    one, other = final_params(trained), final_params(tmp_path / "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_get_the_class_whose_name_lies_nearest(trained, tmp_path, capsys):
    image = np.asarray(shapes.render(shapes.scenes(0, 1)[0]))
    Image.fromarray(image).save(tmp_path / "a.png")
    run = ["classify", "--out", trained.parent, "--name", "whole", "--images", tmp_path / "a.png"]
    recipe(*run, "--classes", "red circle", "blue square")
    said = capsys.readouterr().out
    shares = [int(share) for share in re.findall(r"(\d+)%", said)]
    assert "red circle" in said and sum(shares) in (99, 100, 101) and shares[0] >= shares[1]
    with pytest.raises(SystemExit):
        recipe(*run)
    assert "--classes (none) must name" in capsys.readouterr().err


def test_what_is_exported_is_what_transformers_loads(trained):
    recipe("export", "--out", trained.parent, "--name", "whole")
    settings, params, _, _ = vision_format.load(trained / "export")
    theirs = transformers.AutoModel.from_pretrained(trained / "export").eval()
    pixels, ids = torch.randn(2, 3, 32, 32), torch.randint(4, 99, (2, 16))
    ids[:, 9] = params["text.embedding.weight"].shape[0] - 1  # the end mark
    with torch.no_grad():
        logits = theirs(input_ids=ids, pixel_values=pixels).logits_per_image
    own = image_text.clip(settings).apply(params, pixels, ids)
    torch.testing.assert_close(own, logits, rtol=1e-4, atol=1e-4)
    trained_params = final_params(trained)
    assert all(torch.equal(params[name], trained_params[name]) for name in params)


MERGES = Path(os.environ.get("MSFS_DATA", "nowhere")) / "tokenizers/clip"


@pytest.mark.skipif(not MERGES.is_dir(), reason="MSFS_DATA has no CLIP tokenizer")
def test_a_published_clip_classifies_as_transformers_says_and_learns_on(tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    options = transformers.CLIPConfig(
        text_config=sizes, vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    theirs = transformers.CLIPModel(options).eval()
    theirs.save_pretrained(tmp_path / "hub")
    name = next(p for p in MERGES.iterdir() if p.name in clip_tokenizer.FILES).name
    (tmp_path / "hub" / name).write_bytes((MERGES / name).read_bytes())
    image = np.asarray(shapes.render(shapes.scenes(0, 1)[0]))
    Image.fromarray(image).save(tmp_path / "a.png")
    names = ("cat", "dog")
    run = ["classify", "--published", tmp_path / "hub", "--images", tmp_path / "a.png"]
    recipe(*run, "--data.size", 32, "--classes", *names, "--templates", "a {}")
    said = capsys.readouterr().out
    tokenizer = clip_tokenizer.ClipTokenizer.load(tmp_path / "hub")
    ids = tokenizer.batch([f"a {name}" for name in names])
    pixels = images.normalize(images.read(tmp_path / "a.png"), images.CLIP_MEAN, images.CLIP_STD)
    with torch.no_grad():
        chances = theirs(input_ids=ids, pixel_values=pixels[None]).logits_per_image.softmax(-1)[0]
    best = int(chances.argmax())
    assert f"a.png: {names[best]} {chances[best]:.0%}" in said
    recipe(*TINY, "--published", tmp_path / "hub", "--out", tmp_path, "--name", "on")
    before, after = theirs.state_dict(), final_params(tmp_path / "on")
    moved = (before["visual_projection.weight"] - after["image.projection.weight"]).abs()
    assert 0 < moved.max() < 0.05


def test_embedding_in_chunks_changes_no_loss(trained, tmp_path):
    loss = config.load(image_text.Config, trained / config.FILE).loss
    recipe(
        *TINY, "--loss", loss, "--out", tmp_path, "--name", "chunks", "--train.chunk", 3,
        "--train.steps", 3,
    )  # fmt: skip
    first = losses(trained)[:1]
    assert losses(tmp_path / "chunks")[:1] == pytest.approx(first, rel=1e-5)


def two_processes_softmax() -> None:
    recipe(*TINY, "--out", os.environ["RECIPES_OUT"], "--name", "softmax")


def two_processes_sigmoid() -> None:
    out = os.environ["RECIPES_OUT"]
    recipe(*TINY, "--out", out, "--name", "sigmoid", "--loss", "sigmoid")


def equal_one_process(out: Path) -> None:
    """What two processes left in `out` is what one process learns: for test_ranks."""
    for loss in ("softmax", "sigmoid"):
        recipe(*TINY, "--out", out, "--name", f"one-{loss}", "--loss", loss)
        one, two = losses(out / f"one-{loss}"), losses(out / loss)
        assert one == pytest.approx(two, rel=2e-5)


TWO = [two_processes_softmax, two_processes_sigmoid]


def test_a_fifth_of_rendered_pictures_is_grey_and_none_of_others():
    asked = lambda *args: image_text.checked(image_text.command_line(args)).data.grey  # noqa: E731
    assert (asked(), asked("--data.name", "folder"), asked("--data.grey", "0.1")) == (0.2, 0.0, 0.1)


def test_questions_alone_teach_no_towers(tmp_path, capsys):
    for name in "abcd":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    told = {"question": "what?", "answer": "nothing"}
    rows = (json.dumps({"file_name": f"{name}.png", **told}) for name in "abcd")
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(SystemExit):
        recipe(
            *TINY, "--data.name", tmp_path, "--data.valid-share", 0.5, "--out", tmp_path / "runs"
        )
    assert "no texts beside its images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--train.batch", "41"], r"a batch \(41\) must be at most the images"),
        (["--train.batch", "1"], r"--train.batch \(1\) must be 2 or more"),
        (["--model.length", "1"], "must hold BOS and EOS"),
        (["--data.valid-share", "1.0"], r"must be in \(0, 1\)"),
        (["--name", "a/b"], "plain name"),
        (["classify", "--name", "none"], "does not exist"),
        (["--images", "a.png"], "go with the mode classify"),
    ],
)
def test_bad_options_say_value_rule_remedy(args, message, tmp_path, capsys):
    on_a_run = args[0] == "classify"
    with pytest.raises(SystemExit) as ended:
        recipe(*(() if on_a_run else TINY), *args, "--out", tmp_path)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)
