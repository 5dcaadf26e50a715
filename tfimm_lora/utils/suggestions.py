"""Suggestions for a misspelled name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close_names(
    name: str, known: Iterable[str], limit: int = 5, similarity: float = 0.6
) -> list[str]:
    """The known names that are most similar to ``name``, the most similar first.

    Args:
        name: The name that was given.
        known: The names that exist.
        limit: The largest number of names to return.
        similarity: The smallest ratio of ``difflib.SequenceMatcher``, in [0, 1].

    Example:
        >>> close_names("convnext_tin", ["convnext_tiny", "vit_tiny"])
        ['convnext_tiny', 'vit_tiny']
    """
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=similarity)


def did_you_mean(name: object, known: Iterable[str], similarity: float = 0.5) -> str:
    """The end of a sentence that suggests a similar name, or "" if no name is similar.

    Example:
        >>> did_you_mean("lora_rnak", ["lora_rank", "lora_alpha"])
        '; did you mean lora_rank?'
    """
    near = close_names(str(name), known, limit=1, similarity=similarity)
    return f"; did you mean {near[0]}?" if near else ""
