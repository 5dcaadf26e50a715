"""The ``call`` of a converted class: its signature, and what its code must not do."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any


def with_signature_of(base: Any, mixin: Any) -> Callable[..., Any]:
    """Return the ``call`` of ``mixin`` with the signature of the ``call`` of ``base``.

    Keras inspects the signature to decide whether to pass ``training`` and masks.
    """
    call: Callable[..., Any] = mixin.call
    signature = inspect.signature(base.call)
    parameters = list(signature.parameters.values())[1:]
    positional = parameters and parameters[0].kind is not inspect.Parameter.KEYWORD_ONLY
    first = parameters[0].name if positional else None

    def signed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and first in kwargs:
            args = (kwargs.pop(first),)
        return call(self, *args, **kwargs)

    setattr(signed, "__signature__", signature)  # noqa: B010 - mypy does not know this attribute
    signed.__name__ = "call"
    signed.__doc__ = base.call.__doc__
    return signed


def check_super_calls(cls: type, name: str) -> None:
    """Raise a ValueError if a method of a class calls ``super(self.__class__, self)``.

    In an object of a subclass, such as a converted layer, such a method calls itself for ever.

    Args:
        cls: The class of a layer.
        name: The name of the layer, for the message.
    """
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("keras", "tf_keras", "tensorflow"):
            return
        for method, function in vars(base).items():
            # Layers are converted after __init__.
            if method != "__init__" and _calls_super_of_own_class(function):
                raise ValueError(
                    f"Layer '{name}' cannot be part of a LoRA model: {base.__name__}.{method} "
                    "calls super(self.__class__, self) or super(type(self), self), which calls "
                    f"the same method again in any subclass. Write super().{method}(...)."
                )


def _calls_super_of_own_class(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    if code is None or "super" not in code.co_names:
        return False
    steps = []
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_"):
            steps.append(instruction.argval)
        elif instruction.opname.startswith("CALL"):
            steps.append("()")
    for position, step in enumerate(steps):
        if step == "super":
            own, *following = steps[position + 1 : position + 5] or [None]
            if following[:2] == ["__class__", own]:  # super(self.__class__, self)
                return True
            if own == "type" and following[1:] == ["()", following[0]]:  # super(type(self), ...
                return True
    return False
