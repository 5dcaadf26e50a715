"""DoRA, the bias of the branch, and starts other than zero: every kind of layer, and models."""

import dataclasses

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import layer_contracts, tiny_models
from tests.helpers.kerases import (
    BACKEND,
    LEGACY,
    UNIT_ROUNDOFF,
    array,
    ids,
    keras,
    normal,
    run,
    sgd,
    values,
)
from tests.helpers.layer_cases import CASES
from tests.helpers.layer_contracts import CLOSE, model_around
from tfimm_lora.model.merge import lora_layers

VARIANTS = {
    "dora": dict(lora_use_dora=True),
    "bias": dict(lora_bias=True),
    "pissa": dict(lora_init="pissa"),
    "olora": dict(lora_init="olora"),
    "dora_pissa": dict(lora_use_dora=True, lora_init="pissa_niter_2"),
    "loha": dict(lora_use_loha=True),
}
#: The cases that LoHa refuses.
WITHOUT_LOHA = ("embedding", "einsum_axis_in_all")


def in_variant(case, variant):
    return dataclasses.replace(case, args={**case.args, **VARIANTS[variant]})


PAIRS = [
    pytest.param(in_variant(case, variant), id=f"{case.name}-{variant}")
    for case in CASES
    for variant in VARIANTS
    if not (variant == "bias" and (not case.has_bias or not case.drops))
    if not (variant == "loha" and case.name.startswith(WITHOUT_LOHA))
]
EVERY = pytest.mark.parametrize("case", PAIRS)

#: One of each kind of product, and the variants that add variables of their own; on legacy
#: Keras that which adds most.
KINDS = (
    *("dense_positions_tanh", "dense_parts_of_qkv", "conv2d_same_strided", "conv2d_grouped"),
    *("depthwise", "einsum_heads", "einsum_axis_in_all", "embedding"),
)
SOME = pytest.mark.parametrize(
    "case",
    [
        p
        for p in PAIRS
        if p.id.rpartition("-")[0] in KINDS and not p.id.endswith(("olora", "dora_pissa"))
        if not LEGACY or p.id.endswith(("dora", "loha"))
    ],
)


# -- layers ----------------------------------------------------------------------------------


@pytest.mark.backends
@EVERY
def test_output_is_that_of_the_reference_merged_or_not(case):
    layer_contracts.gives_reference_output(case)
    layer_contracts.merges_and_unmerges_without_loss(case)


@pytest.mark.backends
@EVERY
def test_layer_starts_as_its_base_and_is_restored_exactly(case):
    x, base = case.inputs(), case.make_base()
    original = run(base, x)
    lora.convert_to_lora_layer(base, lora_alpha=case.alpha, **case.lora_args)
    base.disable()
    # With one group per channel TensorFlow has another routine for it, equal up to rounding.
    before = run(base, x) if "one_group_per_channel" in case.name else original
    base.enable()
    np.testing.assert_allclose(before, original, **CLOSE)
    np.testing.assert_allclose(run(base, x), before, **CLOSE)
    for seed, variable in enumerate(base.trainable_weights):
        variable.assign(array(variable) + normal(*variable.shape, seed=seed))
    moved = run(base, x)
    assert np.abs(moved - before).max() > 1e-2
    base.disable()
    np.testing.assert_array_equal(run(base, x), before)
    base.enable()
    np.testing.assert_array_equal(run(base, x), moved)
    base.set_strength(0)
    np.testing.assert_array_equal(run(base, x), before)
    base.set_strength(1)
    np.testing.assert_array_equal(run(base, x), moved)
    base.merge_weights()
    base.disable()
    np.testing.assert_array_equal(run(base, x), before)
    base.enable()
    assert base.merged
    lora.remove_lora(model_around(case, base), merge=False)
    np.testing.assert_array_equal(run(base, x), original)


