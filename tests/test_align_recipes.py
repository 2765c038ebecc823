"""The alignment recipes: runs end in tables, stopped ones go on bit-exactly, bad input is named."""

import importlib.util
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from ranks import start_server

from msfs_functional import agreement, alignment_runs, answerers, launching, stages
from msfs_functional import config as configs
from msfs_functional import distributed_checkpoint as checkpoints
from msfs_functional.aligning import Mesh, Model, Stage, check_room, fine_tune, prepare
from msfs_functional.alignment_runs import Options, each_seed, workers_of
from msfs_functional.alignment_tasks import Data, built_in
from msfs_functional.models import decoder, pretrained
from msfs_functional.preference_training import (
    Loss,
    Preferences,
    as_data,
    check,
    optimise,
    preference_loss,
)
from msfs_functional.reinforcement import Learning
from msfs_functional.rewards import RewardError
from msfs_functional.synthetic.instructions import demonstrations
from msfs_functional.tokenizer import train_word_level

ROOT = Path(__file__).parents[1]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def align_dpo():
    return load("align_dpo")


@pytest.fixture(scope="module")
def align_people():
    return load("align_people")


@pytest.fixture(scope="module")
def align_ppo():
    return load("align_ppo")


def tiny(recipe, out, name, **options):
    data = Data(demonstrations=120, prompts=60, held_out=30, new=6)
    stage = Stage(3, 4, 3e-3, 1)
    sizes = {"data": data, "model": Model(16, 1, 2, 64), "sft": stage, "seeds": 1}
    if hasattr(recipe.Config(), "rewards"):
        sizes["rewards"] = stage
    return replace(recipe.Config(out=out, name=name, device="cpu", **sizes), **options)


def rl(**options):
    sizes = {"iterations": 3, "prompts": 4, "samples": 2, "minibatches": 2, "warmup": 1}
    return Learning(**{**sizes, **options})


def preferences(**options):
    sizes = {"steps": 4, "batch": 2, "rate": 1e-3, "warmup": 1, "rounds": 1, "samples": 8}
    sizes["right"] = False
    return Preferences(**{**sizes, **options})


