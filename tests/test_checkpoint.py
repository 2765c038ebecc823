"""Claims of msfs_functional.checkpoint: bit-exact, complete or absent, whatever dies and when."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from msfs_functional import checkpoint, durable

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


class Moments(NamedTuple):
    mu: dict[str, Tensor]
    count: Tensor


def state_of(step: int) -> dict[str, Any]:
    """A small training state that is a function of the step alone."""
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "params": {"layer.0.weight": weight, "layer.0.bias": weight[0].to(torch.bfloat16)},
        "opt_state": (Moments({"layer.0.weight": weight**2}, torch.tensor(step)), None),
        "key": torch.tensor([step, 2**40 + step]),
        "words": ["epoch", step, step / 3, True],
    }


def as_bytes(tensor: Tensor) -> bytes:
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(left: Any, right: Any) -> None:
    assert optree.tree_structure(left) == optree.tree_structure(right)
    for a, b in zip(optree.tree_leaves(left), optree.tree_leaves(right), strict=True):
        assert type(a) is type(b)
        if isinstance(a, Tensor):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert as_bytes(a) == as_bytes(b)
        else:
            assert a == b


def steps_of(root: Path) -> list[int]:
    return sorted(one.step for one in checkpoint.checkpoints(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def test_every_part_comes_back_as_it_was(root: Path) -> None:
    extra = {"config": {"width": 8, "name": "è"}, "data": {"epoch": 1, "position": 2**60}}
    files = {"tokenizer.json": '{"ü": 1}', "raw.bin": b"\x00\xff"}
    path = checkpoint.save(root, 7, state_of(7), extra=extra, files=files, metric=1 / 3)
    assert path == root / "step_00000007"
    restored = checkpoint.load(root, state_of(0))
    assert_same(restored.state, state_of(7))
    assert restored.extra == extra
    assert restored.files == {"tokenizer.json": '{"ü": 1}'.encode(), "raw.bin": b"\x00\xff"}
    assert (restored.step, restored.metric, restored.path) == (7, 1 / 3, path)


@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "transposed", "strided", "expanded"]),
)
@settings(max_examples=25)
def test_tensors_are_bit_exact_for_every_dtype_shape_and_stride(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], dtype: torch.dtype, layout: str
) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    tensor = (torch.randn(shape, generator=generator) * 100).to(dtype)
    if layout == "transposed":
        tensor = tensor.mT if tensor.ndim >= 2 else tensor
    elif layout == "strided":
        tensor = tensor[..., ::2] if tensor.ndim else tensor
    elif layout == "expanded":
        tensor = tensor.unsqueeze(0).expand(3, *shape)
    root = tmp_path_factory.mktemp("dtypes")
    checkpoint.save(root, 0, tensor)
    restored = checkpoint.load(root, tensor).state
    assert_same(restored, tensor)
    if layout in ("plain", "transposed"):
        assert restored.stride() == tensor.stride()


def test_special_values_keep_their_bits(root: Path) -> None:
    state = {
        "nan": torch.tensor([0x7FC00001, -1, 1], dtype=torch.int32).view(torch.float32),
        "zero": torch.tensor([-0.0, torch.inf]),
        "lazy": torch.ones(2, dtype=torch.complex64).mul(1j).conj(),
        "float": [float("inf"), -0.0, 1e-323],
        "int": 2**80,
    }
    checkpoint.save(root, 0, state)
    restored = checkpoint.load(root, state).state
    state["lazy"] = state["lazy"].resolve_conj()
    assert_same(restored, state)


def test_leaves_that_share_memory_are_saved_each(root: Path) -> None:
    weight = torch.arange(6.0)
    state = {"tied": weight, "again": weight, "view": weight[2:4], "row": weight.view(2, 3)[1]}
    checkpoint.save(root, 0, state)
    restored = checkpoint.load(root, state).state
    assert_same(restored, state)
    restored["tied"].zero_()
    assert_same(restored["again"], weight)


def test_restored_tensors_own_their_memory_and_need_no_gradient(root: Path) -> None:
    state = {"a": torch.randn(5, requires_grad=True), "b": torch.nn.Parameter(torch.randn(3))}
    path = checkpoint.save(root, 0, state)
    restored = checkpoint.load(root, state).state
    for file in path.iterdir():
        file.write_bytes(b"")
    assert not any(leaf.requires_grad for leaf in restored.values())
    assert_same(restored["a"], state["a"].detach())
    assert all(leaf.untyped_storage().nbytes() == leaf.nbytes for leaf in restored.values())


def test_like_may_be_on_the_meta_device_or_bare_shapes(root: Path) -> None:
    state = {"a": torch.randn(2, 3), "b": torch.randn(4).to(torch.bfloat16)}
    checkpoint.save(root, 0, state)
    meta = {name: torch.empty_like(leaf, device="meta") for name, leaf in state.items()}
    assert_same(checkpoint.load(root, meta).state, state)
    assert_same(checkpoint.load(root, {n: t.shape for n, t in state.items()}).state, state)
    moved = checkpoint.load(root, state, device="meta").state
    assert all(leaf.is_meta for leaf in moved.values())


def test_words_and_files_can_be_read_before_there_is_a_model(root: Path) -> None:
    checkpoint.save(root, 3, state_of(3), extra={"width": 8}, files={"a.txt": "x"})
    restored = checkpoint.load(root)
    assert (restored.state, restored.extra, restored.files) == (None, {"width": 8}, {"a.txt": b"x"})


def test_part_of_a_state_can_be_loaded_alone(root: Path) -> None:
    checkpoint.save(root, 3, state_of(3))
    like = {"params": state_of(0)["params"]}
    assert_same(checkpoint.load(root, like, partial=True).state, {"params": state_of(3)["params"]})
    with pytest.raises(ValueError, match="only in the checkpoint"):
        checkpoint.load(root, like)


def test_leaves_are_named_by_their_path() -> None:
    assert list(checkpoint.named_leaves(state_of(1))) == [
        "key",
        "opt_state/0/mu/layer.0.weight",
        "opt_state/0/count",
        "params/layer.0.bias",
        "params/layer.0.weight",
        *(f"words/{index}" for index in range(4)),
    ]
    with pytest.raises(ValueError, match="'a/b' is taken"):
        checkpoint.named_leaves({"a": {"b": 1}, "a/b": 2})


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"x": object()}, "'x' is a object"),
        ({"x": torch.zeros(2, device="meta")}, "'x' is a Tensor of layout .* on meta"),
        ({"x": torch.eye(2).to_sparse()}, "'x' is a Tensor of layout torch.sparse_coo"),
        ({"x": torch.zeros(1, dtype=torch.complex128)}, "'x' is complex128"),
    ],
)
def test_what_cannot_be_kept_raises_before_anything_is_written(
    root: Path, state: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoint.save(root, 0, state)
    assert not root.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra": {"a": {1: 2}}}, "key 1: JSON keys must be strings"),
        ({"extra": {"a": {1, 2}}}, "must be JSON"),
        ({"files": {"../x": ""}}, "must be plain"),
        ({"files": {"meta.json": ""}}, "not one of our own"),
        ({"keep_last": 0}, r"keep_last \(0\) >= 1"),
        ({"keep_best": -1}, r"keep_best \(-1\) must be >= 0"),
        ({"step": -1}, r"step \(-1\)"),
    ],
)
def test_bad_arguments_raise_with_value_and_rule(
    root: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        checkpoint.save(root, **{"step": 0, "state": {}, **options})
    assert not root.exists()


def test_the_last_n_and_the_best_k_stay(root: Path) -> None:
    scores = [3.0, 9.0, 1.0, 8.0, float("nan"), 2.0, 4.0]
    for step, score in enumerate(scores):
        checkpoint.save(
            root, step, {"x": torch.tensor(step)}, metric=score, keep_last=2, keep_best=2
        )
    assert steps_of(root) == [1, 3, 5, 6]
    assert checkpoint.load(root, {"x": torch.tensor(0)}, which="best").step == 1
    assert checkpoint.load(root, {"x": torch.tensor(0)}).step == 6
    assert checkpoint.load(root, {"x": torch.tensor(0)}, which=3).step == 3


def test_lower_can_be_better(root: Path) -> None:
    for step, loss in enumerate([3.0, 0.5, float("nan"), 2.0]):
        checkpoint.save(root, step, {}, metric=loss, keep_last=1, higher_is_better=False)
    assert steps_of(root) == [1, 3]
    assert checkpoint.load(root, which="best").step == 1


def test_a_run_that_went_back_keeps_what_it_writes(root: Path) -> None:
    """The latest is the last one written, not the one of the highest step."""
    for step in (100, 200, 300):
        checkpoint.save(root, step, state_of(step))
    checkpoint.save(root, 150, state_of(150), keep_last=1)
    assert steps_of(root) == [150]
    for step in (160, 140):
        checkpoint.save(root, step, state_of(step), keep_last=2)
    assert checkpoint.load(root).step == 140
    assert steps_of(root) == [140, 160]


def test_saving_a_step_again_replaces_it(root: Path) -> None:
    checkpoint.save(root, 5, state_of(1))
    checkpoint.save(root, 5, state_of(2))
    assert_same(checkpoint.load(root, state_of(0)).state, state_of(2))
    assert steps_of(root) == [5]


def test_missing_checkpoints_are_named(root: Path) -> None:
    assert checkpoint.checkpoints(root) == []
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.load(root)
    checkpoint.save(root, 5, {})
    with pytest.raises(ValueError, match=r"no checkpoint of step 4 .* there are 5"):
        checkpoint.load(root, which=4)
    with pytest.raises(ValueError, match="carries a metric"):
        checkpoint.load(root, which="best")


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "manifest.json", "t.txt"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "gone", "empty"])
def test_a_damaged_file_is_named_and_the_previous_good_checkpoint_offered(
    root: Path, name: str, damage: str
) -> None:
    for step in (1, 2, 3):
        path = checkpoint.save(root, step, state_of(step), files={"t.txt": "words"})
    (root / "step_00000002" / "meta.json").write_text("{}")
    data = (path / name).read_bytes()
    if damage == "gone":
        (path / name).unlink()
    else:
        middle = len(data) // 2
        changed = data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
        (path / name).write_bytes(
            {"truncated": data[:-1], "altered": changed, "empty": b""}[damage]
        )
    with pytest.raises(ValueError, match=rf"{path / name} is .*step_00000001: load .*which=1"):
        checkpoint.load(root, state_of(0))
    with pytest.raises(ValueError, match="step_00000001"):
        checkpoint.load(path, state_of(0))
    assert [one.step for one in checkpoint.verified(root)] == [1]
    assert_same(checkpoint.load(root, state_of(0), which=1).state, state_of(1))


@given(data=st.data())
@settings(max_examples=30)
def test_any_changed_byte_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("flip")
    path = checkpoint.save(root, 1, state_of(1), extra={"a": 1.5})
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    try:
        restored = checkpoint.load(root, state_of(0))
    except ValueError as error:
        assert str(file) in str(error)
    else:  # one white space for another in the manifest
        assert file.name == "manifest.json"
        assert_same(restored.state, state_of(1))


def test_the_best_is_not_guessed_when_a_manifest_is_damaged(root: Path) -> None:
    for step, score in ((1, 9.0), (2, 3.0)):
        checkpoint.save(root, step, {}, metric=score)
    (root / "step_00000001" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"step_00000001/manifest.json is truncated .*which=2"):
        checkpoint.load(root, which="best")
    assert checkpoint.load(root).step == 2


def test_the_only_checkpoint_damaged_says_so(root: Path) -> None:
    path = checkpoint.save(root, 1, state_of(1))
    (path / "meta.json").write_text("")
    with pytest.raises(ValueError, match=r"no other checkpoint in .* is good"):
        checkpoint.load(root)


def test_a_manifest_cannot_point_outside(root: Path) -> None:
    path = checkpoint.save(root, 1, state_of(1))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../secret"] = {"bytes": 0, "sha256": ""}
    del manifest["sha256"]
    manifest["sha256"] = durable._seal(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="outside of its directory"):
        checkpoint.load(path)


def test_a_checkpoint_of_another_model_names_the_first_leaves_that_differ(root: Path) -> None:
    checkpoint.save(root, 1, {"a": torch.zeros(2, 3), "b": torch.zeros(2), "c": 1, "old": 2.0})
    like = {"a": torch.zeros(2, 4), "b": torch.zeros(2).bfloat16(), "c": torch.zeros(1), "new": 0}
    with pytest.raises(ValueError) as caught:
        checkpoint.load(root, like)
    text = str(caught.value)
    for words in (
        "step_00000001 is the checkpoint of another model",
        "1 not in the checkpoint: 'new'",
        "1 only in the checkpoint: 'old'",
        "3 of another shape or dtype",
        "'a' is float32 (2, 3) in the checkpoint, float32 (2, 4) here",
        "'b' is float32 (2,) in the checkpoint, bfloat16 (2,) here",
        "'c' is int in the checkpoint, float32 (1,) here",
        "build the model with the configuration it was saved with",
    ):
        assert words in text
    with pytest.raises(ValueError, match=r"'a' is float32 \(2, 3\) .*, shape \(5,\) here"):
        checkpoint.load(root, {"a": torch.Size([5])}, partial=True)


def test_nothing_is_ever_unpickled(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = pickle.dumps(print)
    checkpoint.save(root, 1, state_of(1), files={"x.pkl": bomb})

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert checkpoint.load(root, state_of(0)).files == {"x.pkl": bomb}


def test_two_writers_take_turns(root: Path) -> None:
    """No writer takes another one's half-written directory for that of a dead one."""

    def write(first: int) -> None:
        for step in range(first, 20, 2):
            checkpoint.save(root, step, state_of(step), keep_last=100)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.step for one in checkpoint.verified(root)] != []
    assert steps_of(root) == list(range(20))


