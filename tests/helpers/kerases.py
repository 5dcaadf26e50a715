"""The Keras under test, and what the tests need to write one test for both."""

import os

import numpy as np

LEGACY = os.environ.get("TF_USE_LEGACY_KERAS", "0") in ("1", "true", "True")

if LEGACY:
    import tf_keras as keras
else:
    import keras

#: The largest relative error of rounding a number to the compute dtype of a policy.
UNIT_ROUNDOFF = {"mixed_float16": 2**-11, "mixed_bfloat16": 2**-8}

BACKEND = "tensorflow" if LEGACY else keras.backend.backend()


def array(tensor) -> np.ndarray:
    """Any tensor or variable as NumPy."""
    if hasattr(tensor, "numpy") and BACKEND == "tensorflow":
        return np.asarray(tensor.numpy())
    if not LEGACY:
        return np.asarray(keras.ops.convert_to_numpy(tensor))
    return np.asarray(tensor)


def run(model_or_layer, x, **kwargs) -> np.ndarray:
    """Call on NumPy input, give NumPy output."""
    if not LEGACY:
        x = keras.ops.convert_to_tensor(x)
    return array(model_or_layer(x, **kwargs))


def values(variables) -> list[np.ndarray]:
    """Copies of the values of variables."""
    return [array(v).copy() for v in variables]


def ids(variables) -> set[int]:
    """Variables have no hash; their identities do."""
    return {id(v) for v in variables}


def normal(*shape, seed=0) -> np.ndarray:
    """Seeded normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def randomise(model, seed=0, size=0.3) -> None:
    """Give all factors B of a model (or layer) non-zero values."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name.partition(":")[0].endswith("kernel_lora_b"):
            variable.assign(rng.normal(size=tuple(variable.shape)).astype("float32") * size)


def sgd(rate=0.1):
    return keras.optimizers.SGD(rate)


def weights_file(path) -> str:
    return str(path / "model.weights.h5")
