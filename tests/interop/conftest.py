"""Without torch, timm and PEFT, or on Keras 3, these tests are left out."""

import os
from pathlib import Path

import pytest

from tests.helpers.kerases import LEGACY
from tests.interop import MISSING

collect_ignore_glob = ["test_*.py"] if MISSING or not LEGACY else []

if not collect_ignore_glob:
    import torch

    # Tests run side by side.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.interop)


def _hugging_face(version, tmp_path_factory):
    """The models of a version of transformers, made once for all workers of a session."""
    from filelock import FileLock

    from tests.interop.hugging_face.environments import Environment, missing

    if missing(version):
        pytest.skip(missing(version))
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    environment = Environment(version, folder / f"transformers-{version}")
    with FileLock(folder / f"transformers-{version}.lock"):
        if not (environment.folder / "index.json").exists():
            environment.run("make", environment.folder)
    return environment


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory):
    """The small models and adapters that transformers 4 and PEFT made."""
    return _hugging_face("4", tmp_path_factory)


@pytest.fixture(scope="session")
def transformers_5(tmp_path_factory):
    """The small models and adapters that transformers 5 and PEFT made."""
    return _hugging_face("5", tmp_path_factory)


@pytest.fixture(params=["4", "5"])
def hugging_face(request):
    """The small models and adapters of each version of transformers in turn."""
    return request.getfixturevalue(f"transformers_{request.param}")
