"""Under a ``keras.distribution.ModelParallel`` the factors are placed with their kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, keras

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.backends,
    pytest.mark.long,
    pytest.mark.skipif(BACKEND != "jax", reason="of JAX"),
]

#: The layout of each kernel, and what it implies: of A, B, the magnitude and the bias.
LAYOUTS = {
    "conv": [(None, None, None, "model"), (None,) * 4, (None, "model"), ("model",)],
    "depthwise": [(None, None, "model", None), (None, None), (None, "model"), ("model", None)],
    "heads": [(None, "model", None), (None, None), (None, "model", None), ("model", None)],
    "out": [("model", None, None), ("model", None, None), (None, None), (None,)],
    "fc1": [(None, "model"), (None, None), (None, "model"), ("model",)],
    "fc2": [("model", None), ("model", None), (None, None), (None,)],
}
NAMES = ("kernel", "kernel_lora_a", "kernel_lora_b", "kernel_lora_magnitude")


class Batches:
    """Three batches of four examples, as ``lora.finetune`` takes them."""

    steps_per_epoch = 3

    def __init__(self, x, y):
        self.x, self.y = x, y

    def epochs(self, first):
        while True:
            for i in (0, 4, 8):
                yield self.x[i : i + 4], self.y[i : i + 4]


def build():
    layers = keras.layers
    keras.utils.set_random_seed(1)
    x = inputs = keras.Input((8, 8, 4))
    x = layers.Conv2D(16, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Reshape((16, 64))(x)
    x = layers.EinsumDense("abc,cde->abde", (None, 4, 16), name="heads")(x)
    x = layers.EinsumDense("abde,dec->abc", (None, 32), name="out")(x)
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(64, activation="gelu", name="fc1")(x)
    x = layers.Dense(32, name="fc2")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x))


def inject(model, rank):
    targets = list(LAYOUTS)
    lora.inject_lora(model, lora_rank=rank, lora_targets=targets, lora_use_dora=True)


def outputs_losses_and_factors():
    """Of a model in the current distribution, before and after three steps."""
    model = build()
    inject(model, 2)
    rng = np.random.default_rng(0)
    for name in LAYOUTS:
        b = model.get_layer(name).kernel_lora_b
        b.assign(rng.normal(size=b.shape) * 0.1)
    x = rng.normal(size=(12, 8, 8, 4)).astype("float32")
    y = rng.integers(0, 3, 12).astype("int32")
    outputs = model.predict(x[:8], verbose=0)
    trained = lora.finetune(
        model,
        Batches(x, y),
        epochs=1,
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9),
        verbose="none",
    )
    values = {v.path: np.asarray(v).tolist() for v in model.trainable_variables}
    return model, {"outputs": outputs.tolist(), "history": trained.history, "values": values}


def axes_of(variable):
    """The mesh axes of a variable, from what JAX did."""
    spec = tuple(variable.value.sharding.spec)
    return spec + (None,) * (len(variable.shape) - len(spec))


def on_eight_devices():
    """Check where the variables are, and print the results."""
    mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
    layout_map = keras.distribution.LayoutMap(mesh)
    for name, (kernel, *_) in LAYOUTS.items():
        # A pattern for everything beside the kernel must not decide for the factors.
        layout_map[f"{name}/kernel.*" if name == "heads" else f"{name}/kernel"] = kernel
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    with distribution.scope():
        model, results = outputs_losses_and_factors()
        for name, expected in LAYOUTS.items():
            found = [axes_of(getattr(model.get_layer(name), x)) for x in NAMES]
            assert found == expected, (name, found)
        # Factors of another rank, of which the user places one.
        model = build()
        del layout_map["fc1/kernel_lora_b"]
        layout_map["fc1/kernel_lora_b"] = ("model", None)
        inject(model, 4)
        assert axes_of(model.get_layer("fc1").kernel_lora_b) == ("model", None)
        assert axes_of(model.get_layer("fc2").kernel_lora_a) == ("model", None)
    print(json.dumps(results))


def test_factors_are_placed_with_their_kernels_and_train_as_on_one_device():
    program = "from tests.layers.test_model_parallel import on_eight_devices as f; f()"
    flags = "--xla_force_host_platform_device_count=8"
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    _, expected = outputs_losses_and_factors()
    np.testing.assert_allclose(found["outputs"], expected["outputs"], atol=1e-5)
    np.testing.assert_allclose(
        found["history"][0]["loss"], expected["history"][0]["loss"], rtol=1e-5
    )
    assert found["values"].keys() == expected["values"].keys()
    for path, values in expected["values"].items():
        np.testing.assert_allclose(found["values"][path], values, atol=1e-5, err_msg=path)
