"""The files of results: one for each method, task and seed."""

import json

from tfimm_lora.utils.atomic_files import write_file


def result_path(out, name, task, seed):
    return out / f"{name}-{task}-{seed}.json"


def read_result(path):
    """The content of a result; None if there is none yet."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def as_json(value):
    """A value as it is after it was written and read: tuples are lists."""
    return json.loads(json.dumps(value))


def write_result(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(result, indent=1) + "\n")


def all_results(out):
    """Every result in a folder, by file name."""
    return {path.name: read_result(path) for path in sorted(out.glob("*.json"))}


def check_same(path, what, found, expected):
    """Raise a ValueError that names what differs between a file and this run."""
    different = sorted(
        key for key in {**found, **expected} if found.get(key) != expected.get(key)
    )
    if different:
        listed = "; ".join(f"{k}={found.get(k)}, now {expected.get(k)}" for k in different)
        raise ValueError(
            f"The run in {path} was started with another {what}: {listed}; expected the same. "
            "Use another --out or --name, or delete the file."
        )
