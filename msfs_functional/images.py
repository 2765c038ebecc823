"""Image files to tensors: read robustly, resize, cut in tiles, normalize.

`read` gives every file the same form, 8-bit RGB upright, or refuses it with a ValueError that names
the file, what is wrong and what helps:

    grey, CMYK, palettes, 1 bit    converted             alpha            laid over a background
    16 bits a channel              scaled to 8           EXIF rotation    applied
    animated                       one frame             huge             refused before decoding
    truncated, corrupt, no image   refused               32-bit floats    refused: no known range

Dimension key: C channels, h w height and width in pixels, N tiles.
"""

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 2**26  # 67 million: a 192 MiB tensor
NAMED = 10  # unreadable files that are told by name
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and std of SigLIP, ViT and PaliGemma

Source = str | Path | bytes | Image.Image | Mapping[str, Any]


def read(
    source: Source,
    *,
    channels: int = 3,
    frame: int = 0,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
) -> UInt8[Tensor, "C h w"]:
    """An image file as 8-bit RGB (or grey), upright.

    Args:
        source: a path, the bytes of a file, an image of Pillow, or {"bytes", "path"}, as a hub data
            set with Image(decode=False) has it.
        channels: 3 for RGB, 1 for grey.
        frame: of an animation or a file of several pages.
        background: what shows through transparency, RGB.
        max_pixels: of height * width; a small file can claim to be enormous.

    Raises:
        ValueError: a file that cannot be read, of a kind without a known meaning, too large, or
            without that frame.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels ({channels}) must be 3 (RGB) or 1 (grey)")
    name, opened = _open(source)
    try:
        return _decoded(name, opened, channels, frame, background, max_pixels)
    finally:
        if opened is not source:
            opened.close()


def _decoded(
    name: str,
    opened: Image.Image,
    channels: int,
    frame: int,
    background: tuple[int, int, int],
    max_pixels: int,
) -> UInt8[Tensor, "C h w"]:
    width, height = opened.size
    if min(width, height) < 1:
        raise ValueError(f"{name} is {height} x {width} pixels: it must have some; leave it out")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} has {width * height:,} pixels ({height} x {width}), more than max_pixels "
            f"({max_pixels:,}): scale it down, or raise max_pixels if you trust it"
        )
    frames = getattr(opened, "n_frames", 1)
    if not 0 <= frame < frames:
        raise ValueError(f"{name} has {frames} frames, so frame ({frame}) must be below that")
    try:
        if frame:
            opened.seek(frame)
        opened.load()
        image = _eight_bits(ImageOps.exif_transpose(opened), background)
        array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(
            f"{name} ({opened.mode}, {height} x {width}) cannot be decoded ({_text(error)}): fetch "
            "it again or leave it out"
        ) from None
    tensor = torch.from_numpy(array.copy())
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1).contiguous()


def _open(source: Source) -> tuple[str, Image.Image]:
    if isinstance(source, Image.Image):
        return "the image", source
    if isinstance(source, Mapping):
        path, content = source.get("path"), source.get("bytes")
        if content is None and path is None:
            raise ValueError("an image without bytes and path: leave it out")
        name, file = str(path or "the image"), path if content is None else io.BytesIO(content)
    elif isinstance(source, bytes):
        name, file = f"the image of {len(source):,} bytes", io.BytesIO(source)
    else:
        name, file = str(source), source
    try:
        return name, Image.open(file)  # pyright: ignore[reportArgumentType]
    except FileNotFoundError:
        raise ValueError(f"no file {name}: check the path") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large for Pillow ({error}): scale it down") from None
    except Exception as error:
        raise ValueError(
            f"{name} is no image that can be read ({_text(error)}): fetch it again or leave it out"
        ) from None


def _text(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # it would tell of an object at an address
        return "of no kind that Pillow knows"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _eight_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The image in a mode that converts to RGB by what it means."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise ValueError("its 32-bit integers go beyond 16 bits, so their range is not known")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its floating-point values have no known range: scale them to 8 bits")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(below, above)
    return image


@dataclass
class Unreadable:
    """Counts the files that were left out, and keeps the reasons of the first ten."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, error: ValueError) -> None:
        self.count += 1
        if len(self.first) < NAMED:
            self.first.append(str(error))

    def __str__(self) -> str:
        rest = self.count - len(self.first)
        more = [f"and {rest:,} more"] if rest else []
        return "\n  ".join([f"{self.count:,} images could not be read:", *self.first, *more])


