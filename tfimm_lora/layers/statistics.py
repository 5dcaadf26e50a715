"""Which layers have statistics that change in training, and how such a layer is called so that
they do not."""

from __future__ import annotations

import inspect
from typing import Any

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer

#: The names that Keras gives to statistics.
_NAMES = {"moving_mean", "moving_variance", "vector_u", "sn_u"}


def has_known_statistics(layer: Layer) -> bool:
    """Whether a layer has variables with names that Keras gives to statistics."""
    backend = backend_of(layer)
    return any(backend.variable_name(v) in _NAMES for v in backend.own_variables(layer))


def has_statistics(layer: Layer) -> bool:
    """Whether a layer has statistics that change when it is called in training.

    Names that Keras uses show it. Under other names, a vector (or more) in a layer without
    layers inside counts. A single number may be the rate of a dropout, which would be off in
    inference mode, as would be the dropout in layers inside.
    """
    backend = backend_of(layer)
    if has_known_statistics(layer):
        return True
    found = any(len(v.shape) for v in backend.statistics(layer))
    return (found or backend.has_hidden_statistics(layer)) and not backend.sublayers(layer)


def for_inference(call: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a ``call``, with ``training=False`` if it takes that argument."""
    signature = inspect.signature(call)
    given = signature.bind_partial(*args, **kwargs)
    if "training" in signature.parameters:
        given.arguments["training"] = False
    elif "training" in given.kwargs:  # of **kwargs
        return given.args, {**given.kwargs, "training": False}
    return given.args, given.kwargs
