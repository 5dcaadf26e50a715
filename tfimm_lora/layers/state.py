"""The state of a converted layer, and the operations on the values of an adapted one.

Every layer that LoRA converts has one state object, in ``layer.__dict__["_lora_state"]``, where
Keras neither tracks nor wraps it. ``AdaptedValues`` merges, disables, scales and replaces the
update of an adapted layer, and reads and writes its files. While a layer is merged or disabled
its unmerged kernel and factors are kept in the state, so that they are restored exactly.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.backend.interface import Layer, OriginalLayer, Tensor, Variable
from tfimm_lora.config import LOHA_WEIGHT_NAMES, LORA_VARIABLE_NAMES, LayerSettings

_STATE = "_lora_state"

Values = dict[str, np.ndarray]


class Converted:
    """Base of the classes that LoRA makes from others: adapted and frozen layers, models."""

    def _is_trained(self, variable: Variable) -> bool:
        """Whether one of the layer's own variables is trained."""
        raise NotImplementedError

    def _note_trainable(self, value: bool) -> None:
        """Warn if setting ``trainable`` to this value has no effect."""

    def _freeze_new_sublayers(self) -> None:
        """Freeze the layers that were created inside after LoRA was injected."""

    def _is_made_from_keras(self) -> bool:
        """Whether the class was made from one of Keras, and not of its users."""
        return backend_of(self).is_keras_class(original_class(type(self)))


def original_class(cls: type) -> type:
    """The class that a converted class was made from; any other class is returned as it is."""
    return next(c for c in cls.__mro__ if not issubclass(c, Converted) and _is_layer_class(c))


def _is_layer_class(cls: type) -> bool:
    try:
        layer_class: type = backend_of(cls).keras.layers.Layer
    except TypeError:  # a mixin
        return False
    return issubclass(cls, layer_class)


@dataclass
class ConvertedState:
    """The state of any layer that LoRA converted, or opened for training."""

    #: The layer before conversion; None if it was created adapted, or loaded from a file.
    original: OriginalLayer | None = None


@dataclass
class FrozenState(ConvertedState):
    """The state of a frozen layer."""

    #: Whether its bias-like variables are trained.
    train_bias: bool = False
    #: Why it must not be saved as part of a whole model, or None.
    refusal: str | None = None
    #: The layers directly inside it when it was frozen; None if it was loaded from a file.
    sublayers: weakref.WeakSet[Layer] | None = None
    #: Whether it has statistics, or None before that was found out.
    has_statistics: bool | None = None


@dataclass
class AdaptedState(ConvertedState):
    """The state of an adapted layer."""

    settings: LayerSettings = field(kw_only=True)
    #: Kernel and LoRA variables of a merged or disabled layer, unmerged; else None.
    unmerged: Values | None = None
    #: How many times the layer was disabled, and whether it was merged before.
    disabled: int = 0
    merged_before: bool = False
    #: After ``set_strength``: the values at full strength, and those that it assigned.
    strength: tuple[Values, Values] | None = None
    #: Whether a call of the layer's class was seen to read the kernel.
    kernel_read: bool = False
    #: Whether it was seen to make another kernel of it (weight standardisation).
    kernel_transformed: bool = False


def state_of(layer: Layer) -> ConvertedState | None:
    """The state of a layer, or None if LoRA did not convert it."""
    state: ConvertedState | None = layer.__dict__.get(_STATE)
    return state


def set_state(layer: Layer, state: ConvertedState) -> None:
    """Give a layer its state."""
    layer.__dict__[_STATE] = state


def drop_state(layer: Layer) -> None:
    """Remove the state of a layer, which is restored to its original class."""
    layer.__dict__.pop(_STATE, None)


