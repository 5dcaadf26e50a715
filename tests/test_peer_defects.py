"""What goes wrong in other LoRA libraries does not go wrong here.

Each entry of ``DEFECTS`` is a defect that users of PEFT, Keras 3 (``enable_lora``), KerasHub
or loralib reported or that shows in their sources, with the test that shows that it is
absent here. What no other test covers is tested in this file.
"""

import ast
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import tiny_models
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run, values
from tfimm_lora.model.merge import lora_layers

layers = keras.layers
CLOSE = dict(rtol=1e-4, atol=1e-5)
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")

HERE = "test_peer_defects.py"

#: Whose it is, what goes wrong -> the test here (a function in ``contracts.py`` and
#: ``model_contracts.py`` is a promise that every layer, every model is held to).
DEFECTS = {
    ("Keras 3", "saving merges, and leaves A and B zero (#19208)"): [
        "layer_contracts.py::survives_saving",
        "model_contracts.py::whole_files_load_and_train_on_or_are_refused",
    ],
    ("Keras 3", "alpha given to the constructor of Dense and Embedding is ignored"): [
        "layer_contracts.py::scales_with_alpha_over_rank",
    ],
    ("Keras 3", "a model loaded again never trains again"): [
        "layer_contracts.py::survives_saving",
        "model_contracts.py::weight_files_load_and_train_on",
        "test_edges.py::test_whole_file_loads_in_a_fresh_process_and_trains_the_same",
    ],
    ("Keras 3", "no depthwise convolutions"): ["layer_cases.py::Case"],
    ("Keras 3, KerasHub", "merging only inside of saving"): [
        "layer_contracts.py::merges_and_unmerges_without_loss",
        "model_contracts.py::merges_and_unmerges_without_loss",
    ],
    ("Keras 3, KerasHub", "the gradient of the whole kernel is formed"): [
        "test_products.py::test_no_gradient_of_the_full_kernel_is_formed",
        f"{HERE}::test_the_gradient_of_the_full_kernel_is_not_formed",
    ],
    ("KerasHub", "adapters go by the index of a layer (#2701)"): [
        f"{HERE}::test_adapters_go_by_name_and_not_by_the_order_of_layers",
    ],
    ("KerasHub", "targets that match nothing freeze everything without a word"): [
        "test_layer_paths.py::test_targets_that_match_nothing_are_errors_and_change_nothing",
    ],
    ("PEFT", "dilation and padding mode of a convolution are dropped (#3697)"): [
        "layer_contracts.py::gives_reference_output",
        f"{HERE}::test_a_convolution_that_pads_by_itself_is_adapted_with_its_padding",
    ],
    ("PEFT", "statistics of batch normalisation drift and are not saved (#1732)"): [
        "model_contracts.py::fit_changes_exactly_the_named_variables",
        "test_adapters.py::test_fully_trained_modules_keep_their_statistics",
        "test_layer_paths.py::test_batch_norm_in_a_trained_layer_updates_its_statistics",
        f"{HERE}::test_an_adapter_is_all_that_training_changed_under_batch_normalisation",
    ],
    ("PEFT", "combining with rsLoRA is off by the root of the rank (#3449)"): [
        "test_combine.py::test_numbers_are_those_of_peft",
        "test_combine.py::test_cat_is_the_exact_sum",
        f"{HERE}::test_combined_rslora_adapters_compute_the_sum",
    ],
    ("PEFT", "a linear combination is not the sum (#3004)"): [
        "test_combine.py::test_linear_is_far_from_the_sum_and_errors_say_so",
        "test_adapters.py::test_combined_adapters_load_and_add_up",
    ],
    ("PEFT", "merging and unmerging in bfloat16 drifts"): [
        "test_layers.py::test_hundred_merges_leave_identical_kernels",
        "test_layers.py::test_a_small_update_survives_in_16_bits",
    ],
    ("PEFT", "all-linear on a CNN adapts its head only"): [
        f"{HERE}::test_all_linear_on_a_cnn_is_its_convolutions_and_not_its_head",
        "test_targeting.py::test_what_is_excluded_is_not_adapted_even_where_targets_mean_it",
    ],
    ("PEFT", "adapters of depthwise convolutions are larger than the layer (#2202)"): [
        f"{HERE}::test_a_depthwise_adapter_is_smaller_than_its_layer",
    ],
    ("PEFT", "batches of several adapters take a product for each of them (#804)"): [
        f"{HERE}::test_the_products_of_a_mixed_batch_do_not_depend_on_the_number_of_adapters",
        "test_mixed_layers.py::test_each_example_is_what_numpy_gives_for_its_adapter",
    ],
    ("PEFT, Keras 3, KerasHub", "no part of a fused qkv alone (#852)"): [
        "test_layer_paths.py::test_query_and_value_alone",
        "test_families.py::test_query_and_value_alone_move_queries_and_values_alone",
    ],
    ("PEFT", "no TensorFlow (transformers #27206), yet its files should be read"): [
        "test_adapters_tfimm.py::test_adapter_that_peft_wrote_gives_pefts_logits",
        "test_adapters.py::test_file_is_pefts",
    ],
    ("loralib", "eval() merges, so that evaluating changes weights"): [
        f"{HERE}::test_evaluating_and_predicting_change_no_weight",
    ],
    ("loralib", "only square windows of convolutions"): [
        "layer_contracts.py::gives_reference_output",
    ],
    ("tfimm", "a trained variable is counted twice"): [
        "model_contracts.py::everybody_agrees_on_what_is_trained",
        "test_create.py::test_every_bias_is_listed_once",
    ],
    ("tfimm", "only dense layers can be adapted"): ["layer_cases.py::Case"],
}


