"""Random numbers of legacy Keras' layers from one ``tf.random.Generator``.

Dropout and its like use random operations that keep their state in kernels; see
``tensorflow_random.py``. The state of a generator is a variable.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tensorflow as tf
from tf_keras.src.backend import RandomGenerator

from tfimm_lora.backend.interface import Layer

#: What layers call of Keras' ``RandomGenerator``.
_METHODS = (
    *("dropout", "random_uniform", "random_normal", "truncated_normal"),
    "make_seed_for_stateless_op",
)

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


@contextlib.contextmanager
def drawing_from(generator: tf.random.Generator, layers: Iterable[Layer]) -> Iterator[None]:
    """Within this block layers draw their random numbers from a generator.

    Neither the configs of the layers nor the variables of the model change.
    """
    source = RandomGenerator(rng_type=RandomGenerator.RNG_STATEFUL)
    source._generator, source._built = generator, True
    methods = {name: getattr(source, name) for name in _METHODS}
    with contextlib.ExitStack() as stack:
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