@pytest.mark.backends
@SOME
def test_one_step_of_sgd_is_the_true_gradient(case):
    """By A, B, magnitude and bias; the norm below the magnitude is held fast."""
    layer, x = case.make(), case.inputs()
    model = model_around(case, layer)
    target = np.random.default_rng(3).normal(size=run(layer, x).shape).astype("float32")
    start = {n: x.astype("float64") for n, x in layer.lora_values().items()}
    bare = {n: x for n, x in start.items() if n != "kernel_lora_magnitude"}

    class Held:
        """A layer of these values."""

        def __init__(self, found):
            self.bias, self.found = getattr(layer, "bias", None), found

        def lora_values(self):
            return self.found

    norm = case.norm(case.expected_kernel(Held(bare)))
    frozen = [v for v in layer.weights if id(v) not in ids(layer.trainable_weights)]
    kept = values(frozen)
    model.compile(keras.optimizers.SGD(1.0), "mse", run_eagerly=True)
    model.train_on_batch(x, target)

    def loss(name, place, delta):
        found = {**start, name: start[name].copy()}
        found[name][place] += delta
        return np.mean((case.expected(Held(found), x, norm=norm) - target) ** 2)

    rng = np.random.default_rng(5)
    names = {id(v): n for n, v in layer._lora_variables().items()}
    trained = {names[id(v)]: v for v in layer.trainable_weights}
    assert set(trained) == {n for n in names.values() if not n.endswith("0")}
    for name, variable in trained.items():
        step = start[name] - array(variable)
        for _ in range(4):
            place = tuple(rng.integers(0, size) for size in step.shape)
            slope = (loss(name, place, 1e-5) - loss(name, place, -1e-5)) / 2e-5
            np.testing.assert_allclose(step[place], slope, rtol=2e-3, atol=2e-5, err_msg=name)
    for variable, value in zip(frozen, kept):
        np.testing.assert_array_equal(array(variable), value)


@pytest.mark.backends
@SOME
def test_layer_survives_saving(case, tmp_path):
    layer, x = case.make(), case.inputs()
    model = model_around(case, layer)
    output, before = run(model, x), values(layer.weights)
    layer.merge_weights()
    model.save(str(tmp_path / "model.keras"))
    loaded = keras.models.load_model(str(tmp_path / "model.keras"))
    twin = loaded.get_layer("layer")
    assert twin.get_config() == layer.get_config() and not twin.merged
    for variable, value in zip(twin.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    np.testing.assert_allclose(run(loaded, x), output, **CLOSE)
    loaded.compile(sgd(), "mse", run_eagerly=True)
    loaded.train_on_batch(x, np.zeros_like(output))
    assert np.abs(array(twin.kernel_lora_b) - array(layer.kernel_lora_b)).max() > 0


@pytest.mark.long
@pytest.mark.backends
@pytest.mark.parametrize("kind", UNIT_ROUNDOFF)
@SOME
def test_layer_in_16_bits_is_near_the_reference(case, kind, policy):
    if LEGACY and "grouped" in case.name and kind == "mixed_bfloat16":
        pytest.skip("XLA on the CPU has no grouped bfloat16 convolution")
    policy(kind)
    case = dataclasses.replace(case, alpha=4 * case.alpha)
    layer, x = case.make(), case.inputs()
    # The magnitude of DoRA multiplies the errors of the terms that it scales down.
    roundings = 24 if layer.lora.use_dora else 8
    unit = UNIT_ROUNDOFF[kind]
    layer_contracts.is_near_the_reference_in_16_bits(case, layer, x, unit, roundings)


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles by other means, in minutes")
@pytest.mark.long
@pytest.mark.backends
@pytest.mark.parametrize(
    "case", [p for p in PAIRS if p.id.rpartition("-")[0] in KINDS and "dora_pissa" in p.id]
)
def test_layer_trains_the_same_when_compiled_by_xla(case):
    steps, start = [], None
    for jit in (False, True):
        layer, x = case.make(), case.inputs()
        start = start or values(layer.weights)
        for variable, value in zip(layer.weights, start):
            variable.assign(value)
        model = model_around(case, layer)
        target = np.random.default_rng(3).normal(size=run(layer, x).shape).astype("float32")
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        for _ in range(2):
            model.train_on_batch(x, target)
        steps.append(values(layer.trainable_weights))
    for plain, compiled in zip(*steps):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["dora", "bias"])
def test_dropout_is_on_the_branch_alone(variant):
    layer = lora.LoRADense(4, lora_rank=2, lora_dropout=0.5, **VARIANTS[variant])
    x = normal(3, 5)
    calm = run(layer, x)
    for variable in (layer.kernel_lora_a, layer.kernel_lora_b):
        variable.assign(normal(*variable.shape))
    draws = np.stack([run(layer, x, training=True) for _ in range(100)])
    still = run(layer, x)
    assert np.abs(draws[0] - draws[1]).max() > 1e-3 and np.abs(still - calm).max() > 1e-2
    error = draws.std(axis=0) / np.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - still) < 6 * error + 1e-3).all()


