"""The values of an adapted layer: merged, disabled, weaker or other ones, and in files.

While a layer is merged or disabled, kernel and factors as they are without that are kept
aside, so that every way back gives the very bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora import config
from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Found


@dataclass
class State:
    """What an adapted layer knows; kept where no Keras tracks or wraps it."""

    settings: Any
    #: How the layer was before it was converted; None if it was created adapted.
    found: Found | None = None
    #: Kernel and factors of a merged or disabled layer as they were, bit for bit; else None.
    unmerged: dict[str, np.ndarray] | None = None
    #: How many times the layer was disabled, and whether it was merged before.
    disabled: int = 0
    merged_before: bool = False
    #: After ``set_strength``: the values that are 100 %, and those that it left.
    strength: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] | None = None
    #: Whether a call was seen to use the kernel.
    kernel_seen: bool = False
    #: Whether a call was seen to make another kernel of it (weight standardisation).
    kernel_transformed: bool = False


class LayerValues:
    """What ``LoRALayer`` does with the values of its variables; W in ``_kernel_variable``."""

    # Of the adapted layer.
    name: str
    bias: Any
    _kernel_variable: Any
    _effective_kernel: Callable[[], Any]

    @property
    def merged(self) -> bool:
        """Whether the kernel holds the update at the moment."""
        return self._lora_state.unmerged is not None and not self._lora_state.disabled

    @property
    def _lora_state(self) -> State:
        return self.__dict__["_lora_state"]

    def _lora_variables(self) -> dict[str, Any]:
        """The variables that LoRA added to the layer, by name."""
        return {n: self.__dict__[n] for n in config.LORA_VARIABLE_NAMES if n in self.__dict__}

    def _switches(self) -> dict[str, Any]:
        """Those of which zeros mean no update; A alone means nothing."""
        found = self._lora_variables()
        return {n: v for n, v in found.items() if n not in ("kernel_lora_a", "kernel_lora_a0")}

    def _merged_into(self) -> dict[str, Any]:
        """The variables of the base layer that merging changes."""
        changed = {"kernel": self._kernel_variable}
        return (
            {**changed, "bias": self.bias} if self._lora_state.settings.branch_bias else changed
        )

    # -- merging ---------------------------------------------------------------------

    def merge_weights(self) -> None:
        """Add the update to the kernel, in place. ``unmerge_weights`` gives the bits back.

        B is zero while the layer is merged: whatever reads the variables then finds a
        kernel and factors that agree, and the update is never applied twice.

        Raises:
            ValueError: if the layer is merged already, or not built.
        """
        if self.merged:
            raise ValueError(
                f"Layer '{self.name}' is merged already. Call unmerge_weights first."
            )
        self._require_enabled("merged")
        self._require_built("merge")
        merged = self._merged_tensors()
        self._lora_state.unmerged = self.lora_values()
        for name, variable in self._merged_into().items():
            variable.assign(merged[name])
        self._switch_off()

    def unmerge_weights(self) -> None:
        """Undo ``merge_weights``, bit for bit.

        If the variables were given other values since (by set_weights, say), those stay:
        they are taken for the values of an unmerged layer.

        Raises:
            ValueError: if the layer is not merged.
        """
        unmerged = self._lora_state.unmerged
        self._require_enabled("unmerged")
        if unmerged is None:
            raise ValueError(f"Layer '{self.name}' is not merged.")
        backend = backend_of(self)
        replaced = any(backend.to_numpy(v).any() for v in self._switches().values())
        self._lora_state.unmerged = None
        if replaced:
            return
        for name, variable in {**self._merged_into(), **self._lora_variables()}.items():
            variable.assign(unmerged[name])

    def lora_values(self) -> dict[str, np.ndarray]:
        """Kernel, A and B (and what else LoRA has here) by name, as without merging."""
        if self._lora_state.unmerged:
            return self._lora_state.unmerged
        found = {**self._merged_into(), **self._lora_variables()}
        return {name: backend_of(self).to_numpy(variable) for name, variable in found.items()}

    def merged_kernel(self) -> np.ndarray:
        """The adapted kernel as ``merge_weights`` would leave it, in the kernel's type."""
        return self.merged_values()["kernel"]

    def merged_values(self) -> dict[str, np.ndarray]:
        """What ``merge_weights`` would leave in the variables of the base layer, by name."""
        backend = backend_of(self)
        values = self._merged_into() if self.merged else self._merged_tensors()
        return {name: backend.to_numpy(value) for name, value in values.items()}

    def _merged_tensors(self) -> dict[str, Any]:
        """``merged_values`` of a layer that is not merged, as tensors."""
        backend = backend_of(self)
        cast, dtype_of = backend.ops.cast, backend.dtype_of
        found = self._merged_into()
        adapted = {"kernel": self._effective_kernel()}
        if "bias" in found:
            shift = backend.full_precision(self.__dict__["kernel_lora_shift"])
            bias = cast(backend.full_precision(self.bias), "float32")
            adapted["bias"] = bias + self._lora_state.settings.scale * shift
        return {name: cast(x, dtype_of(found[name])) for name, x in adapted.items()}

    def value_of(self, variable: Any, merged: bool) -> np.ndarray:
        """The value of one of the layer's variables as it is with merging or without."""
        for name, changed in self._merged_into().items():
            if variable is changed:
                return (self.merged_values() if merged else self.lora_values())[name]
        return backend_of(self).to_numpy(variable)

    def _switch_off(self) -> None:
        """Let the layer compute as without the update."""
        for variable in self._switches().values():
            variable.assign(np.zeros(tuple(variable.shape), "float32"))

    def _require_built(self, what: str) -> None:
        if "kernel_lora_a" not in self.__dict__:
            raise ValueError(
                f"Layer '{self.name}' is not built, so there is nothing to {what}. Call "
                "the model on an input first."
            )

    def _require_enabled(self, what: str) -> None:
        if self._lora_state.disabled:
            raise ValueError(
                f"Layer '{self.name}' is disabled and cannot be {what}. Leave the "
                "disable_adapter block first."
            )

    # -- other updates -----------------------------------------------------------------

    def assign_update(self, given: Mapping[str, np.ndarray]) -> None:
        """Give the LoRA variables new values, zeros to those that are not given.

        A merged layer stays merged, a disabled one disabled.
        """
        self._require_built("load")
        state = self._lora_state
        state.strength = None
        found = self._lora_variables()
        zeros = {n: np.zeros(tuple(v.shape), "float32") for n, v in found.items()}
        values = {**zeros, **given}
        if state.disabled and state.unmerged is not None:
            state.unmerged = {**state.unmerged, **values}
            return
        merged = self.merged
        if merged:
            self.unmerge_weights()
        for name, variable in found.items():
            variable.assign(values[name])
        if merged:
            self.merge_weights()

    def set_strength(self, factor: float) -> None:
        """Let the update count ``factor`` times; 1 gives back the bits of before."""
        values = {n: x for n, x in self.lora_values().items() if n in self._lora_variables()}
        now = {name: values[name] for name in self._switches()}
        known = self._lora_state.strength
        # Values that are not those this method left were trained or loaded since.
        same = known is not None and all(np.array_equal(known[1][n], x) for n, x in now.items())
        whole = known[0] if known is not None and same else now
        if factor == 1:
            self.assign_update({**values, **whole})
            return
        scaled = {name: (x * factor).astype(x.dtype) for name, x in whole.items()}
        self.assign_update({**values, **scaled})
        self._lora_state.strength = whole, scaled

    def disable(self) -> None:
        """Compute as without the update until ``enable``; may be nested."""
        state = self._lora_state
        if not state.disabled:
            self._require_built("disable")
            state.merged_before = self.merged
            values = self.lora_values()
            if state.merged_before:
                for name, variable in self._merged_into().items():
                    variable.assign(values[name])
            self._switch_off()
            state.unmerged = values
        state.disabled += 1

    def enable(self) -> None:
        """Undo one ``disable``, bit for bit."""
        state = self._lora_state
        state.disabled -= 1
        if state.disabled or state.unmerged is None:
            return
        values, state.unmerged = state.unmerged, None
        for name, variable in self._lora_variables().items():
            variable.assign(values[name])
        if state.merged_before:
            self.merge_weights()

    # -- saving ----------------------------------------------------------------------

    def _stored_variables(self) -> dict[str, Any]:
        """Own variables by their key in a weight file.

        The base layer's are numbered as Keras numbers them and those of LoRA go by name, so
        neither file of the two is mistaken for the other's.
        """
        backend = backend_of(self)
        own = backend.own_variables(self)
        names = [backend.variable_name(v) for v in own]
        base = [v for v, n in zip(own, names) if n not in config.LORA_VARIABLE_NAMES]
        return {**{str(i): v for i, v in enumerate(base)}, **self._lora_variables()}

    def save_own_variables(self, store: Any) -> None:
        """Write the variables as they are without merging."""
        if "kernel_lora_a" not in self.__dict__:
            return
        backend, unmerged = backend_of(self), self._lora_state.unmerged or {}
        changed = {id(v): name for name, v in self._merged_into().items()}
        for key, variable in self._stored_variables().items():
            name = changed.get(id(variable), key)
            store[key] = backend.store_value(unmerged.get(name, variable))

    def load_own_variables(self, store: Any) -> None:
        """Read what ``save_own_variables`` wrote; a merged layer is unmerged by it."""
        if "kernel_lora_a" not in self.__dict__:
            return
        stored = self._stored_variables()
        given = set(store.keys())
        problems = [f"missing {key}" for key in stored if key not in given]
        problems += [f"unexpected {key}" for key in sorted(given - set(stored))]
        problems += [
            f"{key} of shape {tuple(store[key].shape)}, expected {tuple(v.shape)}"
            for key, v in stored.items()
            if key in given and tuple(store[key].shape) != tuple(v.shape)
        ]
        if problems:
            raise ValueError(
                f"The weights do not fit the LoRA layer '{self.name}': "
                f"{'; '.join(problems)}. Weights of the model without LoRA are loaded "
                "before LoRA is put in; those of a LoRA model need the same lora_rank and "
                "lora_targets."
            )
        for key, variable in stored.items():
            variable.assign(store[key])
        self._forget_merge()

    def _forget_merge(self) -> None:
        """The variables were given new values, which are those of an unmerged layer."""
        self._lora_state.unmerged = None
        self._lora_state.strength = None
