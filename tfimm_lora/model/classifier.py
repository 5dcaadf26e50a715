"""Find the classifier of a model: the layer that a new task replaces."""

from __future__ import annotations

import re
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.layer_paths import without_counts
from tfimm_lora.layers.conversion import supported

#: Names of classifiers, for models with neither a config nor a graph that identifies it.
_NAMES = ("head", "fc", "classifier", "predictions", "logits", "output_dense")


#: What computes the scores of the classes in keras_hub's models for dense prediction: class of
#: the model -> expression for the paths of the layers.
_OF_KERAS_HUB = {
    "ImageSegmenter": r"^[^/]+$",  # the only one outside of its backbone
    "RetinaNetObjectDetector": r"^classification_head/logits_layer$",
    "DFineObjectDetector": r"(^|/)(enc_score_head|class_embed_\d+|denoising_class_embed)$",
    "DFineBackbone": r"(^|/)(enc_score_head|class_embed_\d+|denoising_class_embed)$",
}


def classifier_names(cfg: Any) -> tuple[str, ...]:
    """Return the names of the classifier layers in a tfimm config; none without classes."""
    names = getattr(cfg, "classifier", None) or ()
    if getattr(cfg, "nb_classes", None) == 0:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def canonical_path(path: str) -> str:
    """Return a layer's path as in tfimm's configs: without the levels called "remove"."""
    return "/".join(p for p in without_counts(path).split("/") if p != "remove")


def classifier_paths(model: Layer) -> list[str]:
    """Return the paths of the classifier layers of a model; empty if it has none.

    A tfimm model names them in its config, or has none. In a functional model it is the
    dense layer that computes an output, or the 1x1 convolution of a single position whose
    output is flattened (MobileNet); layers without variables after it (an activation) are
    skipped. In a functional model that returns scores for each pixel it is the 1x1 convolution
    that computes them, or the decoder of ``with_decoder``. In keras_hub's segmenters and
    detectors these are the layers that compute the scores of the classes. In any other model it
    is the last layer with variables, if this is a dense layer or has the name of a head.
    """
    backend = backend_of(model)
    layers = list(backend.walk(model))
    if any(path == DECODER for path, _ in layers):
        return [DECODER]
    cfg = getattr(model, "cfg", None)
    if hasattr(cfg, "classifier") or _is_tfimm_config(cfg):
        names = classifier_names(model.cfg)
        return [p for p, _ in layers if p and canonical_path(p) in names]
    pattern = _pattern_of_keras_hub(model)
    if pattern is not None:
        return [p for p, x in layers if supported(x) and re.search(pattern, without_counts(p))]
    heads = _output_layers(backend, model)
    return [path for path, layer in layers if any(layer is head for head in heads)]


def _is_tfimm_config(cfg: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "tfimm" for cls in type(cfg).__mro__)


def _pattern_of_keras_hub(model: Layer) -> str | None:
    names = [x.__name__ for x in type(model).__mro__ if x.__module__.startswith("keras_hub.")]
    return next((_OF_KERAS_HUB[name] for name in names if name in _OF_KERAS_HUB), None)


def _output_layers(backend: Backend, model: Layer) -> list[Layer]:
    """Return the layers that compute the model's outputs and are classifiers."""
    if backend.is_functional(model):
        return _heads_in_graph(backend, model)
    owners = [x for _, x in backend.walk(model) if backend.own_variables(x)]
    last = owners[-1] if owners else None
    if last is None or last is model:
        return []
    if _is_dense(backend, last) or _has_head_name(last):
        return [last]
    is_chain = isinstance(model, backend.keras.Sequential) and model.built
    return _heads_in_graph(backend, model) if is_chain else []


def _heads_in_graph(backend: Backend, model: Layer) -> list[Layer]:
    outputs = getattr(model, "outputs", None) or []
    return [x for x in (_head_of(backend, model, t) for t in outputs) if x is not None]


def _head_of(backend: Backend, model: Any, tensor: Tensor) -> Layer | None:
    """Return the classifier that computes a symbolic tensor, or None."""
    is_vector = backend.rank_of(tensor) == 2
    is_dense = _has_size_of_input(model, tensor)
    layer, inputs = backend.made_by(tensor)
    while not _has_variables(backend, layer):
        if len(inputs) != 1:
            return None
        layer, inputs = backend.made_by(inputs[0])
    if backend.is_model(layer):
        inner = _output_layers(backend, layer)
        return inner[0] if len(inner) == 1 else None
    if _is_dense(backend, layer):
        return layer
    if is_dense and _is_1x1(backend, layer):
        return layer
    return layer if is_vector and _is_convolution_of_a_vector(backend, layer, inputs) else None


def _has_size_of_input(model: Any, tensor: Tensor) -> bool:
    """Whether a tensor has the height and width of the pictures of a model."""
    shape, full = tuple(tensor.shape), tuple(model.inputs[0].shape)
    return len(shape) == len(full) == 4 and None not in full[1:3] and shape[1:3] == full[1:3]


def _is_1x1(backend: Backend, layer: Any) -> bool:
    is_convolution = isinstance(layer, backend.keras.layers.Conv2D)
    return is_convolution and tuple(layer.kernel_size) == (1, 1) and layer.groups == 1


def _has_variables(backend: Backend, layer: Layer) -> bool:
    """Whether a layer has variables. Operations of Keras 3 (``x[:, 0]``) have none."""
    if not isinstance(layer, backend.keras.layers.Layer):
        return False
    return any(backend.own_variables(inside) for _, inside in backend.walk(layer))


def _is_dense(backend: Backend, layer: Layer) -> bool:
    return isinstance(layer, backend.keras.layers.Dense)


def _is_convolution_of_a_vector(backend: Backend, layer: Layer, inputs: list[Tensor]) -> bool:
    """Whether a layer is a 1x1 convolution of a single position, as good as a dense layer."""
    if not _is_1x1(backend, layer) or len(inputs) != 1:
        return False
    channels_last = layer.data_format == "channels_last"
    sides = tuple(inputs[0].shape)[1:3] if channels_last else tuple(inputs[0].shape)[2:4]
    return sides == (1, 1)


def _has_head_name(layer: Layer) -> bool:
    return supported(layer) and layer.name.rpartition("/")[2] in _NAMES
