"""Parsing of option values that are more than a string or a number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from tfimm_lora.config import LoRAConfig, Targets
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.utils.suggestions import did_you_mean
from tfimm_lora.utils.yaml_text import read_yaml_text


def parse_targets(text: str | None) -> Targets:
    r"""Parse ``--targets`` into ``lora_targets``.

    Args:
        text: The name of a preset; a regular expression for whole paths, recognized by
            characters that layer names do not have; or layer names separated by commas. None
            means the default.

    Returns:
        A value for ``LoRAConfig``.

    Example:
        >>> parse_targets("mlp"), parse_targets("fc1, mlp/fc2"), parse_targets(r"blocks/\d+/.*")
        ('mlp', ['fc1', 'mlp/fc2'], 'blocks/\\d+/.*')
    """
    if text is None or text in LoRAConfig.presets() or re.search(r"[\\()\[\]|^$*+?{}]", text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_weights(text: str) -> list[float]:
    """Parse ``--weights``, numbers separated by commas.

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_weights("0.5,-1")
        [0.5, -1.0]
    """
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"Received --weights {text!r}; expected numbers separated by commas, one for each "
            "adapter, such as 0.5,-1."
        ) from error


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``--input-size`` into height and width.

    Raises:
        ValueError: for anything but one or two numbers.

    Example:
        >>> parse_size("224"), parse_size("224x288")
        ((224, 224), (224, 288))
    """
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdigit() for side in sides):
        raise ValueError(f"Received --input-size {text}; expected 224, or 224x288.")
    return int(sides[0]), int(sides[-1])


#: Words instead of a number: search for it, or, for the rate, find it in one pass.
AUTO, FIND = "auto", "find"


def parse_rate(text: str | None) -> float | str | None:
    """Parse ``--lr``: a number, "auto" or "find".

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_rate("1e-3"), parse_rate("auto")
        (0.001, 'auto')
    """
    if text is None or text in (AUTO, FIND):
        return text
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"Received --lr {text}; expected a number, {AUTO} (to search for the rate) or "
            f"{FIND} (to find it in one pass){did_you_mean(text, (AUTO, FIND)) or '.'}"
        ) from error


def parse_rank(text: str | None) -> int | str | None:
    """Parse ``--rank``: a whole number or "auto".

    Raises:
        ValueError: for anything else.

    Example:
        >>> parse_rank("8"), parse_rank("auto")
        (8, 'auto')
    """
    if text is None or text == AUTO:
        return text
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(
            f"Received --rank {text}; expected a whole number, or {AUTO} to search for the "
            f"rank{did_you_mean(text, (AUTO,)) or '.'}"
        ) from error


def parse_lora_fields(texts: Iterable[str]) -> dict[str, Any]:
    """Parse the values of ``--lora``, NAME=VALUE with the value in YAML.

    Returns:
        The values by name, without the prefix "lora_".

    Raises:
        ValueError: if there is no "=", or the value is not valid YAML.
    """
    yaml = require("yaml", extra="cli", why="--lora")
    fields = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"Received --lora {text}; expected NAME=VALUE.")
        try:
            fields[name.strip().removeprefix("lora_")] = read_yaml_text(value, "--lora")
        except yaml.YAMLError as error:
            raise ValueError(
                f"Received --lora {text}, whose value is not valid YAML; expected NAME=VALUE, "
                "such as dropout=0.1."
            ) from error
    return fields
