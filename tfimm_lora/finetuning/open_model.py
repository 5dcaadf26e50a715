"""``open_base``: an ordinary model by the name that a person would give it."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.zoo.tfimm_models import import_tfimm, require_known
from tfimm_lora.zoo.weights.checkpoint import is_checkpoint
from tfimm_lora.zoo.weights.pretrained import create_from_file, create_pretrained

#: What stands before the name of a model of ``keras.applications``.
APPLICATIONS = "applications/"

#: Mean and std of pictures in [0, 1], by what people call them.
NORMALISATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # to [-1, 1]
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),  # to [0, 1]
    "raw": ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),  # [0, 255] as it is
}

Size = tuple[int, int] | None


@dataclass(frozen=True)
class Base:
    """An ordinary model that gives logits, and what it needs.

    Attributes:
        model: The model.
        preprocessing: How pictures become its input.
        new_classifier: Whether its classifier was made for the number of classes asked for.
        from_scratch: Whether its weights are random, so that nobody could make it again.
    """

    model: Any
    preprocessing: Preprocessing
    new_classifier: bool
    from_scratch: bool


def open_base(
    name: str | os.PathLike[str],
    *,
    classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    input_size: Size = None,
    normalisation: str | None = None,
) -> Base:
    """Create or load an ordinary model that gives logits.

    Args:
        name: A name of tfimm ("convnext_tiny"; needs legacy Keras); one of
            ``keras.applications`` ("applications/MobileNetV2"); or the path of a saved model
            (.keras, .h5 or a SavedModel folder of legacy Keras).
        classes: Number of classes. Where the model has another, it gets a new classifier.
            Default: as the model has.
        pretrained: Whether to load the weights that the name stands for.
        weights: A file with weights instead: a timm checkpoint (safetensors) for a model of
            tfimm, a weight file of Keras for one of ``keras.applications``.
        input_size: Height and width of pictures. Default: the model's.
        normalisation: How pictures become input: one of "imagenet", "inception" (to [-1, 1]),
            "unit" (to [0, 1]) and "raw" (0 to 255). Names know theirs; the file of a model
            does not, and needs it.

    Returns:
        The model, its preprocessing, and what is new in it.

    Raises:
        ValueError: for an unknown name (the nearest are named), or a model to which this
            cannot be done.
        FileNotFoundError: if ``name`` or ``weights`` is a path without a file.
        ImportError, RuntimeError: as ``create_model``.
    """
    name = os.fspath(name)
    if weights is not None and not os.path.exists(weights):
        raise FileNotFoundError(f"Received weights={os.fspath(weights)!r}; no such file.")
    if normalisation is not None and normalisation not in NORMALISATIONS:
        raise ValueError(
            f"Received normalisation={normalisation!r}; expected one of "
            f"{', '.join(NORMALISATIONS)}."
        )
    if name.startswith(APPLICATIONS):
        base = _application(name, classes, pretrained, weights, input_size)
    elif _is_path(name):
        if pretrained or weights is not None or input_size is not None:
            raise ValueError(
                f"Received the file {name!r} with pretrained, weights or input_size; expected "
                "none of them: the file has its weights and its size."
            )
        base = _from_file(name, classes, normalisation)
    else:
        base = _tfimm(name, classes, pretrained, weights, input_size)
    if normalisation is None:
        return base
    mean, std = NORMALISATIONS[normalisation]
    told = replace(base.preprocessing, mean=mean, std=std, channel_order="rgb")
    return replace(base, preprocessing=told)


def _is_path(name: str) -> bool:
    return os.path.exists(name) or name.endswith((".keras", ".h5")) or os.sep in name


# -- tfimm ---------------------------------------------------------------------------------


def _tfimm(
    name: str, classes: int | None, pretrained: bool, weights: Any, input_size: Size
) -> Base:
    tfimm = import_tfimm()
    require_known(tfimm, name)
    if not hasattr(tfimm.models.model_config(name), "nb_classes"):
        raise ValueError(
            f"Received model {name!r}, which has no classes: it is not made to classify "
            "pictures. Put LoRA into it with lora.create_model, and train it on its own task."
        )
    asked: dict[str, Any] = {"nb_classes": classes, "input_size": input_size}
    asked = {key: value for key, value in asked.items() if value is not None}
    if weights is not None:
        model = _with_checkpoint(tfimm, name, weights, asked)
    elif pretrained:
        model = create_pretrained(tfimm, name, **asked)
    else:
        model = tfimm.create_model(name, **asked)
    named = tfimm.models.model_config(name)
    return Base(
        model,
        Preprocessing.of(model.cfg),
        new_classifier=model.cfg.nb_classes != named.nb_classes,
        from_scratch=weights is None and not pretrained,
    )


def _with_checkpoint(tfimm: Any, name: str, weights: Any, asked: dict[str, Any]) -> Any:
    """A model with a timm checkpoint for the model of that name."""
    if not is_checkpoint(os.fspath(weights)):
        raise ValueError(
            f"Received weights={os.fspath(weights)!r} for {name!r}; expected a checkpoint of "
            "timm: a .safetensors file, or a folder with one. A saved Keras model is given "
            "instead of the model's name."
        )
    model = create_from_file(tfimm, name, weights)
    if all(getattr(model.cfg, key) == value for key, value in asked.items()):
        return model
    told = {n: getattr(model.cfg, n) for n in ("mean", "std", "crop_pct", "interpolation")}
    changed = tfimm.create_model(name, **{**told, **asked})
    transfer_weights(model, changed)
    return changed


# -- keras.applications --------------------------------------------------------------------


def applications() -> dict[str, Callable[..., Any]]:
    """The functions of ``keras.applications`` that create a model, by name."""
    module = default_backend().keras.applications
    found = {name: getattr(module, name) for name in dir(module) if name[0].isupper()}
    return {name: create for name, create in found.items() if callable(create)}


def _application(
    name: str, classes: int | None, pretrained: bool, weights: Any, input_size: Size
) -> Base:
    known = applications()
    short = name[len(APPLICATIONS) :]
    if short not in known:
        near = difflib.get_close_matches(short, known, n=5, cutoff=0.3) or sorted(known)
        raise ValueError(
            f"Received model {name!r}; keras.applications has no {short}. Nearest: "
            + ", ".join(APPLICATIONS + other for other in near)
            + "."
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
    return Base(
        model,
        _preprocessing_of(create, model),
        new_classifier=classes not in (None, 1000),
        from_scratch=given is None,
    )


def _preprocessing_of(create: Any, model: Any) -> Preprocessing:
    """What the ``preprocess_input`` beside a function of ``keras.applications`` does.

    It is linear in each channel, so two pictures tell all.
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