def test_every_defect_has_the_tests_that_are_named():
    folder = Path(__file__).parent
    for tests in DEFECTS.values():
        for test in tests:
            file, _, name = test.partition("::")
            (path,) = folder.rglob(file)
            tree = ast.parse(path.read_text())
            assert name in {getattr(node, "name", None) for node in tree.body}, test


# -- KerasHub -------------------------------------------------------------------------------


def test_adapters_go_by_name_and_not_by_the_order_of_layers(tmp_path):
    """Two layers of one shape, in a model that creates them the other way round."""

    class Model(keras.Model):
        def __init__(self, names):
            super().__init__(name="model")
            for name in names:
                setattr(self, name, layers.Dense(6, name=name))

        def call(self, x):
            return self.second(keras.activations.tanh(self.first(x)))

    one, other = Model(["first", "second"]), Model(["extra", "second", "first"])
    other.extra.build((None, 6))
    x = normal(4, 6)
    for model in (one, other):
        run(model, x)
    for name in ("first", "second"):
        for mine, theirs in zip(getattr(other, name).weights, getattr(one, name).weights):
            mine.assign(array(theirs))
    lora.inject_lora(one, lora_targets=["first", "second"], lora_rank=2)
    randomise(one)
    lora.save_adapter(one, tmp_path)
    for _ in range(2):  # into the plain model, then into one with LoRA
        lora.load_adapter(other, tmp_path)
        np.testing.assert_allclose(run(other, x), run(one, x), **CLOSE)
        assert isinstance(other.first, lora.LoRADense)
        assert not isinstance(other.extra, lora.LoRADense)
        randomise(other, seed=5)


# -- PEFT -----------------------------------------------------------------------------------


class ReflectConv(layers.Conv2D):
    """A convolution that pads by reflection, as torch's padding_mode="reflect" does."""

    def call(self, x):
        if LEGACY:
            import tensorflow as tf

            pad = tf.pad
        else:
            pad = keras.ops.pad
        return super().call(pad(x, [[0, 0], [2, 2], [2, 2], [0, 0]], "reflect"))