class AdaptedValues:
    """Mixin of ``LoRALayer``: merging, disabling, other values, and files."""

    # Of the adapted layer.
    name: str
    bias: Any
    _kernel_variable: Any

    def _effective_kernel(self) -> Tensor:
        raise NotImplementedError

    @property
    def merged(self) -> bool:
        """Whether the kernel includes the update at the moment."""
        return self._lora_state.unmerged is not None and not self._lora_state.disabled

    @property
    def lora(self) -> LayerSettings:
        """The layer's settings: rank, alpha, scale, dropout, ..."""
        return self._lora_state.settings

    @property
    def _lora_state(self) -> AdaptedState:
        state: AdaptedState = self.__dict__[_STATE]
        return state

    def _lora_variables(self) -> dict[str, Variable]:
        """The variables that LoRA added to the layer, by name."""
        return {n: self.__dict__[n] for n in LORA_VARIABLE_NAMES if n in self.__dict__}

    def _switches(self) -> dict[str, Variable]:
        """The LoRA variables that make the update vanish when they are zero: B, but not A, nor
        the second pair of LoHa."""
        kept = ("kernel_lora_a", "kernel_lora_a0", *LOHA_WEIGHT_NAMES)
        return {n: v for n, v in self._lora_variables().items() if n not in kept}

    def _merged_variables(self) -> dict[str, Variable]:
        """The variables of the base layer that merging changes."""
        changed = {"kernel": self._kernel_variable}
        return {**changed, "bias": self.bias} if self.lora.lora_bias else changed

    # -- merging ---------------------------------------------------------------------

    def merge_weights(self) -> None:
        """Add the update to the kernel, in place. ``unmerge_weights`` restores it exactly.

        B is zero while the layer is merged, so that whatever reads the variables finds a
        kernel and factors that agree, and the update is never applied twice.

        Raises:
            ValueError: if the layer is already merged, disabled, or not built.
        """
        if self.merged:
            raise ValueError(
                f"Layer '{self.name}' is already merged. Call unmerge_weights first."
            )
        self._require_enabled("merged")
        self._require_built("merge")
        merged = self._merged_tensors()
        self._lora_state.unmerged = self.lora_values()
        for name, variable in self._merged_variables().items():
            variable.assign(merged[name])
        self._switch_off()

    def unmerge_weights(self) -> None:
        """Undo ``merge_weights`` exactly.

        If the variables were given other values since (by ``set_weights``, for example), those
        are kept: they are taken as the values of an unmerged layer.

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
        for name, variable in {**self._merged_variables(), **self._lora_variables()}.items():
            variable.assign(unmerged[name])

    def lora_values(self) -> Values:
        """Kernel, A, B and other LoRA variables by name, as they are without merging."""
        if self._lora_state.unmerged:
            return self._lora_state.unmerged
        found = {**self._merged_variables(), **self._lora_variables()}
        return {name: backend_of(self).to_numpy(variable) for name, variable in found.items()}

    def merged_kernel(self) -> np.ndarray:
        """The adapted kernel as ``merge_weights`` would leave it, in the kernel's dtype."""
        return self.merged_values()["kernel"]

    def merged_values(self) -> Values:
        """What ``merge_weights`` would leave in the variables of the base layer, by name."""
        backend = backend_of(self)
        values = self._merged_variables() if self.merged else self._merged_tensors()
        return {name: backend.to_numpy(value) for name, value in values.items()}

    def _merged_tensors(self) -> dict[str, Tensor]:
        """``merged_values`` of a layer that is not merged, as tensors."""
        backend = backend_of(self)
        cast, dtype_of = backend.ops.cast, backend.dtype_of
        found = self._merged_variables()
        adapted = {"kernel": self._effective_kernel()}
        if "bias" in found:
            shift = backend.full_precision(self.__dict__["kernel_lora_shift"])
            bias = cast(backend.full_precision(self.bias), "float32")
            adapted["bias"] = bias + self.lora.lora_scale * shift
        return {name: cast(x, dtype_of(found[name])) for name, x in adapted.items()}

    def value_of(self, variable: Variable, merged: bool) -> np.ndarray:
        """The value that one of the layer's variables has with or without merging."""
        for name, changed in self._merged_variables().items():
            if variable is changed:
                return (self.merged_values() if merged else self.lora_values())[name]
        return backend_of(self).to_numpy(variable)

    def _switch_off(self) -> None:
        """Make the layer compute as without the update."""
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

    # -- other updates ---------------------------------------------------------------

    def assign_update(self, given: Mapping[str, np.ndarray]) -> None:
        """Assign values to the LoRA variables, and zeros to those that are not given.

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
        """Multiply the update by ``factor``; 1 restores the original update exactly."""
        values = {n: x for n, x in self.lora_values().items() if n in self._lora_variables()}
        now = {name: values[name] for name in self._switches()}
        known = self._lora_state.strength
        # Values other than those that this method assigned were trained or loaded since.
        same = known is not None and all(np.array_equal(known[1][n], x) for n, x in now.items())
        full = known[0] if known is not None and same else now
        if factor == 1:
            self.assign_update({**values, **full})
            return
        scaled = {name: (x * factor).astype(x.dtype) for name, x in full.items()}
        self.assign_update({**values, **scaled})
        self._lora_state.strength = full, scaled

    def disable(self) -> None:
        """Compute as without the update until ``enable``; calls may be nested."""
        state = self._lora_state
        if not state.disabled:
            self._require_built("disable")
            state.merged_before = self.merged
            values = self.lora_values()
            if state.merged_before:
                for name, variable in self._merged_variables().items():
                    variable.assign(values[name])
            self._switch_off()
            state.unmerged = values
        state.disabled += 1

    def enable(self) -> None:
        """Undo one ``disable`` exactly."""
        state = self._lora_state
        state.disabled -= 1
        if state.disabled or state.unmerged is None:
            return
        values, state.unmerged = state.unmerged, None
        for name, variable in self._lora_variables().items():
            variable.assign(values[name])
        if state.merged_before:
            self.merge_weights()

    # -- files -----------------------------------------------------------------------

    def _stored_variables(self) -> dict[str, Variable]:
        """Own variables by their key in a weight file.

        Those of the base layer are numbered as Keras numbers them and those of LoRA go by
        name, so neither kind of file is mistaken for the other.
        """
        backend = backend_of(self)
        own = backend.own_variables(self)
        names = [backend.variable_name(v) for v in own]
        base = [v for v, n in zip(own, names) if n not in LORA_VARIABLE_NAMES]
        return {**{str(i): v for i, v in enumerate(base)}, **self._lora_variables()}

    def save_own_variables(self, store: Any) -> None:
        """Write the variables as they are without merging."""
        if "kernel_lora_a" not in self.__dict__:
            return
        backend, unmerged = backend_of(self), self._lora_state.unmerged or {}
        changed = {id(v): name for name, v in self._merged_variables().items()}
        for key, variable in self._stored_variables().items():
            name = changed.get(id(variable), key)
            store[key] = backend.store_value(unmerged.get(name, variable))

    def load_own_variables(self, store: Any) -> None:
        """Read what ``save_own_variables`` wrote. A merged layer is unmerged by it."""
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
                f"{'; '.join(problems)}. Load the weights of a model without LoRA before "
                "LoRA is injected. Those of a LoRA model need the same lora_rank, "
                "lora_targets and variant (lora_use_dora, lora_use_loha, ...)."
            )
        for key, variable in stored.items():
            variable.assign(store[key])
        self._forget_merge()

    def _forget_merge(self) -> None:
        """Take the values of the variables as those of an unmerged layer."""
        self._lora_state.unmerged = None
        self._lora_state.strength = None
