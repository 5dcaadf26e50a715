"""``Devices``: what trains one model together, and what a training has to know of it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from tfimm_lora.backend import backend_of, legacy_backend
from tfimm_lora.finetuning.distributed.cluster import Cluster

NO_WORKERS_ON_KERAS_3 = (
    "Received several workers with Keras 3, whose fit cannot train on them; expected legacy "
    "Keras: set TF_USE_LEGACY_KERAS=1 in the environment of each worker."
)


class Devices:
    """One device, on which nothing has to be divided; the others say what differs.

    Attributes:
        replicas: Copies of the model, among which the pictures of a batch are divided.
        workers: Processes that train together.
        worker: The number of this one; 0 is the chief, which alone writes and reports.
    """

    replicas, workers, worker = 1, 1, 0

    def __str__(self) -> str:
        return f"{self.replicas} device{'s' if self.replicas > 1 else ''}"

    @property
    def is_chief(self) -> bool:
        """Whether this process writes and reports."""
        return self.worker == 0

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        """In which the model, LoRA and the optimizer are created, and the model is trained."""
        return contextlib.nullcontext()

    def check(self, backend: Any) -> None:
        """Raise if models of this Keras cannot be trained here."""

    def check_batch(self, batch_size: int) -> None:
        """Raise unless the pictures of a batch can be divided equally."""
        if batch_size % self.replicas:
            raise ValueError(
                f"Received batch_size={batch_size} for {self.replicas} devices; expected a "
                f"multiple of {self.replicas}: it is the number of pictures in a step, over "
                "all devices."
            )

    def validation_batch(self, count: int, batch_size: int) -> int:
        """The batch size, up to the one given, with which pictures to validate on divide.

        How they are batched changes no result, but each device should get some.
        """
        for size in range(batch_size, 0, -1):
            numbered = enumerate((min(size, count), size, count % size))
            if all(self._whole(i, n, _where) == n for i, n in numbered if n):
                return size
        return batch_size

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        """Batches of (x, y) that ``fit`` can divide, and class weights for ``fit``."""
        return batches, class_weight

    def validation(self, batches: Any) -> Any:
        """Batches that can be divided in validation."""
        return batches

    def callbacks(self, backend: Any) -> list[Any]:
        """Keras callbacks for the training."""
        return []

    def scaled_losses(self, losses: Any) -> Any:
        """The losses of the pictures of one device, in the measure that they count."""
        return losses

    def agree(self, what: str, told: Any) -> None:
        """Raise in all processes unless they tell the same; they wait for each other."""

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Say in words that another process is gone."""
        yield

    def _whole(self, number: Any, n: Any, where: Any) -> Any:
        """The size to which the batch of this number is filled up, which has n pictures."""
        return n


