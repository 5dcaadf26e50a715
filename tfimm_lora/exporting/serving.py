"""A model as a function of named tensors: its inputs, its outputs, and tracing."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.exporting.exported import TensorInfo
from tfimm_lora.utils.nested import flatten, pack_as

#: The names of the input and output of a model that has only one.
INPUT, PICTURES, OUTPUT = "inputs", "pictures", "outputs"


@dataclass(frozen=True)
class Inputs:
    """The inputs of a model: the flat list of tensors, and the structure it takes them in."""

    tensors: tuple[TensorInfo, ...]
    structure: Any

    def pack(self, tensors: list[Any]) -> Any:
        """Pack a flat list of tensors into the structure."""
        return pack_as(self.structure, tensors)


def inputs_of(model: Any, check_inputs: Any) -> Inputs:
    """The inputs of a model, with any batch size.

    Args:
        model: A built model.
        check_inputs: Example inputs, or None.

    Raises:
        ValueError: if neither the model nor ``check_inputs`` defines the shapes.
    """
    structure = _structure_of(model)
    if structure is None:
        structure = check_inputs
    if structure is None:
        raise ValueError(
            f"The input shape of model '{model.name}' is unknown; expected a model that was "
            "called. Call it on an input, or pass check_inputs= with an array of inputs."
        )
    names = _names(structure, INPUT, getattr(model, "input_names", None))
    tensors = [
        TensorInfo(name, (None, *tuple(t.shape)[1:]), _dtype_name(t.dtype))
        for name, t in zip(names, flatten(structure))
    ]
    return Inputs(tuple(tensors), structure)


def _structure_of(model: Any) -> Any:
    """The inputs as objects with shape and dtype, in the structure that the model takes."""
    backend = backend_of(model)
    if backend.is_functional(model):
        return model.input
    if getattr(model, "inputs", None):  # a Sequential of Keras 3
        return model.inputs[0]
    if hasattr(model, "dummy_inputs"):  # tfimm
        return model.dummy_inputs
    spec = model.save_spec() if hasattr(model, "save_spec") else None  # legacy, after a call
    if spec is not None:
        return spec[0][0]
    shapes = backend.input_shapes(model)
    if shapes is None:
        return None
    return backend.map_shapes(lambda shape: TensorInfo("", tuple(shape), "float32"), shapes)


def output_names(model: Any, outputs: Any) -> list[str]:
    """The names of the outputs of a model, or "outputs" if there is only one."""
    return _names(outputs, OUTPUT, getattr(model, "output_names", None))


def _names(structure: Any, one: str, of_model: list[str] | None) -> list[str]:
    flat = flatten(structure)
    if len(flat) == 1:
        return [one]
    if isinstance(structure, dict) and len(structure) == len(flat):
        names = sorted(structure)  # the order of flatten
    elif of_model and len(of_model) == len(flat):
        names = list(of_model)
    else:
        names = [f"{one}_{i}" for i in range(len(flat))]
    plain = [re.sub(r"\W", "_", str(name)) for name in names]
    return plain if len(set(plain)) == len(plain) else [f"{one}_{i}" for i in range(len(flat))]


def _dtype_name(dtype: Any) -> str:
    return getattr(dtype, "name", None) or str(dtype)


def outputs_for(model: Any, inputs: Inputs, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Run a model on arrays and return its outputs by name."""
    given = inputs.pack([_tensor(model, array) for array in arrays])
    outputs = model(given, training=False)
    names = output_names(model, outputs)
    to_numpy = backend_of(model).to_numpy
    return {name: to_numpy(y) for name, y in zip(names, flatten(outputs))}


def _tensor(model: Any, array: np.ndarray) -> Any:
    keras = backend_of(model).keras
    if hasattr(keras, "ops"):
        return keras.ops.convert_to_tensor(array)
    import tensorflow as tf

    return tf.constant(array)


def traced(
    model: Any,
    inputs: Inputs,
    function_inputs: Inputs,
    prepare: Callable[[Any], Any] | None,
    finish: Callable[[Any], Any] | None,
    inline: bool,
) -> Any:
    """Trace a model to a concrete function from named inputs to named outputs.

    Args:
        model: An ordinary model on TensorFlow.
        inputs: The inputs of the model.
        function_inputs: The inputs of the function.
        prepare: The function from one to the other, or None if they are the same.
        finish: The function from an output of the model to that of the function, or None if
            they are the same.
        inline: Whether to inline the functions that the model compiles itself, such as the
            grouped convolutions of Keras for XLA. Converters require it.
    """
    import tensorflow as tf

    def serve(*tensors: Any) -> Any:
        given = list(tensors) if prepare is None else [prepare(tensors[0])]
        outputs = model(inputs.pack(given), training=False)
        flat = tf.nest.flatten(outputs)
        if finish is not None:
            flat = [finish(y) for y in flat]
        return dict(zip(output_names(model, outputs), flat))

    specs = [tf.TensorSpec(t.shape, t.dtype, t.name) for t in function_inputs.tensors]
    return concrete_function(serve, specs, inline)


def concrete_function(function: Callable[..., Any], specs: list[Any], inline: bool) -> Any:
    """Trace a function of tensors.

    Args:
        function: The function.
        specs: The specification of each tensor.
        inline: As in ``traced``.
    """
    import tensorflow as tf

    compiled = tf.function(function, input_signature=specs)
    if not inline:
        return compiled.get_concrete_function()
    try:
        with _functions_inlined(tf):
            return compiled.get_concrete_function()
    except tf.errors.OperatorNotAllowedInGraphError:
        # A function of the model must be compiled, since it has loops.
        return tf.function(function, input_signature=specs).get_concrete_function()


@contextlib.contextmanager
def _functions_inlined(tf: Any) -> Iterator[None]:
    """Run the Python function of a tf.function, instead of its graph, during the block."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)
