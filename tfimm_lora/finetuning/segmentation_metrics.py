"""``SegmentationEvaluation``: the metrics of a model that predicts the class of each pixel."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.mask_classes import IGNORED
from tfimm_lora.finetuning.metrics import log_softmax

#: The number of worst pictures whose masks are kept, for drawings.
KEPT = 12


@dataclass(frozen=True)
class RegionScores:
    """The metrics of one class, over the pixels of all pictures.

    With the pixels of the class T and those that are predicted as it P:

    Attributes:
        label: The name of the class.
        pixels: The number of pixels of the class, |T|.
        iou: |T and P| / |T or P|; None if the class is neither there nor predicted.
        dice: 2 |T and P| / (|T| + |P|), the F1 of the pixels; None as ``iou``.
        recall: |T and P| / |T|; None without pixels of the class.
        precision: |T and P| / |P|; None if the class is not predicted.
    """

    label: str
    pixels: int
    iou: float | None
    dice: float | None
    recall: float | None
    precision: float | None


@dataclass(frozen=True, eq=False)
class MaskPrediction:
    """The prediction for one picture.

    Attributes:
        path: The file; None if the pictures are not files.
        accuracy: The share of the pixels with the right class.
        iou: The mean IoU over the classes that are there or predicted.
        loss: The mean cross-entropy of its pixels.
        true, predicted: The class of each pixel (h, w), -1 if ignored; only for the pictures
            with the lowest IoU.
    """

    path: str | None
    accuracy: float
    iou: float
    loss: float
    true: np.ndarray | None = None
    predicted: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class SegmentationEvaluation:
    """The metrics of a model that predicts the class of each pixel.

    Pixels that are ignored count nowhere.

    Attributes:
        labels: The names of the classes, in the order of the outputs of the model.
        loss: The mean cross-entropy over the pixels of a picture, the mean of the pictures.
        accuracy: The share of all pixels with the right class.
        mean_iou, mean_dice: The mean over the classes that are there or predicted.
        confusion: The number of pixels, by true class (rows) and predicted class.
        classes: The metrics of each class.
        predictions: The result for each picture.
    """

    labels: tuple[str, ...]
    loss: float
    accuracy: float
    mean_iou: float
    mean_dice: float
    confusion: np.ndarray
    classes: tuple[RegionScores, ...]
    predictions: tuple[MaskPrediction, ...]

    def worst(self, number: int | None = None) -> list[MaskPrediction]:
        """The pictures with the lowest IoU. Default: all, sorted."""
        return sorted(self.predictions, key=lambda x: (x.iou, x.path or ""))[:number]

    def to_dict(self) -> dict[str, Any]:
        """The metrics as plain values for JSON, without the individual predictions."""
        return {
            "pictures": len(self.predictions),
            "loss": self.loss,
            "pixel_accuracy": self.accuracy,
            "mean_iou": self.mean_iou,
            "mean_dice": self.mean_dice,
            "classes": [asdict(scores) for scores in self.classes],
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
        }


class SegmentationCollector:
    """Computes a ``SegmentationEvaluation`` batch by batch.

    It keeps a confusion matrix and a few numbers for each picture, and no logits.

    Args:
        labels: The names of the classes. Default: "0", "1", ...

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.segmentation_metrics import SegmentationCollector
        >>> collector = SegmentationCollector(("ground", "car"))
        >>> logits = np.log([[[[0.9, 0.1], [0.9, 0.1], [0.2, 0.8]]]])
        >>> collector.add(logits, np.array([[[0, 1, 1]]]))
        >>> value = collector.evaluation()
        >>> value.mean_iou, value.confusion.tolist()
        (0.5, [[1, 0], [1, 1]])
    """

    def __init__(self, labels: Sequence[str] = ()) -> None:
        self.labels = tuple(labels)
        self._confusion = np.zeros((0, 0), np.int64)
        self._predictions: list[MaskPrediction] = []
        self._worst: list[tuple[float, int]] = []

    def add(self, outputs: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch.

        Args:
            outputs: The logits (n, h, w, classes).
            labels: The class of each pixel (n, h, w), -1 if ignored.

        Raises:
            ValueError: if they do not fit together, or a logit is NaN or infinite.
        """
        self._check(outputs, labels)
        if not self._confusion.size:
            self._confusion = np.zeros((outputs.shape[-1],) * 2, np.int64)
        for logits, true in zip(outputs, labels):
            self._add(logits, true)

    def _add(self, logits: np.ndarray, true: np.ndarray) -> None:
        known = true != IGNORED
        predicted = logits.argmax(-1)
        count = logits.shape[-1]
        pairs = true[known].astype(np.int64) * count + predicted[known]
        confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
        self._confusion += confusion
        log_p = log_softmax(logits[known])
        losses = -log_p[np.arange(len(log_p)), true[known]]
        pixels = int(known.sum())
        found = MaskPrediction(
            None,
            float(np.trace(confusion) / pixels) if pixels else 1.0,
            _mean(_ious(confusion)) if pixels else 1.0,
            float(losses.mean()) if pixels else 0.0,
        )
        self._keep(replace(found, true=true, predicted=predicted.astype(np.int32)))

    def _keep(self, found: MaskPrediction) -> None:
        """Add a prediction, and drop the masks of all but the worst."""
        self._predictions.append(found)
        heapq.heappush(self._worst, (-found.iou, len(self._predictions) - 1))
        if len(self._worst) > KEPT:
            # The heap has negative values, so its first has the highest IoU.
            _, best = heapq.heappop(self._worst)
            plain = replace(self._predictions[best], true=None, predicted=None)
            self._predictions[best] = plain

    def evaluation(self, paths: Sequence[str] | None = None) -> SegmentationEvaluation:
        """The evaluation of the batches so far.

        Args:
            paths: The files. Default: none.

        Raises:
            ValueError: if there are none, or no pixel has a class.
        """
        confusion = self._confusion
        if not confusion.sum():
            raise ValueError(
                "Received no pixels with a class; expected at least one that is not ignored."
            )
        names = self.labels or tuple(map(str, range(len(confusion))))
        found = self._predictions
        if paths is not None:
            found = [replace(x, path=path) for x, path in zip(found, paths)]
        classes = tuple(map(_scores, names, range(len(names)), [confusion] * len(names)))
        return SegmentationEvaluation(
            labels=names,
            loss=float(np.mean([x.loss for x in found])),
            accuracy=float(np.trace(confusion) / confusion.sum()),
            mean_iou=_mean(_ious(confusion)),
            mean_dice=_mean(np.array([x.dice for x in classes if x.dice is not None])),
            confusion=confusion,
            classes=classes,
            predictions=tuple(found),
        )

    def _check(self, outputs: np.ndarray, labels: np.ndarray) -> None:
        if labels.shape != outputs.shape[:-1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"Received masks of shape {labels.shape} and type {labels.dtype} for outputs "
                f"of shape {outputs.shape}; expected integers of shape {outputs.shape[:-1]}."
            )
        count = outputs.shape[-1]
        if self.labels and len(self.labels) != count:
            raise ValueError(
                f"Received {len(self.labels)} labels for a model with {count} outputs; "
                "expected one for each."
            )
        if labels.size and (labels.min() < IGNORED or labels.max() >= count):
            raise ValueError(
                f"Received classes from {labels.min()} to {labels.max()} for a model with "
                f"{count} outputs; expected 0 to {count - 1}, and -1 for pixels to ignore."
            )
        if not np.isfinite(outputs).all():
            raise ValueError(
                "The model returns NaN or infinity; expected finite logits. Check its weights "
                "and the loss of its training."
            )


def _ious(confusion: np.ndarray) -> np.ndarray:
    """The IoU of the classes that are there or predicted."""
    both = np.diag(confusion)
    either = confusion.sum(0) + confusion.sum(1) - both
    ious: np.ndarray = both[either > 0] / either[either > 0]
    return ious


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _scores(label: str, place: int, confusion: np.ndarray) -> RegionScores:
    both = int(confusion[place, place])
    true, predicted = int(confusion[place].sum()), int(confusion[:, place].sum())

    def share(part: float, total: int) -> float | None:
        return part / total if total else None

    return RegionScores(
        label,
        true,
        share(both, true + predicted - both),
        share(2 * both, true + predicted),
        share(both, true),
        share(both, predicted),
    )
