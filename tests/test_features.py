"""Extractors: the published ResNet scores what it should, a trained one tells its classes apart."""

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from msfs_functional import features, image_sets
from msfs_functional.fidelity import features_of, frechet_distance
from msfs_functional.models import cifar_resnet
from msfs_functional.models.weight_files import read_tensors
from msfs_functional.synthetic import shapes

DATA = Path(os.environ.get("MSFS_DATA", "../shared/data"))
RESNET = DATA / "weights" / "resnet_cifar10" / "resnet20-12fca82f.th"
needs_data = pytest.mark.skipif(not RESNET.exists(), reason="MSFS_DATA has no resnet_cifar10")


@needs_data
@pytest.mark.skipif(not (DATA / "cifar10").exists(), reason="MSFS_DATA has no cifar10")
def test_resnet_20_classifies_test_pictures_as_well_as_published():
    data = image_sets.cifar10(DATA / "cifar10", "test", limit=None)
    params = cifar_resnet.load(RESNET)
    rows = torch.arange(0, len(data), 25)  # 400, of all classes
    assert data.labels is not None
    with torch.no_grad():
        right = cifar_resnet.logits(params, data.pictures[rows]).argmax(1) == data.labels[rows]
    assert float(right.float().mean()) == pytest.approx(0.9173, abs=0.04)  # 3 standard deviations


def pictures_and_words(count: int):
    scenes = shapes.scenes(0, count)
    pictures = torch.from_numpy(np.stack([shapes.render(scene) for scene in scenes]))
    return pictures.permute(0, 3, 1, 2), features.words_of([shapes.caption(s) for s in scenes])


def test_a_trained_extractor_measures_how_far_pictures_are_spoilt():
    pictures, words = pictures_and_words(200)
    extractor, again = (
        features.trained(pictures, words, "words of the captions", steps=20, batch=8) for _ in "ab"
    )
    assert "64 features of a classifier of" in extractor.name and "20 steps" in extractor.name
    real = features_of(pictures[:100], extractor.feature_fn)
    assert real.shape == (100, 64)
    assert torch.equal(real, features_of(pictures[:100], again.feature_fn))
    noise = torch.randint(-120, 120, pictures.shape, generator=torch.Generator().manual_seed(0))
    spoilt = (pictures + noise).clamp(0, 255).to(torch.uint8)

    def far(rows: torch.Tensor) -> float:
        return frechet_distance(real, features_of(rows, extractor.feature_fn))

    assert far(pictures[100:]) < far(spoilt[100:]) < far(noise[100:].byte())


def test_words_are_those_that_tell_captions_apart_commonest_first():
    words = features.words_of(["a red dog", "a red cat", "a dog"])
    assert words.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]  # dog, red, cat; all hold "a"
    assert features.words_of(["a red dog", "a red cat", "a dog"], most=1).shape == (3, 1)


def test_bad_targets_and_weights_are_refused(tmp_path):
    pictures = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="one row for each picture"):
        features.trained(pictures, torch.zeros(3, 2), "classes")
    with pytest.raises(ValueError, match="must differ"):
        features.trained(pictures, torch.ones(4, 2), "classes")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.th")
    with pytest.raises(ValueError, match="a ResNet for CIFAR"):
        features.cifar_resnet(tmp_path / "other.th")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [False, True])
def test_damaged_weights_are_refused_in_a_line_or_read_as_tensors(tmp_path, zipped):
    path, draw = tmp_path / "damaged.ckpt", random.Random(0)
    content = {"state_dict": {"a": torch.ones(3)}, "step": [1, 2.0, "x"]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            assert all(isinstance(x, torch.Tensor) for x in read_tensors(path).values())
        except ValueError as error:
            refused += 1
            assert "damaged.ckpt" in str(error) and "\n" not in str(error)
    assert refused > 50


def test_without_its_packages_inception_says_what_to_install(monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        features.inception()


# torch-fidelity's interface; like it, this unpickles whatever it is given.
PACKAGE = """
import torch
class FeatureExtractorInceptionV3(torch.nn.Module):
    def __init__(self, name, features, path):
        super().__init__()
        self.weight = torch.load(path, weights_only=False)["weight"]
    def forward(self, x):
        return (x.float().mean((2, 3)) * self.weight,)
"""


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_weights_of_inception_are_not_unpickled(tmp_path, monkeypatch, capsys):
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "feature_extractor_inceptionv3.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)  # so that none stays there afterwards
        del sys.modules[name]
    torch.save({"weight": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "good.pth")
    extractor = features.inception(tmp_path / "good.pth")
    grey = torch.full((2, 1, 4, 4), 5, dtype=torch.uint8)
    assert extractor.feature_fn(grey).tolist() == [[5.0, 10.0, 15.0]] * 2
    torch.save({"weight": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="nothing else is unpickled"):
        features.inception(tmp_path / "bad.pth")
    assert "unpickled" not in capsys.readouterr().out
