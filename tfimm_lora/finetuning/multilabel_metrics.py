"""``MultiLabelEvaluation``: the metrics of a model whose pictures have several labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class LabelScores:
    """The metrics of one label. A metric that would be 0 / 0 is 0.

    Attributes:
        label: The name of the label.
        count: The number of pictures that have it.
        average_precision: The average precision; None if no picture has the label.
        threshold: The probability from which the label is chosen.
        precision: The share of the pictures for which it is chosen that have it.
        recall: The share of the pictures that have it for which it is chosen.
        f1: The harmonic mean of precision and recall.
    """

    label: str
    count: int
    average_precision: float | None
    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class LabelPrediction:
    """The prediction for one picture.

    Attributes:
        path: The file; None if the pictures are not files.
        true: The labels of the picture.
        chosen: The labels whose probability reaches their threshold.
        probabilities: The probability of each label.
        loss: The mean binary cross-entropy of the labels.
    """

    path: str | None
    true: tuple[str, ...]
    chosen: tuple[str, ...]
    probabilities: tuple[float, ...]
    loss: float


@dataclass(frozen=True)
class LabelMistake:
    """A label that is wrongly chosen or missing.

    Attributes:
        path: The file.
        label: The label.
        missing: Whether the picture has the label, and it was not chosen.
        probability: The probability of the label.
        margin: How far the probability is on the wrong side of the threshold.
    """

    path: str | None
    label: str
    missing: bool
    probability: float
    margin: float


@dataclass(frozen=True, eq=False)
class MultiLabelEvaluation:
    """The metrics of a model on pictures with several labels.

    Attributes:
        labels: The names of the labels, in the order of the outputs of the model.
        loss: The mean binary cross-entropy over pictures and labels.
        mean_average_precision: The mean of the average precisions (mAP), over the labels that
            some picture has; None if there are none.
        macro_f1: The mean F1 of the labels that some picture has.
        micro_f1: F1 over all decisions, one for each picture and label.
        exact: The share of the pictures for which exactly their labels are chosen.
        scores: The metrics of each label.
        predictions: The prediction for each picture.
        true: Whether each picture has each label, (n, labels).
        probabilities: The probabilities, (n, labels).
    """

    labels: tuple[str, ...]
    loss: float
    mean_average_precision: float | None
    macro_f1: float
    micro_f1: float
    exact: float
    scores: tuple[LabelScores, ...]
    predictions: tuple[LabelPrediction, ...]
    true: np.ndarray
    probabilities: np.ndarray

    @classmethod
    def of(
        cls,
        logits: np.ndarray,
        true: np.ndarray,
        labels: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> MultiLabelEvaluation:
        """Compute the metrics from logits (n, labels) and labels (n, labels) of 0 and 1.

        Args:
            logits, true: The outputs of the model, and the labels.
            labels: The names of the labels. Default: "0", "1", ...
            paths: The files. Default: none.
            thresholds: The probability from which each label is chosen. Default: 0.5.

        Raises:
            ValueError: if there are no pictures, or the arguments do not fit together.

        Example:
            >>> import numpy as np
            >>> from tfimm_lora.finetuning.multilabel_metrics import MultiLabelEvaluation
            >>> logits = np.array([[2.0, -1.0], [1.0, 3.0], [-2.0, -3.0]])
            >>> value = MultiLabelEvaluation.of(logits, np.array([[1, 0], [0, 1], [0, 0]]))
            >>> value.mean_average_precision, round(value.exact, 3)
            (1.0, 0.667)
        """
        check_outputs(logits, true)
        n, count = logits.shape
        names = tuple(map(str, range(count))) if labels is None else tuple(labels)
        limits = np.full(count, 0.5) if thresholds is None else np.asarray(thresholds, float)
        if len(names) != count or len(limits) != count:
            raise ValueError(
                f"Received {len(names)} labels and {len(limits)} thresholds for a model with "
                f"{count} outputs; expected one of each for an output."
            )
        y, p = true.astype(bool), sigmoid(logits)
        chosen = p >= limits
        scores = tuple(map(_scores, names, y.T, p.T, chosen.T, limits))
        present = [x for x in scores if x.count]
        precisions = [x.average_precision for x in scores if x.average_precision is not None]
        losses = binary_cross_entropy(logits, true).mean(1)
        files: Sequence[str | None] = [None] * n if paths is None else paths
        hits, wrong = int((y & chosen).sum()), int((y ^ chosen).sum())
        return cls(
            labels=names,
            loss=float(losses.mean()),
            mean_average_precision=float(np.mean(precisions)) if precisions else None,
            macro_f1=float(np.mean([x.f1 for x in present])) if present else 0.0,
            micro_f1=2 * hits / max(2 * hits + wrong, 1),
            exact=float((y == chosen).all(1).mean()),
            scores=scores,
            predictions=tuple(
                LabelPrediction(
                    path, _named(names, t), _named(names, c), tuple(map(float, q)), float(loss)
                )
                for path, t, c, q, loss in zip(files, y, chosen, p, losses)
            ),
            true=y,
            probabilities=p,
        )

    def mistakes(self, label: str | None = None) -> list[LabelMistake]:
        """The wrong decisions about a label, or about all, those furthest off first."""
        found = []
        for i, scores in enumerate(self.scores):
            if label not in (None, scores.label):
                continue
            for place, prediction in enumerate(self.predictions):
                has, p = bool(self.true[place, i]), float(self.probabilities[place, i])
                if has != (p >= scores.threshold):
                    margin = abs(p - scores.threshold)
                    found.append(LabelMistake(prediction.path, scores.label, has, p, margin))
        return sorted(found, key=lambda x: (-x.margin, x.label, x.path or ""))

    def to_dict(self) -> dict[str, Any]:
        """The metrics as plain values for JSON, without the individual predictions."""
        return {
            "pictures": len(self.predictions),
            "loss": self.loss,
            "mean_average_precision": self.mean_average_precision,
            "macro_f1": self.macro_f1,
            "micro_f1": self.micro_f1,
            "exact": self.exact,
            "labels": list(self.labels),
            "scores": [asdict(scores) for scores in self.scores],
        }


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    result: np.ndarray = 0.5 * (1 + np.tanh(0.5 * np.asarray(logits, np.float64)))
    return result


def binary_cross_entropy(logits: np.ndarray, true: np.ndarray) -> np.ndarray:
    """-y log(p) - (1 - y) log(1 - p) with p = sigmoid(logits), in float64."""
    x, y = np.asarray(logits, np.float64), np.asarray(true, np.float64)
    result: np.ndarray = y * np.logaddexp(0, -x) + (1 - y) * np.logaddexp(0, x)
    return result


def average_precision(true: np.ndarray, scores: np.ndarray) -> float | None:
    """The average precision: the sum of (R_i - R_(i-1)) P_i over all distinct scores.

    P_i and R_i are precision and recall if everything from the i-th largest score on is chosen.

    Args:
        true: Whether each picture has the label, (n,).
        scores: Larger for pictures that are more likely to have it, (n,).

    Returns:
        A number up to 1; None if no picture has the label.
    """
    precision, recall, _ = precision_and_recall(true, scores)
    if not true.any():
        return None
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def precision_and_recall(
    true: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall if all scores from each distinct one on are chosen.

    Returns:
        Precision, recall and the distinct scores, which decrease.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(true[order])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # of equal scores
    return hits[last] / (last + 1), hits[last] / max(int(true.sum()), 1), ranked[last]


def best_threshold(true: np.ndarray, probabilities: np.ndarray) -> float:
    """The probability from which to choose a label so that F1 is largest.

    It is in the middle between two probabilities; among equally good ones the nearest to 0.5.

    Args:
        true: Whether each picture has the label, (n,).
        probabilities: The probabilities of the label, (n,).

    Returns:
        The threshold; 0.5 if no picture has the label.

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.multilabel_metrics import best_threshold
        >>> p = np.array([0.9, 0.3, 0.2, 0.1])
        >>> best_threshold(np.array([True, True, False, False]), p)
        0.25
    """
    if not true.any():
        return 0.5
    precision, recall, found = precision_and_recall(true, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    middles = (found + np.append(found[1:], 0.0)) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(middles[best[np.argmin(np.abs(middles[best] - 0.5))]])


def check_outputs(outputs: np.ndarray, true: np.ndarray) -> None:
    """Raise unless outputs and targets (n, k) fit together and are finite."""
    if true.shape != outputs.shape or not len(outputs):
        raise ValueError(
            f"Received targets of shape {true.shape} for outputs of shape {outputs.shape}; "
            "expected at least one picture, and a number for each output."
        )
    if not np.isfinite(outputs).all():
        bad = int((~np.isfinite(outputs).all(1)).sum())
        raise ValueError(
            f"The model returns NaN or infinity for {bad} of {len(outputs)} pictures; expected "
            "finite outputs. Check its weights and the loss of its training."
        )


def _named(names: Sequence[str], chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(name for name, yes in zip(names, chosen) if yes)


def _scores(
    label: str, true: np.ndarray, p: np.ndarray, chosen: np.ndarray, threshold: float
) -> LabelScores:
    hits, count, number = int((true & chosen).sum()), int(true.sum()), int(chosen.sum())
    return LabelScores(
        label,
        count,
        average_precision(true, p),
        float(threshold),
        hits / max(number, 1),
        hits / max(count, 1),
        2 * hits / max(count + number, 1),
    )
