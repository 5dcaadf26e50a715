"""``Family``: what is specific to one family of models, in every library that has it.

timm's names are the common language. Each row of a family's table is one kind of module or
weight, with its name in each library; see ``templates`` for how they are written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from tfimm_lora.config import Presets
from tfimm_lora.families.templates import Name, Template

#: The libraries, by the names that users give them. transformers has two sets of names.
TIMM, KERAS_HUB, APPLICATIONS = "timm", "keras_hub", "applications"
V4, V5 = "transformers-v4", "transformers-v5"
LIBRARIES = (TIMM, V4, V5, KERAS_HUB, APPLICATIONS)


class Row(NamedTuple):
    """A kind of module or weight, as each library names it; None if it has none.

    A name that begins with "/" is outside of the backbone: ``/classifier``. Names of modules
    also stand for their weights ("weight", "bias", ...).

    Attributes:
        timm: In timm 0.9 and later.
        transformers: In transformers 4, and in checkpoints of every version.
        v5: In transformers 5 in memory, hence in adapters. None means as in version 4.
        keras_hub: In keras_hub, relative to the backbone.
        applications: In ``keras.applications``.
        in_timm: False if timm has no such module. Then ``timm`` is a name in its style, which
            only the translation between other libraries uses.
    """

    timm: str
    transformers: str | None = None
    v5: str | None = None
    keras_hub: str | None = None
    applications: str | None = None
    in_timm: bool = True

    def column(self, library: str) -> str | None:
        """Return the name in a library of ``LIBRARIES``."""
        return {
            TIMM: self.timm if self.in_timm else None,
            V4: self.transformers,
            V5: self.v5 or self.transformers,
            KERAS_HUB: self.keras_hub,
            APPLICATIONS: self.applications,
        }[library]


@dataclass(frozen=True, eq=False)
class Family:
    """A family of models: its names in every library, and its LoRA targets.

    Attributes:
        name: For messages: "ViT".
        source: The paper.
        rows: The table of names.
        timm_models: Patterns of timm's names of these models: "vit_*".
        tfimm: The class in tfimm.
        keras_hub: The classes of backbones in keras_hub.
        needs: What distinguishes a family from others with the same backbone in keras_hub: the
            attributes of the backbone that are not 0 or False, and after "/" the names of
            layers outside of the backbone that exist.
        numbered: Templates of layers outside of keras_hub's blocks that have another number in
            their name there, such as a width; here it is their place in the order of layers.
        applications: Patterns of the names of models of ``keras.applications``.
        transformers: The model_type of transformers -> the name of the backbone in a model with
            a classifier, which begins the names of its modules.
        presets: The LoRA targets by preset, with timm's names. "default" is all of them
            together unless it is given.
    """

    name: str
    source: str
    rows: tuple[Row, ...]
    timm_models: tuple[str, ...] = ()
    tfimm: str = ""
    keras_hub: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    applications: tuple[str, ...] = ()
    transformers: Mapping[str, str] = field(default_factory=dict)
    presets: Presets = field(default_factory=dict)

    def names(self, library: str) -> Names:
        """Return the table between a library's names and timm's."""
        return _names(self.rows, library)

    @property
    def head(self) -> str | None:
        """timm's name of the classifier, or None if the family has none."""
        heads = ("/classifier", "/predictions")
        rows = (r for r in self.rows if r.transformers in heads or r.keras_hub in heads)
        return next((row.timm for row in rows), None)

    def libraries(self) -> list[str]:
        """Return the libraries that have this family."""
        return [x for x in LIBRARIES if any(row.column(x) for row in self.rows)]


class Names:
    """The names of one library for a family, and timm's names for the same modules.

    Names of this library are given without the prefix of the backbone; those outside of the
    backbone begin with "/".
    """

    def __init__(self, pairs: list[tuple[str, str]]) -> None:
        self._pairs = [(Template(own), Template(timm)) for own, timm in pairs]
        # The first row of a name is taken.
        plain = self._pairs[::-1]
        self._own = {Name(a.text, a.block): b for a, b in plain if a.is_plain}
        self._timm = {Name(b.text, b.block): a for a, b in plain if b.is_plain}
        self.templates = [own for own, _ in self._pairs]
        self._to_timm = functools.cache(self._find_timm)
        self._from_timm = functools.cache(self._find_own)

    def to_timm(self, name: Name, is_weight: bool = False) -> Name | None:
        """Return timm's name of a module or weight, or None if the table lacks it."""
        return _converted(name, self._to_timm, is_weight)

    def from_timm(self, name: Name, is_weight: bool = False) -> Name | None:
        """Return the name of timm's module or weight in this library, or None."""
        return _converted(name, self._from_timm, is_weight)

    def _find_timm(self, name: Name) -> Name | None:
        if name in self._own:
            return self._own[name].write({})
        for own, timm in self._pairs:
            numbers = None if own.is_plain else own.read(name)
            if numbers is not None:
                return timm.write(numbers)
        return None

    def _find_own(self, name: Name) -> Name | None:
        if name in self._timm:
            return self._timm[name].write({})
        for own, timm in self._pairs:
            numbers = None if timm.is_plain else timm.read(name)
            if numbers is not None:
                return own.write(numbers)
        return None

    def is_split(self, timm: str) -> bool:
        """Whether this library has separate layers for the blocks of timm's projection."""
        return any(self.from_timm(Name(timm, block)) is not None for block in "qkv")


def _converted(
    name: Name, convert: Callable[[Name], Name | None], is_weight: bool
) -> Name | None:
    """Convert a name. A weight without a row of its own has the name of its module."""
    found = convert(name)
    module, _, leaf = name.name.rpartition(".")
    if found is not None or not is_weight or not module:
        return found
    found = convert(Name(module, name.block))
    return None if found is None else found.leaf(leaf)


@functools.cache
def _names(rows: tuple[Row, ...], library: str) -> Names:
    pairs = []
    for row in rows:
        own = row.column(library)
        if library == TIMM and own is not None:
            # It has one layer for the blocks of a fused projection.
            own = Template(row.timm).text
            pairs.append((own, own))
        elif own is not None:
            pairs.append((own, row.timm))
    return Names(list(dict.fromkeys(pairs)))
