"""The models that Keras 3 can build by name: their dimensions and preprocessing, as data.

``models.json`` beside this module is written by ``tools/make_keras3_models.py`` from timm's
registry. Nothing here imports Keras, timm or tfimm.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, NamedTuple

from tfimm_lora.utils.suggestions import close_names
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS, TORCH_FILES, WITHOUT_WEIGHTS

#: The families that ``keras.applications`` builds; the others need keras_hub.
_APPLICATIONS = ("convnext", "densenet", "efficientnetv2", "mobilenetv2", "mobilenetv3_same")

#: All names of tfimm that have a LoRA class.
_TFIMM = frozenset((*CHECKPOINTS, *WITHOUT_WEIGHTS, *TORCH_FILES))

_HUB_PREFIX = re.compile(r"((hf[-_]hub|hf):(//)?)?timm/", re.IGNORECASE)


@dataclass
class KnownConfig:
    """The config of a named model on Keras 3, with the fields of tfimm's configs.

    Attributes:
        name: The name that the model was created with.
        architecture: The name of the architecture in timm, without a tag.
        nb_classes: The number of classes; 0 if the model returns features.
        in_channels: The number of channels of the images.
        input_size: The height and width of the images, in pixels.
        mean, std: One number per channel, for images in [0, 1].
        crop_pct: The share of the resized image that the center crop keeps.
        interpolation: The interpolation with which images are resized.
        classifier: The paths of the classifier layers.
        first_conv: The path of the first convolution, whose kernel ``transfer_weights`` adapts
            to another number of channels.
        transform_weights: The functions that resize weights for another input size, by the
            name of the weight.
    """

    name: str
    architecture: str
    nb_classes: int
    in_channels: int
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    classifier: tuple[str, ...] = ()
    first_conv: str = ""
    transform_weights: Mapping[str, Callable[[Any, Any, Any], Any]] = field(
        default_factory=dict, compare=False, repr=False
    )


class KnownModel3(NamedTuple):
    """A named model that can be built on Keras 3.

    Attributes:
        config: Its config with the registered number of classes and input size.
        family: The module of this package that builds it.
        arguments: The dimensions, as the family's ``build`` takes them.
        parameters: The number of parameters with the registered classifier.
        checkpoint: The name and tag of its weights in timm, or "".
    """

    config: KnownConfig
    family: str
    arguments: dict[str, Any]
    parameters: int
    checkpoint: str

    @property
    def needs_keras_hub(self) -> bool:
        """Whether keras_hub builds it, and not ``keras.applications``."""
        own = self.family in _APPLICATIONS or self.arguments.get("same_padding", False)
        return not own


def names() -> list[str]:
    """The names without tags that can be built, of tfimm and timm, in natural order.

    Example:
        >>> from tfimm_lora.zoo.keras3_models.known import names
        >>> "vit_tiny_patch16_224" in names(), "cait_m36_384" in names()
        (True, False)
    """
    theirs = [name for name in _read()["models"] if name not in _TFIMM]
    ours = [name for name in CHECKPOINTS if _of(name) is not None]
    return sorted(ours + theirs, key=_natural)


def is_known(name: str) -> bool:
    """Whether a name, with or without a tag, can be built on Keras 3."""
    return _of(name) is not None


def known(name: str) -> KnownModel3:
    """Look up a named model.

    Args:
        name: A name of tfimm or timm ("vit_tiny_patch16_224", "mobilenetv3_large_100"),
            optionally with a tag of timm ("vit_base_patch16_224.augreg_in1k") and behind
            "timm/". A name that both have means tfimm's model: "efficientnet_b0" is timm's
            "tf_efficientnet_b0".

    Raises:
        ValueError: If there is no such model, or if Keras 3 cannot build it exactly. The
            message contains the reason and similar names that can be built.
    """
    found = _of(name)
    if found is None:
        raise ValueError(_refusal(name))
    return found


def known_with(family: str, arguments: Mapping[str, Any]) -> str | None:
    """Return timm's name of the architecture with these dimensions, or None."""
    models = _read()["models"].items()
    same = (x for x, row in models if (row["family"], row["arguments"]) == (family, arguments))
    return next(same, None)


def refusal_reason(name: str) -> str | None:
    """The reason why a model of tfimm or timm cannot be built on Keras 3.

    None if it can be built, or if neither library has a model of this name.
    """
    architecture, _ = _architecture(name)
    if architecture in _read()["models"]:
        return None
    reason: str | None = _read()["refused"].get(architecture)
    if reason is None and _plain(name) in _TFIMM:
        return "neither keras_hub nor keras.applications has this architecture"
    return reason


def _refusal(name: str) -> str:
    reason, near = refusal_reason(name), close_names(_plain(name), names(), 3)
    needs_tfimm = (
        " tfimm has it on legacy Keras: set TF_USE_LEGACY_KERAS=1 before importing TensorFlow."
        if _plain(name) in _TFIMM
        else ""
    )
    architecture, tag = _architecture(name)
    if architecture in _read()["models"]:
        tags = ", ".join(_read()["models"][architecture]["tags"]) or "none"
        return (
            f"Received model_name={name!r}, but {architecture} has no weights with the tag "
            f"{tag!r}; expected one of its tags: {tags}; or none."
        )
    return (
        f"Received model_name={name!r}, "
        + (
            f"which Keras 3 cannot build exactly: {reason}."
            if reason
            else "which is not known; expected the name of a model of tfimm or timm."
        )
        + needs_tfimm
        + (f" Nearest that can be built: {', '.join(near)}." if near else "")
        + " See list_models()."
    )


def _of(name: str) -> KnownModel3 | None:
    architecture, tag = _architecture(name)
    row = _read()["models"].get(architecture)
    if row is None or (tag and tag not in row["tags"]):
        return None
    mean, std, size, crop, interpolation, classes = row["tags"].get(tag, row["default"])
    config = KnownConfig(
        _plain(name),
        architecture,
        classes,
        3,
        (size[0], size[1]),
        tuple(mean),
        tuple(std),
        crop,
        interpolation,
    )
    checkpoint = f"{architecture}.{tag}" if tag else ""
    return KnownModel3(config, row["family"], row["arguments"], row["parameters"], checkpoint)


def _architecture(name: str) -> tuple[str, str]:
    """The architecture of timm that a name means, and the tag of its weights or ""."""
    plain = _plain(name)
    architecture, _, tag = CHECKPOINTS.get(plain, plain).partition(".")
    row = _read()["models"].get(architecture)
    if row is not None and not tag and plain not in _TFIMM:
        tag = next(iter(row["tags"]), "")
    return architecture, tag


def _plain(name: str) -> str:
    return _HUB_PREFIX.sub("", name)


def _natural(name: str) -> list[Any]:
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


@functools.cache
def _read() -> dict[str, Any]:
    text = resources.files(__package__).joinpath("models.json").read_text()
    read: dict[str, Any] = json.loads(text)
    return read
