"""The results of the study: a line of JSON for each finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plan import Job, Results, Run

#: The results of the searches, by task and seed.
Searches = dict[tuple[str, int], dict[str, Any]]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS, SEARCHES = HERE / "results.jsonl", HERE / "searches.jsonl"


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
    """Append the line of a run."""
    rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
    write_line(path, {"job": run.job._asdict(), **rounded})


def read_searches(path: Path) -> Searches:
    """The results of all searches."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = map(json.loads, lines)
    return {(values["task"], values["seed"]): values for values in found}


def write_line(path: Path, values: dict[str, Any]) -> None:
    """Append a line; the processes do it in turn, since a short line is written at once."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")
