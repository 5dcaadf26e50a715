"""The pictures of the demo: real handwritten digits, as they are and in another domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

HELD_OUT = 0.4  # share of the digits that no training ever sees
SENSOR_NOISE = 0.05  # standard deviation, where 0 is black and 1 is white


@dataclass(frozen=True)
class Domain:
    """Pictures (n, 8, 8, 1) from -1 to 1 and labels (n,), for training and held out."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_domains(seed: int) -> tuple[Domain, Domain]:
    """The 1797 digits of scikit-learn (nothing is downloaded), twice: source and target.

    A digit that is held out in one domain is held out in the other, too. So no model is
    tested on a digit that it has seen in any form.
    """
    digits = load_digits()
    images, labels = digits.images / 16.0, digits.target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed
    )

    def domain(pictures: np.ndarray) -> Domain:
        x = (2.0 * pictures[..., None] - 1.0).astype("float32")
        y = labels.astype("int32")
        return Domain(x[train], y[train], x[test], y[test])

    return domain(images), domain(shifted(images, np.random.default_rng(seed)))


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a badly mounted, cheap camera sees: rotated by 90 degrees, inverted, noisy."""
    negatives = 1.0 - np.rot90(images, axes=(1, 2))
    return negatives + rng.normal(0.0, SENSOR_NOISE, images.shape)
