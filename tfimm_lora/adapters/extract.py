"""``extract_adapter``: the adapter that best approximates a full fine-tuning."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.decompose import check_rank_or_energy, extract_updates
from tfimm_lora.adapters.layer_update import LayerUpdate
from tfimm_lora.adapters.save import base_model_name
from tfimm_lora.adapters.torch_layout import kernel_in_torch_order, kind_of
from tfimm_lora.backend import backend_of
from tfimm_lora.layers.conversion import lora_class, supported
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora
from tfimm_lora.zoo.weights.module_names import ModelWeight, ModuleNames

#: Weights with other values than those of the base model, and these values.
Changes = list[tuple[ModelWeight, np.ndarray]]


def extract_adapter(
    base: Any,
    tuned: Any,
    rank: int | None = None,
    energy: float | None = None,
    *,
    base_model: str | None = None,
) -> Adapter:
    """Extract the best low-rank adapter from a model that was fine-tuned without LoRA.

    For the kernel of every layer that LoRA supports, it takes the best low-rank approximation
    of dW = W_tuned - W_base, by singular value decomposition. Everything else that changed is
    stored in full: the classifier, biases, normalization layers.

    Args:
        base: The model before fine-tuning: ordinary and built.
        tuned: The model after fine-tuning, of the same architecture. It may have other
            classes.
        rank: The rank of every update. Pass either this or ``energy``.
        energy: The fraction of each update's squared norm to keep, in (0, 1]. Each layer gets
            the smallest rank that keeps it.
        base_model: As in ``adapter_of``.

    Returns:
        The adapter, without the layers that did not change.

    Raises:
        TypeError: If rank or energy has the wrong type.
        ValueError: If the models differ in layers or shapes, have LoRA, or have equal kernels;
            if not exactly one of rank and energy is given, or it is out of range.

    Warns:
        UserWarning: For changed weights that an adapter cannot hold: a model's own variables,
            such as position embeddings.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> def make():
        ...     return tf.keras.Sequential([
        ...         tf.keras.Input((4,)), tf.keras.layers.Dense(4, name="fc1"),
        ...         tf.keras.layers.Dense(3, name="head")])
        >>> base, tuned = make(), make()
        >>> adapter = lora.extract_adapter(base, tuned, energy=0.9)
        >>> adapter.modules, sorted(adapter.layers)
        (('head',), ['fc1'])

    Reference: Eckart and Young, "The approximation of one matrix by another of lower rank",
    Psychometrika 1 (1936); differences of weights as task vectors: Ilharco et al., "Editing
    Models with Task Arithmetic", arXiv:2212.04089, section 2.
    """
    check_rank_or_energy(rank, energy)
    for role, model in (("base", base), ("tuned", tuned)):
        if has_lora(model):
            raise ValueError(
                f"Received {role} with LoRA layers; expected an ordinary model. "
                + (
                    "Use adapter_of(tuned) for its adapter."
                    if role == "tuned"
                    else "Call remove_lora(base, merge=False) first."
                )
            )
    names = ModuleNames(base)
    before = {weight.key: weight for weight in names.weights}
    after = {weight.key: weight for weight in ModuleNames(tuned).weights}
    heads = classifier_paths(base)
    _check_same_architecture(before, after, [f"{names.modules[path]}." for path in heads])
    kernels = {id(v): path for path, v in _kernels(names).items() if path not in heads}
    differences: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    others: Changes = []
    for key, weight in before.items():
        old, new = weight.value(), after[key].value()
        if old.shape == new.shape and np.array_equal(old, new):
            continue
        path = kernels.get(id(weight.variable))
        if path is None:
            others.append((weight, new))
            continue
        layer, module = names.layers[path], names.modules[path]
        backend = backend_of(layer)
        values = [backend.to_numpy(w.variable).astype("float64") for w in (weight, after[key])]
        differences[module] = kernel_in_torch_order(layer, values[1] - values[0])
        kinds[module] = kind_of(layer)
    if not differences:
        raise ValueError(
            f"Received base '{base.name}' and tuned '{tuned.name}' with equal kernels; "
            "expected a tuned model whose kernels changed."
        )
    layers = extract_updates(differences, rank, energy, kinds)
    layers = {module: _as_float32(update) for module, update in layers.items()}
    modules, weights, lost = _full_weights(names, others, set(layers))
    # As in PEFT, a fully trained module has all of its weights in the file.
    for key, weight in before.items():
        if key not in weights and names.modules.get(weight.path) in modules:
            weights[key] = weight.value()
    if lost:
        warnings.warn(
            f"{', '.join(lost)} changed, but an adapter cannot hold them. They are left out.",
            stacklevel=2,
        )
    outside = [key for key in weights if not any(key.startswith(f"{m}.") for m in modules)]
    return Adapter(
        layers,
        weights,
        modules,
        base_model_name(base) if base_model is None else base_model,
        "all" if outside else "none",
    )


def _check_same_architecture(
    before: dict[str, ModelWeight], after: dict[str, ModelWeight], heads: list[str]
) -> None:
    """Raise unless both models have the same weights, but for the sizes of the classifier."""
    problems = [f"only one has {key}" for key in sorted(set(before) ^ set(after))]
    for key in set(before) & set(after):
        shapes = [tuple(w.variable.shape) for w in (before[key], after[key])]
        if shapes[0] != shapes[1] and not any(key.startswith(head) for head in heads):
            problems.append(f"{key} has {shapes[0]} in base, {shapes[1]} in tuned")
    if problems:
        raise ValueError(
            f"Received models of different architectures: {'; '.join(problems[:20])}. Expected "
            "the same architecture, up to the number of classes."
        )


def _kernels(names: ModuleNames) -> dict[str, Any]:
    """Return the kernel variable of every layer that LoRA supports, by path."""
    found = {}
    for path, layer in names.layers.items():
        if supported(layer):
            role = lora_class(type(layer))._kernel_role  # type: ignore[attr-defined]
            found[path] = layer.__dict__[backend_of(layer).kernel_attributes[role]]
    return found


def _as_float32(update: LayerUpdate) -> LayerUpdate:
    return LayerUpdate(
        update.a.astype("float32"), update.b.astype("float32"), update.scale, update.kind
    )


def _full_weights(
    names: ModuleNames, changes: Changes, adapted: set[str]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Return the modules and weights to store in full, and the keys that cannot be stored."""
    by_layer: dict[str, Changes] = {}
    for weight, value in changes:
        by_layer.setdefault(weight.path, []).append((weight, value))
    modules, weights, lost = [], {}, []
    for path, changed in by_layer.items():
        module = names.modules.get(path)
        biases = [pair for pair in changed if pair[0].is_bias()]
        has_adapted = any(name == module or name.startswith(f"{module}.") for name in adapted)
        if len(biases) < len(changed):
            if module is None or has_adapted:
                lost += [weight.key for weight, _ in changed if not weight.is_bias()]
                changed = biases
            else:
                modules.append(module)
        weights.update({weight.key: value for weight, value in changed})
    return tuple(sorted(modules)), weights, lost
