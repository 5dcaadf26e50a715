"""``Evaluation``: the metrics of a model on labelled pictures, computed from its logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

#: Bins of confidence in the calibration error.
_BINS = 15

#: The quantile 0.975 of the normal distribution.
_NORMAL_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class ClassScores:
    """The metrics of one class. A metric that would be 0 / 0 is 0.

    Attributes:
        label: The name of the class.
        count: The number of pictures of the class.
        precision: The share of the pictures predicted as this class that belong to it.
        recall: The share of the pictures of this class that are predicted as such.
        f1: The harmonic mean of precision and recall.
    """

    label: str
    count: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one labelled picture.

    Attributes:
        path: The file; None if the pictures are not files.
        true, predicted: The names of the true and the predicted class.
        probability: The probability of the predicted class.
        probability_of_true: The probability of the true class.
        loss: The cross-entropy, -log(probability_of_true).
    """

    path: str | None
    true: str
    predicted: str
    probability: float
    probability_of_true: float
    loss: float

    @property
    def right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.true == self.predicted


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The metrics of a model on labelled pictures.

    Attributes:
        labels: The names of the classes, in the order of the outputs of the model.
        loss: The mean cross-entropy.
        accuracy: The share of pictures whose predicted class is the true one.
        balanced_accuracy: The mean recall of the classes that have pictures.
        top5: The share of pictures whose true class is among the five most probable ones; None
            for five or fewer classes.
        calibration_error: The expected calibration error: the mean of |probability - accuracy|
            over 15 bins of the predicted probability, weighted by the number of pictures. For
            example 0.02 if 88 % of the predictions with a probability of 90 % are correct.
        confusion: The confusion matrix, (classes, classes) of int64. Rows are true classes,
            columns are predicted classes.
        classes: The metrics of each class.
        predictions: The prediction for each picture, in the order of the pictures.

    Reference: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, eq. 3.
    """

    labels: tuple[str, ...]
    loss: float
    accuracy: float
    balanced_accuracy: float
    top5: float | None
    calibration_error: float
    confusion: np.ndarray
    classes: tuple[ClassScores, ...]
    predictions: tuple[Prediction, ...]

    @classmethod
    def of(
        cls,
        logits: np.ndarray,
        true: np.ndarray,
        labels: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
    ) -> Evaluation:
        """Compute the metrics from logits (n, classes) and true class indices (n,).

        Raises:
            ValueError: if there are no pictures, or the arguments do not fit together.

        Example:
            >>> import numpy as np
            >>> from tfimm_lora.finetuning.evaluation import Evaluation
            >>> logits = np.log([[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]])
            >>> value = Evaluation.of(logits, np.array([0, 1, 1]), ("cat", "dog"))
            >>> value.confusion.tolist(), round(value.accuracy, 3)
            ([[1, 0], [1, 1]], 0.667)
            >>> worst = value.worst(1)[0]
            >>> worst.true, worst.predicted, round(worst.probability, 3)
            ('dog', 'cat', 0.7)
        """
        _check(logits, true)
        n, count = logits.shape
        labels = tuple(map(str, range(count))) if labels is None else tuple(labels)
        if len(set(labels)) != count or len(labels) != count:
            raise ValueError(
                f"Received {len(labels)} labels, {len(set(labels))} of them different, for a "
                f"model with {count} outputs; expected {count} different labels."
            )
        log_p = log_softmax(logits)
        rows, order = np.arange(n), np.argsort(-logits, axis=1, kind="stable")
        predicted = order[:, 0]
        losses, p = -log_p[rows, true], np.exp(log_p)
        confusion = np.zeros((count, count), np.int64)
        np.add.at(confusion, (true, predicted), 1)
        right = predicted == true
        classes = _class_scores(confusion, labels)
        files: Sequence[str | None] = [None] * n if paths is None else paths
        numbers = zip(files, true, predicted, p[rows, predicted], p[rows, true])
        return cls(
            labels=labels,
            loss=float(losses.mean()),
            accuracy=float(right.mean()),
            balanced_accuracy=float(np.mean([x.recall for x in classes if x.count])),
            top5=float((order[:, :5] == true[:, None]).any(1).mean()) if count > 5 else None,
            calibration_error=_calibration_error(p[rows, predicted], right),
            confusion=confusion,
            classes=classes,
            predictions=tuple(
                Prediction(path, labels[t], labels[q], float(p_q), float(p_t), float(loss))
                for (path, t, q, p_q, p_t), loss in zip(numbers, losses)
            ),
        )

    def worst(self, count: int | None = None) -> list[Prediction]:
        """The wrong predictions, the most confident first. Default: all of them."""
        wrong = [x for x in self.predictions if not x.right]
        return sorted(wrong, key=lambda x: (-x.probability, x.path or ""))[:count]

    def confused(self, count: int | None = None) -> list[tuple[str, str, int]]:
        """The confused pairs, (true class, predicted class, pictures), most frequent first."""
        mistakes = self.confusion - np.diag(np.diag(self.confusion))
        pairs = sorted(zip(*np.nonzero(mistakes)), key=lambda pair: -mistakes[pair])
        return [(self.labels[t], self.labels[p], int(mistakes[t, p])) for t, p in pairs][:count]

    def accuracy_interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the accuracy (Wilson score interval).

        Example:
            >>> import numpy as np
            >>> from tfimm_lora.finetuning.evaluation import Evaluation
            >>> value = Evaluation.of(np.eye(2), np.array([0, 1]))
            >>> [round(x, 2) for x in value.accuracy_interval()]  # two of two
            [0.34, 1.0]
        """
        n, p, z = len(self.predictions), self.accuracy, _NORMAL_QUANTILE
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # Exact at both ends, where rounding errors would leave the accuracy outside.
        return 0.0 if p == 0 else middle - half, 1.0 if p == 1 else middle + half

    def to_dict(self) -> dict[str, Any]:
        """The metrics as plain values for JSON, without the individual predictions."""
        return {
            "pictures": len(self.predictions),
            "loss": self.loss,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval()),
            "balanced_accuracy": self.balanced_accuracy,
            "top5": self.top5,
            "calibration_error": self.calibration_error,
            "classes": [asdict(scores) for scores in self.classes],
            "labels": list(self.labels),
            "confusion": self.confusion.tolist(),
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """x - log(sum(exp(x))) along the last axis, in float64 and without overflow."""
    x = np.asarray(logits, np.float64)
    shifted: np.ndarray = x - x.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def _check(logits: np.ndarray, true: np.ndarray) -> None:
    n, count = logits.shape
    if true.shape != (n,) or not np.issubdtype(true.dtype, np.integer):
        raise ValueError(
            f"Received labels of shape {true.shape} and type {true.dtype} for {n} pictures; "
            f"expected integers of shape ({n},)."
        )
    if not n or true.min() < 0 or true.max() >= count or count < 2:
        received = f"labels from {true.min()} to {true.max()}" if n else "no labels"
        raise ValueError(
            f"Received {received} for a model with {count} outputs; expected at least one "
            "picture and two outputs, and labels below the number of outputs."
        )
    if not np.isfinite(logits).all():
        bad = int((~np.isfinite(logits).all(1)).sum())
        raise ValueError(
            f"The model returns NaN or infinity for {bad} of {n} pictures; expected finite "
            "logits. Check its weights and the loss of its training."
        )


def _class_scores(confusion: np.ndarray, labels: Sequence[str]) -> tuple[ClassScores, ...]:
    correct, counts, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)

    def share(part: Any, total: Any) -> Any:
        return part / np.maximum(total, 1)

    shares = zip(
        share(correct, predicted),
        share(correct, counts),
        share(2 * correct, counts + predicted),
    )
    return tuple(
        ClassScores(label, int(count), *map(float, numbers))
        for label, count, numbers in zip(labels, counts, shares)
    )


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """The sum over the bins of |sum of confidence - number correct|, divided by n."""
    bins = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(bins, confidence - right, _BINS)
    return float(np.abs(gaps).sum() / len(confidence))
