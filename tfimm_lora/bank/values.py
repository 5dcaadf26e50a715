"""The values of an adapter for the layers of a bank."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.fit import weight_values
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.torch_layout import DoesNotFit, gains, own_factors
from tfimm_lora.bank.layout import Layout, PartKey
from tfimm_lora.zoo.weights.module_names import ModelWeight, ModuleNames


class AdapterValues(NamedTuple):
    """The values of an adapter in a bank.

    Attributes:
        parts: Part -> value, at the rank and with the classes of the adapter.
        optional: Which of ``source.OPTIONAL`` the adapter has.
        changed: The paths of the layers whose outputs it changes.
        classes: The number of its classes.
    """

    parts: dict[PartKey, np.ndarray]
    optional: frozenset[str]
    changed: frozenset[str]
    classes: int


class ValuesOfAdapters:
    """Compute the values of adapters for the layers of a bank.

    Args:
        names: The names of the model.
        layout: The layout of the bank.
        refused: Path -> why a layer that can have LoRA cannot be in the bank.
    """

    def __init__(self, names: ModuleNames, layout: Layout, refused: dict[str, str]) -> None:
        self.names, self.layout, self.refused = names, layout, refused
        self._weights = {(w.path, _role(w)): w for w in names.weights}
        self.base = self._of_base()

    def _of_base(self) -> AdapterValues:
        """The values of the model without adapter."""
        parts: dict[PartKey, np.ndarray] = {}
        classes = 0
        for (path, name), part in self.layout.parts.items():
            if name == "gain":
                parts[path, name] = np.ones(part.shape, "float32")
        for path in self.layout.heads:
            kernel = self._weights[path, "kernel"].raw_value().astype("float32")
            bias = self._weights.get((path, "bias"))
            classes = kernel.shape[-1]
            parts[path, "kernel"] = kernel
            parts[path, "shift"] = self._padded_bias(
                np.zeros(classes) if bias is None else bias.raw_value()
            )
        return AdapterValues(parts, frozenset(), frozenset(), classes)

    def of(self, adapter: Adapter) -> AdapterValues:
        """The values of an adapter that has the names of the model.

        Raises:
            ValueError: If it does not fit the model or the bank. The message names everything
                that does not.
        """
        heads, others = self._split_weights(adapter)
        rest = dataclasses.replace(adapter, weights=others, modules=())
        fitting = weight_values(self.names, rest)
        problems: list[str] = []
        parts = dict(self.base.parts)
        optional: set[str] = set()
        classes = self._add_heads(parts, heads, problems)
        for module, update in adapter.layers.items():
            path = self.names.paths[module]
            try:
                if path in self.layout.heads:
                    self._add_update_of_head(parts, path, update, classes)
                else:
                    optional |= self._add_update(parts, path, update)
            except DoesNotFit as error:
                problems.append(f"{module} {error}")
        for weight, value in fitting:
            problem = self._add_bias(parts, weight, value)
            problems += [problem] if problem else []
            optional.add("shift")
        if problems:
            raise ValueError(
                f"Received an adapter that does not fit the bank: {'; '.join(problems)}. "
                "The bank is unchanged."
            )
        changed = frozenset(
            path
            for (path, name), value in parts.items()
            if name != "a" and value is not self.base.parts.get((path, name)) and value.any()
        )
        return AdapterValues(parts, frozenset(optional), changed, classes)

    def _split_weights(
        self, adapter: Adapter
    ) -> tuple[dict[PartKey, np.ndarray], dict[str, np.ndarray]]:
        """The fully trained weights of the classifiers by part, and all others by key."""
        known = {
            key: (path, role)
            for (path, role), weight in self._weights.items()
            for key in (weight.key, *weight.old_keys)
            if path in self.layout.heads
        }
        heads = {known[k]: x for k, x in adapter.weights.items() if k in known}
        return heads, {k: x for k, x in adapter.weights.items() if k not in known}

    def _add_heads(
        self,
        parts: dict[PartKey, np.ndarray],
        heads: dict[PartKey, np.ndarray],
        problems: list[str],
    ) -> int:
        """Add trained weights of classifiers, and return the number of classes."""
        sizes = {len(value) for value in heads.values()}
        if len(sizes) > 1:
            problems.append(f"its classifiers have {sorted(sizes)} classes")
            return self.base.classes
        classes = sizes.pop() if sizes else self.base.classes
        if classes > self.layout.max_classes:
            problems.append(
                f"its classifier has {classes} classes, more than max_classes="
                f"{self.layout.max_classes}"
            )
            return self.base.classes
        for path in self.layout.heads:
            for role in ("kernel", "bias"):
                if (path, role) not in self._weights:
                    if role == "bias":
                        parts[path, "shift"] = self._padded_bias(np.zeros(classes))
                    continue
                weight, value = self._weights[path, role], heads.get((path, role))
                expected = (classes, *weight.value().shape[1:])
                if value is None:
                    # That of the model, which has as many classes.
                    if classes != self.base.classes:
                        problems.append(f"it has {classes} classes, but no {weight.key}")
                elif math.prod(value.shape) != math.prod(expected):
                    problems.append(
                        f"{weight.key} has the shape {value.shape}, expected {expected}"
                    )
                elif role == "bias":
                    parts[path, "shift"] = self._padded_bias(value.reshape(-1))
                else:
                    kernel = value.reshape(classes, -1).T
                    inputs = self.layout.parts[path, "kernel"].shape[:-1]
                    parts[path, "kernel"] = kernel.reshape(*inputs, classes)
        return classes

    def _padded_bias(self, bias: np.ndarray) -> np.ndarray:
        """A bias with minus infinity for the classes that there are not."""
        padded = np.full(self.layout.max_classes, -np.inf, "float32")
        padded[: len(bias)] = bias
        return padded

    def _add_update(
        self, parts: dict[PartKey, np.ndarray], path: str, update: LayerUpdate
    ) -> set[str]:
        """Add the update of a layer, and return which optional parts it has."""
        layer = self._layer(path)
        a, b = own_factors(layer, update)
        if a.shape[-1] > self.layout.max_rank:
            raise DoesNotFit(
                f"has rank {a.shape[-1]}, more than max_rank={self.layout.max_rank}"
            )
        parts[path, "a"], parts[path, "b"] = a, b
        optional = set()
        if update.magnitude is not None:
            parts[path, "gain"] = layer.outputs_in_order(gains(layer, update))
            optional.add("gain")
        if update.bias is not None:
            if (path, "shift") not in self.layout.parts:
                raise DoesNotFit(f"cannot have lora_bias: {layer.shift_refusal()}")
            parts[path, "shift"] = update.scale * update.bias
            optional.add("shift")
        return optional

    def _add_update_of_head(
        self, parts: dict[PartKey, np.ndarray], path: str, update: LayerUpdate, classes: int
    ) -> None:
        """Add the update of a classifier that is not fully trained, merged into its kernel."""
        kernel = parts[path, "kernel"]
        adapted = update.effective_kernel(kernel.reshape(-1, classes).T).reshape(classes, -1)
        parts[path, "kernel"] = adapted.T.reshape(kernel.shape)
        if update.bias is not None:
            shift = parts[path, "shift"].copy()
            shift[:classes] += update.scale * update.bias
            parts[path, "shift"] = shift

    def _add_bias(
        self, parts: dict[PartKey, np.ndarray], weight: ModelWeight, value: np.ndarray
    ) -> str | None:
        """Add a trained bias, and return why that is not possible, if it is not."""
        path = weight.path
        if not weight.is_bias():
            return f"{weight.key} is fully trained; expected factors, classifiers and biases"
        if (path, "shift") not in self.layout.parts:
            why = self.refused.get(path, "is not among those that the bank was made for")
            if path in self.layout.layers:
                why = f"cannot add it by example: {self.layout.layers[path].shift_refusal()}"
            return f"{weight.key} is trained, and its layer {why}"
        change = weight.in_keras_order(value) - weight.raw_value()
        known = parts.get((path, "shift"), np.zeros(change.size, "float32"))
        parts[path, "shift"] = known + change.reshape(-1)
        return None

    def _layer(self, path: str) -> Any:
        if (path, "a") not in self.layout.parts:
            raise DoesNotFit(self.refused.get(path, "is not among the targets of the bank"))
        return self.layout.layers[path]


def _role(weight: ModelWeight) -> str:
    """The name of a weight in its layer: "kernel", "bias", ..."""
    return weight.target.name.rpartition("/")[2]
