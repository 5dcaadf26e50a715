"""Make an opened model return scores of classes for each pixel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.finetuning.base.opened import BaseModel
from tfimm_lora.model.logits import with_logits
from tfimm_lora.model.naming import is_tfimm
from tfimm_lora.model.new_decoder import with_decoder
from tfimm_lora.model.state import copy_base_name
from tfimm_lora.zoo.keras3_models.segment_anything import (
    anything_segmenter,
    is_segment_anything,
)
from tfimm_lora.zoo.segmentation_classes import tfimm_segmenter


def dense_base(base: BaseModel, classes: int | None) -> BaseModel:
    """The model of an opened classifier or backbone for segmentation.

    A model that returns scores for each pixel already gets a new last layer, if the number of
    classes is another. Segment Anything keeps its decoder, without prompts. Any other gets the
    decoder of ``with_decoder``.

    Raises:
        ValueError: if it has no feature map, or it would get a decoder and the number of
            classes is not given.
    """
    model = base.model
    if returns_pixels(model):
        backend = backend_of(model)
        result, is_new = with_logits(backend, model, classes)
        if result is not model:
            copy_base_name(model, result)
        return replace(base, model=result, new_classifier=is_new)
    if classes is None:
        raise ValueError(
            f"Received model '{model.name}' for a segmentation without a number of classes; "
            "expected classes=..."
        )
    if is_tfimm(model):
        result = tfimm_segmenter(model, classes)
    elif is_segment_anything(model):
        result = anything_segmenter(model, classes)
        copy_base_name(model, result)
    else:
        result = with_decoder(model, classes)
        copy_base_name(model, result)
        if hasattr(result, "cfg"):
            result.cfg = replace(result.cfg, nb_classes=classes, classifier=(DECODER,))
    return replace(base, model=result, new_classifier=True, returned_probabilities=False)


def returns_pixels(model: Any) -> bool:
    """Whether a model returns something for each pixel of its pictures."""
    shapes = [getattr(model, name, None) for name in ("input_shape", "output_shape")]
    if not all(isinstance(shape, tuple) and len(shape) == 4 for shape in shapes):
        return False
    inputs, outputs = shapes
    return None not in inputs[1:3] and inputs[1:3] == outputs[1:3]  # type: ignore[index]
