"""Every LoRA layer keeps every promise of the contract."""

from dataclasses import replace

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import layer_contracts
from tests.helpers.kerases import BACKEND, LEGACY, UNIT_ROUNDOFF, array, keras, normal, run
from tests.helpers.layer_cases import CASES, IDS
from tests.helpers.selection import nightly_except

pytestmark = pytest.mark.backends

#: Compiling is slow. XLA treats the other cases alike.
UNDER_XLA = {
    "dense_rows",
    "dense_parts_of_qkv",
    "conv2d_same_strided",
    "depthwise",
    "einsum_heads",
}


@pytest.mark.parametrize("promise", layer_contracts.LAYER_PROMISES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_layer(case, promise):
    promise(case)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_layer_survives_saving(case, tmp_path):
    layer_contracts.survives_saving(case, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("kind", UNIT_ROUNDOFF)
def test_layer_in_16_bits_is_near_the_reference(case, kind, policy):
    if LEGACY and "grouped" in case.name and kind == "mixed_bfloat16":
        pytest.skip("XLA on the CPU has no grouped bfloat16 convolution")
    policy(kind)
    case = replace(case, alpha=4 * case.alpha)
    layer, x = case.make(), case.inputs()
    assert "float32" in str(layer.kernel_lora_a.dtype)
    layer_contracts.is_near_the_reference_in_16_bits(case, layer, x, UNIT_ROUNDOFF[kind])


@pytest.mark.skipif(BACKEND == "torch", reason="torch compiles by other means, in minutes")
@pytest.mark.parametrize("case", nightly_except(CASES, UNDER_XLA))
def test_layer_trains_the_same_when_compiled_by_xla(case):
    steps, start = [], None
    for jit in (False, True):
        layer, x = case.make(), case.inputs()
        start = start or [array(v).copy() for v in layer.weights]
        for variable, value in zip(layer.weights, start):
            variable.assign(value)
        model = layer_contracts.model_around(case, layer)
        target = np.random.default_rng(3).normal(size=run(layer, x).shape).astype("float32")
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
        for _ in range(2):
            model.train_on_batch(x, target)
        steps.append([array(v) for v in layer.trainable_weights])
    for plain, compiled in zip(*steps):
        np.testing.assert_allclose(compiled, plain, rtol=1e-4, atol=1e-5)


def test_a_small_update_survives_in_16_bits(policy):
    """An update below the rounding of the kernel still reaches the output."""
    policy("mixed_bfloat16")
    layer = lora.LoRADense(4, lora_rank=1, use_bias=False)
    x = np.ones((2, 3, 8), "float32")
    run(layer, x)
    layer._kernel_variable.assign(np.ones((8, 4), "float32"))
    layer.kernel_lora_b.assign(np.ones((1, 4), "float32"))
    # bfloat16 has no number between 1 and 1.0078, so W + A B rounds to W. Inputs that
    # cancel in the sum over W and not over A leave the update alone in the output.
    layer.kernel_lora_a.assign(np.array([[1e-3], [0]] * 4, "float32"))
    x = x * np.array([1, -1] * 4, "float32")
    np.testing.assert_allclose(run(layer, x).astype("float64"), 4e-3, rtol=1e-2)
    layer.merge_weights()
    if "float32" in str(layer._kernel_variable.dtype):
        np.testing.assert_array_equal(run(layer, x).astype("float64"), 0)  # drowned


def test_pure_bfloat16_layer_keeps_its_factors_in_float32():
    layer = lora.LoRADense(4, lora_rank=2, dtype="bfloat16")
    y = run(layer, normal(3, 5))
    assert "bfloat16" in str(y.dtype) and "float32" in str(layer.kernel_lora_b.dtype)
    layer.kernel_lora_b.assign(normal(2, 4))
    before = array(layer._kernel_variable).astype("float32").copy()
    layer.merge_weights()
    assert np.abs(array(layer._kernel_variable).astype("float32") - before).max() > 0
    layer.unmerge_weights()
    np.testing.assert_array_equal(array(layer._kernel_variable).astype("float32"), before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_hundred_merges_leave_identical_kernels(dtype):
    """PEFT's bfloat16 weights drift (a third of them after 100 cycles)."""
    layer = lora.LoRADense(16, lora_rank=2, dtype=dtype)
    run(layer, normal(2, 16))
    layer.kernel_lora_b.assign(normal(2, 16))
    before = array(layer._kernel_variable).copy()
    for _ in range(100):
        layer.merge_weights()
        layer.unmerge_weights()
    assert array(layer._kernel_variable).tobytes() == before.tobytes()


@pytest.mark.parametrize(
    "arguments, kind, words",
    [
        (dict(lora_rank=0), ValueError, "lora_rank=0"),
        (dict(lora_rank=-2), ValueError, "positive integer"),
        (dict(lora_rank=2.5), TypeError, "lora_rank=2.5"),
        (dict(lora_rank=True), TypeError, "lora_rank=True"),
        (dict(lora_alpha="x"), TypeError, "lora_alpha='x'"),
        (dict(lora_alpha=float("nan")), ValueError, "finite"),
        (dict(lora_dropout=1.0), ValueError, r"\[0, 1\)"),
        (dict(lora_dropout="a"), TypeError, "lora_dropout"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_the_layer(arguments, kind, words):
    with pytest.raises(kind, match=words):
        lora.LoRADense(4, **arguments)
    layer = keras.layers.Dense(4)
    run(layer, normal(2, 3))
    with pytest.raises(kind, match=words):
        lora.convert_to_lora_layer(layer, **arguments)
    assert type(layer) is keras.layers.Dense and len(layer.weights) == 2
    assert len(layer.trainable_weights) == 2


def test_unknown_argument_names_the_nearest():
    with pytest.raises(TypeError, match="lora_rnk; did you mean lora_rank"):
        lora.convert_to_lora_layer(keras.layers.Dense(4), lora_rnk=3)


def test_second_conversion_is_refused():
    layer = lora.LoRADense(4)
    with pytest.raises(ValueError, match="already adapted"):
        lora.convert_to_lora_layer(layer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.layers.LayerNormalization(),
        lambda: keras.layers.Conv2DTranspose(3, 2),
        lambda: keras.layers.SeparableConv2D(3, 2),
    ],
)
def test_unsupported_types_are_refused_by_name(make):
    layer = make()
    with pytest.raises(TypeError, match=f"{type(layer).__name__}.*no LoRA version"):
        lora.convert_to_lora_layer(layer)


def test_object_of_no_keras_is_refused():
    with pytest.raises(TypeError, match="expected a Keras"):
        lora.convert_to_lora_layer(object())


def test_merging_twice_or_too_early_is_an_error():
    layer = lora.LoRADense(4)
    with pytest.raises(ValueError, match="not built"):
        layer.merge_weights()
    run(layer, normal(2, 3))
    with pytest.raises(ValueError, match="is not merged"):
        layer.unmerge_weights()
    layer.merge_weights()
    with pytest.raises(ValueError, match="already merged"):
        layer.merge_weights()


def test_dropout_on_a_grouped_convolution_is_refused():
    with pytest.raises(ValueError, match="grouped convolution"):
        lora.LoRAConv2D(6, 3, groups=3, lora_dropout=0.5)


def test_default_initializer_is_uniform_by_fan_in():
    layer = lora.LoRADense(8, lora_rank=64)
    run(layer, normal(2, 400))
    a = array(layer.kernel_lora_a)
    assert np.abs(a).max() <= 1 / np.sqrt(400) + 1e-7
    np.testing.assert_allclose(a.std(), 1 / np.sqrt(3 * 400), rtol=0.05)


def test_initializer_and_regularizer_are_used():
    layer = lora.LoRADense(
        3, lora_rank=2, lora_initializer="ones", lora_regularizer=keras.regularizers.L2(0.5)
    )
    run(layer, normal(2, 5))
    np.testing.assert_array_equal(array(layer.kernel_lora_a), 1)
    np.testing.assert_allclose(sum(float(array(v)) for v in layer.losses), 0.5 * 10)


def test_layer_called_twice_in_one_graph_sums_both_gradients():
    """The second use of a layer must not see the first one's state."""
    entry = keras.Input((3, 4))
    layer = lora.LoRADense(4, lora_rank=2, use_bias=False)
    model = keras.Model(entry, layer(layer(entry)))
    layer.kernel_lora_b.assign(normal(2, 4))
    x = normal(2, 3, 4)
    values = layer.lora_values()
    full = values["kernel"] + values["kernel_lora_a"] @ values["kernel_lora_b"]
    np.testing.assert_allclose(run(model, x), x @ full @ full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lora_rank", "rank", "lora_new"])
def test_settings_of_a_layer_cannot_be_changed(name):
    layer = lora.LoRADense(3, lora_rank=2)
    with pytest.raises(AttributeError, match=f"Received {name}=8.*cannot be changed"):
        setattr(layer.lora, name, 8)
    assert layer.lora.rank == layer.lora.lora_rank == 2