def test_what_dead_writers_left_is_cleared_and_what_they_set_aside_comes_back(root: Path) -> None:
    checkpoint.save(root, 1, state_of(1))
    (root / "step_00000001").rename(root / ".step_00000001.replaced")
    for name in (".step_00000002.writing", ".step_00000000.deleted"):
        (root / name).mkdir()
        (root / name / "state.safetensors").write_bytes(b"half")
    assert_same(checkpoint.load(root, state_of(0)).state, state_of(1))  # a reader clears nothing
    checkpoint.save(root, 3, state_of(3))
    assert sorted(path.name for path in root.iterdir()) == [
        ".lock",
        "step_00000001",
        "step_00000003",
    ]
    assert [one.step for one in checkpoint.verified(root)] == [1, 3]


@pytest.mark.parametrize("failing", ["fsync", "write", "rename", "save_file"])
def test_a_failing_disk_leaves_the_previous_checkpoint_and_one_clear_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Whichever call fails first: the first one, the second, the third, ..."""
    checkpoint.save(root, 1, state_of(1))
    owner, name = {
        "fsync": (os, "fsync"),
        "write": (Path, "write_bytes"),
        "rename": (Path, "rename"),
        "save_file": (checkpoint, "save_file"),
    }[failing]
    real = getattr(owner, name)
    for allowed in range(20):
        calls = 0

        def limited(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > allowed:  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, limited)
            try:
                checkpoint.save(root, 2, state_of(2), keep_last=1, files={"a.txt": "b"})
            except OSError as error:
                assert error.errno == errno.ENOSPC
                for words in ("No space left", "step_00000001 is untouched", "free some space"):
                    assert words in str(error)
            else:
                break
        assert_same(checkpoint.load(root, state_of(0), which=1).state, state_of(1))
    assert allowed == {"fsync": 7, "write": 2, "rename": 3, "save_file": 1}[failing]
    assert steps_of(root) == [2]
    assert {path.name for path in root.iterdir()} == {".lock", "step_00000002"}


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from msfs_functional import checkpoint
root, limit = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.save(root, 1, {"x": torch.ones(1000)})
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save(root, 2, {"x": torch.ones(1_000_000)})
except OSError as error:
    print(error.errno, error)
assert torch.equal(checkpoint.load(root, {"x": torch.zeros(1000)}).state["x"], torch.ones(1000))
checkpoint.save(root, 3, {"x": torch.ones(1000)})
print([one.step for one in checkpoint.verified(root)], sorted(p.name for p in root.iterdir()))
"""


