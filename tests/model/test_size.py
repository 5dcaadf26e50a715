"""How much memory injection takes on an 86-million-parameter ViT."""

import math
import os

import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, keras


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def vit_base():
    if LEGACY:
        import tfimm

        return tfimm.create_model("vit_base_patch16_224")
    entry = keras.Input((32, 768))
    x = entry
    for i in range(12):
        y = keras.layers.LayerNormalization(name=f"norm1_{i}")(x)
        x = x + keras.layers.MultiHeadAttention(12, 64, name=f"attention_{i}")(y, y)
        y = keras.layers.LayerNormalization(name=f"norm2_{i}")(x)
        y = keras.layers.Dense(3072, "gelu", name=f"fc1_{i}")(y)
        x = x + keras.layers.Dense(768, name=f"fc2_{i}")(y)
    return keras.Model(entry, keras.layers.Dense(1000, name="head")(x[:, 0]))


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
@pytest.mark.skipif(BACKEND != "tensorflow", reason="once is enough")
def test_injection_copies_no_kernel():
    warm = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
    lora.inject_lora(warm)
    model = vit_base()
    variables = {id(v) for v in model.weights}
    parameters = model.count_params()
    assert parameters > 85e6
    before = resident_bytes()
    lora.inject_lora(model, lora_rank=8)
    added = resident_bytes() - before
    assert variables < {id(v) for v in model.weights}
    factors = sum(math.prod(v.shape) for v in model.trainable_weights)
    # The kernels take 340 MB and the factors about 5 MB. Python objects and the pages of
    # the allocator take the rest.
    assert added < 4 * factors + 30e6, f"{added / 1e6:.0f} MB for {4 * factors / 1e6:.0f} MB"
