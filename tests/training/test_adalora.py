"""Allocating rank while training, against NumPy, and adapters without what was pruned."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run, values
from tests.helpers.selection import NIGHTLY_ON_LEGACY
from tfimm_lora.adapters.compact import compact_adapter, live_components
from tfimm_lora.backend import backend_of
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.training.adalora import RankAllocator
from tfimm_lora.training.loraplus import loraplus_optimizer

pytestmark = NIGHTLY_ON_LEGACY

layers, optimizers = keras.layers, keras.optimizers
CLOSE = dict(rtol=1e-4, atol=1e-5)
quiet = pytest.mark.filterwarnings("ignore:The training ended at step:UserWarning")

X, Y = normal(64, 6), normal(64, 3, seed=2)


def two_layers(**arguments):
    """Two layers with LoRA; the same weights every time."""
    entry = keras.Input((6,))
    x = layers.Dense(8, activation="tanh", name="one")(entry)
    x = layers.Dense(8, activation="tanh", name="two")(x)
    model = keras.Model(entry, layers.Dense(3, name="out")(x))
    arguments = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": ["one", "two"], **arguments}
    lora.inject_lora(model, **arguments)
    for seed, variable in enumerate(model.weights):
        variable.assign(0.4 * normal(*variable.shape, seed=seed))
    return model


def fit(model, *callbacks, epochs=4, x=X, y=Y, **options):
    """Train for 8 steps an epoch, always in the same order."""
    options = {"batch_size": len(x) // 8, "epochs": epochs, "verbose": 0, **options}
    return model.fit(x, y, shuffle=False, callbacks=list(callbacks), **options)


def factors(model):
    return {
        f"{path}/{name}": array(getattr(layer, name)).astype("float64")
        for path, layer in lora_layers(model).items()
        for name in ("kernel_lora_a", "kernel_lora_b")
    }


class Recorder(keras.callbacks.Callback):
    """The factors before the training and after each step."""

    def on_train_begin(self, logs=None):
        self.seen = [factors(self.model)]

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(factors(self.model))


def expected_importance(seen, rate, beta1, beta2, axes):
    """By the formulas of the paper, with the gradients that steps of SGD show."""
    result = {}
    for key in seen[0]:
        mean = uncertainty = 0.0
        for before, after in itertools.pairwise(seen):
            sensitivity = np.abs(before[key] * (before[key] - after[key]) / rate)
            mean = beta1 * mean + (1 - beta1) * sensitivity
            uncertainty = beta2 * uncertainty + (1 - beta2) * np.abs(sensitivity - mean)
        path, _, name = key.rpartition("/")
        axis = seen[0][key].ndim - 1 if name == "kernel_lora_a" else axes.get(path, 0)
        score = np.moveaxis(mean * uncertainty, axis, -1)
        score = score.reshape(-1, score.shape[-1]).mean(axis=0)
        result[path] = result.get(path, 0) + score
    return result


def assert_importance(allocator, recorder, rate, axes=(), **betas):
    expected = expected_importance(
        recorder.seen, rate, betas.get("beta1", 0.85), betas.get("beta2", 0.85), dict(axes)
    )
    found = allocator.importance()
    assert set(found) == set(expected)
    for path, value in expected.items():
        assert found[path].shape == value.shape and value.max() > 0
        # The gradient is the difference of two float32 weights over the rate.
        np.testing.assert_allclose(found[path], value, rtol=2e-2, atol=2e-3 * value.max())


# -- importance -----------------------------------------------------------------------------


@quiet
@pytest.mark.backends
@pytest.mark.parametrize(
    "options",
    [{}, {"jit_compile": True}, {"run_eagerly": True}],
    ids=lambda o: next(iter(o), ""),
)
def test_importance_is_that_of_the_paper(options):
    if BACKEND == "torch" and options.get("jit_compile"):
        pytest.skip("torch compiles with a compiler that may not be there")
    model = two_layers()
    model.compile(optimizers.SGD(0.5), "mse", **options)
    allocator = RankAllocator(model, 2, warmup=20, end=40, beta1=0.7, beta2=0.6)
    recorder = Recorder()
    fit(model, recorder, allocator, epochs=2)
    assert allocator.step == 16 and set(allocator.ranks.values()) == {4}
    assert_importance(allocator, recorder, 0.5, beta1=0.7, beta2=0.6)


def one_kind(kind):
    """A model with one kind of LoRA layer, its input, and the axis of rank in B."""
    entry, axis = keras.Input((5, 6)), 0
    x = normal(16, 5, 6)
    if kind == "qkv":
        y = layers.Dense(12, name="qkv")(entry)
    elif kind == "conv":
        entry, x = keras.Input((5, 5, 3)), normal(16, 5, 5, 3)
        y = layers.Conv2D(6, 3, name="conv")(entry)
    elif kind == "grouped":
        entry, x = keras.Input((5, 5, 4)), normal(16, 5, 5, 4)
        y = layers.Conv2D(6, 3, groups=2, name="grouped")(entry)
    elif kind == "depthwise":
        entry, x = keras.Input((5, 5, 7)), normal(16, 5, 5, 7)
        y = layers.DepthwiseConv2D(3, name="depthwise")(entry)
    elif kind == "einsum":
        y = layers.EinsumDense("abc,cde->abde", (5, 2, 4), name="einsum")(entry)
    elif kind == "batched":
        y, axis = layers.EinsumDense("abc,bcd->abd", (5, 4), name="batched")(entry), 1
    else:
        entry = keras.Input((5,), dtype="int32")
        x = np.random.default_rng(0).integers(0, 9, (16, 5)).astype("int32")
        y = layers.Embedding(9, 6, name="embedding")(entry)
    model = keras.Model(entry, layers.Dense(2, name="head")(layers.Flatten()(y)))
    return model, x, axis


KINDS = ["qkv", "conv", "grouped", "depthwise", "einsum", "batched", "embedding"]


def adapt(kind, model, **arguments):
    parts = {"lora_qkv": "qv"} if kind == "qkv" else {}
    lora.inject_lora(
        model, lora_targets=[kind], lora_rank=3, lora_alpha=5, **parts, **arguments
    )
    randomise(model)
    return model


@quiet
@pytest.mark.backends
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_has_its_components(kind):
    if BACKEND == "torch" and kind == "grouped":
        pytest.skip("the same on every backend")
    model, x, axis = one_kind(kind)
    adapt(kind, model)
    model.compile(optimizers.SGD(0.05), "mse")
    recorder, allocator = Recorder(), RankAllocator(model, 1, end=100)
    fit(model, recorder, allocator, x=x, y=normal(16, 2, seed=3), epochs=1)
    assert allocator.ranks == {kind: 6 if kind == "qkv" else 3}
    assert_importance(allocator, recorder, 0.05, axes={kind: axis})


@quiet
def test_the_gradient_is_the_one_that_is_applied():
    """Clipped, unscaled from mixed precision, and at LoRA+'s rates."""
    model = two_layers()
    model.compile(optimizers.SGD(0.5, global_clipnorm=0.01), "mse")
    recorder, allocator = Recorder(), RankAllocator(model, 2, end=100, warmup=50)
    fit(model, recorder, allocator, epochs=1)
    assert_importance(allocator, recorder, 0.5)
    model = two_layers()
    model.compile(loraplus_optimizer(model, optimizers.SGD(0.5), 1.0), "mse")
    recorder, allocator = Recorder(), RankAllocator(model, 2, end=100, warmup=50)
    fit(model, recorder, allocator, epochs=1)
    assert_importance(allocator, recorder, 0.5)


