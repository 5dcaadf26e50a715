"""The batches of ``PictureBatches`` without TensorFlow, for Keras on JAX or torch.

Order and augmentation are those of TensorFlow; see ``random_numbers``.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.finetuning.data.random_numbers import Seed, fold_in, shuffled

if TYPE_CHECKING:
    from tfimm_lora.finetuning.data.batches import PictureBatches

#: The number of batches that are read ahead.
_AHEAD = 2

Batch = tuple[np.ndarray, ...]

#: The seed of an epoch, the indices of the pictures of a batch, and their weights if only a
#: share of the batch is read.
Plan = tuple[Seed, list[int], np.ndarray | None]


def one_epoch(
    batches: PictureBatches, epoch: int, *, shuffle: bool, augmentation: Augmentation | None
) -> Any:
    """Return one epoch as a ``keras.utils.PyDataset``, which is also iterable."""
    return _dataset_class()(_Reader(batches, augmentation), _plan(batches, epoch, shuffle))


def endless_epochs(batches: PictureBatches, first: int) -> Iterator[Batch]:
    """Generate the batches of epoch ``first`` and all following ones."""
    reader = _Reader(batches, batches.augmentation)
    plans = (
        plan
        for epoch in itertools.count(first)
        for plan in _plan(batches, epoch, batches.shuffle)
    )
    waiting: deque[_Reading] = deque()
    for plan in plans:
        waiting.append(reader.start(plan))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().batch()


def _plan(batches: PictureBatches, epoch: int, shuffle: bool) -> list[Plan]:
    """What to read for each batch of an epoch."""
    count = len(batches.picture_set)
    seed = fold_in((batches.seed, 0), epoch)
    order = np.arange(count)
    if shuffle:
        own = fold_in(seed, count, bits=32)  # an index that no picture has, an int32 in tf.data
        order = shuffled(own, count)
    shared = batches.share is not None
    return [
        (seed, order[places].tolist(), weights if shared else None)
        for places, weights in batches.rows()
    ]


class _Reader:
    """Reads the pictures of a batch with several threads."""

    def __init__(self, batches: PictureBatches, augmentation: Augmentation | None) -> None:
        self.pictures = batches.picture_set.pictures
        self.targets, self.names = batches.picture_set.targets, batches.picture_set.labels
        has_masks = self.targets.are_pictures
        self.labels = None if has_masks else batches.picture_set.array()
        self.pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")
        preprocessing = batches.preprocessing
        self.channels = preprocessing.in_channels
        self.prepare = preprocessing.function(resize=augmentation is None)
        self.resize_mask = preprocessing.mask_function()
        self.augment: Callable[..., Any] | None = None
        self.enough = None
        if augmentation is not None:
            if not has_masks:  # masks have the full size
                self.enough = augmentation.enough(preprocessing.input_size)
            self.augment = augmentation.function(
                preprocessing.input_size,
                interpolation=preprocessing.interpolation,
                crop_pct=preprocessing.crop_pct,
            )

    def start(self, plan: Plan) -> _Reading:
        """Start to read a batch."""
        seed, indices, weights = plan
        known = () if self.labels is None else (self.labels[indices],)
        known = known if weights is None else (*known, weights)
        return _Reading([self.pool.submit(self._read, seed, i) for i in indices], known)

    def _read(self, seed: Seed, index: int) -> Batch:
        """A picture, and its mask if there are masks."""
        picture = self.pictures[index]
        x: Any = read_picture(picture.path, self.channels, at_least=self.enough)
        if self.labels is not None:
            if self.augment is not None:
                x = self.augment(x, fold_in(seed, index))
            return (np.asarray(self.prepare(x), np.float32),)
        mask = self.targets.picture(picture.label, self.names)
        if self.augment is None:
            mask = self.resize_mask(mask)
        else:
            x, mask = self.augment(x, fold_in(seed, index), mask)
        return np.asarray(self.prepare(x), np.float32), mask


class _Reading:
    """A batch that is being read."""

    def __init__(self, inputs: list[Future[Batch]], known: Batch) -> None:
        self.inputs, self.known = inputs, known

    def batch(self) -> Batch:
        """Wait for the batch."""
        read = zip(*(future.result() for future in self.inputs))
        return *map(np.stack, read), *self.known


@cache
def _dataset_class() -> Any:
    base: Any = default_backend().keras.utils.PyDataset

    class PictureDataset(base):  # type: ignore[misc]
        """The batches of one epoch."""

        def __init__(self, reader: _Reader, plans: list[Plan]) -> None:
            super().__init__()
            self._reader, self._plans = reader, plans
            self._next: dict[int, _Reading] = {}

        def __len__(self) -> int:
            return len(self._plans)

        def __getitem__(self, index: int) -> Batch:
            started = self._next.pop(index, None) or self._reader.start(self._plans[index])
            self._next.clear()
            if index + 1 < len(self._plans):  # read while the model processes this batch
                self._next[index + 1] = self._reader.start(self._plans[index + 1])
            return started.batch()

        def __iter__(self) -> Iterator[Batch]:
            return (self[index] for index in range(len(self)))

    return PictureDataset
