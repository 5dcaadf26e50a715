"""A bank in several threads: predictions while adapters come, go and are replaced."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import tfimm_lora as lora
from tests.bank.test_bank import X, adapters_of, alone, small
from tests.helpers.banks import assert_rows
from tests.helpers.kerases import BACKEND, array
from tests.helpers.selection import NIGHTLY_ON_LEGACY

pytestmark = NIGHTLY_ON_LEGACY


def in_threads(*functions):
    """Run functions at once; the first error of any of them is raised."""
    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(function) for function in functions]:
            future.result(timeout=300)


@pytest.mark.backends
@pytest.mark.parametrize("capacity", [2, 64])
def test_every_prediction_is_right_while_others_load_and_remove(capacity, tmp_path):
    model = small()
    adapters = adapters_of(model, 6, lora_train_classifier=True)
    expected = alone(model, adapters)
    kept = {n: adapters[n] for n in ("a0", "a1", "a2")}
    bank = lora.AdapterBank(model, kept, capacity=capacity, overflow=tmp_path)
    bank.warm_up(X)
    stop = threading.Event()

    def predict(seed):
        def function():
            rng = np.random.default_rng(seed)
            for _ in range(30):
                names = [[*kept, None][i] for i in rng.integers(0, 4, 6)]
                assert_rows(bank.predict(X, names), names, expected)

        return function

    def change(name):
        def function():
            while not stop.is_set():
                bank.load(name, adapters[name])
                (row,) = bank.predict(X[:1], [name])
                np.testing.assert_allclose(row.logits, expected[name][0], atol=1e-5)
                bank.remove(name)

        return function

    def replace():
        # By itself, so that predictions stay right.
        while not stop.is_set():
            bank.load("a1", adapters["a1"])

    def all_predictions():
        try:
            in_threads(*map(predict, range(3)))
        finally:
            stop.set()

    in_threads(all_predictions, change("a3"), change("a4"), replace)
    assert bank.names == ("a0", "a1", "a2")
    bank.close()
    np.testing.assert_array_equal(array(model(X)), expected[None])


@pytest.mark.skipif(BACKEND == "jax", reason="what jax.jit gets is the state of its caller")
@pytest.mark.backends
def test_the_model_of_a_bank_while_others_load_and_remove():
    model = small()
    adapters = adapters_of(model, 4)
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, {n: adapters[n] for n in ("a0", "a1")})
    names = ["a0", "a1", None] * 2
    routed, inputs = bank.model, {"inputs": X, "adapter": bank.slots(names)}
    stop = threading.Event()

    def change():
        while not stop.is_set():
            bank.load("a2", adapters["a2"])
            bank.remove("a2")

    def use():
        try:
            for _ in range(30):
                given = array(routed(inputs))
                for i, name in enumerate(names):
                    np.testing.assert_allclose(given[i], expected[name][i], atol=1e-5)
        finally:
            stop.set()

    in_threads(use, change)


def test_closing_while_others_predict_ends_in_the_error_of_a_closed_bank():
    model = small()
    adapters = adapters_of(model, 2)
    expected = alone(model, adapters)
    bank = lora.AdapterBank(model, adapters)
    names = ["a0", "a1", None] * 2
    bank.warm_up(X)
    started = threading.Barrier(3)

    def predict():
        started.wait()
        with pytest.raises(ValueError, match="bank that is closed"):
            while True:
                assert_rows(bank.predict(X, names), names, expected)

    def load():
        started.wait()
        with pytest.raises(ValueError, match="bank that is closed"):
            while True:
                bank.load("a0", adapters["a0"])

    def close():
        started.wait()
        bank.predict(X, names)
        bank.close()

    in_threads(predict, load, close)
    np.testing.assert_array_equal(array(model(X)), expected[None])
