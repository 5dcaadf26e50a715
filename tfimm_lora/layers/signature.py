"""Calls that look to Keras like those of the layer they stand for.

Keras decides by the signature of ``call`` whether a layer is given ``training`` and masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def with_signature_of(base_call: Callable[..., Any], call: Callable[..., Any]) -> Any:
    """``call(self, inputs, ...)`` with the signature of ``base_call``."""
    signature = inspect.signature(base_call)
    first = list(signature.parameters)[1]

    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        return call(self, *args, **kwargs)

    signed.__signature__ = signature
    signed.__name__ = "call"
    signed.__doc__ = base_call.__doc__
    return signed
