"""Add a decoder to a backbone: scores of classes for each pixel."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Backend, Layer, Tensor
from tfimm_lora.families.recognize import DECODER
from tfimm_lora.model.new_classifier import takes_pictures
from tfimm_lora.validation import check_integer

#: The number of channels of the decoder.
WIDTH = 128

#: The finer of two feature maps has the size of the input divided by this.
STRIDE = 8

#: Tokens before those of patches (class, distillation, registers) are at most so many.
_MOST_PREFIX = 8

Size = tuple[int, int]


class Grid(NamedTuple):
    """The patches among tokens: how many tokens are before them, their rows and columns."""

    prefix: int
    rows: int
    columns: int


def with_decoder(model: Any, classes: int) -> Any:
    """Create a model for segmentation from a classifier of pictures or a backbone.

    The last feature map of the backbone, or its patch tokens as a map, and the last sum of a
    residual block at an eighth of the size of the input, if there is one, are each normalized
    (layer normalization) and projected to 128 channels (1x1 convolution). The first is resized
    to the size of the second, their sum passes a ReLU and a 1x1 convolution to the classes, and
    the result is resized to the size of the input (bilinear).

    Args:
        model: A functional or Sequential model that takes pictures of a fixed size. Its layers
            are reused; what comes after the last feature map is left out.
        classes: The number of classes.

    Returns:
        A functional model that returns logits, (batch, height, width, classes). The decoder is
        a model in it with the name "pixel_head".

    Raises:
        TypeError, ValueError: If ``classes`` is not a positive integer.
        ValueError: If the model has no feature map, or has a decoder already.

    Example:
        >>> import tensorflow as tf
        >>> import tfimm_lora as lora
        >>> classifier = tf.keras.Sequential([
        ...     tf.keras.Input((16, 16, 3)), tf.keras.layers.Conv2D(4, 3, strides=2),
        ...     tf.keras.layers.GlobalAveragePooling2D(), tf.keras.layers.Dense(10)])
        >>> lora.with_decoder(classifier, 5).output_shape
        (None, 16, 16, 5)

    References: Xie et al., "SegFormer", arXiv:2105.15203 (a decoder of 1x1 convolutions);
    Howard et al., "Searching for MobileNetV3", arXiv:1905.02244, section 6.4 (two maps).
    """
    backend = backend_of(model)
    check_integer(classes, "classes", 1)
    if any(layer.name == DECODER for layer in getattr(model, "layers", ())):
        raise ValueError(
            f"Received model '{model.name}', which has a decoder; expected a classifier or a "
            "backbone. Create another model from that."
        )
    if not takes_pictures(model):
        raise no_features(model, "it is no functional or Sequential model of pictures")
    size = fixed_size(model, tuple(model.inputs[0].shape)[1:3])
    found = _found(backend, model, size)
    if found is None:
        raise no_features(model, "no layer returns a map of features, or tokens of patches")
    maps = _called(backend, found)
    shapes = [tuple(x.shape)[1:] for x in maps]
    decoder = create_decoder(backend.keras, shapes, classes, size)
    outputs = decoder(maps if len(maps) > 1 else maps[0])
    result = backend.keras.Model(model.inputs[0], outputs, name=model.name)
    if found.inner is not None:
        result.backbone = found.inner  # its class tells whose names its layers have
    return result


def fixed_size(model: Any, size: Sequence[int | None]) -> Size:
    """The height and width of the input.

    Raises:
        ValueError: If they are not fixed.
    """
    height, width = size
    if height is None or width is None:
        raise ValueError(
            f"Received model '{model.name}', which takes pictures of any size; expected a "
            "fixed size for a segmentation. Pass --input-size (input_size)."
        )
    return int(height), int(width)


def no_features(model: Any, why: str) -> ValueError:
    """The error for a model without a feature map."""
    return ValueError(
        f"Received model '{model.name}' ({type(model).__name__}) for a segmentation, which "
        f"needs features at places of the picture, but {why}. Use a CNN, a ViT or another "
        "model with a feature map, larger pictures (--input-size), or your own model that "
        "returns (batch, height, width, classes)."
    )


def create_decoder(
    keras: Any, shapes: Sequence[tuple[int | None, ...]], classes: int, size: Size
) -> Any:
    """Create the decoder of ``with_decoder``.

    Args:
        keras: The Keras.
        shapes: The shapes of the last map, (h, w, d) or of tokens (n, d), and of the finer one
            if there is one, without the batch.
        classes: The number of classes.
        size: The height and width of the input.

    Returns:
        A functional model from a list of these maps (or one) to logits.
    """
    layers = keras.layers
    inputs = [keras.Input(shape) for shape in shapes]
    x = inputs[0]
    if len(shapes[0]) == 2:
        grid = grid_of(shapes[0][0] or 0, size)
        assert grid is not None
        if grid.prefix:
            x = layers.Cropping1D((grid.prefix, 0), name="patches")(x)
        x = layers.Reshape((grid.rows, grid.columns, shapes[0][1]), name="map")(x)

    def projected(x: Tensor, name: str) -> Tensor:
        x = layers.LayerNormalization(epsilon=1e-6, name=f"{name}norm")(x)
        return layers.Conv2D(WIDTH, 1, name=f"{name}conv")(x)

    x = projected(x, "")
    for fine, shape in zip(inputs[1:], shapes[1:]):
        x = layers.Resizing(*shape[:2], interpolation="bilinear", name="resize_map")(x)
        x = layers.Add(name="sum")([x, projected(fine, "fine_")])
    x = layers.Activation("relu", name="relu")(x)
    x = layers.Conv2D(classes, 1, name="classifier")(x)
    x = layers.Resizing(*size, interpolation="bilinear", name="resize")(x)
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], x, name=DECODER)


# -- feature maps ---------------------------------------------------------------------------


def grid_of(tokens: int, size: Size) -> Grid | None:
    """Where the patches of a picture are among tokens; None if they cannot be patches.

    Example:
        >>> from tfimm_lora.model.new_decoder import grid_of
        >>> grid_of(197, (224, 224))  # a class token, and patches of 16 x 16 pixels
        Grid(prefix=1, rows=14, columns=14)
    """
    found = []
    for patch in range(2, min(size) // 2 + 1):
        rows, columns = size[0] // patch, size[1] // patch
        prefix = tokens - rows * columns
        if 0 <= prefix <= min(_MOST_PREFIX, rows * columns // 2):
            found.append(Grid(prefix, rows, columns))
    return min(found, default=None)


def is_map(shape: Sequence[int | None], size: Size) -> bool:
    """Whether a tensor of this shape, without the batch, has features at several places."""
    if len(shape) == 3:
        return None not in shape and shape[0] * shape[1] > 1  # type: ignore[operator]
    return len(shape) == 2 and None not in shape and grid_of(shape[0] or 0, size) is not None


def is_fine(shape: Sequence[int | None], size: Size) -> bool:
    """Whether a map has an eighth of the size of the input."""
    if len(shape) != 3:
        return False
    pairs = zip(shape, size)
    return all(side in (full // STRIDE, math.ceil(full / STRIDE)) for side, full in pairs)


def needs_fine(shape: Sequence[int | None], size: Size) -> bool:
    """Whether the last map is coarser than an eighth of the size of the input."""
    return len(shape) == 3 and bool(shape[0]) and shape[0] < size[0] // STRIDE  # type: ignore[operator]


class _Found(NamedTuple):
    """Feature maps: the last, and the finer one if there is one.

    They are in the graph of the whole model, or in that of ``inner``, a backbone in it that is
    called on ``entry``.
    """

    maps: list[Tensor]
    inner: Any = None
    entry: Tensor = None


def _found(backend: Backend, model: Any, size: Size, like: Any = None) -> _Found | None:
    """Find the feature maps of a model.

    Args:
        backend: The backend of the model.
        model: A functional or Sequential model.
        size: The height and width of its input.
        like: The shape of the last map, if it is known.
    """
    high, backbone, entry = None, None, None
    for tensor, layer, inputs in _walk_back(backend, model.outputs):
        shape = tuple(getattr(tensor, "shape", ()))
        is_input = not inputs
        is_last = not is_input and is_map(shape[1:], size) and like in (None, shape)
        is_nested = backend.is_model(layer) and takes_pictures(layer) and len(inputs) == 1
        if is_nested and tuple(inputs[0].shape)[1:3] == size:
            backbone, entry = layer, inputs[0]
        high = tensor if is_last else None
        if high is not None or backbone is not None:
            break
    if high is not None and not needs_fine(tuple(high.shape)[1:], size):
        return _Found([high])
    if backbone is not None:
        like = None if high is None else tuple(high.shape)
        inside = _found(backend, backbone, size, like)
        if inside is None or inside.inner is not None:
            return inside
        return _Found(inside.maps, backbone, entry)
    if high is None:
        return None
    fine = _last_sum(backend, high, size)
    return _Found([high] if fine is None else [high, fine])


def _called(backend: Backend, found: _Found) -> list[Tensor]:
    """The maps in the graph of the whole model."""
    if found.inner is None:
        return found.maps
    maps = found.maps if len(found.maps) > 1 else found.maps[0]
    features = backend.keras.Model(found.inner.inputs[0], maps, name=found.inner.name)
    called = features(found.entry)
    return list(called) if isinstance(called, (list, tuple)) else [called]


def _last_sum(backend: Backend, high: Tensor, size: Size) -> Tensor | None:
    """The nearest sum at an eighth of the size, with its activation; else any such map."""
    first = None
    activated: dict[int, Tensor] = {}
    for tensor, layer, inputs in _walk_back(backend, [high]):
        if not is_fine(tuple(tensor.shape)[1:], size):
            continue
        first = tensor if first is None else first
        if _is_activation(layer) and len(inputs) == 1:
            activated[id(inputs[0])] = tensor
        if _is_sum(layer):
            return activated.get(id(tensor), tensor)
    return first


def _walk_back(
    backend: Backend, outputs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Layer, list[Tensor]]]:
    """The tensors that lead to some, the nearest first, with their layers and its inputs."""
    waiting = deque(outputs)
    seen: set[int] = set()
    while waiting:
        tensor = waiting.popleft()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        layer, inputs = backend.made_by(tensor)
        yield tensor, layer, inputs
        waiting.extend(inputs)


def _is_sum(layer: Any) -> bool:
    return type(layer).__name__ == "Add" or "operators__.add" in layer.name


def _is_activation(layer: Any) -> bool:
    return type(layer).__name__ in ("Activation", "ReLU", "Relu", "Relu6")


def features_of(named: Mapping[str, Any], size: Size) -> list[Any] | None:
    """The last map of features by name, in order, and the last at an eighth of the size.

    Maps of attention and of the stem are left out.

    Args:
        named: The features of a tfimm model.
        size: The height and width of the input.

    Returns:
        One map or two, as for ``create_decoder``; None if there is none.
    """
    kept = [x for name, x in named.items() if not name.endswith("attn") and name != "stem"]
    shaped = [(tuple(x.shape)[1:], x) for x in kept if len(x.shape) > 2]
    maps = [(shape, x) for shape, x in shaped if is_map(shape, size)]
    if not maps:
        return None
    shape, high = maps[-1]
    fine = [x for shape, x in maps[:-1] if is_fine(shape, size)]
    return [high, fine[-1]] if fine and needs_fine(shape, size) else [high]
