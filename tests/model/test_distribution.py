"""tf.distribute: a strategy over two logical devices trains as one device does."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.helpers.kerases import BACKEND

# One process for each strategy: two of them in one process break the collectives.
PROGRAM = """
import json, sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import tfimm_lora as lora
keras = tf.keras
mirrored = sys.argv[1] == "mirrored"
devices = ["CPU:0", "CPU:1"]
strategy = tf.distribute.MirroredStrategy(devices) if mirrored else tf.distribute.get_strategy()
rng = np.random.default_rng(0)
with strategy.scope():
    x = entry = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(6, 3, padding="same", name="conv")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Flatten()(keras.layers.ReLU()(x))
    x = keras.layers.Dense(8, activation="tanh", name="fc")(x)
    model = keras.Model(entry, keras.layers.Dense(3, name="head")(x))
# LoRA is put in outside the scope: it must find the strategy by itself.
variant = json.loads(sys.argv[2])
blocks = variant.pop("blocks", None)
lora.inject_lora(model, lora_rank=2, lora_train_classifier=True, **variant)
for variable in model.weights:
    if variant and "lora" in variable.name:
        continue
    # Positive, for the variances among them.
    variable.assign(np.abs(rng.normal(size=tuple(variable.shape))).astype("float32") * 0.2)
if blocks:
    lora.enable_gradient_checkpointing(model, blocks)
with strategy.scope():
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
frozen = [np.array(v) for v in model.non_trainable_weights]
images, labels = rng.normal(size=(16, 8, 8, 3)).astype("float32"), np.arange(16) % 3
data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)
losses = model.fit(data, epochs=4, verbose=0).history["loss"]
for variable, value in zip(model.non_trainable_weights, frozen):
    assert np.array_equal(np.array(variable), value)
before = model.predict(images, verbose=0)
lora.merge_lora_weights(model)
difference = float(np.abs(model.predict(images, verbose=0) - before).max())
print(json.dumps([losses, difference]))
"""


def losses_of(kind, **variant):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kind, json.dumps(variant)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses, difference = json.loads(done.stdout.strip().splitlines()[-1])
    assert difference < 1e-4
    return losses


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@pytest.mark.long
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param({}, marks=pytest.mark.nightly),
        {"lora_use_dora": True, "lora_init": "pissa"},
    ],
)
def test_mirrored_strategy_trains_to_the_same_losses(variant):
    one, two = losses_of("one", **variant), losses_of("mirrored", **variant)
    assert one[-1] < one[0]
    np.testing.assert_allclose(two, one, rtol=1e-4)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@pytest.mark.long
def test_mirrored_strategy_with_gradient_checkpointing():
    expected = losses_of("one")
    found = losses_of("mirrored", blocks=["conv", "fc"])
    np.testing.assert_allclose(found, expected, rtol=1e-4)
