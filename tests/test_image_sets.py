"""Pictures from zips, folders, idx files and tables; what cannot be read is left out and told."""

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from msfs_functional import image_sets

DATA = Path(os.environ.get("MSFS_DATA", "../shared/data"))


def png(shade: int, size: tuple[int, int] = (6, 6)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def test_classes_are_the_folders_in_a_zip_and_on_disk(tmp_path, capsys):
    files = {"train/dog/b.png": png(2), "train/cat/a.png": png(1), "train/readme.txt": b"hello"}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(content)
    zipped = image_sets.by_folder([tmp_path / "set.zip"], 6)
    found = image_sets.load(str(tmp_path / "set"), 6)
    assert zipped.classes == found.classes == ("cat", "dog")
    assert found.labels is not None and zipped.labels is not None
    assert found.labels.tolist() == zipped.labels.tolist() == [0, 1]
    assert torch.equal(zipped.pictures, found.pictures)
    assert found.pictures[:, 0, 0, 0].tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"classes \['dog'\] that are not among"):
        image_sets.by_folder([tmp_path / "set.zip"], 6, classes=["cat"])
    with zipfile.ZipFile(tmp_path / "set.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/b.png", b"no picture")
        archive.writestr("train/cat/c.png", bytes(500))
    whole = (tmp_path / "set.zip").read_bytes()
    where = whole.rindex(b"train/cat/c.png", 0, whole.index(b"PK\1\2")) + 15
    (tmp_path / "set.zip").write_bytes(whole[:where] + b"\xff" + whole[where + 1 :])
    capsys.readouterr()
    assert len(image_sets.by_folder([tmp_path / "set.zip"], 6)) == 2
    said = capsys.readouterr().err
    assert "2 images could not be read" in said and "set.zip:train/cat/c.png is no image" in said
    locked = bytearray(whole)
    locked[whole.index(b"PK\1\2") + 8] |= 1  # of the first picture: it is under a password
    (tmp_path / "set.zip").write_bytes(locked)
    assert len(image_sets.by_folder([tmp_path / "set.zip"], 6)) == 1
    assert "3 images could not be read" in capsys.readouterr().err


def test_captions_come_from_metadata_or_from_texts_beside_the_pictures(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i, (8, 6)))
    (tmp_path / "1.png").write_bytes(b"no picture")
    rows = [{"file_name": f"{i}.png", "text": f"picture  {i}"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = image_sets.folder(tmp_path, 4)
    assert found.captions == ("picture 0", "picture 2")
    assert found.pictures.shape == (2, 3, 4, 4) and found.pictures[1, 0, 0, 0] == 2
    said = capsys.readouterr().err
    assert "1 images could not be read" in said and "1.png" in said
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,caption\n2.png,two\n0.png,\n")
    assert image_sets.folder(tmp_path, 4).captions == ("two", "")
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "2.txt").write_text("two\n")
    assert image_sets.folder(tmp_path, 4).captions == ("", "two")
    (tmp_path / "2.txt").unlink()
    alone = image_sets.folder(tmp_path, 4, channels=1, limit=1)
    assert alone.captions is None and alone.labels is None and alone.pictures.shape == (1, 1, 4, 4)


def test_tables_have_captions_or_classes(capsys):
    rows = [{"bytes": png(i), "path": None} for i in range(3)]
    captions = [["one", "eins"], ["two"], []]
    data = datasets.Dataset.from_dict({"image": rows, "captions": captions, "label": [1, 0, 1]})
    data = data.cast_column("image", datasets.Image())
    found = image_sets.of_table(data, 4)
    assert found.captions == ("one", "two", "") and found.labels is None
    found = image_sets.of_table(data, 4, caption="label", limit=2)
    assert found.labels is not None and found.labels.tolist() == [1, 0]
    assert found.pictures[:, 0, 0, 0].tolist() == [0, 1]
    named = data.cast_column("label", datasets.ClassLabel(names=["cat", "dog"]))
    assert image_sets.of_table(named, 4, caption="label").classes == ("cat", "dog")
    with pytest.raises(ValueError, match=r"no column of captions or classes \('words'\)"):
        image_sets.of_table(data, 4, caption="words")
    with pytest.raises(ValueError, match="no column of images"):
        image_sets.of_table(data.remove_columns("image"), 4)
    alone = image_sets.of_table(data.remove_columns(["captions", "label"]), 4)
    assert alone.captions is None and alone.labels is None
    assert "pictures alone" in capsys.readouterr().err


def test_a_copy_of_a_hub_data_set_is_read_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"bytes": content, "path": None} for content in (png(1), b"no picture", png(3))]
    data = datasets.Dataset.from_dict({"image": rows, "text": ["one", "two", "three"]})
    data = data.cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    found = image_sets.load(str(tmp_path / "set"), 4)
    assert found.captions == ("one", "three") and found.pictures[:, 0, 0, 0].tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"set' \(config None, split 'test'\) cannot be loaded"):
        image_sets.load(str(tmp_path / "set"), 4, split="test")


def idx(values: np.ndarray) -> bytes:
    dims = np.array(values.shape, ">i4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + dims + values.astype(np.uint8).tobytes()


def test_mnist_is_read_from_idx_files_and_centred(tmp_path):
    pictures = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb") as file:
        file.write(idx(pictures))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([7, 3])))
    found = image_sets.load(f"mnist:{tmp_path}", 32)
    assert found.labels is not None and found.labels.tolist() == [7, 3]
    assert found.pictures.shape == (2, 1, 32, 32)
    assert torch.equal(found.pictures[:, 0, 2:30, 2:30], torch.from_numpy(pictures).byte())
    assert int(found.pictures.sum()) == pictures.sum()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([7, 3]))[:-1])
    with pytest.raises(ValueError, match="is no idx file of bytes, or it is cut off"):
        image_sets.mnist(tmp_path)
    with pytest.raises(ValueError, match="no t10k-images"):
        image_sets.mnist(tmp_path, "test")
    with pytest.raises(ValueError, match=r"size \(20\) must be at least 28"):
        image_sets.mnist(tmp_path, size=20)


@pytest.mark.skipif(not (DATA / "cifar10").exists(), reason="MSFS_DATA has no cifar10")
def test_cifar_10_as_it_is_laid_out():
    found = image_sets.load(f"cifar10:{DATA / 'cifar10'}", 32, split="test", limit=30)
    assert found.pictures.shape == (30, 3, 32, 32) and len(found.classes) == 10
    assert found.labels is not None  # evenly, though airplanes come first
    assert torch.equal(found.labels.bincount(), torch.full((10,), 3))


def test_places_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder /nowhere: check the path"):
        image_sets.load("/nowhere", 8)
    with pytest.raises(ValueError, match="holds no image that can be read"):
        image_sets.load(str(tmp_path), 8)
    with pytest.raises(ValueError, match=r"caption \(text\), split \(test\): .* leave it out"):
        image_sets.load(str(tmp_path), 8, caption="text", split="test")
    with pytest.raises(ValueError, match=r"config \(b\): mnist:.* has no such choice"):
        image_sets.load(f"mnist:{tmp_path}", 32, config="b")
    with pytest.raises(ValueError, match=r"no \*train\*.zip and no folder train"):
        image_sets.load(f"cifar10:{tmp_path}", 32)
    (tmp_path / "broken_train.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="cannot be read as a zip"):
        image_sets.load(f"cifar10:{tmp_path}", 32)
    with pytest.raises(ValueError, match=r"split \('valid'\)"):
        image_sets.cifar10(tmp_path, "valid")
