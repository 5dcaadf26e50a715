"""An application over a bank in NumPy."""

import contextlib

import pytest

from tfimm_lora.backend import installed

# Without the extra "serve" each module of tests is skipped.
if installed("fastapi"):
    from tests.helpers.served import NumPyBank, started, write_adapter


def write_adapters(folder):
    """Write two adapters with labels and one without."""
    folder.mkdir()
    write_adapter(folder, "rose", seed=1)
    write_adapter(folder, "oak", seed=2, classes=7)
    write_adapter(folder, "bare", seed=3, labels=False)
    return folder


@pytest.fixture
def adapters(tmp_path):
    return write_adapters(tmp_path / "adapters")


@pytest.fixture
def bank():
    return NumPyBank()


@pytest.fixture
def serve(adapters, bank):
    """Start an application with settings; it ends with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda **settings: stack.enter_context(started(adapters, bank, **settings))


@pytest.fixture
def client(serve):
    return serve()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """An application for many requests that change nothing; of at most a million pixels."""
    folder = write_adapters(tmp_path_factory.mktemp("served") / "adapters")
    with started(folder, NumPyBank(), max_pixels=1_000_000) as client:
        yield client
