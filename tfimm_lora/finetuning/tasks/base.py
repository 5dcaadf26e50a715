"""``Task``: what a model is fine-tuned for. ``Views``: how its results are shown.

A task is one module with a subclass of each, and a line in ``named.py``. Everything else in the
package (commands, training, reports, exports) asks the task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.targets import Targets
from tfimm_lora.finetuning.report.figures import Target
from tfimm_lora.finetuning.report.html import Html
from tfimm_lora.model.task_record import TaskRecord

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run

#: The losses (n,) of labels and outputs of a batch.
Losses = Callable[[Any, Any], Any]


class Table(NamedTuple):
    """A table: its header, its rows, and the names of the columns of text."""

    header: list[str]
    rows: list[list[str]]
    text: tuple[str, ...] = ()


class Example(NamedTuple):
    """A prediction that the report explains: a file, the number of an output, and the lines
    about it below the picture."""

    path: str
    target: int
    lines: tuple[Html, ...]


def check_sizes(labels: Any, outputs: Any, count: int | None = None) -> None:
    """Raise unless a batch has as many labels as outputs, which would be broadcast otherwise.

    Args:
        labels, outputs: (n, k).
        count: The number of labels of the task, if it is known.
    """
    given = labels.shape[-1] if len(labels.shape) > 1 else 1
    size = outputs.shape[-1]
    if given not in (None, size) or count not in (None, size):
        of_task = "" if count is None else f" and a task of {count}"
        raise ValueError(
            f"Received labels of shape {tuple(labels.shape)}{of_task} for a model with outputs "
            f"of shape {tuple(outputs.shape)}; expected as many labels as outputs."
        )


@dataclass(frozen=True)
class Task(ABC):
    """What a model is fine-tuned for: its targets, loss, metrics and predictions.

    An instance is immutable. It knows what a run has found out so far: the labels, what is
    computed from the training pictures (``of``), and what is chosen on the validation pictures
    (``with_validation``).

    Args:
        labels: What each output of the model stands for. Default: not known.

    Attributes:
        name: The name, as in ``Recipe.task``.
        activation: What turns outputs into probabilities: "softmax", "sigmoid" or None.
        monitored: The metrics that may determine the best epoch.
        loss_name: The loss, in messages.
        weighs_examples: Whether ``class_weight`` weighs pictures, which ``fit`` does, and not
            the terms of a loss.
        trains_classifier: Whether the classifier is trained also if it is not new.
        uses_validation: Whether ``with_validation`` finds something.
        balances: Whether there are rare classes or labels that a loss can make up for.
        is_dense: Whether the outputs are those of each pixel, (n, h, w, classes).
    """

    labels: tuple[str, ...] = ()

    name: ClassVar[str]
    activation: ClassVar[str | None] = None
    monitored: ClassVar[tuple[str, ...]] = ("val_loss", "loss")
    loss_name: ClassVar[str]
    weighs_examples: ClassVar[bool] = False
    trains_classifier: ClassVar[bool] = True
    uses_validation: ClassVar[bool] = False
    balances: ClassVar[bool] = True
    is_dense: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.labels, str):
            raise TypeError(
                f"Received labels={self.labels!r}; expected names, as in ('cat', 'dog')."
            )

    # -- targets ---------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def targets(cls, columns: Sequence[str] | None = None) -> Targets:
        """What the pictures are labelled with.

        Args:
            columns: The columns of a CSV file with the targets. Default: as ``Targets`` finds
                them.
        """

    def known_targets(self) -> Targets:
        """What pictures of these labels are labelled with."""
        return self.targets(self.labels)

    @classmethod
    def of(cls, train: PictureSet) -> Task:
        """The task for training pictures, with what is computed from them."""
        return cls(train.labels)

    @abstractmethod
    def balanced_weights(self, train: PictureSet) -> dict[int, float]:
        """The ``class_weight`` that makes up for rare classes or labels."""

    # -- training --------------------------------------------------------------------------

    def advice(self, augmentation: Augmentation) -> str | None:
        """What users should know before a training with this augmentation."""
        return None

    def preprocessing(self, preprocessing: Preprocessing) -> Preprocessing:
        """How pictures become the input of a model, from how they do in a classification."""
        return preprocessing

    def check_model(self, model: Any) -> None:  # noqa: B027
        """Raise a ValueError if a model cannot be fine-tuned or exported for this task."""

    @abstractmethod
    def losses(self, backend: Backend, class_weight: Mapping[int, float] | None) -> Losses:
        """The function that computes the losses (n,) from labels and float32 outputs."""

    @abstractmethod
    def metrics(self, backend: Backend) -> list[Any]:
        """The Keras metrics of labels and outputs."""

    # -- predictions -----------------------------------------------------------------------

    def collector(self) -> Any:
        """What computes an evaluation batch by batch; see ``Collector``."""
        return Collector(self)

    @abstractmethod
    def evaluate(
        self, outputs: np.ndarray, labels: np.ndarray, paths: Sequence[str] | None = None
    ) -> Any:
        """An evaluation, from outputs (n, k) in float64 and labels as in ``PictureSet.array``.

        It has ``loss``, ``predictions`` with a ``path`` each, and ``to_dict()``.
        """

    def with_validation(self, outputs: np.ndarray, labels: np.ndarray) -> Task:
        """The task with what is chosen on the validation pictures."""
        return self

    @abstractmethod
    def values(self, outputs: np.ndarray) -> np.ndarray:
        """The predictions (n, k): probabilities, or numbers in the units of the targets."""

    def explained(self, values: np.ndarray, threshold: float | None = None) -> tuple[int, ...]:
        """The outputs that an explanation of a prediction is about; none if the predictions of
        the task are places already.

        Args:
            values: The prediction, a row of ``values``.
            threshold: As for ``Views.answer``.
        """
        return (int(np.argmax(values)),) if values.ndim == 1 else ()

    # -- records ---------------------------------------------------------------------------

    def record(self) -> TaskRecord:
        """What adapters, runs and exported files record."""
        return TaskRecord(self.name, self.labels, self.activation)

    @classmethod
    def of_record(cls, record: TaskRecord) -> Task:
        """The task of a record."""
        return cls(record.labels)

    @property
    @abstractmethod
    def views(self) -> Views:
        """How results are shown."""


class Collector:
    """Collects the outputs and labels of batches for the evaluation of a task."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, outputs: np.ndarray, labels: np.ndarray) -> None:
        """Add a batch."""
        self._pairs.append((outputs, labels))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The outputs and labels of all batches."""
        outputs, labels = (np.concatenate(parts) for parts in zip(*self._pairs))
        return outputs, labels

    def evaluation(self, paths: Sequence[str] | None = None) -> Any:
        """The evaluation of all batches; ``paths`` are the files."""
        return self._task.evaluate(*self.arrays(), paths)


#: After a sentence about predictions that are all the same.
LEARNED_NOTHING = (
    "The model has learned nothing: its weights are not pretrained, or the rate is too high. "
    "Pass a third of it (--lr), or --lr auto"
)


class Views(ABC):
    """How the evaluations and predictions of a task are shown.

    Attributes:
        titles: The titles of metrics in the training curves.
        explained: What a heat map is about, after "evidence for".
    """

    titles: ClassVar[Mapping[str, str]]
    explained: ClassVar[str] = "the predicted class"

    # -- evaluations -----------------------------------------------------------------------

    @abstractmethod
    def headline(self, evaluation: Any, kind: str) -> str:
        """The result in a line. ``kind`` is what the pictures are: "validation" or "test"."""

    def advice(self, evaluation: Any) -> str | None:
        """What users should know about a training with this evaluation."""
        return None

    @abstractmethod
    def scores(self, evaluation: Any) -> dict[str, float]:
        """The most important numbers, with the loss, for JSON."""

    @abstractmethod
    def table(self, evaluation: Any) -> Table:
        """The scores of each output."""

    @abstractmethod
    def facts(self, evaluation: Any) -> list[tuple[str, str]]:
        """The numbers over all pictures."""

    @abstractmethod
    def prediction_rows(self, evaluation: Any) -> list[list[Any]]:
        """A CSV table of all predictions, with its header."""

    @abstractmethod
    def drawings(self, evaluation: Any) -> dict[str, Callable[[Target], None]]:
        """The functions that draw pictures of an evaluation, by the names of their files."""

    @abstractmethod
    def result(self, evaluation: Any, kind: str = "validation") -> Html:
        """The headline numbers in the report."""

    @abstractmethod
    def sections(self, run: Run, evaluation: Any) -> dict[str, Html]:
        """The sections of the report about an evaluation, by title."""

    def examples(self, evaluation: Any) -> list[Example]:
        """The predictions that the report explains, the worst first; none by default."""
        return []

    # -- predictions -----------------------------------------------------------------------

    @abstractmethod
    def answer(
        self, path: str, values: np.ndarray, top: int | None, threshold: float | None
    ) -> dict[str, Any]:
        """The prediction for a picture as plain values for JSON, from a row of ``values``.

        Args:
            path: The name of the picture.
            values: The predictions (k,).
            top: The number of labels to list. Default: as suits the task.
            threshold: The probability from which an answer counts. Default: as suits the task.
        """

    def check_options(self, top: int | None, threshold: float | None) -> None:  # noqa: B027
        """Raise a ValueError for an option that has no meaning for the task."""

    @abstractmethod
    def answer_table(self, answers: Sequence[Mapping[str, Any]]) -> Table:
        """A table of answers without their paths, which ``predict`` adds as first column."""

    @abstractmethod
    def answer_rows(self, answers: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
        """A CSV table of answers, with its header."""

    def notes(self, answers: Sequence[Mapping[str, Any]], threshold: float | None) -> list[str]:
        """What else should be said about answers."""
        return []
