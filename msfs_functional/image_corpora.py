"""Images with captions, questions and answers: made here, from local folders, from the Hub.

    made here        coloured shapes with combinations that only the split "unseen" has
    folder           images beside a metadata.jsonl or .csv with the columns file_name, ...
    easy-VQA         <split>_questions.json [question, answer, number] and <split>/images/<n>.png,
                     which may lie in a zip (github.com/vzhou842/easy-VQA)
    hub              any data set with a column of images and one of texts

All come as `Pictured`: images of one size in memory as 8-bit RGB. What cannot be read is left out,
counted and, the first ten, named.

Dimension key: N images, C channels, h w height and width in pixels.
"""

import json
import random
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor

from msfs_functional.images import Source, Unreadable, gather
from msfs_functional.synthetic import shapes

Questions = list[tuple[str, str]]  # (question, answer)
# What columns are called in data sets that people publish, the likeliest first.
IMAGE_COLUMNS = ("image", "images", "img", "picture", "jpg", "png", "webp")
TEXT_COLUMNS = (
    *("caption", "captions", "text", "texts", "prompt", "sentence", "sentences"),
    *("description", "title"),
)
QUESTION_COLUMNS = ("question", "questions")
ANSWER_COLUMNS = ("multiple_choice_answer", "answer", "answers", "label")


@dataclass(frozen=True)
class Pictured:
    """Images and what is said of them.

    Attributes:
        images: of one size.
        captions: of each image, none or several.
        questions: (question, answer) of each image, none or several.
        unreadable: what was left out.
    """

    images: UInt8[Tensor, "N C h w"]
    captions: list[list[str]]
    questions: list[Questions]
    unreadable: Unreadable = field(default_factory=Unreadable)

    def __post_init__(self):
        sizes = {len(self.images), len(self.captions), len(self.questions)}
        if len(sizes) != 1:
            raise ValueError(
                f"{len(self.images)} images, {len(self.captions)} lists of captions and "
                f"{len(self.questions)} of questions: each image needs one of both"
            )

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "Pictured":
        """So many of them at most, from the start."""
        return self.take(range(min(count, len(self))))

    def take(self, rows: Sequence[int]) -> "Pictured":
        """These images, in this order."""
        return Pictured(
            self.images[list(rows)],
            [self.captions[i] for i in rows],
            [self.questions[i] for i in rows],
            self.unreadable,
        )


class Entry(NamedTuple):
    """One image before it is read."""

    source: Source
    captions: list[str]
    questions: Questions


def from_entries(
    entries: Iterable[Entry], size: int, *, fit: str = "crop", limit: int | None = None
) -> Pictured:
    """Reads and resizes the images; those that cannot be read are left out and counted.

    Args:
        size, fit, limit: as in `images.gather`.

    Raises:
        ValueError: no image could be read; the reasons are named.
    """
    pairs = ((entry.source, (entry.captions, entry.questions)) for entry in entries)
    found, notes, unreadable = gather(pairs, size, fit=fit, limit=limit)
    captions, questions = map(list, zip(*notes, strict=True))
    return Pictured(found, captions, questions, unreadable)


def shapes_world(
    seed: int,
    count: int,
    split: shapes.Split = "train",
    *,
    size: int = shapes.SIDE,
    held_out: shapes.Pairs = shapes.HELD_OUT,
    lessons: bool = False,
    scene_filter: Callable[[shapes.Scene], bool] | None = None,
) -> tuple[Pictured, list[shapes.Scene]]:
    """`count` rendered scenes with their captions and all questions, and the scenes themselves.

    Args:
        size: of a side, in pixels.
        held_out: pairs of colour and kind that only the split "unseen" has.
        lessons: to learn from: `shapes.lessons` are asked, too, and of two captions that which
            begins with the upper or left shape is the only one, so that no word is left to chance.
        scene_filter: keeps only scenes for which it is true, until there are `count`.
    """
    found = shapes.scenes(seed, count, split, held_out)
    more = 2 * count
    while scene_filter is not None:
        kept = [scene for scene in found if scene_filter(scene)]
        if len(kept) >= count or more > 64 * count:
            found = kept[:count]
            break
        found, more = shapes.scenes(seed, more, split, held_out), 2 * more
    images = torch.stack(
        [torch.from_numpy(shapes.render(scene, size)).permute(2, 0, 1) for scene in found]
    )
    asked = [shapes.questions(scene, seed + i, held_out) for i, scene in enumerate(found)]
    captions = [shapes.captions(scene) for scene in found]
    if lessons:
        asked = [[*some, *shapes.lessons(scene)] for some, scene in zip(asked, found, strict=True)]
        captions = [[shapes.caption(shapes.in_order(scene))] for scene in found]
    return Pictured(images, captions, asked), found


def is_easy_vqa(folder: Path) -> bool:
    """Whether the folder has easy-VQA's layout."""
    return (folder / "train_questions.json").is_file()


