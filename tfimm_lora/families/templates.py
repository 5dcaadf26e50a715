r"""Templates of names: ``blocks.{i}.attn.qkv[q]``, with which names are read and written.

In braces is a number, with an offset where two libraries count from different numbers:
``{i}``, ``{i+1}``, ``{i-1}``. ``{i:a}`` is a letter, a for 0. In brackets is the block of a
fused projection: ``attn.qkv[q]`` is the query block of ``attn.qkv``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_PLACEHOLDER = re.compile(r"\{(?P<name>[a-z])(?P<offset>[+-]\d+)?(?P<letter>:a)?\}")
_BLOCK = re.compile(r"(?P<name>.+)\[(?P<block>[qkv])\]")


class Name(NamedTuple):
    """The name of a module or a weight, or of one block of a fused projection."""

    name: str
    #: "q", "k" or "v", or None for the whole.
    block: str | None = None

    def __str__(self) -> str:
        return f"{self.name}[{self.block}]" if self.block else self.name

    def leaf(self, leaf: str) -> Name:
        """Return the name of a weight of this module."""
        return self._replace(name=f"{self.name}.{leaf}")


class Template:
    """A compiled template.

    Example:
        >>> template = Template("layer.{i+1}.fc[q]")
        >>> template.read(Name("layer.3.fc", "q")), str(template.write({"i": 2}))
        ({'i': 2}, 'layer.3.fc[q]')
    """

    def __init__(self, text: str) -> None:
        found = _BLOCK.fullmatch(text)
        self.block = found["block"] if found else None
        self.text = found["name"] if found else text
        self.is_plain = "{" not in self.text
        self._pattern = re.compile(self.pattern())

    def pattern(self) -> str:
        """Return the regular expression of the names."""
        parts, end = [], 0
        for found in _PLACEHOLDER.finditer(self.text):
            parts.append(re.escape(self.text[end : found.start()]))
            content = "[a-z]" if found["letter"] else r"\d+"
            parts.append(f"(?P<{found['name']}>{content})")
            end = found.end()
        return "".join([*parts, re.escape(self.text[end:])])

    def read(self, name: Name) -> dict[str, int] | None:
        """Return the numbers in a name, or None if it is not of this template."""
        found = self._pattern.fullmatch(name.name) if name.block == self.block else None
        if found is None:
            return None
        numbers = {}
        for part in _PLACEHOLDER.finditer(self.text):
            text = found[part["name"]]
            number = ord(text) - ord("a") if part["letter"] else int(text)
            numbers[part["name"]] = number - int(part["offset"] or 0)
        return numbers if all(number >= 0 for number in numbers.values()) else None

    def write(self, numbers: dict[str, int]) -> Name:
        """Return the name with these numbers."""

        def written(part: re.Match[str]) -> str:
            number = numbers[part["name"]] + int(part["offset"] or 0)
            return chr(ord("a") + number) if part["letter"] else str(number)

        return Name(_PLACEHOLDER.sub(written, self.text), self.block)
