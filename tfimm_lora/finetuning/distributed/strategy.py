"""``open_strategy``: the devices of a recipe by the name that a person gives them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

from tfimm_lora.backend import default_backend, uses_legacy_keras
from tfimm_lora.finetuning.distributed.cluster import Cluster
from tfimm_lora.finetuning.distributed.devices import (
    NO_WORKERS_ON_KERAS_3,
    Devices,
    JaxDevices,
    current_devices,
)

#: What ``strategy`` may be, and what it needs.
STRATEGIES = {
    "none": "one device",
    "mirrored": "all devices of this machine, on TensorFlow",
    "multiworker": "several machines, on TensorFlow with legacy Keras",
    "tpu": "the TPU of this machine, or that of TPU_NAME, on TensorFlow",
    "data-parallel": "all devices of this machine, with Keras 3 on JAX",
}

#: Seconds to wait for the other workers.
PATIENCE = 300.0


def check_strategy(name: str) -> None:
    """Raise where a strategy cannot work in this process, before anything is started.

    Args:
        name: One of "none", "mirrored", "multiworker", "tpu" and "data-parallel".

    Raises:
        ValueError: if there is none of this name, or this Keras, its backend or the
            environment is not what it needs.

    Example:
        >>> from tfimm_lora.finetuning.distributed.strategy import check_strategy
        >>> check_strategy("none")
        >>> check_strategy("mirorred")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Received strategy='mirorred'; expected one of none, mirrored, ...
    """
    check_name(name)
    if name == "none":
        return
    framework = default_backend().framework()
    if name == "data-parallel" and framework != "jax":
        raise ValueError(
            f"Received strategy={name!r} with Keras on {framework}; expected Keras 3 on JAX: "
            "set KERAS_BACKEND=jax and TF_USE_LEGACY_KERAS=0"
            + (", or pass strategy='mirrored'." if framework == "tensorflow" else ".")
        )
    if name != "data-parallel" and framework != "tensorflow":
        raise ValueError(
            f"Received strategy={name!r} with Keras 3 on {framework}; expected TensorFlow, "
            "whose it is"
            + (": or pass strategy='data-parallel'." if framework == "jax" else ".")
        )
    if name == "multiworker":
        if not uses_legacy_keras():
            raise ValueError(NO_WORKERS_ON_KERAS_3)
        Cluster.from_environment()


def check_name(name: str) -> None:
    """Raise unless there is a strategy of this name."""
    if name not in STRATEGIES:
        raise ValueError(
            f"Received strategy={name!r}; expected one of {', '.join(STRATEGIES)}."
        )


def is_chief(name: str) -> bool:
    """Whether this process is the one that writes and reports."""
    return name != "multiworker" or Cluster.from_environment().index == 0


def open_strategy(name: str) -> Devices:
    """Take the devices of a strategy.

    With "multiworker" this waits until all workers are there.

    Args:
        name: As in ``check_strategy``; "none" are those of the scope around, if there is one.

    Raises:
        ValueError: as ``check_strategy``.
        RuntimeError: if there is no TPU, or TensorFlow was used before "multiworker".
        TimeoutError: if another worker does not come.
    """
    check_strategy(name)
    if name == "none":
        return current_devices(default_backend())
    if name == "data-parallel":
        return JaxDevices(default_backend().keras.distribution.DataParallel())
    with _tensorflow_strategy(name).scope():
        return current_devices(default_backend())


@cache
def _tensorflow_strategy(name: str) -> Any:
    """One of a kind for a process: their collective operations go by numbers."""
    import tensorflow as tf

    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "tpu":
        return tf.distribute.TPUStrategy(_tpu())
    Cluster.from_environment().meet(PATIENCE)
    with _no_longer_than(PATIENCE):
        return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu() -> Any:
    """The TPU, ready for use."""
    import tensorflow as tf

    name = os.environ.get("TPU_NAME", "local")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, OSError) as error:
        raise RuntimeError(
            f"Received strategy='tpu', and found no TPU '{name}': "
            f"{str(error).partition(chr(10))[0]}. On a machine with a TPU use a TensorFlow "
            "that was built for it; for one elsewhere set TPU_NAME."
        ) from error
    return resolver


@contextlib.contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """End the process if this takes longer.

    TensorFlow waits for workers without letting Python run, not even for Ctrl-C. All of
    them have just been there, so this is for one that ended in that moment.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
