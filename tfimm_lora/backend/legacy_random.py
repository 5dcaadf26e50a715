"""Random numbers of legacy Keras' layers from one source, such as a ``tf.random.Generator``.

Dropout and its like use random operations that keep their state in kernels; see
``tensorflow_random.py``. The state of a generator is a variable.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import tensorflow as tf
from tf_keras.src.backend import RandomGenerator

from tfimm_lora.backend.interface import Layer, Tensor

#: What layers call of Keras' ``RandomGenerator``.
_METHODS = (
    *("dropout", "random_uniform", "random_normal", "truncated_normal"),
    "make_seed_for_stateless_op",
)

#: The source from which layers draw, if it is not Keras' own.
_source: ContextVar[RandomGenerator | None] = ContextVar("random source", default=None)

#: Class of layers that draw random numbers without Keras -> ``call(layer, random, ...)``.
_calls: dict[type, Callable[..., Any]] = {}


def register_random_call(cls: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a ``call`` with a source of random numbers, for layers that call ``tf.random``.

    This is a decorator. The arguments of the function are the layer, the source, which has the
    methods of Keras' ``RandomGenerator``, and those of the layer's ``call``. Layers of exactly
    this class use it while ``finetune`` trains them.
    """

    def register(call: Callable[..., Any]) -> Callable[..., Any]:
        _calls[cls] = call
        return call

    return register


def from_generator(generator: tf.random.Generator) -> RandomGenerator:
    """A source of random numbers that draws from a generator."""
    source = RandomGenerator(rng_type=RandomGenerator.RNG_STATEFUL)
    source._generator, source._built = generator, True
    return source


class RepeatableNumbers(RandomGenerator):  # type: ignore[misc]
    """A source of random numbers that follow from a seed: a new one draws the same."""

    def __init__(self, seed: Tensor) -> None:
        super().__init__(seed=0, rng_type=self.RNG_STATELESS)
        self._base, self._drawn = seed, 0

    def make_seed_for_stateless_op(self) -> Tensor:
        self._drawn += 1
        return tf.random.experimental.stateless_fold_in(self._base, self._drawn)


def draw_seed() -> Tensor:
    """A seed for ``RepeatableNumbers`` from the source from which layers draw."""
    source = _source.get() or RandomGenerator()
    return source.random_uniform((2,), 0, 2**31 - 1, dtype=tf.int32)


@contextlib.contextmanager
def drawing_from(source: RandomGenerator, layers: Iterable[Layer]) -> Iterator[None]:
    """Within this block layers draw their random numbers from a source.

    Neither the configs of the layers nor the variables of the model change.
    """
    token = _source.set(source)
    methods = {name: getattr(source, name) for name in _METHODS}
    with contextlib.ExitStack() as stack:
        stack.callback(_source.reset, token)
        for layer in layers:
            if isinstance(getattr(layer, "_random_generator", None), RandomGenerator):
                stack.enter_context(_instance(layer._random_generator, **methods))
            if type(layer) in _calls:
                call = functools.partial(_calls[type(layer)], layer, source)
                stack.enter_context(_instance(layer, call=call))
        yield


@contextlib.contextmanager
def _instance(obj: Any, **attributes: Any) -> Iterator[None]:
    """Within this block an object has these attributes instead of those of its class."""
    before = {name: vars(obj)[name] for name in attributes if name in vars(obj)}
    vars(obj).update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            vars(obj).pop(name, None)
        vars(obj).update(before)
