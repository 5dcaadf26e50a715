"""The sections of ``report.html``, each a function of a run or of its evaluation."""

from __future__ import annotations

import io
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from tfimm_lora.utils.optional_imports import require

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

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
        number(
            "Accuracy",
            percent(evaluation.accuracy),
            f"95 % interval: {interval(low, high)}",
            class_="main",
        ),
        number("Balanced accuracy", percent(evaluation.balanced_accuracy), "mean of classes"),
        number("Loss", decimal(evaluation.loss, 3), "cross-entropy"),
        number(
            "Calibration error",
            percent(evaluation.calibration_error),
            "mean error of the probabilities",
        ),
    ]
    if evaluation.top5 is not None:
        note = "true class among the five most probable"
        numbers.insert(1, number("Top 5", percent(evaluation.top5), note))
    return joined(intro, tag("dl", *numbers, class_="numbers"))


def test_result(result: Html) -> Html:
    """The headline numbers on the test pictures."""
    why = (
        "The test pictures were used neither to train nor to choose the epoch, so these are "
        "the numbers to expect on new pictures. All sections below are about the validation "
        "pictures."
    )
    return joined(tag("p", why, class_="quiet"), result)


def number(name: str, value: str, note: str, **attributes: str) -> Html:
    """A headline number with its name and a note."""
    inside = tag("dd", tag("b", value), tag("small", note))
    return tag("div", tag("dt", name), inside, **attributes)


def training(run: Run) -> Html:
    """The curves, and what was trained."""
    facts, best = run.facts, run.facts.get("best_epoch")
    history, titles = run.history, run.task.views.titles
    curves = [
        drawing(*both(_curve(history, name, best, titles)), alt=f"{name} of each epoch")
        for name in measured(history, titles)
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


def _curve(
    history: list[dict[str, float]], name: str, best: int | None, titles: Mapping[str, str]
) -> Any:
    """A function that draws one metric: side by side or, on a phone, one below the other."""
    names = (name, f"val_{name}")
    rows = [{key: row[key] for key in names if key in row} for row in history]
    return lambda file, dark: draw_curves(rows, file, best, titles=titles, dark=dark)


def _settings(run: Run) -> list[tuple[str, str]]:
    """The model, the trained weights, the pictures and the settings."""
    recipe, facts, adapter = run.recipe, run.facts, Adapter.load(str(run.adapter))
    size = run.preprocessing.input_size
    ranks = ", ".join(str(r) for r in sorted({x.rank for x in adapter.layers.values()}))
    targets = recipe["lora"].get("lora_targets") or "default of the architecture"
    named = targets if isinstance(targets, str) else ", ".join(targets)
    names = {"train": "training", "val": "validation", "test": "testing"}
    numbers = _numbers_of_pictures(facts)
    pictures = ", ".join(f"{numbers[part]:,} for {names[part]}" for part in numbers)
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


def _numbers_of_pictures(facts: Mapping[str, Any]) -> dict[str, int]:
    """The number of pictures of each part; in runs of earlier versions each has one class."""
    if "pictures" in facts:
        return dict(facts["pictures"])
    counts = {"train": "trained_on", "val": "validated_on", "test": "tested_on"}
    return {part: sum(facts[key].values()) for part, key in counts.items() if key in facts}


def _weights(run: Run) -> str:
    """The origin of the base weights; runs of earlier versions do not record it."""
    if "base_origin" in run.facts:
        return str(run.facts["base_origin"])
    default = "weights of the file" if run.facts["base_sha256"] else "random weights"
    named = "pretrained" if run.recipe["pretrained"] else run.recipe["weights"]
    return str(named or default)


def both(draw: Callable[[Any, bool], None]) -> tuple[bytes, bytes]:
    """A drawing on a light and on a dark background."""
    files = io.BytesIO(), io.BytesIO()
    for file, dark in zip(files, (False, True)):
        draw(file, dark)
    return files[0].getvalue(), files[1].getvalue()


# -- classes and pictures -------------------------------------------------------------------


def confusions(evaluation: Evaluation) -> Html:
    """The confusion matrix and its most frequent mistakes."""
    matrix = both(lambda file, dark: draw_confusion(evaluation, file, dark=dark))
    pairs = evaluation.confused()
    rows = [
        [tag("span", true, class_="true"), tag("span", predicted, class_="predicted"), str(n)]
        for true, predicted, n in pairs[:_SHOWN_PAIRS]
    ]
    listed = table(("True class", "Predicted", "Pictures"), rows, numbers=(2,))
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
    shown = table(names, rows, numbers=(1, 2, 3, 4))
    return joined(tag("p", caption, class_="quiet"), tag("div", shown, class_="long"))


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
    return captioned(run, str(mistake.path), prediction_lines(mistake))


def prediction_lines(x: Prediction) -> tuple[Html, ...]:
    """The true and the predicted class, with its probability."""
    return (
        tag("span", x.true, class_="true"),
        tag("span", f"→\N{NO-BREAK SPACE}{x.predicted}", class_="predicted"),
        tag("span", probability(x.probability)),
    )


def captioned(run: Run, path: str, lines: Sequence[Html], seen: Html | None = None) -> Html:
    """A small version of a picture file, with lines and its path below it.

    ``seen`` is what is shown instead of the picture.
    """
    try:
        seen = seen or thumbnail(path)
    except UnreadablePicture:
        seen = tag("span", "cannot be read now")
    return tag(
        "figure",
        tag("div", seen, class_="frame"),
        tag("figcaption", *lines, tag("span", shown_path(run, path), class_="path")),
    )


def shown_path(run: Run, path: str) -> str:
    """The path of a picture, relative to the data of the run if it is inside."""
    inside = os.path.relpath(path, run.recipe["data"])
    return path if inside.startswith("..") else inside


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
        tag("div", table(("File", "Reason"), shown), class_="long"),
        tag("p", f"And {more:,} more in skipped.csv.") if more else None,
    )


def table(names: Any, rows: list[list[str]], numbers: tuple[int, ...] = ()) -> Html:
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
    config = shlex.quote(str(run.config_path))
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
    title = f"All settings, from {run.config_path.name}"
    return joined(*commands, tag("h3", title), tag("pre", settings))
