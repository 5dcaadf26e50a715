"""Plots of a run: the training curves, the confusion matrix and the worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.finetuning.data.pictures import UnreadablePicture, read_picture
from tfimm_lora.finetuning.metrics import Evaluation, Prediction
from tfimm_lora.finetuning.report.figures import Target, Theme, canvas
from tfimm_lora.finetuning.report.formatting import percent, probability, readable, shortened

#: The titles of the metrics of a classification in the logs of Keras.
TITLES: Mapping[str, str] = {"accuracy": "Accuracy (%)", "loss": "Loss (cross-entropy)"}

#: The width of a character relative to the font size; a little more than most have.
_LETTER = 0.62


def draw_curves(
    history: Sequence[Mapping[str, float]],
    path: Target,
    best_epoch: int | None = None,
    *,
    titles: Mapping[str, str] = TITLES,
    dark: bool = False,
) -> None:
    """Draw the metrics of each epoch, one panel per metric, for training and validation.

    Args:
        history: The metrics of each epoch, as in ``Trained.history``.
        path: The file, whose suffix determines the format (.png, .svg, .pdf), or an open
            binary file, for PNG.
        best_epoch: The epoch to mark, from 1. Default: none.
        titles: The titles of metrics, which are drawn in this order, before others.
        dark: Whether to draw on a dark background.

    Raises:
        ValueError: for a history without epochs.
        ImportError: without matplotlib.
    """
    if not history:
        raise ValueError("Received a history without epochs; expected at least one.")
    names = measured(history, titles)
    rows, columns = math.ceil(len(names) / 2), min(len(names), 2)
    with canvas(path, 4.6 * columns, 3.0 * rows + 0.3, dark) as (figure, theme):
        for place, name in enumerate(names, start=1):
            axes = figure.add_subplot(rows, columns, place)
            _draw_metric(axes, theme, name, titles.get(name, name), history, best_epoch)
        lines: dict[str, Any] = {}
        for axes in figure.axes:
            lines.update(zip(*reversed(axes.get_legend_handles_labels())))
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3)


def measured(
    history: Sequence[Mapping[str, float]], titles: Mapping[str, str] = TITLES
) -> list[str]:
    """The metrics in a history, those with titles first: accuracy and loss.

    Example:
        >>> from tfimm_lora.finetuning.report.plots import measured
        >>> measured([{"auc": 0.8, "loss": 1.2, "val_auc": 0.7, "val_loss": 1.5}])
        ['loss', 'auc']
    """
    names = dict.fromkeys(name.removeprefix("val_") for row in history for name in row)
    known = list(titles)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _draw_metric(
    axes: Any,
    theme: Theme,
    name: str,
    title: str,
    history: Sequence[Mapping[str, float]],
    best_epoch: int | None,
) -> None:
    epochs = np.arange(1, len(history) + 1)
    factor = 100 if "accuracy" in name else 1
    axes.set_title(title)
    for key, label, line in ((name, "training", "--"), (f"val_{name}", "validation", "-")):
        values = np.array([row.get(key, np.nan) for row in history], float) * factor
        if np.isfinite(values).any():
            mark = "o" if len(history) <= 30 else ""
            colour = theme.orange if line == "-" else theme.blue
            axes.plot(epochs, values, line, marker=mark, ms=3.5, color=colour, label=label)
    if best_epoch is not None:
        label = f"best epoch ({best_epoch})"
        axes.axvline(best_epoch, color=theme.muted, linestyle=":", linewidth=1.2, label=label)
    axes.set_xlabel("Epoch")
    axes.set_xlim(0.5, len(history) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(axis="y")


def draw_confusion(evaluation: Evaluation, path: Target, *, dark: bool = False) -> None:
    """Draw the confusion matrix: correct predictions in blue, wrong ones in orange.

    The intensity of a colour shows the share of the pictures of the true class, on a scale that
    makes small shares visible. Numbers and labels are drawn where they fit.

    Args:
        evaluation: The evaluation.
        path, dark: As in ``draw_curves``.

    Raises:
        ImportError: without matplotlib.
    """
    counts = evaluation.confusion
    n = len(counts)
    names = [shortened(readable(label), 22) for label in evaluation.labels]
    side = float(np.clip(0.55 * n, 3.3, 9.0))  # of the matrix, in inches
    cell = 72 * side / n  # in points
    font = float(np.clip(0.75 * cell, 5.5, 9))
    step = math.ceil(1.15 * font / cell)
    ticks = np.arange(0, n, step)
    length = _LETTER * font * max(map(len, names))  # of the longest label, in points
    turned = length > 0.95 * cell * step
    width = side + length / 72 + 1.6
    height = side + (length if turned else font) / 72 + 0.9
    with canvas(path, width, height, dark) as (figure, theme):
        axes = figure.add_subplot()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        right: Any = np.eye(n, dtype=bool)[..., None]
        blue, orange = (_ramp(theme, colour) for colour in (theme.blue, theme.orange))
        axes.imshow(np.where(right, blue(shares), orange(shares)), interpolation="nearest")
        _write_counts(axes, theme, counts, shares, cell)
        total = len(evaluation.predictions)
        axes.set_title(f"{percent(evaluation.accuracy)} of {total:,} pictures correct")
        axes.set_xlabel("Predicted class")
        axes.set_ylabel("True class")
        shown = [names[i] for i in ticks]
        axes.set_xticks(ticks, shown, fontsize=font, rotation=90 if turned else 0)
        axes.set_yticks(ticks, shown, fontsize=font)
        axes.tick_params(length=2.5 if step > 1 else 0)
        axes.spines[:].set_visible(True)
        if n <= 60:
            axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
            axes.set_yticks(np.arange(n + 1) - 0.5, minor=True)
            axes.grid(which="minor", linewidth=0.6)
            axes.tick_params(which="minor", length=0)
        _draw_scales(axes, 0.3 / side, {"correct": blue, "wrong": orange})


def _ramp(theme: Theme, colour: str) -> Any:
    """A function from shares to colours. Its square root makes small shares visible."""
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("", [theme.paper, colour])
    return lambda share: shades(np.where(share > 0, 0.1 + 0.9 * np.sqrt(share), 0))[..., :3]


def _write_counts(
    axes: Any, theme: Theme, counts: np.ndarray, shares: np.ndarray, cell: float
) -> None:
    """Write the numbers of pictures into the cells, if they fit."""
    font = min(9.0, 0.85 * cell / (_LETTER * len(str(counts.max()))), 0.7 * cell)
    if font < 5:
        return
    for row, column in zip(*np.nonzero(counts)):
        strong = shares[row, column] > 0.4
        axes.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            fontsize=font,
            color=theme.paper if strong else theme.ink,
        )


def _draw_scales(axes: Any, width: float, ramps: Mapping[str, Any]) -> None:
    """Draw the colour scales, a bar whose width is a share of the width of the axes."""
    shares = np.linspace(1, 0, 256)[:, None]
    scale = axes.inset_axes((1 + width / 2, 0, width, 1))
    image = np.concatenate([ramp(shares) for ramp in ramps.values()], axis=1)
    extent = (0, len(ramps), 0, 100)
    scale.imshow(image, aspect="auto", extent=extent, interpolation="nearest")
    scale.set_xticks(np.arange(len(ramps)) + 0.5, list(ramps), fontsize=7, rotation=90)
    scale.yaxis.tick_right()
    scale.yaxis.set_label_position("right")
    scale.set_ylabel("Share of the true class (%)")
    scale.tick_params(length=0)


def draw_mistakes(
    evaluation: Evaluation, path: Target, count: int = 24, *, dark: bool = False
) -> None:
    """Draw the worst mistakes: the pictures with their true and predicted classes.

    Args:
        evaluation: An evaluation of picture files.
        path, dark: As in ``draw_curves``.
        count: The largest number of pictures to draw. Default: 24.

    Raises:
        ValueError: if the evaluation has no paths of files.
        ImportError: without matplotlib or Pillow.
    """
    shown = mistaken_files(evaluation, count)
    title = mistakes_title(len(shown), evaluation)
    if shown:
        title += "\ntrue class → predicted class, with its probability"
    pictures = [
        Captioned(
            str(mistake.path),
            (
                ("blue", shortened(readable(mistake.true), 22)),
                ("orange", f"→ {shortened(readable(mistake.predicted), 20)}"),
                ("muted", probability(mistake.probability)),
            ),
        )
        for mistake in shown
    ]
    draw_pictures(pictures, path, title, dark=dark)


class Captioned(NamedTuple):
    """A picture file, and the lines below it: the name of a colour of the theme, and a text."""

    path: str
    lines: tuple[tuple[str, str], ...]


def draw_pictures(
    pictures: Sequence[Captioned], path: Target, title: str, *, dark: bool = False
) -> None:
    """Draw pictures in a grid, each with its lines.

    Args:
        pictures: The pictures.
        path, dark: As in ``draw_curves``.
        title: The text above the pictures.

    Raises:
        ImportError: without matplotlib or Pillow.
    """
    columns = min(6, max(len(pictures), 3))
    rows = math.ceil(len(pictures) / columns)
    with canvas(path, 1.75 * columns, 2.3 * rows + 0.7, dark) as (figure, theme):
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, linespacing=1.5)
        for place, picture in enumerate(pictures, start=1):
            _draw_picture(figure.add_subplot(rows, columns, place), theme, picture)


def mistaken_files(evaluation: Evaluation, count: int) -> list[Prediction]:
    """The worst mistakes of an evaluation of files.

    Raises:
        ValueError: if the evaluation has no paths of files.
    """
    if any(prediction.path is None for prediction in evaluation.predictions):
        raise ValueError(
            "Received an evaluation without the paths of its pictures; expected the result of "
            "evaluate_pictures."
        )
    return evaluation.worst(count)


def mistakes_title(shown: int, evaluation: Evaluation) -> str:
    """The title for a number of shown mistakes."""
    total, pictures = len(evaluation.worst()), len(evaluation.predictions)
    if not total:
        return f"No mistakes among {pictures:,} pictures"
    if shown == total:
        number = "The only mistake" if total == 1 else f"All {total} mistakes"
        return f"{number} among {pictures:,} pictures"
    return f"The {shown} most confident of {total:,} mistakes among {pictures:,} pictures"


def _draw_picture(axes: Any, theme: Theme, picture: Captioned) -> None:
    axes.set_axis_off()
    axes.set_box_aspect(1)
    try:
        pixels = read_picture(picture.path, at_least=256)
        step = max(1, min(pixels.shape[:2]) // 256)
        height, width = np.array(pixels.shape[:2]) / max(pixels.shape[:2])
        # At the bottom of its square, above its caption.
        extent = (0.5 - width / 2, 0.5 + width / 2, 0, height)
        axes.imshow(pixels[::step, ::step], extent=extent)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
    except UnreadablePicture:
        axes.text(0.5, 0.5, "cannot be\nread now", ha="center", va="center", color=theme.muted)
    for line, (colour, text) in enumerate(picture.lines):
        axes.annotate(
            text,
            (0.5, 0),
            (0, -4 - 10.5 * line),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="center",
            va="top",
            color=getattr(theme, colour),
            fontsize=8,
        )
