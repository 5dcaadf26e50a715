"""Training and evaluating models for tasks without a recipe: what is recorded and refused."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import keras
from tfimm_lora.model.state import record_task, recorded_task

pytestmark = pytest.mark.once

NUMBERS = lora.Regression(("a", "b"), mean=(5.0, -1.0), std=(2.0, 0.5))
TAGS = lora.MultiLabel(("a", "b", "c"))


def model(outputs=2, activation=None):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    made = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, name="fc"),
            layers.Dense(outputs, activation=activation, name="head"),
        ]
    )
    return lora.inject_lora(made, lora_rank=2, lora_train_classifier=True)


def batches(y, size=4):
    import tensorflow as tf

    x = np.random.default_rng(0).normal(size=(len(y), 4)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(size)


def numbers(count=2, n=16):
    return batches(np.random.default_rng(1).normal(size=(n, count)).astype("float32"))


def train(of, data, **options):
    return lora.finetune(of, data, **{"epochs": 1, "verbose": "none", **options})


def values(of):
    return [np.array(w) for w in of.weights]


def test_a_training_records_its_task_for_adapters(tmp_path):
    trained = model()
    train(trained, numbers(), task=NUMBERS, out=tmp_path)
    assert lora.adapter_of(trained).task == NUMBERS.record()
    assert lora.Adapter.load(tmp_path / "adapter").task == NUMBERS.record()
    # All epochs are done: nothing is trained, and the adapter is written again.
    again = model()
    train(again, numbers(), task=NUMBERS, out=tmp_path, resume=True)
    assert lora.Adapter.load(tmp_path / "adapter").task == NUMBERS.record()


def test_thresholds_of_former_weights_are_not_recorded():
    trained, y = model(3), np.eye(3, dtype="float32").repeat(4, 0)
    task = lora.MultiLabel(TAGS.labels, thresholds=(0.2, 0.3, 0.4))
    train(trained, batches(y), task=task)
    assert recorded_task(trained) == TAGS.record()


def test_a_task_without_labels_is_not_recorded_which_is_said():
    trained, y = model(3), np.eye(3, dtype="float32").repeat(4, 0)
    record_task(trained, TAGS.record())
    with pytest.warns(UserWarning, match="will not record its task"):
        train(trained, batches(y), task=lora.MultiLabel())
    assert recorded_task(trained) is None


def test_a_model_of_another_task_is_not_trained_or_evaluated_for_classes():
    trained, classes = model(), batches(np.arange(40) % 2, 2)
    record_task(trained, NUMBERS.record())
    before = values(trained)
    for call in (
        lambda: train(trained, classes),
        lambda: lora.find_learning_rate(trained, classes),
        lambda: lora.evaluate(trained, classes),
    ):
        with pytest.raises(ValueError, match="fine-tuned for the task 'regression'"):
            call()
    assert all(map(np.array_equal, before, values(trained)))
    assert recorded_task(trained) == NUMBERS.record()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_probabilities_are_not_trained_as_numbers_or_logits(activation):
    for task, data in ((NUMBERS, numbers()), (TAGS, numbers(3))):
        with pytest.raises(ValueError, match=f"ends in a {activation}.*expected one without"):
            train(model(len(task.labels), activation), data, task=task)


@pytest.mark.parametrize("task", ["multilabel", lora.MultiLabel])
def test_something_else_than_a_task_is_refused(task):
    for call in (train, lora.evaluate):
        with pytest.raises(TypeError, match="Received task=.*expected an instance of a task"):
            call(model(), numbers(), task=task)


@pytest.mark.parametrize(
    "task, outputs, labels",
    [(NUMBERS, 2, 1), (NUMBERS, 1, 2), (NUMBERS, 1, 1), (TAGS, 3, 1)],
)
def test_other_numbers_of_labels_or_outputs_are_not_broadcast(task, outputs, labels):
    trained = model(outputs)
    before = values(trained)
    with pytest.raises(ValueError, match="expected as many labels as outputs"):
        train(trained, numbers(labels), task=task)
    assert all(map(np.array_equal, before, values(trained)))


@pytest.mark.parametrize("changed", [{"accumulate": 2}, {"task": TAGS}])
def test_a_training_is_resumed_with_the_same_task_and_parts(changed, tmp_path):
    y = np.arange(16) % 3
    train(model(3), batches(y), out=tmp_path)
    name = next(iter(changed))
    with pytest.raises(ValueError, match=f"other settings: {name}="):
        train(model(3), batches(y), out=tmp_path, resume=True, epochs=2, **changed)


@pytest.mark.parametrize("task", [lora.Classification, lora.MultiLabel, lora.Segmentation])
def test_one_string_is_not_several_labels(task):
    with pytest.raises(TypeError, match="labels='cat'; expected names"):
        task("cat")


def test_a_model_without_pixels_cannot_learn_a_segmentation():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="head")])
    lora.inject_lora(model, lora_rank=2, lora_targets=["head"])
    with pytest.raises(ValueError, match=r"outputs of shape \(None, 3\)"):
        lora.finetune(model, None, task=lora.Segmentation(("a", "b", "c")), verbose="none")