def test_a_convolution_that_pads_by_itself_is_adapted_with_its_padding():
    layer, x = ReflectConv(5, 3, dilation_rate=2), normal(2, 7, 7, 3)
    run(layer, x)
    lora.convert_to_lora_layer(layer, lora_rank=2, lora_alpha=3)
    randomise(layer)
    values = layer.lora_values()
    kernel = values["kernel"] + 1.5 * np.matmul(
        values["kernel_lora_a"], values["kernel_lora_b"]
    )
    plain = ReflectConv(5, 3, dilation_rate=2)
    before = run(plain, x)
    plain.set_weights([kernel, array(layer.bias)])
    assert np.abs(run(plain, x) - before).max() > 0.1
    np.testing.assert_allclose(run(layer, x), run(plain, x), **CLOSE)
    layer.merge_weights()
    np.testing.assert_allclose(run(layer, x), run(plain, x), **CLOSE)


def test_an_adapter_is_all_that_training_changed_under_batch_normalisation(tmp_path):
    base = tiny_models.functional()
    start = values(base.weights)
    model = lora.inject_lora(base, lora_rank=2)
    model.compile(keras.optimizers.SGD(0.05), "mse")
    x = 3 + normal(8, 8, 8, 3)  # the statistics of this batch are not the layers'
    model.fit(x, np.ones((8, 3)), batch_size=4, epochs=3, verbose=0)
    lora.save_adapter(model, tmp_path)
    fresh = tiny_models.functional()
    fresh.set_weights(start)
    lora.load_adapter(fresh, tmp_path)
    np.testing.assert_allclose(run(fresh, x), run(model, x), **CLOSE)


def test_combined_rslora_adapters_compute_the_sum():
    """At the scale alpha / sqrt(rank), which differs from alpha / rank by sqrt(rank)."""

    def make(seed=None, **arguments):
        keras.utils.set_random_seed(3)
        x = entry = keras.Input((6,))
        model = keras.Model(entry, layers.Dense(5, name="fc")(x))
        if seed is not None:
            lora.inject_lora(model, lora_targets=["fc"], lora_use_rslora=True, **arguments)
            randomise(model, seed=seed)
        return model

    x = normal(4, 6)
    plain = make()
    tuned = [make(1, lora_rank=2, lora_alpha=4), make(2, lora_rank=3, lora_alpha=5)]
    weights = [1.0, -0.5]
    sum_of_both = run(plain, x) + sum(
        w * (run(model, x) - run(plain, x)) for w, model in zip(weights, tuned)
    )
    adapters = [lora.adapter_of(model) for model in tuned]
    for kind, rank in (("cat", None), ("svd", 5)):
        options = {} if rank is None else {"rank": rank}
        combined = lora.combine_adapters(adapters, weights, kind, **options)
        np.testing.assert_allclose(
            run(lora.load_adapter(make(), combined), x), sum_of_both, **CLOSE
        )


