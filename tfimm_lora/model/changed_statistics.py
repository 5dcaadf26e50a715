"""Find the statistics that changed in training although they are neither trained nor saved.

In a LoRA model batch normalization and the like run in inference mode. Other layers may change
variables of their own as they please. An adapter does not hold these, so a model with the
adapter would differ from the trained one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, Variable
from tfimm_lora.layers.frozen import keeps_statistics
from tfimm_lora.layers.state import original_class
from tfimm_lora.model.state import model_state


def digests_of_statistics(model: Layer, trained: set[int]) -> dict[int, bytes]:
    """The digest of each such variable by its id.

    Args:
        model: The model.
        trained: The ids of the fully trained layers, whose statistics are saved.
    """
    found = _statistics(model)
    return {id(v): _digest(layer, v) for _, layer, v in found if id(layer) not in trained}


def changed_statistics(model: Layer, held: set[int]) -> list[str]:
    """The paths of the variables whose digest is another one now.

    Args:
        model: The model.
        held: The ids of variables that do not count, because an adapter holds them.
    """
    digests = model_state(model).statistics
    return [
        f"{path}/{backend_of(layer).variable_name(variable)}"
        for path, layer, variable in _statistics(model)
        if id(variable) in digests.keys() - held
        and digests[id(variable)] != _digest(layer, variable)
    ]


def _statistics(model: Layer) -> Iterator[tuple[str, Layer, Variable]]:
    """The statistics that are not kept, of other classes than Keras', with their paths."""
    backend = backend_of(model)
    for path, layer in backend.walk(model):
        own_class = not backend.is_keras_class(original_class(type(layer)))
        if own_class and not keeps_statistics(layer):
            for variable in backend.statistics(layer):
                yield path, layer, variable


def _digest(layer: Layer, variable: Any) -> bytes:
    value = backend_of(layer).to_numpy(variable)
    return hashlib.blake2b(value.tobytes(), digest_size=16).digest()
