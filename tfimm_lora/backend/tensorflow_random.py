"""Random operations of TensorFlow with state in their kernels, such as ``tf.random.uniform``.

Such a state can be neither read nor set. It can only be cleared, with all other kernels and the
optimized graphs of all functions, which take seconds to create again in a large model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import tensorflow as tf


def restart(functions: Iterable[Any], seed: int) -> None:
    """Restart these random operations from a seed, unless functions of Keras contain none.

    Args:
        functions: The functions of ``fit`` and ``evaluate``. None stands for one that Keras has
            not created yet.
        seed: The seed.
    """
    graphs = [graph for f in functions if f is not None for graph in _graphs(f)]
    if not graphs or None in graphs or any(map(_has_random_kernels, graphs)):
        tf.random.set_seed(seed)


def _graphs(function: Any) -> list[Any]:
    """The graphs traced of a function; [None] if it runs as Python, without a graph."""
    candidates = [function]
    if inspect.isfunction(function):  # Keras 3 wraps what it traces in a function of Python
        candidates += inspect.getclosurevars(function).nonlocals.values()
    found = [f for f in candidates if hasattr(f, "_list_all_concrete_functions")]
    traced = [concrete for f in found for concrete in f._list_all_concrete_functions()]
    return [concrete.graph for concrete in traced] if found else [None]


def _has_random_kernels(graph: Any) -> bool:
    definition = graph.as_graph_def()
    nodes = [definition.node, *(function.node_def for function in definition.library.function)]
    # All of them have two attributes for the seed. Operations on the state in a variable
    # (tf.random.Generator) and those without a state have inputs instead.
    return any("seed2" in node.attr for inside in nodes for node in inside)
