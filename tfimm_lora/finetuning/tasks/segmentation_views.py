"""How the results of a segmentation are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from tfimm_lora.finetuning.data.mask_classes import MaskClasses
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.report.figures import Target, canvas
from tfimm_lora.finetuning.report.formatting import decimal, percent, readable
from tfimm_lora.finetuning.report.html import Html, joined, tag, thumbnail_of
from tfimm_lora.finetuning.report.overlays import side_by_side
from tfimm_lora.finetuning.report.sections import count, number, shown_path, table
from tfimm_lora.finetuning.segmentation_metrics import (
    MaskPrediction,
    RegionScores,
    SegmentationEvaluation,
)
from tfimm_lora.finetuning.tasks.base import LEARNED_NOTHING, Table, Views

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

#: The largest number of pictures that are shown.
_SHOWN = 12


@dataclass(frozen=True)
class SegmentationViews(Views):
    """How the results of a segmentation are shown."""

    classes: MaskClasses

    titles: ClassVar[Mapping[str, str]] = {
        "mean_iou": "Mean IoU",
        "loss": "Loss (cross-entropy of pixels)",
    }

    # -- evaluations -----------------------------------------------------------------------

    def headline(self, evaluation: SegmentationEvaluation, kind: str) -> str:
        return (
            f"mean IoU {evaluation.mean_iou:.3f}, {percent(evaluation.accuracy)} of the pixels "
            f"correct in {len(evaluation.predictions)} {kind} pictures"
        )

    def advice(self, evaluation: SegmentationEvaluation) -> str | None:
        true, predicted = (np.flatnonzero(evaluation.confusion.sum(axis)) for axis in (1, 0))
        if len(predicted) > 1 or len(true) < 2:
            return None
        label = readable(evaluation.labels[predicted[0]])
        return f"all pixels are classified as {label}. {LEARNED_NOTHING}, or more --epochs"

    def scores(self, evaluation: SegmentationEvaluation) -> dict[str, Any]:
        return {
            "mean_iou": evaluation.mean_iou,
            "mean_dice": evaluation.mean_dice,
            "pixel_accuracy": evaluation.accuracy,
            "loss": evaluation.loss,
        }

    def table(self, evaluation: SegmentationEvaluation) -> Table:
        total = int(evaluation.confusion.sum())
        rows = [[readable(x.label), *_cells(x, total)] for x in evaluation.classes]
        header = ["class", "of the pixels", "IoU", "Dice", "recall", "precision"]
        return Table(header, rows)

    def facts(self, evaluation: SegmentationEvaluation) -> list[tuple[str, str]]:
        return [
            ("pictures", f"{len(evaluation.predictions):,}"),
            ("mean IoU", f"{evaluation.mean_iou:.4f}"),
            ("mean Dice", f"{evaluation.mean_dice:.4f}"),
            ("pixel accuracy", percent(evaluation.accuracy)),
            ("loss", f"{decimal(evaluation.loss)} (cross-entropy of pixels)"),
        ]

    def prediction_rows(self, evaluation: SegmentationEvaluation) -> list[list[Any]]:
        rows: list[list[Any]] = [["path", "mean IoU", "pixel accuracy", "loss"]]
        for x in evaluation.predictions:
            rows.append([x.path, f"{x.iou:.6g}", f"{x.accuracy:.6g}", f"{x.loss:.6g}"])
        return rows

    def drawings(
        self, evaluation: SegmentationEvaluation
    ) -> dict[str, Callable[[Target], None]]:
        return {"mistakes.png": lambda path: self._draw_worst(evaluation, path)}

    def _draw_worst(self, evaluation: SegmentationEvaluation, path: Target) -> None:
        shown = evaluation.worst(_SHOWN)
        with canvas(path, 8.0, 2.4 * len(shown) + 0.7, dark=False) as (figure, theme):
            title = f"{_title(len(shown), evaluation)}\npicture, mask, prediction"
            figure.suptitle(title, x=0.01, ha="left", fontsize=10, linespacing=1.5)
            for place, x in enumerate(shown, start=1):
                axes = figure.add_subplot(len(shown), 1, place)
                axes.set_axis_off()
                try:
                    axes.imshow(self._drawn(x))
                except UnreadablePicture:
                    axes.text(0.5, 0.5, "cannot be read now", color=theme.muted)
                axes.set_title(f"{readable(str(x.path))}: IoU {x.iou:.3f}", fontsize=8)

    def _drawn(self, x: MaskPrediction) -> np.ndarray:
        assert x.true is not None and x.predicted is not None
        return side_by_side(str(x.path), (x.true, x.predicted), self.classes.palette)

    def result(self, evaluation: SegmentationEvaluation, kind: str = "validation") -> Html:
        pictures = count(len(evaluation.predictions), f"{kind} picture")
        most = max(evaluation.classes, key=lambda x: x.pixels)
        guess = most.pixels / evaluation.confusion.sum()
        intro = tag(
            "p",
            f"Of the pixels of {pictures}, {percent(evaluation.accuracy)} have the right "
            f"class. Always predicting {most.label} would be right for {percent(guess)}.",
        )
        numbers = [
            number("Mean IoU", f"{evaluation.mean_iou:.3f}", "mean of classes", class_="main"),
            number("Mean Dice", f"{evaluation.mean_dice:.3f}", "mean of classes"),
            number("Pixel accuracy", percent(evaluation.accuracy), "of all pixels"),
            number("Loss", decimal(evaluation.loss, 3), "cross-entropy of pixels"),
        ]
        return joined(intro, tag("dl", *numbers, class_="numbers"))

    def sections(self, run: Run, evaluation: SegmentationEvaluation) -> dict[str, Html]:
        caption = (
            "IoU: the pixels of the class that are found, divided by those that are of the "
            "class or predicted as it. Dice: the F1 of the pixels. Masks are compared at the "
            "size of the input of the model."
        )
        total = int(evaluation.confusion.sum())
        colours = dict(zip(self.classes.names, self.classes.palette.tolist()))
        lowest = sorted(evaluation.classes, key=lambda x: (x.iou is None, x.iou))
        rows = [
            [
                joined(_swatch(colours[x.label]), tag("span", x.label)),
                *_cells(x, total),
                tag("span", tag("i", style=f"width: {100 * (x.iou or 0):.1f}%")),
            ]
            for x in lowest
        ]
        names = ("Class", "Of the pixels", "IoU", "Dice", "Recall", "Precision", "")
        shown = evaluation.worst(_SHOWN)
        return {
            "Classes": joined(
                tag("p", caption, class_="quiet"),
                tag("div", table(names, rows, numbers=(1, 2, 3, 4, 5)), class_="long"),
            ),
            "Worst pictures": joined(
                tag("p", f"{_title(len(shown), evaluation)}."),
                tag("p", "The picture, its mask, and the prediction.", class_="quiet"),
                *(self._figure(run, x) for x in shown),
            ),
        }

    def _figure(self, run: Run, x: MaskPrediction) -> Html:
        try:
            seen = thumbnail_of(self._drawn(x), side=640)
        except UnreadablePicture:
            seen = tag("span", "cannot be read now")
        return tag(
            "figure",
            tag("div", seen),
            tag(
                "figcaption",
                tag("span", f"IoU {x.iou:.3f}, {percent(x.accuracy)} of the pixels right"),
                tag("span", shown_path(run, str(x.path)), class_="path"),
            ),
        )

    # -- predictions -----------------------------------------------------------------------

    def check_options(self, top: int | None, threshold: float | None) -> None:
        given = {"--top": top, "--threshold": threshold}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"Received {name} {value} for a segmentation; expected none. It predicts "
                    "the class of each pixel."
                )

    def answer(
        self, path: str, values: np.ndarray, top: int | None, threshold: float | None
    ) -> dict[str, Any]:
        """The share of the pixels of each class, from shares (classes,)."""
        shares = dict(zip(self.classes.names, map(float, values)))
        return {"path": path, "shares": shares}

    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> Table:
        rows = []
        for x in answers:
            largest = sorted(x["shares"].items(), key=lambda item: -item[1])
            texts = [f"{readable(n)} {percent(v)}" for n, v in largest if v > 0]
            rows.append([", ".join(texts), readable(x.get("mask") or "-")])
        return Table(["classes of the pixels", "mask"], rows, ("classes of the pixels", "mask"))

    def answer_rows(self, answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """A row for each picture: path, mask, and the share of the pixels of each class."""
        rows: list[list[Any]] = [["path", "mask", *self.classes.names]]
        for x in answers:
            shares = (f"{value:.6g}" for value in x["shares"].values())
            rows.append([x["path"], x.get("mask") or "", *shares])
        return rows

    def notes(self, answers: Sequence[Mapping[str, Any]], threshold: float | None) -> list[str]:
        if any(x.get("mask") for x in answers):
            return []
        return ["no masks were written; pass --out FOLDER (with --overlay) to write them"]


def _cells(x: RegionScores, total: int) -> list[str]:
    scores = (x.iou, x.dice, x.recall, x.precision)
    texts = ["-" if score is None else f"{score:.3f}" for score in scores]
    return [percent(x.pixels / total), *texts]


def _swatch(colour: Sequence[int]) -> Html:
    r, g, b = colour
    style = f"display:inline-block;width:.8em;height:.8em;background:rgb({r},{g},{b})"
    return joined(tag("span", "", style=style), " ")


def _title(shown: int, evaluation: SegmentationEvaluation) -> str:
    total = len(evaluation.predictions)
    if shown == total:
        return f"All {total:,} pictures, the lowest IoU first"
    return f"The {shown} pictures with the lowest IoU among {total:,}"
