"""The stories: made to hold together, split by pairs, and judged sentence by sentence."""

import re

import pytest

from msfs_functional.synthetic.stories import RULES, beginning, judge, stories
from msfs_functional.synthetic.stories.lexicon import ADJECTIVES, NAMES, THINGS
from msfs_functional.synthetic.stories.sentences import SENTENCES, patterns
from msfs_functional.synthetic.stories.telling import held_out

STORY = (
    "One cold day, Mia and Tom were on the farm. Mia had an old drum. "
    'Tom said to Mia, "Please give me your old drum." "Yes, Tom, take it," said Mia, and she gave '
    "him the old drum. Tom was happy and thanked Mia for the old drum. He put the drum into his "
    "bag. Later they walked to the lake. In the end, Tom took the old drum home from the lake."
)
NAME = re.compile("|".join(NAMES))
JOINING = re.compile(r"\w+ was there, too\.|Soon \w+ came to play with them\.")


def pairs_of(story: str) -> set[tuple[str, str]]:
    """(adjective, thing), also of "his ball, a red one", and the two names of the opening."""
    first, second = NAME.findall(story)[:2]
    things = re.findall(rf"({'|'.join(ADJECTIVES)}) ({'|'.join(THINGS)})", story)
    later = re.findall(rf"({'|'.join(THINGS)}), an? ({'|'.join(ADJECTIVES)}) one", story)
    return {(first, second), *things, *((adjective, thing) for thing, adjective in later)}


def test_stories_are_distinct_and_those_of_their_seed():
    some = stories(3, 500)
    assert len(set(some)) == 500
    assert stories(3, 500) == some and stories(3, 100) == some[:100]
    assert not set(stories(4, 500)) & set(some)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_story_told_is_confirmed(split):
    for story in stories(1, 500, split=split):
        assert judge(story) == {**dict.fromkeys(RULES, True), "consistent": True}, story


def test_every_kind_of_sentence_is_told():
    text = " ".join(stories(0, 500))
    assert all(form.search(text) for _, form in patterns())
    assert len(patterns()) == sum(map(len, SENTENCES.values()))


def test_held_out_pairs_stand_in_every_validation_story_and_in_no_training_story():
    for story in stories(0, 2000):
        assert not any(held_out(*pair) for pair in pairs_of(story)), story
    for story in stories(0, 200, split="valid"):
        assert any(held_out(*pair) for pair in pairs_of(story)), story


def test_validation_has_no_word_that_training_lacks():
    words = lambda texts: set(re.findall(r"\w+", " ".join(texts)))  # noqa: E731
    assert words(stories(0, 500, split="valid")) <= words(stories(0, 2000))


@pytest.mark.parametrize(
    "said, instead, rule",
    [
        ("In the end, Tom", "In the end, Mia", "holders"),
        ("the old drum home", "the new drum home", "holders"),
        ("Mia had an old drum", "Tom had an old drum", "holders"),
        ("walked to the lake", "walked to the beach", "places"),
        ("thanked Mia", "thanked Tom", "causes"),
        ('said to Mia, "Please', 'said to Ben, "Please', "names"),
        ("and she gave", "and he gave", "grammar"),
        ("gave him the old drum", "gave her the old drum", "grammar"),
        ("He put", "She put", "grammar"),
        ("an old drum", "a old drum", "grammar"),
        ("on the farm", "in the farm", "grammar"),
        ("Later they walked to the lake.", "Then they sang.", "told"),
        (" In the end, Tom took the old drum home from the lake.", "", "told"),
        ("Mia had", "MIA had", "told"),
        ("Mia had an old drum. ", "", "holders"),
        ("Tom was happy and thanked Mia", "Mia was happy and thanked Tom", "causes"),
        (
            '"Yes, Tom, take it," said Mia, and she gave him the old drum.',
            '"No, Tom, it is mine," said Mia, and she kept her drum.',
            "causes",
        ),
    ],
)
def test_the_judge_names_the_rule_that_one_change_breaks(said, instead, rule):
    assert judge(STORY)["consistent"] and STORY.count(said) == 1
    verdict = judge(STORY.replace(said, instead))
    assert not verdict[rule] and not verdict["consistent"]


def test_a_stranger_in_any_place_is_noticed():
    for story in stories(5, 60):
        known = set(NAME.findall(story))
        stranger = next(name for name in NAMES if name not in known)
        arrival = JOINING.search(story)
        for match in list(NAME.finditer(story))[2:]:
            if arrival is None or not arrival.start() <= match.start() < arrival.end():
                changed = story[: match.start()] + stranger + story[match.end() :]
                assert not judge(changed)["consistent"], changed


def test_two_stories_in_one_nothing_and_noise_are_not_confirmed():
    for text in (f"{STORY} {STORY}", "", " ", "Mia", STORY[:-1], STORY + "."):
        assert not judge(text)["consistent"]


def test_a_beginning_goes_on():
    assert beginning(STORY) == "One cold day, Mia and Tom were on the farm. Mia had an old drum."


def test_bad_arguments_are_told():
    with pytest.raises(ValueError, match=r"n \(0\)"):
        stories(0, 0)
    with pytest.raises(ValueError, match="'train' or 'valid'"):
        stories(0, 1, split="test")  # pyright: ignore
    with pytest.raises(ValueError, match="begins no sentence"):
        beginning("Once upon a time")
