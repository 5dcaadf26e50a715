"""The names of tensors in adapter files: which belong to an update, and which to a weight."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable

#: A tensor of an update; of LoHa, the factors and those of PEFT's use_effective_conv2d.
FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<bias>lora_B\.bias)"
    r"|(?P<loha>hada_(?:w[12]_[ab]|t[12])))"
)

#: A tensor of a variant of LoRA that is not supported.
OTHER_FACTOR = re.compile(
    r"(?:^|\.)(?:lora_(?:magnitude_vector|[A-Z]|embedding_[A-Z])|(?:hada|lokr)_\w+)(?:\.|$)"
)

#: A tensor of an update in the state dict of a PEFT model, which has the name of an adapter.
#: Files do not have it.
NAMED_FACTOR = re.compile(
    r".+\.(?:lora_[AB]\.(?P<name>[^.]+)\.(?:weight|bias)"
    r"|(?:lora_embedding_[AB]|lora_magnitude_vector|hada_\w+)\.(?P<other>[^.]+)(?:\.weight)?)"
)

#: The level that PEFT inserts above the weights of an adapted layer.
_BASE_LAYER = ".base_layer"

#: Levels above PEFT's copies of fully trained weights, which bias="all" writes too: the values
#: before training, and those that the file also has under the plain name.
_COPIES = ("original_module", "modules_to_save")


def ambiguous(names: Iterable[str]) -> list[str]:
    """Return the names of weights that a reader would take for something else.

    A layer of the model may be called like a level that PEFT inserts. The metadata of a file
    lists these names.
    """
    given = list(names)
    known = set(given)
    return [name for name in given if OTHER_FACTOR.search(name) or is_copy(name, known)]


def is_copy(name: str, names: Container[str]) -> bool:
    """Whether a weight is a copy that PEFT made of another one among ``names``.

    Within a module of several layers the name of the adapter may follow PEFT's level.
    """
    levels = name.split(".")
    return any(
        level in _COPIES and ".".join(levels[:i] + levels[i + 1 + more :]) in names
        for i, level in enumerate(levels[:-1])
        for more in (0, 1)
    )


def in_file(name: str, adapted: Container[str]) -> str:
    """Return the name that PEFT gives to a weight: in the base layer of an adapted layer."""
    module, _, leaf = name.rpartition(".")
    return f"{module}{_BASE_LAYER}.{leaf}" if module in adapted else name


def in_model(name: str, adapted: Container[str]) -> str:
    """Return the name of a weight without PEFT's level; the reverse of ``in_file``."""
    module, _, leaf = name.rpartition(".")
    outer = module.removesuffix(_BASE_LAYER)
    return f"{outer}.{leaf}" if outer != module and outer in adapted else name
