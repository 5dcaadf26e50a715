"""``create_preprocessing``: prepare images as a model's weights need them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from tfimm_lora.backend import default_backend, installed
from tfimm_lora.zoo.tfimm_models import import_tfimm, require_known
from tfimm_lora.zoo.weights.resizing import resized

#: timm's names of interpolations -> TensorFlow's names, where they differ.
INTERPOLATIONS = {
    "lanczos": "lanczos3",
    "random": "bilinear",
    "box": "area",
    "hamming": "bilinear",
}


def create_preprocessing(
    model_or_name: Any,
    *,
    in_channels: int | None = None,
    dtype: str | None = None,
    resize: bool = False,
) -> Callable[[Any], Any]:
    """Create a function that prepares images for a model: (image / 255 - mean) / std.

    Args:
        model_or_name: A model with a config (mean, std, ...), which ``load_timm_weights``
            and ``create_model(pretrained=True)`` set from the checkpoint; or such a config;
            or the name of a tfimm model, for its registered config.
        in_channels: Number of channels of the images. Default: from the config. Mean and std
            are repeated or truncated to it.
        dtype: Type of the result. Default: Keras' floatx.
        resize: Whether to resize and crop as timm does in evaluation: the shorter side to
            input_size / crop_pct, then a center crop of input_size. With the crop mode "squash"
            both sides are resized, so that with a crop_pct of 1 nothing is cut off. Default
            False.

    Returns:
        A function from an image (h, w, c) or a batch of images (n, h, w, c), with numbers of
        any type in [0, 255], to a tensor of TensorFlow. It also works in
        ``tf.data.Dataset.map``. Without TensorFlow it returns a numpy array, equal up to
        rounding.

    Raises:
        ImportError, RuntimeError: For a name, if tfimm is not installed or cannot be used.
        ValueError: If the name is unknown.
        TypeError: If the model has no config with mean and std.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> class Cfg: mean, std, in_channels = (0.5, 0.5, 0.5), (0.25, 0.25, 0.5), 3
        >>> class Model: cfg = Cfg
        >>> preprocess = lora.create_preprocessing(Model)
        >>> preprocess(np.full((2, 2, 3), 255)).numpy()[0, 0].tolist()
        [2.0, 2.0, 1.0]

    Reference: timm's ``create_transform`` with ``is_training=False``.
    """
    cfg = _config(model_or_name)
    channels = in_channels or cfg.in_channels
    dtype = dtype or default_backend().keras.backend.floatx()
    mean = _repeated(cfg.mean, channels)
    # tfimm has a std of zero for vit_base_patch16_224_miil, as timm 0.6 had.
    std = [value or 1.0 for value in _repeated(cfg.std, channels)]
    if not installed("tensorflow"):
        return _numpy_preprocessing(cfg, mean, std, dtype, resize)
    import tensorflow as tf

    result = tf.as_dtype(dtype)

    def preprocess(images: Any) -> Any:
        images = tf.cast(images, tf.float32)
        if resize:
            images = _resized(tf, images, cfg)
        images = (images / 255.0 - tf.constant(mean)) / tf.constant(std)
        return tf.cast(images, result)

    return preprocess


def create_mask_resizing(cfg: Any) -> Callable[[Any], Any]:
    """Create a function that resizes and crops masks as ``create_preprocessing`` does images.

    Args:
        cfg: A config with input_size, crop_pct and crop_mode.

    Returns:
        A function from integers (h, w) to integers of the input size, of the nearest pixels.
    """
    if not installed("tensorflow"):
        return lambda mask: _numpy_resized(np.asarray(mask)[..., None], cfg, "nearest")[
            ..., 0
        ].astype(np.int32)
    import tensorflow as tf

    def resize(mask: Any) -> Any:
        mask = tf.cast(mask, tf.int32)[..., None]
        return _resized(tf, mask, cfg, "nearest")[..., 0]

    return resize


def _config(model_or_name: Any) -> Any:
    if isinstance(model_or_name, str):
        return _registered_config(model_or_name)
    for cfg in (model_or_name, getattr(model_or_name, "cfg", None)):
        if all(hasattr(cfg, name) for name in ("mean", "std", "in_channels")):
            return cfg
    raise TypeError(
        f"Received {model_or_name!r}; expected a model whose cfg has mean, std and "
        "in_channels, such a config, or the name of a tfimm model."
    )


def _registered_config(name: str) -> Any:
    tfimm = import_tfimm()
    require_known(tfimm, name)
    return tfimm.models.model_config(name)


def _repeated(values: Any, channels: int) -> list[float]:
    """Repeat or truncate values to a number of channels."""
    return [float(values[i % len(values)]) for i in range(channels)]


def _resized(tf: Any, images: Any, cfg: Any, method: str | None = None) -> Any:
    """Resize and crop images (..., h, w, c) to the input size of a model."""
    height, width = cfg.input_size
    crop = getattr(cfg, "crop_pct", None) or 1.0
    if _squashes(cfg):
        size = tf.constant([math.floor(height / crop), math.floor(width / crop)])
    else:
        size = _covering(tf, tf.shape(images)[-3:-1], height / crop, width / crop)
    method = method or getattr(cfg, "interpolation", None) or "bicubic"
    images = tf.image.resize(images, size, INTERPOLATIONS.get(method, method), antialias=True)
    if method != "nearest":  # cubic and Lanczos kernels overshoot the range of the image
        images = tf.clip_by_value(images, 0.0, 255.0)
    offset = tf.cast(tf.round(tf.cast(size - cfg.input_size, tf.float32) / 2), tf.int32)
    top, left = offset[0], offset[1]
    images = images[..., top : top + height, left : left + width, :]
    return tf.ensure_shape(images, [*images.shape[:-3], height, width, images.shape[-1]])


def _squashes(cfg: Any) -> bool:
    """Whether both sides are resized, instead of the shorter one."""
    return getattr(cfg, "crop_mode", None) == "squash"


def _covering(tf: Any, sides: Any, height: float, width: float) -> Any:
    """Return the smallest size with the aspect ratio of ``sides`` that covers both lengths."""
    least = tf.constant([math.floor(height), math.floor(width)], tf.int64)
    sides = tf.cast(sides, tf.int64)
    # In integers, with the longer side rounded down, as in torchvision.
    fitted = sides * least[::-1] // sides[::-1]
    by_height = tf.stack([least[0], fitted[1]])
    by_width = tf.stack([fitted[0], least[1]])
    size = tf.where(fitted[1] >= least[1], by_height, by_width)
    return tf.cast(tf.maximum(size, least), tf.int32)


# -- without TensorFlow --------------------------------------------------------------------


def _numpy_preprocessing(
    cfg: Any, mean: list[float], std: list[float], dtype: str, resize: bool
) -> Callable[[Any], Any]:
    """The function that ``create_preprocessing`` returns, computed with numpy."""
    center, spread = np.array(mean, np.float32), np.array(std, np.float32)

    def preprocess(images: Any) -> Any:
        images = np.asarray(images)
        if resize:
            images = _numpy_resized(images, cfg)
        images = (images.astype(np.float32) / np.float32(255) - center) / spread
        return images.astype(_numpy_dtype(dtype))

    return preprocess


def _numpy_dtype(name: str) -> Any:
    if name == "bfloat16":  # numpy lacks it; Keras requires this package
        import ml_dtypes

        return ml_dtypes.bfloat16
    return np.dtype(name)


def _numpy_resized(images: np.ndarray, cfg: Any, method: str | None = None) -> np.ndarray:
    """As ``_resized``."""
    height, width = cfg.input_size
    crop = getattr(cfg, "crop_pct", None) or 1.0
    rows, columns = images.shape[-3:-1]
    size = (math.floor(height / crop), math.floor(width / crop))
    if not _squashes(cfg):
        size = _numpy_covering(rows, columns, height / crop, width / crop)
    method = method or getattr(cfg, "interpolation", None) or "bicubic"
    images = resized(images, size, INTERPOLATIONS.get(method, method))
    if method != "nearest":
        images = images.clip(0, 255)
    # Half to even, as tf.round.
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return images[..., top : top + height, left : left + width, :]


def _numpy_covering(rows: int, columns: int, height: float, width: float) -> tuple[int, int]:
    """As ``_covering``."""
    high, wide = math.floor(height), math.floor(width)
    fitted = columns * high // rows
    if fitted >= wide:
        return high, fitted
    return max(rows * wide // columns, high), wide
