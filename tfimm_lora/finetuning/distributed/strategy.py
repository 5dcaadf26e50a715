"""``open_strategy``: the devices of a recipe, by the name of the strategy."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from functools import cache
from typing import Any

from tfimm_lora.backend import default_backend, how_to_use_tensorflow, uses_legacy_keras
from tfimm_lora.finetuning.distributed.cluster import Cluster
from tfimm_lora.finetuning.distributed.current import current_devices
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.jax_devices import JaxDevices
from tfimm_lora.finetuning.distributed.processes import connect, leave, process_settings
from tfimm_lora.finetuning.distributed.tensorflow_devices import NO_WORKERS_ON_KERAS_3
from tfimm_lora.validation import check_choice

#: The strategies and their devices.
STRATEGIES = {
    "none": "one device",
    "mirrored": "all devices of this machine, on TensorFlow",
    "multiworker": "several machines, on TensorFlow with legacy Keras",
    "tpu": "the TPU of this machine, or that of TPU_NAME, on TensorFlow",
    "data-parallel": "all devices of this machine, with Keras 3 on JAX",
    "multihost": "several machines, with Keras 3 on JAX",
}

#: The strategies of Keras 3 on JAX, and the similar ones of TensorFlow.
_ON_JAX = {"data-parallel": "mirrored", "multihost": "multiworker"}

#: The timeout for the other workers in seconds.
PATIENCE = 300.0


def check_strategy(name: str) -> None:
    """Raise if a strategy cannot work in this process, before anything is started.

    Args:
        name: One of "none", "mirrored", "multiworker", "tpu", "data-parallel" and "multihost".

    Raises:
        ValueError: for an unknown name, or if the strategy needs another Keras, framework or
            environment.

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
    if name in _ON_JAX and framework != "jax":
        raise ValueError(
            f"Received strategy={name!r} with Keras on {framework}; expected Keras 3 on JAX: "
            "set KERAS_BACKEND=jax and TF_USE_LEGACY_KERAS=0"
            + (f", or pass strategy={_ON_JAX[name]!r}." if framework == "tensorflow" else ".")
        )
    if name not in _ON_JAX and framework != "tensorflow":
        similar = "multihost" if name == "multiworker" else "data-parallel"
        raise ValueError(
            f"Received strategy={name!r} with Keras 3 on {framework}; expected TensorFlow. "
            f"{how_to_use_tensorflow()}"
            + (f", or pass strategy={similar!r}." if framework == "jax" else ".")
        )
    if name == "multiworker":
        if not uses_legacy_keras():
            raise ValueError(NO_WORKERS_ON_KERAS_3)
        Cluster.from_environment()
    if name == "multihost":
        process_settings()


def check_name(name: str) -> None:
    """Raise unless there is a strategy with this name."""
    check_choice(name, "strategy", STRATEGIES)


def is_chief(name: str) -> bool:
    """Whether this process writes files and reports.

    With "multihost", this waits for all other processes, since JAX may find out which they are.
    """
    if name == "multihost":
        connect(PATIENCE)
        import jax

        return bool(jax.process_index() == 0)
    return name != "multiworker" or Cluster.from_environment().index == 0


def leave_strategy(name: str) -> None:
    """Leave the other processes after a training, so that they can end."""
    if name == "multihost":
        leave()


def open_strategy(name: str) -> Devices:
    """Open the devices of a strategy.

    With "multiworker" and "multihost", this waits for all other workers.

    Args:
        name: As for ``check_strategy``. "none" means the devices of the current scope.

    Raises:
        ValueError: as ``check_strategy``.
        RuntimeError: if there is no TPU, or TensorFlow was used before "multiworker".
        TimeoutError: if another worker does not start.
    """
    check_strategy(name)
    if name == "none":
        return current_devices(default_backend())
    if name == "multihost":
        connect(PATIENCE)
    if name in _ON_JAX:
        return JaxDevices(default_backend().keras.distribution.DataParallel())
    with _tensorflow_strategy(name).scope():
        return current_devices(default_backend())


@cache
def _tensorflow_strategy(name: str) -> Any:
    """The strategy, created once per process, because collective operations are numbered."""
    import tensorflow as tf

    if name == "mirrored":
        return tf.distribute.MirroredStrategy()
    if name == "tpu":
        return tf.distribute.TPUStrategy(_tpu())
    Cluster.from_environment().meet(PATIENCE)
    with _no_longer_than(PATIENCE):
        return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu() -> Any:
    """Initialize the TPU."""
    import tensorflow as tf

    name = os.environ.get("TPU_NAME", "local")
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        if name != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, OSError) as error:
        raise RuntimeError(
            f"Received strategy='tpu', but there is no TPU '{name}': "
            f"{str(error).partition(chr(10))[0]}. On a machine with a TPU, install TensorFlow "
            "for TPU; for a remote TPU, set TPU_NAME."
        ) from error
    return resolver


@contextlib.contextmanager
def _no_longer_than(seconds: float) -> Iterator[None]:
    """Exit the process if the block takes longer.

    TensorFlow waits for workers without running Python, so not even Ctrl-C works. All workers
    have just answered, so this only happens if one ends at this moment.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
