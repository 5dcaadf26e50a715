"""LoRA+ on the optimizers of both Kerases: the rate of B is a multiple of the others'."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, values
from tests.helpers.selection import NIGHTLY_ON_LEGACY
from tfimm_lora.backend import default_backend
from tfimm_lora.training.loraplus import LoRAPlus, loraplus_class, loraplus_optimizer

pytestmark = NIGHTLY_ON_LEGACY

layers, optimizers = keras.layers, keras.optimizers
backend = default_backend()

RATIO = 5.0


def small():
    """A model with LoRA in one layer, a trained bias and a trained head; always the same."""
    entry = keras.Input((6,))
    x = layers.Dense(5, activation="tanh", name="fc")(entry)
    model = keras.Model(entry, layers.Dense(3, name="head")(x))
    lora.inject_lora(
        model, lora_rank=2, lora_train_modules=["head"], lora_train_bias="lora_only"
    )
    for seed, variable in enumerate(model.weights):
        variable.assign(0.4 * normal(*variable.shape, seed=seed))
    return model


def is_b(variable):
    return backend.variable_name(variable) == "kernel_lora_b"


def gradients(variables, steps):
    rng = np.random.default_rng(7)
    return [
        [rng.normal(size=tuple(v.shape)).astype("float32") for v in variables]
        for _ in range(steps)
    ]


def apply(optimizer, grads, variables):
    tensors = [keras.ops.convert_to_tensor(g) for g in grads] if not LEGACY else grads
    if LEGACY:
        import tensorflow as tf

        tensors = [tf.constant(g) for g in grads]
    optimizer.apply_gradients(list(zip(tensors, variables)))


# -- against NumPy ------------------------------------------------------------------------


def clipped(grads, norm):
    total = np.sqrt(sum(np.square(g, dtype="float64").sum() for g in grads))
    return [g * min(1.0, norm / total) for g in grads]


def reference(rule, variables, steps, rate, decay=None, clip=None, beta=(0.9, 0.999)):
    """What a rule makes of variables in float64; ``rate`` is a function of the step."""
    out = [array(v).astype("float64") for v in variables]
    m, v = [np.zeros_like(x) for x in out], [np.zeros_like(x) for x in out]
    for t, grads in enumerate(steps):
        grads = [g.astype("float64") for g in grads]
        grads = clipped(grads, clip) if clip else grads
        for i, g in enumerate(grads):
            eta = rate(t) * (RATIO if is_b(variables[i]) else 1.0)
            if decay:
                out[i] = out[i] - eta * decay * out[i]
            if rule == "sgd":
                m[i] = 0.9 * m[i] - eta * g
                out[i] = out[i] + 0.9 * m[i] - eta * g  # Nesterov's
                continue
            m[i] = beta[0] * m[i] + (1 - beta[0]) * g
            v[i] = beta[1] * v[i] + (1 - beta[1]) * g * g
            alpha = eta * np.sqrt(1 - beta[1] ** (t + 1)) / (1 - beta[0] ** (t + 1))
            out[i] = out[i] - alpha * m[i] / (np.sqrt(v[i]) + 1e-7)
    return out


RULES = {
    "sgd": lambda **more: optimizers.SGD(0.01, momentum=0.9, nesterov=True, **more),
    "adam": lambda **more: optimizers.Adam(0.01, **more),
    "adamw": lambda **more: optimizers.AdamW(0.01, **{"weight_decay": 0.1, **more}),
}


@pytest.mark.backends
@pytest.mark.parametrize("rule, clip", [("sgd", 0.5), ("adam", None), ("adamw", 0.5)])
def test_updates_are_those_of_numpy(rule, clip):
    model = small()
    variables = model.trainable_weights
    steps = gradients(variables, 6)
    decay = {"adamw": 0.1}.get(rule)
    expected = reference(rule, variables, steps, lambda t: 0.01, decay, clip)
    more = {"global_clipnorm": clip} if clip else {}
    optimizer = loraplus_optimizer(model, RULES[rule](**more), RATIO)
    for grads in steps:
        apply(optimizer, grads, variables)
    for variable, value in zip(variables, expected):
        np.testing.assert_allclose(array(variable), value, rtol=2e-5, atol=2e-6)
    assert sum(is_b(v) for v in variables) == 1 and len(variables) == 5


@pytest.mark.backends
def test_schedules_and_assigned_rates_move_both():
    schedule = optimizers.schedules.ExponentialDecay(0.05, decay_steps=1, decay_rate=0.5)
    model = small()
    variables = model.trainable_weights
    steps = gradients(variables, 5)
    expected = reference("adamw", variables, steps, lambda t: 0.05 * 0.5**t, 0.1)
    optimizer = optimizers.AdamW(schedule, weight_decay=0.1)
    loraplus_optimizer(model, optimizer, RATIO)
    for grads in steps:
        apply(optimizer, grads, variables)
    for variable, value in zip(variables, expected):
        np.testing.assert_allclose(array(variable), value, rtol=2e-5, atol=2e-6)

    model = small()
    variables = model.trainable_weights
    expected = reference("adamw", variables, steps, lambda t: 0.01 if t < 3 else 0.002, 0.1)
    optimizer = loraplus_optimizer(model, optimizers.AdamW(0.01, weight_decay=0.1), RATIO)
    for t, grads in enumerate(steps):
        if t == 3:
            optimizer.learning_rate = 0.002
            assert float(array(optimizer.learning_rate)) == pytest.approx(0.002)
        apply(optimizer, grads, variables)
    for variable, value in zip(variables, expected):
        np.testing.assert_allclose(array(variable), value, rtol=2e-5, atol=2e-6)


# -- against two optimizers, for every rule -------------------------------------------------


@pytest.mark.backends
@pytest.mark.parametrize("cls", backend.optimizer_classes(), ids=lambda cls: cls.__name__)
def test_every_rule_is_that_of_two_optimizers(cls):
    arguments = dict(learning_rate=0.01, weight_decay=0.1)
    model, twin = small(), small()
    variables, others = model.trainable_weights, twin.trainable_weights
    steps = gradients(variables, 4)
    optimizer = loraplus_optimizer(model, cls(**arguments), RATIO)
    plain, fast = cls(**arguments), cls(**{**arguments, "learning_rate": 0.01 * RATIO})
    for grads in steps:
        apply(optimizer, grads, variables)
        for one, group in ((plain, False), (fast, True)):
            chosen = [(g, v) for g, v in zip(grads, others) if is_b(v) is group]
            apply(one, *zip(*chosen))
    for variable, expected in zip(variables, others):
        np.testing.assert_allclose(array(variable), array(expected), rtol=2e-5, atol=1e-6)
    assert any(np.abs(array(v)).max() > 0 for v in variables)


def test_what_is_excluded_from_decay_stays_so():
    model, twin = small(), small()
    steps = gradients(model.trainable_weights, 3)
    for one in (model, twin):
        optimizer = optimizers.AdamW(0.01, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias", "kernel_lora_a"])
        loraplus_optimizer(one, optimizer, 3.0)
        if one is twin:  # the same by hand
            optimizer = optimizers.Adam(0.01)
            loraplus_optimizer(one, optimizer, 3.0)
        for grads in steps:
            if one is twin:
                for v in one.trainable_weights:
                    factor = 3.0 if is_b(v) else 1.0
                    name = backend.variable_name(v)
                    if name not in ("bias", "kernel_lora_a"):
                        v.assign(array(v) * np.float32(1 - 0.01 * factor * 0.5))
            apply(optimizer, grads, one.trainable_weights)
    for a, b in zip(model.trainable_weights, twin.trainable_weights):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-5, atol=1e-6)


# -- in fit ---------------------------------------------------------------------------------

X, Y = normal(16, 6, seed=1), np.arange(16) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def steps_of(optimizer, ratio=None, epochs=1, callbacks=(), **compile_options):
    """How far one step or more moves each variable."""
    model = small()
    if ratio is not None:
        optimizer = loraplus_optimizer(model, optimizer, ratio)
    model.compile(optimizer, LOSS, **compile_options)
    before = values(model.trainable_weights)
    model.fit(
        X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks)
    )
    moved = [array(v) - old for v, old in zip(model.trainable_weights, before)]
    return moved, [is_b(v) for v in model.trainable_weights], model


@pytest.mark.backends
@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"run_eagerly": True}],
    ids=lambda o: next(iter(o), ""),
)
def test_fit_moves_b_by_the_ratio_and_all_else_as_before(options):
    if BACKEND == "torch" and options.get("jit_compile"):
        pytest.skip("torch compiles with a compiler that may not be there")
    plain, _, _ = steps_of(optimizers.SGD(0.1), **options)
    scaled, bs, _ = steps_of(optimizers.SGD(0.1), RATIO, **options)
    for a, b, fast in zip(plain, scaled, bs):
        # Differences of weights near one, which are rounded to 6e-8, times the ratio.
        np.testing.assert_allclose(b, a * (RATIO if fast else 1.0), rtol=1e-4, atol=1e-6)
    assert sum(bs) == 1


def test_ratio_of_one_is_the_ordinary_optimizer():
    plain, _, _ = steps_of("adam", epochs=3)
    scaled, _, model = steps_of("adam", 1.0, epochs=3)
    for a, b in zip(plain, scaled):
        np.testing.assert_array_equal(a, b)
    assert type(model.optimizer).__name__ == "LoRAPlusAdam"


def test_reduce_on_plateau_reduces_both():
    patient = keras.callbacks.ReduceLROnPlateau(
        "loss", factor=0.0625, patience=0, min_delta=9.0
    )

    class Steps(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.before = values(self.model.trainable_weights)

        def on_epoch_end(self, epoch, logs=None):
            moved = [array(v) - b for v, b in zip(self.model.trainable_weights, self.before)]
            self.found = [*getattr(self, "found", []), moved]

    steps = Steps()
    # The sign of the gradient alone: a step is the rate.
    _, bs, _ = steps_of(optimizers.Lion(0.001), RATIO, epochs=3, callbacks=[steps, patient])
    rates = [[np.abs(m).max() for m in moved] for moved in steps.found]
    for factor, found in zip((1.0, 1.0, 0.0625), rates):
        for rate, fast in zip(found, bs):
            expected = 0.001 * factor * (RATIO if fast else 1.0)
            assert rate == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("wrapped", [False, True])
def test_mixed_precision_scales_the_loss_and_not_the_ratio(policy, wrapped):
    policy("mixed_float16")
    name = "LossScaleOptimizer"
    wrap = getattr(keras.mixed_precision, name) if wrapped else lambda optimizer: optimizer
    plain, _, _ = steps_of(wrap(optimizers.SGD(0.1)))
    scaled, bs, model = steps_of(wrap(optimizers.SGD(0.1)), RATIO)
    assert name in type(model.optimizer).__name__
    assert isinstance(model.optimizer.inner_optimizer, LoRAPlus)
    for a, b, fast in zip(plain, scaled, bs):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(b, a * (RATIO if fast else 1.0), rtol=2e-3, atol=1e-6)


# -- saving ---------------------------------------------------------------------------------


@pytest.mark.backends
def test_config_makes_the_same_optimizer_again():
    schedule = optimizers.schedules.CosineDecay(0.1, 10)
    model = small()
    made = loraplus_optimizer(model, optimizers.AdamW(schedule, weight_decay=0.3), 7)
    twin = type(made).from_config(made.get_config())
    assert (twin.loraplus_ratio, twin.weight_decay) == (7.0, 0.3)
    assert twin.get_config() == made.get_config()
    again = optimizers.deserialize(optimizers.serialize(made))
    assert type(again) is type(made) is loraplus_class(optimizers.AdamW)
    assert again.get_config() == made.get_config()


def test_a_saved_model_continues_like_the_original(tmp_path):
    if BACKEND == "torch":
        pytest.skip("the same on every backend")
    model = small()
    model.compile(loraplus_optimizer(model, optimizers.AdamW(0.01), RATIO), LOSS)
    model.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    assert type(loaded.optimizer) is type(model.optimizer)
    assert loaded.optimizer.loraplus_ratio == RATIO
    for one in (model, loaded):
        one.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(model.weights, loaded.weights):
        np.testing.assert_array_equal(array(a), array(b))


def test_it_has_the_variables_of_the_ordinary_optimizer():
    """So a checkpoint of either fits the other."""

    def variables(ratio):
        _, _, model = steps_of(optimizers.Adam(0.01), ratio)
        return [tuple(v.shape) for v in backend.optimizer_variables(model.optimizer)]

    assert variables(None) == variables(RATIO)


# -- several devices -------------------------------------------------------------------------

PROGRAM = """
import json, sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import tfimm_lora as lora
from tests.training.test_loraplus import LOSS, X, Y, keras, loraplus_optimizer, small
mirrored = sys.argv[1] == "mirrored"
devices = ["CPU:0", "CPU:1"]
strategy = tf.distribute.MirroredStrategy(devices) if mirrored else tf.distribute.get_strategy()
with strategy.scope():
    model = small()
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.2)
    model.compile(loraplus_optimizer(model, optimizer, 8), LOSS)
