"""What is known about models by name without importing the libraries that have them.

``models.json`` beside this module is written by ``tools/make_architectures.py``, because
building all 285 models of tfimm takes forty minutes and importing TensorFlow takes seconds. A
test compares it with the installed packages.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any, NamedTuple

from tfimm_lora.config import with_default
from tfimm_lora.families.recognize import family_of_application
from tfimm_lora.zoo.keras3_models.known import is_known, known, names
from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS, TORCH_FILES


class KnownModel(NamedTuple):
    """A model that can be created by its name.

    Attributes:
        parameters: The number of parameters, with the classifier of the named model.
        family: The model class of tfimm, or the module of ``keras.applications``.
        input_size: The height and width; None where the model takes any.
        targets: The layers that LoRA adapts by default, with timm's names; None for all but
            the classifier.
        pretrained: Whether there are pretrained weights for the name.
        in_keras3: Whether Keras 3 has the model.
    """

    parameters: int
    family: str
    input_size: tuple[int | None, int | None]
    targets: str | list[str] | None
    pretrained: bool
    in_keras3: bool


@functools.cache
def tfimm_models() -> dict[str, KnownModel]:
    """The models of tfimm that have a LoRA version, by name, in the order of tfimm.

    Example:
        >>> from tfimm_lora.zoo.model_table import tfimm_models
        >>> tfimm_models()["vit_tiny_patch16_224"].parameters
        5717416
    """
    table = _read()["tfimm"]
    return {
        name: KnownModel(
            parameters,
            family,
            (height, width),
            table["families"][family],
            name in CHECKPOINTS or name in TORCH_FILES,
            is_known(name),
        )
        for name, (parameters, family, height, width) in table["models"].items()
    }


@functools.cache
def keras3_models() -> dict[str, KnownModel]:
    """The models of tfimm and timm that Keras 3 can build, by name without a tag.

    Example:
        >>> from tfimm_lora.zoo.model_table import keras3_models
        >>> keras3_models()["mobilenetv3_large_100"].family
        'mobilenetv3'
    """
    table = {}
    for name in names():
        row = known(name)
        table[name] = KnownModel(
            row.parameters,
            row.family,
            row.config.input_size,
            None,
            bool(row.checkpoint),
            True,
        )
    return table


@functools.cache
def applications_table() -> dict[str, KnownModel]:
    """The models of ``keras.applications`` by name; all of them have weights for ImageNet.

    Example:
        >>> from tfimm_lora.zoo.model_table import applications_table
        >>> applications_table()["InceptionV3"].input_size
        (299, 299)
    """
    return {
        name: KnownModel(parameters, family, (height, width), _targets(name), True, in_keras3)
        for name, (parameters, family, height, width, in_keras3) in _read()[
            "applications"
        ].items()
    }


def _targets(name: str) -> str | list[str] | None:
    """Return the default targets of a model of keras.applications, with timm's names."""
    family = family_of_application(name)
    if family is None:
        return None
    targets = with_default(family.presets)["default"]
    return targets if targets is None or isinstance(targets, str) else list(targets)


@functools.cache
def _read() -> dict[str, Any]:
    text = resources.files("tfimm_lora.zoo").joinpath("models.json").read_text()
    read: dict[str, Any] = json.loads(text)
    return read
