"""Pictures of coloured shapes with captions, questions and a checker that reads pictures back.

    scene = scenes(0, 1, "train")[0]
    render(scene)      uint8 (32, 32, 3)
    caption(scene)     "a small red circle above a large blue square"
    questions(scene)   [("what colour is the circle?", "red"), ...]
    check(render(scene), scene)   {"count": True, "colour 1": True, ..., "relation": True}

A scene has one shape or two; of two, the first stands above, below, left or right of the second.
Three pairs of colour and kind never occur in "train" and "valid", and at least one of them in each
scene of "unseen": a model that draws those has learnt to combine. Which pairs is an argument:
settings can be chosen with those of REHEARSAL, what is reported is measured with HELD_OUT.

Lengths are in units of 1 / 32 of the image's side, x to the right and y down.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8

Kind = Literal["circle", "square", "triangle"]
Split = Literal["train", "valid", "unseen"]

SIDE = 32
BACKGROUND = (24, 24, 32)
COLOURS = {
    "red": (222, 52, 48),
    "green": (56, 184, 80),
    "blue": (48, 96, 224),
    "yellow": (240, 216, 56),
    "purple": (160, 64, 208),
    "white": (240, 240, 240),
}
SIZES = {"small": 3.3, "large": 5.5}  # radius of the circle; the others cover about as much
KINDS: tuple[Kind, ...] = get_args(Kind)
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
SIDES = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}
OPPOSITE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
Pairs = frozenset[tuple[str, str]]  # of colour and kind
HELD_OUT: Pairs = frozenset({("red", "triangle"), ("blue", "circle"), ("yellow", "square")})
# Other pairs, to choose settings with: what is reported on HELD_OUT was then not looked at before.
REHEARSAL: Pairs = frozenset({("green", "triangle"), ("purple", "circle"), ("white", "square")})
PAIRS = {"reported": HELD_OUT, "rehearsal": REHEARSAL}
NUMBERS = ("zero", "one", "two")
MARGIN = 1.4  # a shape's reach over its radius, at most: the corner of a triangle
SHIFT = 3.0  # of two shapes, at most, across the direction in which they stand


@dataclass(frozen=True)
class Shape:
    """One shape and the middle of the circle that it is like."""

    size: str
    colour: str
    kind: Kind
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One shape, or two in a relation."""

    shapes: tuple[Shape, ...]
    relation: str | None = None  # of the first to the second


def scenes(
    seed: int, count: int, split: Split = "train", held_out: Pairs = HELD_OUT
) -> list[Scene]:
    """`count` scenes; each seed and split makes others, each time the same.

    Args:
        held_out: pairs that only the split "unseen" has.

    Raises:
        ValueError: an unknown split; a negative count.
    """
    if split not in get_args(Split):
        raise ValueError(f"split ({split!r}) must be one of {list(get_args(Split))}")
    if count < 0:
        raise ValueError(f"count ({count}) must not be negative")
    rng, found = random.Random(f"{split} {seed}"), []
    while len(found) < count:
        scene = _draw(rng)
        unseen = any((shape.colour, shape.kind) in held_out for shape in scene.shapes)
        if unseen == (split == "unseen"):
            found.append(scene)
    return found


def _draw(rng: random.Random) -> Scene:
    def look() -> tuple[str, str, Kind]:
        return rng.choice(list(SIZES)), rng.choice(list(COLOURS)), rng.choice(KINDS)

    def place(reach: float) -> float:
        return round(rng.uniform(reach, SIDE - reach), 1)

    first = look()
    reach = SIZES[first[0]] * MARGIN
    if rng.random() < 1 / 4:
        return Scene((Shape(*first, place(reach), place(reach)),))
    second, relation = look(), rng.choice(list(RELATIONS))
    reach = max(reach, SIZES[second[0]] * MARGIN)
    # Along the direction the shapes stand apart by both radii and a gap, across it they may shift.
    apart = MARGIN * (SIZES[first[0]] + SIZES[second[0]]) + 1.0
    room = SIDE - 2 * reach - apart
    apart += rng.uniform(0, max(room, 0.0))
    start = rng.uniform(reach, max(SIDE - reach - apart, reach))
    across = rng.uniform(reach, SIDE - reach)
    other = min(max(across + rng.uniform(-SHIFT, SHIFT), reach), SIDE - reach)
    near, far = round(start, 1), round(start + apart, 1)
    dx, dy = RELATIONS[relation]
    along = (far, near) if dx + dy > 0 else (near, far)
    sides = (round(across, 1), round(other, 1))
    x, y = (along, sides) if dx else (sides, along)
    shapes = Shape(*first, x[0], y[0]), Shape(*second, x[1], y[1])
    return Scene(shapes, relation)


