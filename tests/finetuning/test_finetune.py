"""``lora.finetune``: it trains, keeps the best weights, and goes on where it was stopped."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, run, values
from tests.helpers.selection import NIGHTLY_ON_LEGACY
from tfimm_lora.finetuning.checkpoint import Progress, TrainingCheckpoints
from tfimm_lora.finetuning.optimizer import create_optimizer
from tfimm_lora.finetuning.training import finetune
from tfimm_lora.utils.atomic_files import write_file

pytestmark = NIGHTLY_ON_LEGACY

ROOT = Path(__file__).parents[2]


def net(dropout=0.2, **arguments):
    """A small convolutional model with LoRA and random operations of every kind."""
    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu", name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(dropout, name="drop"),
            layers.Flatten(name="flatten"),
            layers.Dense(16, activation="relu", name="fc"),
            layers.Dense(3, name="head"),
        ]
    )
    settings = {"lora_rank": 2, "lora_train_classifier": True, "lora_dropout": 0.1}
    return lora.inject_lora(model, **{**settings, **arguments})


class Batches:
    """Pictures in an order that the number of the epoch decides."""

    steps_per_epoch = 4

    def __init__(self, count=30):
        rng = np.random.default_rng(0)
        self.y = rng.integers(0, 3, count).astype("int32")
        self.x = (
            rng.normal(size=(count, 8, 8, 1)).astype("float32") + self.y[:, None, None, None]
        )

    def epochs(self, first):
        def of(epoch):
            n = len(self.y)
            order = tf.random.experimental.stateless_shuffle(
                tf.range(n), seed=[5, tf.cast(epoch, tf.int32)]
            )
            data = tf.data.Dataset.from_tensor_slices((self.x, self.y)).batch(n)
            shuffled = data.map(lambda x, y: (tf.gather(x, order), tf.gather(y, order)))
            return shuffled.unbatch().batch(8)

        numbers = tf.data.Dataset.range(first, 1_000_000)
        return numbers.flat_map(of)

    def plain(self):
        return tf.data.Dataset.from_tensor_slices((self.x, self.y)).batch(8)


def trained(model, out=None, epochs=4, **options):
    data = Batches()
    options = {"verbose": "none", "validation": data.plain(), "learning_rate": 0.01, **options}
    return finetune(model, data, epochs=epochs, out=out, **options)


@pytest.mark.backends
def test_a_trained_functional_model_becomes_a_regular_one(tmp_path):
    """Its loss is a function, with which Keras 3 cannot compile a copy; nor that inside it."""
    inputs = keras.Input((8, 8, 1))
    features = keras.layers.Flatten()(inputs)
    inner = keras.Model(inputs, keras.layers.Dense(8, name="fc")(features), name="inner")
    inner.compile(optimizer="sgd", loss=lambda y, z: (y - z) ** 2)
    outputs = keras.layers.Dense(3, name="head")(inner(inputs))
    model = keras.Model(inputs, outputs)
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    trained(model, epochs=1)
    x = Batches().x[:4]
    expected = run(model, x)
    for regular in (lora.convert_to_regular_model(model), model):
        np.testing.assert_allclose(run(regular, x), expected, rtol=1e-5, atol=1e-6)
    lora.export(model, tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(run(loaded, x), expected, rtol=1e-5, atol=1e-6)
    model.evaluate(Batches().plain(), verbose=0)  # it is still compiled


@pytest.mark.backends
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_file_of_a_trained_model_is_loaded(accumulate, tmp_path):
    """With compile=True, the default: the loss is a function, which Keras cannot find again."""
    model = net()
    trained(model, epochs=1, accumulate=accumulate)
    model.save(tmp_path / "model.keras")
    x = Batches().x[:4]
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is type(model.layers[-1])
    np.testing.assert_allclose(run(loaded, x), run(model, x), rtol=1e-5, atol=1e-6)
    model.evaluate(Batches().plain(), verbose=0)  # it is still compiled


def assert_same_files(one, two):
    """The same numbers and the same adapter, bit for bit."""
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    first, second = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)
    )
    assert first.keys() == second.keys()
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])


def stop_after(epochs):
    """A callback that ends a training as a crash does."""

    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == epochs:
                raise RuntimeError("crash")

    return Crash()


def test_training_learns_and_changes_what_it_may_only(tmp_path):
    model = net()
    frozen = [v for v in model.weights if id(v) not in {id(t) for t in model.trainable_weights}]
    before = values(frozen)
    result = trained(model, tmp_path, epochs=6, learning_rate=0.03)
    assert result.history[-1]["val_loss"] < 0.7 * result.history[0]["val_loss"]
    np.testing.assert_array_equal(
        np.concatenate([v.ravel() for v in before if v.dtype == "float32"]),
        np.concatenate([v.ravel() for v in values(frozen) if v.dtype == "float32"]),
    )
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [int(r["epoch"]) for r in rows] == [1, 2, 3, 4, 5, 6]
    assert [float(r["loss"]) for r in rows] == [h["loss"] for h in result.history]
    other = net()
    lora.load_adapter(other, tmp_path / "adapter")
    x = Batches().x
    np.testing.assert_array_equal(
        array(model(x, training=False)), array(other(x, training=False))
    )


@pytest.mark.parametrize("labels", ["numbers", "one column", "one-hot"])
def test_a_step_is_traced_once(labels):
    """Keras alone traces it twice: its optimizer and metrics get their variables in between."""
    traced = []

    class Counted(keras.layers.Layer):
        def call(self, x, training=None):
            if training and not tf.executing_eagerly():
                traced.append(x)
            return x

    inputs = keras.Input((4,))
    outputs = keras.layers.Dense(3, name="fc")(Counted()(inputs))
    model = lora.inject_lora(keras.Model(inputs, outputs), lora_rank=2, lora_targets=["fc"])
    y = np.arange(6) % 3
    loss = None
    if labels == "one column":
        y = y[:, None]
    elif labels == "one-hot":
        y = np.eye(3, dtype="float32")[y]
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    data = tf.data.Dataset.from_tensor_slices((np.ones((6, 4), "float32"), y)).batch(4)
    result = finetune(model, data, data, epochs=2, loss=loss, verbose="none")
    assert len(traced) == 1
    # The metric is the one that Keras chooses for these labels.
    reference = keras.metrics.CategoricalAccuracy()
    reference.update_state(
        np.eye(3)[np.arange(6) % 3], array(model(np.ones((6, 4), "float32")))
    )
    best = result.history[result.best_epoch - 1]
    assert best["val_accuracy"] == pytest.approx(float(reference.result()))


@pytest.mark.parametrize("crash", [1, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_resumed_training_is_the_same_to_the_last_bit(tmp_path, crash):
    whole = net()
    expected = trained(whole, tmp_path / "whole")

    first = net()
    with pytest.raises(RuntimeError, match="crash"):
        trained(first, tmp_path / "run", callbacks=[stop_after(crash)])
    keras.utils.set_random_seed(99)  # another process has other random numbers
    second = net()
    for v in second.trainable_weights:
        v.assign(np.zeros(v.shape))
    keras.utils.set_random_seed(98)
    result = trained(second, tmp_path / "run", resume=True)
    assert result == expected
    for a, b in zip(values(whole.weights), values(second.weights)):
        np.testing.assert_array_equal(a, b)
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_resuming_what_was_done_changes_nothing(tmp_path):
    expected = trained(net(), tmp_path)
    model = net()
    again = trained(model, tmp_path, resume=True)
    assert again == expected
    other = lora.load_adapter(net(), tmp_path / "adapter")
    for a, b in zip(values(model.trainable_weights), values(other.trainable_weights)):
        np.testing.assert_array_equal(a, b)


def test_the_model_ends_with_the_weights_of_the_best_epoch(tmp_path):
    model, seen = net(), []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((logs["val_loss"], values(self.model.trainable_weights)))

    data = Batches()
    wrong = tf.data.Dataset.from_tensor_slices((data.x, (data.y + 1) % 3)).batch(8)
    # What is learned makes wrong labels less and less likely.
    result = trained(model, validation=wrong, callbacks=[Watch()], learning_rate=0.05)
    best = int(np.argmin([loss for loss, _ in seen]))
    assert result.best_epoch == best + 1 < 4
    for a, b in zip(values(model.trainable_weights), seen[best][1]):
        np.testing.assert_array_equal(a, b)


def test_patience_ends_a_training_and_resuming_keeps_it_ended(tmp_path):
    options = {"epochs": 30, "learning_rate": 0.3, "patience": 2}
    result = trained(net(), tmp_path, **options)
    assert result.stopped_early
    assert len(result.history) == result.best_epoch + 2 < 30
    again = trained(net(), tmp_path, resume=True, **options)
    assert again == result


def test_class_weights_are_those_of_keras():
    """Two classes weighted 0 and one weighted 1: as if only that one were there."""
    data = Batches()
    weighted, alone = net(dropout=0, lora_dropout=0), net(dropout=0, lora_dropout=0)
    sgd = {"optimizer": None, "epochs": 1, "verbose": "none"}
    sgd["optimizer"] = keras.optimizers.SGD(0.1)
    finetune(weighted, data.plain(), class_weight={0: 1.0, 1: 0.0, 2: 0.0}, **sgd)
    sgd["optimizer"] = keras.optimizers.SGD(0.1)
    masked = data.plain().map(lambda x, y: (x, y, tf.cast(y == 0, tf.float32)))
    finetune(alone, masked, **sgd)
    for a, b in zip(values(weighted.trainable_weights), values(alone.trainable_weights)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["default", "sgd"])
def test_a_batch_that_is_computed_in_parts_gives_the_same_model(optimizer, tmp_path):
    """The last batch has 6 pictures, of which the last part has none."""

    def result(accumulate, **options):
        model = net(dropout=0, lora_dropout=0)
        if optimizer == "sgd":
            options["optimizer"] = keras.optimizers.SGD(0.1, momentum=0.9)
        made = trained(
            model,
            epochs=2,
            weight_decay=0.1,
            class_weight={0: 1.0, 1: 2.0, 2: 0.5},
            accumulate=accumulate,
            **options,
        )
        return [numbers["val_loss"] for numbers in made.history], values(model.weights)

    losses, weights = result(1)
    found, parts = result(4, out=tmp_path)
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    # AdamW divides by the size of a gradient, which enlarges the rounding of small ones.
    atol = 1e-5 if optimizer == "sgd" else 1e-3
    for a, b in zip(parts, weights):
        np.testing.assert_allclose(a, b, atol=atol)
    with pytest.raises(ValueError, match="built|gradient_accumulation_steps"):
        used = keras.optimizers.SGD(0.1)
        used.build(net().trainable_weights)
        trained(net(), epochs=1, optimizer=used, accumulate=2)


def test_a_training_in_parts_resumes_to_the_last_bit(tmp_path):
    expected = trained(net(), tmp_path / "whole", epochs=2, accumulate=2)
    with pytest.raises(RuntimeError, match="crash"):
        trained(net(), tmp_path / "run", 2, accumulate=2, callbacks=[stop_after(1)])
    assert trained(net(), tmp_path / "run", 2, accumulate=2, resume=True) == expected
    assert_same_files(tmp_path / "run", tmp_path / "whole")


def test_the_rate_warms_up_and_follows_a_cosine():
    steps, rate, warm = 50, 0.2, 10
    optimizer = create_optimizer(keras, steps=steps, learning_rate=rate, warmup=0.2)
    schedule = optimizer._learning_rate
    got = [float(schedule(step)) for step in range(steps)]
    up = [rate * (1 / 11 + (10 / 11) * step / warm) for step in range(warm)]
    down = [
        rate * 0.5 * (1 + np.cos(np.pi * (s - warm) / (steps - warm)))
        for s in range(warm, steps)
    ]
    np.testing.assert_allclose(got, up + down, rtol=1e-5, atol=1e-7)


def test_weight_decay_leaves_biases_alone():
    """With a zero gradient AdamW moves a weight by -rate * decay * weight and no bias."""
    optimizer = create_optimizer(keras, steps=10, learning_rate=0.1, weight_decay=0.5, warmup=0)
    layer = keras.layers.Dense(2, bias_initializer="ones", kernel_initializer="ones")
    layer.build((None, 3))
    optimizer.build(layer.trainable_variables)
    zeros = [tf.zeros(v.shape) for v in layer.trainable_variables]
    if keras.__version__ >= "3":
        zeros = [keras.ops.zeros(v.shape) for v in layer.trainable_variables]
    optimizer.apply_gradients(zip(zeros, layer.trainable_variables))
    np.testing.assert_allclose(array(layer.kernel), 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(array(layer.bias), 1)


def test_the_norm_to_clip_reaches_the_optimizer():
    model = net()
    trained(model, epochs=1, clip_norm=0.3)
    assert model.optimizer.global_clipnorm == 0.3


@pytest.mark.parametrize("monitor", ["val_mae", "val_accuracy"])
def test_the_best_epoch_has_the_lowest_error_or_the_highest_accuracy(monitor):
    error = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="mae")
    metrics = ["accuracy", error]  # the name decides
    made = trained(net(), epochs=4, learning_rate=0.3, metrics=metrics, monitor=monitor)
    values = [numbers[monitor] for numbers in made.history]
    assert min(values) < max(values)
    best = np.argmin(values) if monitor == "val_mae" else np.argmax(values)
    assert made.best_epoch == best + 1


@pytest.mark.parametrize("clip_norm", [1.0, 0])
def test_the_norm_of_the_gradient_is_clipped_over_all_weights(clip_norm):
    """AdamW in NumPy, with a step whose gradient is a hundred times as large."""
    schedule = {"steps": 1000, "learning_rate": 0.1, "weight_decay": 0, "warmup": 0}
    optimizer = create_optimizer(keras, **schedule, clip_norm=clip_norm)
    layer = keras.layers.Dense(2, kernel_initializer="zeros")
    layer.build((None, 3))
    optimizer.build(layer.trainable_variables)
    rng = np.random.default_rng(0)
    kernel, bias = np.zeros((3, 2)), np.zeros(2)
    means, squares = [0.0, 0.0], [0.0, 0.0]
    for step, size in enumerate((0.1, 10.0, 0.1)):
        given = [size * rng.normal(size=v.shape) for v in (kernel, bias)]
        norm = np.sqrt(sum((g**2).sum() for g in given))
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for i, value in enumerate((kernel, bias)):
            gradient = scale * given[i]
            means[i] = 0.9 * means[i] + 0.1 * gradient
            squares[i] = 0.999 * squares[i] + 0.001 * gradient**2
            correction = np.sqrt(1 - 0.999 ** (step + 1)) / (1 - 0.9 ** (step + 1))
            rate = float(optimizer._learning_rate(step)) * correction
            value -= rate * means[i] / (np.sqrt(squares[i]) + 1e-7)
        variables = layer.trainable_variables
        convert = tf.constant if LEGACY else keras.ops.convert_to_tensor
        given = [convert(g.astype("float32")) for g in given]
        optimizer.apply_gradients(zip(given, variables))
    np.testing.assert_allclose(array(layer.kernel), kernel, rtol=1e-4)
    np.testing.assert_allclose(array(layer.bias), bias, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "epochs=0"),
        ({"patience": 0}, "patience=0"),
        ({"learning_rate": -1}, "learning_rate=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"warmup": 1}, "warmup=1"),
        ({"verbose": "loud"}, "verbose='loud'"),
        ({"monitor": "val_f1"}, "val_f1"),
        ({"accumulate": 0}, "accumulate=0"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        trained(net(), **{"epochs": 1, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": "3"},
        {"epochs": True},
        {"patience": 1.5},
        {"steps_per_epoch": 2.0},
        {"learning_rate": "1e-3"},
        {"weight_decay": None},
        {"warmup": "0.1"},
    ],
)
def test_values_of_the_wrong_type_are_named(options):
    ((name, value),) = options.items()
    with pytest.raises(TypeError, match=f"Received {name}={value!r}; expected"):
        trained(net(), **{"epochs": 1, **options})


def test_models_and_data_that_cannot_be_trained_on(tmp_path):
    plain = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match="no LoRA"):
        trained(plain)
    x, y = np.zeros((4, 8, 8, 1), "float32"), np.zeros(4, "int32")
    for arrays in ((x, y), [x, y], {"x": x, "y": y}, x):
        with pytest.raises(TypeError, match="expected batches.*from_tensor_slices"):
            finetune(net(), arrays, epochs=1, steps_per_epoch=2, verbose="none")
        with pytest.raises(TypeError, match="dataset as arrays.*expected batches"):
            lora.evaluate(net(), arrays)
    merged = lora.merge_lora_weights(net())
    with pytest.raises(ValueError, match="unmerge"):
        trained(merged)
    with pytest.raises(ValueError, match="steps_per_epoch"):
        finetune(net(), Batches().plain().repeat(), epochs=1, verbose="none")
    trained(net(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="resume=True"):
        trained(net(), tmp_path, epochs=1)
    with pytest.raises(ValueError, match="seed=0, now 3"):
        trained(net(), tmp_path, epochs=1, seed=3, resume=True)
    with pytest.raises(ValueError, match="does not fit"):
        trained(net(lora_rank=3), tmp_path, epochs=1, resume=True)


def test_a_loss_that_is_not_finite_ends_the_training():
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trained(net(), epochs=3, optimizer=keras.optimizers.SGD(1e30))


def test_an_endless_dataset_with_its_number_of_steps():
    data = Batches().plain().repeat()
    result = finetune(net(), data, epochs=2, steps_per_epoch=3, verbose="none")
    assert len(result.history) == 2 and result.best_epoch == 2


def test_only_the_last_and_the_best_state_are_kept(tmp_path):
    kept = TrainingCheckpoints(tmp_path)
    for epoch in range(5):
        kept.save(Progress(epoch + 1, [{}] * (epoch + 1), 1 if epoch else 0), {"x": np.ones(2)})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch-00001.safetensors",
        "epoch-00004.safetensors",
    ]
    assert kept.last().epoch == 5
    kept.path(4).write_bytes(b"torn")
    with pytest.raises(ValueError, match="epoch-00004"):
        kept.last()


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, "before")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, "after")
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.long
def test_a_killed_training_resumes_to_identical_weights(tmp_path):
    """kill -9 in the middle of an epoch, then another process."""
    code = textwrap.dedent("""
        import sys, time
        from tests.finetuning import test_finetune as t
        t.keras.utils.set_random_seed(int(sys.argv[3]))
        slow = [t.keras.callbacks.LambdaCallback(
            on_epoch_end=lambda e, logs: print("epoch", e, flush=True),
            on_train_batch_end=lambda b, logs: time.sleep(0.2 * int(sys.argv[2])))]
        t.trained(t.net(), sys.argv[1], resume=True, callbacks=slow)
    """)

    def start(folder, slow, seed):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(slow), str(seed)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    assert start(tmp_path / "whole", 0, 1).wait() == 0
    child = start(tmp_path / "run", 1, 2)
    for line in child.stdout:
        if line.startswith("epoch 1"):
            break
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert start(tmp_path / "run", 0, 3).wait() == 0
    for name in ("metrics.csv", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()
