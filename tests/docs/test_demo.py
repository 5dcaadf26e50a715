"""The demo of `make demo`, in a short run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kerases import LEGACY

ROOT = Path(__file__).parents[2]


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_demo_runs_and_its_export_predicts_the_same(tmp_path):
    program = [
        sys.executable,
        str(ROOT / "demo" / "digits.py"),
        "--quick",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Identical predictions in a fresh process: yes" in done.stdout
    for name in ("report.png", "model.keras", "logits.npy"):
        assert (tmp_path / name).stat().st_size > 1000