def state_of(folder):
    """All that the last checkpoint of a stage holds."""
    path = checkpoints.load(folder / "checkpoints").path
    return {
        file.name: file.read_bytes() for file in sorted(path.iterdir()) if "distcp" in file.name
    }


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(folder, step): SIGTERM once, when that stage has done that many steps."""
    real = stages.Tracker.log

    def install(folder, step):
        def log(self, count, *args, **options):
            real(self, count, *args, **options)
            if self.run_dir.name == folder and count == step:
                monkeypatch.setattr(stages.Tracker, "log", real)
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(stages.Tracker, "log", log)

    return install


def test_a_dpo_run_that_was_stopped_ends_with_the_same_bits(align_dpo, tmp_path, stop_at, capsys):
    options = {"dpo": preferences(loss="kto")}
    align_dpo.main(tiny(align_dpo, tmp_path, "whole", **options))
    said = capsys.readouterr().out
    assert "right answers to held-out prompts, greedy" in said and "KL to the reference" in said
    run = tmp_path / "whole"
    assert (run / "curves.png").stat().st_size > 10_000
    assert json.loads((run / "results.json").read_text())[0]["pairs"] > 0
    assert len((run / "samples.txt").read_text().splitlines()) == 30
    config = tiny(align_dpo, tmp_path, "stopped", **options)
    stop_at("dpo-1", 2)
    with pytest.raises(SystemExit):
        align_dpo.main(config)
    assert "--resume" in capsys.readouterr().out
    align_dpo.main(replace(config, resume=True))
    for stage in ("sft", "dpo-1"):
        places = [tmp_path / name / "seed-0" / stage for name in ("whole", "stopped")]
        assert state_of(places[0]) == state_of(places[1])


def test_a_worker_that_gets_sigterm_twice_saves_and_stops(align_dpo, tmp_path, monkeypatch):
    """From the run that started it and from a scheduler that stops all processes of a job."""
    monkeypatch.setattr(stages.multiprocessing, "parent_process", lambda: "the run")
    real = stages.Tracker.log

    def log(self, count, *args, **options):
        real(self, count, *args, **options)
        if count == 2:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(stages.Tracker, "log", log)
    with pytest.raises(SystemExit):
        align_dpo.main(tiny(align_dpo, tmp_path, "twice", dpo=preferences()))
    assert checkpoints.load(tmp_path / "twice" / "seed-0" / "sft" / "checkpoints").step == 2


def test_a_run_starts_from_a_local_folder(align_dpo, tmp_path):
    """A published decoder is fine-tuned at its own sizes, on its own tokenizer's ids."""
    shown = demonstrations(0, 120)
    words = train_word_level([text for pair in shown for text in pair], 200)
    size = decoder.tiny(words.vocab_size, width=16, depth=2, heads=2, kv_heads=1, hidden=24)
    params, place = decoder.decoder(size).init(0), tmp_path / "published"
    pretrained.save(place, size, params, tokenizer=words.to_json(), family="llama")
    special = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>"}
    (place / "tokenizer_config.json").write_text(json.dumps(special))
    options = {"model": Model(length=64, folder=place), "dpo": preferences()}
    align_dpo.main(tiny(align_dpo, tmp_path, "local", **options))
    found = checkpoints.load(tmp_path / "local" / "seed-0" / "dpo-1" / "checkpoints")
    like = {"params": {name: torch.Size(p.shape) for name, p in params.items()}}
    tuned = checkpoints.load(found.path, like, partial=True).state["params"]
    moved = max(float((tuned[name] - p).abs().max()) for name, p in params.items())
    assert 0 < moved < 0.1  # nearer to the folder's than to any other start
    with pytest.raises(ValueError, match=r"length \(4096\) is beyond the context"):
        wrong = replace(options["model"], length=4096)
        align_dpo.main(tiny(align_dpo, tmp_path, "long", **{**options, "model": wrong}))


@pytest.mark.parametrize("loss", sorted({*get_args(Loss)} - {"kto", "apo_down"}))
def test_every_loss_has_a_gradient_that_prefers_the_chosen_answer(loss):
    config = preferences(loss=loss, imitation=0.0)
    sums = torch.tensor([[-4.0, -4.0]], requires_grad=True)
    lengths = torch.tensor([[4.0, 2.0]])
    losses, _ = preference_loss(config, sums, lengths, torch.tensor([[-4.0, -4.0]]))
    slope = torch.autograd.grad(losses.sum(), sums)[0]
    assert slope[0, 0] < 0 < slope[0, 1]


def test_normalised_losses_read_log_probabilities_a_token():
    lengths, before = torch.tensor([[4.0, 2.0]]), torch.tensor([[-6.0, -5.0]])
    sums = torch.tensor([[-4.0, -4.0]])
    options = {"imitation": 0.0, "normalised": True}
    found, margins = preference_loss(preferences(**options), sums, lengths, before)
    expected = -torch.tensor(0.5 - 0.5).sigmoid().log()  # (-1 + 1.5) - (-2 + 2.5) nats a token
    torch.testing.assert_close(found, expected[None])
    assert margins.tolist() == [0.0]
    for own in (True, False):
        options = {"loss": "ipo", "normalised": own}
        same, _ = preference_loss(preferences(**options), sums, lengths, before)
        assert same.tolist() == [25.0]  # (0 - 1 / (2 * 0.1))^2
    with pytest.raises(ValueError, match="does not go with kto"):
        check(preferences(loss="kto", normalised=True))


