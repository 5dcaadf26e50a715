"""``tfimm-lora predict``: predict the labels of pictures."""

from __future__ import annotations

import csv
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.cli.app import FAILED, Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.explained_files import ExplainedFiles
from tfimm_lora.cli.mask_files import MaskFiles
from tfimm_lora.cli.outputs import Overwrite, new_file, refuse_to_overwrite
from tfimm_lora.cli.picture_sources import (
    STDIN,
    Problem,
    fetched,
    find_pictures,
    listed,
    note_left_out,
)
from tfimm_lora.cli.tables import show_table
from tfimm_lora.cli.unfinished import warn_if_unfinished
from tfimm_lora.finetuning.evaluation import predict_pictures
from tfimm_lora.finetuning.explained_pictures import LIMITS
from tfimm_lora.finetuning.mask_prediction import predict_masks
from tfimm_lora.finetuning.report.formatting import readable
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.tasks.base import Views
from tfimm_lora.finetuning.tasks.classification_views import UNSURE
from tfimm_lora.finetuning.tasks.segmentation import Segmentation

EXAMPLES = """Examples:

tfimm-lora predict runs/flowers picture.jpg

tfimm-lora predict runs/flowers holiday --top 3 --threshold 0.8

tfimm-lora predict runs/flowers "holiday/**/*.jpg" --csv predictions.csv

tfimm-lora predict runs/flowers holiday --explain explanations

tfimm-lora predict runs/flowers https://example.com/rose.jpg --json

tfimm-lora predict runs/flowers - < picture.jpg

tfimm-lora predict runs/streets pictures --out masks --overlay
"""


