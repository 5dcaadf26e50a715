"""Position embeddings, and the numbers of positions, for images of another size."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from tfimm_lora.zoo.weights.resizing import resized

#: The names of position embeddings that have one row per patch.
POSITIONS = re.compile(
    r"position_embeddings?(/embeddings)?$"  # ViT, DeiT, DINOv2, CLIP, SigLIP
)


def resized_positions(model: Any, embedding: Any, config: Any) -> np.ndarray:
    """Resize a position embedding (1, rows, dim) or (rows, dim), as timm does.

    Rows of the class token and of other tokens are kept.

    Args:
        model: The model that has the embedding.
        embedding: The embedding.
        config: The config of the model that the result is for.
    """
    value: np.ndarray = np.asarray(embedding)
    rows = value.shape[-2]
    before, after = model.cfg.input_size, config.input_size
    if before == after:
        return value
    tokens, patch = _layout(before, rows)
    grid = value[..., tokens:, :].reshape(before[0] // patch, before[1] // patch, -1)
    size = (after[0] // patch, after[1] // patch)
    fitted = resized(grid, size, "bicubic").reshape(*value.shape[:-2], -1, value.shape[-1])
    result: np.ndarray = np.concatenate([value[..., :tokens, :], fitted], axis=-2)
    return result


def renumbered_positions(model: Any, numbers: Any, config: Any) -> np.ndarray:
    """Return the numbers of the positions (1, rows) for images of another size."""
    tokens, patch = _layout(model.cfg.input_size, numbers.shape[-1])
    height, width = config.input_size
    result: np.ndarray = np.arange(tokens + (height // patch) * (width // patch))[None]
    return result


def _layout(size: tuple[int, int], rows: int) -> tuple[int, int]:
    """The number of tokens that are no patches, and the side of a patch."""
    tokens = next(t for t in range(3) if _grid(size, rows - t) is not None)
    return tokens, math.isqrt(size[0] * size[1] // (rows - tokens))


def _grid(size: tuple[int, int], patches: int) -> int | None:
    """The side of the patches of which ``patches`` cover an image; None if there is none."""
    side = math.isqrt(max(size[0] * size[1] // max(patches, 1), 1))
    return side if (size[0] // side) * (size[1] // side) == patches else None
