"""Create the ordinary model of a name on Keras 3, with its weights."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any, NamedTuple

from tfimm_lora.backend import default_backend
from tfimm_lora.model.classifier import canonical_path, classifier_paths
from tfimm_lora.model.logits import with_logits
from tfimm_lora.model.new_classifier import with_classifier, with_pooling
from tfimm_lora.model.state import (
    copy_base_name,
    random_weights,
    record_base_name,
    record_timm_names,
)
from tfimm_lora.model.transfer import transfer_weights
from tfimm_lora.validation import check_keywords
from tfimm_lora.zoo.keras3_models.build import allows_no_classes, build
from tfimm_lora.zoo.keras3_models.folders import folder_config
from tfimm_lora.zoo.keras3_models.known import KnownConfig, KnownModel3, known
from tfimm_lora.zoo.keras3_models.presets import (
    HUB,
    converter_normalization,
    is_preset,
    open_preset,
)
from tfimm_lora.zoo.keras3_models.segment_anything import encoder_of, is_segment_anything
from tfimm_lora.zoo.keras3_models.sources import find_source
from tfimm_lora.zoo.weights.load import PREPROCESSING_FIELDS, load_timm_weights
from tfimm_lora.zoo.weights.positions import compute_positions

#: The arguments of ``create_base`` that change the architecture.
ARGUMENTS = ("nb_classes", "in_channels", "input_size", *PREPROCESSING_FIELDS)


class Base(NamedTuple):
    """A model that returns logits.

    Attributes:
        model: The model. ``model.cfg`` is its ``KnownConfig`` if its preprocessing is known.
        new_classifier: Whether the classifier is new, and not that of the named model.
        converter: The ``ImageConverter`` of a preset of keras_hub, or None.
    """

    model: Any
    new_classifier: bool
    converter: Any = None


def create_base(
    name: str,
    *,
    pretrained: bool = False,
    weights: Any = None,
    dense: bool = False,
    **arguments: Any,
) -> Base:
    """Create a model on Keras 3 by its name.

    Args:
        name: A name of tfimm or timm (see ``known``), a folder of timm or transformers, a
            repository "hf://USER/REPOSITORY", or a preset (see ``is_preset``).
        pretrained: Whether to load the weights of the name.
        weights: A checkpoint to load instead, as ``load_timm_weights`` takes it.
        dense: Whether a preset is opened as a segmenter, if it is one.
        **arguments: nb_classes, in_channels, input_size, mean, std, crop_pct, interpolation.

    Raises:
        ValueError, TypeError, ImportError, FileNotFoundError, ConnectionError: As
            ``create_model``.
    """
    check_keywords(arguments, ARGUMENTS, "create_model")
    given = {key: value for key, value in arguments.items() if value is not None}
    source = find_source(name)
    if source is not None:
        return _of_known(source.model, pretrained, weights or source.weights, given)
    if is_preset(name):
        if weights is not None:
            raise ValueError(
                f"Received the preset {name!r} and a checkpoint; expected only one of them."
            )
        return _of_preset(name, pretrained or not name.startswith(HUB), given, dense)
    if name.startswith(("/", "./", "../", "~")):
        what = "which contains no model" if os.path.exists(name) else "which does not exist"
        raise FileNotFoundError(
            f"Received model_name={name!r}, {what}; expected a folder with the config.json and "
            "the weights of keras_hub, timm or transformers, or a name (see list_models)."
        )
    known(name)  # raises the error for an unknown name
    raise AssertionError(name)


def _of_known(row: KnownModel3, pretrained: bool, weights: Any, given: dict[str, Any]) -> Base:
    name = row.config.name
    if weights is None and pretrained:
        if not row.checkpoint:
            raise ValueError(
                f"Received model_name={name!r} with pretrained=True, but there are no weights "
                "for it. Pass pretrained=False, or a checkpoint as model_path."
            )
        weights = f"timm/{row.checkpoint}"
    wanted = {
        "classes": given.get("nb_classes"),
        "input_size": given.get("input_size"),
        "in_channels": given.get("in_channels", 3),
    }
    if weights is None:
        model, _ = build(row, **wanted)
        record_base_name(model, random_weights(name))
        classes = row.config.nb_classes
    else:
        model, classes = _with_weights(row, weights, wanted)
    preprocessing = {k: given[k] for k in PREPROCESSING_FIELDS if k in given}
    model.cfg = replace(model.cfg, **preprocessing)
    record_timm_names(model)
    _forget_compilation(model)
    return Base(model, model.cfg.nb_classes != classes)


def _with_weights(row: KnownModel3, weights: Any, wanted: dict[str, Any]) -> tuple[Any, int]:
    """Create a model with the weights of a checkpoint.

    Returns:
        The model, and the number of classes of the checkpoint.
    """
    own: dict[str, Any] = {
        "classes": row.config.nb_classes,
        "input_size": row.config.input_size,
        "in_channels": 3,
    }
    own.update(_own_settings(weights))
    classes, ignored = own["classes"], None
    if not classes and not allows_no_classes(row):
        # The classifier, which the checkpoint lacks, is new; `build` reports if there is none.
        own["classes"] = wanted["classes"] or 0
    loaded, _ = build(row, **own)
    if own["classes"] != classes:
        ignored = [f"^{re.escape(path)}/" for path in loaded.cfg.classifier]
    load_timm_weights(loaded, weights, weights_to_ignore=ignored)
    wanted = {key: own[key] if value is None else value for key, value in wanted.items()}
    if wanted == own:
        return loaded, classes
    model, _ = build(row, **wanted)
    transfer_weights(loaded, model)
    copy_base_name(loaded, model)
    fields = {key: getattr(loaded.cfg, key) for key in PREPROCESSING_FIELDS}
    model.cfg = replace(model.cfg, **fields)
    return model, classes


def _own_settings(weights: Any) -> dict[str, Any]:
    """The number of classes and the input size in the config.json of a local checkpoint."""
    path = os.fspath(weights)
    config = folder_config(path if os.path.isdir(path) else os.path.dirname(path))
    fields = config.get("pretrained_cfg")
    fields = fields if isinstance(fields, dict) else {}
    settings: dict[str, Any] = {}
    classes = config.get("num_classes", fields.get("num_classes"))
    if isinstance(classes, int):
        settings["classes"] = classes
    size = fields.get("input_size")
    if isinstance(size, list) and len(size) == 3:
        settings["in_channels"], settings["input_size"] = size[0], (size[1], size[2])
    return settings


def _of_preset(name: str, load_weights: bool, given: dict[str, Any], dense: bool) -> Base:
    if given.get("in_channels", 3) != 3:
        raise ValueError(
            f"Received in_channels={given['in_channels']} for the preset {name!r}; expected 3."
        )
    preset = open_preset(
        name, load_weights=load_weights, input_size=given.get("input_size"), dense=dense
    )
    if not load_weights:
        compute_positions(preset.model)
    classes, backend = given.get("nb_classes"), default_backend()
    if dense and is_segment_anything(preset.model):
        model, is_new = preset.model, False  # it gets a new decoder for the classes
        own, size = picture_shape(model)[1:3], given.get("input_size")
        if size is not None and tuple(size) != tuple(own):
            raise ValueError(
                f"Received input_size={tuple(size)} for {name!r}, Segment Anything of "
                f"keras_hub; expected {tuple(own)}, the size of its pictures."
            )
    elif preset.has_classifier:
        model, is_new = with_logits(backend, preset.model, classes)
    elif classes is not None:
        model, is_new = with_classifier(preset.model, classes), True
    else:
        model, is_new = with_pooling(preset.model), False
    plain = os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
    record_base_name(model, plain if load_weights else random_weights(plain))
    outputs = 0 if is_segment_anything(model) else model.output_shape[-1]
    config = _preset_config(plain, preset.converter, picture_shape(model), outputs)
    if config is not None:
        fields = {k: given[k] for k in PREPROCESSING_FIELDS if k in given}
        heads = map(canonical_path, classifier_paths(model))
        model.cfg = replace(config, classifier=tuple(heads), **fields)
    _forget_compilation(model)
    return Base(model, is_new, preset.converter)


def picture_shape(model: Any) -> tuple[Any, ...]:
    """The shape of the pictures that a model takes, with the batch."""
    if is_segment_anything(model):
        model = encoder_of(model)
    return tuple(default_backend().input_shapes(model) or model.input_shape)


def _forget_compilation(model: Any) -> None:
    """Undo the compilation of the tasks of keras_hub, whose loss may be for probabilities."""
    backend = default_backend()
    if backend.is_compiled(model):
        backend.mark_compiled(model, False)


def _preset_config(
    name: str, converter: Any, shape: tuple[Any, ...], classes: int
) -> KnownConfig | None:
    """The config of a preset; None if its preprocessing or its image size is unknown."""
    if converter is None:
        return None
    mean, std, interpolation, size = converter_normalization(converter, shape[-1])
    own = shape[1:3]
    size = size if None in own else (own[0], own[1])
    if size is None:
        return None
    return KnownConfig(name, "", classes, shape[-1], size, mean, std, 1.0, interpolation)
