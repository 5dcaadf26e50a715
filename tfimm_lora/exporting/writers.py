"""One writer for each format. The input is an ordinary model in float32."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.exporting.plain_model import float32_policy
from tfimm_lora.exporting.serving import Inputs
from tfimm_lora.exporting.static_shapes import with_static_shapes
from tfimm_lora.utils.optional_imports import require

#: The name of the signature in SavedModel and TFLite files.
SIGNATURE = "serving_default"

#: The name of the file with the metadata in SavedModel and TFLite files.
METADATA = "metadata.json"


def write_keras(model: Any, inputs: Inputs, path: Path) -> tuple[str, ...]:
    """Write a Keras file and return the packages that are needed to load it.

    A model class that creates layers when it is called is loaded from a Keras file without the
    weights of these layers (the ViT of tfimm raises an error, others do not). Such a model is
    saved as the only layer of a functional model, which calls it before the weights are read.

    Raises:
        ValueError: if the file would need this package, or Keras cannot load it.
    """
    model.save(path)
    backend = backend_of(model)
    models = [x for _, x in backend.walk(model) if backend.is_model(x)]
    by_class = [x for x in models if not backend.is_rebuilt_with_layers(x)]
    problem = _loading_problem(model, path) if by_class else None
    if problem is not None and not _save_as_one_layer(model, inputs, path):
        raise ValueError(
            f"Keras cannot load the class {type(by_class[0]).__name__} from a file: {problem}. "
            "Export to SavedModel, TFLite or ONNX, which do not need the class."
        )
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    needed = {*_packages(config), backend_of(model).keras.__name__} - {"builtins"}
    if "tfimm_lora" in needed:
        raise ValueError(
            f"Loading the file of model '{model.name}' would need tfimm_lora, because the code "
            "of the model uses layers of this package. Export to a SavedModel."
        )
    if "tf_keras" in needed:
        needed.discard("keras")  # the name of legacy Keras in its files
    return tuple(sorted(needed))


def load_keras(path: Path, like: Any) -> Any:
    """Load a Keras file in float32.

    The policy is set because the classes of tfimm take the global one.

    Args:
        path: The file.
        like: A model with the classes that the file may refer to.
    """
    backend = backend_of(like)
    classes = {type(layer).__name__: type(layer) for _, layer in backend.walk(like)}
    scope = backend.keras.utils.custom_object_scope(classes)
    with scope, float32_policy(backend), quiet():
        return backend.keras.models.load_model(path, compile=False)


def _loading_problem(model: Any, path: Path) -> str | None:
    """Why Keras cannot load a file with all weights of the model; None if it can."""
    try:
        loaded = load_keras(path, model).get_weights()
    except Exception as error:  # noqa: BLE001 - the code of a class may raise anything
        return f"{type(error).__name__} {str(error).partition(chr(10))[0]}".strip()
    weights = model.get_weights()
    if len(loaded) == len(weights) and all(map(np.array_equal, loaded, weights)):
        return None
    return "its weights are not restored"


def _save_as_one_layer(model: Any, inputs: Inputs, path: Path) -> bool:
    """Save a functional model around the model; return whether it can be loaded."""
    keras = backend_of(model).keras
    symbolic = symbolic_inputs(model, inputs)
    try:
        keras.Model(symbolic, model(symbolic)).save(path)
    except Exception:  # noqa: BLE001 - classes that need concrete values raise anything
        return False
    return _loading_problem(model, path) is None


def symbolic_inputs(model: Any, inputs: Inputs) -> Any:
    """The inputs as symbolic tensors, for a functional model around a model.

    The batch size of one only serves to build the layers: the Transformers of tfimm need a
    known one for it. The loaded model takes any batch size.
    """
    keras = backend_of(model).keras
    return inputs.pack(
        [
            keras.Input(t.shape[1:], batch_size=1, dtype=t.dtype, name=t.name)
            for t in inputs.tensors
        ]
    )


def _packages(config: Any) -> Iterator[str]:
    """The packages of all classes in the config of a Keras file."""
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


def write_savedmodel(
    traced: Any, path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a concrete function as the only signature of a SavedModel.

    It contains variables and the graph but no layers, so it can be loaded without Keras. The
    metadata are written to the folder "assets.extra", which TensorFlow reserves for them.
    """
    import tensorflow as tf

    module = tf.Module()
    module.weights = list(traced.graph.variables)
    module.held = [outside for outside, _ in traced.graph.captures]
    with quiet("tensorflow"):
        tf.saved_model.save(module, str(path), signatures={SIGNATURE: traced})
    if metadata is not None:
        (path / "assets.extra").mkdir()
        (path / "assets.extra" / METADATA).write_text(_json(metadata), encoding="utf-8")


