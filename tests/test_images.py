"""Image files of every kind are read alike or refused by name; resizing and tiles."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msfs_functional.images import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Unreadable,
    normalize,
    read,
    readable,
    resize,
    tile_grid,
    tiles,
)


def ramp(height: int = 6, width: int = 8) -> np.ndarray:
    """Red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), x * 0 + 40], -1).astype(
        "uint8"
    )


RAMP = Image.fromarray(ramp())
PIXELS = torch.from_numpy(ramp()).permute(2, 0, 1)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP"])
def test_lossless_files_give_their_pixels(kind):
    flat = Image.new("RGB", (5, 3), (255, 0, 51))
    image = read(encoded(flat, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert image.shape == (3, 3, 5) and image.dtype == torch.uint8
    assert image[:, 1, 2].tolist() == [255, 0, 51]


def test_sources_of_every_form_are_the_same(tmp_path):
    data = encoded(RAMP)
    (tmp_path / "a.png").write_bytes(data)
    path = tmp_path / "a.png"
    for source in (path, str(path), data, RAMP, {"bytes": data, "path": None}, {"path": str(path)}):
        assert torch.equal(read(source), PIXELS)


def test_grey_and_one_bit_become_three_equal_channels():
    grey = RAMP.convert("L")
    image = read(encoded(grey))
    assert torch.equal(image, torch.from_numpy(np.array(grey)).expand(3, 6, 8))
    assert torch.equal(read(encoded(grey), channels=1), image[:1])
    black_white = read(encoded(Image.fromarray(ramp()[..., 0] > 128)))
    assert set(black_white.unique().tolist()) == {0, 255}


def test_cmyk_becomes_rgb():
    cmyk = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    for data in (encoded(cmyk, "TIFF"), encoded(cmyk, "JPEG", quality=100)):
        assert (read(data)[:, 0, 0].int() - torch.tensor([0, 255, 255])).abs().max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_the_background(mode):
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    data = encoded(image.convert(mode) if mode != "P" else image.quantize(4))
    assert read(data)[:, 0].tolist() == [[0, 255]] * 3
    assert read(data, background=(0, 9, 7))[:, 0, 1].tolist() == ([0, 9, 7])


def test_half_transparent_pixels_blend():
    data = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))
    assert read(data).flatten().tolist() == [204] * 3


def test_sixteen_bits_are_scaled_not_cut():
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    for kind in ("PNG", "TIFF"):
        image = read(encoded(Image.fromarray(values), kind))
        assert image[0, 0].tolist() == [0, 1, 128, 255]


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    for orientation, turned in ((3, PIXELS.flip(1, 2)), (6, PIXELS.transpose(1, 2).flip(2))):
        exif[0x0112] = orientation
        assert torch.equal(read(encoded(RAMP, exif=exif)), turned)


