"""What a run of several ranks refuses, it refuses in one line of rank 0, and every rank ends.

test_ranks.py runs the claims of TWO on two ranks; each gives the recipe its command line.
"""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from ranks import mesh
from test_pretrain import TINY, final_state, recipe
from torch.distributed.tensor import Replicate, Shard

from msfs_functional import agreement, checkpoint, meshes, sharding
from msfs_functional.models import pretrained

RUN = [*TINY, "--train.steps", 3, "--train.eval-every", 3, "--mesh.dp-shard", 1, "--mesh.tp", 2]


def out() -> Path:
    return Path(os.environ["CHECKPOINT_TEST"])


def refused(said: str, *args: object) -> None:
    """The command line ends every rank with code 2, and rank 0 alone says so, in one line."""
    stderr, code = io.StringIO(), None
    with contextlib.redirect_stderr(stderr):
        try:
            recipe(*args, "--out", out())
        except SystemExit as ended:
            code = ended.code
    told = [line for line in stderr.getvalue().splitlines() if not line.startswith("note: ")]
    codes, lines = zip(*agreement.from_all((code, told)), strict=True)
    assert codes == (2, 2), (codes, lines)
    assert len(lines[0]) == 1 and re.search(f"^error: .*{said}", lines[0][0]), lines
    assert lines[1] == [], lines


def command_lines_that_do_not_fit():
    meshes.join("cpu")
    for args, said in (
        ("--mesh.dp-shard 3", r"multiply to 3, but 2 processes run: .*start 3 processes"),
        (
            "--mesh.dp-shard 1 --mesh.tp 2 --model.kv-heads 1",
            r"tp \(2\) must divide kv_heads \(1\)",
        ),
        ("--mesh.tp 2 --data.length 201", r"must divide --data.length \(201\)"),
        ("--data.batch 500", "fewer than one batch of 500 x 200"),
        ("--vocabulary.kind bpe --model.vocab 300", r"more than the model's --model.vocab \(300\)"),
    ):
        refused(said, *TINY, *args.split())


def ranks_that_differ():
    rank = agreement.rank()
    refused(
        "learning_rate is 0.5 on rank 1, 0.25 on rank 0: start all processes with the same",
        *(*TINY, "--optimizer.learning-rate", (0.25, 0.5)[rank]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", f"9.{rank}")
        refused(
            "version.torch is '9.1' on rank 1, '9.0' on rank 0: .* the same installation", *TINY
        )


def a_run_of_parts_of_each_layer():
    recipe(*RUN, "--out", out(), "--name", "whole")


def checkpoints_that_do_not_fit():
    meshes.join("cpu")
    if agreement.rank() == 0:
        shutil.copytree(out() / "whole", out() / "lacking")
        next((out() / "lacking/checkpoints/step_00000003").glob("__1_*.distcp")).unlink()
    agreement.from_all(None)
    refused("__1_0.distcp is missing; no other one is good", "--resume", "--name", "lacking")
    other = ("--resume", "--name", "whole", "--model.width", 32)
    refused("is the checkpoint of another model", *other)


def rules_that_do_not_fit():
    on, shapes = mesh(dp_shard=2), {"a.weight": (4, 3), "a.bias": (4,)}
    for rules, said in (
        ([("weight", {})], "no rule matches parameter 'a.bias'"),
        ([("typo", {}), ("", {})], "rule 'typo' matches none of the 2 parameters"),
        ([("", {"pp": Shard(0)})], r"names the axis 'pp', but the mesh has \('tp', .*use one of"),
        ([("", {"dp_shard": Shard(1)})], r"'a.bias' cuts dim 1, but its shape is \(4,\): cut one"),
    ):
        with pytest.raises(ValueError, match=said):
            sharding.placements(rules, shapes, on)
    found = sharding.placements([("bias", {}), ("", {"dp_shard": Shard(-1)})], shapes, on)
    assert found == {"a.weight": (Shard(1),), "a.bias": (Replicate(),)}


# Stages: a run that succeeds ends its process group.
TWO = [rules_that_do_not_fit, command_lines_that_do_not_fit, ranks_that_differ]
RUNS = [a_run_of_parts_of_each_layer]
AFTER = [checkpoints_that_do_not_fit]


def exported_by_one(capsys) -> None:
    """The consolidated folder holds what two ranks have trained."""
    capsys.readouterr()
    recipe("export", "--out", out(), "--name", "whole")
    folder = out() / "whole/export"
    assert capsys.readouterr().out.endswith(f"tensors in {folder}\n")
    _, params, *_ = pretrained.load(folder)
    state = final_state(out() / "whole")
    assert checkpoint.verified(out() / "whole/checkpoints")[-1].step == 3
    assert all(torch.equal(value, state[f"params/{name}"]) for name, value in params.items())
