"""Mixins for optimizers with a learning rate factor for each variable.

The factor multiplies the learning rate in the update, for any update rule, and in decoupled
weight decay. This is equivalent to a separate optimizer for these variables.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tfimm_lora.backend.interface import Tensor, Variable

_FACTORS, _CURRENT = "_lora_rate_factors", "_lora_rate_factor"


class _VariableRates:
    """The common part. ``_rate_factors(variables)`` of the class returns a factor for each."""

    def build(self, variables: Any) -> None:
        # By key, because the copies of a variable on several devices have the same key.
        factors = self._rate_factors(variables)  # type: ignore[attr-defined]
        keys = [self._var_key(v) for v in variables]  # type: ignore[attr-defined]
        self.__dict__[_FACTORS] = dict(zip(keys, factors))
        super().build(variables)  # type: ignore[misc]

    def _factor_of(self, variable: Variable) -> float:
        result: float = self.__dict__[_FACTORS].get(self._var_key(variable), 1.0)  # type: ignore[attr-defined]
        return result

    @contextmanager
    def _rate_times(self, factor: float) -> Iterator[None]:
        """Multiply the learning rate by a factor within this block."""
        # Reset to 1, not to the previous value: the blocks of replicas can interleave.
        self.__dict__[_CURRENT] = factor
        try:
            yield
        finally:
            self.__dict__[_CURRENT] = 1.0

    def _multiplied(self, rate: Any) -> Any:
        factor = self.__dict__.get(_CURRENT, 1.0)
        return rate if factor == 1.0 else rate * factor

    def _apply_weight_decay(self, variables: Any) -> None:
        if self.weight_decay is None:  # type: ignore[attr-defined]
            return
        groups: dict[float, list[Variable]] = {}
        for variable in variables:
            if self._use_weight_decay(variable):  # type: ignore[attr-defined]
                groups.setdefault(self._factor_of(variable), []).append(variable)
        for factor, group in groups.items():
            with self._rate_times(factor):
                super()._apply_weight_decay(group)  # type: ignore[misc]


class LegacyVariableRates(_VariableRates):
    """For legacy Keras, whose update rules read the rate from the optimizer."""

    @property
    def learning_rate(self) -> Any:
        return self._multiplied(super().learning_rate)  # type: ignore[misc]

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        super(LegacyVariableRates, type(self)).learning_rate.fset(self, value)  # type: ignore

    def update_step(self, gradient: Tensor, variable: Variable) -> None:
        with self._rate_times(self._factor_of(variable)):
            super().update_step(gradient, variable)  # type: ignore[misc]


class Keras3VariableRates(_VariableRates):
    """For Keras 3, which passes the rate to update rules; weight decay reads it."""

    def _get_current_learning_rate(self) -> Any:
        return self._multiplied(super()._get_current_learning_rate())  # type: ignore[misc]

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Any) -> None:
        factor = self._factor_of(variable)
        rate = learning_rate if factor == 1.0 else learning_rate * factor
        super().update_step(gradient, variable, rate)  # type: ignore[misc]
