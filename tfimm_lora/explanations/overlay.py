"""Heat maps drawn over their pictures."""

from __future__ import annotations

import numpy as np

#: The colours of these values of a map. They become lighter with the value, so they can be
#: told apart without seeing colours.
_VALUES = (0.0, 0.33, 0.66, 1.0)
_COLOURS = np.array([(20, 11, 52), (132, 32, 107), (229, 92, 48), (252, 255, 164)])

#: The largest share of the colour at a place; the rest is the picture.
_SHARE = 0.65


def overlay(pictures: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Draw heat maps over pictures, which become grey.

    Args:
        pictures: 8-bit RGB pictures, (n, h, w, 3).
        maps: Maps in [0, 1], (n, h, w).

    Returns:
        8-bit RGB pictures of the same shape. Where a map is 0, there is the grey picture.
    """
    grey = np.asarray(pictures, np.float64) @ (0.299, 0.587, 0.114)
    channels = [np.interp(maps, _VALUES, channel) for channel in _COLOURS.T]
    share = _SHARE * np.sqrt(maps)[..., None]
    mixed = (1 - share) * grey[..., None] + share * np.stack(channels, axis=-1)
    drawn: np.ndarray = np.rint(mixed).clip(0, 255).astype(np.uint8)
    return drawn
