"""How the results of a model for several labels are shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.multilabel_metrics import (
    LabelMistake,
    LabelScores,
    MultiLabelEvaluation,
    precision_and_recall,
)
from tfimm_lora.finetuning.report.figures import Target, canvas
from tfimm_lora.finetuning.report.formatting import (
    decimal,
    percent,
    probability,
    readable,
    shortened,
)
from tfimm_lora.finetuning.report.html import Html, drawing, joined, tag
from tfimm_lora.finetuning.report.plots import Captioned, draw_pictures
from tfimm_lora.finetuning.report.sections import both, captioned, count, number, table
from tfimm_lora.finetuning.tasks.base import LEARNED_NOTHING, Example, Table, Views

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

#: The largest number of labels with a curve, of mistakes in a drawing, and of labels with
#: mistakes in the report and mistakes of each.
_CURVES, _SHOWN, _LABELS, _EACH = 24, 24, 30, 6


@dataclass(frozen=True)
class MultiLabelViews(Views):
    """How the results of a model for several labels are shown."""

    labels: tuple[str, ...]
    thresholds: tuple[float, ...] | None

    titles: ClassVar[Mapping[str, str]] = {
        "pr_auc": "Area under precision and recall",
        "loss": "Loss (binary cross-entropy)",
    }
    explained: ClassVar[str] = "the label"

    # -- evaluations -----------------------------------------------------------------------

    def headline(self, evaluation: MultiLabelEvaluation, kind: str) -> str:
        pictures = f"{len(evaluation.predictions)} {kind} pictures"
        precision = _share(evaluation.mean_average_precision)
        return f"mAP {precision}, F1 {evaluation.macro_f1:.3f} on {pictures}"

    def advice(self, evaluation: MultiLabelEvaluation) -> str | None:
        chosen = {x.chosen for x in evaluation.predictions}
        if len(chosen) > 1 or len({x.true for x in evaluation.predictions}) < 2:
            return None
        (labels,) = chosen
        given = ", ".join(map(readable, labels)) if labels else "no label"
        return f"all pictures are given {given}. {LEARNED_NOTHING}"

    def scores(self, evaluation: MultiLabelEvaluation) -> dict[str, Any]:
        return {
            "mean_average_precision": evaluation.mean_average_precision,
            "macro_f1": evaluation.macro_f1,
            "exact": evaluation.exact,
            "loss": evaluation.loss,
        }

    def table(self, evaluation: MultiLabelEvaluation) -> Table:
        header = [
            *("label", "pictures", "average precision", "threshold"),
            *("precision", "recall", "F1"),
        ]
        rows = [[readable(x.label), *_cells(x)] for x in evaluation.scores]
        return Table(header, rows)

    def facts(self, evaluation: MultiLabelEvaluation) -> list[tuple[str, str]]:
        return [
            ("pictures", f"{len(evaluation.predictions):,}"),
            ("mean average precision", _share(evaluation.mean_average_precision)),
            ("F1, mean of labels", f"{evaluation.macro_f1:.3f}"),
            ("F1, all decisions", f"{evaluation.micro_f1:.3f}"),
            ("exactly right", percent(evaluation.exact)),
            ("loss", decimal(evaluation.loss)),
        ]

    def prediction_rows(self, evaluation: MultiLabelEvaluation) -> list[list[Any]]:
        rows: list[list[Any]] = [["path", "labels", "predicted", "loss", *evaluation.labels]]
        for x in evaluation.predictions:
            numbers = (f"{value:.6g}" for value in (x.loss, *x.probabilities))
            rows.append([x.path, "|".join(x.true), "|".join(x.chosen), *numbers])
        return rows

    def drawings(self, evaluation: MultiLabelEvaluation) -> dict[str, Callable[[Target], None]]:
        return {
            "precision-recall.png": lambda path: draw_precision_recall(evaluation, path),
            "mistakes.png": lambda path: _draw_mistakes(evaluation, path),
        }

    def result(self, evaluation: MultiLabelEvaluation, kind: str = "validation") -> Html:
        pictures = count(len(evaluation.predictions), f"{kind} picture")
        chance = np.mean([x.count for x in evaluation.scores if x.count] or [0])
        intro = tag(
            "p",
            f"For {percent(evaluation.exact)} of {pictures}, exactly the right labels are "
            "chosen. Choosing at random would have a mean average precision of "
            f"{percent(float(chance) / len(evaluation.predictions))}.",
        )
        numbers = [
            number(
                "mAP",
                _share(evaluation.mean_average_precision),
                "mean of the average precisions",
                class_="main",
            ),
            number("Macro F1", f"{evaluation.macro_f1:.3f}", "mean of labels"),
            number("Micro F1", f"{evaluation.micro_f1:.3f}", "of all decisions"),
            number("Loss", decimal(evaluation.loss, 3), "binary cross-entropy"),
        ]
        return joined(intro, tag("dl", *numbers, class_="numbers"))

    def sections(self, run: Run, evaluation: MultiLabelEvaluation) -> dict[str, Html]:
        return {
            "Labels": self._label_section(evaluation),
            "Precision and recall": _curve_section(evaluation),
            "Mistakes": _mistake_section(run, evaluation),
        }

    def _label_section(self, evaluation: MultiLabelEvaluation) -> Html:
        weakest = sorted(evaluation.scores, key=lambda x: (not x.count, x.average_precision))
        rows = []
        for cells, x in zip(map(_cells, weakest), weakest):
            bar = tag("i", style=f"width: {100 * (x.average_precision or 0):.1f}%")
            rows.append([tag("span", x.label), *cells, tag("span", bar)])
        chosen = (
            "The thresholds are those with the largest F1 on the validation pictures, so F1 is "
            "a little too good on them; the average precision does not depend on thresholds."
            if self.thresholds is not None
            else "The thresholds are 0.5, since none were chosen yet."
        )
        caption = (
            "Sorted by average precision, the lowest first. A label is chosen from its "
            f"threshold on. {chosen} Precision: the share of the pictures for which the label "
            "is chosen that have it. Recall: the share of the pictures with the label for "
            "which it is chosen. F1: the harmonic mean of both."
        )
        header = (
            *("Label", "Pictures", "Average precision", "Threshold"),
            *("Precision", "Recall", "F1", ""),
        )
        shown = table(header, rows, numbers=(1, 2, 3, 4, 5, 6))
        return joined(tag("p", caption, class_="quiet"), tag("div", shown, class_="long"))

    def examples(self, evaluation: MultiLabelEvaluation) -> list[Example]:
        """The wrong decisions about labels, those furthest off first."""
        return [
            Example(str(x.path), self.labels.index(x.label), (tag("span", x.label), *_lines(x)))
            for x in evaluation.mistakes()
        ]

    # -- predictions -----------------------------------------------------------------------

    def answer(
        self, path: str, values: np.ndarray, top: int | None, threshold: float | None
    ) -> dict[str, Any]:
        limits = self.thresholds or (0.5,) * len(self.labels)
        if threshold is not None:
            limits = (threshold,) * len(self.labels)
        listed = [
            {"label": label, "probability": float(p), "threshold": t, "chosen": bool(p >= t)}
            for label, p, t in zip(self.labels, values, limits)
        ]
        ranked = sorted(listed, key=lambda x: -x["probability"])  # type: ignore[operator]
        labels = [x["label"] for x in ranked if x["chosen"]]
        return {"path": path, "labels": labels, "probabilities": ranked[:top]}

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> Table:
        rows = []
        for x in answers:
            yes: list[str] = []
            no: list[str] = []
            for one in x["probabilities"]:
                text = f"{readable(one['label'])} {probability(one['probability'])}"
                (yes if one["chosen"] else no).append(text)
            rows.append([", ".join(yes) or "(none)", ", ".join(no)])
        return Table(["labels", "not chosen"], rows, ("labels", "not chosen"))

    def answer_rows(self, answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """A row for each picture: path, labels, and the probability of each label."""
        rows: list[list[Any]] = [["path", "labels", *self.labels]]
        for x in answers:
            given = {one["label"]: f"{one['probability']:.6g}" for one in x["probabilities"]}
            cells = (given.get(label, "") for label in self.labels)
            rows.append([x["path"], "|".join(x["labels"]), *cells])
        return rows

    def notes(self, answers: Sequence[Mapping[str, Any]], threshold: float | None) -> list[str]:
        none = sum(not x["labels"] for x in answers)
        notes = [f"{none} of {len(answers)} pictures have no label"] if none else []
        if self.thresholds is None and threshold is None:
            notes.append("no thresholds were chosen yet, so they are 0.5")
        return notes


def draw_precision_recall(
    evaluation: MultiLabelEvaluation, path: Target, *, dark: bool = False
) -> None:
    """Draw precision against recall for each label, and the point of its threshold.

    Args:
        evaluation: The evaluation. Labels without pictures are left out.
        path, dark: As in ``draw_curves``.

    Raises:
        ImportError: without matplotlib.
    """
    shown = [(i, x) for i, x in enumerate(evaluation.scores) if x.count][:_CURVES]
    columns = min(4, max(len(shown), 1))
    rows = max(math.ceil(len(shown) / columns), 1)
    with canvas(path, 2.3 * columns, 2.3 * rows + 0.4, dark) as (figure, theme):
        for place, (i, scores) in enumerate(shown, start=1):
            axes = figure.add_subplot(rows, columns, place)
            found = precision_and_recall(evaluation.true[:, i], evaluation.probabilities[:, i])
            precision, recall, _ = found
            axes.step([0, *recall], [precision[0], *precision], where="pre", color=theme.blue)
            axes.plot(scores.recall, scores.precision, "o", color=theme.orange, ms=5)
            axes.axhline(
                scores.count / len(evaluation.predictions),
                color=theme.muted,
                linestyle=":",
                linewidth=1,
            )
            name = shortened(readable(scores.label), 18)
            axes.set_title(f"{name}  {_share(scores.average_precision)}", fontsize=9)
            axes.set_xlim(0, 1.02)
            axes.set_ylim(0, 1.04)
            axes.grid()
        figure.supxlabel("Recall", fontsize=9, color=theme.muted)
        figure.supylabel("Precision", fontsize=9, color=theme.muted)


def _curve_section(evaluation: MultiLabelEvaluation) -> Html:
    curves = both(lambda file, dark: draw_precision_recall(evaluation, file, dark=dark))
    known = sum(bool(x.count) for x in evaluation.scores)
    first = f"The first {_CURVES} of {known} labels. " if known > _CURVES else ""
    caption = (
        f"{first}Above each: the average precision, the area under the curve. Orange: the "
        "chosen threshold. Dotted: the precision of choosing at random."
    )
    return joined(
        tag("p", caption, class_="quiet"), drawing(*curves, alt="Precision and recall")
    )


def _mistake_section(run: Run, evaluation: MultiLabelEvaluation) -> Html:
    """The worst wrong decisions about each label, as pictures."""
    wrong = {x.label: evaluation.mistakes(x.label) for x in evaluation.scores}
    total = sum(map(len, wrong.values()))
    decisions = len(evaluation.predictions) * len(evaluation.labels)
    parts = [tag("p", f"{total:,} of {decisions:,} decisions are wrong.")]
    if total:
        key = (
            "Blue: a label that the picture has and that was not chosen. Orange: a label that "
            "was chosen and that it does not have. With its probability."
        )
        parts.append(tag("p", key, class_="quiet"))
    shown = [(label, found) for label, found in wrong.items() if found]
    for label, found in shown[:_LABELS]:
        items = [tag("li", _figure(run, x)) for x in found[:_EACH]]
        more = f", the {_EACH} furthest off" if len(found) > _EACH else ""
        parts.append(tag("h3", f"{label}: {count(len(found), 'mistake')}{more}"))
        parts.append(tag("ol", *items, class_="mistakes"))
    if len(shown) > _LABELS:
        parts.append(tag("p", f"And mistakes in {len(shown) - _LABELS:,} more labels."))
    return joined(*parts)


def _figure(run: Run, mistake: LabelMistake) -> Html:
    return captioned(run, str(mistake.path), _lines(mistake))


def _lines(mistake: LabelMistake) -> tuple[Html, ...]:
    verb = "missing" if mistake.missing else "wrongly chosen"
    return (
        tag("span", verb, class_="true" if mistake.missing else "predicted"),
        tag("span", probability(mistake.probability)),
    )


def _draw_mistakes(evaluation: MultiLabelEvaluation, path: Target) -> None:
    found = evaluation.mistakes()
    shown = found[:_SHOWN]
    title = f"{len(found):,} wrong decisions about labels"
    if len(shown) < len(found):
        title += f", the {len(shown)} furthest off"
    pictures = [
        Captioned(
            str(x.path),
            (
                ("blue" if x.missing else "orange", shortened(readable(x.label), 22)),
                ("muted", "missing" if x.missing else "wrongly chosen"),
                ("muted", probability(x.probability)),
            ),
        )
        for x in shown
    ]
    draw_pictures(pictures, path, title if found else "No mistakes")


def _cells(x: LabelScores) -> list[str]:
    """The number of pictures of a label, and its scores."""
    shares = (percent(x.precision), percent(x.recall), f"{x.f1:.3f}")
    first = [f"{x.count:,}", _share(x.average_precision), f"{x.threshold:.3f}"]
    return [*first, *(shares if x.count else "---")]


def _share(value: float | None) -> str:
    return "-" if value is None else percent(value)