def test_a_small_change_of_a_magnitude_survives_in_16_bits(policy):
    """1.01 is 1.0078 in bfloat16; many outputs, each rounded, show its true value."""
    policy("mixed_bfloat16")
    layer = lora.LoRADense(8, lora_rank=1, use_bias=False, lora_use_dora=True)
    x = normal(512, 16)
    before = run(layer, x).astype("float64")
    norms = np.linalg.norm(array(layer.kernel).astype("float64"), axis=0)
    layer.kernel_lora_magnitude.assign((1e-2 * norms).astype("float32"))
    after = run(layer, x).astype("float64")
    gain = (after * before).sum(axis=0) / (before**2).sum(axis=0) - 1
    np.testing.assert_allclose(gain, 1e-2, rtol=0.1)


def test_an_output_without_weights_stays_alive_and_finite():
    """PEFT divides zero by zero there."""
    base = keras.layers.Dense(3, name="layer")
    x = normal(4, 5)
    run(base, x)
    kernel = array(base.kernel).copy()
    kernel[:, 1] = 0
    base.kernel.assign(kernel)
    before = run(base, x)
    lora.convert_to_lora_layer(base, lora_rank=2, lora_use_dora=True)
    np.testing.assert_allclose(run(base, x), before, **CLOSE)
    model = keras.Sequential([keras.Input((5,)), base])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    for _ in range(20):
        model.train_on_batch(x, np.ones((4, 3), "float32"))
    assert np.isfinite(run(base, x)).all()
    assert np.abs(run(base, x)[:, 1] - before[:, 1]).max() > 0


def test_a_subclass_with_a_call_of_its_own_has_all_but_the_bias():
    class Standardised(keras.layers.Conv2D):
        def call(self, inputs):
            plain = self.kernel
            centred = plain - keras_mean(plain)
            return self.activation(self.convolution_op(inputs, centred) + self.bias)

    layer = Standardised(4, 3, name="layer")
    x = normal(2, 6, 6, 3)
    before = run(layer, x)
    with pytest.raises(ValueError, match="lora_bias"):
        lora.convert_to_lora_layer(layer, lora_bias=True)
    assert type(layer) is Standardised and len(layer.weights) == 2
    lora.convert_to_lora_layer(layer, lora_use_dora=True, lora_init="pissa", lora_rank=2)
    np.testing.assert_allclose(run(layer, x), before, **CLOSE)
    for variable in layer._lora_variables().values():
        variable.assign(array(variable) + 0.3 * normal(*variable.shape))
    y = run(layer, x)
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, x), y, **CLOSE)


def keras_mean(kernel):
    if hasattr(keras, "ops"):
        return keras.ops.mean(kernel, axis=(0, 1, 2), keepdims=True)
    import tensorflow as tf

    return tf.reduce_mean(kernel, axis=(0, 1, 2), keepdims=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variable_has_axes_of_a_mesh(variant):
    """Without them a variable is on all devices as a whole."""
    layer = keras.layers.Dense(5, name="layer")
    run(layer, normal(2, 4))
    lora.convert_to_lora_layer(layer, lora_rank=2, **VARIANTS[variant])
    axes = layer._variable_axes(("rows", "columns"))
    shapes = {name: tuple(v.shape) for name, v in layer._lora_variables().items()}
    sizes = {"rows": 4, "columns": 5, None: 2}
    for name, shape in shapes.items():
        if name != "kernel_lora_shift":  # it has those of the bias
            assert tuple(sizes[axis] for axis in axes[name]) == shape, name


def test_wrong_variants_are_refused():
    for arguments, words in (
        (dict(lora_use_dora=True, lora_bias=True), "expected at most one of them"),
        (dict(lora_init="pisa"), "pissa"),
        (dict(lora_init="pissa", lora_initializer="zeros"), "both say how A is initialized"),
        (dict(lora_init="orthogonal", lora_rank=3), "even rank"),
    ):
        with pytest.raises(ValueError, match=words):
            layer = lora.LoRADense(5, **{"lora_rank": 2, **arguments})
            run(layer, normal(2, 4))
        layer = keras.layers.Dense(5)
        y = run(layer, normal(2, 4))
        with pytest.raises(ValueError, match=words):
            lora.convert_to_lora_layer(layer, **{"lora_rank": 2, **arguments})
        assert type(layer) is keras.layers.Dense and len(layer.weights) == 2
        np.testing.assert_array_equal(run(layer, normal(2, 4)), y)
    with pytest.raises(TypeError, match="lora_use_dora"):
        lora.LoRAConfig(lora_use_dora="yes")
    with pytest.raises(ValueError, match="Layer .*singular vectors"):
        lora.convert_to_lora_layer(layer, lora_rank=5, lora_init="pissa")


# -- models ----------------------------------------------------------------------------------

SPEC = tiny_models.GENERIC[0]


def tuned(variant, seed=1):
    """A model with LoRA whose every LoRA variable was moved; and its inputs."""
    keras.utils.set_random_seed(5)
    model = network()
    arguments = dict(lora_rank=2, lora_alpha=3, lora_targets=["conv", "fc1", "fc2"])
    lora.inject_lora(model, **arguments, **VARIANTS[variant])
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        for name, variable in getattr(layer, "_lora_variables", dict)().items():
            if not name.endswith("0"):
                noise = rng.normal(size=tuple(variable.shape)).astype("float32")
                variable.assign(array(variable) + 0.2 * noise)
    return model


def network():
    layers = keras.layers
    keras.utils.set_random_seed(5)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, strides=2, activation="relu", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(10, activation="tanh", name="fc1"),
            layers.Dense(9, activation="tanh", name="fc2"),
            layers.Dense(4, name="head"),
        ]
    )


