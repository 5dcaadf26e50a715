"""``transfer_weights``: copy weights between models by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Variable
from tfimm_lora.config import LORA_VARIABLE_NAMES, LORA_WEIGHT_NAMES
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.classifier import canonical_path, classifier_names, classifier_paths


class _Weight(NamedTuple):
    """One variable of a model: the layer that owns it, the layer's path, its name."""

    path: str
    name: str
    layer: Layer
    variable: Variable

    @property
    def full_name(self) -> str:
        return f"{self.path}/{self.name}" if self.path else self.name


def transfer_weights(
    src_model: Any, dst_model: Any, weights_to_ignore: Sequence[str] | None = None
) -> None:
    """Copy the weights of one model into another by name, as in tfimm.

    Weights are matched by the path of their layer. If the two models differ only in the
    numbers that Keras appends to default layer names (``dense_3`` and ``dense_7``), these
    layers are matched in order. For tfimm models the first convolution is adapted to another
    number of input channels, the classifier is not copied if the number of classes differs,
    and the model's own transformations (position embeddings of another size) are applied.

    To copy from a LoRA model into a model without LoRA, merge the update into the kernels
    first.

    Args:
        src_model: A built model. It is not changed.
        dst_model: A built model, changed in place. It may be of another class.
        weights_to_ignore: Regular expressions, searched for in the names of the weights of
            ``dst_model`` ("blocks/0/mlp/fc1/kernel"). Matching weights are not changed.
            "kernel_lora_" matches all weights that LoRA added.

    Raises:
        ValueError: If weights are missing, have another shape, or would be lost; one error
            names them all. ``dst_model`` is not changed then.

    Example:
        >>> import tensorflow as tf, tfimm_lora as lora
        >>> def make():
        ...     return tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
        >>> src, dst = make(), make()
        >>> lora.transfer_weights(src, dst)
        >>> bool((src.weights[0].numpy() == dst.weights[0].numpy()).all())
        True
    """
    src_backend, dst_backend = backend_of(src_model), backend_of(dst_model)
    roles = (("src", src_model, src_backend), ("dst", dst_model, dst_backend))
    for role, model, backend in roles:
        if not any(True for _ in _weights(backend, model)):
            raise ValueError(
                f"Received {role}_model '{model.name}', which has no weights yet. Call it "
                "on an input first."
            )
    ignored = list(weights_to_ignore or ())
    ignored += list(getattr(dst_model, "keys_to_ignore_on_load_missing", None) or ())
    rules = _TfimmRules(src_model, dst_model)
    given = list(_weights(src_backend, src_model))
    all_wanted = list(_weights(dst_backend, dst_model))
    source = _match(given, all_wanted)
    wanted = [
        w
        for w in all_wanted
        if not any(re.search(pattern, w.full_name) for pattern in ignored)
        and not rules.skips(w)
    ]
    values, problems = [], _lost_updates(given, wanted, source, ignored)
    for weight in wanted:
        found = source.get(weight.full_name)
        if found is None:
            problems.append(f"missing in the source: {weight.full_name}")
            continue
        into_lora = isinstance(weight.layer, LoRALayer)
        value = rules.adapt(weight, found, _value(src_backend, found, into_lora))
        if tuple(value.shape) != tuple(weight.variable.shape):
            problems.append(
                f"{weight.full_name} has shape {tuple(value.shape)} in the source, expected "
                f"{tuple(weight.variable.shape)}"
            )
        values.append((weight, value))
    if problems:
        raise ValueError(
            f"The weights of '{src_model.name}' do not fit '{dst_model.name}': "
            f"{'; '.join(problems)}. Name weights that may differ in weights_to_ignore."
        )
    for weight, value in values:
        if isinstance(weight.layer, LoRALayer) and weight.layer.merged:
            weight.layer.unmerge_weights()
        weight.variable.assign(value)


def _weights(backend: Backend, model: Layer) -> Iterator[_Weight]:
    for path, layer in backend.walk(model):
        counts: dict[str, int] = {}
        for variable in backend.own_variables(layer):
            name = backend.variable_name(variable)
            counts[name] = counts.get(name, 0) + 1
            unique = name if counts[name] == 1 else f"{name}#{counts[name]}"
            yield _Weight(path, unique, layer, variable)


def _value(backend: Backend, weight: _Weight, into_lora: bool) -> np.ndarray:
    """Return the value of a source weight; for copying into a LoRA layer the unmerged one."""
    layer = weight.layer
    if isinstance(layer, LoRALayer) and into_lora and layer.merged:
        if weight.name in LORA_VARIABLE_NAMES:
            return layer.lora_values()[weight.name]
        return layer.value_of(weight.variable, merged=False)
    return backend.to_numpy(weight.variable)