def test_a_frame_of_an_animation_is_one_image():
    frames = [Image.new("RGB", (3, 2), (level, 0, 0)) for level in (0, 100, 200)]
    for kind in ("GIF", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert [read(data, frame=i)[0, 0, 0].item() for i in (0, 1, 2)] == [0, 100, 200]
        with pytest.raises(ValueError, match=r"has 3 frames, so frame \(3\)"):
            read(data, frame=3)


def test_enormous_images_are_refused_before_they_are_decoded():
    """A file of 200 bytes that says it has ten billion pixels, and one just beyond the limit."""
    small = encoded(Image.new("L", (10, 10)), "BMP")
    bomb = small[:18] + (100_000).to_bytes(4, "little") * 2 + small[26:]
    with pytest.raises(ValueError, match=r"10000000000 pixels|too large"):
        read(bomb)
    with pytest.raises(ValueError, match=r"48 pixels \(6 x 8\), more than max_pixels \(47\)"):
        read(encoded(RAMP), max_pixels=47)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_truncated_files_are_refused_and_named(kind, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / f"half.{kind.lower()}"
    for n in (len(data) // 2, 12, 0):
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match=rf"half\.{kind.lower()}.*(again|leave it out)"):
            read(path)


FILES = {
    kind: encoded(Image.fromarray(ramp(16, 16)), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP")
}


@settings(max_examples=150)
@given(
    kind=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=8),
    keep=st.floats(0.05, 1.0),
)
def test_damaged_files_are_read_or_refused_never_anything_else(kind, changes, keep):
    data = bytearray(FILES[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        image = read(bytes(data[: int(keep * len(data))]), max_pixels=10**6)
    except ValueError as error:
        assert "image" in str(error)
    else:
        assert image.shape[0] == 3 and image.dtype == torch.uint8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read("/nowhere/a.png"), "no file /nowhere/a.png"),
        (lambda: read(b"GIF89a nothing"), "14 bytes is no image"),
        (lambda: read({"bytes": None, "path": None}), "without bytes and path"),
        (lambda: read(encoded(Image.new("F", (2, 2)), "TIFF")), "no known range"),
        (
            lambda: read(encoded(Image.fromarray(np.full((2, 2), 70000, np.int32)), "TIFF")),
            "beyond 16 bits",
        ),
        (lambda: read(RAMP, channels=4), r"channels \(4\)"),
        (lambda: resize(PIXELS, 0), r"size \(0, 0\)"),
        (lambda: resize(PIXELS, 4, fit="stretch"), "'stretch'"),
        (lambda: resize(PIXELS.float(), 4), "uint8"),
        (lambda: normalize(PIXELS[:1]), r"\(1, 6, 8\) must be \(..., 3 channels"),
        (lambda: tile_grid(0, 1, 1, 1), "at least 1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_unreadable_files_are_counted_and_the_first_ten_named(tmp_path):
    good = encoded(RAMP)
    paths = [tmp_path / f"{i:02}.png" for i in range(15)]
    for i, path in enumerate(paths):
        path.write_bytes(good if i in (0, 7) else good[:40])
    unreadable = Unreadable()
    found = list(readable(paths, unreadable))
    assert [i for i, _ in found] == [0, 7]
    assert unreadable.count == 13 and len(unreadable.first) == 10
    text = str(unreadable)
    assert text.startswith("13 images could not be read:") and text.endswith("and 3 more")
    assert "01.png" in text and "11.png" in text and "12.png" not in text


@pytest.fixture(scope="module")
def photos() -> Path:
    root = Path(__file__).parents[1]
    data = Path(os.environ.get("MSFS_DATA", root.parent / "shared" / "data"))
    if not (data / "natural_images").is_dir():
        pytest.skip(f"no folder {data}/natural_images: MSFS_DATA names the one with images")
    return data / "natural_images"


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_photos_are_prepared_as_by_the_published_processors(photos, name):
    """Pillow rounds between its two passes of resizing, which is a grey level or two of 255."""
    import transformers

    processor = getattr(transformers, f"{name}ImageProcessor")()
    for file in ("chelsea.png", "rocket.jpg"):
        image = read(photos / file)
        expected = processor(Image.open(photos / file), return_tensors="pt")["pixel_values"][0]
        if name == "CLIP":
            ours = normalize(resize(image, 224), CLIP_MEAN, CLIP_STD)
        else:
            ours = normalize(resize(image, 224, fit="squash"), HALF, HALF)
        levels = (ours - expected).abs() * 255 * (0.27 if name == "CLIP" else 0.5)
        assert levels.mean() < 0.5 and levels.max() < 4


def test_shapes_are_cropped_squashed_or_padded():
    wide = torch.zeros(1, 4, 8, dtype=torch.uint8)
    wide[..., 2:6] = 200
    assert (resize(wide, 4) == 200).all()
    padded = resize(wide, 8, fit="pad")[0]
    assert (padded[:2] == 128).all() and (padded[6:] == 128).all()
    assert torch.equal(padded[2:6], wide[0])
    assert resize(wide.expand(5, 1, 4, 8), (3, 7)).shape == (5, 1, 3, 7)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.sampled_from(["crop", "pad"]))
def test_any_shape_comes_out_at_the_size_asked_for(height, width, size, fit):
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    out = resize(image, (size, size + 3), fit=fit)
    assert out.shape == (3, size, size + 3)
    assert (out == 7).any()


def test_grids_follow_the_image():
    assert tile_grid(224, 224, 224, 6) == (1, 1)
    assert tile_grid(448, 448, 224, 6) == (2, 2)
    assert tile_grid(400, 800, 224, 6) == (1, 2)
    assert tile_grid(1600, 600, 224, 6) == (3, 1)
    assert tile_grid(100, 100, 224, 6) == (1, 1)
    assert tile_grid(2000, 2000, 224, 1) == (1, 1)


def test_tiles_put_together_are_the_image():
    image = torch.randint(0, 256, (3, 8, 12), dtype=torch.uint8, generator=torch.Generator())
    cut = tiles(image, 4, most=6)
    assert cut.shape == (7, 3, 4, 4)
    assert torch.equal(cut[0], resize(image, 4, fit="squash"))
    rows = [torch.cat(list(cut[1 + 3 * r : 4 + 3 * r]), -1) for r in range(2)]
    assert torch.equal(torch.cat(rows, -2), image)
    assert tiles(image[:, :4, :4], 4).shape == (1, 3, 4, 4)
