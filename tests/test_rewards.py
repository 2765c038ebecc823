"""Rewards are any functions: what comes back is checked; a failure costs a step, not the run."""

import math

import pytest
import torch

from msfs_functional.rewards import (
    Patience,
    RewardError,
    called,
    load,
    mixture,
    on_tokens,
    over_texts,
    takes_tokens,
)


def length(prompts, completions, metadata=None):
    return [len(text) for text in completions]


def bonus(prompts, completions, metadata):
    return torch.tensor([float(each) for each in metadata])


def test_a_reward_takes_texts_or_tokens_and_gives_a_list_or_a_tensor():
    assert called(length, ["a"] * 2, ["bc", "d"]).tolist() == [2.0, 1.0]
    assert called(length, [[1]] * 2, [[2, 3], []]).tolist() == [2.0, 0.0]
    assert called(bonus, ["a"] * 2, ["b"] * 2, [3, 4]).dtype == torch.float32
    assert not takes_tokens(length)
    assert takes_tokens(on_tokens(lambda *_: []))


def test_a_mixture_is_the_weighted_sum_and_a_reward_itself():
    both = mixture({length: 0.5, bonus: 2.0})
    assert called(both, ["a"] * 2, ["bc", "d"], [1, 0]).tolist() == [3.0, 0.5]
    with pytest.raises(RewardError, match="length \\+ 2 broken raised RewardError: reward broken"):
        called(mixture({length: 1.0, broken: 2.0}), ["a"], ["b"])


def test_a_mixture_takes_a_rule_on_texts_beside_a_model_on_tokens():
    def decode(rows):
        return ["".join(map(str, ids)) for ids in rows]

    model = on_tokens(lambda prompts, completions, metadata: [float(sum(c)) for c in completions])
    rule = over_texts(length, decode)
    both = mixture({model: 1.0, rule: 10.0})
    assert takes_tokens(both)
    assert called(both, [[1]] * 2, [[12, 3], [4]]).tolist() == [45.0, 14.0]
    with pytest.raises(ValueError, match=r"\['length'\] take texts: wrap those with over_texts"):
        mixture({model: 1.0, length: 1.0})
    with pytest.raises(ValueError, match="of 0"):
        mixture({})


def broken(prompts, completions, metadata):
    raise KeyError("score")


@pytest.mark.parametrize(
    "reward, message",
    [
        (broken, "reward broken raised KeyError: 'score'"),
        (lambda p, c, m: [1.0], r"shape \(1,\) for 2 completions: it must return one number each"),
        (lambda p, c, m: [[1.0], [2.0]], r"shape \(2, 1\)"),
        (lambda p, c, m: [1.0, math.nan], "gave nan for completion 1 \\('d'\\)"),
        (lambda p, c, m: [math.inf, 0.0], "gave inf for completion 0"),
        (lambda p, c, m: ["good", "bad"], "raised"),
        (lambda p, c, m: None, "raised"),
    ],
)
def test_what_no_one_can_learn_from_is_named(reward, message):
    with pytest.raises(RewardError, match=message):
        called(reward, ["a"] * 2, ["bc", "d"])


def test_patience_skips_and_stops_at_the_stated_number():
    patience, error = Patience(2), RewardError("no score")
    assert patience.skip(7, error) == "step 7 is skipped: no score"
    patience.fine()
    patience.skip(8, error)
    with pytest.raises(RewardError, match="step 9: no score; 2 steps in a row had no reward"):
        patience.skip(9, error)
    assert patience.skipped == 3
    with pytest.raises(ValueError, match="at least 1"):
        Patience(0)


def test_a_reward_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def polite(prompts, completions, metadata):\n    return [1.0] * len(prompts)\n"
    )
    assert called(load(f"{path}:polite"), ["a"], ["b"]).tolist() == [1.0]
    (tmp_path / "bad.py").write_text("1 / 0\n")
    for place, message in {
        "polite": "must be FILE.py:FUNCTION",
        f"{path}:rude": r"no function 'rude'; it has \['polite'\]",
        f"{tmp_path}/none.py:polite": "there is no file",
        f"{tmp_path}/bad.py:polite": "raised ZeroDivisionError",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(place)
