"""Nested structures of tensors: dicts, lists and tuples, in the order of ``tf.nest``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def flatten(structure: Any) -> list[Any]:
    """Return the leaves of a structure. Dicts are ordered by their sorted keys.

    Example:
        >>> from tfimm_lora.utils.nested import flatten
        >>> flatten({"b": [1, 2], "a": (3,)})
        [3, 1, 2]
    """
    if isinstance(structure, Mapping):
        return [leaf for key in sorted(structure) for leaf in flatten(structure[key])]
    if isinstance(structure, (list, tuple)):
        return [leaf for part in structure for leaf in flatten(part)]
    return [structure]


def pack_as(structure: Any, leaves: Sequence[Any]) -> Any:
    """Return the same structure with other leaves, in the order of ``flatten``.

    Raises:
        ValueError: for another number of leaves.

    Example:
        >>> from tfimm_lora.utils.nested import pack_as
        >>> pack_as({"b": [1, 2], "a": (3,)}, "xyz")
        {'b': ['y', 'z'], 'a': ('x',)}
    """
    expected = len(flatten(structure))
    if len(leaves) != expected:
        raise ValueError(f"Received {len(leaves)} values; expected {expected}.")
    return _packed(structure, iter(leaves))


def _packed(structure: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(structure, Mapping):
        parts = {key: _packed(structure[key], leaves) for key in sorted(structure)}
        return {key: parts[key] for key in structure}
    if isinstance(structure, (list, tuple)):
        inside = [_packed(part, leaves) for part in structure]
        if hasattr(structure, "_fields"):  # a namedtuple
            return type(structure)(*inside)
        return tuple(inside) if isinstance(structure, tuple) else inside
    return next(leaves)
