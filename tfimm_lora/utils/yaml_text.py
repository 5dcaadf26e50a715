"""``read_yaml_text``: YAML, with 1e-3 as a number."""

from __future__ import annotations

import functools
import re
from typing import Any

from tfimm_lora.utils.optional_imports import require

#: A number of YAML 1.2 without a point. PyYAML, which follows YAML 1.1, reads a string.
_NUMBER = re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$")


def read_yaml_text(text: str, why: str) -> Any:
    """Read YAML with plain values: strings, numbers, lists, mappings.

    Args:
        text: The YAML.
        why: The feature that needs PyYAML, for the error if it is not installed.

    Raises:
        yaml.YAMLError: if it is not valid.

    Example:
        >>> from tfimm_lora.utils.yaml_text import read_yaml_text
        >>> read_yaml_text("{rate: 1e-3, name: '1e-3'}", "This example")
        {'rate': 0.001, 'name': '1e-3'}
    """
    yaml = require("yaml", extra="cli", why=why)
    return yaml.load(text, Loader=_loader())


@functools.cache
def _loader() -> Any:
    yaml = require("yaml", extra="cli")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """PyYAML's safe loader with the numbers of YAML 1.2."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+0123456789"))
    return Loader
