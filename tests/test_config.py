"""The command line: what it starts from, without arguments, with a preset, with a run of before."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest

from msfs_functional import config as configs


@dataclass(frozen=True)
class Small:
    """A recipe's configuration, as small as one can be."""

    mode: str = "train"
    """what to do"""
    preset: str = "default"
    """what to start from"""
    resume: bool = False
    """go on with a run"""
    overwrite: bool = False
    """delete the run"""
    out: Path = Path("runs")
    """folder of the runs"""
    name: str | None = None
    """the run's folder in out"""
    steps: int = 3
    """of training"""


PRESETS = {"default": Small(), "long": Small(preset="long", steps=9)}


def start(*args: str) -> Small:
    return configs.starting_point(args, PRESETS, modes=("evaluate",))


def test_a_command_line_without_arguments_is_the_default():
    assert configs.option([], "--out") is None
    assert start() == PRESETS["default"]
    assert configs.parse(start(), [], description="", prog="small") == PRESETS["default"]


@pytest.mark.parametrize("args", [["--preset", "long"], ["--preset=long"]])
def test_a_preset_is_found_in_both_spellings(args: list[str]):
    assert start(*args).steps == 9


def test_the_last_of_two_options_wins_and_a_flag_at_the_end_has_no_value():
    assert configs.option(["--out", "a", "--out=b"], "--out") == "b"
    assert configs.option(["--steps", "3", "--out"], "--out") is None


def test_a_mode_and_resume_bring_a_run_back_under_the_name_it_was_found_by(tmp_path: Path):
    (tmp_path / "first").mkdir()
    saved = dataclasses.replace(PRESETS["long"], out=Path("elsewhere"), name="other")
    (tmp_path / "first" / configs.FILE).write_text(configs.to_json(saved))
    for args in (["evaluate"], ["--resume"]):
        config = start(*args, "--out", str(tmp_path), "--name", "first")
        assert (config.steps, config.name, config.out) == (9, "first", tmp_path)
    assert start("evaluate", "--out", str(tmp_path)).name == "first"  # the newest
    with pytest.raises(ValueError, match="does not exist"):
        start("evaluate", "--out", str(tmp_path), "--name", "second")
