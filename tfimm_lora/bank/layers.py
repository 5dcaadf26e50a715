"""Give a model the layers of a bank: LoRA in every layer that its adapters can change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.lora_arguments import exact_targets
from tfimm_lora.backend import backend_of
from tfimm_lora.config import Targets
from tfimm_lora.layers.base import LoRALayer, has_keras_call
from tfimm_lora.layers.conversion import kernel_variable, supported
from tfimm_lora.layers.einsum_dense import positions_of
from tfimm_lora.layers.normalization import bias_refusal
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.inject import inject_lora, remove_lora
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.model.targeting import check_ready, config_for, select
from tfimm_lora.zoo.weights.module_names import ModuleNames


@dataclass(frozen=True)
class BankLayers:
    """The layers of a model that adapters of a bank can change.

    Attributes:
        names: The names of the model.
        adapted: Path -> layer, for those with factors and for classifiers.
        biased: Path -> layer, for those of which only the bias can change.
        heads: The paths of the classifiers.
        refused: Path -> why a layer with LoRA cannot be in a bank.
    """

    names: ModuleNames
    adapted: dict[str, LoRALayer]
    biased: dict[str, Any]
    heads: tuple[str, ...]
    refused: dict[str, str]

    def largest_rank(self, adapters: Iterable[Adapter]) -> int:
        """The largest rank of adapters in these layers, 0 if there are none."""
        return max(
            (
                self._rank(self.names.paths.get(module), update)
                for adapter in adapters
                for module, update in adapter.layers.items()
            ),
            default=0,
        )

    def _rank(self, path: str | None, update: LayerUpdate) -> int:
        if path in self.heads:  # merged into the classifier
            return 1
        if update.kind != "batched" or path not in self.adapted:
            return update.lora_rank
        return update.rank // positions_of(self.adapted[path])

    def most_classes(self, adapters: Iterable[Adapter]) -> int:
        """The largest number of classes of the model and of adapters; 1 without classifier."""
        found = [int(self.adapted[path]._kernel_variable.shape[-1]) for path in self.heads]
        for weight in self.names.weights:
            if weight.path in self.heads:
                keys = (weight.key, *weight.old_keys)
                values = (a.weights[key] for a in adapters for key in keys if key in a.weights)
                found += [len(value) for value in values]
        return max(found, default=1)


def inject_bank(model: Any, adapters: Iterable[Adapter], targets: Targets) -> BankLayers:
    """Inject LoRA of rank 1, without effect, into the layers of a bank.

    Args:
        model: A built model without LoRA.
        adapters: Adapters with the names of the model.
        targets: The layers; None for those of the adapters, or without adapters the default.

    Raises:
        ValueError: If the model has LoRA or is not built, or a layer of ``targets`` cannot be
            in a bank. The model is unchanged.
    """
    check_ready(model)
    names = ModuleNames(model)
    heads = _heads(model, names)
    given = targets is not None
    if targets is None and adapters:
        modules = dict.fromkeys(module for adapter in adapters for module in adapter.layers)
        chosen = [names.paths[m] for m in modules if m in names.paths]
        chosen = [path for path in chosen if names.is_adaptable(path)]
    else:
        arguments = {} if targets is None else {"lora_targets": targets}
        selection = select(model, config_for(model, arguments, "AdapterBank"))
        if selection.errors:
            raise selection.errors[0]
        chosen = list(selection.layers)
    biased = [path for path in _trained_biases(names, adapters) if path not in heads]
    only_bias = [path for path in biased if path not in chosen]
    with_lora = [path for path in only_bias if names.is_adaptable(path)]
    paths = list(dict.fromkeys([*chosen, *heads, *with_lora]))
    inject_lora(model, lora_rank=1, lora_targets=exact_targets(paths, list(names.layers)))
    refused = {
        path: reason
        for path, layer in lora_layers(model).items()
        if (reason := layer.mixed_batch_refusal()) is not None
    }
    unwanted = {path: refused[path] for path in chosen if path in refused}
    if given and unwanted:
        remove_lora(model, merge=False)
        listed = "; ".join(f"{path} {reason}" for path, reason in unwanted.items())
        raise ValueError(
            f"Received targets={targets!r} for a bank of model '{model.name}', in which some "
            f"layers cannot have an adapter for each example: {listed}. Leave them out of the "
            "targets."
        )
    usable = {path: x for path, x in lora_layers(model).items() if path not in refused}
    after = ModuleNames(model)
    shifted = {}
    for path in only_bias:
        layer = after.layers[path]
        if path in usable:
            why = layer.shift_refusal()
            why = why and f"cannot add it by example: {why}"
        else:
            why = refused.get(path) or bias_refusal(layer)
        if why is None:
            shifted[path] = layer
        else:
            refused[path] = why
    adapted = {path: x for path, x in usable.items() if path not in only_bias}
    # In a class with a call of its own a new kernel would be used without that call.
    heads = [path for path in heads if path in usable and has_keras_call(type(usable[path]))]
    return BankLayers(after, adapted, shifted, tuple(heads), refused)


def _trained_biases(names: ModuleNames, adapters: Iterable[Adapter]) -> list[str]:
    """The paths of the layers whose biases are among the fully trained weights of adapters."""
    found = [
        weight.path
        for weight in names.weights
        if weight.is_bias()
        and any(k in a.weights for a in adapters for k in (weight.key, *weight.old_keys))
    ]
    return list(dict.fromkeys(found))


def _heads(model: Any, names: ModuleNames) -> list[str]:
    """The paths of the classifiers: dense layers and 1x1 convolutions."""
    layers = backend_of(model).keras.layers
    found = []
    for path in classifier_paths(model):
        layer = names.layers[path]
        window = tuple(kernel_variable(layer).shape[:-2]) if supported(layer) else ()
        is_dense = isinstance(layer, layers.Dense)
        is_pointwise = isinstance(layer, layers.Conv2D) and set(window) == {1}
        is_pointwise = is_pointwise and layer.groups == 1
        if is_dense or is_pointwise:
            found.append(path)
    return found