@quiet
def test_loss_scaling_is_no_importance(policy):
    policy("mixed_float16")
    model = two_layers()
    model.compile(optimizers.SGD(0.5), "mse")
    allocator, recorder = RankAllocator(model, 2, end=100, warmup=50), Recorder()
    fit(model, recorder, allocator, epochs=1)
    assert hasattr(model.optimizer, "inner_optimizer")
    assert_importance(allocator, recorder, 0.5)


@quiet
def test_several_steps_in_one_call_are_counted():
    model = two_layers()
    model.compile("sgd", "mse", steps_per_execution=3)
    allocator = RankAllocator(model, 2, end=100)
    fit(model, allocator, epochs=2)
    assert allocator.step == 16


# -- the schedule -----------------------------------------------------------------------------


def test_budget_falls_by_the_cube():
    allocator = RankAllocator(two_layers(), 1.5, warmup=10, end=50)
    t = np.arange(60)
    share = np.clip(1 - (t - 10) / 40, 0, 1) ** 3
    exact = 3 + (8 - 3) * share
    found = np.array([allocator.budget(int(step)) for step in t])
    assert (found >= exact - 1e-6).all() and (found < exact + 1).all()
    assert (found[:11] == 8).all() and (found[50:] == 3).all() and (np.diff(found) <= 0).all()


