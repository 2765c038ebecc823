"""Schedules: hand-worked values, shape of the curves, no recompile, clear errors."""

import math
from typing import get_args

import pytest
import torch

from msfs_functional import schedules

EVERY = {
    "constant": schedules.constant(1.0, warmup=10),
    "linear": schedules.linear(1.0, 100, warmup=10),
    "cosine": schedules.cosine(1.0, 100, warmup=10),
    "wsd": schedules.warmup_stable_decay(1.0, 100, warmup=10, decay=20),
    "wsd_sqrt": schedules.warmup_stable_decay(1.0, 100, warmup=10, decay=20, shape="sqrt"),
    "inverse_square_root": schedules.inverse_square_root(1.0, warmup=10),
}


def at(schedule: schedules.Schedule, count: int) -> float:
    return schedule(torch.tensor(count)).item()


@pytest.mark.parametrize("name", EVERY)
def test_warm_up_is_a_line_from_one_nth_to_the_peak(name: str):
    values = EVERY[name](torch.arange(10))
    torch.testing.assert_close(values, torch.arange(1, 11) / 10)


@pytest.mark.parametrize("name", EVERY)
def test_rate_is_0d_float32_and_never_rises_after_the_warm_up(name: str):
    rate = EVERY[name](torch.tensor(3))
    assert rate.shape == () and rate.dtype == torch.float32
    after = EVERY[name](torch.arange(10, 200))
    assert (after.diff() <= 0).all() and (after >= 0).all()


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "wsd_sqrt"])
def test_end_is_reached_at_steps_and_held(name: str):
    assert at(EVERY[name], 99) > 0
    assert at(EVERY[name], 100) == at(EVERY[name], 10_000) == 0


def test_hand_worked_values():
    assert at(schedules.linear(2.0, 100, end=1.0), 50) == pytest.approx(1.5)
    assert at(schedules.linear(1.0, 110, warmup=10), 60) == pytest.approx(0.5)
    assert at(schedules.cosine(1.0, 100), 25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert at(schedules.cosine(1.0, 100, end=0.1), 50) == pytest.approx(0.55)
    assert at(EVERY["wsd"], 80) == 1.0
    assert at(EVERY["wsd"], 95) == pytest.approx(0.25)
    assert at(EVERY["wsd_sqrt"], 85) == pytest.approx(0.5)
    assert at(EVERY["inverse_square_root"], 39) == pytest.approx(0.5)


def test_noam_is_equation_3_of_the_paper():
    rate_fn = schedules.noam(512, warmup=4000)
    for step in (1, 100, 4000, 4001, 100_000):
        expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
        assert at(rate_fn, step - 1) == pytest.approx(expected, rel=1e-6)


def test_names_of_a_command_line_are_the_schedules():
    by_name = {
        "inverse_square_root": schedules.inverse_square_root(1.0, warmup=5),
        "cosine": schedules.cosine(1.0, 50, warmup=5),
        "linear": schedules.linear(1.0, 50, warmup=5),
        "wsd": schedules.warmup_stable_decay(1.0, 50, warmup=5, decay=10),
        "constant": schedules.constant(1.0, warmup=5),
    }
    assert set(by_name) == set(get_args(schedules.Name))
    counts = torch.arange(60)
    for name, expected in by_name.items():
        found = schedules.named(name, 1.0, 50, warmup=5)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found(counts), expected(counts)), name


def test_compiled_schedule_never_recompiles_as_the_count_advances():
    rate_fn = torch.compile(EVERY["cosine"], fullgraph=True)
    rate_fn(torch.tensor(0))
    with torch.compiler.set_stance("fail_on_recompile"):
        rates = [rate_fn(torch.tensor(count)) for count in range(100)]
    torch.testing.assert_close(torch.stack(rates), EVERY["cosine"](torch.arange(100)))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: schedules.cosine(-1.0, 10), "-1.0"),
        (lambda: schedules.cosine(math.nan, 10), "nan"),
        (lambda: schedules.linear(1.0, 10, end=-0.5), "-0.5"),
        (lambda: schedules.linear(1.0, 0), "steps (0)"),
        (lambda: schedules.linear(1.0, 10, warmup=10), "warmup (10)"),
        (lambda: schedules.constant(1.0, warmup=-3), "warmup (-3)"),
        (lambda: schedules.warmup_stable_decay(1.0, 10, warmup=5, decay=6), "decay (6)"),
        (lambda: schedules.warmup_stable_decay(1.0, 9, warmup=5, decay=1, shape="x"), "'x'"),  # pyright: ignore
        (lambda: schedules.inverse_square_root(1.0, warmup=0), "warmup (0)"),
        (lambda: schedules.noam(0), "width (0)"),
    ],
)
def test_bad_arguments_raise_naming_the_value(make, said: str):
    with pytest.raises(ValueError) as error:
        make()
    assert said in str(error.value)
