"""The sections of ``report.html``, each a function of a run or of its evaluation."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.metrics import Evaluation, Prediction
from tfimm_lora.finetuning.report.formatting import (
    byte_text,
    decimal,
    duration,
    interval,
    percent,
    probability,
)
from tfimm_lora.finetuning.report.html import Html, drawing, joined, tag, thumbnail
from tfimm_lora.finetuning.report.plots import (
    draw_confusion,
    draw_curves,
    measured,
    mistakes_title,
)
from tfimm_lora.finetuning.report.search_plot import draw_search
from tfimm_lora.finetuning.run import CONFIG, Run
from tfimm_lora.finetuning.tuning.record import rank_key, read_search
from tfimm_lora.utils.optional_imports import require

#: The number of rows that are shown of long lists.
_SHOWN_PAIRS, _SHOWN_SKIPPED = 10, 200


def count(number: int, word: str) -> str:
    """A number with a noun, in the plural if needed."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


# -- numbers --------------------------------------------------------------------------------


def result(evaluation: Evaluation, kind: str = "validation") -> Html:
    """The headline numbers."""
    low, high = evaluation.accuracy_interval()
    pictures = len(evaluation.predictions)
    right = pictures - len(evaluation.worst())
    guess = max(scores.count for scores in evaluation.classes) / pictures
    intro = tag(
        "p",
        f"The model classifies {right:,} of {count(pictures, f'{kind} picture')} correctly. "
        f"Always predicting the most frequent class would be correct for {percent(guess)}.",
    )
    numbers = [
        _number(
            "Accuracy",
            percent(evaluation.accuracy),
            f"95 % interval: {interval(low, high)}",
            class_="main",
        ),
        _number("Balanced accuracy", percent(evaluation.balanced_accuracy), "mean of classes"),
        _number("Loss", decimal(evaluation.loss, 3), "cross-entropy"),
        _number(
            "Calibration error",
            percent(evaluation.calibration_error),
            "mean error of the probabilities",
        ),
    ]
    if evaluation.top5 is not None:
        note = "true class among the five most probable"
        numbers.insert(1, _number("Top 5", percent(evaluation.top5), note))
    return joined(intro, tag("dl", *numbers, class_="numbers"))


def test_result(evaluation: Evaluation) -> Html:
    """The headline numbers on the test pictures."""
    why = (
        "The test pictures were used neither to train nor to choose the epoch, so these are "
        "the numbers to expect on new pictures. All sections below are about the validation "
        "pictures."
    )
    return joined(tag("p", why, class_="quiet"), result(evaluation, "test"))


def _number(name: str, value: str, note: str, **attributes: str) -> Html:
    inside = tag("dd", tag("b", value), tag("small", note))
    return tag("div", tag("dt", name), inside, **attributes)


def training(run: Run) -> Html:
    """The curves, and what was trained."""
    facts, best = run.facts, run.facts.get("best_epoch")
    history = run.history
    curves = [
        drawing(*_both(_curve(history, name, best)), alt=f"{name} of each epoch")
        for name in measured(history)
    ]
    early = " (stopped early)" if facts.get("stopped_early") else ""
    summary = f"{count(len(history), 'epoch')}{early}. The weights of epoch {best} were kept."
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", value))
        for name, value in _settings(run)
    ]
    return joined(
        tag("p", summary),
        tag("div", *curves, class_="sides"),
        tag("h3", "What was trained"),
        tag("table", tag("tbody", *rows), class_="facts"),
    )


def _curve(history: list[dict[str, float]], name: str, best: int | None) -> Any:
    """A function that draws one metric: side by side or, on a phone, one below the other."""
    names = (name, f"val_{name}")
    rows = [{key: row[key] for key in names if key in row} for row in history]
    return lambda file, dark: draw_curves(rows, file, best, dark=dark)