def _match(given: list[_Weight], wanted: list[_Weight]) -> dict[str, _Weight]:
    """Map the full name of each wanted weight to the matching weight of the source, if any.

    Names are compared as they are if this finds every layer of the destination. Otherwise
    the numbers in default layer names are replaced by an order, if this finds more weights.
    """
    exact = {w.full_name: w for w in given}
    if {w.path for w in wanted if w.name not in LORA_VARIABLE_NAMES} <= {w.path for w in given}:
        return exact
    numbered = dict(zip(_numbered([w.full_name for w in given]), given))
    keys = _numbered([w.full_name for w in wanted])
    found = {w.full_name: numbered[k] for w, k in zip(wanted, keys) if k in numbered}
    return found if len(found) > sum(w.full_name in exact for w in wanted) else exact


def _numbered(names: list[str]) -> list[str]:
    """Replace the numbers in Keras' default layer names by an order of appearance.

    ["dense_3/kernel", "dense_3/bias", "dense_7/kernel"] becomes
    ["dense#0/kernel", "dense#0/bias", "dense#1/kernel"].
    """
    orders: dict[tuple[str, str], dict[str, int]] = {}
    result = []
    for name in names:
        prefix = ""
        for part in name.split("/"):
            stem = re.sub(r"_\d+$", "", part)
            order = orders.setdefault((prefix, stem), {})
            prefix += f"/{stem}#{order.setdefault(part, len(order))}"
        result.append(prefix)
    return result


def _lost_updates(
    given: list[_Weight], wanted: list[_Weight], source: dict[str, _Weight], ignored: list[str]
) -> list[str]:
    """Describe the unmerged updates of the source that the destination cannot hold."""
    taken = {
        id(source[w.full_name].layer): w.layer
        for w in wanted
        if isinstance(w.layer, LoRALayer) and w.full_name in source
    }
    variables = {id(source[w.full_name].variable) for w in wanted if w.full_name in source}
    with_update = {
        id(w.layer)
        for w in given
        if w.name == LORA_WEIGHT_NAMES[0] and id(w.variable) in variables
    }
    others = [
        w.full_name
        for w in given
        if w.name in LORA_VARIABLE_NAMES
        and id(w.layer) in with_update
        and w.name not in taken[id(w.layer)]._lora_variables()
        and not any(re.search(pattern, w.full_name) for pattern in ignored)
    ]
    if others:
        return [
            f"the destination has no {', '.join(others[:10])}: it has another variant of LoRA; "
            "convert it with the same arguments"
        ]
    lost = [
        w.path
        for w in given
        if w.name == LORA_WEIGHT_NAMES[0]
        and isinstance(w.layer, LoRALayer)
        and not w.layer.merged
        and id(w.layer) not in taken
    ]
    if not lost:
        return []
    return [
        f"the LoRA updates of {', '.join(lost)} would be lost; merge them first "
        "(merge_lora_weights) or use convert_to_regular_model"
    ]


class _TfimmRules:
    """The rules in tfimm's configs for copying weights between two of its models."""

    def __init__(self, src_model: Layer, dst_model: Layer) -> None:
        self.src_model = src_model
        self.src = getattr(src_model, "cfg", None)
        self.dst = getattr(dst_model, "cfg", None)
        classes = [getattr(cfg, "nb_classes", None) for cfg in (self.src, self.dst)]
        self.new_classifier = classes[0] != classes[1]
        if hasattr(self.dst, "classifier"):
            self.classifier = classifier_names(self.dst)
        else:
            self.classifier = tuple(classifier_paths(dst_model))
        self.first_conv = getattr(self.dst, "first_conv", None)
        self.transforms = getattr(self.src, "transform_weights", {})

    def skips(self, weight: _Weight) -> bool:
        """Whether a weight belongs to a classifier for other classes."""
        return self.new_classifier and canonical_path(weight.path) in self.classifier

    def adapt(self, weight: _Weight, found: _Weight, value: Any) -> Any:
        """Return the value to assign to a weight of the destination."""
        if canonical_path(weight.path) == self.first_conv and value.ndim == 4:
            return adapt_channels(value, weight.variable.shape[2])
        if found.full_name in self.transforms:
            transform = self.transforms[found.full_name]
            return np.asarray(transform(self.src_model, value, self.dst))
        return value


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """Adapt the kernel (h, w, in, out) of a first layer to another number of input channels.

    A single channel gets the sum over all channels. More channels repeat the existing ones in
    turn, scaled so that the sum over the input keeps its magnitude.
    """
    given = kernel.shape[2]
    if channels == given:
        return kernel
    if channels == 1:
        result: np.ndarray = kernel.sum(axis=2, keepdims=True)
        return result
    repeated = np.take(kernel, np.arange(channels) % given, axis=2)
    result = (repeated * np.float32(given / channels)).astype(kernel.dtype)
    return result
