"""Options of where images with texts come from, which image_text.py and caption.py share."""

import re
from dataclasses import dataclass, replace
from typing import Literal, TypeVar


@dataclass(frozen=True)
class Pictured:
    """Images with texts, and which of them are measured."""

    # "shapes" (made here), a local folder of images with a metadata.jsonl or .csv, or a data set of
    # the Hub; caption.py: or a folder in easy-VQA's layout
    name: str = "shapes"
    config: str | None = None  # configuration of the Hub's data set
    split: str = "train"  # of it, to train on
    valid: str | None = None  # split to measure on; None: cut off the training images
    valid_share: float = 0.1  # of the images, to cut off
    image: str | None = None  # column of images; None: what it is usually called
    text: str | None = None  # column of texts, the same
    fit: Literal["crop", "squash", "pad"] = "crop"  # what becomes of images that are not square
    limit: int | None = None  # images at most
    count: int = 16_000  # shapes to train on
    # what settings are chosen with: "rehearsal" withholds other pairs of colour and kind from
    # training than those of what is reported; of easy-VQA it holds out training images
    held_out: Literal["reported", "rehearsal"] = "reported"
    size: int = 32  # of a side [pixels]
    # share of training images that are shown in grey, with texts that speak of no colours, so that
    # shapes are learned apart from colours; None: the recipe's of rendered shapes, none of others
    grey: float | None = None
    # finds words of colours in texts
    coloured: str = r"\b(colou?r|red|green|blue|yellow|purple|white|black|gr[ae]y|teal|brown)\b"
    seed: int = 0  # of shapes, questions, splits and of the order, not of the model


D = TypeVar("D", bound=Pictured)


def settled(data: D, grey: float) -> D:
    """The options with the share of grey pictures filled in: `grey` of rendered shapes.

    Raises:
        ValueError: shares that are none, patterns that cannot be read.
    """
    if not 0 < data.valid_share < 1:
        raise ValueError(f"--data.valid-share ({data.valid_share}) must be in (0, 1)")
    if data.grey is not None and data.grey > 1:
        raise ValueError(f"--data.grey ({data.grey}) is a share of the images: at most 1")
    try:
        re.compile(data.coloured)
    except re.error as error:
        raise ValueError(
            f"--data.coloured ({data.coloured!r}) must be a regular expression: {error}"
        ) from error
    if data.grey is None:
        data = replace(data, grey=grey if data.name == "shapes" else 0.0)
    return data
