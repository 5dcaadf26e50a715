"""``devices_of``: the devices that a model was created for."""

from __future__ import annotations

from typing import Any

from tfimm_lora.backend import backend_of, legacy_backend
from tfimm_lora.backend.interface import Backend
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.jax_devices import JaxDevices
from tfimm_lora.finetuning.distributed.tensorflow_devices import TensorFlowDevices


def devices_of(model: Any) -> Devices:
    """The devices that a model was created for.

    Raises:
        ValueError: if the model was created with a ``keras.distribution`` that is not set now.

    Example:
        >>> import tensorflow as tf
        >>> from tfimm_lora.finetuning.distributed.current import devices_of
        >>> model = tf.keras.Sequential([tf.keras.Input((4,)), tf.keras.layers.Dense(3)])
        >>> devices_of(model).replicas
        1
    """
    backend = backend_of(model)
    with backend.variable_scope(model.weights[0]):
        found = current_devices(backend)
    copies = backend.copies(model.weights[0])
    if copies > 1 and not isinstance(found, JaxDevices):
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