@app.command("predict", epilog=EXAMPLES)
def predict_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finetune run.")],
    pictures: Annotated[
        list[str] | None,
        typer.Argument(
            help="Picture files, folders, quoted patterns, URLs, or - for a picture from "
            "standard input."
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of labels to print for a picture. Default: 5 (multilabel: all).",
            show_default=False,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help=f'Answer "{UNSURE}" if the probability of the label is lower. Multilabel: the '
            "threshold of all labels, instead of those of the run.",
        ),
    ] = None,
    files_from: Annotated[
        Path | None,
        typer.Option(help="Read more names from this file, one on a line; - for stdin."),
    ] = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="Write the predictions to this file too."),
    ] = None,
    explain: Annotated[
        Path | None,
        typer.Option(
            help="Write a PNG file for each answer to this folder: the picture with a heat map "
            "of the places that the answer depends on."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Segmentation: write a mask for each picture to this folder (PNG)."),
    ] = None,
    overlays: Annotated[
        bool,
        typer.Option("--overlay", help="Write the pictures with their masks over them, too."),
    ] = False,
    tile: Annotated[
        bool,
        typer.Option(
            "--tile",
            help="Segmentation: cut pictures that are larger than the input of the model into "
            "overlapping tiles, instead of resizing them.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per batch.")] = 32,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the most probable labels of pictures, with their probabilities.

    For several labels, print those above their thresholds, which the run chose
    on its validation pictures; for a regression, numbers with intervals; for a
    segmentation, the share of each class. A mask has the size of its picture,
    which is resized to the input of the model, or cut into tiles (--tile).

    Files that cannot be read are listed on stderr. The others are predicted
    nevertheless, and the exit code is 1. What is left out in folders (files
    that are not pictures, duplicates) is listed too.
    """
    given = list(pictures or [])
    if not given and files_from is None:
        raise typer.BadParameter(
            "expected a picture, folder, pattern, URL or -", param_hint="PICTURES"
        )
    if csv_file is not None:
        refuse_to_overwrite(csv_file, overwrite)
    if explain is not None:
        refuse_to_overwrite(explain, overwrite)
    opened = Run.open(run)
    _check_masks(opened, out, overlays, tile, explain)
    if files_from is not None:
        if str(files_from) == STDIN and STDIN in given:
            raise ValueError(
                "Received - for a picture and for --files-from; expected only one of them, "
                "because there is one standard input."
            )
        given += listed(files_from)
    found = find_pictures(given)
    note_left_out(found)
    for problem in found.missing:
        _note_unreadable(problem)
    unreadable = list(found.missing)
    predictions: list[dict[str, Any]] = []
    explained = None if explain is None else ExplainedFiles(opened, explain, threshold)
    warn_if_unfinished(opened)
    if found.names:
        opened.task.views.check_options(top, threshold)
        masks = None
        if isinstance(opened.task, Segmentation):
            masks = MaskFiles(opened.task, found.names, out, overlays, overwrite, tile)
        predictions, failed = _predict(
            opened, found.names, batch_size, top, threshold, explained, masks
        )
        unreadable += failed
    if csv_file is not None:
        write(opened.task.views, predictions, csv_file, overwrite)
        note(f"written: {csv_file}")
    data = {
        "run": str(run),
        "unfinished": _unfinished(opened),
        "threshold": threshold,
        "explanation": None if explained is None else explained.facts,
        "predictions": predictions,
        "unreadable": [x._asdict() for x in unreadable],
        "left_out": [x._asdict() for x in found.left_out],
    }
    emit(data, as_json, lambda: show(opened.task.views, predictions))
    for line in opened.task.views.notes(predictions, threshold):
        note(line)
    if explained is not None and explained.written:
        note(f"written: {explained.written} explanations in {explain}: {explained.method}")
        note(LIMITS)
    if unreadable:
        total = len(found.names) + len(found.missing)
        note(f"{len(unreadable)} of {total} files could not be read")
        raise typer.Exit(FAILED)


def _check_masks(
    run: Run, out: Path | None, overlays: bool, tile: bool, explain: Path | None
) -> None:
    if tile and not run.task.is_dense:
        raise ValueError(
            f"Received --tile for a {run.task.name}; expected it only for a segmentation."
        )
    if out is not None and not run.task.is_dense:
        raise ValueError(
            f"Received --out {out} for a {run.task.name}; expected none. It writes masks, "
            "which only a segmentation has; --csv writes the predictions of any task."
        )
    if explain is not None and run.task.is_dense:
        raise ValueError(
            f"Received --explain {explain} for a segmentation; expected none. Its answers are "
            "places already: --out and --overlay draw them."
        )
    if overlays and out is None:
        raise ValueError("Received --overlay without --out; expected both.")
    if out is not None and out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; expected the name of a folder.")


def _predict(
    run: Run,
    names: list[str],
    batch_size: int,
    top: int | None,
    threshold: float | None,
    explained: ExplainedFiles | None,
    masks: MaskFiles | None,
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The predictions for pictures, and the pictures that cannot be read."""
    task = run.task
    predictions, unreadable = [], []
    with tempfile.TemporaryDirectory() as folder:
        files = fetched(names, Path(folder))
        readables = {name: file for name, file in files.items() if isinstance(file, str)}
        unreadable += [file for file in files.values() if isinstance(file, Problem)]
        for problem in unreadable:
            _note_unreadable(problem)
        if not readables:
            return [], unreadable
        import_tensorflow()
        model = run.model()
        predict: Callable[..., Any] = predict_pictures
        if masks is not None:
            predict = functools.partial(predict_masks, tile=masks.tile)
        results = predict(
            model,
            list(readables.values()),
            run.preprocessing,
            task=task,
            batch_size=batch_size,
        )
        for name, (file, result) in zip(readables, results):
            if isinstance(result, np.ndarray) and masks is not None:
                predictions.append(masks.answer(name, file, result))
            elif isinstance(result, np.ndarray):
                answer = task.views.answer(name, result, top, threshold)
                if explained is not None:
                    answer["explanations"] = explained.write(model, name, file, result)
                predictions.append(answer)
            else:
                unreadable.append(Problem(name, result.reason))
                _note_unreadable(unreadable[-1])
    return predictions, unreadable


def _note_unreadable(problem: Problem) -> None:
    name = "standard input" if problem.path == STDIN else readable(problem.path)
    note(f"error: cannot read {name}: {readable(problem.reason)}")


def _unfinished(run: Run) -> dict[str, int] | None:
    if run.unfinished is None:
        return None
    done, requested = run.unfinished
    return {"epochs": done, "requested": requested}


def write(views: Views, answers: list[dict[str, Any]], path: Path, overwrite: bool) -> None:
    """Write a CSV file with a row for each picture."""
    with (
        new_file(path, overwrite) as temporary,
        # File names that are not UTF-8 keep their bytes.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(
            _with_files(views.answer_rows(answers), answers, header=True)
        )


def _with_files(
    rows: list[list[Any]], answers: list[dict[str, Any]], header: bool = False
) -> list[list[Any]]:
    """Rows with the files of the explanations in a last column, if there are any."""
    if not answers or "explanations" not in answers[0]:
        return rows
    cells = [", ".join(one["file"] for one in x["explanations"]) for x in answers]
    if header:
        cells = ["explanation", *cells]
    return [[*row, cell] for row, cell in zip(rows, cells)]


def show(views: Views, answers: list[dict[str, Any]]) -> None:
    """Print a line for each picture."""
    if not answers:
        return
    header, rows, text = views.answer_table(answers)
    rows = _with_files(rows, answers)
    if "explanations" in answers[0]:
        header, text = [*header, "explanation"], (*text, "explanation")
    names = ("standard input" if x["path"] == STDIN else readable(x["path"]) for x in answers)
    show_table(["picture", *header], [[name, *row] for name, row in zip(names, rows)], text)