def python(*command: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*prefix, sys.executable, "-c", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_file_size_limit_is_one_clear_error(root: Path) -> None:
    result = python(FULL_DISK, str(root), "1000000")
    assert result.returncode == 0, result.stderr
    error, listing = result.stdout.splitlines()
    assert error.startswith(f"{errno.EFBIG} ")
    assert "step_00000001 is untouched" in error
    assert listing == "[1, 3] ['.lock', 'step_00000001', 'step_00000003']"


def test_a_really_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}"
    private = ("unshare", "--mount", "sh", "-c")
    if subprocess.run([*private, mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    result = python(
        FULL_DISK, str(tmp_path / "run"), "0", prefix=(*private, f'{mount} && exec "$@"', "sh")
    )
    assert result.returncode == 0, result.stderr
    error, listing = result.stdout.splitlines()
    assert error.startswith(f"{errno.ENOSPC} ")
    assert "No space left on device" in error
    assert "step_00000001 is untouched" in error
    assert listing == "[1, 3] ['.lock', 'step_00000001', 'step_00000003']"


DYING_WRITER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from test_checkpoint import assert_same, state_of
from msfs_functional import checkpoint
torch.set_num_threads(1)
mode, root = sys.argv[1], Path(sys.argv[2])

def die_in_child(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child

def at_each_file_operation():
    '''Save step 2 again and again, killed at the first, second, ... file operation of the save.'''
    killed = 0
    for target in (2, 1):  # a new step that drives the old one out; a step that is replaced
        for last in range(1, 1000):
            checkpoint.save(root, 1, state_of(1), keep_last=1)
            def work():
                seen = 0
                def hook(event, args):
                    nonlocal seen
                    if event == "open" or event.startswith(("os.", "shutil.")):
                        seen += 1
                        if seen == last:
                            os.kill(os.getpid(), signal.SIGKILL)
                sys.addaudithook(hook)
                checkpoint.save(root, target, state_of(9), keep_last=1)
            status = os.waitpid(die_in_child(work), 0)[1]
            restored = checkpoint.load(root, state_of(0))
            came = int(restored.state["key"][0])
            assert came in (1, 9)
            assert_same(restored.state, state_of(came))
            if not os.WIFSIGNALED(status):
                assert (status, came) == (0, 9)
                break
            killed += 1
    print(killed)

def at_random_moments(rounds):
    '''Rapid saves, each process killed at a random moment, the next one goes on from there.'''
    draw = random.Random(0)
    furthest, seconds = 0, 0.01
    for _ in range(rounds):
        reports, report = os.pipe()
        def work():
            step = furthest
            while True:
                step += 1
                os.write(report, b".")
                checkpoint.save(root, step, state_of(step), keep_last=2, metric=step % 5)
        child = die_in_child(work)
        finished = draw.randrange(3)
        os.read(reports, 1)
        start = time.perf_counter()
        for _ in range(finished):
            os.read(reports, 1)
        if finished:
            seconds = (time.perf_counter() - start) / finished
        time.sleep(draw.uniform(0.0, 1.2 * seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reports), os.close(report)
        if not checkpoint.checkpoints(root):
            assert finished == furthest == 0
            continue
        restored = checkpoint.load(root, state_of(0))
        assert restored.step >= furthest + finished, (restored.step, furthest, finished)
        assert_same(restored.state, state_of(restored.step))
        assert len(checkpoint.verified(root)) == len(checkpoint.checkpoints(root)) <= 4
        furthest = restored.step
    print(furthest)

at_each_file_operation() if mode == "each" else at_random_moments(int(sys.argv[3]))
"""


def test_a_kill_at_any_file_operation_of_a_save_loses_nothing(root: Path) -> None:
    result = python(DYING_WRITER, "each", str(root))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


def test_kills_at_random_moments_always_leave_a_bit_exact_state(root: Path) -> None:
    result = python(DYING_WRITER, "random", str(root), "40")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back_to_where_like_is(root: Path) -> None:
    state = {"a": torch.randn(3, 5, device="cuda").mT, "b": torch.ones(2, device="cuda").bfloat16()}
    checkpoint.save(root, 1, state)
    on_gpu = checkpoint.load(root, state).state
    assert all(leaf.is_cuda for leaf in on_gpu.values())
    assert on_gpu["a"].stride() == state["a"].stride()
    on_cpu = checkpoint.load(root, state, device="cpu").state
    for name, leaf in state.items():
        assert torch.equal(on_gpu[name], leaf)
        assert_same(on_cpu[name], leaf.cpu())
