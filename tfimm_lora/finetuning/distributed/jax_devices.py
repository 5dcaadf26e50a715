"""``JaxDevices``: the devices of a ``keras.distribution``."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.share import Share
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.padding import (
    in_parts,
    is_even,
    multiple_of,
    padded,
    unchanged,
)

#: What is in the message of an error because another process has ended.
_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|heartbeat|Connection (closed|reset|refused)")


class JaxDevices(Devices):
    """The devices of a ``keras.distribution``, which need equal parts of each batch.

    It may span several processes, each of which has the data of its own devices.
    """

    def __init__(self, distribution: Any) -> None:
        self.distribution = distribution
        mesh = distribution.device_mesh
        self.replicas = int(
            mesh.shape[list(mesh.axis_names).index(distribution.batch_dim_name)]
        )
        self.divides_validation = True
        self.workers, self.share = distribution.num_processes, None
        if self.workers > 1:
            import jax

            self.worker = jax.process_index()
            self.share = _share(mesh, self.worker)

    def __str__(self) -> str:
        if self.workers == 1:
            return super().__str__()
        return (
            f"{super().__str__()} of {self.workers} processes; this is process {self.worker}, "
            "and process 0 writes and reports"
        )

    def scope(self) -> contextlib.AbstractContextManager[Any]:
        scope: contextlib.AbstractContextManager[Any] = self.distribution.scope()
        return scope

    def check(self, backend: Backend) -> None:
        if self.workers == 1:
            return
        kind = type(self.distribution).__name__
        if not isinstance(self.distribution, backend.keras.distribution.DataParallel):
            raise ValueError(
                f"Received a {kind} over {self.workers} processes; expected a DataParallel, "
                "whose process 0 has all weights to write. Call fit of the model instead."
            )
        if self.share is None:
            raise ValueError(
                f"Received a {kind} in which the devices of process {self.worker} do not "
                "follow one another; expected the order of keras.distribution.list_devices()."
            )
        if not getattr(self.distribution, "auto_shard_dataset", False):
            raise ValueError(
                f"Received a {kind} with auto_shard_dataset=False; expected True. Pass the "
                "same batches in each process: finetune takes the share of the process."
                if hasattr(self.distribution, "auto_shard_dataset")
                else f"Received several processes with Keras {backend.keras.__version__}; "
                "expected a version whose keras.distribution has auto_shard_dataset. Update "
                "Keras."
            )

    def training(
        self,
        train: Any,
        first: int,
        class_weight: Mapping[int, float] | None,
        accumulate: int = 1,
    ) -> tuple[Any, Any]:
        size = self.replicas * accumulate
        if self.share is not None and isinstance(train, PictureBatches):
            share = dataclasses.replace(self.share, multiple=size)
            batches = padded(train.with_share(share).epochs(first), unchanged, class_weight)
            return in_parts(batches, accumulate), None
        batches = train.epochs(first) if hasattr(train, "epochs") else train
        if is_even(batches, size) and self.share is None:
            return super().training(batches, first, class_weight, accumulate)
        batches = padded(batches, multiple_of(size), class_weight, self.share)
        return in_parts(batches, accumulate), None

    def validation(self, validation: Any) -> Any:
        if isinstance(validation, PictureBatches):
            count = len(validation.picture_set)
            self.divides_validation = count % self.replicas == 0
            if self.divides_validation:
                validation = validation.with_share(self.share)
            return super().validation(validation)
        self.divides_validation = validation is None or is_even(validation, self.replicas)
        if self.share is None or validation is None or not self.divides_validation:
            return validation
        return padded(validation, self._padded_size, share=self.share)

    def callbacks(self, backend: Backend) -> list[Any]:
        if self.divides_validation:
            return []
        # A smaller batch cannot be divided, and padding would change the metrics, so each
        # device validates on all pictures.
        module = backend.keras.distribution
        whole = copy.copy(self.distribution)
        whole.get_data_layout = lambda shape: module.TensorLayout(
            [None] * len(shape), whole.device_mesh
        )
        return [
            backend.keras.callbacks.LambdaCallback(
                on_test_begin=lambda logs: module.set_distribution(whole),
                on_test_end=lambda logs: module.set_distribution(self.distribution),
            )
        ]

    def fit(self, model: Any, *args: Any, **options: Any) -> Any:
        if self.workers == 1:
            return super().fit(model, *args, **options)
        # The batches are divided already.
        self.distribution.auto_shard_dataset = False
        try:
            return super().fit(model, *args, **options)
        finally:
            self.distribution.auto_shard_dataset = True

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self.workers == 1 or not _LOST.search(str(error)):
                raise
            other = f"process {1 - self.worker}" if self.workers == 2 else "another process"
            raise RuntimeError(
                f"Process {self.worker} of {self.workers} cannot continue: {other} has ended "
                "or cannot be reached. Start all processes again with --resume (resume=True) "
                "to resume after the last complete epoch."
            ) from error

    def _gathered(self, numbers: np.ndarray) -> np.ndarray:
        from jax.experimental import multihost_utils

        rows: np.ndarray = multihost_utils.process_allgather(numbers)
        return rows

    def _padded_size(self, number: Any, n: Any, where: Any) -> Any:
        return -(-n // self.replicas) * self.replicas


def _share(mesh: Any, process: int) -> Share | None:
    """The share of a process; None if its devices do not follow one another."""
    owners = [device.process_index for device in mesh.backend_mesh.devices.flat]
    first, count = owners.index(process), owners.count(process)
    if owners[first : first + count] != [process] * count:
        return None
    return Share(len(owners), first, count)
