"""The preprocessing in transformers' preprocessor_config.json, in timm's terms."""

from __future__ import annotations

from typing import Any

#: PIL's numbers of interpolations.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def of_transformers(config: dict[str, Any]) -> dict[str, Any]:
    """Return mean, std, crop_pct and interpolation of an image processor, if it has them.

    Example:
        >>> of_transformers({"image_mean": [0.5] * 3, "resample": 3})
        {'mean': [0.5, 0.5, 0.5], 'interpolation': 'bicubic'}
    """
    fields: dict[str, Any] = {}
    if config.get("do_normalize", True):
        fields["mean"], fields["std"] = config.get("image_mean"), config.get("image_std")
    else:
        fields["mean"], fields["std"] = [0.0] * 3, [1.0] * 3
    scale = config.get("rescale_factor")
    if isinstance(scale, (int, float)) and not config.get("do_rescale", True):
        scale = 1.0
    if isinstance(scale, (int, float)) and fields["mean"] and fields["std"]:
        # Ours divides by 255: (p s - m) / d = (p / 255 - m / (255 s)) / (d / (255 s)).
        factor = 255.0 * scale
        fields["mean"] = [value / factor for value in fields["mean"]]
        fields["std"] = [value / factor for value in fields["std"]]
    fields["interpolation"] = _RESAMPLE.get(config.get("resample", -1))
    fields["crop_pct"] = _crop(config)
    return {name: value for name, value in fields.items() if value is not None}


def _crop(config: dict[str, Any]) -> float | None:
    """Return the side of the crop over that of the resized image."""
    if config.get("crop_pct") is not None:
        return float(config["crop_pct"])
    size, crop = config.get("size"), config.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    if config.get("do_center_crop") and edge and isinstance(crop, dict) and crop.get("height"):
        return float(crop["height"]) / float(edge)
    return 1.0 if isinstance(size, dict) and size.get("height") else None