X = normal(3, 8, 8, 3, seed=9)
EACH = pytest.mark.parametrize("variant", list(VARIANTS))


@EACH
def test_adapter_of_a_variant_round_trips(variant, tmp_path):
    model = tuned(variant)
    expected = run(model, X)
    lora.save_adapter(model, tmp_path)
    adapter = lora.Adapter.load(tmp_path)
    assert adapter == lora.adapter_of(model)
    moved = "pissa" in variant or variant == "olora"
    assert {x.rank for x in adapter.layers.values()} == {4 if moved else 2}
    fresh = lora.load_adapter(network(), tmp_path)
    np.testing.assert_allclose(run(fresh, X), expected, **CLOSE)
    # Into the same kind of model by assignment alone, bit for bit but for rounding of m.
    again = tuned(variant, seed=2)
    kinds = [type(layer) for layer in again.layers]
    variables = ids(again.weights)
    lora.load_adapter(again, adapter)
    assert ids(again.weights) == variables and [type(x) for x in again.layers] == kinds
    np.testing.assert_allclose(run(again, X), expected, **CLOSE)
    # And into one of another kind, which gets what the adapter needs.
    other = tuned("olora" if variant == "dora" else "dora")
    lora.load_adapter(other, adapter)
    np.testing.assert_allclose(run(other, X), expected, **CLOSE)


@EACH
def test_merged_and_converted_models_compute_the_same(variant, tmp_path):
    model = tuned(variant)
    expected = run(model, X)
    regular = lora.convert_to_regular_model(model)
    np.testing.assert_allclose(run(regular, X), expected, **CLOSE)
    assert not any("lora" in v.name for v in regular.weights)
    before = values(model.weights)
    lora.merge_lora_weights(model)
    np.testing.assert_allclose(run(model, X), expected, **CLOSE)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(run(lora_file(tmp_path / "model.keras"), X), expected, **CLOSE)
    lora.unmerge_lora_weights(model)
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    with lora.disable_adapter(model):
        np.testing.assert_array_equal(run(model, X), run(network(), X))
    np.testing.assert_array_equal(run(model, X), expected)
    lora.remove_lora(model, merge=False)
    for variable, value in zip(model.weights, network().weights):
        np.testing.assert_array_equal(array(variable), array(value))


def lora_file(path):
    return keras.models.load_model(str(path))


