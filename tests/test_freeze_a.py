"""LoRA-FA: A stays as it was drawn, B alone is trained, and by the same gradient."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests import contracts, tiny_models
from tests.kerases import BACKEND, LEGACY, array, ids, keras, normal, randomise, run, values
from tests.layer_cases import CASES
from tfimm_lora import _keras
from tfimm_lora.optimizers import loraplus_optimizer
from tfimm_lora.planning import plan
from tfimm_lora.target_table import explain_targets

layers = keras.layers
#: One of each kind of layer.
KINDS = [
    case
    for case in CASES
    if case.name
    in (
        *("dense_rows", "dense_positions_tanh", "dense_parts_of_qkv", "conv2d_same_strided"),
        *("depthwise", "einsum_heads", "embedding"),
    )
]

variable_name = _keras.default().variable_name


def step_of(case, **more):
    """What one step of SGD at rate one makes of A, B and the output."""
    keras.utils.set_random_seed(0)
    layer, x = case.make(**more), case.inputs()
    kind = dict(dtype="int32") if case.integers else {}
    entry = keras.Input(case.input_shape[1:], **kind)
    model = keras.Model(entry, layer(entry))
    target = normal(*run(layer, x).shape, seed=3)
    model.compile(keras.optimizers.SGD(1.0), "mse")
    before = array(layer.kernel_lora_a).copy()
    model.train_on_batch(x, target)
    return before, array(layer.kernel_lora_a), array(layer.kernel_lora_b), layer


@pytest.mark.backends
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_b_takes_the_step_that_it_takes_beside_a_trained_a(case):
    before, moved, expected, _ = step_of(case)
    _, a, b, layer = step_of(case, lora_freeze_a=True)
    assert np.abs(moved - before).max() > 0
    np.testing.assert_array_equal(a, before)
    np.testing.assert_allclose(b, expected, **contracts.CLOSE)
    assert [variable_name(v) for v in layer.trainable_weights] == ["kernel_lora_b"]
    config = layer.get_config()
    assert config["lora_freeze_a"] is True
    twin = type(layer).from_config(config)
    assert twin.lora == layer.lora or twin.lora.freeze_a


def chain(convolutions, **arguments):
    """Two adapted layers, one upon the other, so that a gradient goes through the second."""
    if convolutions:
        x = entry = keras.Input((6, 6, 3))
        x = layers.Conv2D(5, 3, strides=2, padding="same", activation="tanh", name="one")(x)
        x = layers.Conv2D(4, 2, padding="valid", name="two")(x)
    else:
        x = entry = keras.Input((7, 3))
        x = layers.Dense(5, activation="tanh", name="one")(x)
        x = layers.Dense(6, name="qkv")(x)  # in the place of a classifier
    model = keras.Model(entry, x)
    qkv = {} if convolutions else {"lora_qkv": "qv"}
    targets = [layer.name for layer in model.layers[1:]]
    lora.inject_lora(model, lora_rank=2, lora_targets=targets, **qkv, **arguments)
    for seed, variable in enumerate(model.weights):
        variable.assign(0.4 * normal(*variable.shape, seed=seed))
    return model


@pytest.mark.backends
@pytest.mark.parametrize("convolutions", [False, True])
def test_gradients_below_are_those_of_the_ordinary_layer(convolutions):
    steps = []
    for frozen in (False, True):
        model = chain(convolutions, lora_freeze_a=frozen, lora_train_bias="lora_only")
        x = normal(4, *model.input_shape[1:], seed=8)
        model.compile(keras.optimizers.SGD(1.0), "mse")
        before = {id(v): array(v).copy() for v in model.weights}
        model.train_on_batch(x, normal(*run(model, x).shape, seed=9))
        moved = [array(v) - before[id(v)] for v in model.weights]
        steps.append(dict(enumerate(moved)))
        names = [variable_name(v) for v in model.weights]
    for i, name in enumerate(names):
        plain, fa = steps[0][i], steps[1][i]
        if name == "kernel_lora_a":
            assert np.abs(plain).max() > 0
            np.testing.assert_array_equal(fa, 0)
        elif name == "kernel":
            np.testing.assert_array_equal(fa, 0)
        else:
            assert np.abs(fa).max() > 0
            np.testing.assert_allclose(fa, plain, **contracts.CLOSE)


@pytest.mark.parametrize(
    "spec",
    [x for x in tiny_models.MODELS if x.name in ("functional", "subclassed", "vit")],
    ids=lambda spec: spec.name,
)
def test_in_a_model_everything_agrees_on_what_is_trained(spec):
    model = lora.inject_lora(spec.make(), lora_rank=2, lora_freeze_a=True)
    trained = ids(model.trainable_weights)
    adapted = lora.merge.lora_layers(model)
    assert trained == ids([x.kernel_lora_b for x in adapted.values()])
    assert ids(lora.lora_trainable_weights(model)) == trained
    assert ids([x.kernel_lora_a for x in adapted.values()]) <= ids(
        lora.lora_non_trainable_weights(model)
    )
    found = plan(model)
    assert found.trainable == sum(int(np.prod(v.shape)) for v in model.trainable_weights)
    assert found.trainable < found.factors
    frozen = {id(v): array(v).copy() for v in model.non_trainable_weights}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loraplus_optimizer(model, "adam", 4), loss)
    x, y = spec.inputs(), spec.labels()
    first, *_, last = model.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert last < first
    for variable in model.non_trainable_weights:
        np.testing.assert_array_equal(array(variable), frozen[id(variable)])
    trainable = model.trainable
    model.trainable = False
    model.trainable = trainable
    assert ids(model.trainable_weights) == trained
    before = run(model, x)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, x), before, rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match="ompile it again"):
        lora.remove_lora(model, merge=False)
    assert len(model.trainable_weights) == len(spec.make().trainable_weights)


def test_adapters_and_weight_files_hold_a_frozen_a(tmp_path):
    spec = tiny_models.GENERIC[0]
    model = lora.inject_lora(spec.make(), lora_rank=2, lora_freeze_a=True)
    randomise(model)
    adapter = lora.adapter_of(model)
    other = lora.load_adapter(spec.make(), adapter)
    assert lora.adapter_of(other) == adapter
    model.save_weights(str(tmp_path / "model.weights.h5"))
    twin = lora.inject_lora(spec.make(), lora_rank=2, lora_freeze_a=True)
    twin.load_weights(str(tmp_path / "model.weights.h5"))
    for a, b in zip(values(model.weights), values(twin.weights)):
        np.testing.assert_array_equal(a, b)
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    assert len(loaded.trainable_weights) == len(model.trainable_weights)
    # Files that go by names: trained on with A, too.
    open_again = lora.inject_lora(spec.make(), lora_rank=2)
    open_again.load_weights(str(tmp_path / "model.weights.h5"))
    assert lora.adapter_of(open_again) == adapter


def test_it_is_named_where_it_cannot_be_or_is_wrong():
    with pytest.raises(TypeError, match="lora_freeze_a=1"):
        lora.LoRAConfig(lora_freeze_a=1)
    with pytest.raises(ValueError, match="lora_freeze_a=True .*create_lorafa_optimizer"):
        lora.LoRAConfig(lora_targets=["a"], lora_freeze_a=True).to_peft()
    table = explain_targets(tiny_models.functional(), lora_freeze_a=True)
    assert len(table.adapted) == 4


@pytest.mark.skipif(not LEGACY, reason="of tfimm")
def test_registered_architectures_keep_it_in_their_config():
    model = lora.convert_to_lora_model(tiny_models._vit(), lora_freeze_a=True)
    twin = type(model).from_config(model.get_config())
    for one in (model, twin):
        assert {variable_name(v) for v in one.trainable_weights} == {"kernel_lora_b"}


@pytest.mark.backends
@pytest.mark.skipif(BACKEND != "jax", reason="jax tells what a compiled function needs")
def test_the_inputs_of_adapted_layers_are_let_go_of():
    import jax

    def bytes_of(**arguments):
        x = entry = keras.Input((64, 32))
        for _ in range(4):
            y = layers.LayerNormalization()(x)
            y = layers.Activation("relu")(layers.Dense(128)(y))
            x = layers.Add()([x, layers.Dense(32)(y)])
        model = keras.Model(entry, x)
        lora.inject_lora(model, lora_rank=2, lora_targets="all", **arguments)

        def loss(trained, frozen, x):
            return (model.stateless_call(trained, frozen, x, training=True)[0] ** 2).mean()

        variables = (model.trainable_variables, model.non_trainable_variables)
        values = [[v.value for v in group] for group in variables]
        compiled = jax.jit(jax.grad(loss)).lower(*values, np.zeros((16, 64, 32), "float32"))
        return compiled.compile().memory_analysis().temp_size_in_bytes

    assert bytes_of(lora_freeze_a=True) < 0.8 * bytes_of()
