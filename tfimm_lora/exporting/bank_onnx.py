"""A bank as one ONNX graph and a file for each adapter, as ONNX Runtime's adapters.

The factors, and what else an adapter has, are inputs of the graph with default values, those of
the model without adapter. ONNX Runtime sets them from an ``.onnx_adapter`` file:

    adapter = onnxruntime.LoraAdapter()
    adapter.Load("pets.adapters/cats.onnx_adapter")
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session.run(None, {"inputs": pictures}, options)

All examples of a run use one adapter. The outputs are padded with minus infinity (zero after a
softmax) to the largest number of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tfimm_lora.bank.layout import Layout, PartKey
from tfimm_lora.bank.source import OPTIONAL
from tfimm_lora.exporting.description import file_metadata
from tfimm_lora.exporting.exported import TensorInfo
from tfimm_lora.exporting.serving import OUTPUT, concrete_function
from tfimm_lora.exporting.writers import onnx_of, write_onnx_proto
from tfimm_lora.layers.mixed_batch import RowValues, using
from tfimm_lora.utils.optional_imports import require

#: The inputs of the file besides those of the model, which users need not give.
INPUTS: tuple[TensorInfo, ...] = ()

#: The suffix of the folder with the adapters, and of the files in it.
FOLDER, SUFFIX = ".adapters", ".onnx_adapter"


class _Given:
    """The source of a model that is traced: values are tensors, the same for all examples."""

    uniform = True

    def __init__(self, layout: Layout, tensors: dict[PartKey, Any]) -> None:
        self.foldable: dict[int, Any] = {}
        self._paths = {id(layer): path for path, layer in layout.layers.items()}
        self._tensors = tensors

    def values(self, layer: Any) -> RowValues | None:
        path = self._paths.get(id(layer))
        if path is None:
            return None
        parts = {name: self._tensors.get((path, name)) for name in RowValues._fields}
        return RowValues(**parts)


def write(made: Any, path: Path) -> tuple[TensorInfo, ...]:
    """Write the graph and the adapters, and return the outputs.

    Args:
        made: The ``BankFile``.
        path: The file; the adapters are written to a folder beside it.
    """
    import tensorflow as tf

    layout, model = made.content.layout, made.content.model
    (given,) = made.plan.file_inputs.tensors
    keys = _keys(made)
    names = _names(made, keys)

    def serve(inputs: Any, *values: Any) -> dict[str, Any]:
        if made.plan.prepare is not None:
            inputs = made.plan.prepare(inputs)
        with using(_Given(layout, dict(zip(keys, values)))):
            return {OUTPUT: model(inputs, training=False)}

    specs = [tf.TensorSpec(given.shape, given.dtype, given.name)]
    specs += [tf.TensorSpec(layout.parts[key].shape, tf.float32, names[key]) for key in keys]
    traced = concrete_function(serve, specs, inline=True)
    proto = onnx_of(traced, made.plan.request.opset)
    _set_defaults(proto, made, keys, names)
    properties = file_metadata(
        None, made.plan.preprocessing, made.plan.prepare is not None, None
    )
    write_onnx_proto(proto, path, properties)
    folder = adapters_folder(path)
    folder.mkdir()
    for name in made.content.entries:
        if name is not None:
            _write_adapter(made, keys, names, name, folder / _file_name(name))
    return (TensorInfo(OUTPUT, (None, layout.max_classes), "float32"),)


def runner(made: Any, path: Path) -> Callable[[list[Any]], list[np.ndarray]]:
    """A function that runs the file on inputs with an adapter for each."""
    onnxruntime = require("onnxruntime", extra="onnx", why="Export to ONNX")
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of every input with a default value
    session = onnxruntime.InferenceSession(str(path), quiet, ["CPUExecutionProvider"])
    (given,) = made.plan.file_inputs.tensors

    def run(rows: list[Any]) -> list[np.ndarray]:
        outputs = []
        for x, name in rows:
            options = onnxruntime.RunOptions()
            if name is not None:
                adapter = onnxruntime.LoraAdapter()
                adapter.Load(str(adapters_folder(path) / _file_name(name)))
                options.add_active_adapter(adapter)
            (found,) = session.run(None, {given.name: x[None]}, options)
            outputs.append(found[0])
        return outputs

    return run


def extra_files(path: Path) -> list[Path]:
    """The folder with the adapters."""
    return [adapters_folder(path)]


def adapters_folder(path: Path) -> Path:
    """The folder with the adapters of an ONNX file."""
    return path.with_name(path.stem + FOLDER)


def _file_name(name: str) -> str:
    return quote(name, safe="") + SUFFIX


def _keys(made: Any) -> list[PartKey]:
    """The parts that are inputs of the graph."""
    layout = made.content.layout
    left_out = frozenset(OPTIONAL) - made.optional
    return [
        (path, name)
        for path, name in layout.parts
        if path in layout.heads or name not in left_out
    ]


def _names(made: Any, keys: list[PartKey]) -> dict[PartKey, str]:
    """The names of the inputs: "blocks.0.attn.qkv.lora_a", "head.kernel"."""
    words = {"a": "lora_a", "b": "lora_b", "gain": "dora_gain", "shift": "bias_change"}
    heads = made.content.layout.heads
    of_head = {"kernel": "kernel", "shift": "bias"}
    return {
        (path, name): f"{path.replace('/', '.')}.{(of_head if path in heads else words)[name]}"
        for path, name in keys
    }


def _values(made: Any, keys: list[PartKey], name: str | None) -> dict[PartKey, np.ndarray]:
    slot = made.bank.packed(name)
    layout = made.content.layout
    return {key: np.ascontiguousarray(layout.unpack(slot, key)) for key in keys}


def _set_defaults(
    proto: Any, made: Any, keys: list[PartKey], names: dict[PartKey, str]
) -> None:
    """Give the inputs of the graph the values of the model without adapter."""
    onnx = require("onnx", extra="onnx", why="Export to ONNX")
    known = {value.name for value in proto.graph.input}
    for key, value in _values(made, keys, None).items():
        if names[key] in known:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, names[key]))


def _write_adapter(
    made: Any, keys: list[PartKey], names: dict[PartKey, str], name: str, path: Path
) -> None:
    onnxruntime = require("onnxruntime", extra="onnx", why="Export to ONNX")
    values = {
        names[key]: onnxruntime.OrtValue.ortvalue_from_numpy(value)
        for key, value in _values(made, keys, name).items()
    }
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))
