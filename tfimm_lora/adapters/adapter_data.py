"""``AdapterData``: the content of an adapter, without files, hub or models.

Modules that read, write or describe an adapter work on it. ``Adapter``, the public class, is on
top of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.adapters.layer_update import LayerUpdate, same_arrays
from tfimm_lora.families.recognize import Naming
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.peft.matching import PeftSelection


class Renaming(NamedTuple):
    """How an adapter was translated since its file was read.

    Attributes:
        source: The naming of the file.
        target: The naming that the adapter has now.
        layers: The layers in the file, with its names.
    """

    source: Naming
    target: Naming
    layers: frozenset[str]


class FileSelection(NamedTuple):
    """What the config of an adapter's file selects, to find what the file lacks.

    Attributes:
        modules: The modules that the config selects.
        layers: The layers of the adapter that was read, with the names that it has now. The
            selection says nothing about an adapter that was given others since.
        renaming: How the adapter was translated, or None if it has the names of the file.
    """

    modules: PeftSelection
    layers: frozenset[str]
    renaming: Renaming | None = None

    @property
    def file_layers(self) -> frozenset[str]:
        """The layers in the file, with its names."""
        return self.layers if self.renaming is None else self.renaming.layers

    def translated(
        self, source: Naming, target: Naming, layers: frozenset[str]
    ) -> FileSelection:
        """Return the selection of an adapter that was translated to the names of ``target``.

        Args:
            source: The naming that it had.
            target: The naming that it has now.
            layers: Its layers with the new names.
        """
        first = source if self.renaming is None else self.renaming.source
        return FileSelection(self.modules, layers, Renaming(first, target, self.file_layers))


@dataclass(frozen=True, eq=False, repr=False)
class AdapterData:
    """The values of an adapter; see ``Adapter`` for the attributes.

    Arrays are in torch's order of axes, and layers are named by timm's module paths, as in
    adapter files. ``ModuleNames`` maps them to the layers of a model.
    """

    layers: Mapping[str, LayerUpdate]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    base_model: str = ""
    bias: str = "none"
    dropout: float = 0.0
    selection: FileSelection | None = None
    task: TaskRecord | None = None

    def __post_init__(self) -> None:
        frozen = {}
        for key, value in self.weights.items():
            frozen[key] = np.array(value)
            frozen[key].setflags(write=False)
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        object.__setattr__(self, "weights", MappingProxyType(frozen))
        object.__setattr__(self, "modules", tuple(self.modules))
        if not self.layers:
            raise ValueError("Received an adapter without layers; expected at least one.")
        for name, description in (
            ("magnitude", "a magnitude (DoRA)"),
            ("bias", "a bias"),
            ("a2", "a second pair of factors (LoHa)"),
        ):
            without = [p for p, x in self.layers.items() if getattr(x, name) is None]
            if 0 < len(without) < len(self.layers):
                raise ValueError(
                    f"Received an adapter in which only some updates have {description}; "
                    f"expected all or none. Those without: {', '.join(without[:10])}."
                )

        if self.use_loha and self.dropout:
            raise ValueError(
                f"Received dropout={self.dropout} for an adapter of LoHa, which has none; "
                "expected 0."
            )

    @property
    def size(self) -> int:
        """The size of all arrays in bytes."""
        return sum(array.nbytes for array in self._arrays())

    @property
    def parameters(self) -> int:
        """The number of values in all arrays."""
        return sum(array.size for array in self._arrays())

    def _arrays(self) -> list[np.ndarray]:
        factors = [array for x in self.layers.values() for array in x.arrays().values()]
        return factors + list(self.weights.values())

    @property
    def use_dora(self) -> bool:
        """Whether the updates have DoRA magnitudes."""
        return any(x.magnitude is not None for x in self.layers.values())

    @property
    def use_loha(self) -> bool:
        """Whether the updates are those of LoHa."""
        return any(x.is_loha for x in self.layers.values())

    @property
    def branch_bias(self) -> bool:
        """Whether the branches have biases (PEFT's lora_bias)."""
        return any(x.bias is not None for x in self.layers.values())

    def not_in_peft(self) -> dict[str, str]:
        """Return what PEFT cannot express: the path of a module, or of a weight -> reason."""
        reasons = {path: x.not_in_peft() for path, x in self.layers.items()}
        found = {path: reason for path, reason in reasons.items() if reason}
        if self.use_loha and self.bias != "none":
            inside = tuple(f"{module}." for module in self.modules)
            outside = (key for key in self.weights if not key.startswith(inside))
            found.update(dict.fromkeys(outside, "PEFT's LoHa trains no biases"))
        return found

    def _values(self) -> tuple[Any, ...]:
        """Return the values of the fields, in order, as plain containers."""
        containers = (dict(self.layers), dict(self.weights))
        others = (self.modules, self.base_model, self.bias, self.dropout, self.selection)
        return (*containers, *others, self.task)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdapterData):
            return NotImplemented
        mine, theirs = (
            (dict(x.layers), x.modules, x.base_model, x.bias, x.dropout, x.task)
            for x in (self, other)
        )
        return mine == theirs and same_arrays(self.weights, other.weights)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        ranks = sorted({update.rank for update in self.layers.values()})
        count = len(self.weights)
        weights = f", {count} fully trained weights" if count else ""
        return (
            f"{type(self).__name__}({len(self.layers)} layers of rank "
            f"{', '.join(map(str, ranks))}{weights}, base_model={self.base_model!r})"
        )
