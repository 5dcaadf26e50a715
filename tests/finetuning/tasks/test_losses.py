"""Losses and metrics of the tasks on every Keras, against NumPy."""

import numpy as np
import pytest
from scipy.special import expit

from tests.helpers.kerases import LEGACY, array, keras, normal
from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.tasks.classification import Classification
from tfimm_lora.finetuning.tasks.multilabel import MultiLabel
from tfimm_lora.finetuning.tasks.regression import Regression
from tfimm_lora.finetuning.training import default_loss

pytestmark = pytest.mark.backends


def tensor(x):
    if LEGACY:
        import tensorflow as tf

        return tf.constant(x)
    return keras.ops.convert_to_tensor(x)


def loss_of(task, labels, outputs, class_weight=None):
    loss = default_loss(default_backend(), Devices(), task, class_weight)
    return array(loss(tensor(labels), tensor(outputs)))


@pytest.mark.parametrize("weights", [None, {0: 3.0, 2: 0.25}])
def test_the_loss_of_several_labels(weights):
    logits, labels = 3 * normal(6, 4), (normal(6, 4, seed=1) > 0).astype("float32")
    p, w = expit(logits.astype("float64")), np.ones(4)
    for i, value in (weights or {}).items():
        w[i] = value
    terms = -w * labels * np.log(p) - (1 - labels) * np.log(1 - p)
    found = loss_of(MultiLabel(("a", "b", "c", "d")), labels, logits, weights)
    np.testing.assert_allclose(found, terms.mean(1), rtol=1e-5)
    large = loss_of(MultiLabel(("a",)), np.float32([[1], [0]]), np.float32([[-200], [200]]))
    np.testing.assert_allclose(large, 200, rtol=1e-6)  # where log(p) would be infinite


def test_the_loss_of_a_regression_is_that_of_standardised_numbers():
    outputs, numbers = normal(5, 2), normal(5, 2, seed=1) * (2, 50) + (10, 2000)
    numbers = numbers.astype("float32")
    task = Regression(("a", "b"), mean=(10.0, 2000.0), std=(2.0, 50.0))
    expected = (((numbers - [10, 2000]) / [2, 50] - outputs) ** 2).mean(1)
    np.testing.assert_allclose(loss_of(task, numbers, outputs), expected, rtol=1e-4)
    (mae,) = task.metrics(default_backend())
    expected = np.abs((numbers - [10, 2000]) / [2, 50] - outputs).mean(1)
    found = array(mae(tensor(numbers), tensor(outputs)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(task.values(outputs), outputs * [2.0, 50] + [10, 2000])
    with pytest.raises(ValueError, match="class_weight"):
        loss_of(task, numbers, outputs, {0: 1.0})
    with pytest.raises(ValueError, match=r"Regression\.of"):
        loss_of(Regression(("a", "b")), numbers, outputs)


def test_the_loss_of_a_classification_is_the_cross_entropy():
    logits, labels = normal(6, 4), np.array([0, 3, 1, 1, 2, 0], "int32")
    e = np.exp(logits.astype("float64"))
    expected = -np.log((e / e.sum(1, keepdims=True))[np.arange(6), labels])
    np.testing.assert_allclose(loss_of(Classification(), labels, logits), expected, rtol=1e-5)
