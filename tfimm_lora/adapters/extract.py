"""``extract_adapter``: the adapter that best explains a model that was fine-tuned whole."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.adapters.decompose import check_rank_or_energy, extract_updates
from tfimm_lora.adapters.module_names import ModelWeight, ModuleNames
from tfimm_lora.adapters.save import base_model_name
from tfimm_lora.adapters.torch_layout import kernel_in_torch_order, kind_of
from tfimm_lora.backend import backend_of
from tfimm_lora.layers.conversion import lora_class, supported
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora


def extract_adapter(
    base: Any,
    tuned: Any,
    rank: int | None = None,
    energy: float | None = None,
    *,
    base_model: str | None = None,
) -> Adapter:
    """The adapter of the smallest error for a model that was fine-tuned without LoRA.

    For the kernel of every layer that LoRA supports it takes the best approximation of
    dW = W_tuned - W_base of a rank, by singular value decomposition. Everything else that
    changed is held whole: the classifier, biases, the layers of norms.

    Args:
        base: The model before, ordinary and built.
        tuned: The model after; of the same architecture, also with other classes.
        rank: The rank of every update, or ...
        energy: ... the share of every update's squared norm to hold, in (0, 1]; each layer
            gets the smallest rank that does. Just one of the two is given.
        base_model: As in ``adapter_of``.

    Returns:
        The adapter. Layers that did not change are not in it.

    Raises:
        ValueError: if the models have other layers or shapes, or LoRA in them, if no kernel
            changed, or unless just one of rank and energy is given, in its range.

    Warns:
        UserWarning: for changed weights that an adapter has no place for: a model's own
            variables, such as position embeddings.

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
                + ("adapter_of(tuned) is its adapter." if role == "tuned" else "")
            )
    names, others = ModuleNames(base), ModuleNames(tuned)
    before = {w.key: w for w in names.weights}
    after = {w.key: w for w in others.weights}
    heads = classifier_paths(base)
    _check_alike(before, after, [f"{names.modules[path]}." for path in heads])
    kernels = {id(v): path for path, v in _kernels(names).items() if path not in heads}
    differences: dict[str, np.ndarray] = {}
    kinds: dict[str, str] = {}
    whole: list[tuple[ModelWeight, np.ndarray]] = []
    for key, weight in before.items():
        mine, theirs = weight.value(), after[key].value()
        if mine.shape == theirs.shape and np.array_equal(mine, theirs):
            continue
        path = kernels.get(id(weight.variable))
        if path is None:
            whole.append((weight, theirs))
            continue
        layer, module = names.layers[path], names.modules[path]
        backend = backend_of(layer)
        values = [backend.to_numpy(w.variable).astype("float64") for w in (weight, after[key])]
        differences[module] = kernel_in_torch_order(layer, values[1] - values[0])
        kinds[module] = kind_of(layer)
    if not differences:
        raise ValueError(
            f"Received base '{base.name}' and tuned '{tuned.name}', whose kernels are the "
            "same; there is nothing to explain by LoRA."
        )
    layers = extract_updates(differences, rank, energy, kinds)
    layers = {m: _single(update) for m, update in layers.items()}
    modules, weights, lost = _held_whole(names, whole, set(layers))
    if lost:
        warnings.warn(
            f"{', '.join(lost)} changed, for which an adapter has no place: they are left out.",
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


def _check_alike(
    before: dict[str, ModelWeight], after: dict[str, ModelWeight], heads: list[str]
) -> None:
    problems = [f"only one has {key}" for key in sorted(set(before) ^ set(after))]
    for key in set(before) & set(after):
        shapes = [tuple(w.variable.shape) for w in (before[key], after[key])]
        if shapes[0] != shapes[1] and not any(key.startswith(head) for head in heads):
            problems.append(f"{key} has {shapes[0]} in base, {shapes[1]} in tuned")
    if problems:
        raise ValueError(
            f"Received models that are not of one architecture: {'; '.join(problems[:20])}."
        )


def _kernels(names: ModuleNames) -> dict[str, Any]:
    """The kernel variable of every layer that LoRA supports, by path."""
    found = {}
    for path, layer in names.layers.items():
        if supported(layer):
            role = lora_class(type(layer))._kernel_role  # type: ignore[attr-defined]
            found[path] = layer.__dict__[backend_of(layer).kernel_attributes[role]]
    return found


def _single(update: Any) -> Any:
    """An update in float32, as the factors of models are."""
    return type(update)(
        update.a.astype("float32"), update.b.astype("float32"), update.scale, update.kind
    )


def _held_whole(
    names: ModuleNames, whole: list[tuple[ModelWeight, np.ndarray]], adapted: set[str]
) -> tuple[tuple[str, ...], dict[str, np.ndarray], list[str]]:
    """Modules and weights to hold whole, and the keys that have no place."""
    by_layer: dict[str, list[tuple[ModelWeight, np.ndarray]]] = {}
    for weight, value in whole:
        by_layer.setdefault(weight.path, []).append((weight, value))
    modules, weights, lost = [], {}, []
    for path, changed in by_layer.items():
        module = names.modules.get(path)
        biases = [pair for pair in changed if pair[0].is_bias()]
        inside = any(name == module or name.startswith(f"{module}.") for name in adapted)
        if len(biases) < len(changed) and (module is None or inside):
            lost += [weight.key for weight, _ in changed if not weight.is_bias()]
            changed = biases
        elif len(biases) < len(changed):
            modules.append(module)
        weights.update({weight.key: value for weight, value in changed})
    return tuple(sorted(m for m in modules if m is not None)), weights, lost


def _is_bias(weight: ModelWeight) -> bool:
    return backend_of(weight.wanted.layer).is_bias_like(weight.variable)