def write_tflite(
    traced: Any, path: Path, quantize: str | None, samples: Any, metadata: Mapping[str, str]
) -> None:
    """Write a concrete function as a TFLite file.

    Args:
        traced: The function.
        path: The file. A SavedModel is written to a folder beside it.
        quantize: None, "float16" (weights), "dynamic" (weights in int8) or "int8" (weights
            and activations; inputs and outputs stay float32).
        samples: Inputs to measure the ranges of the activations, for "int8".
        metadata: The metadata, appended as a file in a zip archive, as TFLite defines for files
            such as labels.

    Raises:
        ValueError: if TFLite does not support an operation.
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
        unsupported = set(re.findall(r"'tf\.(\w+)' op is neither", str(error)))
        if not unsupported:
            raise ValueError(f"TensorFlow cannot convert it to TFLite: {error}") from error
        message = _unsupported_message("TFLite", unsupported, "SavedModel or ONNX")
        raise ValueError(message) from error
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as archive:  # appended, since the file is not an archive
        archive.writestr(zipfile.ZipInfo(METADATA), _json(metadata))


def _json(metadata: Mapping[str, str]) -> str:
    """The metadata as one JSON document. Their values are texts in JSON."""
    values = {name: json.loads(text) for name, text in metadata.items()}
    return json.dumps(values, indent=2) + "\n"


def write_onnx(traced: Any, path: Path, opset: int, properties: dict[str, str]) -> None:
    """Write a concrete function as an ONNX file.

    Args:
        traced: The function.
        path: The file.
        opset: The version of the ONNX operator set.
        properties: The metadata of the file.

    Raises:
        ValueError: if ONNX or tf2onnx does not support an operation.
    """
    write_onnx_proto(onnx_of(traced, opset), path, properties)


def onnx_of(traced: Any, opset: int) -> Any:
    """A concrete function as an ONNX graph (a ModelProto).

    Args:
        traced: The function.
        opset: The version of the ONNX operator set.

    Raises:
        ValueError: if ONNX or tf2onnx does not support an operation.
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
    unsupported = {
        x.op_type for x in proto.graph.node if not onnx.defs.has(x.op_type, x.domain)
    }
    if unsupported:
        raise ValueError(
            _unsupported_message("ONNX (with tf2onnx)", unsupported, "SavedModel or TFLite")
        )
    return proto


def write_onnx_proto(proto: Any, path: Path, properties: dict[str, str]) -> None:
    """Write an ONNX graph to a file, with the batch as a named size.

    Args:
        proto: The graph.
        path: The file.
        properties: The metadata of the file.
    """
    onnx = require("onnx", extra="onnx", why="Export to ONNX")
    defaults = {value.name for value in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim[:1]:
            if value.name not in defaults:
                dim.dim_param = "batch"
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())


def _unsupported_message(format: str, operations: set[str], others: str) -> str:
    return (
        f"{format} does not support {', '.join(sorted(operations))}, which the model uses. "
        f"Export to {others}."
    )


def _for_converters(traced: Any) -> Any:
    """The same function with static shapes, if possible."""
    import tensorflow as tf

    specs = traced.structured_input_signature[0]
    names = sorted(traced.structured_outputs)
    run = with_static_shapes(traced)

    def serve(*tensors: Any) -> dict[str, Any]:
        return traced(*tensors) if run is None else dict(zip(names, run(*tensors)))

    return tf.function(serve, input_signature=specs, autograph=False)


def _write_erfc(ctx: Any, node: Any, name: str, args: Any) -> None:
    """Write erfc(x), which the GELU of TensorFlow uses and tf2onnx lacks, as 1 - erf(x)."""
    (x,), (y,) = node.input, node.output
    shape, dtype = [ctx.get_shape(y)], [ctx.get_dtype(y)]
    one = ctx.make_const(f"{name}_one", np.array(1, "float32")).output[0]
    erf = ctx.make_node("Erf", [x], name=f"{name}_erf", shapes=shape, dtypes=dtype).output[0]
    ctx.remove_node(name)
    ctx.make_node("Sub", [one, erf], name=name, outputs=[y], shapes=shape, dtypes=dtype)


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Silence the given loggers, up to critical errors, and Python warnings during the block.

    Converters warn about layouts and their own deprecations, which do not concern the caller.
    Problems of a file are found by running it.
    """
    silenced = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in silenced]
    for logger in silenced:
        logger.setLevel("CRITICAL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(silenced, levels):
            logger.setLevel(level)
