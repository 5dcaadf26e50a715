"""``Devices``: the devices that train one model together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.distributed.padding import (
    in_parts,
    multiple_of,
    padded,
    unchanged,
    where,
)


class Devices:
    """A single device, and the base class of several devices.

    Attributes:
        replicas: The number of copies of the model, among which each batch is divided.
        workers: The number of processes that train together.
        worker: The index of this process; 0 is the chief, which writes files and reports.
    """

    replicas, workers, worker = 1, 1, 0

    def __str__(self) -> str:
        return f"{self.replicas} device{'s' if self.replicas > 1 else ''}"

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and reports."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The scope in which model, LoRA and optimizer are created and the model is trained."""
        return contextlib.nullcontext()

    def check(self, backend: Backend) -> None:
        """Raise if models of this Keras cannot be trained on these devices."""

    def check_batch(self, batch_size: int) -> None:
        """Raise unless the pictures of a batch can be divided equally."""
        if batch_size % self.replicas:
            raise ValueError(
                f"Received batch_size={batch_size} for {self.replicas} devices; expected a "
                f"multiple of {self.replicas}. It is the number of pictures in a step over all "
                "devices."
            )

    def validation_batch(self, count: int, batch_size: int) -> int:
        """The largest batch size, up to the given one, for which validation batches divide.

        It does not change the results, but each device should get pictures.
        """
        for size in range(batch_size, 0, -1):
            numbered = enumerate((min(size, count), size, count % size))
            if all(self._padded_size(i, n, where) == n for i, n in numbered if n):
                return size
        return batch_size

    def training(
        self,
        train: Any,
        first: int,
        class_weight: Mapping[int, float] | None,
        accumulate: int = 1,
    ) -> tuple[Any, Any]:
        """Training batches that ``fit`` can divide, and the class weights for ``fit``.

        Args:
            train: Batches, or an object with ``epochs``, which are then those from epoch
                ``first`` on.
            first: The index of the first epoch.
            class_weight: The weights of the classes.
            accumulate: The number of parts into which each batch is divided.
        """
        batches = train.epochs(first) if hasattr(train, "epochs") else train
        if accumulate > 1:
            filled = padded(batches, multiple_of(accumulate), class_weight)
            return in_parts(filled, accumulate), None
        if class_weight and isinstance(batches, Generator):  # for which Keras has no weights
            return padded(batches, unchanged, class_weight), None
        return batches, class_weight

    def validation(self, validation: Any) -> Any:
        """Validation batches that can be divided."""
        if not isinstance(validation, PictureBatches):
            return validation
        count = len(validation.picture_set)
        size = self.validation_batch(count, validation.batch_size)
        return validation.with_batch_size(size).in_order()

    def fit(self, model: Any, *args: Any, **options: Any) -> Any:
        """Call ``fit`` of a model."""
        return model.fit(*args, **options)

    def callbacks(self, backend: Backend) -> list[Any]:
        """Keras callbacks for the training."""
        return []

    def scaled_losses(self, losses: Any) -> Any:
        """The losses of one device, scaled so that each picture has the same weight."""
        return losses

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        """Wait for all processes, and raise in all of them unless their values are equal."""
        if self.workers == 1:
            return
        names = sorted(values)
        # The names first, because digests of other values have another shape.
        for parts in ({"list of settings": names}, {name: values[name] for name in names}):
            digests = self._gathered(np.stack([_digest(v) for v in parts.values()]))
            differs = (digests != digests[0]).any(axis=2)
            if differs.any():
                worker = int(np.argmax(differs.any(axis=1)))
                listed = [name for name, other in zip(parts, differs[worker]) if other]
                raise ValueError(
                    f"The workers do not have the same {what}: worker {worker} has another "
                    f"{', '.join(listed)} than worker 0; expected equal ones. Start all of "
                    "them with the same arguments, versions and files. To resume a run, its "
                    "folder must be accessible to all workers."
                )

    def _gathered(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of all workers, one row for each. All of them must call this."""
        return numbers[None]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise a readable error if another process ends during the block."""
        yield

    def _padded_size(self, number: Any, n: Any, where: Any) -> Any:
        """The size to which the batch with this index, of n pictures, is padded."""
        return n


def _digest(value: Any) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(repr(value).encode()).digest()[:8], np.int32)
