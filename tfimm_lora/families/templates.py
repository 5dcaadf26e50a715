r"""Templates of names: ``blocks.{i}.attn.qkv[q]``, with which names are read and written.

In braces is a number, with an offset where two libraries count from different numbers:
``{i}``, ``{i+1}``, ``{i-1}``. ``{i:a}`` is a letter, a for 0. In brackets is the block of a
fused projection: ``attn.qkv[q]`` is the query block of ``attn.qkv``.

``{s=0}`` is only the stage 0. A number may occur more than once in a name. Libraries count the
blocks of a model in several ways, whose numbers ``Positions`` relates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_PLACEHOLDER = re.compile(
    r"\{(?P<name>[a-z])(?P<offset>[+-]\d+)?(?:=(?P<fixed>\d+))?(?P<letter>:a)?\}"
)
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
        self._pattern = re.compile(self.pattern(named=True))
        self._fixed = {
            found["name"]: int(found["fixed"])
            for found in _PLACEHOLDER.finditer(self.text)
            if found["fixed"]
        }

    def pattern(self, named: bool = False) -> str:
        """Return the regular expression of the names, whose groups may have names."""
        parts, end, seen = [], 0, set()
        for found in _PLACEHOLDER.finditer(self.text):
            parts.append(re.escape(self.text[end : found.start()]))
            name, content = found["name"], "[a-z]" if found["letter"] else r"\d+"
            if found["fixed"]:
                content = str(int(found["fixed"]) + int(found["offset"] or 0))
            again = rf"(?P={name})" if name in seen else f"(?P<{name}>{content})"
            parts.append(again if named else f"(?:{content})")
            seen.add(name)
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

    def write(self, numbers: Mapping[str, int]) -> Name | None:
        """Return the name with these numbers, or None if this template has no such name."""
        if any(numbers.get(name) != fixed for name, fixed in self._fixed.items()):
            return None
        for found in _PLACEHOLDER.finditer(self.text):
            if numbers.get(found["name"], -1) + int(found["offset"] or 0) < 0:
                return None

        def written(part: re.Match[str]) -> str:
            number = numbers[part["name"]] + int(part["offset"] or 0)
            return chr(ord("a") + number) if part["letter"] else str(number)

        return Name(_PLACEHOLDER.sub(written, self.text), self.block)


class Positions:
    """The numbers of every block of a model, in the ways in which libraries count them.

    ``{s}`` is the stage and ``{b}`` the block in it. ``{n}`` is the block among those of all
    stages, and ``{d}`` is 2 n, for a library that counts both layers of a block. ``{f}`` is the
    index of a convolution in a sequence of convolutions, each with an activation, and a
    pooling at the end of each stage. ``{z}`` is the number of stages.

    Args:
        depths: The number of blocks of each stage; empty if they are not known.
    """

    def __init__(self, depths: tuple[int, ...] = ()) -> None:
        blocks = [(s, b) for s, depth in enumerate(depths) for b in range(depth)]
        self._positions = [
            {"s": s, "b": b, "n": n, "d": 2 * n, "f": 2 * n + s}
            for n, (s, b) in enumerate(blocks)
        ]
        self._stages = {"z": len(depths)} if depths else {}

    def last(self, count: str) -> int:
        """Return the last number of a count: "n"."""
        return self._positions[-1][count]

    def complete(self, numbers: dict[str, int]) -> dict[str, int] | None:
        """Add the numbers that follow from those given; None if they are of no model."""
        if "z" in numbers and numbers["z"] != self._stages.get("z"):
            return None
        related = {name: x for name, x in numbers.items() if name in "sbndf"}
        if {"n", "d", "f"} & related.keys() or {"s", "b"} <= related.keys():
            for position in self._positions:
                if related.items() <= position.items():
                    return {**self._stages, **position, **numbers}
        return {**self._stages, **numbers}
