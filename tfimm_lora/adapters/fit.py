"""Whether the layers and weights of an adapter fit a model, with all problems in one error."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.base_architecture import architecture_differences
from tfimm_lora.adapters.incomplete import missing_weights
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.torch_layout import (
    DoesNotFit,
    branch_bias_refusal,
    kernel_shape,
    kinds_agree,
    magnitude_for,
    shapes_agree,
    sure_kind,
    values_for,
)
from tfimm_lora.families.recognize import explanation
from tfimm_lora.layer_paths import nearest
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.layers.state import Values
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.zoo.weights.module_names import ModelWeight, ModuleNames

#: Weights of a model with the values that an adapter has for them.
WeightValues = list[tuple[ModelWeight, np.ndarray]]

#: The number of problems that an error message lists.
_MAX_LISTED = 20
#: The same if all of them have one cause, which the message gives.
_MAX_LISTED_OF_OTHERS = 3


class FittedUpdate(NamedTuple):
    """An update that fits a LoRA layer, with the values of the layer's variables for it."""

    layer: LoRALayer
    update: LayerUpdate
    values: Values

    def assign(self) -> None:
        """Assign the update to the layer, whose kernel must have its final value."""
        magnitude = magnitude_for(self.layer, self.update)
        self.layer.assign_update({**self.values, **magnitude})


def check_fits(model: Any, adapter: AdapterData) -> None:
    """Raise a ValueError if the model lacks a layer or weight of the adapter.

    The message names all layers and weights that are missing or have another shape or kind.
    """
    weight_values(ModuleNames(model), adapter)


def weight_values(names: ModuleNames, adapter: AdapterData) -> WeightValues:
    """Return the weights that an adapter replaces, with their values in torch's order.

    Raises:
        ValueError: If a layer or a weight of the adapter does not fit; see ``check_fits``.
    """
    problems = architecture_differences(names.model, adapter)
    problems += _layer_problems(names, adapter.layers)
    problems += missing_weights(names, adapter)
    # Current names last: they take precedence over an equal older name of another layer.
    known = {key: weight for weight in names.weights for key in weight.old_keys}
    known.update({weight.key: weight for weight in names.weights})
    counts = Counter(weight.key for weight in names.weights)
    values: WeightValues = []
    other_classes = False
    for key, value in adapter.weights.items():
        weight = known.get(key)
        if counts[key] > 1:
            problems.append(f"{counts[key]} weights called {key}")
        elif weight is None:
            problems.append(f"no weight {key}")
        elif not weight.fits(value):
            problems.append(f"{key} has {weight.value().shape}, the adapter {value.shape}")
            other_classes |= weight.path in classifier_paths(names.model)
        else:
            values.append((weight, value))
    if problems:
        raise does_not_fit_error(names.model, adapter, problems, other_classes)
    return values


def fitted_updates(names: ModuleNames, adapter: AdapterData) -> list[FittedUpdate]:
    """Return the update of each LoRA layer of a model, with its values in Keras' order.

    Raises:
        DoesNotFit: If the model has LoRA in other layers, or of another rank or variant.
    """
    layers = names.adapted()
    updates = {names.paths[module]: x for module, x in adapter.layers.items()}
    differing = sorted(set(layers) ^ set(updates))
    if differing:
        raise DoesNotFit(f"has LoRA in other layers: {', '.join(differing)}")
    fitted = []
    for path, layer in layers.items():
        try:
            fitted.append(FittedUpdate(layer, updates[path], values_for(layer, updates[path])))
        except DoesNotFit as error:
            raise DoesNotFit(f"{names.modules[path]} {error}") from error
    return fitted


def does_not_fit_error(
    model: Any, adapter: AdapterData, problems: list[str], other_classes: bool = False
) -> ValueError:
    """Return the error for an adapter that does not fit a model.

    Args:
        model: The model.
        adapter: The adapter.
        problems: What does not fit.
        other_classes: Whether the adapter's classifier has another number of classes.
    """
    whose = explanation([*adapter.layers], ModuleNames(model).naming, hint=adapter.base_model)
    count = _MAX_LISTED
    if whose:  # the nearest names of another library do not help
        count = _MAX_LISTED_OF_OTHERS
        problems = [problem.partition(" (nearest: ")[0] for problem in problems]
    listed = "; ".join(problems[:count])
    hidden = len(problems) - count
    more = f"; and {hidden} more" if hidden > 0 else ""
    of = f" of {adapter.base_model!r}" if adapter.base_model else ""
    remedy = "Load it into the model that it was trained on"
    if other_classes:
        remedy += ", with as many classes: create_model(..., nb_classes=...)"
    return ValueError(
        f"Received an adapter{of} that does not fit model '{model.name}' "
        f"({type(model).__name__}): {listed}{more}.{f' {whose}' if whose else ''} {remedy}. "
        "The model is unchanged."
    )


def _layer_problems(names: ModuleNames, updates: Any) -> list[str]:
    adaptable = {m for m, path in names.paths.items() if names.is_adaptable(path)}
    problems = []
    for module, update in updates.items():
        if module in adaptable:
            problems += _layer_problem(names.layers[names.paths[module]], module, update)
            continue
        near = ", ".join(nearest([module.replace(".", "/")], sorted(adaptable), 3))
        problems.append(f"no layer {module}" + (f" (nearest: {near})" if near else ""))
    return problems


def _layer_problem(layer: Any, module: str, update: LayerUpdate) -> list[str]:
    shape, kind = kernel_shape(layer), sure_kind(layer)
    refusal = branch_bias_refusal(layer) if update.bias is not None else None
    if refusal:
        return [f"{module} cannot take the bias of its branch (lora_bias): {refusal}"]
    if not shapes_agree(update, shape, update.shape):
        problem = f"{module} is of shape {shape}, the update {update.shape}"
        if len(update.shape) == 2 and math.prod(shape) == math.prod(update.shape):
            problem += (
                " without the size of the window (if it was combined from adapters of PEFT's "
                "LoHa, load these into the model first, and combine adapter_of(model))"
            )
        return [problem]
    if kind is not None and not kinds_agree(update, kind):
        return [f"{module} is of the kind {kind!r}, the update {update.kind!r}"]
    return []
