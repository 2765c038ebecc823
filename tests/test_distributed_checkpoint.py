"""Checkpoints of several ranks: whole or not there, read by any other ranks, told when damaged.

test_ranks.py runs the claims of FOUR and TWO on as many ranks, one after another.
"""

import functools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from ranks import mesh
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from msfs_functional import agreement, checkpoint, optim, random, sharding
from msfs_functional.distributed_checkpoint import Reader, Writer, _metadata, load
from msfs_functional.gathering import gathered, sharded
from msfs_functional.layouts import DECODER
from msfs_functional.losses import cross_entropy
from msfs_functional.meshes import data_rank
from msfs_functional.models.decoder import DecoderConfig, decoder
from msfs_functional.train import init_state, make_step

# Sizes that two and four ranks do not divide.
CONFIG = DecoderConfig(29, width=18, depth=1, heads=2, head_dim=6, hidden=21, max_length=8)
OPTIMIZER = optim.adamw(1e-2, eps=1e-3)
STEPS, SAVED = 5, 3


def next_token(model, params, tokens, key):
    loss, count = cross_entropy(model.apply(params, tokens[:, :-1]), tokens[:, 1:])
    return loss / count, {"weight": count}


def run(on, start=0, state=None, stop=STEPS):
    """(state, losses) of the steps from start to stop; on one process if `on` is None."""
    model = decoder(CONFIG) if on is None else sharded(decoder(CONFIG), DECODER, on)
    loss_fn = functools.partial(next_token, model)
    loss_fn = loss_fn if on is None else gathered(loss_fn, model)
    i, n = (0, 1) if on is None else data_rank(on)
    step = make_step(loss_fn, OPTIMIZER, ema_decay=0.9, compile=False)
    state = state or init_state(model.init(0), OPTIMIZER, random.key(1), ema_decay=0.9)
    losses = []
    for seed in range(start, stop):
        tokens = torch.randint(0, 29, (8, 7), generator=torch.Generator().manual_seed(seed))
        state, metrics = step(state, tokens.chunk(n)[i])
        losses.append(float(metrics["loss"]))
    return state, losses


def fresh(on, seed=7):
    """A state to load into, which holds other numbers."""
    model = decoder(CONFIG) if on is None else sharded(decoder(CONFIG), DECODER, on)
    return init_state(model.init(seed), OPTIMIZER, random.key(3), ema_decay=0.9)


def place() -> Path:
    return Path(os.environ["CHECKPOINT_TEST"])


def saved_while_training_goes_on():
    """tp 2 x dp 2; the copy is of step 3, though steps 4 and 5 write in place meanwhile."""
    on = mesh(tp=2, dp_shard=2)
    with Writer(place() / "root", keep_last=2) as writer:
        state, before = run(on, stop=SAVED)
        for step in (1, 2, SAVED):
            extra, files = {"step": step}, {"a.txt": str(step)}
            writer.save(step, state, extra=extra, files=files, metric=float(step))
        state, losses = run(on, SAVED, state)
    whole = {name: value.tolist() for name, value in sharding.gather(state.params).items()}
    if agreement.rank() == 0:
        (place() / "went_on.json").write_text(json.dumps([before + losses, whole]))


def resumed(on, exact=False):
    losses, params = json.loads((place() / "went_on.json").read_text())
    found = load(place() / "root", fresh(on))
    assert (found.step, found.extra, found.files) == (SAVED, {"step": SAVED}, {"a.txt": b"3"})
    state, own = run(on, SAVED, found.state)
    close = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(own, losses[SAVED:], **close)
    for name, value in sharding.gather(state.params).items():
        torch.testing.assert_close(value, torch.tensor(params[name]), **close)


def resumed_with_the_same_degrees_bit_for_bit():
    resumed(mesh(tp=2, dp_shard=2), exact=True)


def resumed_with_other_degrees():
    for given in ({"dp_shard": 4}, {"dp_replicate": 2, "tp": 2}):
        resumed(mesh(**given))


def resumed_on_two_ranks():
    for given in ({"dp_shard": 2}, {"tp": 2}):
        resumed(mesh(**given))


