"""The experiment that compares the variants of LoRA, in a short run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.kerases import LEGACY

ROOT = Path(__file__).parents[2]
#: One of each kind: without LoRA, with idle factors, compiled anew each time, with a callback.
SOME = ["every weight", "BitFit", "EVA", "RankAllocator"]

pytestmark = pytest.mark.skipif(not LEGACY, reason="of a tfimm model")


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import variants_page

    return variants_page


def run(tmp_path):
    program = [sys.executable, str(ROOT / "benchmarks" / "variants.py"), "--quick"]
    program += ["--out", str(tmp_path / "docs"), "--work", str(tmp_path / "work")]
    return subprocess.run(
        [*program, "--methods", *SOME],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
    )


@pytest.mark.nightly
def test_the_experiment_runs(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "docs" / "variants.json").read_text())
    assert set(results["methods"]) == {*SOME, "LoRA, rank 8"}
    for method in results["methods"].values():
        assert len(method["accuracy"]) == 2 and 0 < method["mean"] < 1
        tried = [float(rate) for rate in method["validation"]]
        assert min(tried) < 1.001 * method["rate"] and max(tried) > 0.999 * method["rate"]
    table = (tmp_path / "docs" / "explanation" / "variants.md").read_text()
    assert table.count("\n| ") == 6
    assert (tmp_path / "docs" / "images" / "variants.svg").read_text().startswith("<?xml")
    assert not (tmp_path / "work").exists()


def test_a_table_is_put_between_its_marks(page, tmp_path):
    method = {
        "mean": 0.9,
        "std": 0.01,
        "difference": {"mean": -0.03, "error": 0.01},
        "trained": 1234,
        "share": 0.05,
        "rate": 0.01,
        "step": {"median": 0.8},
    }
    results = {"reference": "LoRA, rank 8", "methods": {"a": method, "LoRA, rank 8": method}}
    written = tmp_path / "explanation" / "variants.md"
    written.parent.mkdir()
    written.write_text(f"before\n{page.START}\nold\n{page.END}\nafter\n")
    page.write(results, tmp_path)
    text = written.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    others = "1,234 | 5.0 % | 0.01 | 0.80 |"
    assert f"| a | 90.0 ± 1.0 | **\N{MINUS SIGN}3.0 ± 1.0** | {others}" in text
    assert f"| LoRA, rank 8 | 90.0 ± 1.0 |  | {others}" in text