def readable(
    sources: Iterable[Source], unreadable: Unreadable, **options: Any
) -> Iterator[tuple[int, UInt8[Tensor, "C h w"]]]:
    """(index, image) of every source that can be read; the others are counted in `unreadable`.

    Args:
        options: of `read`.
    """
    for i, source in enumerate(sources):
        try:
            image = read(source, **options)
        except ValueError as error:
            unreadable.add(error)
        else:
            yield i, image


class Gathered(NamedTuple):
    """Images of one size, what came with each, and what was left out."""

    images: UInt8[Tensor, "N C Y X"]
    notes: list[Any]
    unreadable: Unreadable


def gather(
    pairs: Iterable[tuple[Source, Any]],
    size: int,
    *,
    channels: int = 3,
    fit: str = "crop",
    limit: int | None = None,
    where: str = "the set",
) -> Gathered:
    """The images of (source, note) pairs at one size, with the notes of those that can be read.

    Args:
        size: of a side, in pixels.
        channels: as in `read`.
        fit: what becomes of another shape, see `resize`.
        limit: stop after so many that can be read.
        where: names the pairs in an error.

    Raises:
        ValueError: no image can be read, the reasons are named; a size or limit below 1.
    """
    if size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"size ({size}) and limit ({limit}) must be at least 1")
    unreadable, found, notes, seen = Unreadable(), [], [], []

    def sources() -> Iterator[Source]:
        for source, note in pairs:
            seen.append(note)
            yield source

    for i, image in readable(sources(), unreadable, channels=channels):
        found.append(resize(image, size, fit=fit))
        notes.append(seen[i])
        if len(found) == limit:
            break
    if not found:
        why = f"; {unreadable}" if unreadable.count else ": check the path and the kind"
        raise ValueError(f"{where} holds no image that can be read{why}")
    return Gathered(torch.stack(found), notes, unreadable)


