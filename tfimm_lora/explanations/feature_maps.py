"""Which layers of a model return feature maps: values for each place of a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer

#: The most tokens before those of the places: a class token, and registers.
_MOST_OTHER_TOKENS = 17

#: By how many places a grid may differ from the ratio of the sides of a picture, since
#: convolutions without padding leave the same number of places out in both directions.
_TOLERANCE = 2


class FeatureMap(NamedTuple):
    """A layer that returns values for each place of a picture.

    Attributes:
        path: The path of the layer.
        layer: The layer.
        grid: The number of places, (rows, columns).
        channels: The number of values for each place.
        others: The number of tokens before those of the places; None for a layer that returns
            a map and not tokens.
        channels_first: Whether a map has the axes (pictures, channels, rows, columns).
    """

    path: str
    layer: Layer
    grid: tuple[int, int]
    channels: int
    others: int | None = None
    channels_first: bool = False

    @property
    def has_tokens(self) -> bool:
        """Whether the layer returns tokens, and not a map."""
        return self.others is not None

    def places(self, values: np.ndarray) -> np.ndarray:
        """Values or gradients of the output of the layer as (pictures, rows, columns,
        channels)."""
        if self.others is not None:
            return values[:, self.others :].reshape(len(values), *self.grid, self.channels)
        return np.moveaxis(values, 1, -1) if self.channels_first else values


def sides_of(pictures: np.ndarray) -> tuple[tuple[int, int], bool]:
    """Height and width of a batch of pictures, and whether the channels are the second axis."""
    first = pictures.shape[1] <= 4 < pictures.shape[3]
    return tuple(pictures.shape[2:] if first else pictures.shape[1:3]), first


def feature_maps(model: Layer, pictures: np.ndarray) -> list[FeatureMap]:
    """The layers that return feature maps of pictures, in the order in which they finish.

    A layer that is called several times is left out.
    """
    backend = backend_of(model)
    if not model.built:  # the first call may call each layer twice, or create it
        model(pictures, training=False)
    layers = {path: layer for path, layer in backend.walk(model) if path}
    shapes: list[tuple[str, tuple[int, ...]]] = []

    def recorded(path: str) -> Callable[..., Any]:
        def function(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            is_tensor = hasattr(outputs, "shape") and hasattr(outputs, "dtype")
            shapes.append((path, tuple(outputs.shape) if is_tensor else ()))
            return outputs

        return function

    with backend.calls_replaced([(layer, recorded(path)) for path, layer in layers.items()]):
        model(pictures, training=False)
    paths = [path for path, _ in shapes]
    once = [(path, shape) for path, shape in shapes if paths.count(path) == 1]
    found = [_feature_map(path, layers[path], shape, pictures) for path, shape in once]
    return [x for x in found if x is not None]


def _feature_map(
    path: str, layer: Layer, shape: tuple[int, ...], pictures: np.ndarray
) -> FeatureMap | None:
    if len(shape) not in (3, 4) or shape[0] != len(pictures):
        return None
    sides, first = sides_of(pictures)
    if len(shape) == 4:
        grid = shape[2:] if first else shape[1:3]
        channels = shape[1] if first else shape[3]
        if math.prod(grid) == 1 or not _has_ratio(grid, sides):
            return None
        return FeatureMap(path, layer, (grid[0], grid[1]), channels, channels_first=first)
    grids = list(_grids(shape[1], sides))
    # First those that divide the picture into patches without a rest.
    grids.sort(key=lambda x: any(side % n for side, n in zip(sides, x[1])))
    return FeatureMap(path, layer, grids[0][1], shape[2], grids[0][0]) if grids else None


def _has_ratio(grid: tuple[int, ...], sides: tuple[int, int]) -> bool:
    if sides[0] == sides[1]:
        return grid[0] == grid[1] <= sides[0]
    fits = all(n <= side for n, side in zip(grid, sides))
    return fits and abs(grid[0] - grid[1] * sides[0] / sides[1]) <= _TOLERANCE


def _grids(tokens: int, sides: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """The grids that a number of tokens may be, each with the number of other tokens."""
    common = math.gcd(*sides)
    height, width = sides[0] // common, sides[1] // common
    for others in range(min(_MOST_OTHER_TOKENS, tokens - 1) + 1):
        factor = math.isqrt((tokens - others) // (height * width))
        grid = factor * height, factor * width
        if math.prod(grid) == tokens - others > 1:
            yield others, grid
