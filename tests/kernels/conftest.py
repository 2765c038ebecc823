"""What the kernels' tests share: the process that interprets Triton."""

import pytest
from interpreting import interpreting


@pytest.fixture(scope="session")
def interpreter():
    """interpreter(fn, *args): fn in the process with TRITON_INTERPRET=1."""
    with interpreting() as run:
        yield run


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def on_kernels(request: pytest.FixtureRequest):
    """on_kernels(fn, *args): fn with Triton interpreted, and once more here, on a GPU."""
    if request.param == "interpreted":
        return request.getfixturevalue("interpreter")
    return lambda fn, *args: fn(*args)
