"""``tfimm-lora check``: find everything that is wrong with a folder of pictures."""

from __future__ import annotations

import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from tfimm_lora.cli.app import FAILED, Json, app, emit, note
from tfimm_lora.cli.outputs import Overwrite, new_file, refuse_to_overwrite
from tfimm_lora.cli.tables import show_table
from tfimm_lora.cli.tasks import (
    CLASSES_HELP,
    COLUMNS_HELP,
    MASKS_HELP,
    TASK_HELP,
    parse_columns,
)
from tfimm_lora.finetuning.data.check import DataCheck, check_data
from tfimm_lora.finetuning.data.dataset import Split
from tfimm_lora.finetuning.data.findings import count
from tfimm_lora.finetuning.report.formatting import readable
from tfimm_lora.finetuning.run import split_text
from tfimm_lora.finetuning.tasks.named import DEFAULT, targets_of

EXAMPLES = """Examples:

tfimm-lora check pictures

tfimm-lora check labels.csv --usable usable.csv

tfimm-lora check tags.csv --task multilabel

tfimm-lora check pictures --masks masks --task segmentation

tfimm-lora check pictures --json
"""

#: The number of pictures that are listed without --all.
_SHOWN = 20


@app.command("check", epilog=EXAMPLES)
def check_command(
    pictures: Annotated[
        Path,
        typer.Argument(
            help="A folder of class folders; or of train/, val/ and test/ with class folders; "
            "or a CSV file with path,label."
        ),
    ],
    task: Annotated[str, typer.Option(help=TASK_HELP, show_default=False)] = DEFAULT,
    columns: Annotated[str | None, typer.Option(help=COLUMNS_HELP)] = None,
    masks: Annotated[str | None, typer.Option(help=MASKS_HELP)] = None,
    classes: Annotated[str | None, typer.Option(help=CLASSES_HELP)] = None,
    usable: Annotated[
        Path | None,
        typer.Option(
            help="Write a CSV file of the pictures that can be used, for finetune --data."
        ),
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of pictures for validation, as for finetune.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the split, as for finetune.")] = 0,
    show_all: Annotated[
        bool, typer.Option("--all", help="List all pictures that cannot be used.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Read all pictures and report everything that is wrong with them.

    finetune does the same first. The exit code is 1 if there are errors, which
    stop finetune, or pictures that it would leave out.
    """
    if usable is not None:
        refuse_to_overwrite(usable, overwrite)
    bar = sys.stderr.isatty() and not as_json
    checked = check_data(
        pictures,
        targets=targets_of(task, parse_columns(columns), masks, classes),
        validation=validation,
        seed=seed,
        say=note,
        progress=_show_progress if bar else None,
    )
    if usable is not None and checked.split is not None:
        with new_file(usable, overwrite) as temporary:
            text = split_text(checked.split)
            Path(temporary).write_text(text, encoding="utf-8", errors="surrogateescape")
        note(f"written: {usable}")
    data = _data_options(pictures, task, columns, masks, classes)
    emit(_as_data(pictures, checked), as_json, lambda: _show(data, checked, show_all))
    if usable is not None and checked.split is None:
        note(f"not written: {usable}, because too few pictures can be used")
    if checked.errors or checked.problems:
        raise typer.Exit(FAILED)


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\r{done:,} of {total:,} pictures", end=end, file=sys.stderr, flush=True)


def _as_data(pictures: Path, checked: DataCheck) -> dict[str, Any]:
    return {
        "data": str(pictures),
        "counts": {} if checked.split is None else _counts(checked.split),
        "errors": [{"message": x.message, "files": list(x.files)} for x in checked.errors],
        "left_out": [
            {"path": x.path, "label": x.label, "reason": x.reason} for x in checked.problems
        ],
        "warnings": [{"message": x.message, "files": list(x.files)} for x in checked.warnings],
    }


def _counts(split: Split) -> dict[str, dict[str, int]]:
    """The number of pictures of each class in each part."""
    parts = {name: part.counts() for name, part in split.parts().items()}
    return {
        label: {name: numbers[label] for name, numbers in parts.items()}
        for label in split.labels
    }


def _data_options(
    pictures: Path, task: str, columns: str | None, masks: str | None, classes: str | None
) -> list[str]:
    """The arguments of a command that describe the data."""
    options = [shlex.quote(str(pictures))]
    if task != DEFAULT:
        options.append(f"--task {task}")
    given = {"--columns": columns, "--masks": masks, "--classes": classes}
    options += [f"{name} {shlex.quote(x)}" for name, x in given.items() if x is not None]
    return options


def _show(data: list[str], checked: DataCheck, show_all: bool) -> None:
    if checked.split is not None:
        _show_counts(checked.split, Counter(x.label for x in checked.problems))
    for title, findings in (("error", checked.errors), ("warning", checked.warnings)):
        for finding in findings:
            print(f"\n{title}: {readable(finding.message)}")
    shown = checked.problems if show_all else checked.problems[:_SHOWN]
    if shown:
        print(f"\n{count(len(checked.problems), 'picture')} cannot be used:")
    for problem in shown:
        print(f"  {readable(problem.path)}: {readable(problem.reason)}")
    if len(shown) < len(checked.problems):
        print(f"  and {len(checked.problems) - len(shown)} more; --all lists them")
    print(f"\n{_verdict(data, checked)}")


def _show_counts(split: Split, left_out: Counter[str]) -> None:
    header, rows = split.targets.table(split, left_out)
    show_table(header, [[readable(row[0]), *row[1:]] for row in rows])


def _verdict(given: list[str], checked: DataCheck) -> str:
    """What finetune does with these pictures, and how to continue."""
    others = [option for option in given[1:] if not option.startswith("--masks")]
    data, rest = " ".join(given), "".join(f" {option}" for option in others)
    if not checked.errors and not checked.problems:
        return f"finetune --data {data} can use all {len(checked.split or ())} pictures"
    continuing = (
        f"Repair the data, or continue without the files concerned:\n"
        f"  tfimm-lora check {data} --usable usable.csv\n"
        f"  tfimm-lora finetune --data usable.csv{rest} ..."
    )
    if checked.split is None:
        return f"{count(len(checked.errors), 'error')}: too few pictures can be used"
    if checked.errors:
        return f"{count(len(checked.errors), 'error')} would stop finetune. {continuing}"
    left = count(len(checked.problems), "picture")
    return f"finetune --data {data} would leave out {left}"
