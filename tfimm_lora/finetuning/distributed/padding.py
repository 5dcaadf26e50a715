"""``padded``: batches that several devices can divide."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.share import Share


def padded(
    batches: Any,
    padded_size: Any,
    class_weight: Mapping[int, float] | None = None,
    share: Share | None = None,
) -> Any:
    """Pad batches to ``padded_size(index, size, tf.where)`` and add example weights.

    The padding repeats examples of the batch with weight 0. The weights of the others are
    scaled so that the mean of the weighted losses is the mean loss of the batch. Of several
    processes, each keeps its share of the padded batch.
    """
    if isinstance(batches, Generator):
        return _numpy_padded(batches, padded_size, class_weight, share)
    import tensorflow as tf

    table = None
    if class_weight:
        table = tf.constant([class_weight.get(i, 1.0) for i in range(max(class_weight) + 1)])

    def pad(number: Any, batch: Any) -> Any:
        x, y, weight = (*batch, None)[:3]
        count = tf.shape(tf.nest.flatten(y)[0])[0]
        size = padded_size(number, count, tf.where)
        places = tf.range(size) if share is None else share.places(size, tf.range)
        weights = tf.where(places < count, tf.cast(size / count, tf.float32), 0.0)
        source = places % count
        if weight is not None:
            weights *= tf.cast(tf.gather(weight, source), tf.float32)
        if table is not None:
            weights *= tf.gather(table, tf.gather(y, source))
        return *tf.nest.map_structure(lambda t: tf.gather(t, source), (x, y)), weights

    return batches.enumerate().map(pad)


def _numpy_padded(
    batches: Iterable[Any],
    padded_size: Any,
    class_weight: Mapping[int, float] | None,
    share: Share | None,
) -> Iterator[Any]:
    """As ``padded``, for the batches of ``PictureBatches`` without TensorFlow."""
    for number, (x, y, *given) in enumerate(batches):
        size = padded_size(number, len(y), where)
        places = np.arange(size) if share is None else share.places(size, np.arange)
        source = places % len(y)
        weights = np.where(places < len(y), np.float32(size / len(y)), np.float32(0))
        if given:
            weights *= given[0][source]
        if class_weight:
            weights *= np.array([class_weight.get(int(i), 1.0) for i in y[source]], np.float32)
        yield x[source], y[source], weights


def multiple_of(count: int) -> Any:
    """A ``padded_size`` that is a multiple of ``count``."""
    return functools.partial(_multiple, count)


def _multiple(count: int, number: Any, n: Any, where: Any) -> Any:
    return -(-n // count) * count


def in_parts(batches: Any, count: int) -> Any:
    """Divide each batch, whose size is a multiple of ``count``, into as many batches."""
    if isinstance(batches, Generator):
        return _numpy_in_parts(batches, count)
    import tensorflow as tf

    def divide(*batch: Any) -> Any:
        parts = tf.nest.map_structure(lambda t: tf.stack(tf.split(t, count)), batch)
        return tf.data.Dataset.from_tensor_slices(parts)

    number, divided = int(batches.cardinality()), batches.flat_map(divide)
    if number == tf.data.UNKNOWN_CARDINALITY:
        return divided
    number = number if number == tf.data.INFINITE_CARDINALITY else number * count
    return divided.apply(tf.data.experimental.assert_cardinality(number))


def _numpy_in_parts(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for batch in batches:
        yield from zip(*(np.split(array, count) for array in batch))


def unchanged(number: Any, n: Any, where: Any) -> Any:
    """A ``padded_size`` that adds weights and no examples."""
    return n


def where(condition: bool, yes: int, no: int) -> int:
    """As ``tf.where``, for integers."""
    return yes if condition else no


def is_even(batches: Any, devices: int) -> bool:
    """Whether all batches have the same size, a multiple of the number of devices."""
    if not hasattr(batches, "element_spec"):  # read without TensorFlow
        return devices == 1
    import tensorflow as tf

    size = tf.nest.flatten(batches.element_spec)[0].shape[0]
    return devices == 1 or (size is not None and size % devices == 0)