@pytest.mark.backends
def test_the_budget_is_kept_and_the_least_important_go():
    model = two_layers()
    model.compile(optimizers.Adam(0.01), "mse")
    allocator = RankAllocator(model, 1, warmup=4, end=24, interval=4)
    found = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kept = sum(allocator.ranks.values())
            adapted = lora_layers(self.model).values()
            live = sum(live_components(x).sum() for x in adapted)
            found.append((allocator.step, kept, int(live)))

    fit(model, allocator, Look(), epochs=6)
    for step, kept, live in found:
        chosen = max((s for s in range(4, step + 1, 4) if s > 4), default=0)
        assert kept == allocator.budget(min(chosen, 24)), step
        if (step % 4 == 0 and step > 4) or step >= 24:
            assert live == kept
    assert found[-1][0] == 48 and allocator.finished
    assert sum(x.rank for x in compact_adapter(model).layers.values()) == 2


@pytest.mark.long
def test_what_is_pruned_may_come_back_before_the_end():
    """Two layers swap what is asked of them in the middle of the training."""
    entry = keras.Input((6,))
    parts = [layers.Dense(4, name=name)(entry) for name in ("one", "two")]
    model = keras.Model(entry, layers.Concatenate()(parts))
    lora.inject_lora(model, lora_targets=["one", "two"], lora_rank=2)
    base = run(model, X)
    wanted = base + X @ np.hstack([3 * normal(6, 4, seed=1), np.zeros((6, 4), "float32")])
    swapped = base + X @ np.hstack([np.zeros((6, 4), "float32"), 3 * normal(6, 4, seed=1)])
    model.compile(optimizers.Adam(0.03), "mse")
    allocator = RankAllocator(model, 1, end=400, interval=4)
    for target, most, until in ((wanted, "one", 200), (swapped, "two", 400)):
        while allocator.step < until:
            with pytest.warns() if allocator.step + 8 * 10 < 400 else not_quiet():
                fit(model, allocator, y=target, epochs=10)
        ranks = allocator.ranks
        assert ranks[most] == max(ranks.values()) and ranks["one"] != ranks["two"], ranks


def not_quiet():
    import contextlib

    return contextlib.nullcontext()


# -- where the rank goes ----------------------------------------------------------------------


def planted(rank=None):
    """Two branches, of which one should learn an update of full rank and one noise."""
    entry = keras.Input((8,))
    x = [layers.Dense(8, name=name)(entry) for name in ("idle", "busy")]
    model = keras.Model(entry, layers.Concatenate()(x))
    for seed, variable in enumerate(model.weights):
        variable.assign(0.3 * normal(*variable.shape, seed=seed))
    x, update = normal(256, 8, seed=5), np.zeros((8, 16), "float32")
    update[:, 8:] = normal(8, 4, seed=6) @ normal(4, 8, seed=7) / 3
    y = run(model, x) + x @ update + 0.05 * normal(256, 16, seed=8)
    lora.inject_lora(model, lora_targets=["idle", "busy"], lora_rank=rank)
    for seed, layer in enumerate(lora_layers(model).values()):
        layer.kernel_lora_a.assign(0.3 * normal(8, rank, seed=20 + seed))
    model.compile(optimizers.Adam(0.02), "mse")
    return model, x, y


