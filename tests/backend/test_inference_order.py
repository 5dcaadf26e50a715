"""In inference TensorFlow holds the adapted kernel of one matrix product at a time.

It runs a graph in the order in which operations become ready, so nothing of the size of a
kernel may be ready before the input of its layer is.
"""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, array, keras, normal, randomise

if BACKEND != "tensorflow":
    pytest.skip("looks into graphs of TensorFlow", allow_module_level=True)

import tensorflow as tf

from tfimm_lora.layers import forward

layers = keras.layers

#: Reading a variable copies nothing.
READS = ("ReadVariableOp", "Placeholder", "Identity")


def adapted(**settings):
    entry = keras.Input((6, 5))
    x = layers.Dense(8, activation="relu", name="dense")(entry)
    x = layers.EinsumDense("abc,cde->abde", (6, 2, 4), name="einsum")(x)
    x = layers.Dense(3, name="last")(layers.Reshape((6, 8))(x))
    model = keras.Model(entry, x)
    lora.inject_lora(model, lora_rank=2, lora_targets="all", **settings)
    randomise(model)
    return model


def waits_for(operation):
    """The names of all operations that run before an operation."""
    waiting, seen = [operation], set()
    while waiting:
        one = waiting.pop()
        before = [tensor.op for tensor in one.inputs] + list(one.control_inputs)
        waiting += [found for found in before if found.name not in seen]
        seen |= {found.name for found in before}
    return seen


#: The shape of each kernel, and the layer before it.
KERNELS = {(5, 8): "", (8, 2, 4): "dense", (8, 3): "einsum"}


def traced(model):
    """The graph of inference with W + s A B."""
    with lora.use_form("effective"):
        function = tf.function(lambda x: model(x, training=False), autograph=False)
        return function.get_concrete_function(tf.TensorSpec((None, 6, 5), "float32"))


def kernels_that_wait(function):
    """Whether each operation that makes something of the shape of a kernel waits for the input
    of its layer."""
    entry, found = function.inputs[0].op.name, {}
    for operation in function.graph.get_operations():
        for output in operation.outputs:
            if operation.type in READS or output.shape.rank not in (2, 3):
                continue
            if tuple(output.shape) in KERNELS:
                before = waits_for(operation)
                layer = KERNELS[tuple(output.shape)]
                found[operation.name] = entry in before and any(
                    f"/{layer}" in name for name in before
                )
    assert len(found) >= 6  # the product A B and its sum with W, in each layer
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora_use_dora": True}, {"lora_use_loha": True}],
    ids=["lora", "dora", "loha"],
)
def test_no_large_kernel_is_computed_before_the_input_of_its_layer(settings, monkeypatch):
    monkeypatch.setattr(forward, "IN_TURN", 24)  # the size of the smallest one
    model, x = adapted(**settings), normal(2, 6, 5)
    expected = array(model(x))  # eagerly
    function = traced(model)
    waits = kernels_that_wait(function)
    assert all(waits.values()), waits
    np.testing.assert_allclose(array(function(tf.constant(x))), expected, rtol=1e-4, atol=1e-5)


def test_small_kernels_do_not_wait():
    assert not any(kernels_that_wait(traced(adapted())).values())