def _from_file(path: str, classes: int | None, normalisation: str | None) -> Base:
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"Received model {path!r}; no such file, and no name of a model. Names are "
            "listed by tfimm-lora models."
        )
    if normalisation is None:
        raise ValueError(
            f"Received the model file {path!r} without normalisation, which it does not hold. "
            f"Pass what it was trained with: one of {', '.join(NORMALISATIONS)}."
        )
    backend = default_backend()
    try:
        loaded = backend.keras.models.load_model(path, compile=False)
    except (ValueError, OSError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be loaded as a model of this Keras "
            f"({backend.keras.__version__}): {error}"
        ) from error
    if has_lora(loaded):
        raise ValueError(
            f"{path} holds a LoRA model; expected an ordinary one. Save the result of "
            "convert_to_regular_model instead."
        )
    model, is_new = _with_logits(backend, loaded, classes)
    shape = backend.input_shapes(model) or model.input_shape
    if not all(isinstance(side, int) for side in shape[1:4]) or len(shape) != 4:
        raise ValueError(
            f"The model in {path} takes inputs of shape {tuple(shape)}; expected pictures of a "
            "fixed size, (None, height, width, channels)."
        )
    height, width, channels = shape[1:4]
    preprocessing = Preprocessing(
        (height, width), (0.0,) * 3, (1.0,) * 3, in_channels=channels, crop_pct=1.0
    )
    return Base(model, preprocessing, new_classifier=is_new, from_scratch=False)


def _with_logits(backend: Any, model: Any, classes: int | None) -> tuple[Any, bool]:
    """The model without a softmax at its end, and with as many classes as asked for."""
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
            f"replaced: expected a functional or Sequential model with one Dense layer at its "
            f"end, and found {', '.join(heads) or 'none'}."
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
    """SHA-256 of a file, or of all files in a folder with their names."""
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