def test_the_budget_goes_where_it_is_needed():
    model, x, y = planted(rank=4)
    allocator = RankAllocator(model, 2, warmup=20, end=160, interval=5)
    loss = fit(model, allocator, x=x, y=y, epochs=40).history["loss"]
    assert allocator.ranks == {"idle": 0, "busy": 4}
    plain, x, y = planted(rank=2)
    uniform = fit(plain, x=x, y=y, epochs=40).history["loss"]
    # As many components: the noise alone is left, and for rank 2 a good part of the update.
    assert loss[-1] < 0.01 < 5 * loss[-1] < uniform[-1]
    adapter = compact_adapter(model)
    assert list(adapter.layers) == ["busy"] and adapter.layers["busy"].rank == 4
    assert allocator.summary().splitlines()[1:3] == ["idle      0   4", "busy      4   4"]


@pytest.mark.backends
@pytest.mark.parametrize("arguments", [{}, {"lora_freeze_a": True}], ids=["", "freeze_a"])
def test_what_is_pruned_in_the_end_stays_zero_and_costs_nothing(arguments, tmp_path):
    model = two_layers(**arguments)
    model.compile(optimizers.Adam(0.05), "mse")
    allocator = RankAllocator(model, 1.5, end=16, interval=4)
    fit(model, allocator)
    ranks = allocator.ranks
    for path, layer in lora_layers(model).items():
        a, b = array(layer.kernel_lora_a), array(layer.kernel_lora_b)
        assert live_components(layer).sum() == ranks[path]
        assert (a[:, ~live_components(layer)] == 0).all()
        assert (b[~live_components(layer)] == 0).all()
    # Momentum is held off by the callback; a new optimizer has none, and there is no gradient.
    fit(model, allocator, epochs=2)
    model.compile(optimizers.Adam(0.05), "mse")
    fit(model, epochs=2)
    output, full = run(model, X), lora.adapter_of(model)
    adapter = compact_adapter(model)
    assert {path: x.rank for path, x in adapter.layers.items()} == {
        path: rank for path, rank in ranks.items() if rank
    }
    assert sum(ranks.values()) == 3 and adapter.size < full.size
    assert {x.scale for x in adapter.layers.values()} == {2.0}
    adapter.save(tmp_path)
    plain = two_layers(**arguments)
    lora.remove_lora(plain, merge=False)
    np.testing.assert_allclose(run(lora.load_adapter(plain, tmp_path), X), output, **CLOSE)
    found = {p: x.lora.rank for p, x in lora_layers(plain).items()}
    assert found == {path: rank for path, rank in ranks.items() if rank}


def test_momentum_moves_nothing_that_is_pruned():
    model = two_layers()
    model.compile(optimizers.SGD(0.1, momentum=0.95), "mse")
    allocator = RankAllocator(model, 1, end=4, interval=2)
    fit(model, allocator)
    live = sum(live_components(x).sum() for x in lora_layers(model).values())
    assert allocator.step == 32 and live == 2


# -- compaction -----------------------------------------------------------------------------


