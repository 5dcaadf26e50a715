"""``TensorFlowDevices``: the devices of a ``tf.distribute.Strategy``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfimm_lora.backend import legacy_backend
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.distributed.cluster import Cluster
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.padding import is_even, padded

NO_WORKERS_ON_KERAS_3 = (
    "Received several workers with Keras 3, whose fit does not support them; expected legacy "
    "Keras. Set TF_USE_LEGACY_KERAS=1 in the environment of each worker."
)


class TensorFlowDevices(Devices):
    """The devices of a ``tf.distribute.Strategy``."""

    def __init__(self, strategy: Any, even_first: bool) -> None:
        self.strategy, self.even_first = strategy, even_first
        self.replicas = strategy.num_replicas_in_sync
        self.cluster = _cluster(strategy)
        if self.cluster is not None:
            self.workers, self.worker = len(self.cluster.tasks), self.cluster.index

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        scope: contextlib.AbstractContextManager[Any] = self.strategy.scope()
        return scope

    def __str__(self) -> str:
        if self.cluster is None:
            return super().__str__()
        chief = "the chief" if self.is_chief else f"the chief, {self.cluster.addresses[0]},"
        return (
            f"{super().__str__()} of {self.workers} workers; this is worker {self.worker}, and "
            f"{chief} writes and reports"
        )

    def check(self, backend: Backend) -> None:
        if self.workers > 1 and backend is not legacy_backend():
            raise ValueError(NO_WORKERS_ON_KERAS_3)

    def training(
        self,
        train: Any,
        first: int,
        class_weight: Mapping[int, float] | None,
        accumulate: int = 1,
    ) -> tuple[Any, Any]:
        if accumulate > 1:
            raise ValueError(
                f"Received accumulate={accumulate} with a tf.distribute.Strategy; expected 1. "
                "Train on one device, or with Keras 3 on JAX."
            )
        batches, class_weight = super().training(train, first, class_weight)
        if is_even(batches, self.replicas):
            return batches, class_weight
        return padded(batches, self._padded_size, class_weight), None

    def validation(self, validation: Any) -> Any:
        batches = super().validation(validation)
        if batches is None or is_even(batches, self.replicas):
            return batches
        return padded(batches, self._padded_size)

    def scaled_losses(self, losses: Any) -> Any:
        """The unchanged losses (n,), with gradients scaled by the share of this device.

        Keras computes the mean loss on each device, and the mean over the devices. If device i
        has n_i pictures, and n is the mean of all n_i, its gradient must be multiplied by
        n_i / n to give each picture the same weight.
        """
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is None:  # Keras 3 traces the shapes of a step first
            return losses
        count = tf.cast(tf.shape(losses)[0], losses.dtype)
        mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, count)
        weighted = losses * (count / mean)
        return weighted + tf.stop_gradient(losses - weighted)

    def _gathered(self, numbers: np.ndarray) -> np.ndarray:
        import tensorflow as tf

        row = tf.constant(numbers[None])
        mine = self.strategy.experimental_distribute_values_from_function(lambda _: row)
        rows: np.ndarray = self.strategy.gather(mine, axis=0).numpy()
        # One for each device of a worker.
        return rows[:: len(rows) // self.workers]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        import tensorflow as tf

        errors = tf.errors
        lost = (errors.UnavailableError, errors.AbortedError, errors.DeadlineExceededError)
        try:
            yield
        except lost as error:
            if self.cluster is None:
                raise
            raise RuntimeError(
                f"Worker {self.worker} of {self.workers} cannot continue: "
                f"{self.cluster.named_in(str(error))} has ended or cannot be reached. Start "
                "all workers again with --resume (resume=True) to resume after the last "
                "complete epoch."
            ) from error

    def _padded_size(self, number: Any, n: Any, where: Any) -> Any:
        # TensorFlow gives ceil(n / devices) pictures to each device until none are left. On a
        # CPU, a convolution of an empty batch has a wrong shape (oneDNN in TensorFlow 2.21), so
        # each device needs a picture. Keras 3 averages the outputs of the first batch over the
        # devices to determine their shape, so its parts must have the same size.
        each = -(-n // self.replicas)
        whole = where(each * (self.replicas - 1) >= n, each * self.replicas, n)
        return where(number == 0, each * self.replicas, whole) if self.even_first else whole


def _cluster(strategy: Any) -> Cluster | None:
    """The workers of a strategy; None if there is only one process."""
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    return Cluster.of(jobs, resolver.task_type, resolver.task_id) if jobs else None