def test_a_sweep_of_beta_in_one_step_equals_single_runs(align_dpo, tmp_path):
    """Members of one beta each, on the same batches, end where runs of that beta alone end."""
    options = {"dpo": preferences()}
    config = tiny(align_dpo, tmp_path, "sweep", sweep=(0.1, 2.0), **options)
    align_dpo.main(config)
    found = checkpoints.load(tmp_path / "sweep" / "sweep" / "checkpoints")
    machine = configs.machine("cpu", None, None)
    ready = prepare(built_in, config.data, config.model, machine, Mesh(), 0)
    task, setup, _ = ready
    like = {"params": {n: torch.Size((2, *s)) for n, s in setup.model.shapes.items()}}
    stacked = checkpoints.load(found.path, like, partial=True).state["params"]
    start = fine_tune(setup, task, config.sft, 0, tmp_path / "sweep" / "sft", "")
    pairs = align_dpo.judged_pairs(config, ready, start, task.prompts, 0)
    for member, beta in enumerate(config.sweep):
        alone = replace(config.dpo, beta=beta)
        data = as_data(alone, setup, start, pairs)
        params = optimise(alone, setup, start, data, 0, tmp_path / f"alone-{beta}", "")
        for name, value in params.items():
            torch.testing.assert_close(stacked[name][member], value, atol=2e-5, rtol=1e-3)
    assert json.loads((tmp_path / "sweep" / "results.json").read_text())[1]["beta"] == 2.0


def test_seeds_in_one_vmapped_step_learn_from_other_pairs(align_dpo, tmp_path):
    config = tiny(align_dpo, tmp_path, "seeds", sweep_seeds=3, dpo=preferences())
    align_dpo.main(config)
    assert len(json.loads((tmp_path / "seeds" / "results.json").read_text())) == 3
    found = checkpoints.load(tmp_path / "seeds" / "sweep" / "checkpoints")
    like = {"params": {"norm.weight": torch.Size((3, 16))}}
    one, two, three = checkpoints.load(found.path, like, partial=True).state["params"][
        "norm.weight"
    ]
    assert not torch.equal(one, two) and not torch.equal(two, three)


def test_influence_is_told_for_training_pairs(align_dpo, tmp_path, capsys):
    options = {"dpo": preferences(flipped=0.3), "influence": 6}
    align_dpo.main(tiny(align_dpo, tmp_path, "influence", **options))
    said = capsys.readouterr().out
    assert "influence of 6 pairs" in said and said.count("  harmful") == 3


