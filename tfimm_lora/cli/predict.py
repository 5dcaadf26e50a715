"""``tfimm-lora predict``: predict the labels of pictures."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.cli.app import FAILED, Json, app, emit, import_tensorflow, note
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
from tfimm_lora.finetuning.report.formatting import probability, readable
from tfimm_lora.finetuning.run import Run

EXAMPLES = """Examples:

tfimm-lora predict runs/flowers picture.jpg

tfimm-lora predict runs/flowers holiday --top 3 --threshold 0.8

tfimm-lora predict runs/flowers "holiday/**/*.jpg" --csv predictions.csv

tfimm-lora predict runs/flowers https://example.com/rose.jpg --json

tfimm-lora predict runs/flowers - < picture.jpg
"""

#: The answer below the threshold.
UNSURE = "unsure"


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
        int, typer.Option(min=1, help="The number of labels to print for a picture.")
    ] = 5,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help=f'Answer "{UNSURE}" if the probability of the label is lower.',
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
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures per batch.")] = 32,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Print the most probable labels of pictures, with their probabilities.

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
    opened = Run.open(run)
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
    warn_if_unfinished(opened)
    if found.names:
        predictions, failed = _predict(opened, found.names, batch_size, top, threshold)
        unreadable += failed
    if csv_file is not None:
        write(predictions, csv_file, overwrite)
        note(f"written: {csv_file}")
    data = {
        "run": str(run),
        "unfinished": _unfinished(opened),
        "threshold": threshold,
        "predictions": predictions,
        "unreadable": [x._asdict() for x in unreadable],
        "left_out": [x._asdict() for x in found.left_out],
    }
    emit(data, as_json, lambda: show(predictions))
    unsure = sum(bool(x.get("unsure")) for x in predictions)
    if threshold is not None:
        note(f"{unsure} of {len(predictions)} pictures are below the threshold {threshold:g}")
    if unreadable:
        total = len(found.names) + len(found.missing)
        note(f"{len(unreadable)} of {total} files could not be read")
        raise typer.Exit(FAILED)


def _predict(
    run: Run, names: list[str], batch_size: int, top: int, threshold: float | None
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The predictions for pictures, and the pictures that cannot be read."""
    labels, preprocessing = run.labels, run.preprocessing
    if threshold is not None and UNSURE in labels:
        note(f'warning: a class is called "{UNSURE}"; "unsure" in the JSON tells them apart')
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
        results = predict_pictures(
            run.model(), list(readables.values()), preprocessing, batch_size=batch_size
        )
        for name, (_, result) in zip(readables, results):
            if isinstance(result, np.ndarray):
                predictions.append(_prediction(name, result, labels, top, threshold))
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


def _prediction(
    path: str,
    probabilities: np.ndarray,
    labels: list[str],
    top: int,
    threshold: float | None,
) -> dict[str, Any]:
    best = np.argsort(-probabilities, kind="stable")[:top]
    ranked = [{"label": labels[i], "probability": float(probabilities[i])} for i in best]
    if threshold is None:
        return {"path": path, **ranked[0], "top": ranked}
    unsure = ranked[0]["probability"] < threshold
    answer = UNSURE if unsure else ranked[0]["label"]
    return {"path": path, "answer": answer, "unsure": unsure, **ranked[0], "top": ranked}


def write(predictions: list[dict[str, Any]], path: Path, overwrite: bool) -> None:
    """Write a CSV file with a row for each picture: path, label, probability, label_2, ...

    With a threshold, the column "answer" follows the path.
    """
    width = max((len(x["top"]) for x in predictions), default=1)
    answers = any("answer" in x for x in predictions)
    names = ["path", *(["answer"] if answers else []), "label", "probability"]
    names += [f"{name}_{i}" for i in range(2, width + 1) for name in ("label", "probability")]
    with (
        new_file(path, overwrite) as temporary,
        # File names that are not UTF-8 keep their bytes.
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow(names)
        for x in predictions:
            ranked = [(one["label"], f"{one['probability']:.6g}") for one in x["top"]]
            first = [x["path"], *([x["answer"]] if answers else [])]
            table.writerow([*first, *(cell for pair in ranked for cell in pair)])


def show(predictions: list[dict[str, Any]]) -> None:
    """Print a line for each picture. An unsure one has all labels in the last column."""
    rows = []
    for x in predictions:
        unsure = x.get("unsure", False)
        others = x["top"] if unsure else x["top"][1:]
        rows.append(
            [
                "standard input" if x["path"] == STDIN else readable(x["path"]),
                UNSURE if unsure else readable(x["label"]),
                probability(x["probability"]),
                ", ".join(
                    f"{readable(o['label'])} {probability(o['probability'])}" for o in others
                ),
            ]
        )
    if rows:
        headers = ["picture", "label", "probability", "next"]
        show_table(headers, rows, left=("label", "next"))
