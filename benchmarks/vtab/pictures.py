"""Pictures as batches for training and testing."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from tfimm_lora.backend import installed

MEAN = np.array([0.485, 0.456, 0.406], "float32")
STD = np.array([0.229, 0.224, 0.225], "float32")


def read(path, size):
    """A picture as uint8, (size, size, 3): what torchvision's Resize gives of a file."""
    with Image.open(path) as image:
        resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(resized)


def normalized(pictures):
    return (pictures.astype("float32") / 255 - MEAN) / STD


def read_in_order(part, size, batch):
    """Generate the inputs and labels of each batch of a part."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(part.paths), batch):
            paths = part.paths[start : start + batch]
            pictures = list(pool.map(lambda path: read(path, size), paths))
            yield normalized(np.stack(pictures)), np.array(part.labels[start : start + batch])


class TrainingBatches:
    """The batches of all epochs, for ``lora.finetune``: their order depends on the seed alone.

    The pictures are kept in memory: 150 MB for 1,000 of 224 x 224.
    """

    def __init__(self, part, size, batch, seed):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self.pictures = np.stack(list(pool.map(lambda path: read(path, size), part.paths)))
        self.labels = np.array(part.labels, "int32")
        self.batch, self.seed = batch, seed

    @property
    def steps_per_epoch(self):
        return -(-len(self.labels) // self.batch)

    def epochs(self, first):
        """The batches from an epoch on, without end; with tf.data if it is installed."""
        if not installed("tensorflow"):
            return self._generate(first)
        import tensorflow as tf

        inputs = tf.TensorSpec((None, *self.pictures.shape[1:]), tf.float32)
        return tf.data.Dataset.from_generator(
            lambda: self._generate(first),
            output_signature=(inputs, tf.TensorSpec((None,), tf.int32)),
        ).prefetch(2)

    def _generate(self, first):
        for epoch in itertools.count(first):
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.labels))
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                yield normalized(self.pictures[chosen]), self.labels[chosen]