class TensorFlowDevices(Devices):
    """Those of a ``tf.distribute.Strategy``."""

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
        part = "the chief" if self.is_chief else f"the chief, {self.cluster.addresses[0]},"
        return (
            f"{super().__str__()} of {self.workers} workers; this is worker {self.worker}, and "
            f"{part} writes and reports"
        )

    def check(self, backend: Any) -> None:
        if self.workers > 1 and backend is not legacy_backend():
            raise ValueError(NO_WORKERS_ON_KERAS_3)

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        if _is_even(batches, self.replicas):
            return batches, class_weight
        return filled(batches, self._whole, class_weight), None

    def validation(self, batches: Any) -> Any:
        if batches is None or _is_even(batches, self.replicas):
            return batches
        return filled(batches, self._whole)

    def scaled_losses(self, losses: Any) -> Any:
        """Losses (n,) as they are, whose gradients weigh by the share of this device.

        Keras takes the mean of the losses on each device, and the mean of those. Where the
        devices have n_1 ... n_r pictures, n on average, the gradient of device i must count
        n_i / n times for each picture to count the same.
        """
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is None:  # Keras 3 looks at the shapes of a step before it takes one
            return losses
        count = tf.cast(tf.shape(losses)[0], losses.dtype)
        mean = context.all_reduce(tf.distribute.ReduceOp.MEAN, count)
        weighted = losses * (count / mean)
        return weighted + tf.stop_gradient(losses - weighted)

    def agree(self, what: str, told: Any) -> None:
        if self.workers == 1:
            return
        import tensorflow as tf

        digest = hashlib.sha256(repr(told).encode()).digest()[:8]
        number = tf.constant([int.from_bytes(digest, "big", signed=True)], tf.int64)
        mine = self.strategy.experimental_distribute_values_from_function(lambda _: number)
        if len(set(self.strategy.gather(mine, axis=0).numpy().tolist())) > 1:
            raise ValueError(
                f"The workers do not have the same {what}. Start all of them with the same "
                "arguments, versions and files; a run to go on with is in a folder that all "
                "of them see."
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
                f"Worker {self.worker} of {self.workers} cannot go on: "
                f"{self.cluster.named_in(str(error))} has ended or cannot be reached. Start "
                "all workers again with --resume (resume=True) to go on after the last epoch "
                "that was finished."
            ) from error

    def _whole(self, number: Any, n: Any, where: Any) -> Any:
        # TensorFlow gives ceil(n / devices) to each, as long as there are any. On a CPU, a
        # convolution of no pictures has a wrong shape (oneDNN in TensorFlow 2.21). Keras 3
        # takes the mean over the devices of a first batch, to know its shape.
        each = -(-n // self.replicas)
        whole = where(each * (self.replicas - 1) >= n, each * self.replicas, n)
        return where(number == 0, each * self.replicas, whole) if self.even_first else whole


class JaxDevices(Devices):
    """Those of a ``keras.distribution.DataParallel``, which divides equally or not at all."""

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution
        self.replicas = int(distribution.device_mesh.devices.size)
        self.processes = distribution.num_processes
        self.divides_validation = True

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        scope: contextlib.AbstractContextManager[Any] = self.distribution.scope()
        return scope

    def check(self, backend: Any) -> None:
        if self.processes > 1:
            raise ValueError(
                f"Received a distribution over {self.processes} processes; finetune works in "
                "one. Call the model's fit, and save its adapter in process 0; see "
                "docs/how-to/several-devices.md."
            )

    def training(self, batches: Any, class_weight: Mapping[int, float] | None) -> Any:
        if _is_even(batches, self.replicas):
            return batches, class_weight
        return filled(batches, self._whole, class_weight), None

    def validation(self, batches: Any) -> Any:
        self.divides_validation = batches is None or _is_even(batches, self.replicas)
        return batches

    def callbacks(self, backend: Any) -> list[Any]:
        if self.divides_validation:
            return []
        # A smaller batch cannot be divided, and what is filled up would be counted: each
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

    def _whole(self, number: Any, n: Any, where: Any) -> Any:
        return -(-n // self.replicas) * self.replicas


def devices_of(model: Any) -> Devices:
    """The devices that a model was created for.

    Raises:
        ValueError: if they are those of a ``keras.distribution`` that is no longer set.

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
            f"The weights of the model '{model.name}' are on {copies} devices, and no "
            "distribution is set. Call this in `with distribution.scope():`, or after "
            "keras.distribution.set_distribution(distribution)."
        )
    return found


def current_devices(backend: Any) -> Devices:
    """Those for which a model would be created here."""
    distribution = backend.distribution()
    if distribution is not None:
        return JaxDevices(distribution)
    import tensorflow as tf

    if tf.distribute.has_strategy():
        return TensorFlowDevices(
            tf.distribute.get_strategy(), even_first=backend is not legacy_backend()
        )
    return Devices()


def filled(batches: Any, whole: Any, class_weight: Mapping[int, float] | None = None) -> Any:
    """Fill up batches to ``whole(number, size, tf.where)``, with weights for examples.

    What is filled in are examples of the same batch again, with weight 0, and the others
    weigh so much more that the mean of the weighted losses is that of the batch.
    """
    import tensorflow as tf

    table = None
    if class_weight:
        table = tf.constant([class_weight.get(i, 1.0) for i in range(max(class_weight) + 1)])

    def fill(number: Any, batch: Any) -> Any:
        x, y, weight = (*batch, None)[:3]
        count = tf.shape(tf.nest.flatten(y)[0])[0]
        size = whole(number, count, tf.where)
        places = tf.range(size)
        each = tf.where(places < count, tf.cast(size / count, tf.float32), 0.0)
        again = places % count
        if weight is not None:
            each *= tf.cast(tf.gather(weight, again), tf.float32)
        if table is not None:
            each *= tf.gather(table, tf.gather(y, again))
        return *tf.nest.map_structure(lambda t: tf.gather(t, again), (x, y)), each

    return batches.enumerate().map(fill)


def _where(condition: bool, yes: int, no: int) -> int:
    return yes if condition else no


def _is_even(batches: Any, devices: int) -> bool:
    """Whether all batches have one size, that can be divided."""
    import tensorflow as tf

    size = tf.nest.flatten(batches.element_spec)[0].shape[0]
    return devices == 1 or (size is not None and size % devices == 0)


def _cluster(strategy: Any) -> Cluster | None:
    """The workers of a strategy, if there are several processes."""
    import tensorflow as tf

    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return None
    resolver = strategy.cluster_resolver
    jobs = resolver.cluster_spec().as_dict()
    return Cluster.of(jobs, resolver.task_type, resolver.task_id) if jobs else None