def easy_vqa(folder: Path, split: str, size: int, *, limit: int | None = None) -> Pictured:
    """The split "train" or "test" of a folder in easy-VQA's layout; images may lie in one zip.

    Raises:
        ValueError: a file that is not there or not of that form.
    """
    path = folder / f"{split}_questions.json"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        asked: dict[int, Questions] = {}
        for question, answer, number in rows:
            asked.setdefault(int(number), []).append((str(question), str(answer)))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} must hold [question, answer, image number], but: {error}; fetch it again"
        ) from None
    archives = sorted(folder.glob("*.zip"))
    plain = folder / split / "images"

    def entries() -> Iterator[Entry]:
        if plain.is_dir():
            for number in sorted(asked):
                yield Entry(plain / f"{number}.png", [], asked[number])
            return
        if not archives:
            raise ValueError(f"no images of {split} in {folder}: neither {plain} nor a .zip")
        with zipfile.ZipFile(archives[0]) as archive:
            for number in sorted(asked):
                name = f"{split}/images/{number}.png"
                try:
                    content = archive.read(name)
                except KeyError:
                    content = b""
                yield Entry({"path": name, "bytes": content}, [], asked[number])

    return from_entries(entries(), size, limit=limit)


def column_of(columns: Sequence[str], given: str | None, known: Sequence[str], what: str) -> str:
    """The column that was asked for, or the likeliest."""
    found = [name for name in ((given,) if given else known) if name in columns]
    if not found:
        named = f"{given!r}" if given else f"none of {list(known)}"
        raise ValueError(f"no column of {what} ({named}) among {list(columns)}: name it")
    return found[0]


def _turns(value: Any) -> Questions:
    """(user, assistant) of [{"user": ..., "assistant": ...}], as sets of conversations have it."""
    turns = value if isinstance(value, list) else [value]
    known = [t for t in turns if isinstance(t, dict) and {"user", "assistant"} <= set(t)]
    return [(turn["user"].strip(), turn["assistant"].strip()) for turn in known]


def _texts(value: Any) -> list[str]:
    """A text, several, or {"raw": ...} as some sets have it; empty ones are left out."""
    if _turns(value):
        return []
    if isinstance(value, dict):
        value = value.get("raw", list(value.values()))
    values = value if isinstance(value, list | tuple) else [value]
    return [str(text).strip() for text in values if text is not None and str(text).strip()]


def undecoded(table: Any, column: str) -> Any:
    """The table with images of this column, or lists of them, as files: one that is broken shall
    not end the reading of the others."""
    import datasets

    kind = table.features[column]
    if isinstance(kind, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    if isinstance(getattr(kind, "feature", None), datasets.Image):
        return table.cast_column(column, type(kind)(datasets.Image(decode=False)))
    return table


def from_table(
    table: Any,
    size: int,
    *,
    image: str | None = None,
    text: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    fit: str = "crop",
    limit: int | None = None,
) -> Pictured:
    """A `datasets.Dataset` with a column of images and texts, or questions and answers, or both.

    Texts may be conversations, [{"user": ..., "assistant": ...}]; of several images in a row only a
    lone one is taken.

    Args:
        table: its images are not decoded before they are read here.
        image, text, question, answer: names of columns; default: what they are usually called.

    Raises:
        ValueError: columns that are not there.
    """
    columns = table.column_names
    image = column_of(columns, image, IMAGE_COLUMNS, "images")
    asks = question or any(name in columns for name in QUESTION_COLUMNS)
    says = text or any(name in columns for name in TEXT_COLUMNS)
    if asks:
        question = column_of(columns, question, QUESTION_COLUMNS, "questions")
        answer = column_of(columns, answer, ANSWER_COLUMNS, "answers")
    if says or not asks:
        text = column_of(columns, text, TEXT_COLUMNS, "texts")
    rows = undecoded(table, image)

    def entries() -> Iterator[Entry]:
        for row in rows:
            captions, pairs = _texts(row[text]) if text else [], _turns(row[text]) if text else []
            if question and answer:
                pairs += zip(_texts(row[question]), _texts(row[answer]), strict=False)
            if captions or pairs:
                source = row[image]
                if isinstance(source, list):
                    source = source[0] if len(source) == 1 else None
                yield Entry({} if source is None else source, captions, pairs)

    return from_entries(entries(), size, fit=fit, limit=limit)


def load_table(name: str, config: str | None = None, split: str = "train") -> Any:
    """A data set of the Hub, or of a local folder with images and metadata, as a table.

    Raises:
        ValueError: a folder without images or metadata, a split that is not there.
    """
    import datasets

    if Path(name).is_dir():
        found = datasets.load_dataset("imagefolder", data_dir=name)
        if split not in found:
            raise ValueError(f"{name} has no split {split!r}, only {list(found)}: name one of them")
        return found[split]
    return datasets.load_dataset(name, config, split=split)


def hold_out(data: Pictured, share: float, seed: int) -> tuple[Pictured, Pictured]:
    """(the rest, a share of the images drawn by the seed): no image is in both.

    Raises:
        ValueError: one of them would be empty.
    """
    count = round(len(data) * share)
    if not 0 < count < len(data):
        raise ValueError(
            f"{share:g} of {len(data)} images are {count}: both parts need some; change the share, "
            "or give more images"
        )
    order = list(range(len(data)))
    random.Random(seed).shuffle(order)
    return data.take(sorted(order[count:])), data.take(sorted(order[:count]))