def test_an_rl_run_stopped_between_two_updates_of_a_rollout_ends_with_the_same_bits(
    align_ppo, tmp_path, stop_at
):
    options = {"rl": rl(algorithm="ppo")}
    align_ppo.main(tiny(align_ppo, tmp_path, "whole", **options))
    records = [
        json.loads(line)
        for line in (tmp_path / "whole" / "seed-0" / "rl" / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    wanted = {
        "reward", "kl", "rollout_entropy", "clip_fraction", "ratio_max", "ratio_min", "length",
        "rollout_tokens/s", "update_tokens/s", "explained_variance",
    }  # fmt: skip
    assert wanted <= records[-1].keys()
    table = (tmp_path / "whole" / "seed-0" / "rl" / "samples.jsonl").read_text().splitlines()
    assert {"iteration", "prompt", "answer", "reward"} == json.loads(table[0]).keys()
    config = tiny(align_ppo, tmp_path, "stopped", **options)
    stop_at("rl", 3)  # two updates a rollout: the buffer of the second one is half used
    with pytest.raises(SystemExit):
        align_ppo.main(config)
    align_ppo.main(replace(config, resume=True))
    places = [tmp_path / name / "seed-0" / "rl" for name in ("whole", "stopped")]
    assert state_of(places[0]) == state_of(places[1])


def test_rollouts_ahead_give_the_same_bits_from_a_process_beside_and_after_a_stop(
    align_ppo, tmp_path, stop_at, monkeypatch
):
    """Each rollout by the parameters before the last updates: asked for in turn, while updates
    run, or read from a checkpoint."""
    start_server(answerers.__name__)
    quick = multiprocessing.get_context("forkserver")  # a run spawns, which imports everything anew
    monkeypatch.setattr(answerers.multiprocessing, "get_context", lambda kind: quick)
    for way in ("ahead", "beside"):
        align_ppo.main(tiny(align_ppo, tmp_path, way, rl=rl(rollouts=way)))
    config = tiny(align_ppo, tmp_path, "stopped", rl=rl(rollouts="ahead"))
    stop_at("rl", 3)
    with pytest.raises(SystemExit):
        align_ppo.main(config)
    align_ppo.main(replace(config, resume=True))
    ahead, *others = (
        state_of(tmp_path / name / "seed-0" / "rl") for name in ("ahead", "beside", "stopped")
    )
    assert all(other == ahead for other in others)


def test_a_reward_model_ensemble_and_a_trust_region_run(align_ppo, tmp_path, capsys):
    config = rl(reward="model", members=2, aggregate="uncertainty", trust_region=0.01)
    align_ppo.main(tiny(align_ppo, tmp_path, "model", rl=config))
    assert "reward model accuracy" in capsys.readouterr().out
    assert (tmp_path / "model" / "rewards.png").stat().st_size > 10_000
    path = tmp_path / "model" / "seed-0" / "rl" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(0 <= record["step_kl"] <= 0.0101 for record in records)
    assert any(record["step_kl"] > 0 for record in records)


def two_processes():
    """For test_ranks, which starts them: the rollouts, rewards and gradients of one process, to the
    rounding of another order of sums: of a policy, of a critic, of natural gradients, of reward
    models, alone and as an ensemble, and of DPO on files."""
    meshes = Mesh(), Mesh(dp_shard=1, tp=2), Mesh(dp_shard=1, tp=2), Mesh(dp_shard=1, cp=2)
    with launching.joined("cpu"):  # one process group for all
        learn_four_ways(Path(os.environ["RECIPES_OUT"]), "two-", meshes)
        goes_on_after_a_stop(Path(os.environ["RECIPES_OUT"]), meshes)


def goes_on_after_a_stop(out, meshes):
    """The run of parts of each layer, stopped while its buffer is half used: the same bits."""
    align_ppo, real = sys.modules["align_ppo"], stages.Tracker.log

    def log(self, count, *args, **options):
        real(self, count, *args, **options)
        if self.run_dir.name == "rl" and count == 3:
            signal.raise_signal(signal.SIGTERM)

    config = learners(out, "stopped-", meshes)["ppo"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Tracker, "log", log)
        with pytest.raises(SystemExit):
            align_ppo.main(config)
    align_ppo.main(replace(config, resume=True))
    runs = [state_of(out / name / "seed-0" / "rl") for name in ("two-ppo", "stopped-ppo")]
    assert runs[0] == runs[1]


TWO = [two_processes]


def equal_one_process(out):
    learn_four_ways(out, "one-", 4 * [Mesh()])
    for place in ("grpo/seed-0/rl", "ppo/seed-0/rewards", "ppo/seed-0/rl", "natural/seed-0/rl",
                  "people/ensemble", "people/seed-0/rewards", "people/seed-0/dpo"):  # fmt: skip
        one, two = (
            [json.loads(line) for line in (out / path / "metrics.jsonl").open()]
            for path in (f"one-{place}", f"two-{place}")
        )
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            names = {"reward", "kl", "length", "grad_norm", "rollout_entropy", "loss", "value_loss",
                     "step_kl", "step_scale"}  # fmt: skip
            for name in names & a.keys():
                assert a[name] == pytest.approx(b[name], abs=2e-3, rel=5e-3), (place, name)


def learners(out, prefix, meshes):
    """{name: config} of GRPO by the checker, by its updates and by natural gradients, and of PPO by
    an ensemble of reward models."""
    align_ppo, ways = (
        sys.modules["align_ppo"],
        {
            "grpo": {},
            "natural": {"trust_region": 0.003, "iterations": 1},
            "ppo": {"algorithm": "ppo", "reward": "model", "members": 2, "aggregate": "min"},
        },
    )
    return {
        name: tiny(
            align_ppo,
            out,
            f"{prefix}{name}",
            rl=rl(**{"iterations": 2, "prompts": 4, **options}),
            mesh=mesh,
        )
        for (name, options), mesh in zip(ways.items(), meshes, strict=False)
    }


def learn_four_ways(out, prefix, meshes):
    """Those, each on its mesh, and DPO on files."""
    align_ppo, align_people = load("align_ppo"), load("align_people")
    for config in learners(out, prefix, meshes).values():
        align_ppo.main(config)
    options = {**people(out), "mesh": meshes[-1]}
    align_people.main(tiny(align_people, out, f"{prefix}people", **options))


def test_meshes_that_do_not_fit_are_refused(align_ppo, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "world", lambda: 2)
    for model, mesh, said in (
        (Model(), Mesh(tp=3), "multiply to 3, which does not divide the number of processes"),
        (Model(heads=1), Mesh(tp=2), r"tp \(2\) must divide --model.heads \(1\): change one"),
        (Model(length=66), Mesh(cp=2), r"\(2 x 2\) must divide --model.length \(66\): change one"),
    ):
        with pytest.raises(ValueError, match=said):
            check_room(Data(), model, mesh)
    config = tiny(align_ppo, tmp_path, "natural", mesh=Mesh(cp=2), rl=rl(trust_region=0.1))
    with pytest.raises(ValueError, match=r"is of whole rows, which --mesh.cp \(2\) cuts"):
        align_ppo.main(config)


def reward_file(tmp_path, text):
    path = tmp_path / "reward.py"
    path.write_text(text)
    return f"{path}:reward"


def test_a_reward_that_fails_once_costs_its_rollout_only(align_ppo, tmp_path, capsys):
    place = reward_file(
        tmp_path,
        "calls = []\n"
        "def reward(prompts, completions, metadata):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 2 else len(c) for c in completions]\n",
    )
    align_ppo.main(tiny(align_ppo, tmp_path, "once", rl=rl(algorithm="dr_grpo", reward=place)))
    said = capsys.readouterr().out
    assert "step 2 is skipped: reward reward gave nan for completion 0" in said
    assert "right answers" in said


def test_a_reward_that_keeps_failing_stops_the_run_and_nothing_is_lost(align_ppo, tmp_path, capsys):
    place = reward_file(
        tmp_path,
        "import pathlib\n"
        "def reward(prompts, completions, metadata):\n"
        f"    if pathlib.Path({str(tmp_path / 'broken')!r}).exists():\n"
        "        raise RuntimeError('no connection')\n"
        "    return [len(c) for c in completions]\n",
    )
    own = rl(algorithm="reinforce", reward=place, patience=2)
    config = tiny(align_ppo, tmp_path, "failing", save_every=2, rl=own)
    (tmp_path / "broken").touch()
    with pytest.raises(RewardError, match=r"step 2: .*no connection.*2 steps in a row had no"):
        align_ppo.main(config)
    assert "step 1 is skipped" in capsys.readouterr().out
    folder = tmp_path / "failing" / "seed-0"
    before = state_of(folder / "sft")
    (tmp_path / "broken").unlink()
    align_ppo.main(replace(config, resume=True))
    assert state_of(folder / "sft") == before
    assert checkpoints.load(folder / "rl" / "checkpoints").step == 6


def one_seed(config, machine, seed, run):
    """What `each_seed` runs below, in processes of their own."""
    if seed == 3:
        raise ValueError("three (3) is too many")
    return seed, torch.get_num_threads()


def test_seeds_side_by_side_come_back_in_order_and_fail_as_they_would_alone(monkeypatch):
    quick = multiprocessing.get_context("fork")  # a run spawns, which imports everything anew
    monkeypatch.setattr(alignment_runs.multiprocessing, "get_context", lambda kind: quick)
    machine = configs.machine("cpu", None, None)
    options = Options(seed=1, seeds=2, workers=2, threads=2)
    assert each_seed(one_seed, options, machine, ROOT) == [(1, 1), (2, 1)]
    counts = {
        seeds: workers_of(Options(seeds=seeds, threads=2), machine) for seeds in (1, 2, 3, 4, 5)
    }
    assert counts == {1: 1, 2: 2, 3: 3, 4: 2, 5: 2}
    with pytest.raises(ValueError, match=r"three \(3\) is too many"):
        each_seed(one_seed, replace(options, seeds=3), machine, ROOT)


def ended_by_a_signal(config, machine, seed, run):
    """What `each_seed` runs below: its worker gets the signal where no loop takes it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as in a process that is spawned
    if config.name == "stopped":
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(30)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_seed_that_is_ended_leaves_word_of_what_is_kept(monkeypatch, capsys):
    quick = multiprocessing.get_context("fork")
    monkeypatch.setattr(alignment_runs.multiprocessing, "get_context", lambda kind: quick)
    machine, options = configs.machine("cpu", None, None), Options(seeds=2, workers=2, threads=2)
    other = quick.Process(target=time.sleep, args=(30,))  # a child that is no worker of the run
    other.start()
    with pytest.raises(SystemExit) as ended:
        each_seed(ended_by_a_signal, replace(options, name="stopped"), machine, ROOT)
    assert ended.value.code == 128 + signal.SIGTERM and other.is_alive()
    other.kill()
    assert "seed 0 was stopped between two checkpoints" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match=r"ended with code -9; .*--resume goes on"):
        each_seed(ended_by_a_signal, options, machine, ROOT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--rl.minibatches", "3", "--rl.prompts", "4"],
            r"minibatches \(3\) must divide the 4 x 8",
        ),
        (["--rl.samples", "1"], r"samples \(1\) must be at least 2 with grpo"),
        (["--rl.reward", "nothing"], "must be FILE.py:FUNCTION"),
        (["--rl.trust-region", "0.1", "--rl.algorithm", "ppo"], "moves no critic"),
        (["--rl.kl", "-1"], r"kl \(-1.0\) must be at least 0"),
        (["--name", "a/b"], "plain name"),
        (["--data.files", "none.jsonl"], "does not exist"),
        (["--data.texts", "a.txt"], r"texts \(\['a.txt'\]\) are read beside"),
    ],
)
def test_bad_options_of_rl_are_named(align_ppo, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        align_ppo.main(align_ppo.command_line(["--out", str(tmp_path), *arguments]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dpo.beta", "0"], r"beta \(0.0\) must be above 0"),
        (["--dpo.loss", "robust", "--dpo.label-smoothing", "0.5"], r"label.smoothing \(0.5\)"),
        (["--dpo.flipped", "1.5"], r"flipped \(1.5\) must be in \[0, 1\)"),
        (["--resume", "--overwrite", "--name", "x"], "holds no run|does not exist"),
        (["--data.new", "64"], r"new \(64\) leaves no room"),
        (["--data.files", "a.jsonl"], r"\(\['a.jsonl'\]\) are not for the embedded task"),
    ],
)
def test_bad_options_of_dpo_are_named(align_dpo, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        align_dpo.main(align_dpo.command_line(["--out", str(tmp_path), *arguments]))


def people(tmp_path):
    path, words = tmp_path / "pairs.jsonl", ["red", "blue", "green", "black", "white"]
    rows = [
        {"prompt": f"say {a} {n % 9}:", "chosen": f" {a}", "rejected": f" {b}"}
        for n in range(12)
        for a, b in zip(words, words[1:] + words[:1], strict=True)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = Data(files=(path,), vocabulary=280, share=0.2, held_out=4, new=4)
    return {"data": data, "dpo": preferences(), "members": 2, "pretrain": Stage(2, 2, 1e-3, 1)}


def test_preferences_of_people_end_in_accuracies_and_a_win_rate(align_people, tmp_path, capsys):
    align_people.main(tiny(align_people, tmp_path, "people", **people(tmp_path)))
    said = capsys.readouterr().out
    assert "2 in one step" in said and "DPO's answers beat those before it" in said
    found = json.loads((tmp_path / "people" / "results.json").read_text())
    assert (tmp_path / "people" / "rewards.png").stat().st_size > 10_000
    assert len(found["members"]) == 2 and found["ensemble"].keys() == {"mean", "min", "uncertainty"}
    with pytest.raises(ValueError, match="holds no file"):
        align_people.main(tiny(align_people, tmp_path, "none"))


def test_problems_with_answers_are_learned_from_files(align_ppo, tmp_path, capsys):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"It is.\n#### {n}"} for n in range(40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = Data(files=(path,), vocabulary=270, share=0.2, held_out=4, new=4)
    config = tiny(
        align_ppo, tmp_path, "problems", data=data, rl=rl(iterations=1),
        pretrain=Stage(2, 2, 1e-3, 1),
    )  # fmt: skip
    align_ppo.main(config)
    assert "problems to train and" in capsys.readouterr().out


TINY_TRANSLATION = """--translate.model.width 16 --translate.model.heads 2
    --translate.model.hidden 32
    --translate.model.depth 1 --translate.vocabulary.size 300 --translate.data.batch 256
    --translate.data.buckets 2 --translate.train.steps 2 --translate.train.eval-every 2
    --translate.optimizer.warmup 1 --translate.decode.extra-length 4 --translate.device cpu
    --sentences 12 --samples 2 --held-out 2 --gap 0 --dpo.steps 4 --dpo.batch 4 --dpo.warmup 1
    --every 2 --temperature 2""".split()


def test_a_tuned_translator_goes_on_with_the_same_bits_and_is_left_for_use(
    tmp_path, monkeypatch, stop_at, capsys
):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    align_translation = load("align_translation")
    monkeypatch.setattr(align_translation.recipe, "draw", lambda *args: None)
    path = tmp_path / "pairs.tsv"
    words = ("red", "rosso"), ("black", "nero"), ("white", "bianco"), ("new", "nuovo")
    things = ("cat", "gatto"), ("dog", "cane"), ("hat", "cappello"), ("book", "libro")
    rows = [f"the {a} {b}\til {d} {c}" for a, c in words for b, d in things]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")

    def run(*args):
        place = ("--out", str(tmp_path), *args)
        align_translation.main(align_translation.command_line(place))

    given = (*TINY_TRANSLATION, "--translate.data.train", str(path))
    run(*given, "--name", "whole")
    assert "2 sentences, test: greedy BLEU" in capsys.readouterr().out
    stop_at("dpo", 3)
    with pytest.raises(SystemExit):
        run(*given, "--name", "stopped")
    said = capsys.readouterr()
    assert "align_translation.py --resume" in said.out + said.err
    run("--resume", "--name", "stopped")
    whole, stopped = (tmp_path / name for name in ("whole", "stopped"))
    assert state_of(whole / "dpo") == state_of(stopped / "dpo")
    assert (whole / "results.json").read_text() == (stopped / "results.json").read_text()
    own = configs.load(align_translation.recipe.Config, stopped / "tuned" / configs.FILE)
    assert align_translation.recipe.load_trained(own)[2].keys()
    with pytest.raises(ValueError, match=r"exists|not empty|holds"):
        run(*given, "--name", "whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but one trains and tunes"):
        run(*given, "--name", "many")
