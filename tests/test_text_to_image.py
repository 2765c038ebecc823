"""The recipe: stages end in grids and scores, a stopped run goes on bit-exactly, two ranks do what
one process does (test_ranks.py runs TWO), bad options."""

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from msfs_functional import diffusion as df
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional import noise_schedules as ns
from msfs_functional import random, samplers

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import text_to_image as recipe
import text_to_image_models as networks
import text_to_image_settings as settings

ABOUT = recipe.describe(
    settings.Config(), recipe.read_data(settings.Config(data=settings.Data(pictures=60)))
)


def tiny(out: Path, name: str, **options):
    stage = settings.Stage(12, 4, 1e-3, warmup=2)
    sizes = {"width": 16, "depth": 1, "pixels": 4, "save_every": 8, "draw_every": 10}
    sizes |= {"autoencoder": stage, "denoiser": stage, "samples": 4, "sample_steps": 2}
    sizes |= {"data": settings.Data(pictures=60), "measured": 0}
    return settings.Config(out=out, name=name, device="cpu", **{**sizes, **options})


SHORT = {stage: settings.Stage(8, 4, 1e-3, warmup=2) for stage in ("autoencoder", "denoiser")}


def denoiser(run: Path) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds, by name."""
    shapes = dict(recipe.make_models(tiny(run.parent, run.name), ABOUT).denoiser.shapes)
    like = {"params": shapes, "ema": shapes}
    state = checkpoints.load(run / "denoiser" / "checkpoints", like, partial=True).state
    return {f"{kind}.{name}": x for kind in like for name, x in state[kind].items()}


def test_all_stages_end_in_grids_and_a_stopped_run_goes_on_bit_exactly(
    tmp_path, monkeypatch, capsys
):
    recipe.main(tiny(tmp_path, "whole"))
    said = capsys.readouterr().out
    assert "valid: all" in said and "unseen: all" in said
    assert (tmp_path / "whole" / "denoiser.png").exists()
    monkeypatch.setattr(recipe, "curves", lambda config: None)  # slow to draw
    for split in ("valid", "unseen"):
        assert Image.open(tmp_path / "whole" / f"{split}.png").size == (8 * 32 * 4, 32 * 4)
        assert len((tmp_path / "whole" / f"{split}.txt").read_text().splitlines()) == 4
    recipe.main(tiny(tmp_path, "stopped", until="latents"))
    kept = set(os.listdir(tmp_path / "stopped"))
    assert "latents.safetensors" in kept and not {"denoiser", "results.json"} & kept
    calls, real = [], recipe.make_step

    def stopping(*args, **options):
        step = real(*args, **options)

        def run(state, batch):
            calls.append(1)
            if len(calls) == 10:  # two steps after the denoiser's first checkpoint
                raise KeyboardInterrupt
            return step(state, batch)

        return run

    monkeypatch.setattr(recipe, "make_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        recipe.main(tiny(tmp_path, "stopped", resume=True))
    recipe.main(tiny(tmp_path, "stopped", resume=True))
    whole, stopped = denoiser(tmp_path / "whole"), denoiser(tmp_path / "stopped")
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    capsys.readouterr()
    recipe.main(tiny(tmp_path, "whole", mode="sample", prompts=("a small red zebra",)))
    assert "words that training never showed: zebra" in capsys.readouterr().err
    assert Image.open(tmp_path / "whole" / "sample.png").size == (32 * 4, 32 * 4)
    assert (tmp_path / "whole" / "step-000010.png").exists()


def test_the_large_autoencoder_trains_beside_its_discriminator_and_a_unet_learns_latents(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(recipe, "curves", lambda config: None)
    config = tiny(
        *(tmp_path, "run"), coder="kl", backbone="unet", objective="v", draw_every=100, **SHORT
    )
    recipe.main(config)
    coder, place = recipe.make_models(config, recipe.About(3, 32)).coder, tmp_path / "run"
    like, start = {"params": dict(coder.shapes)}, coder.init(0)
    state = checkpoints.load(place / "autoencoder" / "checkpoints", like, partial=True).state
    for name in ("discriminator.output.weight", "autoencoder.decoder.output.weight"):
        assert not torch.equal(state["params"][name], start[name])


@pytest.mark.parametrize(
    ("objective", "sampler"), (("eps", "dpmpp_2m"), ("eps", "ddpm"), ("x0", None), ("v", None))
)
def test_a_perfect_network_of_each_target_has_no_loss_and_samples_the_data(
    objective, sampler, monkeypatch
):
    """Data of one point: what a network should say of x_t is known exactly."""
    config = settings.Config(objective=objective, sampler=sampler, sample_steps=20)
    process, point = networks.process_of(config, "cpu"), torch.full((5, 4, 2, 2), 0.7)
    assert process is not None

    def predict(x, time, interval=None):
        level = ns.variance_preserving(process.alpha_bar[(1000 * time).round().long()].float())
        over = ns.Level(*(df.per_example(part, x) for part in level))
        eps = (x - over.alpha * point) / over.sigma
        return df.target_of(point, eps, level, process.target)

    keys = random.split(random.key(0), 5)
    x = samplers.draw(keys, torch.empty_like(point))
    torch.testing.assert_close(recipe.walked(config, predict, x, keys), point, rtol=0, atol=2e-3)
    monkeypatch.setattr(networks, "predict_of", lambda *_: predict)
    batch = {"keys": keys, "latents": point}
    options = (None, config, torch.float32, {}, process, {}, batch, keys[0])
    assert networks.denoiser_loss(*options)[0] < 1e-8


def idx(values: np.ndarray) -> bytes:
    dims = np.array(values.shape, ">i4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + dims + values.astype(np.uint8).tobytes()


def test_classes_of_files_are_learnt_in_pixels_by_meanflow_and_measured(
    tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 255, (40, 28, 28))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(40) % 10))
    few = functools.partial(recipe.features.trained, steps=4, batch=8)
    monkeypatch.setattr(recipe.features, "trained", few)
    monkeypatch.setattr(recipe, "curves", lambda config: None)
    options = {"objective": "meanflow", "latents": False, "patch": 4, "sample_steps": 1}
    options |= {"denoiser": settings.Stage(8, 4, 1e-3, warmup=2)}
    data = settings.Data(source=f"mnist:{tmp_path}")
    recipe.main(tiny(tmp_path, "run", data=data, measured=12, **options))
    said = capsys.readouterr().out
    assert "12 samples, 40 real pictures, 64 features of a classifier of 10 classes" in said
    scores = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"fid", "kid", "kid_std", "precision", "recall"} == set(scores)
    assert Image.open(tmp_path / "run" / "samples.png").size == (8 * 32 * 4, 2 * 32 * 4)
    assert not (tmp_path / "run" / "autoencoder").exists()
    again = tiny(tmp_path, "run", data=data, measured=12, mode="evaluate", **options)
    recipe.main(again)
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == scores
    with pytest.raises(ValueError, match="'x' must be one of the classes"):
        recipe.main(tiny(tmp_path, "run", mode="sample", prompts=("x",), **options))


def test_a_run_of_losses_that_are_not_finite_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "to_signed", lambda pictures: pictures.float() * torch.nan)
    with pytest.raises(
        ValueError, match="8 steps of the autoencoder had a loss that is not finite"
    ):
        recipe.main(tiny(tmp_path, "run", most_skipped=7))


def on_two_ranks() -> None:
    out = Path(os.environ["CHECKPOINT_TEST"]) / "pictures"
    recipe.main(tiny(out, "two", mesh=settings.Mesh(dp_shard=2), **SHORT))


TWO = [on_two_ranks]


def as_on_one_process(tmp_path: Path) -> None:
    """What the run of two ranks left is what a run of one process leaves."""
    out = tmp_path / "pictures"
    recipe.main(tiny(out, "one", **SHORT))
    one, two = denoiser(out / "one"), denoiser(out / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-4, atol=1e-5)
    pictures = [
        np.asarray(Image.open(out / run / "unseen.png")).astype(int) for run in ("one", "two")
    ]
    assert abs(pictures[0] - pictures[1]).max() <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"caption_dropout": 1.0}, r"caption_dropout \(1.0\) must be in \[0, 1\)"),
        ({"sample_steps": 0}, r"--sample-steps \(0\) must be at least 1"),
        ({"guidance": -1.0}, r"--guidance \(-1.0\) must be at least 0"),
        ({"name": "a/b"}, "must be a plain name"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"mode": "sample", "resume": True}, r"--prompts \(none\)"),
        ({"mode": "evaluate"}, "is not finished: go on with --resume"),
        ({"data": settings.Data(size=36)}, r"--data.size \(36\) must be a multiple of 8"),
        ({"data": settings.Data(size=64)}, r"--data.size \(64\) must be 32 for shapes"),
        ({"data": settings.Data(source="mnist:/nowhere")}, "no train-images-idx3-ubyte.gz"),
        ({"features": "resnet"}, "needs --weights"),
        ({"features": "resnet", "weights": Path("/nowhere"), "measured": 8}, "no file /nowhere"),
        ({"coder": "kl", "latents": False}, "give one of them"),
        ({"lpips": (Path("vgg"),)}, "is a loss of --coder kl"),
        ({"lpips": (Path("/nowhere/vgg.pth"),), "coder": "kl"}, "no file /nowhere/vgg.pth"),
        ({"sampler": "ddim"}, "flow has its own"),
        ({"objective": "v", "sampler": "heun"}, "must be one of ddpm, ddim: .* pure noise"),
        ({"objective": "eps", "sample_steps": 2000}, "must be at most 1000"),
        ({"gan": 0.5}, "is a loss of --coder kl"),
        ({"prompts": ("a cat",)}, "is of sample"),
        ({"weights": Path("resnet.th")}, "is of --features resnet or inception"),
        ({"data": settings.Data(caption="text", split="test")}, "--data.caption, --data.split: sh"),
    ),
)
def test_bad_options_are_named(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main(tiny(tmp_path, **{"name": "run", **options}))
    assert not (tmp_path / "run").exists()


def test_the_configuration_of_a_run_is_kept(tmp_path):
    recipe.configs.new_run(tmp_path / "run", tiny(tmp_path, "run"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["denoiser"]["steps"] == 12
