"""``Devices``: the devices that train one model together."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tfimm_lora.backend import backend_of, legacy_backend
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.distributed.cluster import Cluster

NO_WORKERS_ON_KERAS_3 = (
    "Received several workers with Keras 3, whose fit does not support them; expected legacy "
    "Keras. Set TF_USE_LEGACY_KERAS=1 in the environment of each worker."
)


class Devices:
    """A single device, and the base class of several devices.

    Attributes:
        replicas: The number of copies of the model, among which each batch is divided.
        workers: The number of processes that train together.
        worker: The index of this process; 0 is the chief, which writes files and reports.
    """

    replicas, workers, worker = 1, 1, 0

    def __str__(self) -> str:
        return f"{self.replicas} device{'s' if self.replicas > 1 else ''}"

    @property
    def is_chief(self) -> bool:
        """Whether this process writes files and reports."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """The scope in which model, LoRA and optimizer are created and the model is trained."""
        return contextlib.nullcontext()

    def check(self, backend: Backend) -> None:
        """Raise if models of this Keras cannot be trained on these devices."""

    def check_batch(self, batch_size: int) -> None:
        """Raise unless the pictures of a batch can be divided equally."""
        if batch_size % self.replicas:
            raise ValueError(
                f"Received batch_size={batch_size} for {self.replicas} devices; expected a "
                f"multiple of {self.replicas}. It is the number of pictures in a step over all "
                "devices."
            )

    def validation_batch(self, count: int, batch_size: int) -> int:
        """The largest batch size, up to the given one, for which validation batches divide.

        It does not change the results, but each device should get pictures.
        """
        for size in range(batch_size, 0, -1):
            numbered = enumerate((min(size, count), size, count % size))
            if all(self._padded_size(i, n, _where) == n for i, n in numbered if n):
                return size
        return batch_size

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        """Training batches that ``fit`` can divide, and the class weights for ``fit``."""
        return batches, class_weight

    def validation(self, batches: Any) -> Any:
        """Validation batches that can be divided."""
        return batches

    def callbacks(self, backend: Backend) -> list[Any]:
        """Keras callbacks for the training."""
        return []

    def scaled_losses(self, losses: Any) -> Any:
        """The losses of one device, scaled so that each picture has the same weight."""
        return losses

    def agree(self, what: str, value: Any) -> None:
        """Wait for all processes, and raise in all of them unless their values are equal."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Raise a readable error if another process ends during the block."""
        yield

    def _padded_size(self, number: Any, n: Any, where: Any) -> Any:
        """The size to which the batch with this index, of n pictures, is padded."""
        return n


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

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        if _is_even(batches, self.replicas):
            return batches, class_weight
        return padded(batches, self._padded_size, class_weight), None

    def validation(self, batches: Any) -> Any:
        if batches is None or _is_even(batches, self.replicas):
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

    def agree(self, what: str, value: Any) -> None:
        if self.workers == 1:
            return
        import tensorflow as tf

        digest = hashlib.sha256(repr(value).encode()).digest()[:8]
        number = tf.constant([int.from_bytes(digest, "big", signed=True)], tf.int64)
        mine = self.strategy.experimental_distribute_values_from_function(lambda _: number)
        if len(set(self.strategy.gather(mine, axis=0).numpy().tolist())) > 1:
            raise ValueError(
                f"The workers do not have the same {what}; expected equal ones. Start all of "
                "them with the same arguments, versions and files. To resume a run, its folder "
                "must be accessible to all workers."
            )

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


