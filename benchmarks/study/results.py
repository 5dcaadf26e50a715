"""The results of the study: a line of JSON for each finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plan import Job, Results, Run

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.jsonl"


def read_results(path: Path) -> Results:
    """The results of all finished runs."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    results = {}
    for line in lines:
        values = json.loads(line)
        run = Run(Job(**values.pop("job")), values["rate"], values["seed"])
        results[run] = values
    return results


def write_result(path: Path, run: Run, result: dict[str, Any]) -> None:
    """Append a line; the processes do it in turn, since a short line is written at once."""
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
    line = json.dumps({"job": run.job._asdict(), **rounded}) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)
