"""The embedded task of the alignment recipes: its checker, and what its splits keep apart."""

import itertools

import pytest

from msfs_functional.synthetic.instructions import (
    HABIT,
    OPERATIONS,
    SHARES,
    Instruction,
    check,
    demonstrations,
    example,
    graded,
    instructions,
    parse,
    right,
    write,
)


def test_answers_of_hand_worked_instructions():
    for operation, numbers, how, answer in [
        ("Reverse", (4, 9, 1), ("words", "dashes", "brackets"), "( one - nine - four )"),
        ("Sort", (4, 9, 1), ("digits", "commas", "plain"), "1, 4, 9"),
        ("Repeat", (0, 0), ("words", "spaces", "stars"), "* zero zero *"),
        ("Largest", (4, 9, 1), ("words", "commas", "plain"), "nine"),
        ("Smallest", (4, 9, 1), ("digits", "dashes", "brackets"), "( 1 )"),
        ("Add", (8, 7), ("words", "commas", "plain"), "fifteen"),
    ]:
        one = Instruction(operation, numbers, *how)
        assert one.answer == answer
        assert parse(one.prompt) == one
        assert all(check(one.prompt, answer).values())


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("one - nine - four", {"frame"}),
        ("( one, nine, four )", {"joiner"}),
        ("( 1 - 9 - 4 )", {"style"}),
        ("( one - 9 - four )", {"style"}),
        ("( one - four - nine )", {"numbers"}),
        ("1, 9, 4", {"frame", "joiner", "style"}),
        ("", {"frame", "joiner", "style", "numbers"}),
        ("( )", {"frame", "joiner", "style", "numbers"}),
        ("( one - nine - four ) four", {"frame", "joiner", "style", "numbers"}),
    ],
)
def test_checker_says_which_part_is_wrong(text, wrong):
    found = check(example().prompt, text)
    assert {name for name, fine in found.items() if not fine} == wrong | {"right"}
    assert right([example().prompt], [text]) == [0.0]
    assert graded([example().prompt], [text]) == [sum(found.values()) / 8]
    assert graded([example().prompt], [example().answer]) == [1.0]


def test_no_training_prompt_holds_a_held_out_problem():
    problems = {
        split: {
            one.prompt if one.operation == "Add" else (one.operation, one.numbers)
            for one in instructions(3, 800, split)
        }
        for split in SHARES
    }
    for one, other in itertools.combinations(problems, 2):
        assert not problems[one] & problems[other]
    for split in SHARES:
        assert {one.operation for one in instructions(3, 800, split)} == set(OPERATIONS)
    assert instructions(3, 50) == instructions(3, 50) != instructions(4, 50)


def test_demonstrations_mostly_follow_the_habit_and_some_hold_a_slip():
    pairs = demonstrations(0, 2000, habit=0.7, slip=0.1)
    shares = right(*zip(*pairs, strict=True))
    assert 0.25 < sum(shares) / len(shares) < 0.4  # 0.9 (0.3 + 0.7 / 18) is 0.305
    habits = [
        text == write(OPERATIONS[parse(prompt).operation](parse(prompt).numbers), *HABIT)
        for prompt, text in pairs
    ]
    assert 0.55 < sum(habits) / len(habits) < 0.75
    assert {parse(prompt).split for prompt, _ in pairs} == {"train"}
    clean = demonstrations(0, 100, habit=0.0, slip=0.0)
    assert all(right(*zip(*clean, strict=True)))


def test_what_is_no_instruction_is_refused():
    with pytest.raises(ValueError, match="'Dance' is no instruction: write it as 'Reverse 4 9 1"):
        check("Dance", "one")
