"""The sweep trains each variant by the recipe's own command line, and ends in one table."""

import gzip
import sys
from pathlib import Path

import pytest
import tyro

from msfs_functional import errors

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))
import sweep_translate  # noqa: E402

TINY = (
    "--model.width 12 --model.depth 1 --model.hidden 16 --vocabulary.size 300"
    " --train.steps 2 --train.eval-every 2 --train.valid-sentences 2 --data.batch 256"
    " --train.keep 3 --decode.extra-length 2 --device cpu --train.compile False"
)


def refused(capsys, tmp_path: Path, *args: str) -> tuple[str, str]:
    """What the sweep, which ends with an error, prints and says; its trainings are processes."""
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), *args]
    words.append(f"--options={TINY}")
    with pytest.raises(SystemExit) as ended:
        errors.run(sweep_translate.main, lambda: tyro.cli(sweep_translate.Config, args=words))
    assert ended.value.code == 2
    return capsys.readouterr()


def made_up_multi30k(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 40), ("val", 4), ("test_2016_flickr", 4)):
        for language, word in (("en", "dog"), ("de", "Hund")):
            lines = "".join(f"{word} {split} {n} {word * (n % 3)}\n" for n in range(count))
            (folder / f"{split}.{language}.gz").write_bytes(gzip.compress(lines.encode()))


def test_a_sweep_ends_in_one_table_and_names_the_trainings_that_failed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    made_up_multi30k(tmp_path / "data")
    out, err = refused(capsys, tmp_path, "--variants", "preset", "wide", "--jobs", "2")
    assert "1 trainings failed" in err
    assert "wide.log" in err  # 8 heads do not divide a width of 12
    table = (tmp_path / "runs" / "table.md").read_text()
    assert table in out
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 3  # ways to decode
    scores = [float(row.split("|")[3]) for row in rows]
    assert scores == sorted(scores, reverse=True)  # the validation set chooses


def test_a_folder_without_the_corpus_is_named(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    _, err = refused(capsys, tmp_path, "--variants", "tiny")
    assert "has no train.en.gz" in err
