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
from tfimm_lora.families.templates import Name, Positions, Template

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
        windows: If the same module is a convolution in some libraries and linear in the
            others: pairs of a library and the size of the window of its convolution. The
            inputs of the linear layer are in the order (height, width, channels).
        in_timm: False if timm has no such module. Then ``timm`` is a name in its style, which
            only the translation between other libraries uses.
    """

    timm: str
    transformers: str | None = None
    v5: str | None = None
    keras_hub: str | None = None
    applications: str | None = None
    windows: tuple[tuple[str, int], ...] | None = None
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
        applications: Patterns of the functions of ``keras.applications``: "VGG*".
        transformers: The model_type of transformers -> the name of the backbone in a model with
            a classifier, which begins the names of its modules.
        presets: The LoRA targets by preset, with timm's names. "default" is all of them
            together unless it is given.
        patch_positions: Whether timm's position embeddings are of the patches alone, where the
            first of the other libraries is of the class token.
        depths: The number of blocks of each stage in the variants, if a library counts the
            blocks of all stages in one sequence.
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
    patch_positions: bool = False
    depths: tuple[tuple[int, ...], ...] = ()

    def names(self, library: str, depths: tuple[int, ...] = ()) -> Names:
        """Return the table between a library's names and timm's.

        Args:
            library: The library.
            depths: The number of blocks of each stage of the model, if known.
        """
        return _names(self.rows, library, depths)

    @functools.cached_property
    def head(self) -> str | None:
        """timm's name of the classifier, or None if the family has none."""
        heads = ("/classifier", "/classifier.1", "/predictions")
        rows = (r for r in self.rows if r.transformers in heads or r.keras_hub in heads)
        named = (r for r in self.rows if r.timm in ("head", "head.fc", "fc", "classifier"))
        return next((row.timm for row in (*rows, *named)), None)

    @functools.cached_property
    def libraries(self) -> tuple[str, ...]:
        """The libraries that have this family."""
        return tuple(x for x in LIBRARIES if any(row.column(x) for row in self.rows))


class Names:
    """The names of one library for a family, and timm's names for the same modules.

    Names of this library are given without the prefix of the backbone; those outside of the
    backbone begin with "/".
    """

    def __init__(
        self,
        pairs: list[tuple[str, str]],
        windows: Mapping[str, int],
        depths: tuple[int, ...] = (),
    ) -> None:
        self._pairs = [(Template(own), Template(timm)) for own, timm in pairs]
        self._windows = [(Template(timm), size) for timm, size in windows.items()]
        self._positions = Positions(depths)
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

    def window(self, timm: str) -> int | None:
        """Return the size of the window of timm's module here, 0 if it is linear here.

        None means that the module is of the same kind in all libraries.
        """
        sizes = (size for row, size in self._windows if row.read(Name(timm)) is not None)
        return next(sizes, None)

    def numbers(self, name: Name) -> list[dict[str, int]]:
        """Return the numbers in the name of a module of this library, by each row."""
        found = (own.read(name) for own, _ in self._pairs)
        return [numbers for numbers in found if numbers]

    def _find_timm(self, name: Name) -> Name | None:
        if name in self._own:
            return self._written(self._own[name], {})
        for own, timm in self._pairs:
            numbers = None if own.is_plain else own.read(name)
            found = None if numbers is None else self._written(timm, numbers)
            if found is not None:
                return found
        return None

    def _find_own(self, name: Name) -> Name | None:
        if name in self._timm:
            return self._written(self._timm[name], {})
        for own, timm in self._pairs:
            numbers = None if timm.is_plain else timm.read(name)
            found = None if numbers is None else self._written(own, numbers)
            if found is not None:
                return found
        return None

    def _written(self, template: Template, numbers: dict[str, int]) -> Name | None:
        complete = self._positions.complete(numbers)
        return None if complete is None else template.write(complete)

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
def _names(rows: tuple[Row, ...], library: str, depths: tuple[int, ...]) -> Names:
    pairs, windows = [], {}
    for row in rows:
        if row.windows is not None:
            windows[row.timm] = dict(row.windows).get(library, 0)
        own = row.column(library)
        if library == TIMM and own is not None:
            # It has one layer for the blocks of a fused projection.
            own = Template(row.timm).text
            pairs.append((own, own))
        elif own is not None:
            pairs.append((own, row.timm))
    return Names(list(dict.fromkeys(pairs)), windows, depths)
