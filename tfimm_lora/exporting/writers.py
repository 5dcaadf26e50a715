"""One writer a format, from an ordinary model in float32 on."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.exporting.plain_model import float32_policy
from tfimm_lora.exporting.serving import Inputs
from tfimm_lora.exporting.static_shapes import with_known_sizes
from tfimm_lora.utils.optional_imports import require

#: The name under which SavedModel and TFLite offer the model.
SIGNATURE = "serving_default"


def write_keras(model: Any, inputs: Inputs, path: Path) -> tuple[str, ...]:
    """Write a Keras file, and give the packages that loading it takes.

    A class that makes layers when it is called comes back from a Keras file without their
    weights (tfimm's ViT with an error, others without). Such a model is written as the one
    layer of a functional model, which calls it before the weights are read.

    Raises:
        ValueError: if it would need this package, or Keras cannot load it.
    """
    model.save(path)
    by_class = not backend_of(model).is_rebuilt_with_layers(model)
    problem = _problem_of_loading(model, path) if by_class else None
    if problem is not None and not _saved_as_one_layer(model, inputs, path):
        raise ValueError(
            f"Keras cannot load its class {type(model).__name__} again: {problem}. Export to a "
            "SavedModel, TFLite or ONNX, which do not need the class."
        )
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    needed = {*_packages(config), backend_of(model).keras.__name__} - {"builtins"}
    if "tfimm_lora" in needed:
        raise ValueError(
            f"The file of model '{model.name}' would need tfimm_lora to be loaded, since it "
            "has layers of this package in its own code. Export to a SavedModel."
        )
    if "tf_keras" in needed:
        needed.discard("keras")  # as legacy Keras calls itself in files
    return tuple(sorted(needed))


def load_keras(path: Path, like: Any) -> Any:
    """Load a Keras file, which may ask for the classes of a model.

    In float32: classes of tfimm take the policy of the process.
    """
    backend = backend_of(like)
    classes = {type(layer).__name__: type(layer) for _, layer in backend.walk(like)}
    scope = backend.keras.utils.custom_object_scope(classes)
    with scope, float32_policy(backend), quiet():
        return backend.keras.models.load_model(path, compile=False)


def _problem_of_loading(model: Any, path: Path) -> str | None:
    """Why Keras does not load a file with all the weights of a model, or None if it does."""
    try:
        found = load_keras(path, model).get_weights()
    except Exception as error:  # noqa: BLE001 - whatever the code of a class raises
        return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
    weights = model.get_weights()
    if len(found) == len(weights) and all(map(np.array_equal, found, weights)):
        return None
    return "it comes back without its weights"


def _saved_as_one_layer(model: Any, inputs: Inputs, path: Path) -> bool:
    """Save a functional model around a model, and tell whether that one can be loaded.

    Its batch of one is for the shapes that layers ask for when they are built, and binds
    nobody: tfimm's Transformers know too little with a batch of any size.
    """
    keras = backend_of(model).keras
    entries = inputs.pack(
        [
            keras.Input(t.shape[1:], batch_size=1, dtype=t.dtype, name=t.name)
            for t in inputs.tensors
        ]
    )
    try:
        keras.Model(entries, model(entries)).save(path)
    except Exception:  # noqa: BLE001 - some classes need numbers, and say so in their own way
        return False
    return _problem_of_loading(model, path) is None


def _packages(config: Any) -> Iterator[str]:
    """The packages of all classes in the config of a file."""
    if isinstance(config, dict):
        module = config.get("module")
        if isinstance(module, str):
            yield module.partition(".")[0]
        registered = config.get("registered_name")
        if isinstance(registered, str) and ">" in registered:
            package = registered.partition(">")[0]
            if package == "tfimm_lora":
                yield package
    values = config.values() if isinstance(config, dict) else config
    for value in values if isinstance(config, (dict, list)) else ():
        yield from _packages(value)


def write_savedmodel(traced: Any, path: Path) -> None:
    """Write a concrete function as the one signature of a SavedModel.

    It holds variables and the graph, and no layers: TensorFlow alone loads it.
    """
    import tensorflow as tf

    module = tf.Module()
    module.weights = list(traced.graph.variables)
    module.held = [outside for outside, _ in traced.graph.captures]
    with quiet("tensorflow"):
        tf.saved_model.save(module, str(path), signatures={SIGNATURE: traced})


def write_tflite(traced: Any, path: Path, quantize: str | None, samples: Any) -> None:
    """Write a concrete function as a TFLite file.

    Args:
        traced: The function.
        path: The file. A folder beside it is used, too.
        quantize: None, "float16" (weights), "dynamic" (weights in int8) or "int8" (weights
            and activations; what goes in and out stays float32).
        samples: Inputs that show the ranges of activations, for "int8".

    Raises:
        ValueError: if TFLite lacks an operation.
    """
    import tensorflow as tf

    folder = path.with_name("for_tflite")
    function = _for_converters(traced)
    write_savedmodel(function.get_concrete_function(), folder)
    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(folder), signature_keys=[SIGNATURE]
    )
    if quantize is not None:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if quantize == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if quantize == "int8":
        name = function.input_signature[0].name
        converter.representative_dataset = lambda: ({name: x[None]} for x in samples)
    try:
        with quiet("tensorflow", "absl"):
            content = converter.convert()
    except Exception as error:
        lacking = set(re.findall(r"'tf\.(\w+)' op is neither", str(error)))
        if not lacking:
            raise ValueError(f"TensorFlow cannot make a TFLite file of it: {error}") from error
        raise ValueError(_lacking("TFLite", lacking, "a SavedModel or to ONNX")) from error
    path.write_bytes(content)


def write_onnx(traced: Any, path: Path, opset: int, properties: dict[str, str]) -> None:
    """Write a concrete function as an ONNX file.

    Args:
        traced: The function.
        path: The file.
        opset: The version of ONNX' operators.
        properties: Texts to keep in the file by name.

    Raises:
        ValueError: if ONNX lacks an operation, or tf2onnx does not know it.
    """
    tf2onnx = require("tf2onnx", extra="onnx", why="Export to ONNX")
    onnx = require("onnx", extra="onnx", why="Export to ONNX")
    function = _for_converters(traced)
    with quiet("tf2onnx"):
        proto, _ = tf2onnx.convert.from_function(
            function,
            input_signature=function.input_signature,
            opset=opset,
            custom_op_handlers={"Erfc": (_write_erfc, [])},
        )
    lacking = {x.op_type for x in proto.graph.node if not onnx.defs.has(x.op_type, x.domain)}
    if lacking:
        raise ValueError(
            _lacking("ONNX (through tf2onnx)", lacking, "a SavedModel or to TFLite")
        )
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            dim.dim_param = "batch"
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _lacking(format: str, operations: set[str], others: str) -> str:
    return (
        f"{format} has no operation for {', '.join(sorted(operations))}, which this model "
        f"uses. Export to {others}."
    )


def _for_converters(traced: Any) -> Any:
    """The same function, with sizes as numbers where that can be done."""
    import tensorflow as tf

    specs = traced.structured_input_signature[0]
    names = sorted(traced.structured_outputs)
    run = with_known_sizes(traced)

    def serve(*tensors: Any) -> dict[str, Any]:
        return traced(*tensors) if run is None else dict(zip(names, run(*tensors)))

    return tf.function(serve, input_signature=specs, autograph=False)


def _write_erfc(ctx: Any, node: Any, name: str, args: Any) -> None:
    """erfc(x) as 1 - erf(x): tf2onnx lacks it, and it is in TensorFlow's GELU."""
    (x,), (y,) = node.input, node.output
    shape, dtype = [ctx.get_shape(y)], [ctx.get_dtype(y)]
    one = ctx.make_const(f"{name}_one", np.array(1, "float32")).output[0]
    erf = ctx.make_node("Erf", [x], name=f"{name}_erf", shapes=shape, dtypes=dtype).output[0]
    ctx.remove_node(name)
    ctx.make_node("Sub", [one, erf], name=name, outputs=[y], shapes=shape, dtypes=dtype)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Within this block these loggers and Python's warnings say nothing but errors.

    Converters warn of what is no concern of the caller's: layouts, their own deprecations.
    What is wrong with a file is found out by running it.
    """
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel("CRITICAL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels):
            logger.setLevel(level)
