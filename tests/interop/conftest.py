"""Without torch and timm, or on Keras 3, these tests are left out."""

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
