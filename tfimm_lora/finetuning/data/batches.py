"""``PictureBatches``: batches of labelled pictures, reproducible by seed.

They are read with tf.data, or with threads where TensorFlow is not installed.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import numpy as np

from tfimm_lora.backend import installed
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.dataset import PictureSet
from tfimm_lora.finetuning.data.exit import until_exit
from tfimm_lora.finetuning.data.numpy_batches import endless_epochs, one_epoch
from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.data.share import Share


class PictureBatches:
    """Batches of pictures (float32, (b, h, w, c)) and their labels.

    Labels are class indices (int32, (b,)), or for other targets than classes numbers (float32,
    (b, labels)), as in ``PictureSet.array``. Masks are int32 (b, h, w), with -1 for pixels that
    are ignored. They are cropped, resized and moved with their pictures.

    The order and augmentation of an epoch depend only on the seed and the index of the epoch,
    so a run that is resumed gets the same batches as one without interruption. Each epoch has
    every picture once; its last batch may be smaller. Pictures are read in parallel and
    prefetched.

    Args:
        picture_set: The pictures, checked by ``check_pictures``.
        preprocessing: The preprocessing of the model.
        batch_size: The number of pictures in a batch, over all devices.
        augmentation: The augmentation for training. None: pictures are resized and cropped as
            in evaluation.
        seed: The seed of order and augmentation.
        shuffle: Whether each epoch has another order, or all epochs have the order of the set.

    Raises:
        ValueError: for an empty set, a batch size below 1, or channels other than 1 and 3.

    If a picture has become unreadable since the check, the iteration raises a
    ``tf.errors.InvalidArgumentError`` with the path of the file.

    Without TensorFlow, an epoch is a ``keras.utils.PyDataset`` and ``epochs`` a generator of
    numpy arrays, with the same order and, up to rounding, the same pictures. An unreadable
    picture then raises a ``ValueError`` with its path.

    Example:
        >>> import pathlib, tempfile
        >>> from PIL import Image
        >>> from tfimm_lora.finetuning.data.dataset import Picture, PictureSet
        >>> from tfimm_lora.finetuning.data.batches import PictureBatches
        >>> from tfimm_lora.finetuning.data.preprocessing import Preprocessing
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> for i in range(5):
        ...     Image.new("RGB", (10, 12)).save(folder / f"{i}.png")
        >>> found = [Picture(str(folder / f"{i}.png"), i % 2) for i in range(5)]
        >>> prepare = Preprocessing((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> batches = PictureBatches(PictureSet(tuple(found), ("cat", "dog")), prepare, 2)
        >>> [tuple(x.shape) for x, y in batches.epoch(0)], batches.steps_per_epoch
        ([(2, 8, 8, 3), (2, 8, 8, 3), (1, 8, 8, 3)], 3)
    """

    def __init__(
        self,
        picture_set: PictureSet,
        preprocessing: Preprocessing,
        batch_size: int,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if not len(picture_set):
            raise ValueError("Received an empty picture_set; expected at least one picture.")
        if operator.index(batch_size) < 1:
            raise ValueError(f"Received batch_size={batch_size}; expected at least 1.")
        if preprocessing.in_channels not in (1, 3):
            raise ValueError(
                f"Received a model with in_channels={preprocessing.in_channels}; expected 3 "
                "(RGB) or 1 (grey), the channels of picture files."
            )
        self.picture_set = picture_set
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        # Without changes, pictures are resized exactly as in evaluation.
        self.augmentation = None if augmentation == Augmentation.none() else augmentation
        self.seed = operator.index(seed)
        self.shuffle = shuffle
        self.share: Share | None = None

    def with_share(self, share: Share | None) -> PictureBatches:
        """A copy that reads only the share of this process, with the weights of the examples.

        Its batches are (pictures, labels, weights); see ``Share``.
        """
        changed = copy.copy(self)
        changed.share = share
        return changed

    def with_batch_size(self, batch_size: int) -> PictureBatches:
        """A copy with another batch size."""
        changed = copy.copy(self)
        changed.batch_size = batch_size
        return changed

    def rows(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The places of the pictures of each batch in the order of an epoch, and weights."""
        count, found = len(self.picture_set), []
        for start in range(0, count, self.batch_size):
            n = min(self.batch_size, count - start)
            rows, weights = np.arange(n), np.ones(n, np.float32)
            if self.share is not None:
                rows, weights = self.share.of_batch(n)
            found.append((start + rows, weights))
        return found

    @property
    def steps_per_epoch(self) -> int:
        """The number of batches in an epoch, including a smaller last one."""
        return -(-len(self.picture_set) // self.batch_size)

    def epoch(self, number: int) -> Any:
        """A ``tf.data.Dataset`` of one epoch, by its index from 0."""
        if not installed("tensorflow"):
            return one_epoch(self, number, shuffle=self.shuffle, augmentation=self.augmentation)
        import tensorflow as tf

        batches = self._batches(
            tf.data.Dataset.range(number, number + 1), self.shuffle, self.augmentation
        )
        return batches.apply(tf.data.experimental.assert_cardinality(self.steps_per_epoch))

    def epochs(self, first: int = 0) -> Any:
        """An infinite ``tf.data.Dataset`` of epoch ``first`` and all following ones.

        For ``fit(batches.epochs(7), initial_epoch=7, steps_per_epoch=...)``. Pictures are
        prefetched across the ends of epochs.
        """
        if not installed("tensorflow"):
            return endless_epochs(self, first)
        import tensorflow as tf

        batches = self._batches(
            tf.data.Dataset.range(first, tf.int64.max), self.shuffle, self.augmentation
        )
        endless = tf.data.experimental.INFINITE_CARDINALITY
        return batches.apply(tf.data.experimental.assert_cardinality(endless))

    def in_order(self) -> Any:
        """A ``tf.data.Dataset`` for evaluation: each picture once, in the order of the set.

        Pictures are read at full size, and resized and cropped as timm does in evaluation.
        """
        if not installed("tensorflow"):
            return one_epoch(self, 0, shuffle=False, augmentation=None)
        import tensorflow as tf

        batches = self._batches(tf.data.Dataset.range(1), shuffle=False, augmentation=None)
        return batches.apply(tf.data.experimental.assert_cardinality(self.steps_per_epoch))

    def _batches(self, epochs: Any, shuffle: bool, augmentation: Augmentation | None) -> Any:
        """The batches of the epochs in a dataset of epoch indices.

        Each epoch is padded to full batches with placeholders, which are removed again. So all
        epochs form one stream, and no thread waits at the end of an epoch.
        """
        import tensorflow as tf

        count = len(self.picture_set)
        places, weights = map(np.concatenate, zip(*(rows := self.rows())))
        size = len(rows[0][0])
        filling = size - len(rows[-1][0])
        places = np.pad(places, (0, filling), constant_values=count)
        weights = np.pad(weights, (0, filling))
        read = self._reader(augmentation)
        shape = (*self.preprocessing.input_size, self.preprocessing.in_channels)

        def indices(epoch: Any) -> Any:
            seed = _folded(tf, tf.constant([self.seed, 0], tf.int64), epoch)
            order = tf.range(count, dtype=tf.int64)
            if shuffle:
                own = _folded(tf, seed, count)  # an index that no picture has
                order = tf.random.experimental.stateless_shuffle(order, own, alg="philox")
            order = tf.gather(tf.concat([order, [-1]], 0), places)
            seeds = tf.tile(seed[None], [len(places), 1])
            return tf.data.Dataset.from_tensor_slices((seeds, order, weights))

        has_masks = self.picture_set.targets.are_pictures
        labels = None if has_masks else self.picture_set.array()

        def placeholder() -> Any:
            x = tf.zeros(shape)
            return (x, tf.zeros(shape[:2], tf.int32)) if has_masks else x

        def picture(seed: Any, index: Any, weight: Any) -> Any:
            x = tf.cond(index < 0, placeholder, lambda: read(seed, index))
            if not has_masks:
                return tf.ensure_shape(x, shape), index, weight
            mask = tf.ensure_shape(x[1], shape[:2])
            return (tf.ensure_shape(x[0], shape), mask), index, weight

        def cut(x: Any, index: Any, weight: Any) -> Any:
            there = tf.math.count_nonzero(index >= 0)
            if has_masks:
                batch = x[0][:there], x[1][:there]
            else:
                batch = x[:there], tf.gather(labels, index[:there])
            return batch if self.share is None else (*batch, weight[:there])

        options = tf.data.Options()
        # Shard the pictures among machines, since the source has no files to shard.
        options.experimental_distribute.auto_shard_policy = (
            tf.data.experimental.AutoShardPolicy.DATA
        )
        return (
            epochs.flat_map(indices)
            .map(picture, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            .batch(size, drop_remainder=True)
            .map(cut)
            .prefetch(tf.data.AUTOTUNE)
            .with_options(options)
        )

    def _reader(self, augmentation: Augmentation | None) -> Any:
        """A function from the seed of an epoch and the index of a picture to a model input.

        With masks, it returns the input and the mask.
        """
        import tensorflow as tf

        preprocessing = self.preprocessing
        pictures, channels = self.picture_set.pictures, preprocessing.in_channels
        targets, labels = self.picture_set.targets, self.picture_set.labels
        enough = None
        if augmentation is not None and not targets.are_pictures:  # masks have the full size
            enough = augmentation.enough(preprocessing.input_size)

        @until_exit
        def load(index: Any) -> np.ndarray:
            return read_picture(pictures[index].path, channels, at_least=enough)

        @until_exit
        def load_mask(index: Any) -> np.ndarray:
            return targets.picture(pictures[index].label, labels)

        resize_mask = preprocessing.mask_function()
        prepare = preprocessing.function(resize=augmentation is None)
        augment = None
        if augmentation is not None:
            augment = augmentation.function(
                preprocessing.input_size,
                interpolation=preprocessing.interpolation,
                crop_pct=preprocessing.crop_pct,
            )

        def read(seed: Any, index: Any) -> Any:
            # stateless, so that reading stays parallel if op determinism is enabled
            x = tf.numpy_function(load, [index], tf.uint8, stateful=False)
            x = tf.ensure_shape(x, (None, None, channels))
            if targets.are_pictures:
                mask = tf.numpy_function(load_mask, [index], tf.int32, stateful=False)
                mask = tf.ensure_shape(mask, (None, None))
                if augment is None:
                    return tf.cast(prepare(x), tf.float32), resize_mask(mask)
                x, mask = augment(x, _folded(tf, seed, index), mask)
                return tf.cast(prepare(x), tf.float32), mask
            if augment is not None:
                x = augment(x, _folded(tf, seed, index))
            return tf.cast(prepare(x), tf.float32)

        return read


def _folded(tf: Any, seed: Any, number: Any) -> Any:
    """Fold a number into a seed. TensorFlow's default algorithm differs between devices."""
    return tf.random.fold_in(seed, number, alg="philox")