def told_on_every_rank():
    on, rank = mesh(dp_shard=2), agreement.rank()
    if rank == 0:
        shutil.copytree(place() / "root", place() / "damaged")
        newest = place() / f"damaged/step_{SAVED:08d}"
        (newest / "__3_0.distcp").unlink()
    agreement.from_all(None)
    with pytest.raises(ValueError, match=r"__3_0.distcp is missing; .*last good .*step_00000002"):
        load(place() / "damaged", fresh(on))
    other = sharded(decoder(DecoderConfig(29, width=18, depth=1, heads=3)), DECODER, on)
    with pytest.raises(ValueError, match="is the checkpoint of another model"):
        load(place() / "root", {"params": other.init(0)}, partial=True)
    with pytest.raises(FileNotFoundError if rank == 0 else ValueError, match="no checkpoint in"):
        load(place() / "nowhere", fresh(on))
    with pytest.raises(ValueError, match="step is 1 on rank 1, 0 on rank 0"):
        agreement.start_alike({"configuration": {"step": rank}})
    with pytest.raises(ValueError, match="mine" if rank else "rank 1: mine"):
        with agreement.together():
            if rank:
                raise ValueError("mine")
    assert agreement.highest(15 * rank) == 15
    with pytest.raises(SystemExit if rank else ValueError, match="2" if rank else "of all"):
        with agreement.said_once():
            raise ValueError("of all")


def a_failing_disk_is_told_and_harms_nothing():
    """One rank cannot write: no rank waits, and what was there is there."""
    on = mesh(dp_shard=2)
    state = fresh(on)
    root = place() / "full"
    writer = Writer(root)
    writer.save(1, state)
    writer.wait()
    with pytest.MonkeyPatch.context() as patch:
        if agreement.rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", no_space)
        writer.save(2, state)
        with pytest.raises(OSError, match=r"No space left on device; the previous .*step_00000001"):
            writer.wait()
    assert [c.step for c in checkpoint.verified(root)] == [1]
    writer.save(3, state)
    writer.wait()
    assert [c.step for c in checkpoint.verified(root)] == [1, 3]


def no_space(*args):
    raise OSError(28, "No space left on device")


FOUR = [
    saved_while_training_goes_on,
    resumed_with_the_same_degrees_bit_for_bit,
    resumed_with_other_degrees,
]
TWO = [resumed_on_two_ranks, told_on_every_rank, a_failing_disk_is_told_and_harms_nothing]


def resumed_on_one():
    assert [c.step for c in checkpoint.verified(place() / "root")] == [2, SAVED]
    resumed(None)
    _, losses = run(None)
    torch.testing.assert_close(losses, json.loads((place() / "went_on.json").read_text())[0])


# One process.


STATE = {"a": torch.arange(6.0).reshape(3, 2), "b": (torch.tensor(2), torch.zeros(0, 2))}


def test_what_was_saved_comes_back(tmp_path):
    with Writer(tmp_path, keep_last=1, keep_best=1) as writer:
        for step, metric in ((1, 0.5), (2, 0.9), (3, 0.1), (4, 0.2)):
            writer.save(step, STATE, metric=metric)
    assert [c.step for c in checkpoint.verified(tmp_path)] == [2, 4]
    like = {"a": torch.Size((3, 2)), "b": (torch.tensor(0), torch.ones(0, 2))}
    found = load(tmp_path, like, which="best")
    assert found.step == 2 and torch.equal(found.state["a"], STATE["a"])
    assert found.state["b"][0] == 2


def test_a_save_that_was_cut_short_is_not_there_and_is_cleared_away(tmp_path, monkeypatch):
    with Writer(tmp_path) as writer:
        writer.save(1, STATE)
    monkeypatch.setattr(Writer, "_publish", lambda *args: no_space())
    cut = Writer(tmp_path)
    cut.save(2, STATE)
    with pytest.raises(OSError, match="No space left"):
        cut.wait()
    assert (tmp_path / ".step_00000002.parts").exists()
    assert load(tmp_path).step == 1 and [c.step for c in checkpoint.checkpoints(tmp_path)] == [1]
    Writer(tmp_path)
    assert not (tmp_path / ".step_00000002.parts").exists()


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "meta.json"])
def test_an_altered_file_is_told(tmp_path, name):
    with Writer(tmp_path) as writer:
        writer.save(1, STATE)
    path = tmp_path / "step_00000001" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is altered: its sha256.*; no other one is good"):
        load(tmp_path, STATE)


def test_nothing_is_unpickled_but_records(tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for harm in (Harm(), torch.nn.Linear, checkpoint.load):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(harm))
        with pytest.raises(ValueError, match="no checkpoint's metadata"):
            Reader(tmp_path).read_metadata()
    assert not (tmp_path / "harm").exists()
    with Writer(tmp_path) as writer:
        writer.save(1, STATE)
    assert set(_metadata(tmp_path / "step_00000001").state_dict_metadata) == {"a", "b/0", "b/1"}


def test_bad_arguments_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"keep_last \(0\) must be at least 1"):
        Writer(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match=r"leaf 'a' is a float: .* tensors only"):
        Writer(tmp_path).save(1, {"a": 1.0})
    with pytest.raises(ValueError, match="extra must be JSON"):
        Writer(tmp_path).save(1, STATE, extra={"a": object()})
