"""``tfimm-lora predict``: predict the labels of pictures."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tfimm_lora.cli.app import FAILED, Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.outputs import Overwrite, new_file, refuse_to_overwrite
from tfimm_lora.cli.tables import show_table
from tfimm_lora.finetuning.data.picture_files import EXTENSIONS, natural_order
from tfimm_lora.finetuning.evaluation import predict_pictures
from tfimm_lora.finetuning.report.formatting import percent, readable
from tfimm_lora.finetuning.run import Run

EXAMPLES = """Examples:

tfimm-lora predict runs/flowers picture.jpg

tfimm-lora predict runs/flowers holiday --top 3

tfimm-lora predict runs/flowers holiday more/*.png --csv predictions.csv

tfimm-lora predict runs/flowers picture.jpg --json
"""


@app.command("predict", epilog=EXAMPLES)
def predict_command(
    run: Annotated[Path, typer.Argument(help="The folder of a finetune run.")],
    pictures: Annotated[list[Path], typer.Argument(help="Picture files, and folders of them.")],
    top: Annotated[
        int, typer.Option(min=1, help="The number of labels to print for a picture.")
    ] = 5,
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
    nevertheless, and the exit code is 1.
    """
    if csv_file is not None:
        refuse_to_overwrite(csv_file, overwrite)
    opened = Run.open(run)
    paths = files_in(pictures)
    import_tensorflow()
    labels, predictions, unreadable = opened.labels, [], []
    preprocessing, model = opened.preprocessing, opened.model()
    for path, result in predict_pictures(model, paths, preprocessing, batch_size=batch_size):
        if isinstance(result, np.ndarray):
            predictions.append(_prediction(path, result, labels, top))
        else:
            unreadable.append({"path": path, "reason": result.reason})
            note(f"error: cannot read {readable(path)}: {readable(result.reason)}")
    if csv_file is not None:
        write(predictions, csv_file, overwrite)
        note(f"written: {csv_file}")
    data = {"run": str(run), "predictions": predictions, "unreadable": unreadable}
    emit(data, as_json, lambda: show(predictions))
    if unreadable:
        note(f"{len(unreadable)} of {len(paths)} files could not be read")
        raise typer.Exit(FAILED)


def files_in(given: list[Path]) -> list[str]:
    """The given files, and all pictures in the given folders and their subfolders.

    Raises:
        FileNotFoundError: if there are none.
    """
    found: list[str] = []
    for path in given:
        found += _pictures_below(path) if path.is_dir() else [str(path)]
    if not found:
        raise FileNotFoundError(
            f"There are no pictures in {', '.join(map(str, given))}; expected files with the "
            f"suffix {', '.join(EXTENSIONS)}."
        )
    return list(dict.fromkeys(found))


def _pictures_below(folder: Path) -> list[str]:
    found = []
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(above, name)
            for name in names
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found, key=natural_order)


def _prediction(
    path: str, probabilities: np.ndarray, labels: list[str], top: int
) -> dict[str, Any]:
    best = np.argsort(-probabilities, kind="stable")[:top]
    ranked = [{"label": labels[i], "probability": float(probabilities[i])} for i in best]
    return {"path": path, **ranked[0], "top": ranked}


def write(predictions: list[dict[str, Any]], path: Path, overwrite: bool) -> None:
    """Write a CSV file with a row for each picture: path, label, probability, label_2, ..."""
    width = max((len(x["top"]) for x in predictions), default=1)
    names = ["path", "label", "probability"]
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
            table.writerow([x["path"], *(cell for pair in ranked for cell in pair)])


def show(predictions: list[dict[str, Any]]) -> None:
    """Print a line for each picture."""
    rows = [
        [
            readable(x["path"]),
            readable(x["label"]),
            percent(x["probability"]),
            ", ".join(
                f"{readable(o['label'])} {percent(o['probability'])}" for o in x["top"][1:]
            ),
        ]
        for x in predictions
    ]
    if rows:
        headers = ["picture", "label", "probability", "next"]
        show_table(headers, rows, left=("label", "next"))
