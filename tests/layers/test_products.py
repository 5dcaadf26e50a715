"""Which form of the product is taken, and that all forms compute the same."""

import threading

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers import layer_contracts
from tests.helpers.kerases import BACKEND, LEGACY, array, keras, normal, randomise, run
from tests.helpers.layer_cases import CASES, IDS
from tfimm_lora.layers import forms
from tfimm_lora.layers.forms import Work

on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="looks into its graphs")


# What is chosen for the small sizes of the cases is "whole", so narrow gradients are what is
# left to check here.
@pytest.mark.backends
@pytest.mark.parametrize("product", forms.PRODUCTS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_form_has_the_true_gradients(case, product):
    with lora.use_form(product, "narrow"):
        layer_contracts.gives_reference_output(case)
        layer_contracts.trains_by_the_true_gradient(case)
        layer_contracts.passes_the_true_gradient_to_its_input(case)


@pytest.mark.backends
@pytest.mark.parametrize(
    "product, gradients", [("effective", "narrow"), ("effective", "whole"), ("factored", None)]
)
def test_frozen_a_leaves_the_same_gradient_of_b(product, gradients):
    steps = []
    for freeze_a in (False, True):
        layer = lora.LoRADense(5, lora_rank=2, lora_alpha=3.0, lora_freeze_a=freeze_a)
        x = normal(2, 7, 4)
        run(layer, x)
        rng = np.random.default_rng(1)
        for variable in layer.weights:
            variable.assign(rng.normal(size=tuple(variable.shape)))
        with lora.use_form(product, gradients):
            entry = keras.Input((7, 4))
            model = keras.Model(entry, layer(entry))
            model.compile(keras.optimizers.SGD(1.0), "mse")
            before = array(layer.kernel_lora_b).copy()
            model.train_on_batch(x, normal(2, 7, 5, seed=2))
        steps.append(array(layer.kernel_lora_b) - before)
    assert np.abs(steps[0]).max() > 1e-2
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "work, expected",
    [
        # A ViT-Ti's MLP, 8 pictures: many rows, a small kernel.
        (Work(8 * 197, 192, 192, 768, 8), ("effective", "narrow")),
        # A ViT-B's, 2 pictures: forming its kernel would cost more than passing over y.
        (Work(2 * 197, 768, 768, 3072, 8), ("factored", "narrow")),
        (Work(32 * 197, 768, 768, 3072, 8), ("effective", "narrow")),
        # One example in each row of a classifier.
        (Work(8, 768, 768, 1000, 8), ("factored", "narrow")),
        # A ResNet-50's first convolutions, 8 pictures: hardly larger than their factors.
        (Work(8 * 56**2, 64, 64, 64, 8), ("effective", "whole")),
        (Work(8 * 56**2, 256, 256, 64, 8), ("effective", "narrow")),
        (Work(8 * 56**2, 576, 64, 64, 8), ("effective", "narrow")),
        (Work(8 * 56**2, 256, 256, 64, 32), ("effective", "whole")),
        # Its last ones: large kernels at few positions.
        (Work(8 * 7**2, 9 * 512, 512, 512, 8), ("factored", "narrow")),
    ],
)
def test_form_goes_by_the_sizes(work, expected):
    chosen = forms.choose(work, narrow=False)
    assert (chosen.product, chosen.gradients) == expected
    assert forms.choose(work, narrow=True).product == "factored"


def test_unknown_sizes_are_taken_for_a_batch_of_pictures():
    assert forms.places(4, [3, 5]) == 60
    assert forms.places(None, [3, 5]) == 8 * 15
    assert forms.places(2, [None, 5]) == 2 * 196
    assert forms.places(None, []) == 8


def chosen():
    form = forms.choose(Work(1576, 192, 192, 768, 8), narrow=False)
    return form.product, form.gradients


def test_use_form_is_nested_and_undone_and_of_one_thread():
    seen = []
    with pytest.raises(RuntimeError), lora.use_form("factored"):
        assert chosen() == ("factored", "narrow")
        with (
            pytest.raises(ValueError, match="factored.*whole"),
            lora.use_form(gradients="whole"),
        ):
            pass
        with lora.use_form("effective", "whole"):
            assert chosen() == ("effective", "whole")
            other = threading.Thread(target=lambda: seen.append(chosen()))
            other.start()
            other.join()
        assert chosen() == ("factored", "narrow")
        raise RuntimeError
    assert seen == [("effective", "narrow")] and chosen() == ("effective", "narrow")


@pytest.mark.parametrize("given", [dict(product="merged"), dict(gradients="full")])
def test_unknown_form_is_refused_by_name(given):
    word = next(iter(given.values()))
    with pytest.raises(ValueError, match=f"{word}.*expected None, "), lora.use_form(**given):
        pass
    assert chosen() == ("effective", "narrow")


# -- what is in the graph ----------------------------------------------------------------


def traced_step(layer, x, variables):
    import tensorflow as tf

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(y, variables)

    return step.get_concrete_function(tf.constant(x)).graph


def products_of_shape(graph, *shapes):
    return [
        op
        for op in graph.get_operations()
        if op.type in ("MatMul", "BatchMatMulV2")
        and op.outputs[0].shape.as_list() in [list(s) for s in shapes]
    ]