def resize(
    image: UInt8[Tensor, "*N C h w"], size: int | tuple[int, int], *, fit: str = "crop"
) -> UInt8[Tensor, "*N C Y X"]:
    """The image at another size, bicubic with antialiasing.

    Args:
        size: (height, width), or of both, in pixels.
        fit: what becomes of another shape: "crop" scales the shorter side and cuts the middle out
            (CLIP), "squash" scales both sides (SigLIP), "pad" scales the longer side and lays grey
            around.

    Raises:
        ValueError: a size below 1, an unknown fit, an image that is not (..., C, h, w) in uint8.
    """
    if image.ndim < 3 or image.dtype != torch.uint8:
        raise ValueError(
            f"image {tuple(image.shape)} {image.dtype} must be (..., C, h, w) in uint8"
        )
    target = (size, size) if isinstance(size, int) else size
    if min(target) < 1 or min(image.shape[-2:]) < 1:
        raise ValueError(f"size {target} and image {tuple(image.shape[-2:])} must be at least 1")
    here = image.shape[-2:]
    if tuple(here) == tuple(target):
        return image
    if fit == "squash":
        return _scaled(image, target)
    if fit not in ("crop", "pad"):
        raise ValueError(f"fit ({fit!r}) must be 'crop', 'squash' or 'pad'")
    ratios = [Fraction(a, b) for a, b in zip(target, here, strict=True)]
    ratio = max(ratios) if fit == "crop" else min(ratios)
    rows, columns = (max(int(n * ratio), 1) for n in here)
    if fit == "crop":
        scaled = _scaled(image, (max(rows, target[0]), max(columns, target[1])))
        y, x = ((a - b) // 2 for a, b in zip(scaled.shape[-2:], target, strict=True))
        return scaled[..., y : y + target[0], x : x + target[1]]
    scaled = _scaled(image, (min(rows, target[0]), min(columns, target[1])))
    gaps = [b - a for a, b in zip(scaled.shape[-2:], target, strict=True)]
    (y, below), (x, right) = ((gap // 2, gap - gap // 2) for gap in gaps)
    return F.pad(scaled, (x, right, y, below), value=128)


def _scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    x = image.reshape(-1, *image.shape[-3:]).float()
    x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8).reshape(*image.shape[:-2], *size)


def grid(
    images: UInt8[Tensor, "N C h w"], columns: int, *, enlarge: int = 1
) -> UInt8[Tensor, "C Y X"]:
    """Images side by side, row by row, the last row filled up with black.

    Args:
        enlarge: pixels along the side of the square that one pixel becomes.
    """
    missing = -len(images) % columns
    images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    rows = images.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    return rows.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2)


def save_png(image: UInt8[Tensor, "C h w"], path: Path) -> None:
    """Writes an image of one (grey) or three channels."""
    array = image.permute(1, 2, 0).cpu().numpy()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(path)


def normalize(
    image: UInt8[Tensor, "... C h w"],
    mean: tuple[float, ...] = HALF,
    std: tuple[float, ...] = HALF,
) -> Float[Tensor, "... C h w"]:
    """(image / 255 - mean) / std for each channel, in float32: what a tower takes.

    Raises:
        ValueError: an image of another number of channels.
    """
    if image.ndim < 3 or image.shape[-3] != len(mean) or len(mean) != len(std):
        raise ValueError(
            f"image {tuple(image.shape)} must be (..., {len(mean)} channels, h, w): one mean and "
            "one std for each"
        )
    shift, scale = (torch.tensor(x, device=image.device)[:, None, None] for x in (mean, std))
    return (image.float() / 255 - shift) / scale


def tile_grid(height: int, width: int, size: int, most: int) -> tuple[int, int]:
    """(rows, columns) of tiles for an image: the shape nearest to its own, then the most detail.

    Of all grids of at most `most` tiles take those whose ratio of sides is nearest the image's (on
    a logarithmic scale); of these the largest that the image still fills half of.

    Raises:
        ValueError: numbers below 1.
    """
    if min(height, width, size, most) < 1:
        raise ValueError(
            f"height, width, size, most {height, width, size, most} must be at least 1"
        )
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)]

    def badness(grid: tuple[int, int]) -> tuple[float, int]:
        rows, columns = grid
        skew = abs(math.log(rows * width / (columns * height)))
        filled = height * width >= 0.5 * rows * columns * size**2
        return round(skew, 6), -rows * columns if filled else rows * columns

    return min(grids, key=badness)


def tiles(
    image: UInt8[Tensor, "C h w"], size: int, *, most: int = 6
) -> UInt8[Tensor, "N C size size"]:
    """The image in tiles at high resolution, row by row, after a thumbnail of the whole.

    An image that one tile shows is that tile alone. Each counts as an image of the prompt.

    Args:
        size: of a tile, in pixels: the tower's.
        most: tiles, without the thumbnail.

    Source: Ye et al. 2023 ("UReader"); Liu et al. 2024 ("LLaVA-NeXT").
    """
    rows, columns = tile_grid(image.shape[-2], image.shape[-1], size, most)
    thumbnail = resize(image, size, fit="squash")[None]
    if rows * columns == 1:
        return thumbnail
    whole = resize(image, (rows * size, columns * size), fit="squash")
    cut = whole.unflatten(-1, (columns, size)).unflatten(-3, (rows, size))
    return torch.cat([thumbnail, cut.permute(1, 3, 0, 2, 4).flatten(0, 1)])