def _settings(run: Run) -> list[tuple[str, str]]:
    """The model, the trained weights, the pictures and the settings."""
    recipe, facts, adapter = run.recipe, run.facts, Adapter.load(str(run.adapter))
    size = run.preprocessing.input_size
    ranks = ", ".join(str(r) for r in sorted({x.rank for x in adapter.layers.values()}))
    targets = recipe["lora"].get("lora_targets") or "default of the architecture"
    named = targets if isinstance(targets, str) else ", ".join(targets)
    names = {"trained_on": "training", "validated_on": "validation", "tested_on": "testing"}
    pictures = ", ".join(
        f"{sum(facts[key].values()):,} for {name}"
        for key, name in names.items()
        if key in facts
    )
    share = percent(facts["trainable"] / facts["parameters"], 2)
    full = f"; {', '.join(adapter.modules)} fully trained" if adapter.modules else ""
    versions = [v if " " in v else f"{k} {v}" for k, v in facts["versions"].items()]
    return [
        ("Model", f"{recipe['model']} ({_weights(run)})"),
        ("LoRA", f"rank {ranks} in {count(len(adapter.layers), 'layer')}{full}"),
        ("Targets", named),
        ("Trained", f"{facts['trainable']:,} of {facts['parameters']:,} parameters ({share})"),
        ("Adapter", byte_text(adapter.size)),
        ("Pictures", f"{pictures}, in {recipe['data']}"),
        ("Input", f"{size[0]} x {size[1]} pixels, {run.preprocessing.in_channels} channels"),
        ("Augmentation", recipe["augmentation"]),
        (
            "Optimization",
            f"batches of {recipe['batch_size']}, peak learning rate "
            f"{recipe['learning_rate']:g}, seed {recipe['seed']}",
        ),
        ("Precision", recipe["mixed_precision"] or "float32"),
        ("Training time", duration(facts["seconds"])),
        ("Software", ", ".join(versions)),
    ]


def _weights(run: Run) -> str:
    """The origin of the base weights; runs of earlier versions do not record it."""
    if "base_origin" in run.facts:
        return str(run.facts["base_origin"])
    default = "weights of the file" if run.facts["base_sha256"] else "random weights"
    named = "pretrained" if run.recipe["pretrained"] else run.recipe["weights"]
    return str(named or default)


def _both(draw: Callable[[Any, bool], None]) -> tuple[bytes, bytes]:
    """A drawing on a light and on a dark background."""
    files = io.BytesIO(), io.BytesIO()
    for file, dark in zip(files, (False, True)):
        draw(file, dark)
    return files[0].getvalue(), files[1].getvalue()


def search(run: Run) -> Html | None:
    """What was tried to find the settings, if they were searched for."""
    found = read_search(run.path)
    if found is None:
        return None
    tuned = found[0]
    best = tuned.best
    searched = ["learning rate"] if tuned.rates[0] < tuned.rates[1] else []
    searched += ["rank"] if len(tuned.ranks) > 1 else []
    on = ""
    if tuned.pictures is not None:
        on = (
            f" They were trained on {tuned.pictures[0]:,} of the training pictures and "
            f"compared on {count(tuned.pictures[1], 'other')}; validation and test pictures "
            "were not used."
        )
    verb = "were" if len(searched) > 1 else "was"
    summary = (
        f"The {' and the '.join(searched)} {verb} chosen from "
        f"{count(len(tuned.trials), 'training')} with {count(tuned.epochs_trained, 'epoch')} "
        f"({duration(tuned.seconds)}): rate {best.learning_rate:g}, rank {best.rank}.{on} "
        "The best settings of the short trainings were trained again for longer."
    )
    rows = [
        [
            f"{x.learning_rate:g}",
            str(x.rank),
            str(x.epochs),
            "diverged" if x.value is None else decimal(x.value, 3),
            percent(x.metrics["val_accuracy"]) if "val_accuracy" in x.metrics else "",
            duration(x.seconds),
        ]
        for x in sorted(tuned.trials, key=lambda x: (-x.epochs, rank_key(x, tuned.monitor)))
    ]
    names = ("Rate", "Rank", "Epochs", tuned.monitor, "Accuracy", "Time")
    table = _table(names, rows, numbers=(1, 2, 3, 4, 5))
    plot = _both(lambda file, dark: draw_search(tuned, file, dark=dark))
    return joined(
        tag("p", summary),
        tag(
            "div",
            tag("div", drawing(*plot, alt="Accuracy of each training over its learning rate")),
            tag("div", table, class_="long rest"),
            class_="sides",
        ),
    )


# -- classes and pictures -------------------------------------------------------------------


def confusions(evaluation: Evaluation) -> Html:
    """The confusion matrix and its most frequent mistakes."""
    matrix = _both(lambda file, dark: draw_confusion(evaluation, file, dark=dark))
    pairs = evaluation.confused()
    rows = [
        [tag("span", true, class_="true"), tag("span", predicted, class_="predicted"), str(n)]
        for true, predicted, n in pairs[:_SHOWN_PAIRS]
    ]
    listed = _table(("True class", "Predicted", "Pictures"), rows, numbers=(2,))
    caption = f"The most frequent of {count(len(pairs), 'confusion')}"
    return tag(
        "div",
        tag("div", drawing(*matrix, alt="Confusion matrix")),
        tag("div", tag("p", caption, class_="quiet"), listed, class_="rest")
        if pairs
        else tag("p", "No class was confused with another."),
        class_="sides",
    )