def test_all_linear_on_a_cnn_is_its_convolutions_and_not_its_head():
    x = entry = keras.Input((8, 8, 3))
    for i in range(2):
        x = layers.Conv2D(4, 3, padding="same", activation="relu", name=f"conv{i}")(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(entry, layers.Dense(2, name="head")(x))
    lora.inject_lora(model, lora_targets="all-linear", lora_rank=2)
    kinds = [type(model.get_layer(name)).__name__ for name in ("conv0", "conv1", "head")]
    assert kinds == ["LoRAConv2D", "LoRAConv2D", "FrozenDense"]


@pytest.mark.parametrize("window, channels, rank", [(3, 64, 4), (7, 96, 16), (5, 40, 4)])
def test_a_depthwise_adapter_is_smaller_than_its_layer(window, channels, rank):
    """PEFT's A alone is rank times as large as the kernel of the layer."""
    layer = layers.DepthwiseConv2D(window)
    layer.build((None, 9, 9, channels))
    lora.convert_to_lora_layer(layer, lora_rank=rank)
    factors = array(layer.kernel_lora_a).size + array(layer.kernel_lora_b).size
    assert factors == rank * (window**2 + channels)
    assert factors < window**2 * channels


@on_tensorflow
def test_the_products_of_a_mixed_batch_do_not_depend_on_the_number_of_adapters():
    import tensorflow as tf

    def products(count):
        entry = keras.Input((5, 6))
        x = layers.Dense(7, name="fc")(entry)
        model = keras.Model(entry, layers.Flatten()(layers.Dense(3, name="last")(x)))
        adapter = lora.adapter_of(
            randomised(lora.inject_lora(model, lora_targets=["fc", "last"], lora_rank=2))
        )
        lora.remove_lora(model, merge=False)
        names = [f"adapter{i}" for i in range(count)]
        bank = lora.AdapterBank(model, dict.fromkeys(names, adapter))
        slots = bank.slots([names[i % count] for i in range(8)])
        step = tf.function(lambda x, ids: bank.model({"inputs": x, "adapter": ids}))
        graph = step.get_concrete_function(normal(8, 5, 6), slots).graph
        return len(products_that_run(graph))

    few, many = products(2), products(20)
    # The layer's own product, one in and one out; and the classifier of each example.
    assert few == many == 4


def randomised(model):
    randomise(model)
    return model


# -- Keras 3 and KerasHub -------------------------------------------------------------------

PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum", "Conv2DBackpropFilter")


def products_that_run(graph):
    """The products that the outputs of a graph need: TensorFlow runs no others."""
    found, waiting = {}, [tensor.op for tensor in graph.outputs]
    while waiting:
        op = waiting.pop()
        if op.name not in found:
            found[op.name] = op
            waiting += [tensor.op for tensor in op.inputs]
    return [op for op in found.values() if op.type in PRODUCTS]


def forms_the_gradient_of_a_kernel(layer, kernel, x, variables):
    """Whether a step has a product of the kernel's size that takes all the examples.

    Or of that size for each of them, to be summed. Their number is a prime number that
    divides no other size.
    """
    import tensorflow as tf

    examples, size = x.shape[0], array(kernel).size

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(y, variables)

    graph = step.get_concrete_function(tf.constant(x)).graph
    return any(
        op.outputs[0].shape.num_elements() in (size, examples * size)
        and any((tensor.shape.num_elements() or 0) % examples == 0 for tensor in op.inputs)
        for op in products_that_run(graph)
    )


KERNELS = {
    "rows": (lambda: layers.Dense(10), (11, 6)),
    "positions": (lambda: layers.Dense(10), (11, 5, 6)),
    "parts": (lambda: layers.Dense(12), (11, 5, 6)),
    "conv2d": (lambda: layers.Conv2D(10, 3, padding="same"), (11, 5, 5, 6)),
    "conv1d": (lambda: layers.Conv1D(10, 3, padding="same"), (11, 5, 6)),
    "einsum": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 5)), (11, 5, 6)),
}


@on_tensorflow
@pytest.mark.parametrize("name", KERNELS)
def test_the_gradient_of_the_full_kernel_is_not_formed(name):
    """The search finds it where the kernel is trained. For kernels so small that it is cheaper
    than what avoids it, as these are, it is formed by default."""
    make, shape = KERNELS[name]
    layer, x = make(), normal(*shape)
    run(layer, x)
    assert forms_the_gradient_of_a_kernel(layer, layer.kernel, x, [layer.kernel])
    parts = {"lora_qkv": "qv"} if name == "parts" else {}
    lora.convert_to_lora_layer(layer, lora_rank=2, **parts)
    randomise(layer)
    kernel = layer._kernel_variable
    factors = [layer.kernel_lora_a, layer.kernel_lora_b]
    with lora.use_form(gradients="narrow"):
        assert not forms_the_gradient_of_a_kernel(layer, kernel, x, factors)


# -- loralib --------------------------------------------------------------------------------


def test_evaluating_and_predicting_change_no_weight():
    model = randomised(lora.inject_lora(tiny_models.functional(), lora_rank=2))
    x, y = normal(4, 8, 8, 3), np.zeros((4, 3), "float32")
    model.compile("sgd", "mse")
    before = values(model.weights)
    model.evaluate(x, y, verbose=0)
    model.predict(x, verbose=0)
    run(model, x, training=False)
    for variable, value in zip(model.weights, before):
        np.testing.assert_array_equal(array(variable), value)
    assert not any(layer.merged for layer in lora_layers(model).values())
