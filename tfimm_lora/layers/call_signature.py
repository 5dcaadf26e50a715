"""Set the signature of ``call`` to that of the original layer.

Keras inspects the signature of ``call`` to decide whether to pass ``training`` and masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def with_signature_of(base: Any, mixin: Any) -> Callable[..., Any]:
    """Return the ``call`` of ``mixin`` with the signature of the ``call`` of ``base``."""
    call: Callable[..., Any] = mixin.call
    signature = inspect.signature(base.call)
    first = list(signature.parameters)[1]

    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        return call(self, *args, **kwargs)

    setattr(signed, "__signature__", signature)  # noqa: B010 - mypy does not know this attribute
    signed.__name__ = "call"
    signed.__doc__ = base.call.__doc__
    return signed
