"""``Augmentation``: random crops, flips, colours and small turns, each fixed by a seed.

Every picture has a seed of its own, made of the run's, the epoch's and the picture's number.
What happens to it depends on nothing else: not on the batch, the order, the number of threads
or devices, or where a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tfimm_lora.zoo.weights.preprocessing import INTERPOLATIONS

#: The random numbers of a picture, in [0, 1). New ones go to the end: they leave the others.
_DRAWN = (
    "area",
    "ratio",
    "top",
    "left",
    "flip",
    "turn",
    "brightness",
    "contrast",
    "saturation",
)

#: How much red, green and blue weigh in grey (ITU-R 601).
_GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a picture in training, in this order.

    Args:
        scale: The least and greatest share of the picture's area that a random crop takes,
            before it is resized to the input's size. None: no random crop, but the middle of
            the picture, as in evaluation.
        ratio: How far a crop may be stretched sideways: its width over its height, over that of
            the input's size.
        flip: Whether half of the pictures are mirrored, left to right.
        rotate: Most degrees to turn, either way; the corners are filled by reflection.
        brightness, contrast, saturation: Each multiplied by a factor of 1 - x to 1 + x; none of
            them changes for 0. Contrast is to the picture's mean grey.

    Raises:
        ValueError: for values out of these bounds.

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.data.augmentation import Augmentation
        >>> augment = Augmentation.named("light").function((4, 4))
        >>> picture = np.arange(8 * 6 * 3, dtype="uint8").reshape(8, 6, 3)
        >>> first, again = augment(picture, [7, 1]), augment(picture, [7, 1])
        >>> first.shape, bool((first.numpy() == again.numpy()).all())
        (TensorShape([4, 4, 3]), True)

    Reference: torchvision's ``RandomResizedCrop`` and ``ColorJitter``. A crop that does not fit
    is not drawn again, as there, but drawn from those that fit.
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
                    f"Received {name}={given}; expected two numbers, (least, greatest), above 0"
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
                    f"Received {name}={getattr(self, name)}; expected a number from 0, for no "
                    f"change, to {most:g}."
                )

    @classmethod
    def none(cls) -> Augmentation:
        """Nothing changes."""
        return cls()

    @classmethod
    def named(cls, name: str) -> Augmentation:
        """A preset.

        "none", "light" (large crops, mirrored) for pictures where little may change, or
        "default" (smaller crops, mirrored, a little colour) for ordinary photographs.

        Raises:
            ValueError: for another name.
        """
        if name not in PRESETS:
            raise ValueError(f"Received {name!r}; expected one of {', '.join(PRESETS)}.")
        return PRESETS[name]

    def function(
        self,
        size: tuple[int, int],
        *,
        interpolation: str = "bicubic",
        crop_pct: float = 1.0,
    ) -> Callable[[Any, Any], Any]:
        """The augmentation as a function of a picture and a seed, also for ``Dataset.map``.

        Args:
            size: Height and width of the result.
            interpolation: How crops are resized, as in ``Preprocessing``.
            crop_pct: The share of the shorter side that the middle crop takes where there is
                no random one.

        Returns:
            A function from a picture (h, w, c) of any numeric type in [0, 255] and a seed of
            two integers to a float32 tensor (height, width, c) in [0, 255].
        """
        import tensorflow as tf

        method = INTERPOLATIONS.get(interpolation, interpolation)

        def augment(picture: Any, seed: Any) -> Any:
            picture = tf.convert_to_tensor(picture)
            # Named, since TensorFlow's own choice differs between devices.
            numbers = tf.random.stateless_uniform((len(_DRAWN),), seed, alg="philox")
            drawn = dict(zip(_DRAWN, tf.unstack(numbers)))
            top, left, rows, columns = self._crop(tf, picture, size, crop_pct, drawn)
            picture = picture[top : top + rows, left : left + columns]
            picture = tf.image.resize(picture, size, method, antialias=True)
            picture = _clipped(tf, picture)  # cubic kernels overshoot, pictures do not
            if self.flip:
                mirror = drawn["flip"] < 0.5
                picture = tf.cond(mirror, lambda: tf.reverse(picture, [1]), lambda: picture)
            if self.rotate:
                limit = math.radians(self.rotate)
                picture = _turned(tf, picture, limit * (2 * drawn["turn"] - 1))
            return self._coloured(tf, picture, drawn)

        return augment

    def enough(self, size: tuple[int, int]) -> int | None:
        """The length of a picture's shorter side that lets no random crop be enlarged.

        More pixels than these are of no use; see ``read_picture(at_least=...)``. None where
        crops are not random.
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
        # The greatest area whose width over height is in bounds.
        largest = tf.minimum(height * width, tf.minimum(height**2 * high, width**2 / low))
        if self.scale is None:
            area, ratio = largest * crop_pct**2, proportion
            places = tf.constant([0.5, 0.5])
        else:
            least, most = self.scale
            area = height * width * (least + (most - least) * drawn["area"])
            area = tf.minimum(area, largest)
            # Of the ratios that such an area can have here, evenly on a logarithmic scale.
            first = tf.math.log(tf.maximum(low, area / height**2))
            last = tf.math.log(tf.minimum(high, width**2 / area))
            ratio = tf.exp(first + (last - first) * drawn["ratio"])
            places = tf.stack([drawn["top"], drawn["left"]])
        crop = tf.round(tf.stack([tf.sqrt(area / ratio), tf.sqrt(area * ratio)]))
        crop = tf.clip_by_value(crop, 1.0, sides)
        # The minimum: in float32, a number below 1 times 1000 can be 1000.
        corner = tf.minimum(tf.floor(places * (sides - crop + 1)), sides - crop)
        return list(tf.unstack(tf.cast(tf.concat([corner, crop], 0), tf.int32)))

    def _coloured(self, tf: Any, picture: Any, drawn: Any) -> Any:
        """Brightness b, contrast c, saturation s in one product, of pixels x of mean grey m.

        First y = c b x + (1 - c) b m, then s y + (1 - s) grey(y), cut to [0, 255] at the end.
        """
        if not (self.brightness or self.contrast or self.saturation):
            return picture
        channels = picture.shape[-1]
        grey = tf.constant(_GREY if channels == 3 else (1 / channels,) * channels)[:, None]
        b, c, s = (
            1.0 + getattr(self, name) * (2 * drawn[name] - 1)
            for name in ("brightness", "contrast", "saturation")
        )
        mean = tf.reduce_mean(picture, (0, 1))[None] @ grey
        matrix = c * b * (s * tf.eye(channels) + (1 - s) * grey)
        return _clipped(tf, tf.tensordot(picture, matrix, 1) + (1 - c) * b * mean)


def _clipped(tf: Any, picture: Any) -> Any:
    return tf.clip_by_value(picture, 0.0, 255.0)


def _turned(tf: Any, picture: Any, angle: Any) -> Any:
    """A picture (h, w, c) of known size, turned about its middle, by radians."""
    height, width = picture.shape[:2]
    cos, sin = tf.cos(angle), tf.sin(angle)
    y, x = (height - 1) / 2, (width - 1) / 2
    # For each place of the result, where in the picture it comes from.
    matrix = [cos, -sin, x - x * cos + y * sin, sin, cos, y - x * sin - y * cos, 0.0, 0.0]
    turned = tf.raw_ops.ImageProjectiveTransformV3(
        images=picture[None],
        transforms=tf.stack(matrix)[None],
        output_shape=tf.constant([height, width]),
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )[0]
    return tf.ensure_shape(turned, picture.shape)


#: Augmentations by name.
PRESETS = {
    "none": Augmentation(),
    "light": Augmentation(scale=(0.7, 1.0), flip=True),
    "default": Augmentation(
        scale=(0.35, 1.0), flip=True, brightness=0.2, contrast=0.2, saturation=0.2
    ),
}
