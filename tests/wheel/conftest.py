"""The sdist and the wheel, which all tests of this folder install from."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    """Run a command to its end; return what it printed."""
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        **options,
    )
    printed = done.stdout[-3000:] + done.stderr[-3000:]
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{printed}"
    return done.stdout


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    from filelock import FileLock

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # made once for all workers of a session
        folder = folder.parent
    with FileLock(folder / "dist.lock"):
        if not any((folder / "dist").glob("*.whl")):
            run(sys.executable, "-m", "build", "--outdir", folder / "dist", ROOT)
    return folder / "dist"
