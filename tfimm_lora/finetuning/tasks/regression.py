"""Regression: each picture has one or several numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.number_targets import NumberTargets
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.regression_metrics import RegressionEvaluation, half_width
from tfimm_lora.finetuning.tasks.base import Losses, Task, check_sizes
from tfimm_lora.finetuning.tasks.regression_views import RegressionViews
from tfimm_lora.model.output_scale import scalable_heads, scaled
from tfimm_lora.model.task_record import TaskRecord

#: The probability with which a prediction interval should contain the number.
LEVEL = 0.9

#: The names of the intervals in records.
_HALF_WIDTHS, _LEVEL = "half_widths", "level"


@dataclass(frozen=True)
class Regression(Task):
    """Each picture has one or several numbers. The model learns standardised ones.

    With outputs z, numbers y, and mean and standard deviation of the training pictures, the
    loss of a picture is the mean over the numbers of ((y - mean) / std - z)^2, and the
    prediction is mean + std z. Datasets contain y. The loss on the validation pictures is
    about 1 - R2.

    Args:
        labels: The names of the numbers, in the order of the outputs.
        mean, std: The mean and standard deviation of each, as ``Regression.of`` computes them
            from training pictures.
        half_widths: Half of the width of the prediction intervals, which ``with_validation``
            computes (see ``half_width``). Default: no intervals.
        level: The probability with which an interval should contain the number. Default: 0.9.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> task = lora.Regression(("angle",), mean=(10.0,), std=(4.0,))
        >>> task.values(np.array([[0.5]])).tolist()  # of an output of the model
        [[12.0]]
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    half_widths: tuple[float, ...] | None = None
    level: float = LEVEL

    name: ClassVar[str] = "regression"
    loss_name: ClassVar[str] = "mean squared error of the standardised targets"
    uses_validation: ClassVar[bool] = True
    balances: ClassVar[bool] = False

    @classmethod
    def targets(cls, columns: Sequence[str] | None = None) -> Targets:
        return NumberTargets(None if columns is None else tuple(columns))

    @classmethod
    def of(cls, train: PictureSet) -> Regression:
        """The task for training pictures, with the mean and standard deviation of each target.

        Raises:
            ValueError: if a target is constant.
        """
        faults = train.targets.faults(train)
        if faults:
            raise ValueError(f"Received training pictures of which {' '.join(faults)}")
        values = np.array([picture.label for picture in train.pictures], np.float64)
        mean, std = (tuple(map(float, x)) for x in (values.mean(0), values.std(0)))
        return cls(train.labels, mean, std)

    def balanced_weights(self, train: PictureSet) -> dict[int, float]:
        raise ValueError("Received a regression; expected a task with classes or labels.")

    def advice(self, augmentation: Augmentation) -> str | None:
        if augmentation == Augmentation.none():
            return None
        return (
            "pictures are cropped and mirrored at random in training. If the numbers change "
            "with that, as angles, positions and sizes do, pass --augmentation none "
            '(augmentation="none")'
        )

    def check_model(self, model: Any) -> None:
        """Raise unless the classifier can return numbers in the units of the targets."""
        scalable_heads(model)

    def losses(self, backend: Backend, class_weight: Mapping[int, float] | None) -> Losses:
        if class_weight:
            raise ValueError(
                f"Received class_weight={dict(class_weight)} with a regression; expected None."
            )
        relative = self._relative(backend)

        def losses(numbers: Any, outputs: Any) -> Any:
            check_sizes(numbers, outputs, len(self.mean))
            difference = relative(numbers) - outputs
            return backend.ops.sum(difference * difference, axis=-1) / outputs.shape[-1]

        return losses

    def metrics(self, backend: Backend) -> list[Any]:
        """The mean absolute error in standard deviations, the mean of the targets."""
        relative, error = self._relative(backend), backend.keras.losses.mean_absolute_error

        def mae(numbers: Any, outputs: Any) -> Any:
            return error(relative(numbers), backend.ops.cast(outputs, "float32"))

        return [mae]

    def _relative(self, backend: Backend) -> Any:
        """A function that standardises numbers."""
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"Received the task {self}; expected a mean and std for each number. Create it "
                "with Regression.of(train)."
            )
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)

        def relative(numbers: Any) -> Any:
            cast = backend.ops.cast
            return (cast(numbers, "float32") - cast(mean, "float32")) / cast(std, "float32")

        return relative

    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, paths: Sequence[str] | None = None
    ) -> RegressionEvaluation:
        return RegressionEvaluation.of(
            self.values(outputs),
            labels,
            self.labels or None,
            paths,
            std=self.std,
            half_widths=self.half_widths,
            level=None if self.half_widths is None else self.level,
        )

    def with_validation(self, outputs: np.ndarray, labels: np.ndarray) -> Regression:
        """The task with prediction intervals; without if there are too few pictures."""
        errors = self.values(outputs) - labels
        widths = tuple(half_width(column, self.level) for column in errors.T)
        known = tuple(width for width in widths if width is not None)
        return dataclasses.replace(self, half_widths=known if known == widths else None)

    def values(self, outputs: np.ndarray) -> np.ndarray:
        return scaled(outputs, self.mean, self.std)

    def explained(self, values: np.ndarray, threshold: float | None = None) -> tuple[int, ...]:
        """All numbers."""
        return tuple(range(len(values)))

    def record(self) -> TaskRecord:
        chosen: dict[str, Any] = {}
        if self.half_widths is not None:
            chosen = {_HALF_WIDTHS: self.half_widths, _LEVEL: self.level}
        record = super().record()
        return dataclasses.replace(record, mean=self.mean, std=self.std, chosen=chosen)

    @classmethod
    def of_record(cls, record: TaskRecord) -> Regression:
        found = record.chosen.get(_HALF_WIDTHS)
        return cls(
            record.labels,
            record.mean or (),
            record.std or (),
            None if found is None else tuple(map(float, found)),
            float(record.chosen.get(_LEVEL, LEVEL)),
        )

    @property
    def views(self) -> RegressionViews:
        return RegressionViews(self.labels, self.half_widths, self.level)