data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
losses = model.fit(data, epochs=4, verbose=0).history["loss"]
print(json.dumps([losses, [np.array(v).tolist() for v in model.trainable_weights]]))
"""


@pytest.mark.nightly
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_two_devices_train_as_one_does():
    def result(kind):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind],
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH="."),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    (one, weights), (two, mirrored) = result("one"), result("mirrored")
    np.testing.assert_allclose(two, one, rtol=1e-5)
    for a, b in zip(mirrored, weights):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# -- refusals -------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_and_change_nothing():
    model, plain = small(), tiny_models.functional()
    optimizer = optimizers.SGD(0.1)
    for ratio, kind in (
        (0, ValueError),
        (-1, ValueError),
        (np.inf, ValueError),
        ("2", TypeError),
    ):
        with pytest.raises(kind, match="ratio="):
            loraplus_optimizer(model, optimizer, ratio)
    with pytest.raises(ValueError, match="no LoRA layers"):
        loraplus_optimizer(plain, optimizer)
    with pytest.raises(TypeError, match="expected an optimizer of"):
        loraplus_optimizer(model, model)
    assert not isinstance(optimizer, LoRAPlus)
    if LEGACY:
        with pytest.raises(TypeError, match="one variable at a time"):
            loraplus_optimizer(model, optimizers.legacy.SGD(0.1))
    else:
        both = optimizers.MultiOptimizer(lambda variable: optimizer)
        with pytest.raises(TypeError, match="one variable at a time"):
            loraplus_optimizer(model, both)
    loraplus_optimizer(model, optimizer, 2)
    with pytest.raises(ValueError, match="LoRA. optimizer already, with the ratio 2"):
        loraplus_optimizer(model, optimizer)
    used = optimizers.Adam(0.1)
    apply(used, gradients(model.trainable_weights, 1)[0], model.trainable_weights)
    with pytest.raises(ValueError, match="used already"):
        loraplus_optimizer(model, used)
    with pytest.raises(ValueError, match="expected a factor kernel_lora_b"):
        apply(optimizer, gradients(plain.trainable_weights, 1)[0], plain.trainable_weights)
