"""The recipe: stages end in grids and scores, a stopped run goes on bit-exactly, bad options."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msfs_functional import checkpoint
from msfs_functional.synthetic import shapes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location(
        "text_to_image", ROOT / "recipes" / "text_to_image.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["text_to_image"] = module
    spec.loader.exec_module(module)
    return module


def tiny(recipe, out: Path, name: str, **options):
    stage = recipe.Stage(12, 4, 1e-3, warmup=2)
    sizes = {"pictures": 60, "width": 16, "depth": 1, "pixels": 4, "save_every": 8}
    sizes |= {"autoencoder": stage, "denoiser": stage, "samples": 4, "sample_steps": 2}
    return recipe.Config(out=out, name=name, device="cpu", **{**sizes, **options})


def denoiser(run: Path) -> dict[str, torch.Tensor]:
    path = checkpoint.load(run / "denoiser" / "checkpoints").path
    return load_file(path / "state.safetensors")


def test_all_stages_end_in_grids_and_a_stopped_run_goes_on_bit_exactly(
    recipe, tmp_path, monkeypatch, capsys
):
    recipe.main(tiny(recipe, tmp_path, "whole"))
    said = capsys.readouterr().out
    assert "valid: count" in said and "unseen: count" in said
    for split in ("valid", "unseen"):
        assert Image.open(tmp_path / "whole" / f"{split}.png").size == (8 * 32 * 4, 32 * 4)
        assert len((tmp_path / "whole" / f"{split}.txt").read_text().splitlines()) == 4
    calls, real = [], recipe.make_step

    def stopping(*args, **options):
        step = real(*args, **options)

        def run(state, batch):
            calls.append(1)
            if len(calls) == 12 + 10:  # two steps after the denoiser's first checkpoint
                raise KeyboardInterrupt
            return step(state, batch)

        return run

    monkeypatch.setattr(recipe, "make_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(tiny(recipe, tmp_path, "stopped"))
    recipe.main(tiny(recipe, tmp_path, "stopped", resume=True))
    whole, stopped = denoiser(tmp_path / "whole"), denoiser(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    recipe.main(tiny(recipe, tmp_path, "whole", mode="sample", prompts=("a small red circle",)))
    assert Image.open(tmp_path / "whole" / "sample.png").size == (32 * 4, 32 * 4)


def test_captions_are_words_that_the_vocabulary_holds(recipe):
    words = recipe.vocabulary()
    texts = [shapes.caption(scene) for scene in shapes.scenes(0, 300)]
    given = recipe.tokens([*texts, "", "A small PINK circle"], words)
    assert (given["ids"][:-1] != recipe.UNKNOWN).all()
    assert given["ids"].shape == (302, 12)
    assert given["lengths"][-2:].tolist() == [1, 4]
    assert given["ids"][-2, 0] == recipe.NOTHING
    assert (given["ids"][-1] == recipe.UNKNOWN).sum() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"caption_dropout": 1.0}, r"caption_dropout \(1.0\) must be in \[0, 1\)"),
        ({"sample_steps": 0}, r"--sample-steps \(0\) must be at least 1"),
        ({"guidance": -1.0}, r"--guidance \(-1.0\) must be at least 0"),
        ({"name": "a/b"}, "must be a plain name"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"mode": "sample", "resume": True}, r"--prompts \(none\)"),
    ),
)
def test_bad_options_are_named(recipe, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main(tiny(recipe, tmp_path, **{"name": "run", **options}))


def test_a_caption_beyond_the_context_is_refused(recipe):
    with pytest.raises(ValueError, match="has 13 words, the context 12: shorten it"):
        recipe.tokens(["a " * 13], recipe.vocabulary())


def test_the_configuration_of_a_run_is_kept(recipe, tmp_path):
    recipe.configs.new_run(tmp_path / "run", tiny(recipe, tmp_path, "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["denoiser"]["steps"] == 12