def prune(layer, dead, kind):
    """Zero components by hand: B of the first one, A of the others."""
    a, b = array(layer.kernel_lora_a).copy(), array(layer.kernel_lora_b).copy()
    for i, component in enumerate(dead):
        if i:
            a[..., component] = 0
        elif kind == "batched":
            b[:, component] = 0
        else:
            b[component] = 0
    layer.kernel_lora_a.assign(a)
    layer.kernel_lora_b.assign(b)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropping_what_is_zero_changes_no_output(kind, use_rslora, tmp_path):
    model, x, _ = one_kind(kind)
    start = values(model.weights)
    adapt(kind, model, lora_use_rslora=use_rslora)
    # Of the parts of qkv one keeps two components and one keeps one.
    prune(model.get_layer(kind), [0, 3, 4] if kind == "qkv" else [0, 2], kind)
    output, full = run(model, x), lora.adapter_of(model)
    adapter = compact_adapter(model)
    assert lora.adapter_of(model) == full
    update, before = adapter.layers[kind], full.layers[kind]
    assert update.rank == before.rank * (2 if kind == "qkv" else 1) // 3
    assert (update.scale, update.kind, update.qkv) == (before.scale, before.kind, before.qkv)
    np.testing.assert_allclose(update.delta(), before.delta(), atol=1e-12)
    adapter.save(tmp_path)
    assert lora.Adapter.load(tmp_path) == adapter
    if kind == "batched":
        return  # see the test below
    plain, _, _ = one_kind(kind)
    plain.set_weights(start)
    lora.load_adapter(plain, tmp_path)
    np.testing.assert_allclose(run(plain, x), output, **CLOSE)
    assert plain.get_layer(kind).lora.rank == (2 if kind == "qkv" else 1)
    assert plain.get_layer(kind).lora.qkv == ("qv" if kind == "qkv" else None)
    lora.load_adapter(model, adapter)  # into the model itself
    np.testing.assert_allclose(run(model, x), output, **CLOSE)


def test_an_adapter_of_a_batched_kernel_loads_into_the_plain_model():
    model, x, _ = one_kind("batched")
    start = values(model.weights)
    adapt("batched", model)
    plain, _, _ = one_kind("batched")
    plain.set_weights(start)
    lora.load_adapter(plain, lora.adapter_of(model))
    np.testing.assert_allclose(run(plain, x), run(model, x), **CLOSE)


def test_ranks_are_a_pattern_in_the_file(tmp_path):
    model = two_layers()
    prune(model.get_layer("two"), [0, 1, 2], "dense")
    prune(model.get_layer("one"), [3], "dense")
    compact_adapter(model, base_model="mine").save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {config["r"], *config["rank_pattern"].values()}
    assert ranks == {1, 3} and config["base_model_name_or_path"] == "mine"


def test_layers_without_components_are_left_out_unless_they_hold_a_bias():
    for bias, expected in (("none", {"one": 4}), ("lora_only", {"one": 4, "two": 1})):
        model = two_layers(lora_train_bias=bias)
        prune(model.get_layer("two"), range(4), "dense")
        output = run(model, X)
        adapter = compact_adapter(model)
        assert {path: x.rank for path, x in adapter.layers.items()} == expected
        lora.load_adapter(model, adapter)
        np.testing.assert_allclose(run(model, X), output, **CLOSE)
    fresh = lora.inject_lora(tiny_models.functional())
    with pytest.raises(ValueError, match="every component is zero"):
        compact_adapter(fresh)
    with pytest.raises(ValueError, match="no LoRA layers"):
        compact_adapter(tiny_models.functional())


@pytest.mark.parametrize(
    "arguments", [{"lora_use_dora": True}, {"lora_bias": True}, {"lora_init": "pissa"}]
)
def test_variants_keep_what_they_hold_beside_the_components(arguments):
    model = two_layers(**arguments)
    prune(model.get_layer("two"), range(4), "dense")
    prune(model.get_layer("one"), [1], "dense")
    output = run(model, X)
    plain = two_layers(**arguments)
    lora.load_adapter(model, compact_adapter(model))
    np.testing.assert_allclose(run(model, X), output, **CLOSE)
    if "lora_init" in arguments:
        with pytest.raises(ValueError, match="was initialized from its kernel"):
            RankAllocator(plain, 2, end=100)
    else:
        RankAllocator(plain, 2, end=100)


def test_a_merged_model_is_compacted_as_it_is():
    model = two_layers()
    prune(model.get_layer("two"), [1], "dense")
    before = compact_adapter(model)
    lora.merge_lora_weights(model)
    assert compact_adapter(model) == before and model.get_layer("two").merged


# -- resuming, and the optimizer afterwards --------------------------------------------------