def coverage(
    kind: Kind, radius: float, x: float, y: float, size: int = SIDE
) -> Float[np.ndarray, "size size"]:
    """How much of each pixel a shape covers, in [0, 1]."""
    middles = (np.arange(size) + 0.5) * (SIDE / size)
    dx, dy = middles[None, :] - x, middles[:, None] - y
    if kind == "circle":
        outside = np.hypot(dx, dy) - radius
    elif kind == "square":
        outside = np.maximum(abs(dx), abs(dy)) - radius * 0.9
    else:  # its three sides are as far from the middle
        side = radius * 0.7
        slope = math.sqrt(3) / 2
        outside = np.maximum(dy - side, abs(dx) * slope - dy / 2 - side)
    return np.clip(0.5 - outside * (size / SIDE), 0, 1)


def render(scene: Scene, size: int = SIDE) -> UInt8[np.ndarray, "size size 3"]:
    """The scene as an image with smooth edges."""
    image = np.broadcast_to(np.array(BACKGROUND, np.float64), (size, size, 3))
    for shape in scene.shapes:
        cover = coverage(shape.kind, SIZES[shape.size], shape.x, shape.y, size)[..., None]
        image = image + cover * (np.array(COLOURS[shape.colour]) - image)
    return np.round(image).astype(np.uint8)


def caption(scene: Scene) -> str:
    """The scene in words: size, colour and kind of each shape, and how they stand."""
    words = [f"a {shape.size} {shape.colour} {shape.kind}" for shape in scene.shapes]
    return f" {scene.relation} ".join(words)


def captions(scene: Scene) -> list[str]:
    """The caption, and of two shapes the same seen from the other one."""
    if scene.relation is None:
        return [caption(scene)]
    turned = Scene(scene.shapes[::-1], OPPOSITE[scene.relation])
    return [caption(scene), caption(turned)]


def in_order(scene: Scene) -> Scene:
    """The same scene, its upper or left shape first."""
    if scene.relation in (None, "above", "left of"):
        return scene
    return Scene(scene.shapes[::-1], OPPOSITE[scene.relation])


def lessons(scene: Scene) -> list[tuple[str, str]]:
    """What is to be said of each shape that one word names, that word first: to learn from.

        ("describe the circle.", "circle left red small")
        ("describe the red shape.", "red left circle small")

    Each word after the first is answered from the word that was just said. A question is answered
    from its end, which has to look for the word that names the shape before it can look for the
    shape itself: that takes a small model many more steps to find out.
    """
    told = []
    relations = (None,) if scene.relation is None else (scene.relation, OPPOSITE[scene.relation])
    for shape, relation in zip(scene.shapes, relations, strict=True):
        side = () if relation is None else (SIDES[relation],)
        if sum(other.kind == shape.kind for other in scene.shapes) == 1:
            words = (shape.kind, *side, shape.colour, shape.size)
            told.append((f"describe the {shape.kind}.", " ".join(words)))
        if sum(other.colour == shape.colour for other in scene.shapes) == 1:
            words = (shape.colour, *side, shape.kind, shape.size)
            told.append((f"describe the {shape.colour} shape.", " ".join(words)))
    return told


