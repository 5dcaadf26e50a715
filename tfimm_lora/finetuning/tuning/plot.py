"""A plot of the trainings of a search for settings."""

from __future__ import annotations

from typing import Any

from tfimm_lora.finetuning.report.figures import Target, Theme, canvas
from tfimm_lora.finetuning.tuning.record import Tuned, TunedTrial
from tfimm_lora.utils.optional_imports import require


def draw_search(tuned: Tuned, path: Target, *, dark: bool = False) -> None:
    """Draw the accuracy of each training over its learning rate.

    A colour stands for a rank, a larger point for more epochs; the chosen one has a ring.
    Trainings that diverged are crosses at the bottom. Without accuracies, the monitored metric
    is drawn.

    Args:
        tuned: The result of a search.
        path: The file, whose suffix determines the format, or an open binary file, for PNG.
        dark: Whether to draw on a dark background.

    Raises:
        ImportError: without matplotlib.
    """
    metric = "val_accuracy"
    if not any(metric in trial.metrics for trial in tuned.trials):
        metric = tuned.monitor
    factor = 100 if "accuracy" in metric else 1
    with canvas(path, 4.6, 3.3, dark) as (figure, theme):
        axes = figure.add_subplot()
        colours = _colours(theme, sorted(tuned.ranks))
        for trial in tuned.trials:
            value = trial.metrics.get(metric)
            where = axes.get_xaxis_transform() if value is None else axes.transData
            axes.plot(
                trial.learning_rate,
                0.03 if value is None else factor * value,
                "x" if value is None else "o",
                markersize=_size(trial, tuned),
                color=colours[trial.rank],
                transform=where,
                clip_on=False,
            )
        best = tuned.best
        chosen = (best.learning_rate, factor * best.metrics[metric])
        size = _size(best, tuned) + 5
        axes.plot(*chosen, "o", markersize=size, fillstyle="none", color=theme.ink)
        for rank, colour in colours.items():
            axes.plot([], [], "o", color=colour, label=f"rank {rank}")
        axes.plot([], [], "o", markersize=9, fillstyle="none", color=theme.ink, label="chosen")
        axes.set_xscale("log")
        ticker = require("matplotlib.ticker", extra="cli", why="Drawing")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_title("Accuracy (%)" if factor == 100 else metric)
        axes.set_xlabel("Learning rate")
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=4)


def _size(trial: TunedTrial, tuned: Tuned) -> float:
    lengths = sorted({x.epochs for x in tuned.trials})
    return 4.0 + 3.0 * lengths.index(trial.epochs)


def _colours(theme: Theme, ranks: list[int]) -> dict[int, Any]:
    """Colours from blue to orange."""
    maps = require("matplotlib.colors", extra="cli", why="Drawing")
    scale = maps.LinearSegmentedColormap.from_list("ranks", [theme.blue, theme.orange])
    last = max(len(ranks) - 1, 1)
    return {rank: scale(place / last) for place, rank in enumerate(ranks)}