@quiet
@pytest.mark.backends
@pytest.mark.parametrize("end", [12, 28])
def test_a_resumed_training_is_the_same(end, tmp_path):
    def make():
        model = two_layers()
        model.compile(optimizers.SGD(0.3), "mse")
        return model, RankAllocator(model, 1, end=end, interval=3)

    whole, allocator = make()
    fit(whole, allocator, epochs=4)
    half, first = make()
    fit(half, first, epochs=2)
    np.savez(tmp_path / "state.npz", **first.get_state())
    resumed, second = make()
    resumed.set_weights(half.get_weights())
    second.set_state(np.load(tmp_path / "state.npz"))
    assert second.step == 16 and second.ranks == first.ranks
    fit(resumed, second, epochs=2)
    assert second.ranks == allocator.ranks and second.step == 32
    for one, other in zip(whole.weights, resumed.weights):
        np.testing.assert_array_equal(array(one), array(other))
    for key, value in allocator.get_state().items():
        np.testing.assert_array_equal(second.get_state()[key], value)


@quiet
@pytest.mark.backends
def test_the_optimizer_is_as_it_was_after_the_training(tmp_path):
    model = two_layers()
    optimizer = optimizers.Adam(0.01)
    model.compile(optimizer, "mse")
    fit(model, epochs=1)
    own = set(optimizer.__dict__)
    backend = backend_of(model)
    variables = [id(v) for v in backend.optimizer_variables(optimizer)]
    fit(model, RankAllocator(model, 2, end=100), epochs=1)
    assert set(optimizer.__dict__) == own and type(optimizer).__name__ == "Adam"
    assert [id(v) for v in backend.optimizer_variables(optimizer)] == variables
    before = factors(model)
    fit(model, epochs=1)
    after = factors(model)
    assert all(np.abs(after[key] - before[key]).max() > 0 for key in before)


@quiet
@pytest.mark.skipif(not LEGACY, reason="of legacy Keras")
def test_an_optimizer_that_was_compiled_before_is_watched():
    model = two_layers()
    model.compile(optimizers.SGD(0.5), "mse")
    model.optimizer.jit_compile = True
    fit(model, epochs=1)
    recorder, allocator = Recorder(), RankAllocator(model, 2, end=100, warmup=50)
    fit(model, recorder, allocator, epochs=1)
    assert_importance(allocator, recorder, 0.5)


@quiet
def test_an_interrupted_training_removes_its_hooks():
    model = two_layers()
    model.compile("adam", "mse")

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    allocator = RankAllocator(model, 2, end=40)
    with pytest.raises(KeyboardInterrupt):
        fit(model, allocator, Stop())
    other = RankAllocator(model, 2, end=40)
    fit(model, other, epochs=1)
    assert (allocator.step, other.step) == (1, 8)
    assert "update_step" not in model.optimizer.__dict__


@quiet
def test_a_model_around_the_adapted_one_can_be_trained():
    inner = two_layers()
    entry = keras.Input((6,))
    model = keras.Model(entry, layers.Dense(3, name="last")(inner(entry)))
    model.compile("adam", "mse")
    allocator = RankAllocator(inner, 1, end=8, interval=2)
    fit(model, allocator, epochs=2)
    assert sum(allocator.ranks.values()) == 2


def test_the_table_names_the_parts():
    model = adapt("qkv", one_kind("qkv")[0])
    allocator = RankAllocator(model, 1, end=100)
    assert allocator.summary().splitlines() == [
        "layer  rank  of",
        "qkv       6   6  q 3, v 3",
        "total     6   6",
        "step 0, final at step 100",
    ]
    assert isinstance(allocator, keras.callbacks.Callback)


PROGRAM = """
import json, sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from tests.training.test_adalora import RankAllocator, X, Y, keras, two_layers
mirrored = sys.argv[1] == "mirrored"
devices = ["CPU:0", "CPU:1"]
strategy = tf.distribute.MirroredStrategy(devices) if mirrored else tf.distribute.get_strategy()
with strategy.scope():
    model = two_layers()
    model.compile(keras.optimizers.SGD(0.3), "mse")
    allocator = RankAllocator(model, 1, end=20, interval=4)
data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(8)
losses = model.fit(data, epochs=4, verbose=0, callbacks=[allocator]).history["loss"]
score = {k: v.tolist() for k, v in allocator.importance().items()}
print(json.dumps([losses, allocator.ranks, allocator.step, score]))
"""


