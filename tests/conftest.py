"""Which Keras runs, seeds, and a clean global state after each test."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "0")
# Compiling takes longer than running, and XLA's optimizations are not what is tested.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, keras
from tests.helpers.selection import mark_slow_tests

assert lora is not None


def pytest_report_header():
    kind = "legacy Keras" if LEGACY else f"Keras {keras.__version__}, {keras.backend.backend()}"
    return f"keras: {kind}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    # --lf collects the failed tests of a file only.
    whole_files = not any("::" in str(argument) for argument in config.args)
    mark_slow_tests(items, whole_files and not config.getoption("lf", False))


#: Keras 3 collects garbage in clear_session. A full collection over TensorFlow's modules and
#: all traced functions takes about a second, more than most tests; once per module is enough.
CLEAR = {} if LEGACY else {"free_memory": False}


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before."""
    np.random.seed(0)
    keras.utils.set_random_seed(0)
    yield
    keras.backend.clear_session(**CLEAR)


@pytest.fixture(autouse=True, scope="session")
def uncompiled():
    """Let ``fit`` run TensorFlow's graphs, which XLA takes longer to compile than to run.

    Some versions of Keras 3 choose XLA themselves. Tests of training under XLA ask for it.
    """
    if LEGACY or keras.backend.backend() != "tensorflow":
        yield
        return
    from keras.src.trainers import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "model_supports_jit", lambda model: False)
        yield


@pytest.fixture(autouse=True, scope="module")
def collected():
    """Free the models and graphs of a module when it ends."""
    yield
    gc.collect()


@pytest.fixture
def policy():
    """Set a global dtype policy for one test."""
    config = keras.mixed_precision
    read = getattr(config, "global_policy", None) or config.dtype_policy
    write = getattr(config, "set_global_policy", None) or config.set_dtype_policy
    before = read()
    yield write
    write(before)
