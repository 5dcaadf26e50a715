"""``Augmentation``: random crops, flips, rotations and colour changes, reproducible by seed.

The seed of a picture is derived from the seed of the run, the index of the epoch and the index
of the picture. The result depends on nothing else: not on the batch, the order, the number of
threads or devices, or an interruption of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfimm_lora.backend import installed
from tfimm_lora.finetuning.data.numpy_augmentation import DRAWN, GREY, numpy_augmentation
from tfimm_lora.validation import check_choice
from tfimm_lora.zoo.weights.preprocessing import INTERPOLATIONS


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training pictures, applied in the order of the arguments.

    Args:
        scale: The smallest and largest share of the area of the picture that a random crop
            takes, before it is resized to the input size. None: a center crop, as in
            evaluation.
        ratio: The smallest and largest aspect ratio of the crop, width over height, relative to
            the aspect ratio of the input.
        flip: Whether half of the pictures are flipped horizontally.
        rotate: The largest rotation in degrees, in both directions. The corners are filled by
            reflection.
        brightness, contrast, saturation: Each is multiplied by a random factor between 1 - x
            and 1 + x; 0 means no change. Contrast is relative to the mean grey of the picture.

    Raises:
        ValueError: for values out of range.

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.data.augmentation import Augmentation
        >>> augment = Augmentation.named("light").function((4, 4))
        >>> picture = np.arange(8 * 6 * 3, dtype="uint8").reshape(8, 6, 3)
        >>> first, again = augment(picture, [7, 1]), augment(picture, [7, 1])
        >>> first.shape, bool((first.numpy() == again.numpy()).all())
        (TensorShape([4, 4, 3]), True)

    Reference: ``RandomResizedCrop`` and ``ColorJitter`` of torchvision. Unlike there, crops are
    drawn only from those that fit, instead of being drawn again if they do not.
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    rotate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for name, most in (("scale", 1.0), ("ratio", math.inf)):
            given = getattr(self, name)
            if name == "scale" and given is None:
                continue
            if len(given) != 2 or not 0 < given[0] <= given[1] <= most:
                raise ValueError(
                    f"Received {name}={given}; expected (smallest, largest) above 0"
                    f"{' and at most 1' if name == 'scale' else ''}."
                )
            object.__setattr__(self, name, tuple(map(float, given)))  # lists come from files
        for name, most in (
            ("rotate", 180.0),
            ("brightness", 1.0),
            ("contrast", 1.0),
            ("saturation", 1.0),
        ):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(
                    f"Received {name}={getattr(self, name)}; expected a number from 0 (no "
                    f"change) to {most:g}."
                )

    @classmethod
    def none(cls) -> Augmentation:
        """No augmentation."""
        return cls()

    @classmethod
    def named(cls, name: str) -> Augmentation:
        """Return a preset.

        "none", "light" (large crops and flips), or "strong" (smaller crops, flips and slight
        colour changes), which needs many epochs.

        Raises:
            ValueError: for another name.
        """
        check_choice(name, "augmentation", PRESETS)
        return PRESETS[name]

    def function(
        self,
        size: tuple[int, int],
        *,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
    ) -> Callable[..., Any]:
        """Return the augmentation as a function, which can be used in ``Dataset.map``.

        Args:
            size: The height and width of the result.
            interpolation: The interpolation for resizing, as in ``Preprocessing``.
            crop_pct: The share of the shorter side that the center crop takes if there is no
                random crop.

        Returns:
            A function from a picture (h, w, c) of any numeric type in [0, 255] and a seed of
            two integers to a float32 tensor (height, width, c) in [0, 255]. Without TensorFlow,
            to a numpy array with the same values up to rounding. With a mask, int32 (h, w), as
            third argument it returns the picture and the mask, which is cropped, flipped and
            rotated with it. The mask has no new values: its pixels are the nearest.
        """
        method = INTERPOLATIONS.get(interpolation, interpolation)
        if not installed("tensorflow"):
            return numpy_augmentation(self, size, method, crop_pct)
        import tensorflow as tf

        def augment(picture: Any, seed: Any, mask: Any = None) -> Any:
            picture = tf.convert_to_tensor(picture)
            # The algorithm is set because TensorFlow's default differs between devices.
            numbers = tf.random.stateless_uniform((len(DRAWN),), seed, alg="philox")
            drawn = dict(zip(DRAWN, tf.unstack(numbers)))
            crop = self._crop(tf, picture, size, crop_pct, drawn)

            def moved(image: Any, method: str, is_mask: bool = False) -> Any:
                top, left, rows, columns = crop
                image = image[top : top + rows, left : left + columns]
                image = tf.image.resize(image, size, method, antialias=True)
                if not is_mask:  # cubic interpolation overshoots
                    image = _clipped(tf, tf.cast(image, tf.float32))
                if self.flip:
                    mirror = drawn["flip"] < 0.5
                    image = tf.cond(mirror, lambda: tf.reverse(image, [1]), lambda: image)
                if self.rotate:
                    limit = math.radians(self.rotate)
                    angle = limit * (2 * drawn["turn"] - 1)
                    image = _turned(tf, image, angle, nearest=is_mask)
                return image

            picture = self._coloured(tf, moved(picture, method), drawn)
            if mask is None:
                return picture
            return picture, moved(tf.convert_to_tensor(mask)[..., None], "nearest", True)[
                ..., 0
            ]

        return augment

    def enough(self, size: tuple[int, int]) -> int | None:
        """The length of the shorter side of a picture for which no random crop is upscaled.

        Larger pictures can be read at a reduced size; see ``read_picture(at_least=...)``. None
        if crops are not random.
        """
        if self.scale is None:
            return None
        stretch = max(1 / self.ratio[0], self.ratio[1])
        return math.ceil(max(size) * math.sqrt(stretch / self.scale[0]))

    def _crop(self, tf: Any, picture: Any, size: Any, crop_pct: float, drawn: Any) -> list[Any]:
        """Top, left, height and width of the crop."""
        sides = tf.cast(tf.shape(picture)[:2], tf.float32)
        height, width = sides[0], sides[1]
        proportion = size[1] / size[0]
        low, high = self.ratio if self.scale is not None else (1.0, 1.0)
        low, high = low * proportion, high * proportion
        # The largest area with an aspect ratio in the range.
        largest = tf.minimum(height * width, tf.minimum(height**2 * high, width**2 / low))
        if self.scale is None:
            area, ratio = largest * crop_pct**2, proportion
            places = tf.constant([0.5, 0.5])
        else:
            least, most = self.scale
            area = height * width * (least + (most - least) * drawn["area"])
            area = tf.minimum(area, largest)
            # Log-uniform over the aspect ratios for which this area fits into the picture.
            first = tf.math.log(tf.maximum(low, area / height**2))
            last = tf.math.log(tf.minimum(high, width**2 / area))
            ratio = tf.exp(first + (last - first) * drawn["ratio"])
            places = tf.stack([drawn["top"], drawn["left"]])
        crop = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)]))
        crop = tf.clip_by_value(crop, 1.0, sides)
        # The minimum is needed because of float32 rounding: x * 1000 can be 1000 for x < 1.
        corner = tf.minimum(tf.floor(places * (sides - crop + 1)), sides - crop)
        return list(tf.unstack(tf.cast(tf.concat([corner, crop], 0), tf.int32)))

    def _coloured(self, tf: Any, picture: Any, drawn: Any) -> Any:
        """Apply brightness b, contrast c and saturation s with one matrix product.

        For pixels x with the mean grey m: y = c b x + (1 - c) b m, then s y + (1 - s) grey(y),
        clipped to [0, 255].
        """
        if not (self.brightness or self.contrast or self.saturation):
            return picture
        channels = picture.shape[-1]
        grey = tf.constant(GREY if channels == 3 else (1 / channels,) * channels)[:, None]
        b, c, s = (
            1.0 + getattr(self, name) * (2 * drawn[name] - 1)
            for name in ("brightness", "contrast", "saturation")
        )
        mean = tf.reduce_mean(picture, (0, 1))[None] @ grey
        matrix = c * b * (s * tf.eye(channels) + (1 - s) * grey)
        return _clipped(tf, tf.tensordot(picture, matrix, 1) + (1 - c) * b * mean)


def _clipped(tf: Any, picture: Any) -> Any:
    return tf.clip_by_value(picture, 0.0, 255.0)


def _turned(tf: Any, picture: Any, angle: Any, nearest: bool = False) -> Any:
    """Rotate a picture (h, w, c) of known size about its center. The angle is in radians."""
    height, width = picture.shape[:2]
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = (height - 1) / 2, (width - 1) / 2
    # The matrix maps positions in the result to positions in the picture.
    matrix = [cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos, 0.0, 0.0]
    turned = tf.raw_ops.ImageProjectiveTransformV3(
        images=picture[None],
        transforms=tf.stack(matrix)[None],
        output_shape=tf.constant([height, width]),
        fill_value=0.0,
        interpolation="NEAREST" if nearest else "BILINEAR",
        fill_mode="REFLECT",
    )[0]
    return tf.ensure_shape(turned, picture.shape)


#: Augmentations by name.
PRESETS = {
    "none": Augmentation(),
    "light": Augmentation(scale=(0.7, 1.0), flip=True),
    "strong": Augmentation(
        scale=(0.35, 1.0), flip=True, brightness=0.2, contrast=0.2, saturation=0.2
    ),
}