@pytest.mark.nightly
@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_two_devices_allocate_as_one_does():
    def result(kind):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, kind],
            capture_output=True,
            text=True,
            env=dict(os.environ, PYTHONPATH="."),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    one, two = result("one"), result("mirrored")
    np.testing.assert_allclose(two[0], one[0], rtol=1e-5)
    assert two[1:3] == one[1:3] and one[2] == 32
    for path, score in one[3].items():
        np.testing.assert_allclose(two[3][path], score, rtol=1e-3, atol=1e-9)


# -- refusals -------------------------------------------------------------------------------


def test_wrong_arguments_are_refused():
    model = two_layers()
    for arguments, kind, words in (
        (dict(target_rank=4), ValueError, "target_rank=4.*mean rank is 4.*higher lora_rank"),
        (dict(target_rank=9), ValueError, "target_rank=9"),
        (dict(target_rank=0), ValueError, "target_rank=0"),
        (dict(target_rank=0.1), ValueError, "one component in the model"),
        (dict(target_rank="2"), TypeError, "target_rank='2'"),
        (dict(end=0), ValueError, "end=0.*at least 1"),
        (dict(end=10.5), TypeError, "end=10.5.*expected an integer"),
        (dict(warmup=-1), ValueError, "warmup=-1"),
        (dict(warmup=100), ValueError, "warmup=100 and end=100.*end after the warmup"),
        (dict(interval=0), ValueError, "interval=0"),
        (dict(interval=60, warmup=50), ValueError, "interval=60 with 50 steps"),
        (dict(beta1=1.0), ValueError, "beta1=1.0"),
        (dict(beta2=-0.1), ValueError, "beta2=-0.1"),
        (dict(beta2=True), TypeError, "beta2=True"),
    ):
        with pytest.raises(kind, match=words):
            RankAllocator(model, **{"target_rank": 2, "end": 100, **arguments})
    with pytest.raises(ValueError, match="no LoRA layers"):
        RankAllocator(tiny_models.functional(), 2, end=100)
    lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="'one' is merged.*unmerge_lora_weights"):
        RankAllocator(model, 2, end=100)


def test_models_that_cannot_be_trained_so_are_refused():
    model, other = two_layers(), two_layers()
    allocator = RankAllocator(model, 2, end=100)
    other.compile("sgd", "mse")
    with pytest.raises(ValueError, match="does not train layer 'one'"):
        fit(other, allocator)
    model.compile("sgd", "mse")
    lora.merge_lora_weights(model)
    with pytest.raises(ValueError, match="merged"):
        fit(model, allocator)
    lora.unmerge_lora_weights(model)
    with lora.disable_adapter(model), pytest.raises(ValueError, match="disabled"):
        fit(model, allocator)
    if LEGACY:
        model.compile(optimizers.legacy.SGD(0.1), "mse")
        with pytest.raises(TypeError, match="one variable at a time"):
            fit(model, allocator)
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="step 8, before end=100"):
        fit(model, allocator, epochs=1)


def test_a_state_of_other_layers_is_refused():
    allocator = RankAllocator(two_layers(), 2, end=100)
    narrow = RankAllocator(two_layers(lora_rank=3), 2, end=100)
    single = RankAllocator(two_layers(lora_targets=["one"]), 2, end=100)
    with pytest.raises(ValueError, match=r"one/kept of shape \(3,\), expected \(4,\)"):
        allocator.set_state(narrow.get_state())
    with pytest.raises(ValueError, match="missing two/kept"):
        allocator.set_state(single.get_state())
    with pytest.raises(ValueError, match="unexpected two/kept"):
        single.set_state(allocator.get_state())
