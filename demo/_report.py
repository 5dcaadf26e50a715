"""How the demo shows its progress and its results: console, table and picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from _data import Domain
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

matplotlib.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

console = Console(highlight=False)

COLOURS = {
    "not at all": "#9aa0a6",
    "classifier only": "#c8a15a",
    "LoRA": "#2f7d5b",
    "everything": "#3b6ea8",
}
WRONG, RIGHT = "#c62828", "#222222"
COLUMNS = 6


@dataclass(frozen=True)
class Result:
    """How one way of adapting the model came out."""

    way: str
    accuracy: float  # per cent of the held-out target pictures
    trained: int  # parameters
    share: float  # of all parameters of the model
    seconds: float
    predictions: np.ndarray  # for the held-out target pictures


def progress_bar() -> Progress:
    """One line: what is trained, how far it is, the loss, the time."""
    return Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=24),
        TextColumn("epoch {task.completed:>2.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        console=console,
    )


def print_table(results: list[Result], pictures: int) -> None:
    """The results, a row for each way."""
    table = Table(title=f"Accuracy on {pictures} held-out pictures of the target domain")
    table.add_column("trained")
    for name in ("accuracy", "parameters", "share", "seconds"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.way,
            f"{r.accuracy:.1f} %",
            f"{r.trained:,}",
            f"{r.share:.1%}",
            f"{r.seconds:.1f}",
            style="bold" if r.way == "LoRA" else None,
        )
    console.print(table)


def draw(results: list[Result], source: Domain, target: Domain, path: Path) -> Path:
    """The table as bars, beside the first held-out pictures with predictions."""
    figure = plt.figure(figsize=(13.5, 6.4))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    draw_bars(left, results)
    draw_samples(right, results, source, target)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_bars(figure: SubFigure, results: list[Result]) -> None:
    """Accuracy per way, with the parameters that were trained for it."""
    axes = figure.subplots(gridspec_kw={"left": 0.13, "right": 0.97, "bottom": 0.2, "top": 0.9})
    figure.suptitle("Four ways of adapting a model to new pictures", weight="bold", y=0.97)
    bars = axes.bar(
        [f"{r.way}\n{r.trained:,}\n({r.share:.1%})" for r in results],
        [r.accuracy for r in results],
        color=[COLOURS[r.way] for r in results],
        width=0.65,
    )
    axes.bar_label(bars, [f"{r.accuracy:.1f} %" for r in results], padding=3, weight="bold")
    axes.set_ylim(0, 106)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy on held-out target pictures (%)")
    axes.set_xlabel("trained: parameters (share of the model)", labelpad=8)
    axes.spines[["top", "right"]].set_visible(False)


def draw_samples(
    figure: SubFigure, results: list[Result], source: Domain, target: Domain
) -> None:
    """The first held-out digits (not chosen) and what two of the models see in them.

    Each digit as the source model knows it, below that as it comes in the target domain.
    """
    figure.suptitle("The first held-out pictures, original and shifted", weight="bold", y=0.97)
    shown = [r for r in results if r.way in ("not at all", "LoRA")]
    for row, bottom in enumerate((0.575, 0.13)):
        pair = figure.subplots(
            2,
            COLUMNS,
            gridspec_kw={
                "left": 0.09,
                "right": 0.99,
                "bottom": bottom,
                "top": bottom + 0.325,
                "hspace": 0.08,
                "wspace": 0.12,
            },
        )
        pair[0, 0].set_ylabel("original")
        pair[1, 0].set_ylabel("shifted")
        for column in range(COLUMNS):
            i = row * COLUMNS + column
            draw_picture(pair[0, column], source.test_x[i])
            draw_picture(pair[1, column], target.test_x[i])
            for line, result in enumerate(shown):
                said = int(result.predictions[i])
                pair[1, column].text(
                    0.5,
                    -0.15 - 0.18 * line,
                    f"{result.way}: {said}",
                    transform=pair[1, column].transAxes,
                    ha="center",
                    va="center",
                    color=RIGHT if said == target.test_y[i] else WRONG,
                )
            pair[0, column].set_title(f"true: {target.test_y[i]}", fontsize=10, pad=4)
    figure.text(0.54, 0.025, "wrong predictions in red", ha="center", color=WRONG)


def draw_picture(axes: Axes, picture: np.ndarray) -> None:
    """One picture, without ticks."""
    axes.imshow(picture[..., 0], cmap="gray", vmin=-1.15, vmax=1.15)
    axes.set(xticks=[], yticks=[])