class JaxDevices(Devices):
    """The devices of a ``keras.distribution.DataParallel``, which needs equal parts."""

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution
        self.replicas = int(distribution.device_mesh.devices.size)
        self.processes = distribution.num_processes
        self.divides_validation = True

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        scope: contextlib.AbstractContextManager[Any] = self.distribution.scope()
        return scope

    def check(self, backend: Backend) -> None:
        if self.processes > 1:
            raise ValueError(
                f"Received a distribution over {self.processes} processes; expected one "
                "process. Call fit of the model, and save its adapter in process 0; see "
                "docs/how-to/several-devices.md."
            )

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        if _is_even(batches, self.replicas):
            return batches, class_weight
        return padded(batches, self._padded_size, class_weight), None

    def validation(self, batches: Any) -> Any:
        self.divides_validation = batches is None or _is_even(batches, self.replicas)
        return batches

    def callbacks(self, backend: Backend) -> list[Any]:
        if self.divides_validation:
            return []
        # A smaller batch cannot be divided, and padding would change the metrics, so each
        # device validates on all pictures.
        module = backend.keras.distribution

        class Whole(module.DataParallel):  # type: ignore[misc, name-defined]
            def get_data_layout(self, data_shape: Any) -> Any:
                return module.TensorLayout([None] * len(data_shape), self.device_mesh)

        whole = Whole(self.distribution.device_mesh)
        return [
            backend.keras.callbacks.LambdaCallback(
                on_test_begin=lambda logs: module.set_distribution(whole),
                on_test_end=lambda logs: module.set_distribution(self.distribution),
            )
        ]

    def _padded_size(self, number: Any, n: Any, where: Any) -> Any:
        return -(-n // self.replicas) * self.replicas


def devices_of(model: Any) -> Devices:
    """The devices that a model was created for.

    Raises:
        ValueError: if the model was created with a ``keras.distribution`` that is not set now.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.finetuning.distributed.devices import devices_of
        >>> model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
        >>> devices_of(model).replicas
        1
    """
    backend = backend_of(model)
    with backend.variable_scope(model.weights[0]):
        found = current_devices(backend)
    copies = backend.copies(model.weights[0])
    if copies > found.replicas:
        raise ValueError(
            f"The weights of the model '{model.name}' are on {copies} devices, but no "
            "distribution is set; expected that of the model. Call this in `with "
            "distribution.scope():`, or call keras.distribution.set_distribution first."
        )
    return found


def current_devices(backend: Backend) -> Devices:
    """The devices for which a model would be created now."""
    distribution = backend.distribution()
    if distribution is not None:
        return JaxDevices(distribution)
    if backend.framework() != "tensorflow":
        return Devices()
    import tensorflow as tf

    if tf.distribute.has_strategy():
        return TensorFlowDevices(
            tf.distribute.get_strategy(), even_first=backend is not legacy_backend()
        )
    return Devices()


def padded(
    batches: Any, padded_size: Any, class_weight: Mapping[int, float] | None = None
) -> Any:
    """Pad batches to ``padded_size(index, size, tf.where)`` and add example weights.

    The padding repeats examples of the batch with weight 0. The weights of the others are
    scaled so that the mean of the weighted losses is the mean loss of the batch.
    """
    if isinstance(batches, Generator):
        return _numpy_padded(batches, padded_size, class_weight)
    import tensorflow as tf

    table = None
    if class_weight:
        table = tf.constant([class_weight.get(i, 1.0) for i in range(max(class_weight) + 1)])

    def pad(number: Any, batch: Any) -> Any:
        x, y, weight = (*batch, None)[:3]
        count = tf.shape(tf.nest.flatten(y)[0])[0]
        size = padded_size(number, count, tf.where)
        places = tf.range(size)
        weights = tf.where(places < count, tf.cast(size / count, tf.float32), 0.0)
        source = places % count
        if weight is not None:
            weights *= tf.cast(tf.gather(weight, source), tf.float32)
        if table is not None:
            weights *= tf.gather(table, tf.gather(y, source))
        return *tf.nest.map_structure(lambda t: tf.gather(t, source), (x, y)), weights

    return batches.enumerate().map(pad)


def _numpy_padded(
    batches: Iterable[Any], padded_size: Any, class_weight: Mapping[int, float] | None
) -> Iterator[Any]:
    """As ``padded``, for the batches of ``PictureBatches`` without TensorFlow."""
    for number, (x, y) in enumerate(batches):
        places = np.arange(padded_size(number, len(y), _where))
        source = places % len(y)
        weights = np.where(places < len(y), np.float32(len(places) / len(y)), np.float32(0))
        if class_weight:
            weights *= np.array([class_weight.get(int(i), 1.0) for i in y[source]], np.float32)
        yield x[source], y[source], weights


def _where(condition: bool, yes: int, no: int) -> int:
    return yes if condition else no


def _is_even(batches: Any, devices: int) -> bool:
    """Whether all batches have the same size, a multiple of the number of devices."""
    if not hasattr(batches, "element_spec"):  # read without TensorFlow
        return devices == 1
    import tensorflow as tf

    size = tf.nest.flatten(batches.element_spec)[0].shape[0]
    return devices == 1 or (size is not None and size % devices == 0)


def _cluster(strategy: Any) -> Cluster | None:
    """The workers of a strategy; None if there is only one process."""
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    return Cluster.of(jobs, resolver.task_type, resolver.task_id) if jobs else None
