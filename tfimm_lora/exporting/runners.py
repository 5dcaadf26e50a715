"""Running an exported file, in the way that users without this package run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.exporting.serving import Inputs, outputs_for
from tfimm_lora.exporting.writers import SIGNATURE, load_keras, quiet
from tfimm_lora.utils.optional_imports import require

#: A function from arrays, in the order of the inputs, to the outputs by name.
Runner = Callable[[list[np.ndarray]], dict[str, np.ndarray]]


def runner_of(format: str, path: Path, inputs: Inputs, like: Any) -> Runner:
    """A function that runs a file.

    Args:
        format: The format of the file.
        path: The path of the file.
        inputs: The inputs of the file.
        like: The exported model, for the classes that a Keras file refers to.
    """
    names = [t.name for t in inputs.tensors]
    if format == "keras":
        return _keras_runner(path, inputs, like)
    run = _RUNNERS[format](path)
    return lambda arrays: run(dict(zip(names, arrays)))


def _keras_runner(path: Path, inputs: Inputs, like: Any) -> Runner:
    model = load_keras(path, like)
    return lambda arrays: outputs_for(model, inputs, arrays)


def _savedmodel_runner(path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve = loaded.signatures[SIGNATURE]

    def run(given: dict[str, np.ndarray], held: Any = loaded) -> dict[str, np.ndarray]:
        tensors = {name: tf.constant(array) for name, array in given.items()}
        return {name: y.numpy() for name, y in serve(**tensors).items()}

    return run


def _tflite_runner(path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    import tensorflow as tf

    with quiet():  # TensorFlow warns that its interpreter moves to another package
        run = tf.lite.Interpreter(str(path)).get_signature_runner(SIGNATURE)
    return lambda given: run(**given)


def _onnx_runner(path: Path) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    onnxruntime = require("onnxruntime", extra="onnx", why="Export to ONNX")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [y.name for y in session.get_outputs()]
    return lambda given: dict(zip(names, session.run(names, given)))


_RUNNERS = {
    "savedmodel": _savedmodel_runner,
    "tflite": _tflite_runner,
    "onnx": _onnx_runner,
}
