"""A model as a function of named tensors: what goes in, what comes out, how it is traced."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.exporting.exported import TensorInfo

#: Names of the one input and the one output that most models have.
INPUT, PICTURES, OUTPUT = "inputs", "pictures", "outputs"


@dataclass(frozen=True)
class Inputs:
    """What a model takes: tensors in order, and the structure that it wants them in."""

    tensors: tuple[TensorInfo, ...]
    structure: Any

    def pack(self, tensors: list[Any]) -> Any:
        """The structure with these tensors in it."""
        import tensorflow as tf

        return tf.nest.pack_sequence_as(self.structure, tensors)


def inputs_of(model: Any, check_inputs: Any) -> Inputs:
    """What a model takes, with a batch of any size.

    Args:
        model: A built model.
        check_inputs: Arrays that it takes, or None.

    Raises:
        ValueError: if that is known neither from the model nor from arrays.
    """
    import tensorflow as tf

    found = _structure_of(model)
    if found is None:
        found = check_inputs
    if found is None:
        raise ValueError(
            f"The shape of the inputs of model '{model.name}' is unknown. Pass check_inputs= "
            "with an array of a few of them, or call the model on one first."
        )
    names = _names(found, INPUT, getattr(model, "input_names", None))
    tensors = [
        TensorInfo(name, (None, *tuple(t.shape)[1:]), _dtype_name(t.dtype))
        for name, t in zip(names, tf.nest.flatten(found))
    ]
    return Inputs(tuple(tensors), found)


def _structure_of(model: Any) -> Any:
    """The inputs as anything that has shapes and types, nested as the model wants them."""
    import tensorflow as tf

    backend = backend_of(model)
    if backend.is_functional(model):
        return model.input
    if getattr(model, "inputs", None):  # a Sequential of Keras 3
        return model.inputs[0]
    if hasattr(model, "dummy_inputs"):  # tfimm
        return model.dummy_inputs
    spec = model.save_spec() if hasattr(model, "save_spec") else None  # legacy, called once
    if spec is not None:
        return spec[0][0]
    shapes = backend.input_shapes(model)
    if shapes is None:
        return None
    return backend.map_shapes(lambda shape: tf.TensorSpec(shape, tf.float32), shapes)


def output_names(model: Any, outputs: Any) -> list[str]:
    """Names of what a model gives: those that it has, or "outputs" if it is one."""
    return _names(outputs, OUTPUT, getattr(model, "output_names", None))


def _names(structure: Any, one: str, of_model: list[str] | None) -> list[str]:
    import tensorflow as tf

    flat = tf.nest.flatten(structure)
    if len(flat) == 1:
        return [one]
    if isinstance(structure, dict) and len(structure) == len(flat):
        names = sorted(structure)  # as tf.nest takes them
    elif of_model and len(of_model) == len(flat):
        names = list(of_model)
    else:
        names = [f"{one}_{i}" for i in range(len(flat))]
    plain = [re.sub(r"\W", "_", str(name)) for name in names]
    return plain if len(set(plain)) == len(plain) else [f"{one}_{i}" for i in range(len(flat))]


def _dtype_name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype)


def outputs_for(model: Any, inputs: Inputs, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """What a model gives for arrays, by name, as it stands in this process."""
    import tensorflow as tf

    given = inputs.pack([_tensor(model, array) for array in arrays])
    outputs = model(given, training=False)
    names = output_names(model, outputs)
    to_numpy = backend_of(model).to_numpy
    return {name: to_numpy(y) for name, y in zip(names, tf.nest.flatten(outputs))}


def _tensor(model: Any, array: np.ndarray) -> Any:
    import tensorflow as tf

    keras = backend_of(model).keras
    return keras.ops.convert_to_tensor(array) if hasattr(keras, "ops") else tf.constant(array)


def traced(
    model: Any,
    inputs: Inputs,
    takes: Inputs,
    prepare: Callable[[Any], Any] | None,
    inline: bool,
) -> Any:
    """A concrete function of named inputs that gives the outputs by name.

    Args:
        model: An ordinary model on TensorFlow.
        inputs: What it takes.
        takes: What the function takes.
        prepare: What makes the one of the other, or None where they are the same.
        inline: Whether functions that the model compiles in itself (grouped convolutions of
            Keras, for XLA) become part of the graph, which converters want.
    """
    import tensorflow as tf

    def serve(*tensors: Any) -> Any:
        given = list(tensors) if prepare is None else [prepare(tensors[0])]
        outputs = model(inputs.pack(given), training=False)
        return dict(zip(output_names(model, outputs), tf.nest.flatten(outputs)))

    specs = [tf.TensorSpec(t.shape, t.dtype, t.name) for t in takes.tensors]
    function = tf.function(serve, input_signature=specs)
    if not inline:
        return function.get_concrete_function()
    try:
        with _functions_inlined(tf):
            return function.get_concrete_function()
    except tf.errors.OperatorNotAllowedInGraphError:
        # A function of the model's own needs to be compiled, for its loops.
        return tf.function(serve, input_signature=specs).get_concrete_function()


@contextlib.contextmanager
def _functions_inlined(tf: Any) -> Iterator[None]:
    """Within this block a call of a tf.function is a call of the Python function in it."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