def questions(scene: Scene, seed: int = 0, held_out: Pairs = HELD_OUT) -> list[tuple[str, str]]:
    """Everything that can be asked about a scene without ambiguity, with answers of one word.

    What is not there is asked for in a colour that `seed` draws, so that no wording gives an answer
    away; pairs of `held_out` are named only in scenes that hold one.
    """
    shapes = scene.shapes
    rng = random.Random(f"{seed} {shapes}")
    unseen = any((shape.colour, shape.kind) in held_out for shape in shapes)
    asked = [("how many shapes are there?", NUMBERS[len(shapes)])]
    for kind in KINDS:
        number = sum(shape.kind == kind for shape in shapes)
        asked.append((f"how many {kind}s?", NUMBERS[number]))
    for shape in shapes:
        if sum(other.kind == shape.kind for other in shapes) == 1:
            asked.append((f"what colour is the {shape.kind}?", shape.colour))
            asked.append((f"what size is the {shape.kind}?", shape.size))
        if sum(other.colour == shape.colour for other in shapes) == 1:
            asked.append((f"what shape is {shape.colour}?", shape.kind))
        asked.append((f"is there a {shape.colour} {shape.kind}?", "yes"))
        there = {(other.colour, other.kind) for other in shapes}
        apart = there if unseen else there | held_out
        absent = rng.choice([colour for colour in COLOURS if (colour, shape.kind) not in apart])
        asked.append((f"is there a {absent} {shape.kind}?", "no"))
    if scene.relation is None:
        return asked
    pairs = (
        (shapes[0], scene.relation, shapes[1]),
        (shapes[1], OPPOSITE[scene.relation], shapes[0]),
    )
    for one, relation, other in pairs:
        if one.colour != other.colour:
            asked.append((f"where is the {one.colour} shape?", SIDES[relation]))
        if one.kind == other.kind:
            continue
        asked.append((f"where is the {one.kind}?", SIDES[relation]))
        asked.append((f"what colour is the shape {relation} the {other.kind}?", one.colour))
        asked.append((f"what shape is {relation} the {other.kind}?", one.kind))
        asked.append((f"is the {one.kind} {relation} the {other.kind}?", "yes"))
        asked.append((f"is the {one.kind} {OPPOSITE[relation]} the {other.kind}?", "no"))
    return asked


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask, as masks, largest first; specks of under 9 pixels dropped."""
    left, parts = {tuple(point) for point in np.argwhere(mask).tolist()}, []
    while left:
        part, edge = [], [left.pop()]
        while edge:
            i, j = edge.pop()
            part.append((i, j))
            for point in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
                if point in left:
                    left.remove(point)
                    edge.append(point)
        if len(part) >= 9:
            alone = np.zeros_like(mask)
            alone[tuple(np.array(part).T)] = True
            parts.append(alone)
    return sorted(parts, key=lambda part: -part.sum())


def _near(mask: np.ndarray) -> np.ndarray:
    """The mask and the pixels next to it."""
    padded = np.pad(mask, 1)
    shifts = itertools.product((0, 1, 2), repeat=2)
    return np.any([padded[i : i + SIDE, j : j + SIDE] for i, j in shifts], 0)


def read(image: UInt8[np.ndarray, "32 32 3"]) -> list[Shape]:
    """The shapes in an image, largest first: by colour of their inside, by area and outline.

    Raises:
        ValueError: an image of another size or type.
    """
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"image {image.shape} of {image.dtype} must be ({SIDE}, {SIDE}, 3) of uint8: resize it"
        )
    difference = image.astype(np.float64) - BACKGROUND
    parts = _parts(abs(difference).max(-1) > 64)
    found = []
    for part in parts:
        strength = abs(difference).sum(-1)
        inside = part & (strength >= np.median(strength[part]))
        tint = np.median(difference[inside], 0)
        colour = min(
            COLOURS, key=lambda name: np.linalg.norm(np.subtract(COLOURS[name], BACKGROUND) - tint)
        )
        cover = np.clip(difference @ tint / (tint @ tint), 0, 1) * _near(part)
        total = cover.sum()
        middles = np.arange(SIDE) + 0.5
        x, y = cover.sum(0) @ middles / total, cover.sum(1) @ middles / total

        def misfit(look: tuple[str, Kind], x=x, y=y, cover=cover) -> float:
            size, kind = look
            # The middle of a triangle is its centre of mass, too, so all kinds share it.
            return float(np.square(coverage(kind, SIZES[size], x, y) - cover).sum())

        size, kind = min(itertools.product(SIZES, KINDS), key=misfit)
        found.append(Shape(size, colour, kind, float(x), float(y)))
    return found


def check(image: UInt8[np.ndarray, "32 32 3"], scene: Scene) -> dict[str, bool]:
    """Which attributes of a scene's caption an image shows.

    As many shapes as were asked for, the largest that are found, are compared with them in the
    order that suits best.

    Returns:
        "count"; "size i", "colour i" and "kind i" of the i-th shape, counted from 1; "relation" of
        two shapes.
    """
    found, asked = read(image), scene.shapes
    best: dict[str, bool] = {}
    seen: list[Shape | None] = [*found[: len(asked)]]
    seen += [None] * (len(asked) - len(seen))
    for order in itertools.permutations(seen):
        marks = {"count": len(found) == len(asked)}
        for i, (one, other) in enumerate(zip(asked, order, strict=True), start=1):
            for name in ("size", "colour", "kind"):
                marks[f"{name} {i}"] = other is not None and getattr(one, name) == getattr(
                    other, name
                )
        if scene.relation is not None:
            one, other = order
            marks["relation"] = one is not None and other is not None
            if one is not None and other is not None:
                dx, dy = RELATIONS[scene.relation]
                across, along = one.x - other.x, one.y - other.y
                ahead, aside = (across * dx, along) if dx else (along * dy, across)
                marks["relation"] = ahead > abs(aside)
        if sum(marks.values()) > sum(best.values()) or not best:
            best = marks
    return best


def shares(images: UInt8[np.ndarray, "N 32 32 3"], scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of attributes that the images show of their scenes' captions: "all", and of the
    count, sizes, colours, kinds and relations alone."""
    marks: dict[str, list[bool]] = {"all": []}
    for image, scene in zip(images, scenes, strict=True):
        for name, right in check(np.ascontiguousarray(image), scene).items():
            marks.setdefault(name.split()[0], []).append(right)
            marks["all"].append(right)
    return {name: float(np.mean(rights)) for name, rights in marks.items()}
