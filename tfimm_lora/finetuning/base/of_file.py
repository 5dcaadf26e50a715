"""Open a saved Keras model, with the preprocessing of keras_hub if it has one."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.backend import default_backend
from tfimm_lora.finetuning.base.early import check_file
from tfimm_lora.finetuning.base.keras_files import load_keras_model
from tfimm_lora.finetuning.base.opened import NORMALISATIONS, BaseModel, Size
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.model.logits import with_logits
from tfimm_lora.model.merge import has_lora
from tfimm_lora.model.output_activation import PROBABILITIES, output_activation
from tfimm_lora.model.state import record_base_name
from tfimm_lora.zoo.keras3_models.presets import converter_normalization


def open_file(
    path: str, classes: int | None, normalisation: str | None, input_size: Size
) -> BaseModel:
    """Load a saved model; see ``open_base_model``."""
    check_file(path)
    loaded = load_keras_model(path)
    if has_lora(loaded):
        raise ValueError(
            f"{path} contains a LoRA model; expected an ordinary model. Save the result of "
            "convert_to_regular_model instead."
        )
    converter = _image_converter(loaded)
    if normalisation is None and converter is None:
        raise ValueError(
            f"Received the model file {path!r} without normalisation, which the file does not "
            f"store; expected one of {', '.join(NORMALISATIONS)}. Pass the one that the model "
            "was trained with."
        )
    backend = default_backend()
    returned_probabilities = output_activation(loaded) in PROBABILITIES
    model, is_new = with_logits(backend, loaded, classes)
    shape = backend.input_shapes(model) or model.input_shape
    size, channels = picture_size(path, shape, input_size, converter)
    preprocessing = Preprocessing(
        size, (0.0,) * 3, (1.0,) * 3, in_channels=channels, crop_pct=1.0
    )
    if converter is not None:
        preprocessing = _of_keras_hub(converter, preprocessing)
    name = os.path.basename(os.path.abspath(path))
    record_base_name(model, name)
    return BaseModel(
        model,
        preprocessing,
        new_classifier=is_new,
        from_scratch=False,
        weights=f"weights of {name}",
        returned_probabilities=returned_probabilities,
    )


def picture_size(
    path: str, shape: Any, requested: Size, converter: Any
) -> tuple[tuple[int, int], int]:
    """The height and width of the pictures, and the number of channels."""
    own = tuple(shape[1:3]) if len(shape) == 4 else ()
    if len(shape) != 4 or not isinstance(shape[3], int):
        raise ValueError(
            f"The model in {path} has the input shape {tuple(shape)}; expected pictures, "
            "(None, height, width, channels)."
        )
    if None not in own:
        if requested is not None and tuple(requested) != own:
            raise ValueError(
                f"Received the model file {path!r} with input_size {requested[0]}x"
                f"{requested[1]}; expected none, or {own[0]}x{own[1]}: the model takes "
                "pictures of this size only."
            )
        return (own[0], own[1]), shape[3]
    size = requested or (tuple(converter.image_size or ()) if converter is not None else ())
    if len(size) != 2:
        raise ValueError(
            f"The model in {path} takes pictures of any size: its input shape is "
            f"{tuple(shape)}. Pass the size that it was trained with as --input-size "
            "(input_size)."
        )
    return (int(size[0]), int(size[1])), shape[3]


def _image_converter(model: Any) -> Any:
    """The layer of keras_hub that prepares pictures for a model, or None."""
    preprocessor = getattr(model, "preprocessor", None)
    converter = getattr(preprocessor, "image_converter", None)
    return converter if hasattr(converter, "image_size") else None


def _of_keras_hub(converter: Any, default: Preprocessing) -> Preprocessing:
    """The preprocessing of an ``ImageConverter``: scale * picture + offset."""
    found = converter_normalization(converter, default.in_channels)
    return Preprocessing(
        default.input_size,
        mean=found.mean,
        std=found.std,
        in_channels=default.in_channels,
        interpolation=found.interpolation,
        crop_pct=1.0,
    )
