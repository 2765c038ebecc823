"""A reward is any function (prompts, completions, metadata) -> a number for each completion.

    def short(prompts, completions, metadata):
        return [-len(text) for text in completions]

    score = mixture({short: 0.1, right: 1.0})
    values = called(score, prompts, completions, metadata)      # float32 (B,), or a RewardError

Prompts and completions are texts or lists of ids, as the function likes; metadata is a list with
what the data says of each prompt, or None. A rule, a program check, a trained reward model and a
mixture of them are such functions alike.
"""

import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Values = Sequence[float] | Float[Tensor, "B"]
RewardFn = Callable[[Sequence[Any], Sequence[Any], Sequence[Any] | None], Values]


class RewardError(ValueError):
    """A reward that gave nothing to learn from."""


def name_of(reward: RewardFn) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def called(
    reward: RewardFn,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    metadata: Sequence[Any] | None = None,
) -> Float[Tensor, "B"]:
    """The rewards, checked: float32, finite, one a completion; on the device they came on.

    Raises:
        RewardError: the function raised, or gave something else; says what.
    """
    name = name_of(reward)
    try:
        values = reward(prompts, completions, metadata)
        found = torch.as_tensor(values).detach().to(torch.float32)
    except Exception as error:  # anything may go wrong in a user's function
        raise RewardError(
            f"reward {name} raised {type(error).__name__}: {error}: it must take any completion"
        ) from error
    if found.shape != (len(completions),):
        raise RewardError(
            f"reward {name} gave values of shape {tuple(found.shape)} for {len(completions)} "
            "completions: it must return one number each"
        )
    if bad := (~found.isfinite()).nonzero()[:, 0].tolist():
        raise RewardError(
            f"reward {name} gave {float(found[bad[0]])} for completion {bad[0]} "
            f"({completions[bad[0]]!r}): it must return finite numbers"
        )
    return found


def mixture(parts: Mapping[RewardFn, float]) -> RewardFn:
    """The weighted sum of several rewards; its error names the one that failed.

    Raises:
        ValueError: no parts, or some that take texts beside some that take tokens.
    """
    kinds = {takes_tokens(fn) for fn in parts}
    if len(kinds) != 1:
        names = [name_of(fn) for fn in parts if not takes_tokens(fn)]
        raise ValueError(
            f"the parts of a mixture must all take texts or all take tokens, and of {len(parts)} "
            f"{names} take texts: wrap those with over_texts(reward, tokenizer.decode)"
        )

    def mixed(prompts: Sequence[Any], completions: Sequence[Any], metadata: Any) -> Tensor:
        terms = [w * called(fn, prompts, completions, metadata) for fn, w in parts.items()]
        return torch.stack(terms).sum(0)

    mixed.__name__ = " + ".join(f"{weight:g} {name_of(fn)}" for fn, weight in parts.items())
    return on_tokens(mixed) if kinds == {True} else mixed


@dataclass
class Patience:
    """Lets so many steps in a row go without a reward, and no more.

        patience = Patience(3)
        try:
            values = called(reward, ...)
        except RewardError as error:
            note(patience.skip(step, error))       # raises at the third in a row
            continue
        patience.fine()

    Args:
        most: failures in a row after which the run stops, at least 1.
    """

    most: int
    failed: int = 0  # in a row
    skipped: int = 0  # in all

    def __post_init__(self):
        if self.most < 1:
            raise ValueError(f"most ({self.most}) must be at least 1 failure")

    def skip(self, step: int, error: RewardError) -> str:
        """What to tell of a skipped step.

        Raises:
            RewardError: the most failures in a row are reached.
        """
        self.failed, self.skipped = self.failed + 1, self.skipped + 1
        if self.failed >= self.most:
            raise RewardError(
                f"step {step}: {error}; {self.failed} steps in a row had no reward, the most that "
                "the run bears: mend the reward, then --resume"
            ) from error
        return f"step {step} is skipped: {error}"

    def fine(self) -> None:
        self.failed = 0


def on_tokens(reward: RewardFn) -> RewardFn:
    """Marks a reward that takes lists of ids in place of texts."""
    reward.on_tokens = True  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def takes_tokens(reward: RewardFn) -> bool:
    return bool(getattr(reward, "on_tokens", False))


def over_texts(
    reward: RewardFn, decode: Callable[[Sequence[Sequence[int]]], Sequence[str]]
) -> RewardFn:
    """A reward on texts as one on tokens, to stand in a `mixture` beside a reward model.

    Args:
        decode: ids of many rows to their texts, as a tokenizer's.
    """

    def decoded(prompts: Sequence[Any], completions: Sequence[Any], metadata: Any) -> Values:
        return reward(decode(prompts), decode(completions), metadata)

    decoded.__name__ = name_of(reward)
    return on_tokens(decoded)


def load(place: str) -> RewardFn:
    """The function of a Python file: load("my_rewards.py:polite").

    Raises:
        ValueError: no such file or function, or an error in the file.
    """
    path, _, name = place.rpartition(":")
    if not path.endswith(".py") or not name:
        raise ValueError(f"reward ({place!r}) must be FILE.py:FUNCTION")
    if not Path(path).is_file():
        raise ValueError(f"reward ({place!r}): there is no file {path}; check the path")
    try:
        found = runpy.run_path(path)
    except Exception as error:  # whatever the user's file does
        raise ValueError(f"{path} raised {type(error).__name__}: {error}; mend the file") from error
    if not callable(found.get(name)):
        known = sorted(n for n, v in found.items() if callable(v) and not n.startswith("_"))
        raise ValueError(f"{path} has no function {name!r}; it has {known}")
    return found[name]
