"""The sweep trains each variant by the recipe's own command line, and ends in one table."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = (
    "--model.width 12 --model.depth 1 --model.hidden 16 --vocabulary.size 300"
    " --train.steps 2 --train.eval-every 2 --train.valid-sentences 2 --data.batch 256"
    " --train.keep 3 --decode.extra-length 2 --device cpu --train.compile False"
)


def sweep(tmp_path: Path, *args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    script = str(ROOT / "recipes" / "sweep_translate.py")
    command = [sys.executable, script, "--data", str(tmp_path / "data"), *args]
    command += ["--out", str(tmp_path / "runs"), f"--options={TINY}"]
    return subprocess.run(
        command, env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=250
    )


def made_up_multi30k(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 40), ("val", 4), ("test_2016_flickr", 4)):
        for language, word in (("en", "dog"), ("de", "Hund")):
            lines = "".join(f"{word} {split} {n} {word * (n % 3)}\n" for n in range(count))
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))


def test_a_sweep_ends_in_one_table_and_names_the_trainings_that_failed(tmp_path: Path):
    made_up_multi30k(tmp_path / "data")
    ran = sweep(tmp_path, "--variants", "preset", "wide", "--jobs", "2")
    assert ran.returncode == 2 and "1 trainings failed" in ran.stderr
    assert "wide.log" in ran.stderr  # 8 heads do not divide a width of 12
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table in ran.stdout
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3  # ways to decode
    scores = [float(row.split("|")[3]) for row in rows]
    assert scores == sorted(scores, reverse=True)  # the validation set chooses


def test_a_folder_without_the_corpus_is_named(tmp_path: Path):
    (tmp_path / "data").mkdir()
    empty = sweep(tmp_path, "--variants", "tiny")
    assert empty.returncode == 2 and "has no train.en.gz" in empty.stderr
