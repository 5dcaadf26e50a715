"""``evaluate`` for labelled pictures, and ``predict_pictures`` for any pictures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, read_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.metrics import Evaluation
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.finetuning.tasks.of_model import checked_task
from tfimm_lora.model.output_activation import PROBABILITIES, output_activation
from tfimm_lora.validation import check_batches


def evaluate(
    model: Any,
    dataset: Iterable[Any],
    labels: Sequence[str] | None = None,
    *,
    task: Task | None = None,
) -> Any:
    """Evaluate a model on batches of pictures and labels.

    Args:
        model: A model that returns logits of shape (n, classes).
        dataset: A finite ``tf.data.Dataset``, or any iterable, of pairs of batches: inputs of
            the model, and class indices (n,) as integers, or the labels of another task.
        labels: The names of the classes. Default: "0", "1", ...
        task: What the model was fine-tuned for, with its labels. Default: a classification.

    Returns:
        An ``Evaluation``, or that of the task.

    Raises:
        TypeError: if ``dataset`` are arrays, ``task`` is no task, or ``labels`` are given, too.
        ValueError: if there are no pictures, the dataset is infinite, a label is not a class of
            the model, the model was fine-tuned for another task than a classification and no
            task is given, or it returns probabilities, NaN or infinity.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(3)])
        >>> model.layers[-1].set_weights([np.eye(3), np.zeros(3)])
        >>> x, y = np.eye(3, dtype="float32"), np.array([0, 1, 1])
        >>> dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(2)
        >>> value = lora.evaluate(model, dataset, labels=("cat", "dog", "eel"))
        >>> round(value.accuracy, 3), value.confused()
        (0.667, [('dog', 'eel', 1)])
    """
    check_batches(dataset, "dataset")
    if task is None:
        outputs, true = _collect(model, dataset, checked_task(model, None)).arrays()
        return Evaluation.of(outputs, true, labels)
    task = checked_task(model, task)
    if labels is not None:
        raise TypeError(
            f"Received labels={labels!r} and a task; expected one of them. A task has labels."
        )
    return _collect(model, dataset, task).evaluation()


def evaluate_pictures(
    model: Any,
    pictures: PictureSet,
    preprocessing: Preprocessing,
    *,
    task: Task | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """Evaluate a model on labelled picture files.

    Args:
        model: A model that returns logits, one for each label of the pictures.
        pictures: The pictures, checked by ``check_pictures``.
        preprocessing: The preprocessing of the model.
        task: What the model was fine-tuned for. Default: a classification.
        batch_size: The number of pictures in a batch. Default: 32.
        progress: Called as ``progress(done, total)`` after each batch.

    Returns:
        An ``Evaluation``, or that of the task, whose predictions contain the paths of the
        files.

    Raises:
        ValueError: as ``evaluate``, and for an empty set.
    """
    task = Classification(pictures.labels) if task is None else task
    collector = _collect_on(model, pictures, preprocessing, task, batch_size, progress)
    return collector.evaluation([picture.path for picture in pictures.pictures])


def outputs_on(
    model: Any,
    pictures: PictureSet,
    preprocessing: Preprocessing,
    task: Task,
    *,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """The outputs (n, k) of a model for picture files, and their labels.

    The arguments and exceptions are those of ``evaluate_pictures``.
    """
    collector = _collect_on(model, pictures, preprocessing, task, batch_size, None)
    outputs, labels = collector.arrays()
    return outputs, labels


def _collect_on(
    model: Any,
    pictures: PictureSet,
    preprocessing: Preprocessing,
    task: Task,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """The collector of a task with the outputs of a model for picture files."""

    def with_progress(batches: Iterable[Any]) -> Iterator[Any]:
        done = 0
        for x, y in batches:
            yield x, y
            done += len(y)
            if progress is not None:
                progress(done, len(pictures))

    batches = PictureBatches(pictures, preprocessing, batch_size).in_order()
    return _collect(model, with_progress(batches), task)


def predict_pictures(
    model: Any,
    paths: Sequence[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    *,
    task: Task | None = None,
    batch_size: int = 32,
) -> Iterator[tuple[str, np.ndarray | UnreadablePicture]]:
    """Predict picture files, one after the other.

    Args:
        model: A model that returns logits.
        paths: The files.
        preprocessing: The preprocessing of the model.
        task: What the model was fine-tuned for. Default: a classification.
        batch_size: The number of pictures in a batch. Default: 32.

    Yields:
        The path of a file, with the probabilities (classes,) or the values of the task, or with
        the exception if the file cannot be read.
    """
    task = Classification() if task is None else task
    prepare = preprocessing.function(resize=True)

    def load(path: str) -> np.ndarray | UnreadablePicture:
        try:
            pixels = read_picture(path, preprocessing.in_channels)
        except UnreadablePicture as problem:
            return problem
        return np.asarray(prepare(pixels), np.float32)

    logits_of = OutputsOf(model, task)

    def predicted(batch: list[Any]) -> Iterator[np.ndarray | UnreadablePicture]:
        good = [x for x in batch if isinstance(x, np.ndarray)]
        p = iter(task.values(logits_of(np.stack(good))) if good else ())
        yield from (next(p) if isinstance(x, np.ndarray) else x for x in batch)

    names = [os.fspath(path) for path in paths]
    starts = range(0, len(names), batch_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        upcoming = pool.map(load, names[:batch_size])
        for start in starts:
            # The next batch is read while the model processes this one.
            batch, end = list(upcoming), start + batch_size
            upcoming = pool.map(load, names[end : end + batch_size])
            yield from zip(names[start:end], predicted(batch))


def _collect(model: Any, batches: Iterable[Any], task: Task) -> Any:
    """The collector of a task with the outputs and labels of all batches."""
    if getattr(batches, "cardinality", lambda: 0)() == -1:  # tf.data.INFINITE_CARDINALITY
        raise ValueError(
            "Received an infinite dataset; expected one with each picture once. Leave out "
            "repeat()."
        )
    outputs_of, collector = OutputsOf(model, task), task.collector()
    found = _Probabilities()
    for x, y in batches:
        outputs = outputs_of(x)
        found.see(outputs)
        collector.add(outputs, np.asarray(y))
    if not outputs_of.size:
        raise ValueError("Received a dataset without batches; expected at least one picture.")
    if _are_probabilities(model, found, task):
        raise ValueError(
            f"The model '{model.name}' returns probabilities; expected logits. Remove the "
            "softmax from its end, or open it with open_base_model, which removes it."
        )
    return collector


def _are_probabilities(model: Any, found: _Probabilities, task: Task) -> bool:
    if task.activation != "softmax":
        return output_activation(model) in PROBABILITIES
    return found.like_softmax and not found.only_zeros_and_ones


class _Probabilities:
    """Whether the outputs of all batches look like those of a softmax.

    Zeros and ones only may also be logits. A softmax hardly ever returns them.
    """

    def __init__(self) -> None:
        self.like_softmax = self.only_zeros_and_ones = True

    def see(self, outputs: np.ndarray) -> None:
        """Look at a batch."""
        if not self.like_softmax:
            return
        sums = outputs.sum(-1)
        is_like = (outputs >= 0).all() and np.allclose(sums, 1, rtol=0, atol=1e-3)
        self.like_softmax = bool(is_like)
        self.only_zeros_and_ones &= bool(np.isin(outputs, (0, 1)).all())


class OutputsOf:
    """The outputs of a model for one batch after the other.

    They are float64, or float32 if there are some for each pixel.

    A batch that is smaller than an earlier one, as the last often is, is filled up with copies:
    another size would be traced or compiled anew, which takes longer than to compute it.
    """

    def __init__(self, model: Any, task: Task) -> None:
        self.model, self.size = model, 0
        self.rank = 4 if task.is_dense else 2

    def __call__(self, pictures: Any) -> np.ndarray:
        x = np.asarray(pictures)
        self.size = max(self.size, len(x))
        filled = np.concatenate([x, np.repeat(x[-1:], self.size - len(x), axis=0)])
        outputs = self.model.predict_on_batch(filled)
        shape = getattr(outputs, "shape", None)
        if shape is None or len(shape) != self.rank or len(outputs) < len(x):
            pixels = "height, width, " if self.rank == 4 else ""
            raise ValueError(
                f"The model '{self.model.name}' returns outputs of shape {shape} for "
                f"{len(filled)} pictures; expected logits, (pictures, {pixels}classes)."
            )
        # Under a strategy, Keras 3 returns the outputs once for each device.
        dtype = np.float32 if self.rank == 4 else np.float64
        return np.asarray(outputs, dtype)[: len(x)]