@EACH
def test_converted_copy_starts_from_the_weights_of_its_model(variant):
    model = network()
    for variable in model.weights:
        variable.assign(array(variable) * 1.5)
    copy = lora.convert_to_lora_model(model, lora_rank=2, **VARIANTS[variant])
    np.testing.assert_allclose(run(copy, X), run(model, X), **CLOSE)
    layer = copy.get_layer("fc1")
    if variant == "pissa":
        u, s, vt = np.linalg.svd(array(model.get_layer("fc1").kernel), full_matrices=False)
        start = array(layer.kernel_lora_a) @ array(layer.kernel_lora_b)
        np.testing.assert_allclose(start, (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)


@pytest.mark.skipif(not LEGACY, reason="of tfimm models")
@pytest.mark.parametrize("variant", ["pissa", "dora"])
def test_tfimm_models_start_from_their_own_kernels(variant, tmp_path):
    """The LoRA class builds its layers before they have the weights of the model."""
    from tests.helpers.tiny_architectures import ARCHITECTURES

    for name in ("vit", "convnext"):
        tiny = ARCHITECTURES[name]
        model, x = tiny.make(), normal(2, *tiny.size, 3)
        options = dict(lora_rank=2, lora_train_classifier=False, **VARIANTS[variant])
        copy = lora.convert_to_lora_model(model, **options)
        np.testing.assert_allclose(run(copy, x), run(model, x), rtol=1e-4, atol=1e-4)
        for path, layer in lora_layers(copy).items():
            if variant != "pissa":
                continue
            kernel = layer.lora_values()["kernel"]
            kernel = kernel.reshape(-1, kernel.shape[-1]).astype("float64")
            u, s, vt = np.linalg.svd(kernel, full_matrices=False)
            a, b = (layer.lora_values()[n] for n in lora.LORA_WEIGHT_NAMES)
            start = a.reshape(-1, 2).astype("float64") @ b
            best = (u[:, :2] * s[:2]) @ vt[:2]
            np.testing.assert_allclose(start, best, atol=1e-4 * s[0], err_msg=path)
        for seed, variable in enumerate(lora.lora_trainable_weights(copy)):
            variable.assign(array(variable) + 0.1 * normal(*variable.shape, seed=seed))
        expected = run(copy, x)
        lora.save_adapter(copy, tmp_path / name)
        fresh = lora.load_adapter(model, tmp_path / name)
        np.testing.assert_allclose(run(fresh, x), expected, rtol=1e-3, atol=1e-3)


def test_magnitudes_of_combined_adapters_are_averaged():
    one, two = (lora.adapter_of(tuned("dora", seed)) for seed in (1, 2))
    both = lora.combine_adapters([one, two], [0.25, 0.75])
    for path, update in both.layers.items():
        a, b = one.layers[path], two.layers[path]
        np.testing.assert_allclose(
            update.delta(), 0.25 * a.delta() + 0.75 * b.delta(), atol=1e-6
        )
        np.testing.assert_allclose(
            update.magnitude, 0.25 * a.magnitude + 0.75 * b.magnitude, rtol=1e-6
        )
    model = lora.load_adapter(network(), both)
    assert model.get_layer("fc1").lora.use_dora
    with pytest.raises(ValueError, match="only some have a magnitude .DoRA."):
        lora.combine_adapters([one, lora.adapter_of(tuned("pissa"))], [0.5, 0.5])
    with pytest.raises(ValueError, match="with the sum 0"):
        lora.combine_adapters([one, two], [1.0, -1.0])
    with pytest.raises(ValueError, match="magnitudes .DoRA. in .*fc1.*model=the base model"):
        lora.combination_errors(both, [one, two], [0.25, 0.75])
    assert one.layers["fc1"].size == sum(x.size for x in one.layers["fc1"].arrays().values())


def test_biases_of_branches_are_summed():
    one, two = (lora.adapter_of(tuned("bias", seed)) for seed in (1, 2))
    for method in ("cat", "svd"):
        both = lora.combine_adapters([one, two], [0.5, -2.0], method)
        for path, update in both.layers.items():
            a, b = one.layers[path], two.layers[path]
            expected = 0.5 * a.scale * a.bias - 2.0 * b.scale * b.bias
            np.testing.assert_allclose(update.scale * update.bias, expected, rtol=1e-5)


def test_an_adapter_of_which_only_some_layers_have_a_magnitude_is_refused():
    layers = dict(lora.adapter_of(tuned("dora")).layers)
    layers["fc1"] = dataclasses.replace(layers["fc1"], magnitude=None)
    with pytest.raises(ValueError, match="expected all or none"):
        lora.Adapter(layers)
    with pytest.raises(ValueError, match="for each output"):
        dataclasses.replace(layers["fc2"], magnitude=np.ones(3))


def test_plan_and_lists_count_what_variants_add():
    model = tuned("dora")
    names = [v.name for v in lora.lora_trainable_weights(model)]
    assert len(names) == 9 and sum("magnitude" in name for name in names) == 3
    assert len(lora.lora_trainable_weights(tuned("pissa"))) == 6
    assert lora.plan(model).factors == sum(
        int(np.prod(v.shape)) for v in lora.lora_trainable_weights(model)
    )
