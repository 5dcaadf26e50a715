"""What a result depends on besides its settings: versions, Keras and the device."""

import importlib.metadata
import platform

from tfimm_lora.backend import uses_legacy_keras

_PACKAGES = (
    *("tfimm-lora", "tensorflow", "tf-keras", "tfimm", "keras", "keras-hub", "jax", "torch"),
    *("numpy", "pillow"),
)


def environment():
    """Describe this machine, without names that identify it."""
    framework = _framework()
    return {
        "python": platform.python_version(),
        "versions": {name: v for name in _PACKAGES if (v := _version(name))},
        "keras": "legacy" if uses_legacy_keras() else "3",
        "framework": framework,
        "device": _device(framework),
    }


def _framework():
    if uses_legacy_keras():
        return "tensorflow"
    import keras

    return keras.backend.backend()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(framework):
    """The name of the GPU that the framework uses, or "CPU"."""
    if framework == "jax":
        import jax

        device = jax.devices()[0]
        return "CPU" if device.platform == "cpu" else device.device_kind
    if framework == "torch":
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "CPU"
    return tf.config.experimental.get_device_details(gpus[0]).get("device_name", "GPU")
