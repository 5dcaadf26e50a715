"""``RegressionEvaluation``: the metrics of a model that predicts numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tfimm_lora.finetuning.multilabel_metrics import check_outputs


@dataclass(frozen=True)
class NumberScores:
    """The metrics of one target, in its units.

    Attributes:
        label: The name of the target.
        mae: The mean absolute error.
        rmse: The root of the mean squared error.
        r2: 1 - (mean squared error) / (variance of the target); None if the target is constant.
        half_width: Half of the width of the prediction intervals; None without.
        coverage: The share of the pictures whose number is in its interval; None without.
    """

    label: str
    mae: float
    rmse: float
    r2: float | None
    half_width: float | None
    coverage: float | None


@dataclass(frozen=True)
class NumberPrediction:
    """The prediction for one picture.

    Attributes:
        path: The file; None if the pictures are not files.
        true, predicted: The numbers of each target.
        error: The root of the mean over the targets of (error / standard deviation)^2.
    """

    path: str | None
    true: tuple[float, ...]
    predicted: tuple[float, ...]
    error: float


@dataclass(frozen=True, eq=False)
class RegressionEvaluation:
    """The metrics of a model that predicts numbers.

    Attributes:
        labels: The names of the targets, in the order of the outputs of the model.
        loss: The mean over pictures and targets of (error / standard deviation)^2, with the
            standard deviation of the training pictures.
        scores: The metrics of each target.
        level: The share of new pictures whose number the intervals should contain; None without
            intervals.
        predictions: The prediction for each picture.
    """

    labels: tuple[str, ...]
    loss: float
    scores: tuple[NumberScores, ...]
    level: float | None
    predictions: tuple[NumberPrediction, ...]

    @classmethod
    def of(
        cls,
        predicted: np.ndarray,
        true: np.ndarray,
        labels: Sequence[str] | None = None,
        paths: Sequence[str] | None = None,
        *,
        std: Sequence[float] | None = None,
        half_widths: Sequence[float] | None = None,
        level: float | None = None,
    ) -> RegressionEvaluation:
        """Compute the metrics from predictions and targets, (n, targets), in their units.

        Args:
            predicted, true: The predictions, and the targets.
            labels: The names of the targets. Default: "0", "1", ...
            paths: The files. Default: none.
            std: The standard deviations of the targets. Default: 1.
            half_widths, level: The intervals; see ``half_width``. Default: none.

        Raises:
            ValueError: if there are no pictures, or the arguments do not fit together.

        Example:
            >>> import numpy as np
            >>> from tfimm_lora.finetuning.regression_metrics import RegressionEvaluation
            >>> true = np.array([[1.0], [2.0], [3.0]])
            >>> predicted = np.array([[1.0], [2.0], [4.0]])
            >>> scores = RegressionEvaluation.of(predicted, true).scores[0]
            >>> round(scores.mae, 3), scores.r2
            (0.333, 0.5)
        """
        check_outputs(predicted, true)
        n, count = predicted.shape
        names = tuple(map(str, range(count))) if labels is None else tuple(labels)
        if len(names) != count:
            raise ValueError(
                f"Received {len(names)} labels for a model with {count} outputs; expected one "
                "for each."
            )
        p, y = predicted.astype(np.float64), true.astype(np.float64)
        relative = (p - y) / (np.ones(count) if std is None else np.asarray(std))
        widths: Sequence[float | None] = [None] * count if half_widths is None else half_widths
        files: Sequence[str | None] = [None] * n if paths is None else paths
        errors = np.sqrt((relative**2).mean(1))
        return cls(
            labels=names,
            loss=float((relative**2).mean()),
            scores=tuple(map(_scores, names, p.T, y.T, widths)),
            level=level,
            predictions=tuple(
                NumberPrediction(path, tuple(map(float, t)), tuple(map(float, q)), float(error))
                for path, t, q, error in zip(files, y, p, errors)
            ),
        )

    def worst(self, number: int | None = None) -> list[NumberPrediction]:
        """The predictions with the largest errors. Default: all, sorted."""
        return sorted(self.predictions, key=lambda x: (-x.error, x.path or ""))[:number]

    def to_dict(self) -> dict[str, Any]:
        """The metrics as plain values for JSON, without the individual predictions."""
        return {
            "pictures": len(self.predictions),
            "loss": self.loss,
            "level": self.level,
            "labels": list(self.labels),
            "scores": [asdict(scores) for scores in self.scores],
        }


def half_width(errors: np.ndarray, level: float) -> float | None:
    """Half of the width of prediction intervals (split conformal prediction).

    It is the ceil((n + 1) level)-th smallest of the absolute errors on n pictures that were not
    used to train. The number of a new picture is within that distance of its prediction with a
    probability of at least ``level``, if it is drawn like those n pictures.

    Args:
        errors: The errors, (n,).
        level: The probability.

    Returns:
        The half width; None if n is too small: less than level / (1 - level).

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.regression_metrics import half_width
        >>> half_width(np.arange(1.0, 20.0), 0.9), half_width(np.arange(8.0), 0.9)
        (18.0, None)

    Reference: Lei et al., "Distribution-free predictive inference for regression",
    arXiv:1604.04173, algorithm 2.
    """
    rank = math.ceil((len(errors) + 1) * level - 1e-9)
    if rank > len(errors):
        return None
    return float(np.sort(np.abs(errors))[rank - 1])


def _scores(
    label: str, predicted: np.ndarray, true: np.ndarray, width: float | None
) -> NumberScores:
    errors = predicted - true
    mse, variance = float((errors**2).mean()), float(true.var())
    return NumberScores(
        label,
        float(np.abs(errors).mean()),
        math.sqrt(mse),
        1 - mse / variance if variance > 0 else None,
        None if width is None else float(width),
        None if width is None else float((np.abs(errors) <= width).mean()),
    )
