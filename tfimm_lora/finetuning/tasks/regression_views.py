"""How the results of a regression are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.regression_metrics import NumberPrediction, RegressionEvaluation
from tfimm_lora.finetuning.report.figures import Target, canvas
from tfimm_lora.finetuning.report.formatting import decimal, percent, readable, shortened
from tfimm_lora.finetuning.report.html import Html, drawing, joined, tag
from tfimm_lora.finetuning.report.plots import Captioned, draw_pictures
from tfimm_lora.finetuning.report.sections import both, captioned, count, number, table
from tfimm_lora.finetuning.tasks.base import LEARNED_NOTHING, Example, Table, Views

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

#: The largest number of errors that are shown, and of targets with a plot.
_SHOWN, _PLOTS = 24, 12

#: Predictions whose standard deviation is below this share of that of the targets are the same.
_SAME = 0.01


@dataclass(frozen=True)
class RegressionViews(Views):
    """How the results of a regression are shown."""

    labels: tuple[str, ...]
    half_widths: tuple[float, ...] | None
    level: float

    titles: ClassVar[Mapping[str, str]] = {
        "mae": "Mean absolute error (standard deviations)",
        "loss": "Loss (mean squared error, standardised)",
    }
    explained: ClassVar[str] = "a larger or a smaller number"

    # -- evaluations -----------------------------------------------------------------------

    def headline(self, evaluation: RegressionEvaluation, kind: str) -> str:
        errors = ", ".join(
            f"{readable(x.label)} {_text(x.mae)} (R2 {_r2(x.r2)})" for x in evaluation.scores
        )
        return f"mean absolute error {errors} on {len(evaluation.predictions)} {kind} pictures"

    def advice(self, evaluation: RegressionEvaluation) -> str | None:
        pairs = [(x.true, x.predicted) for x in evaluation.predictions]
        true, predicted = np.std(pairs, axis=0)
        same = [
            readable(label)
            for label, spread, found in zip(evaluation.labels, true, predicted)
            if found < _SAME * spread
        ]
        if not same:
            return None
        return f"all predictions of {', '.join(same)} are the same. {LEARNED_NOTHING}"

    def scores(self, evaluation: RegressionEvaluation) -> dict[str, Any]:
        return {
            "mae": {x.label: x.mae for x in evaluation.scores},
            "r2": {x.label: x.r2 for x in evaluation.scores},
            "loss": evaluation.loss,
        }

    def table(self, evaluation: RegressionEvaluation) -> Table:
        rows = [[readable(x.label), *self._cells(x)] for x in evaluation.scores]
        return Table(["target", "MAE", "RMSE", "R2", *self._interval_names()], rows)

    def _cells(self, x: Any) -> list[str]:
        cells = [_text(x.mae), _text(x.rmse), _r2(x.r2)]
        if x.half_width is not None:
            cells += [f"± {_text(x.half_width)}", percent(x.coverage)]
        return cells

    def _interval_names(self) -> list[str]:
        if self.half_widths is None:
            return []
        return [f"{100 * self.level:g} % interval", "inside"]

    def facts(self, evaluation: RegressionEvaluation) -> list[tuple[str, str]]:
        return [
            ("pictures", f"{len(evaluation.predictions):,}"),
            ("loss", f"{decimal(evaluation.loss)} (mean squared error, standardised)"),
        ]

    def prediction_rows(self, evaluation: RegressionEvaluation) -> list[list[Any]]:
        names = [n for label in evaluation.labels for n in (label, f"{label} predicted")]
        rows: list[list[Any]] = [["path", *names, "error"]]
        for x in evaluation.predictions:
            pairs = zip(x.true, x.predicted)
            cells = (f"{value:.7g}" for pair in pairs for value in pair)
            rows.append([x.path, *cells, f"{x.error:.6g}"])
        return rows

    def drawings(self, evaluation: RegressionEvaluation) -> dict[str, Callable[[Target], None]]:
        return {
            "predictions.png": lambda path: self.draw_scatter(evaluation, path),
            "mistakes.png": lambda path: self._draw_errors(evaluation, path),
        }

    def draw_scatter(
        self, evaluation: RegressionEvaluation, path: Target, *, dark: bool = False
    ) -> None:
        """Draw the predicted against the true numbers, with the intervals.

        Args:
            evaluation: The evaluation.
            path, dark: As in ``draw_curves``.

        Raises:
            ImportError: without matplotlib.
        """
        true = np.array([x.true for x in evaluation.predictions])
        predicted = np.array([x.predicted for x in evaluation.predictions])
        shown = evaluation.scores[:_PLOTS]
        columns = min(3, len(shown))
        rows = math.ceil(len(shown) / columns)
        side = 3.6 if len(shown) == 1 else 3.0
        with canvas(path, side * columns + 0.4, side * rows + 0.4, dark) as (figure, theme):
            for i, scores in enumerate(shown):
                axes = figure.add_subplot(rows, columns, i + 1)
                x, y = true[:, i], predicted[:, i]
                low, high = min(x.min(), y.min()), max(x.max(), y.max())
                pad = 0.04 * (high - low) or 1.0
                ends = np.array([low - pad, high + pad])
                if scores.half_width is not None:
                    width = scores.half_width
                    axes.fill_between(ends, ends - width, ends + width, color=theme.grid)
                axes.plot(ends, ends, color=theme.muted, linewidth=1, linestyle="--")
                axes.plot(x, y, "o", color=theme.blue, ms=4, alpha=0.6, markeredgewidth=0)
                axes.set_xlim(*ends)
                axes.set_ylim(*ends)
                axes.set_aspect("equal")
                axes.set_title(f"{shortened(readable(scores.label), 24)}  R2 {_r2(scores.r2)}")
                axes.set_xlabel("True")
                axes.set_ylabel("Predicted")
                axes.grid()

    def _draw_errors(self, evaluation: RegressionEvaluation, path: Target) -> None:
        shown = evaluation.worst(_SHOWN)
        pictures = [Captioned(str(x.path), self._lines(x)) for x in shown]
        draw_pictures(pictures, path, f"{_title(len(shown), evaluation)}\ntrue → predicted")

    def _lines(self, x: NumberPrediction) -> tuple[tuple[str, str], ...]:
        """The numbers of a picture; of many, those of the first targets."""
        if len(self.labels) == 1:
            return ("blue", _text(x.true[0])), ("orange", f"→ {_text(x.predicted[0])}")
        found = zip(self.labels, x.true, x.predicted)
        texts = (f"{readable(n)} {_text(t)} → {_text(p)}" for n, t, p in found)
        return tuple(("ink", shortened(text, 26)) for text in texts)[:3]

    def result(self, evaluation: RegressionEvaluation, kind: str = "validation") -> Html:
        first = evaluation.scores[0]
        pictures = count(len(evaluation.predictions), f"{kind} picture")
        several = len(evaluation.scores) > 1
        intro = tag(
            "p",
            f"Errors on {pictures}, in the units of the targets. R2 is 1 for perfect "
            "predictions and 0 for always predicting the mean.",
        )
        numbers = [
            number(
                f"MAE of {first.label}" if several else "MAE",
                _text(first.mae),
                "mean absolute error",
                class_="main",
            ),
            number("RMSE", _text(first.rmse), "root of the mean squared error"),
            number("R2", _r2(first.r2), "share of the variance explained"),
            number("Loss", decimal(evaluation.loss, 3), "mean squared error, standardised"),
        ]
        if first.half_width is not None and first.coverage is not None:
            note = f"{percent(first.coverage)} of these pictures are inside"
            name = f"{100 * self.level:g} % interval"
            numbers.insert(3, number(name, f"± {_text(first.half_width)}", note))
        return joined(intro, tag("dl", *numbers, class_="numbers"))

    def sections(self, run: Run, evaluation: RegressionEvaluation) -> dict[str, Html]:
        plots = both(lambda file, dark: self.draw_scatter(evaluation, file, dark=dark))
        names = ("Target", "MAE", "RMSE", "R2", *self._interval_names())
        rows = [[tag("span", x.label), *self._cells(x)] for x in evaluation.scores]
        caption = (
            "Grey: the prediction intervals, from the errors on the validation pictures. The "
            f"number of a new picture is inside with a probability of {100 * self.level:g} %, "
            "if it is drawn like them."
            if self.half_widths is not None
            else "No prediction intervals: there are too few validation pictures, or they were "
            f"not computed yet. {100 * self.level:g} % needs at least "
            f"{math.ceil(self.level / (1 - self.level) - 1e-9)}."
        )
        worst = evaluation.worst(_SHOWN)
        items = [tag("li", self._figure(run, x)) for x in worst]
        key = "Blue: the true number. Orange: the predicted one."
        return {
            "Predictions": tag(
                "div",
                tag("div", drawing(*plots, alt="Predicted and true numbers")),
                tag(
                    "div",
                    tag("p", caption, class_="quiet"),
                    table(names, rows, numbers=tuple(range(1, len(names)))),
                    class_="rest",
                ),
                class_="sides",
            ),
            "Largest errors": joined(
                tag("p", f"{_title(len(worst), evaluation)}."),
                tag("p", key, class_="quiet"),
                tag("ol", *items, class_="mistakes"),
            ),
        }

    def _figure(self, run: Run, x: NumberPrediction) -> Html:
        numbers = range(len(self.labels))
        lines = [line for target in numbers for line in self._html_lines(x, target)]
        return captioned(run, str(x.path), lines)

    def _html_lines(self, x: NumberPrediction, target: int) -> tuple[Html, ...]:
        """One of the numbers of a picture, with its name if there are several."""
        arrow = f"→\N{NO-BREAK SPACE}{_text(x.predicted[target])}"
        lines = (
            tag("span", _text(x.true[target]), class_="true"),
            tag("span", arrow, class_="predicted"),
        )
        name = tag("span", self.labels[target])
        return (name, *lines) if len(self.labels) > 1 else lines

    def examples(self, evaluation: RegressionEvaluation) -> list[Example]:
        """The largest errors, each with the number that is furthest off."""
        scale = [scores.rmse or 1.0 for scores in evaluation.scores]
        found = []
        for x in evaluation.worst():
            off = [abs(t - p) / s for t, p, s in zip(x.true, x.predicted, scale)]
            target = int(np.argmax(off))
            found.append(Example(str(x.path), target, self._html_lines(x, target)))
        return found

    # -- predictions -----------------------------------------------------------------------

    def check_options(self, top: int | None, threshold: float | None) -> None:
        given = {"--top": top, "--threshold": threshold}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"Received {name} {value} for a regression; expected none. It predicts "
                    "numbers, not labels with probabilities."
                )

    def answer(
        self, path: str, values: np.ndarray, top: int | None, threshold: float | None
    ) -> dict[str, Any]:
        numbers = dict(zip(self.labels, map(float, values)))
        if self.half_widths is None:
            return {"path": path, "numbers": numbers}
        widths = zip(numbers.items(), self.half_widths)
        intervals = {name: [x - width, x + width] for (name, x), width in widths}
        return {"path": path, "numbers": numbers, "intervals": intervals, "level": self.level}

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> Table:
        name, header = f"{100 * self.level:g} % interval", []
        for label in self.labels:
            header += [readable(label), *([name] if self.half_widths is not None else [])]
        rows = []
        for x in answers:
            row = []
            for label in self.labels:
                row.append(_text(x["numbers"][label]))
                if "intervals" in x:
                    low, high = x["intervals"][label]
                    row.append(f"{_text(low)} to {_text(high)}")
            rows.append(row)
        return Table(header, rows)

    def answer_rows(self, answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """A row for each picture: path, and each number with the ends of its interval."""
        with_ends = self.half_widths is not None
        header = ["path"]
        for label in self.labels:
            header += [label, *([f"{label} low", f"{label} high"] if with_ends else [])]
        rows: list[list[Any]] = [header]
        for x in answers:
            row = [x["path"]]
            for label in self.labels:
                ends = x["intervals"][label] if with_ends else []
                row += [f"{value:.7g}" for value in (x["numbers"][label], *ends)]
            rows.append(row)
        return rows

    def notes(self, answers: Sequence[Mapping[str, Any]], threshold: float | None) -> list[str]:
        if self.half_widths is not None:
            return []
        return ["no intervals: the run has too few validation pictures, or is not complete"]


def _title(shown: int, evaluation: RegressionEvaluation) -> str:
    total = len(evaluation.predictions)
    if shown == total:
        return f"All {total:,} pictures, the largest errors first"
    return f"The {shown} largest errors among {total:,} pictures"


def _text(value: float) -> str:
    """A number with four significant digits."""
    text = f"{value:.4g}"
    return f"{value:.0f}" if "e+" in text and abs(value) < 1e9 else text


def _r2(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
