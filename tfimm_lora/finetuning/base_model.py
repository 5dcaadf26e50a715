"""``open_base_model``: create or load the model to fine-tune, by name or path."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import default_backend
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.output_activation import PROBABILITIES, output_activation
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.validation import check_choice
from tfimm_lora.zoo.tfimm_models import import_tfimm, require_known
from tfimm_lora.zoo.weights.checkpoint import is_checkpoint
from tfimm_lora.zoo.weights.pretrained import create_from_file, create_pretrained

#: The prefix of the names of ``keras.applications``.
APPLICATIONS = "applications/"

#: Named normalizations: mean and std of pictures in [0, 1].
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # to [0, 1]
    "raw": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # keeps [0, 255]
}

Size = tuple[int, int] | None


@dataclass(frozen=True)
class BaseModel:
    """An ordinary model that returns logits, with its preprocessing.

    Attributes:
        model: The model.
        preprocessing: How pictures become its input.
        new_classifier: Whether the classifier was replaced for the requested number of classes.
        from_scratch: Whether the weights are random, so that the model cannot be recreated.
        returned_probabilities: Whether the saved model ended in a softmax or sigmoid, which was
            removed.
    """

    model: Any
    preprocessing: Preprocessing
    new_classifier: bool
    from_scratch: bool
    returned_probabilities: bool = False


def open_base_model(
    name: str | os.PathLike[str],
    *,
    classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    input_size: Size = None,
    normalisation: str | None = None,
) -> BaseModel:
    """Create or load an ordinary model that returns logits.

    Args:
        name: The name of a tfimm model ("convnext_tiny"; needs legacy Keras) or of a model in
            ``keras.applications`` ("applications/MobileNetV2"), or the path of a saved model
            (.keras, .h5 or a SavedModel folder of legacy Keras).
        classes: The number of classes. If the model has another number, its classifier is
            replaced. Default: the number of the model.
        pretrained: Whether to load the pretrained weights of the named model.
        weights: A weight file instead: a timm checkpoint (safetensors) for a tfimm model, a
            Keras weight file for ``keras.applications``.
        input_size: The height and width of the input. Default: those of the model.
        normalisation: How pictures are normalized: "imagenet", "inception" (to [-1, 1]), "unit"
            (to [0, 1]) or "raw" ([0, 255]). Required for a saved model, which does not store
            it. Default: the normalization of the named model.

    Returns:
        The model with its preprocessing.

    Raises:
        ValueError: for an unknown name (the message lists similar ones), or a model that cannot
            be used.
        FileNotFoundError: if the file ``name`` or ``weights`` does not exist.
        ImportError, RuntimeError: as ``create_model``.
    """
    name = os.fspath(name)
    if weights is not None and not os.path.exists(weights):
        raise FileNotFoundError(
            f"Received weights={os.fspath(weights)!r}, which does not exist; expected a weight "
            "file."
        )
    if normalisation is not None:
        check_choice(normalisation, "normalisation", NORMALISATIONS)
    if name.startswith(APPLICATIONS):
        base = _application(name, classes, pretrained, weights, input_size)
    elif _is_path(name):
        if pretrained or weights is not None or input_size is not None:
            raise ValueError(
                f"Received the model file {name!r} with pretrained, weights or input_size; "
                "expected none of these. The file contains the weights and the input size."
            )
        base = _from_file(name, classes, normalisation)
    else:
        base = _tfimm(name, classes, pretrained, weights, input_size)
    if normalisation is None:
        return base
    mean, std = NORMALISATIONS[normalisation]
    preprocessing = replace(base.preprocessing, mean=mean, std=std, channel_order="rgb")
    return replace(base, preprocessing=preprocessing)


def _is_path(name: str) -> bool:
    return os.path.exists(name) or name.endswith((".keras", ".h5")) or os.sep in name


# -- tfimm ---------------------------------------------------------------------------------


def _tfimm(
    name: str, classes: int | None, pretrained: bool, weights: Any, input_size: Size
) -> BaseModel:
    tfimm = import_tfimm()
    require_known(tfimm, name)
    if not hasattr(tfimm.models.model_config(name), "nb_classes"):
        raise ValueError(
            f"Received model {name!r}, which has no classifier; expected a classification "
            "model. Use lora.create_model to train it on its own task."
        )
    requested: dict[str, Any] = {"nb_classes": classes, "input_size": input_size}
    requested = {key: value for key, value in requested.items() if value is not None}
    if weights is not None:
        model = _with_checkpoint(tfimm, name, weights, requested)
    elif pretrained:
        model = create_pretrained(tfimm, name, **requested)
    else:
        model = tfimm.create_model(name, **requested)
    default = tfimm.models.model_config(name)
    return BaseModel(
        model,
        Preprocessing.of(model.cfg),
        new_classifier=model.cfg.nb_classes != default.nb_classes,
        from_scratch=weights is None and not pretrained,
    )


def _with_checkpoint(tfimm: Any, name: str, weights: Any, requested: dict[str, Any]) -> Any:
    """Create a tfimm model with the weights of a timm checkpoint."""
    if not is_checkpoint(os.fspath(weights)):
        raise ValueError(
            f"Received weights={os.fspath(weights)!r} for {name!r}; expected a timm "
            "checkpoint: a .safetensors file, or a folder with one. Pass a saved Keras model "
            "as the model itself."
        )
    model = create_from_file(tfimm, name, weights)
    if all(getattr(model.cfg, key) == value for key, value in requested.items()):
        return model
    kept = {n: getattr(model.cfg, n) for n in ("mean", "std", "crop_pct", "interpolation")}
    changed = tfimm.create_model(name, **{**kept, **requested})
    transfer_weights(model, changed)
    return changed


# -- keras.applications --------------------------------------------------------------------


def applications() -> dict[str, Callable[..., Any]]:
    """The functions of ``keras.applications`` that create a model, by name."""
    module = default_backend().keras.applications
    public = {name: getattr(module, name) for name in dir(module) if name[0].isupper()}
    return {name: create for name, create in public.items() if callable(create)}


def _application(
    name: str, classes: int | None, pretrained: bool, weights: Any, input_size: Size
) -> BaseModel:
    known = applications()
    short = name[len(APPLICATIONS) :]
    if short not in known:
        near = close_names(short, known, similarity=0.3) or sorted(known)
        raise ValueError(
            f"Received model {name!r}; expected a model of keras.applications, which has no "
            f"{short}. Most similar: {', '.join(APPLICATIONS + other for other in near)}."
        )
    create = known[short]
    given = os.fspath(weights) if weights is not None else "imagenet" if pretrained else None
    shape = (*input_size, 3) if input_size else None
    same = classes in (None, 1000) and shape is None
    if given is None or same:
        model = create(
            weights=given,
            classifier_activation=None,
            classes=1000 if classes is None else classes,
            input_shape=shape,
        )
    else:
        source = create(weights=given, classifier_activation=None)
        model = create(
            weights=None,
            classifier_activation=None,
            classes=1000 if classes is None else classes,
            input_shape=shape,
        )
        head = [f"^{path}/" for path in classifier_paths(model)]
        transfer_weights(source, model, head if classes not in (None, 1000) else None)
    return BaseModel(
        model,
        _preprocessing_of(create, model),
        new_classifier=classes not in (None, 1000),
        from_scratch=given is None,
    )


def _preprocessing_of(create: Any, model: Any) -> Preprocessing:
    """The preprocessing that the ``preprocess_input`` of a model's module computes.

    It is linear in each channel, so it is determined by its results for black and white. Its
    result for red shows the order of the channels.
    """
    prepare = sys.modules[create.__module__].preprocess_input
    black: Any = np.zeros((1, 1, 1, 3), "float32")
    red = np.array([[[[255, 0, 0]]]], "float32")
    offset = np.asarray(prepare(black.copy()), "float64").ravel()
    moved = np.asarray(prepare(red.copy()), "float64").ravel() - offset
    channel = int(np.abs(moved).argmax())
    white = np.asarray(prepare(np.full_like(black, 255)), "float64").ravel()
    std = 1 / (white - offset)
    height, width = (int(side) for side in model.input_shape[1:3])
    return Preprocessing(
        (height, width),
        mean=tuple((-offset * std).round(6).tolist()),
        std=tuple(std.round(9).tolist()),
        interpolation="bilinear",
        channel_order="rgb" if channel == 0 else "bgr",
    )


# -- files ---------------------------------------------------------------------------------


def _from_file(path: str, classes: int | None, normalisation: str | None) -> BaseModel:
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"Received model {path!r}, which does not exist; expected a saved Keras model, or "
            "the name of a model. tfimm-lora models lists the names."
        )
    if normalisation is None:
        raise ValueError(
            f"Received the model file {path!r} without normalisation, which the file does not "
            f"store; expected one of {', '.join(NORMALISATIONS)}. Pass the one that the model "
            "was trained with."
        )
    backend = default_backend()
    try:
        loaded = backend.keras.models.load_model(path, compile=False)
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be loaded by {backend.keras.__name__} "
            f"{backend.keras.__version__}: {error}"
        ) from error
    if has_lora(loaded):
        raise ValueError(
            f"{path} contains a LoRA model; expected an ordinary model. Save the result of "
            "convert_to_regular_model instead."
        )
    returned_probabilities = output_activation(loaded) in PROBABILITIES
    model, is_new = _with_logits(backend, loaded, classes)
    shape = backend.input_shapes(model) or model.input_shape
    if not all(isinstance(side, int) for side in shape[1:4]) or len(shape) != 4:
        raise ValueError(
            f"The model in {path} has the input shape {tuple(shape)}; expected pictures of a "
            "fixed size, (None, height, width, channels)."
        )
    height, width, channels = shape[1:4]
    preprocessing = Preprocessing(
        (height, width), (0.0,) * 3, (1.0,) * 3, in_channels=channels, crop_pct=1.0
    )
    return BaseModel(model, preprocessing, is_new, False, returned_probabilities)


def _with_logits(backend: Backend, model: Any, classes: int | None) -> tuple[Any, bool]:
    """Remove the softmax at the end of a model and set its number of classes.

    Returns:
        The model, and whether its classifier was replaced.
    """
    layers = {path: layer for path, layer in backend.walk(model)}
    heads = classifier_paths(model)
    head: Any = layers[heads[0]] if len(heads) == 1 else None
    dense = head is not None and isinstance(head, backend.keras.layers.Dense)
    plain = dense and getattr(head.activation, "__name__", "") == "linear"
    if dense and plain and classes in (None, head.units) and model.layers[-1] is head:
        return model, False
    chained = backend.is_functional(model) or isinstance(model, backend.keras.Sequential)
    if not dense or not chained or not any(x is head for x in model.layers):
        raise ValueError(
            f"The model '{model.name}' ({type(model).__name__}) has no classifier that can be "
            "replaced; expected a functional or Sequential model with one Dense layer at its "
            f"end. Its last layers: {', '.join(heads) or 'none'}."
        )
    is_new = classes not in (None, head.units)
    if is_new:
        new = backend.keras.layers.Dense(classes, name=head.name)
        outputs = new(head.input)
    else:
        head.activation = backend.keras.activations.linear
        outputs = head.output
    return backend.keras.Model(model.inputs, outputs, name=model.name), is_new


def file_hash(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, or of all files in a folder and their names."""
    import hashlib

    digest = hashlib.sha256()
    root = Path(path)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    for file in files:
        if file != root:
            digest.update(file.relative_to(root).as_posix().encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
