"""The values of an adapted layer: merged, disabled, weaker or other ones, and in files.

While a layer is merged or disabled, the kernel, A and B as they are without that are kept
aside, so that every way back gives the very bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfimm_lora import _keras, config
from tfimm_lora._keras.common import Found


@dataclass
class State:
    """What an adapted layer knows; kept where no Keras tracks or wraps it."""

    spec: Any
    #: How the layer was before it was converted; None if it was created adapted.
    found: Found | None = None
    #: Kernel, A and B of a merged or disabled layer as they were, bit for bit; else None.
    unmerged: dict[str, np.ndarray] | None = None
    #: How many times the layer was disabled, and whether it was merged before.
    disabled: int = 0
    merged_before: bool = False
    #: After ``set_strength``: the B that is 100 %, and the B that it left.
    strength: tuple[np.ndarray, np.ndarray] | None = None
    #: Whether a call was seen to use the kernel.
    kernel_seen: bool = False
    #: Whether a call was seen to make another kernel of it (weight standardisation).
    kernel_transformed: bool = False


class LayerValues:
    """What ``LoRALayer`` does with the values of W, A and B; W in ``_kernel_variable``."""

    # Of the adapted layer.
    name: str
    kernel_lora_a: Any
    kernel_lora_b: Any
    _kernel_variable: Any
    _effective_kernel: Callable[[], Any]

    @property
    def merged(self) -> bool:
        """Whether the kernel holds the update at the moment."""
        return self._lora_state.unmerged is not None and not self._lora_state.disabled

    @property
    def _lora_state(self) -> State:
        return self.__dict__["_lora_state"]

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
        merged = self.merged_kernel()
        self._lora_state.unmerged = self.lora_values()
        self._kernel_variable.assign(merged)
        self.kernel_lora_b.assign(np.zeros(tuple(self.kernel_lora_b.shape), "float32"))

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
        replaced = _keras.of(self).to_numpy(self.kernel_lora_b).any()
        self._lora_state.unmerged = None
        if replaced:
            return
        self._kernel_variable.assign(unmerged["kernel"])
        self.kernel_lora_a.assign(unmerged["kernel_lora_a"])
        self.kernel_lora_b.assign(unmerged["kernel_lora_b"])

    def lora_values(self) -> dict[str, np.ndarray]:
        """Kernel, A and B by name, as they are without merging."""
        seam = _keras.of(self)
        return self._lora_state.unmerged or {
            "kernel": seam.to_numpy(self._kernel_variable),
            "kernel_lora_a": seam.to_numpy(self.kernel_lora_a),
            "kernel_lora_b": seam.to_numpy(self.kernel_lora_b),
        }

    def merged_kernel(self) -> np.ndarray:
        """W + s A B as ``merge_weights`` would leave it in the kernel, in its type."""
        seam = _keras.of(self)
        kernel = self._kernel_variable
        if self.merged:
            return seam.to_numpy(kernel)
        merged = seam.ops.cast(self._effective_kernel(), seam.dtype_of(kernel))
        return seam.to_numpy(merged)

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

    # -- other factors -----------------------------------------------------------------

    def assign_factors(self, a: np.ndarray, b: np.ndarray) -> None:
        """Give A and B new values. A merged layer stays merged, a disabled one disabled."""
        self._require_built("load")
        state = self._lora_state
        state.strength = None
        if state.disabled and state.unmerged is not None:
            state.unmerged = {**state.unmerged, "kernel_lora_a": a, "kernel_lora_b": b}
            return
        merged = self.merged
        if merged:
            self.unmerge_weights()
        self.kernel_lora_a.assign(a)
        self.kernel_lora_b.assign(b)
        if merged:
            self.merge_weights()

    def set_strength(self, factor: float) -> None:
        """Let the update count ``factor`` times; 1 gives back the bits of before."""
        values = self.lora_values()
        a, b = values["kernel_lora_a"], values["kernel_lora_b"]
        known = self._lora_state.strength
        # A B that is not the one this method left was trained or loaded since.
        whole = known[0] if known is not None and np.array_equal(known[1], b) else b
        scaled = whole if factor == 1 else (whole * factor).astype(whole.dtype)
        self.assign_factors(a, scaled)
        self._lora_state.strength = None if factor == 1 else (whole, scaled)

    def disable(self) -> None:
        """Compute as without the update until ``enable``; may be nested."""
        state = self._lora_state
        if not state.disabled:
            self._require_built("disable")
            state.merged_before = self.merged
            values = self.lora_values()
            if state.merged_before:
                self._kernel_variable.assign(values["kernel"])
            self.kernel_lora_b.assign(np.zeros_like(values["kernel_lora_b"]))
            state.unmerged = values
        state.disabled += 1

    def enable(self) -> None:
        """Undo one ``disable``, bit for bit."""
        state = self._lora_state
        state.disabled -= 1
        if state.disabled or state.unmerged is None:
            return
        values, state.unmerged = state.unmerged, None
        self.kernel_lora_a.assign(values["kernel_lora_a"])
        self.kernel_lora_b.assign(values["kernel_lora_b"])
        if state.merged_before:
            self.merge_weights()

    # -- saving ----------------------------------------------------------------------

    def _stored_variables(self) -> dict[str, Any]:
        """Own variables by their key in a weight file.

        The base layer's are numbered as Keras numbers them and A and B go by name, so
        neither file of the two is mistaken for the other's.
        """
        seam = _keras.of(self)
        own = seam.own_variables(self)
        names = [seam.variable_name(v) for v in own]
        base = [v for v, n in zip(own, names) if n not in config.LORA_WEIGHT_NAMES]
        stored = {str(i): v for i, v in enumerate(base)}
        for name in config.LORA_WEIGHT_NAMES:
            stored[name] = self.__dict__[name]
        return stored

    def save_own_variables(self, store: Any) -> None:
        """Write the variables as they are without merging."""
        if "kernel_lora_a" not in self.__dict__:
            return
        seam, unmerged = _keras.of(self), self._lora_state.unmerged or {}
        for key, variable in self._stored_variables().items():
            name = "kernel" if variable is self._kernel_variable else key
            store[key] = seam.store_value(unmerged.get(name, variable))

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
