"""Explanations of the answers for picture files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.explanations.explain import Explanation, explain
from tfimm_lora.explanations.overlay import overlay
from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.utils.optional_imports import require

#: What an explanation does not tell, for reports and pages.
LIMITS = (
    "A map shows where the evidence for an answer is, as far as the method finds it. It does "
    "not show how much there is, why a place counts, or whether the answer is right. Places "
    "without colour may matter together with others."
)

#: Smaller pictures are enlarged, so that they can be seen.
_LEAST_SIDE = 224

#: Gradients of so many pictures are computed at once, outside of a graph, where all activations
#: are kept. More of them would take more memory than the training that the report is about.
_AT_ONCE = 2


@dataclass(frozen=True)
class ExplainedPicture:
    """What the model saw of a picture, and the explanation of one of its outputs over it.

    Attributes:
        seen: The picture, resized and cropped for the model, (h, w, 3) in 8 bits.
        drawn: The same with the heat map over it.
    """

    seen: np.ndarray
    drawn: np.ndarray


def explain_pictures(
    model: Any,
    pictures: Sequence[tuple[str | os.PathLike[str] | np.ndarray, int]],
    preprocessing: Preprocessing,
    *,
    layer: str | None = None,
) -> tuple[list[ExplainedPicture], Explanation]:
    """Explain outputs of a model for pictures.

    Args:
        model: The model.
        pictures: Pairs of a picture, a file or the array of one as ``read_picture`` returns it,
            and the number of an output. A picture may be in several of them.
        preprocessing: The preprocessing of the model.
        layer: As in ``explain``.

    Returns:
        The explained pictures, and the ``Explanation`` of all.

    Raises:
        UnreadablePicture: if a file cannot be read.
        ValueError: as ``explain``.
    """
    prepare = preprocessing.function(resize=True)

    def inputs(picture: Any) -> np.ndarray:
        if not isinstance(picture, np.ndarray):
            picture = read_picture(picture, preprocessing.in_channels)
        return np.asarray(prepare(picture), np.float32)

    x = np.stack([inputs(picture) for picture, _ in pictures])
    found = explain(
        model, x, [target for _, target in pictures], layer=layer, batch_size=_AT_ONCE
    )
    seen = preprocessing.pixels(x)
    drawn = overlay(seen, found.maps)
    return [ExplainedPicture(*pair) for pair in zip(seen, drawn)], found


def png(picture: np.ndarray) -> bytes:
    """A picture as a PNG file; a small one is enlarged, with its pixels visible."""
    image_module = require("PIL.Image", extra="cli", why="Drawing explanations")
    factor = -(-_LEAST_SIDE // min(picture.shape[:2]))
    enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    file = io.BytesIO()
    image_module.fromarray(enlarged).save(file, "PNG")
    return file.getvalue()
