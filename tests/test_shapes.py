"""The embedded pictures: captions, questions and the checker agree; combinations are held out."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from msfs_functional.synthetic import shapes
from msfs_functional.synthetic.shapes import Scene, Shape

HAND = Scene(
    (Shape("small", "red", "circle", 16.0, 7.0), Shape("large", "blue", "square", 19.0, 22.0)),
    "above",
)
SEEN = ("colour", "size")


def combinations(found: list[Scene]) -> set[tuple[str, str]]:
    return {(shape.colour, shape.kind) for scene in found for shape in scene.shapes}


def test_a_scene_by_hand():
    assert shapes.caption(HAND) == "a small red circle above a large blue square"
    turned = "a large blue square below a small red circle"
    assert shapes.captions(HAND) == [shapes.caption(HAND), turned]
    asked = dict(shapes.questions(HAND))
    assert asked["how many squares?"] == "one" and asked["how many triangles?"] == "zero"
    assert asked["what colour is the shape above the square?"] == "red"
    assert asked["what shape is below the circle?"] == "square"
    assert asked["is the square above the circle?"] == "no"
    assert asked["where is the circle?"] == "top" and asked["where is the blue shape?"] == "bottom"
    squares = {asked[text] for text in asked if text.startswith("is there") and "square" in text}
    assert asked["is there a blue square?"] == "yes" and squares == {"yes", "no"}
    image = shapes.render(HAND)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert tuple(image[7, 16]) == shapes.COLOURS["red"]
    assert tuple(image[22, 19]) == shapes.COLOURS["blue"]
    assert tuple(image[0, 0]) == shapes.BACKGROUND


@pytest.mark.parametrize("split", ("train", "valid", "unseen"))
def test_the_checker_reads_true_pictures_back(split):
    found = shapes.scenes(1, 500, split)
    marks = [shapes.check(shapes.render(scene), scene) for scene in found]
    assert all(all(mark.values()) for mark in marks)
    assert {len(mark) for mark in marks} == {4, 8}


def test_the_checker_reads_noisy_pictures_back():
    rng, right = np.random.default_rng(0), []
    for scene in shapes.scenes(2, 300):
        noisy = shapes.render(scene) + rng.normal(0, 12, (32, 32, 3))
        right += shapes.check(noisy.clip(0, 255).astype(np.uint8), scene).values()
    assert np.mean(right) > 0.99


def test_each_wrong_attribute_is_found_and_no_other():
    first, second = HAND.shapes
    for name, value in (("size", "large"), ("colour", "green"), ("kind", "triangle")):
        wrong = replace(HAND, shapes=(replace(first, **{name: value}), second))
        marks = shapes.check(shapes.render(wrong), HAND)
        assert [key for key, right in marks.items() if not right] == [f"{name} 1"]
    beside = replace(first, x=5.0, y=22.0)
    marks = shapes.check(shapes.render(replace(HAND, shapes=(beside, second))), HAND)
    assert [key for key, right in marks.items() if not right] == ["relation"]
    marks = shapes.check(shapes.render(Scene((second,))), HAND)
    assert [key for key, right in marks.items() if right] == ["size 2", "colour 2", "kind 2"]
    empty = shapes.check(shapes.render(Scene(())), HAND)
    assert not any(empty.values())


def test_clutter_wins_nothing():
    """A picture that shows everything everywhere is not right about what was asked for."""
    rng = np.random.default_rng(0)
    right = []
    for scene in shapes.scenes(4, 100):
        blocks = rng.integers(0, 2, (8, 8, 3)) * 230
        right += shapes.check(np.kron(blocks, np.ones((4, 4, 1))).astype(np.uint8), scene).values()
    assert np.mean(right) < 0.35


@pytest.mark.parametrize("pairs", shapes.PAIRS.values(), ids=list(shapes.PAIRS))
def test_unseen_combinations_are_held_out_and_their_parts_are_not(pairs):
    train = shapes.scenes(0, 2000, held_out=pairs)
    everything = set(itertools.product(shapes.COLOURS, shapes.KINDS))
    assert combinations(train) == everything - pairs
    assert all(combinations([s]) & pairs for s in shapes.scenes(0, 200, "unseen", pairs))
    named = {question for scene in train for question, _ in shapes.questions(scene, 0, pairs)}
    assert not any(f"is there a {colour} {kind}?" in named for colour, kind in pairs)


def test_settings_are_chosen_with_other_pairs_than_those_reported():
    assert shapes.REHEARSAL.isdisjoint(shapes.HELD_OUT)


def test_scenes_are_a_function_of_seed_and_split():
    assert shapes.scenes(3, 5) == shapes.scenes(3, 8)[:5]
    assert shapes.scenes(3, 5) != shapes.scenes(4, 5)
    assert set(shapes.scenes(3, 200)).isdisjoint(shapes.scenes(3, 200, "valid"))


def test_shapes_stay_inside_and_apart():
    for scene in shapes.scenes(5, 500):
        covers = [
            shapes.coverage(shape.kind, shapes.SIZES[shape.size], shape.x, shape.y)
            for shape in scene.shapes
        ]
        rims = [c[[0, -1]].max() + c[:, [0, -1]].max() for c in covers]
        assert max(rims) < 0.7
        assert np.sum(covers, 0).max() <= 1


def test_answers_are_one_word_and_questions_are_not_repeated():
    answers = set()
    for scene in shapes.scenes(6, 300):
        asked = shapes.questions(scene)
        assert len(dict(asked)) == len(set(asked))
        answers |= {answer for _, answer in asked}
    names = {"yes", "no", *shapes.NUMBERS, *shapes.COLOURS, *shapes.KINDS, *shapes.SIZES}
    assert answers == names | set(shapes.SIDES.values())


def test_questions_about_places_agree_with_the_scene():
    asked = dict(shapes.questions(HAND))
    one, other = HAND.shapes
    assert HAND.relation == "above"
    assert asked[f"is the {one.kind} above the {other.kind}?"] == "yes"
    assert asked[f"is the {other.kind} above the {one.kind}?"] == "no"
    assert asked[f"what shape is below the {one.kind}?"] == other.kind


def test_lessons_say_of_each_shape_what_questions_ask():
    for scene in shapes.scenes(7, 100):
        asked, told = dict(shapes.questions(scene)), shapes.lessons(scene)
        for question, answer in told:
            name, *words = answer.split()
            assert question == f"describe the {name}{' shape' if name in shapes.COLOURS else ''}."
            if name in shapes.KINDS:
                assert words[-2:] == [asked[f"what {what} is the {name}?"] for what in SEEN]
                assert len(words) == 2 or asked.get(f"where is the {name}?", words[0]) == words[0]
            else:
                assert words[-2] == asked[f"what shape is {name}?"]
                assert len(words) == 2 or asked[f"where is the {name} shape?"] == words[0]


def test_a_scene_in_order_begins_with_the_upper_or_left_shape():
    for scene in shapes.scenes(8, 50):
        ordered = shapes.in_order(scene)
        assert shapes.caption(ordered) in shapes.captions(scene)
        if scene.relation is not None:
            one, other = ordered.shapes
            assert (one.x, one.y)[ordered.relation == "above"] < (
                (other.x, other.y)[ordered.relation == "above"]
            )


def test_pictures_of_other_sizes_show_the_same():
    image = shapes.render(HAND, 64)
    assert image.shape == (64, 64, 3)
    mean = image.reshape(32, 2, 32, 2, 3).mean((1, 3))
    assert abs(mean - shapes.render(HAND)).mean() < 0.5


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: shapes.scenes(0, 1, "test"), r"split \('test'\) must be one of"),  # pyright: ignore
        (lambda: shapes.scenes(0, -1), r"count \(-1\) must not be negative"),
        (lambda: shapes.read(np.zeros((16, 16, 3), np.uint8)), r"\(16, 16, 3\).*resize it"),
    ),
)
def test_bad_input_says_value_rule_remedy(call, words):
    with pytest.raises(ValueError, match=words):
        call()
