"""LPIPS from a file: the names that are known, the formula written out, gradients, bad input."""

import pytest
import torch

from msfs_functional import perceptual, random
from msfs_functional.perceptual import LEVELS, WIDTHS


def weights(names: str) -> dict[str, torch.Tensor]:
    """A VGG-16 of small numbers, named as torchvision or as the lpips package does."""
    found, before, key = {}, 3, random.key(0)
    for i, (level, width) in enumerate(zip(LEVELS, WIDTHS, strict=True)):
        for place in level:
            stem = f"features.{place}" if names == "torchvision" else f"net.slice{i + 1}.{place}"
            shape = (width, before, 3, 3)
            scale = (2 / (9 * before)) ** 0.5
            found[f"{stem}.weight"] = scale * random.normal(random.fold_in(key, place), shape)
            found[f"{stem}.bias"] = torch.full((width,), 0.01)
            before = width
        lin = random.uniform(random.fold_in(key, 100 + i), (1, width, 1, 1))
        found[f"lin{i}.model.1.weight"] = lin
    return found


@pytest.fixture(scope="module")
def params(tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips.pth"
    torch.save(weights("lpips"), path)
    return perceptual.load(path)


def test_two_files_with_torchvisions_names_are_the_same_as_one(params, tmp_path):
    both = weights("torchvision")
    torch.save({n: x for n, x in both.items() if "lin" in n}, tmp_path / "lin.pth")
    torch.save({n: x for n, x in both.items() if "lin" not in n}, tmp_path / "vgg.pth")
    found = perceptual.load(tmp_path / "vgg.pth", tmp_path / "lin.pth")
    assert found.keys() == params.keys() and len(found) == 26 + 5
    assert all(torch.equal(found[name], params[name]) for name in found)
    with pytest.raises(ValueError, match=r"level0 must be \(64,\), got nothing"):
        perceptual.load(tmp_path / "vgg.pth")


def test_distance_is_the_papers_formula_and_its_gradient_pulls_pictures_together(params):
    image, other = random.uniform(random.key(1), (2, 2, 3, 16, 16)) * 2 - 1
    expected = torch.zeros(2)
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
    for b in range(2):
        maps = [(v[b : b + 1] - shift) / scale for v in (image, other)]
        for i, level in enumerate(LEVELS):
            for n, v in enumerate(maps):
                v = torch.nn.MaxPool2d(2)(v) if i else v
                for place in level:
                    weight, bias = params[f"{place}.weight"], params[f"{place}.bias"]
                    v = torch.conv2d(v, weight, bias, padding=1).clamp(min=0)
                maps[n] = v
            x, y = (torch.nn.functional.normalize(v, dim=1) for v in maps)
            pixels = ((x - y) ** 2 * params[f"level{i}"].view(1, -1, 1, 1)).sum(1)
            expected[b] += pixels.mean()
    found = perceptual.distance(params, image, other)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert perceptual.distance(params, image, image).tolist() == [0, 0]
    grad = torch.func.grad(lambda x: perceptual.distance(params, x, other).sum())(image)
    nearer = perceptual.distance(params, image - 0.05 * grad / grad.abs().max(), other)
    assert (nearer < found).all() and grad.isfinite().all()


def test_pictures_that_do_not_fit_are_refused(params):
    with pytest.raises(ValueError, match="at least 16 x 16"):
        perceptual.distance(params, torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"must both be \(B, 3, H, W\)"):
        perceptual.distance(params, torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16))