@on_tensorflow
@pytest.mark.parametrize("product", forms.PRODUCTS)
def test_no_gradient_of_the_full_kernel_is_formed(product):
    """The backward pass holds no tensor of the kernel's shape but the kernel itself."""
    layer, x = lora.LoRADense(320, lora_rank=2, use_bias=False), normal(2, 7, 300)
    run(layer, x)
    randomise(layer)
    with lora.use_form(product):
        graph = traced_step(layer, x, [layer.kernel_lora_a, layer.kernel_lora_b])
    found = products_of_shape(graph, (300, 320), (320, 300))
    assert len(found) == (1 if product == "effective" else 0)
    for op in found:  # A B itself sums over the rank, not over the rows
        axes = {size for tensor in op.inputs for size in tensor.shape.as_list()}
        assert axes <= {300, 320, 2}, f"{op.name} sums over rows"


@on_tensorflow
def test_the_whole_gradient_is_formed_on_request():
    layer, x = lora.LoRADense(320, lora_rank=2, use_bias=False), normal(2, 7, 300)
    run(layer, x)
    with lora.use_form(gradients="whole"):
        graph = traced_step(layer, x, [layer.kernel_lora_a, layer.kernel_lora_b])
    # A B, and the gradient of the kernel.
    assert len(products_of_shape(graph, (300, 320), (320, 300))) == 2


@on_tensorflow
@pytest.mark.parametrize("freeze_a", [False, True])
def test_input_is_not_kept_for_the_backward_pass_where_a_is_frozen(freeze_a):
    """x W' and x A read it; with A trained its gradient does, too."""
    layer = lora.LoRADense(320, lora_rank=2, use_bias=False, lora_freeze_a=freeze_a)
    x = normal(14, 300)
    run(layer, x)
    trained = [layer.kernel_lora_b] if freeze_a else [layer.kernel_lora_a, layer.kernel_lora_b]
    with lora.use_form("effective", "narrow"):
        graph = traced_step(layer, x, trained)
    readers = [
        op
        for op in needed_operations(graph)
        if op.type in ("MatMul", "BatchMatMulV2")
        and any(t.shape.as_list()[-2:] in ([14, 300], [300, 14]) for t in op.inputs)
    ]
    assert len(readers) == (2 if freeze_a else 3)


def needed_operations(graph):
    """The operations that the outputs of a graph depend on; TensorFlow runs no others."""
    found, ahead = set(), [t.op for t in graph.outputs]
    while ahead:
        op = ahead.pop()
        if op not in found:
            found.add(op)
            ahead += [t.op for t in op.inputs] + list(op.control_inputs)
    return found


@on_tensorflow
def test_nothing_is_differentiated_below_the_lowest_trained_layer():
    import tensorflow as tf

    entry = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, name="below")(entry)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Flatten()(keras.layers.ReLU()(x))
    x = keras.layers.Dense(6, name="lowest")(x)
    model = keras.Model(entry, keras.layers.Dense(5, name="head")(x))
    lora.inject_lora(model, lora_rank=2, lora_targets=["lowest", "head"])
    randomise(model)
    variables = [getattr(v, "value", v) if not LEGACY else v for v in model.trainable_weights]
    with lora.use_form("effective", "narrow"):
        graph = traced_step(model, normal(2, 8, 8, 3), variables)
    kinds = [op.type for op in needed_operations(graph)]
    assert kinds.count("Conv2D") == 1
    assert not [k for k in kinds if "Backprop" in k or "ReluGrad" in k or "NormGrad" in k]
    # The gradient by the input of the lowest layer is not needed either: x W', twice; A B,
    # dy W'^T of the head alone; and x A, dy B^T and the gradients by A and B.
    assert kinds.count("MatMul") + kinds.count("BatchMatMulV2") == 2 + 2 + 1 + 4 * 2
    assert isinstance(graph, tf.Graph)


@on_tensorflow
@pytest.mark.parametrize("product", forms.PRODUCTS)
def test_gradient_checkpointing_gives_the_same_gradients(product):
    import tensorflow as tf

    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv", activation="relu"),
            keras.layers.Conv2D(4, 1, name="point"),
            keras.layers.Flatten(),
            keras.layers.Dense(6, name="fc"),
        ]
    )
    lora.inject_lora(model, lora_rank=2, lora_targets=["conv", "point", "fc"])
    randomise(model)
    x = tf.constant(normal(2, 8, 8, 3))
    variables = [v if LEGACY else v.value for v in model.trainable_weights]
    with lora.use_form(product):
        found = []
        for function in (model, tf.recompute_grad(lambda t: model(t))):

            @tf.function
            def gradients(function=function):
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(variables)
                    y = tf.reduce_sum(function(x) ** 2)
                return tape.gradient(y, variables)

            found.append([array(g) for g in gradients()])
    for plain, again in zip(*found):
        assert np.abs(plain).max() > 1e-3
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_optimizer_has_state_for_what_is_trained_alone():
    entry = keras.Input((6,))
    x = keras.layers.Dense(40, name="one")(entry)
    model = keras.Model(entry, keras.layers.Dense(3, name="two")(x))
    lora.inject_lora(model, lora_rank=2, lora_targets=["one"])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    model.train_on_batch(normal(4, 6), normal(4, 3))
    trained = sum(array(v).size for v in model.trainable_weights)
    assert trained == 2 * (6 + 40)
    state = model.optimizer.variables
    sizes = [array(v).size for v in (state() if callable(state) else state)]
    assert sum(s for s in sizes if s > 1) == 2 * trained