def classes(evaluation: Evaluation) -> Html:
    """The scores of each class."""
    weakest = sorted(evaluation.classes, key=lambda x: (not x.count, x.f1))
    rows = [
        [
            tag("span", x.label),
            f"{x.count:,}",
            *((percent(x.recall), percent(x.precision), f"{x.f1:.3f}") if x.count else "---"),
            tag("span", tag("i", style=f"width: {100 * x.f1:.1f}%")),
        ]
        for x in weakest
    ]
    caption = (
        "Sorted by F1, the lowest first. Recall: the share of the pictures of the class that "
        "are classified correctly. Precision: the share of the predictions of the class "
        "that are correct. F1: the harmonic mean of both."
    )
    names = ("Class", "Pictures", "Recall", "Precision", "F1", "")
    table = _table(names, rows, numbers=(1, 2, 3, 4))
    return joined(tag("p", caption, class_="quiet"), tag("div", table, class_="long"))


def mistakes(run: Run, evaluation: Evaluation, worst: list[Prediction]) -> Html:
    """The worst mistakes as pictures."""
    items = [tag("li", _mistake(run, x)) for x in worst]
    title = mistakes_title(len(worst), evaluation)
    key = "Blue: the true class. Orange: the predicted class, with its probability."
    return joined(
        tag("p", f"{title}."),
        tag("p", key, class_="quiet") if items else None,
        tag("ol", *items, class_="mistakes") if items else None,
    )


def _mistake(run: Run, mistake: Prediction) -> Html:
    path = str(mistake.path)
    try:
        seen = thumbnail(path)
    except UnreadablePicture:
        seen = tag("span", "cannot be read now")
    inside = os.path.relpath(path, run.recipe["data"])
    return tag(
        "figure",
        tag("div", seen, class_="frame"),
        tag(
            "figcaption",
            tag("span", mistake.true, class_="true"),
            tag("span", f"→\N{NO-BREAK SPACE}{mistake.predicted}", class_="predicted"),
            tag("span", probability(mistake.probability)),
            tag("span", path if inside.startswith("..") else inside, class_="path"),
        ),
    )


def skipped(run: Run) -> Html | None:
    """The pictures that could not be used, if there are any."""
    skipped = run.skipped
    if not skipped:
        return None
    shown = [list(row) for row in skipped[:_SHOWN_SKIPPED]]
    more = len(skipped) - len(shown)
    summary = f"{count(len(skipped), 'picture')} could not be used."
    return joined(
        tag("p", summary),
        tag("div", _table(("File", "Reason"), shown), class_="long"),
        tag("p", f"And {more:,} more in skipped.csv.") if more else None,
    )


def _table(names: Any, rows: list[list[str]], numbers: tuple[int, ...] = ()) -> Html:
    """A table. The first column has row headers; ``numbers`` are the columns of numbers."""

    def kind(place: int) -> str | None:
        return "number" if place in numbers else None if names[place] else "bar"

    def row(cells: list[str]) -> Html:
        first, *rest = cells
        others = (tag("td", cell, class_=kind(i)) for i, cell in enumerate(rest, start=1))
        return tag("tr", tag("th", first, scope="row"), *others)

    head = (tag("th", name, scope="col", class_=kind(i)) for i, name in enumerate(names))
    body = tag("tbody", *map(row, rows))
    return tag("table", tag("thead", tag("tr", *head)), body)


# -- commands -------------------------------------------------------------------------------


def next_steps(run: Run) -> Html:
    """Commands to copy, and all settings."""
    folder, program = shlex.quote(str(run.path)), "tfimm-lora"
    again = shlex.quote(f"{os.path.normpath(run.path)}-again")
    config = shlex.quote(str(run.path / CONFIG))
    steps = {
        "Evaluate on other pictures": f"{program} evaluate {folder} --data PICTURES",
        "Predict": f"{program} predict {folder} PICTURE.jpg FOLDER",
        "Export": f"{program} export {folder} --out model.onnx",
        "Repeat the run": f"{program} finetune --config {config} --out {again}",
    }
    commands = [
        joined(tag("h3", name), tag("pre", tag("code", command), class_="command"))
        for name, command in steps.items()
    ]
    yaml = require("yaml", extra="cli", why="The settings in a report")
    settings = yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True).strip()
    return joined(*commands, tag("h3", f"All settings, from {CONFIG}"), tag("pre", settings))
