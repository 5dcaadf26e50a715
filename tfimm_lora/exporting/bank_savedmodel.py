"""A bank as a SavedModel: its signatures predict, and load and unload adapters.

* ``serving_default(inputs, adapter)``: adapter is a text for each example, the name of an
  adapter, or "" for the model without one.
* ``by_slot(inputs, adapter)``: adapter is the number of a slot for each example.
* ``load(name, values, classes, labels)``: loads or replaces an adapter. ``values`` is what
  ``bank.packed`` returns, ``labels`` a text (JSON).
* ``unload(name)``.
* ``adapters()``: name, number of classes and labels of each slot; free slots have no name.

The first two return "outputs", padded with minus infinity (zero after a softmax) to the largest
number of classes, and "classes", the number of classes of each example.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.bank.functions import bank_outputs
from tfimm_lora.bank.layout import PAGE
from tfimm_lora.bank.source import OPTIONAL
from tfimm_lora.exporting.exported import TensorInfo
from tfimm_lora.exporting.writers import SIGNATURE, quiet

#: The inputs of the file besides those of the model.
INPUTS = (TensorInfo("adapter", (None,), "string"),)


def write(made: Any, path: Path) -> tuple[TensorInfo, ...]:
    """Write the SavedModel of a bank, and return its outputs.

    Args:
        made: The ``BankFile``.
        path: The folder.
    """
    import tensorflow as tf

    module = _module(made)
    (given,) = made.plan.file_inputs.tensors
    inputs = tf.TensorSpec(given.shape, given.dtype, given.name)
    layout = made.content.layout
    texts, text = tf.TensorSpec([None], tf.string, "adapter"), tf.TensorSpec([], tf.string)
    values = tf.TensorSpec([layout.pages, PAGE], tf.float32, "values")
    named = tf.TensorSpec(text.shape, text.dtype, "name")
    specs = {
        SIGNATURE: (module.by_name, [inputs, texts]),
        "by_slot": (module.by_slot, [inputs, tf.TensorSpec([None], tf.int32, "adapter")]),
        "load": (
            module.load,
            [
                named,
                values,
                tf.TensorSpec([], tf.int32, "classes"),
                tf.TensorSpec([], tf.string, "labels"),
            ],
        ),
        "unload": (module.unload, [named]),
        "adapters": (module.adapters, []),
    }
    signatures = {
        name: tf.function(function, input_signature=given, autograph=False)
        for name, (function, given) in specs.items()
    }
    with quiet("tensorflow"):
        tf.saved_model.save(module, str(path), signatures=signatures)
    return (
        TensorInfo("outputs", (None, layout.max_classes), "float32"),
        TensorInfo("classes", (None,), "int32"),
    )


def runner(made: Any, path: Path) -> Callable[[list[Any]], list[np.ndarray]]:
    """A function that runs the file on inputs with an adapter for each.

    Before that, an adapter is unloaded and loaded again, as a user would.
    """
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))
    serve, (given,) = loaded.signatures[SIGNATURE], made.plan.file_inputs.tensors
    names = [name for name in made.content.entries if name is not None]
    for name in names[:1]:
        entry = made.content.entries[name]
        loaded.signatures["unload"](name=tf.constant(name))
        loaded.signatures["load"](
            name=tf.constant(name),
            values=tf.constant(made.bank.packed(name)),
            classes=tf.constant(entry.classes),
            labels=tf.constant(json.dumps(entry.labels)),
        )

    def run(rows: list[Any], held: Any = loaded) -> list[np.ndarray]:
        inputs = tf.constant(np.stack([x for x, _ in rows]))
        adapters = tf.constant([name or "" for _, name in rows])
        received = serve(**{given.name: inputs, "adapter": adapters})
        counts = received["classes"].numpy()
        outputs = received["outputs"].numpy()
        # Without a classifier there are no classes.
        return [x[:n] if n else x for x, n in zip(outputs, counts)]

    return run


def extra_files(path: Path) -> list[Path]:
    """The files beside the SavedModel: none."""
    return []


def _module(made: Any) -> Any:
    """The variables and functions of the SavedModel."""
    import tensorflow as tf

    model, layout, entries = made.content.model, made.content.layout, made.content.entries
    count = max(made.bank.capacity + 1, len(entries))
    names = list(entries)
    slots = [made.bank.packed(name) for name in names]
    empty = [np.zeros_like(slots[0])] * (count - len(names))
    free = [""] * (count - len(names))

    class Bank(tf.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="bank")
            table = np.concatenate([*slots, *empty])
            self.table = tf.Variable(table, trainable=False, name="table")
            self.names = tf.Variable([name or "" for name in names] + free, name="names")
            sizes = [entry.classes for entry in entries.values()] + [0] * len(free)
            self.classes = tf.Variable(sizes, dtype=tf.int32, name="classes")
            labels = [json.dumps(entry.labels) for entry in entries.values()]
            self.labels = tf.Variable([*labels, *free], name="labels")
            self.weights = list(model.variables)

        def by_slot(self, inputs: Any, adapter: Any) -> dict[str, Any]:
            if made.plan.prepare is not None:
                inputs = made.plan.prepare(inputs)
            valid = (adapter >= 0) & (adapter < count)
            with tf.control_dependencies(
                [tf.debugging.Assert(tf.reduce_all(valid), ["no such slot", adapter])]
            ):
                adapter = tf.identity(adapter)
            outputs, _ = bank_outputs(
                model, layout, self.table, inputs, adapter, False, made.optional
            )
            return {"outputs": outputs, "classes": tf.gather(self.classes, adapter)}

        def by_name(self, inputs: Any, adapter: Any) -> dict[str, Any]:
            return self.by_slot(inputs, self._slot(adapter))

        def load(self, name: Any, values: Any, classes: Any, labels: Any) -> dict[str, Any]:
            base = self.table[: layout.pages]
            used = tf.constant(_pages(layout, made.optional))
            same = tf.reduce_all((values == base) | used[:, None])
            checks = [
                tf.debugging.Assert(name != "", ["expected a name"]),
                tf.debugging.Assert(
                    (classes > 0) & (classes <= layout.max_classes), ["classes", classes]
                ),
                tf.debugging.Assert(
                    same, ["the adapter has DoRA or biases; no adapter of the file had them"]
                ),
            ]
            with tf.control_dependencies(checks):
                # The slot of this name, or else the first free one.
                order = tf.cast(self.names != name, tf.int32) + tf.cast(
                    (self.names != name) & (self.names != ""), tf.int32
                )
            slot = 1 + tf.argmin(order[1:], output_type=tf.int32)
            with tf.control_dependencies(
                [tf.debugging.Assert(order[slot] < 2, ["no slot is free; unload one first"])]
            ):
                slot = tf.identity(slot)
            rows = slot * layout.pages + tf.range(layout.pages)
            self.table.scatter_update(tf.IndexedSlices(values, rows))
            return self._set(slot, name, classes, labels)

        def unload(self, name: Any) -> dict[str, Any]:
            with tf.control_dependencies([tf.debugging.Assert(name != "", ["no name"])]):
                slot = self._slot(tf.expand_dims(name, 0))[0]
            return self._set(slot, tf.constant(""), tf.constant(0), tf.constant(""))

        def adapters(self) -> dict[str, Any]:
            return {
                "names": self.names.read_value(),
                "classes": self.classes.read_value(),
                "labels": self.labels.read_value(),
            }

        def _set(self, slot: Any, name: Any, classes: Any, labels: Any) -> dict[str, Any]:
            index = tf.reshape(slot, (1, 1))
            for variable, value in (
                (self.names, name),
                (self.classes, classes),
                (self.labels, labels),
            ):
                variable.scatter_nd_update(index, tf.reshape(value, (1,)))
            return {"slot": slot}

        def _slot(self, names: Any) -> Any:
            """The slots of names; the first one is that of the model without adapter, ""."""
            same = tf.cast(names[:, None] == self.names[None, :], tf.int32)
            known = tf.reduce_any(same > 0, axis=1)
            with tf.control_dependencies(
                [tf.debugging.Assert(tf.reduce_all(known), ["no such adapter among", names])]
            ):
                return tf.argmax(same, axis=1, output_type=tf.int32)

    return Bank()


def _pages(layout: Any, optional: frozenset[str]) -> np.ndarray:
    """Which pages of a slot the file uses."""
    used = np.ones(layout.pages, bool)
    for (path, name), part in layout.parts.items():
        if name in OPTIONAL and name not in optional and path not in layout.heads:
            used[part.first : part.first + part.pages] = False
    return used
