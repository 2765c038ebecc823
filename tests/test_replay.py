"""Replayed functions: the same numbers as the function, new shapes and parameters seen."""

import pytest
import torch

from msfs_functional.replay import replayed


def line(params: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return x @ params["w"] + t


@pytest.mark.gpu
def test_replays_give_what_the_function_gives_and_see_what_is_written_into_parameters():
    params, calls = {"w": torch.randn(3, 3, device="cuda")}, []

    def fn(*args: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return line(*args)  # pyright: ignore[reportArgumentType]

    run = replayed(fn)
    with torch.no_grad():
        outs = []
        for n in range(5):
            x, t = torch.full((2, 3), float(n), device="cuda"), torch.tensor(n / 3, device="cuda")
            if n == 4:
                params["w"].mul_(2)
            outs.append((run(params, x, t), line(params, x, t)))
        for found, expected in outs:
            torch.testing.assert_close(found, expected)
        assert len(calls) == 2  # as it is, and recorded
        x, t = torch.ones(5, 3, device="cuda"), torch.zeros((), device="cuda")
        other = {"w": torch.eye(3, device="cuda")}
        for _ in range(3):
            torch.testing.assert_close(run(params, x, t), line(params, x, t))
            torch.testing.assert_close(run(other, x, t), x)
    x.requires_grad_()
    assert run(params, x, t).requires_grad


def test_on_a_cpu_it_is_the_function():
    params, x = {"w": torch.eye(3)}, torch.ones(2, 3)
    assert torch.equal(replayed(line)(params, x, torch.tensor(1.0)), x + 1)
