"""``evaluate_run`` and ``report.html``: a run as a single, self-contained file."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from tfimm_lora.finetuning.data.findings import count
from tfimm_lora.finetuning.evaluation import evaluate_pictures
from tfimm_lora.finetuning.report import sections
from tfimm_lora.finetuning.report.explanations import explanations
from tfimm_lora.finetuning.report.html import Html, joined, tag
from tfimm_lora.finetuning.report.plots import draw_curves
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.tuning.report_section import search
from tfimm_lora.utils.atomic_files import write_file

REPORT, CURVES = "report.html", "curves.png"

#: Forbids loading and scripts, because labels and file names are untrusted.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def evaluate_run(run: Run, model: Any = None) -> dict[str, Any]:
    """Evaluate a run on its validation and test pictures and write the report.

    Writes ``curves.png``, the drawings of the task (for a classification ``confusion.png`` and
    ``mistakes.png``) and ``report.html`` to the folder of the run.

    Args:
        run: A run whose training is complete.
        model: Its model, if you have it already. Default: ``run.model()``.

    Returns:
        The evaluation on the validation pictures, "val", and, if there are any, on the test
        pictures, "test". For a classification each is an ``Evaluation``.

    Raises:
        FileNotFoundError, ValueError: as ``Run.model`` and ``Run.split``.
    """
    model = run.model() if model is None else model
    split, task = run.split, run.task
    held_out = {name: part for name, part in split.parts().items() if name != "train"}
    evaluations = {
        name: evaluate_pictures(
            model, part, run.preprocessing, task=task, batch_size=run.recipe["batch_size"]
        )
        for name, part in held_out.items()
    }
    evaluation = evaluations["val"]
    best = run.facts.get("best_epoch")
    draw_curves(run.history, run.path / CURVES, best, titles=task.views.titles)
    for name, draw in task.views.drawings(evaluation).items():
        draw(run.path / name)
    write_report(run, evaluation, evaluations.get("test"), model=model)
    return evaluations


def write_report(run: Run, evaluation: Any, test: Any = None, *, model: Any = None) -> Path:
    """Write ``report.html`` into the folder of a run.

    The file has no scripts and loads nothing: it contains small versions of the pictures,
    without their metadata. It follows the colour scheme of the system and can be printed.

    Args:
        run: A run whose training is complete.
        evaluation: The evaluation of its model on the validation pictures.
        test: That on the test pictures, which no decision in the run depends on.
        model: The model, to explain some of its predictions. Default: without explanations.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the evaluation has no paths of files.
        ImportError: without matplotlib or Pillow.
    """
    views = run.task.views
    explained = None
    if model is not None:
        explained = explanations(run, model, views.examples(evaluation))
    parts = {
        "Result": joined(views.result(evaluation), _note(views.advice(evaluation))),
        "Test pictures": sections.test_result(views.result(test, "test")) if test else None,
        "Training": sections.training(run),
        "Search for settings": search(run),
        **views.sections(run, evaluation),
        "Explanations": explained,
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
    epochs, targets = sections.count(len(run.history), "epoch"), run.task.targets()
    outputs = count(len(run.labels), targets.noun, targets.nouns)
    return tag("p", f"Fine-tuned with LoRA: {outputs}, {epochs}")


def _note(advice: str | None) -> Html | None:
    return None if advice is None else tag("p", f"Note: {advice}.")


def _section(name: str, content: Html) -> Html:
    return tag("section", tag("h2", name), content, id=_anchor(name))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _short(path: str) -> str:
    """The last part of an absolute path; names of models are unchanged."""
    return os.path.basename(os.path.normpath(path)) if os.path.isabs(path) else path
