"""After ``warm_up`` no batch needs a new trace."""

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, keras, normal

pytestmark = pytest.mark.backends


class Counting(keras.layers.Layer):
    """Counts its calls in Python, which are those of traces."""

    calls = 0

    def call(self, x):
        Counting.calls += 1
        return x


def make_model():
    return keras.Sequential(
        [
            keras.layers.Input((4,)),
            keras.layers.Dense(8, name="fc1"),
            Counting(),
            keras.layers.Dense(3, name="head"),
        ]
    )


def test_no_batch_is_traced_after_the_warm_up():
    if not LEGACY and keras.backend.backend() == "torch":
        pytest.skip("torch runs without traces")
    options = {"plain": {}, "dora": {"lora_use_dora": True}}
    adapters = {
        name: lora.adapter_of(lora.inject_lora(make_model(), lora_rank=2, **given))
        for name, given in options.items()
    }
    bank = lora.AdapterBank(make_model(), adapters)
    bank.warm_up(np.zeros((12, 4), "float32"))
    before = Counting.calls
    for names in (
        ["plain"],
        [None, "plain", "dora"],
        ["dora"] * 3,
        ["plain"] * 9 + [None, "dora", "plain"],
        [None] * 12,
        [None, "plain"] * 3,
    ):
        rows = bank.predict(normal(len(names), 4), names)
        assert [row.adapter for row in rows] == names
    assert Counting.calls == before
