"""Gradient accumulation for optimizers of legacy Keras; those of Keras 3 have it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


def accumulate_gradients(optimizer: Any, steps: int) -> None:
    """See ``Backend.accumulate_gradients``."""
    if not isinstance(optimizer, tf_keras.optimizers.Optimizer):
        raise ValueError(
            f"Received accumulate={steps} with an optimizer of type "
            f"{type(optimizer).__name__}; expected one of tf_keras.optimizers."
        )
    if getattr(optimizer, "_built", False) or isinstance(optimizer, _Accumulating):
        raise ValueError(
            f"Received accumulate={steps} with an optimizer that is built; expected a new one."
        )
    cls = type(optimizer)
    optimizer.__class__ = type(cls.__name__, (_Accumulating, cls), {})
    optimizer._gradient_steps = steps


class _Accumulating:
    """Mixin of an optimizer: updates after every so many steps, with the mean gradients."""

    _gradient_steps: int
    _index_dict: dict[Any, int]

    def build(self, var_list: Any) -> None:
        super().build(var_list)  # type: ignore[misc]
        if "_gradient_sums" not in self.__dict__:
            self._step = self.add_variable((), tf.int64, name="step")  # type: ignore[attr-defined]
            self._gradient_sums = [
                self.add_variable_from_reference(v, "gradient_sum")  # type: ignore[attr-defined]
                for v in var_list
            ]

    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = [(gradient, v) for gradient, v in grads_and_vars if gradient is not None]
        with tf.init_scope():
            self.build([v for _, v in pairs])
        keys = [self._var_key(v) for _, v in pairs]  # type: ignore[attr-defined]
        sums = [self._gradient_sums[self._index_dict[key]] for key in keys]
        for total, (gradient, _) in zip(sums, pairs):
            total.assign_add(tf.convert_to_tensor(gradient))
        self._step.assign_add(1)

        def update() -> Any:
            means = [(total / self._gradient_steps, v) for total, (_, v) in zip(sums, pairs)]
            super(_Accumulating, self).apply_gradients(means, *args, **kwargs)  # type: ignore[misc]
            for total in sums:
                total.assign(tf.zeros_like(total))
            return tf.identity(self.iterations)  # type: ignore[attr-defined]

        return tf.cond(
            tf.equal(self._step % self._gradient_steps, 0),
            update,
            lambda: tf.identity(self.iterations),  # type: ignore[attr-defined]
        )
