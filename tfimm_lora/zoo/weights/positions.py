"""The constants of keras_hub's position embeddings, which are in no checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of

#: The position embeddings of DINOv2, resized to the images of the model.
_RESIZED = "interpolated_position_embeddings"

#: The numbers of the positions of CLIP and SigLIP.
NUMBERS = "position_ids"


def is_resized(name: str) -> bool:
    """Whether a variable of this name is computed from another one: DINOv2's positions."""
    return name.rpartition("/")[2] == _RESIZED


def compute_positions(model: Any) -> None:
    """Compute the constants of a model from its weights and its image size.

    keras_hub creates the numbers with zeros: all patches would be at the same position.
    """
    backend = backend_of(model)
    for _, layer in backend.walk(model):
        names = {backend.variable_name(x): x for x in backend.own_variables(layer)}
        if _RESIZED in names:
            resized = layer._interpolate_position_embeddings(
                layer.position_embeddings,
                patch_size=layer.patch_size,
                source_shape=layer.position_embedding_shape,
                target_shape=layer.image_shape,
                antialias=layer.antialias_in_interpolation,
            )
            names[_RESIZED].assign(resized)
        if NUMBERS in names:
            count = names[NUMBERS].shape[1]
            names[NUMBERS].assign(np.arange(count)[None])
