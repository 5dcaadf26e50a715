"""``Preprocessing``: how pictures become the input of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora.zoo.weights.preprocessing import create_mask_resizing, create_preprocessing


@dataclass(frozen=True)
class Preprocessing:
    """How a picture in [0, 255] becomes an input: (picture / 255 - mean) / std.

    The fields have the names of the tfimm configs.

    Args:
        input_size: The height and width of the input in pixels.
        mean, std: One number per channel, for pictures in [0, 1], in the channel order of the
            model.
        in_channels: The number of channels. Default: 3.
        interpolation: The interpolation for resizing: "bilinear", "bicubic", ... Default:
            "bicubic".
        crop_pct: The share of the side of the resized picture that the center crop keeps in
            evaluation. Default: 0.875.
        channel_order: "rgb" (default), or "bgr" for models that were trained with it.
        crop_mode: "center" (default), or "squash" to resize both sides to that of the input
            (divided by crop_pct), as timm calls it, instead of the shorter one.

    Example:
        >>> from tfimm_lora.finetuning.data.preprocessing import Preprocessing
        >>> import numpy as np
        >>> pre = Preprocessing((2, 2), mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> float(pre.function()(np.full((2, 2, 3), 255)).numpy().max())
        1.0
    """

    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    in_channels: int = 3
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    channel_order: str = "rgb"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.input_size) != 2 or any(int(side) < 1 for side in self.input_size):
            raise ValueError(
                f"Received input_size={self.input_size}; expected (height, width) in pixels, "
                "for example (224, 224)."
            )
        if self.channel_order not in ("rgb", "bgr"):
            raise ValueError(
                f'Received channel_order={self.channel_order!r}; expected "rgb" or "bgr".'
            )
        if self.crop_mode not in ("center", "squash"):
            raise ValueError(
                f'Received crop_mode={self.crop_mode!r}; expected "center" or "squash".'
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"Received crop_pct={self.crop_pct}; expected a share in (0, 1].")

    @classmethod
    def of(cls, cfg: Any) -> Preprocessing:
        """Create the preprocessing from the config of a tfimm model."""
        given = {f.name: getattr(cfg, f.name, None) for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if value})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """Create the preprocessing from the result of ``to_dict``."""
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain lists, numbers and strings, for YAML and JSON."""
        values = dataclasses.asdict(self)
        if self.crop_mode == "center":
            del values["crop_mode"]  # as in runs of earlier versions
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def mask_function(self) -> Callable[[Any], Any]:
        """A function that resizes and crops masks (h, w) as ``function(resize=True)`` does."""
        return create_mask_resizing(self)

    def pixels(self, inputs: np.ndarray) -> np.ndarray:
        """The pictures (n, height, width, 3) in 8-bit RGB that inputs were made from: what the
        model sees of them, after resizing and cropping."""
        values = (np.asarray(inputs, np.float64) * self.std + self.mean) * 255
        rgb = values[..., ::-1] if self.channel_order == "bgr" else values
        rgb = np.repeat(rgb, 3, axis=-1) if self.in_channels == 1 else rgb
        return np.rint(rgb).clip(0, 255).astype(np.uint8)

    def function(self, *, resize: bool = False) -> Callable[[Any], Any]:
        """The preprocessing as a function of RGB pictures; see ``create_preprocessing``."""
        prepare = create_preprocessing(self, resize=resize)
        if self.channel_order == "rgb":
            return prepare
        return lambda pictures: prepare(pictures[..., ::-1])
