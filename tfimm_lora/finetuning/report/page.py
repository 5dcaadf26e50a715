"""``report.html``: the report of a run as a single, self-contained file."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from tfimm_lora.finetuning.evaluation import evaluate_pictures
from tfimm_lora.finetuning.metrics import Evaluation
from tfimm_lora.finetuning.report import sections
from tfimm_lora.finetuning.report.html import Html, tag
from tfimm_lora.finetuning.report.plots import (
    draw_confusion,
    draw_curves,
    draw_mistakes,
    mistaken_files,
)
from tfimm_lora.finetuning.run import Run
from tfimm_lora.utils.atomic_files import write_file

REPORT, CURVES, CONFUSION = "report.html", "curves.png", "confusion.png"
MISTAKES = "mistakes.png"

#: Forbids loading and scripts, because labels and file names are untrusted.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

#: The largest number of mistakes that are shown.
_SHOWN = 24


def evaluate_run(run: Run, model: Any = None) -> dict[str, Evaluation]:
    """Evaluate a run on its validation and test pictures and write the report.

    Writes ``curves.png``, ``confusion.png``, ``mistakes.png`` and ``report.html`` to the folder
    of the run.

    Args:
        run: A run whose training is complete.
        model: Its model, if you have it already. Default: ``run.model()``.

    Returns:
        The evaluation on the validation pictures, "val", and, if there are any, on the test
        pictures, "test".

    Raises:
        FileNotFoundError, ValueError: as ``Run.model`` and ``Run.split``.
    """
    model = run.model() if model is None else model
    split = run.split
    held_out = {name: part for name, part in split.parts().items() if name != "train"}
    evaluations = {
        name: evaluate_pictures(
            model, part, run.preprocessing, batch_size=run.recipe["batch_size"]
        )
        for name, part in held_out.items()
    }
    evaluation = evaluations["val"]
    draw_curves(run.history, run.path / CURVES, run.facts.get("best_epoch"))
    draw_confusion(evaluation, run.path / CONFUSION)
    draw_mistakes(evaluation, run.path / MISTAKES, _SHOWN)
    write_report(run, evaluation, evaluations.get("test"))
    return evaluations


def write_report(run: Run, evaluation: Evaluation, test: Evaluation | None = None) -> Path:
    """Write ``report.html`` into the folder of a run.

    The file has no scripts and loads nothing: it contains small versions of the pictures,
    without their metadata. It follows the colour scheme of the system and can be printed.

    Args:
        run: A run whose training is complete.
        evaluation: The evaluation of its model on the validation pictures.
        test: That on the test pictures, which no decision in the run depends on.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the evaluation has no paths of files.
        ImportError: without matplotlib or Pillow.
    """
    mistakes = mistaken_files(evaluation, _SHOWN)
    parts = {
        "Result": sections.result(evaluation),
        "Test pictures": sections.test_result(test) if test is not None else None,
        "Training": sections.training(run),
        "Search for settings": sections.search(run),
        "Confusions": sections.confusions(evaluation),
        "Classes": sections.classes(evaluation),
        "Mistakes": sections.mistakes(run, evaluation, mistakes),
        "Skipped pictures": sections.skipped(run),
        "Next steps": sections.next_steps(run),
    }
    shown = {name: content for name, content in parts.items() if content}
    links = [tag("a", name, href=f"#{_anchor(name)}") for name in shown]
    title = f"{_short(run.recipe['model'])} on {_short(run.recipe['data'])}"
    style = resources.files("tfimm_lora.finetuning.report").joinpath("report.css")
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Html(style.read_text(encoding="utf-8"))),
        ),
        tag(
            "body",
            tag("header", tag("h1", title), _subtitle(run), tag("nav", *links)),
            tag("main", *(_section(name, content) for name, content in shown.items())),
            tag(
                "footer", "Written by tfimm_lora. This file needs no network and no other file."
            ),
        ),
        lang="en",
    )
    path = run.path / REPORT
    write_file(path, f"<!DOCTYPE html>\n{page}\n")
    return path


def _subtitle(run: Run) -> Html:
    epochs = sections.count(len(run.history), "epoch")
    return tag("p", f"Fine-tuned with LoRA: {len(run.labels)} classes, {epochs}")


def _section(name: str, content: Html) -> Html:
    return tag("section", tag("h2", name), content, id=_anchor(name))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _short(path: str) -> str:
    """The last part of an absolute path; names of models are unchanged."""
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path
