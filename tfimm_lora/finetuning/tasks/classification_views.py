"""How the results of a classification are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.metrics import Evaluation
from tfimm_lora.finetuning.report import sections
from tfimm_lora.finetuning.report.figures import Target
from tfimm_lora.finetuning.report.formatting import (
    decimal,
    interval,
    percent,
    probability,
    readable,
)
from tfimm_lora.finetuning.report.html import Html
from tfimm_lora.finetuning.report.plots import (
    TITLES,
    draw_confusion,
    draw_mistakes,
    mistaken_files,
)
from tfimm_lora.finetuning.tasks.base import LEARNED_NOTHING, Example, Table, Views

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

#: The answer below the threshold.
UNSURE = "unsure"

#: The largest number of mistakes that are shown, and of labels of a prediction by default.
_SHOWN, _TOP = 24, 5


@dataclass(frozen=True)
class ClassificationViews(Views):
    """How the results of a classification are shown."""

    labels: tuple[str, ...]

    titles: ClassVar[Mapping[str, str]] = TITLES

    # -- evaluations -----------------------------------------------------------------------

    def headline(self, evaluation: Evaluation, kind: str) -> str:
        pictures = f"{len(evaluation.predictions)} {kind} pictures"
        return f"accuracy {percent(evaluation.accuracy)} on {pictures}"

    def advice(self, evaluation: Evaluation) -> str | None:
        found = {x.predicted for x in evaluation.predictions}
        if len(found) > 1 or len({x.true for x in evaluation.predictions}) < 2:
            return None
        return f"all pictures are classified as {readable(*found)}. {LEARNED_NOTHING}"

    def scores(self, evaluation: Evaluation) -> dict[str, float]:
        return {"accuracy": evaluation.accuracy, "loss": evaluation.loss}

    def table(self, evaluation: Evaluation) -> Table:
        rows = []
        for x in evaluation.classes:
            numbers = (percent(x.recall), percent(x.precision), f"{x.f1:.3f}")
            rows.append([readable(x.label), str(x.count), *(numbers if x.count else "---")])
        return Table(["class", "pictures", "recall", "precision", "F1"], rows)

    def facts(self, evaluation: Evaluation) -> list[tuple[str, str]]:
        low, high = evaluation.accuracy_interval()
        facts = [
            ("pictures", f"{len(evaluation.predictions):,}"),
            (
                "accuracy",
                f"{percent(evaluation.accuracy)} (95 % interval: {interval(low, high)})",
            ),
            ("balanced accuracy", percent(evaluation.balanced_accuracy)),
            ("loss", decimal(evaluation.loss)),
            ("calibration error", percent(evaluation.calibration_error)),
        ]
        if evaluation.top5 is not None:
            facts.insert(2, ("top 5", percent(evaluation.top5)))
        return facts

    def prediction_rows(self, evaluation: Evaluation) -> list[list[Any]]:
        header = ["path", "label", "predicted", "probability", "probability_of_label", "loss"]
        rows: list[list[Any]] = [header]
        for x in evaluation.predictions:
            numbers = (x.probability, x.probability_of_true, x.loss)
            rows.append([x.path, x.true, x.predicted, *(f"{n:.6g}" for n in numbers)])
        return rows

    def drawings(self, evaluation: Evaluation) -> dict[str, Callable[[Target], None]]:
        return {
            "confusion.png": lambda path: draw_confusion(evaluation, path),
            "mistakes.png": lambda path: draw_mistakes(evaluation, path, _SHOWN),
        }

    def result(self, evaluation: Evaluation, kind: str = "validation") -> Html:
        return sections.result(evaluation, kind)

    def sections(self, run: Run, evaluation: Evaluation) -> dict[str, Html]:
        mistakes = mistaken_files(evaluation, _SHOWN)
        return {
            "Confusions": sections.confusions(evaluation),
            "Classes": sections.classes(evaluation),
            "Mistakes": sections.mistakes(run, evaluation, mistakes),
        }

    def examples(self, evaluation: Evaluation) -> list[Example]:
        """The most confident mistakes; without any, the least confident predictions."""
        least = sorted(evaluation.predictions, key=lambda x: (x.probability, x.path or ""))
        return [
            Example(str(x.path), self.labels.index(x.predicted), sections.prediction_lines(x))
            for x in evaluation.worst() or least
        ]

    # -- predictions -----------------------------------------------------------------------

    def answer(
        self, path: str, values: np.ndarray, top: int | None, threshold: float | None
    ) -> dict[str, Any]:
        best = np.argsort(-values, kind="stable")[: top or _TOP]
        ranked = [{"label": self.labels[i], "probability": float(values[i])} for i in best]
        if threshold is None:
            return {"path": path, **ranked[0], "top": ranked}
        unsure = ranked[0]["probability"] < threshold
        answer = UNSURE if unsure else ranked[0]["label"]
        return {"path": path, "answer": answer, "unsure": unsure, **ranked[0], "top": ranked}

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> Table:
        """An unsure answer has all labels in the last column."""
        rows = []
        for x in answers:
            unsure = x.get("unsure", False)
            others = x["top"] if unsure else x["top"][1:]
            listed = (f"{readable(o['label'])} {probability(o['probability'])}" for o in others)
            label = UNSURE if unsure else readable(x["label"])
            rows.append([label, probability(x["probability"]), ", ".join(listed)])
        return Table(["label", "probability", "next"], rows, ("label", "next"))

    def answer_rows(self, answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """A row for each picture: path, label, probability, label_2, ...

        With a threshold, the column "answer" follows the path.
        """
        width = max((len(x["top"]) for x in answers), default=1)
        answered = any("answer" in x for x in answers)
        names = ["path", *(["answer"] if answered else []), "label", "probability"]
        names += [
            f"{name}_{i}" for i in range(2, width + 1) for name in ("label", "probability")
        ]
        rows: list[list[Any]] = [names]
        for x in answers:
            ranked = [(one["label"], f"{one['probability']:.6g}") for one in x["top"]]
            first = [x["path"], *([x["answer"]] if answered else [])]
            rows.append([*first, *(cell for pair in ranked for cell in pair)])
        return rows

    def notes(self, answers: Sequence[Mapping[str, Any]], threshold: float | None) -> list[str]:
        if threshold is None:
            return []
        unsure = sum(bool(x.get("unsure")) for x in answers)
        notes = [f"{unsure} of {len(answers)} pictures are below the threshold {threshold:g}"]
        if UNSURE in self.labels:
            notes.append(
                f'warning: a class is called "{UNSURE}"; "unsure" in the JSON tells them apart'
            )
        return notes
