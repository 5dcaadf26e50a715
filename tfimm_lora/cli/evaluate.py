"""``tfimm-lora evaluate``: evaluate a fine-tuned model on labelled pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tfimm_lora.cli.app import Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.outputs import Overwrite, refuse_to_overwrite
from tfimm_lora.cli.tables import show_facts, show_table
from tfimm_lora.cli.unfinished import warn_if_unfinished
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, list_pictures
from tfimm_lora.finetuning.data.findings import WARNING, raise_errors, some
from tfimm_lora.finetuning.data.listing import UNSPLIT
from tfimm_lora.finetuning.data.mask_targets import MaskTargets
from tfimm_lora.finetuning.data.picture_files import natural_order
from tfimm_lora.finetuning.data.pictures import check_pictures
from tfimm_lora.finetuning.evaluation import evaluate_pictures
from tfimm_lora.finetuning.report.formatting import readable
from tfimm_lora.finetuning.run import SPLIT, Run
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.utils.atomic_files import write_file

EXAMPLES = """Examples:

tfimm-lora evaluate runs/flowers

tfimm-lora evaluate runs/flowers --data more-pictures --out evaluation

tfimm-lora evaluate runs/flowers --data labels.csv --json

tfimm-lora evaluate runs/streets --data pictures --masks masks
"""


@app.command("evaluate", epilog=EXAMPLES)
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finetune run.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder of class folders, or a CSV file with path,label; if it is split, "
            "its test part or else its val part. Default: the validation pictures of the run."
        ),
    ] = None,
    masks: Annotated[
        str | None, typer.Option(help="For segmentation: the folder of the masks of --data.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for predictions.csv and drawings: confusion.png, mistakes.png."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per batch.")] = 32,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Evaluate a fine-tuned model on labelled pictures.

    Pictures that cannot be read are listed on stderr and skipped.
    """
    if out is not None:
        refuse_to_overwrite(out, overwrite)
    opened = Run.open(run)
    warn_if_unfinished(opened)
    if masks is not None and (data is None or not opened.task.is_dense):
        raise ValueError(
            f"Received --masks {masks}; expected it only with --data, for a segmentation."
        )
    found = opened.split.val
    if data is not None:
        found = labelled_pictures(data, opened.task, masks)
    pictures, problems = check_pictures(found)
    for problem in problems:
        note(f"skipped {readable(problem.path)}: {readable(problem.reason)}")
    seen = trained_on(opened, pictures)
    if seen:
        note(f"{seen} of {len(pictures)} pictures were used for training")
    import_tensorflow()
    task = opened.task
    evaluation = evaluate_pictures(
        opened.model(), pictures, opened.preprocessing, task=task, batch_size=batch_size
    )
    if out is not None:
        write(task, evaluation, out)
        note(f"written: {out}")
    result = {
        "run": str(run),
        "data": None if data is None else str(data),
        **evaluation.to_dict(),
        "trained_on": seen,
        "skipped": [{"path": x.path, "reason": x.reason} for x in problems],
    }
    emit(result, as_json, lambda: show(task, evaluation))


def labelled_pictures(data: Path, task: Task, masks: str | None = None) -> PictureSet:
    """Find the pictures in a folder or CSV file that a model is evaluated on.

    If the data are split, these are the pictures of test or, if there are none, of val; else
    all pictures. ``masks`` is the folder of the masks of a segmentation.

    Raises:
        FileNotFoundError: if ``data`` does not exist.
        ValueError: if there are no pictures, or one has a label that the model does not have.
    """
    targets, labels = task.known_targets(), task.labels
    if isinstance(targets, MaskTargets):
        targets = dataclasses.replace(targets, masks=masks)
    if not data.exists():
        raise FileNotFoundError(
            f"Received --data {data}, which does not exist; expected {targets.sources}."
        )
    listing = list_pictures(data, targets)
    targets = targets.resolved(listing)
    raise_errors(listing.findings)
    for finding in listing.findings:
        if finding.level == WARNING:
            note(f"warning: {finding.message}")
    parts = listing.parts
    found = next((parts[name] for name in ("test", "val", UNSPLIT) if parts.get(name)), [])
    if not found:
        raise ValueError(
            f"Received --data {data}, which has no pictures to evaluate on; expected at least "
            "one."
        )
    named = {name for x in found for name in targets.names_in(x.label)}
    unknown = sorted(named - set(labels), key=natural_order)
    if unknown:
        raise ValueError(
            f"{data} has {len(unknown)} {targets.nouns} that the model was not trained on: "
            f"{some(unknown)}; expected only its {targets.nouns}: {some(labels, 20)}."
        )
    listed = tuple(Picture(x.path, targets.label(x.label, labels)) for x in sorted(found))
    return PictureSet(listed, labels, targets)


def trained_on(run: Run, pictures: PictureSet) -> int:
    """The number of pictures that were used for training, which make the results too good."""
    with open(run.path / SPLIT, newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    known = {os.path.realpath(row["path"]) for row in rows}
    return sum(os.path.realpath(picture.path) in known for picture in pictures.pictures)


def write(task: Task, evaluation: Any, folder: Path) -> None:
    """Write the files of ``--out``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in task.views.drawings(evaluation).items():
        draw(folder / name)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerows(task.views.prediction_rows(evaluation))
    write_file(folder / "predictions.csv", text.getvalue())


def show(task: Task, evaluation: Any) -> None:
    """Print a table of the classes and the metrics over all pictures."""
    show_table(*task.views.table(evaluation))
    print()
    show_facts(task.views.facts(evaluation))
