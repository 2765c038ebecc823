"""Shared set-up: hypothesis without deadlines, one thread a worker, GPU tests where a GPU is, tests
of several processes first."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("msfs", deadline=None, max_examples=20, print_blob=True)
settings.load_profile("msfs")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Three minutes of one test at the end would leave the other worker without work.
    items.sort(key=lambda item: "ranks" not in item.keywords)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiled graphs of one test never count against another test's recompile limit."""
    torch._dynamo.reset()
    yield


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch):
    """compile_with(backend): torch.compile is by that backend, without options for Inductor."""
    plain = torch.compile

    def set_backend(backend):
        monkeypatch.setattr(
            torch, "compile", lambda fn, options=None, **rest: plain(fn, backend=backend, **rest)
        )
        return backend

    return set_backend
