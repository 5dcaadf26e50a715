"""Mixed batches: batches of 32 in which every row has another adapter of rank 8.

    TF_USE_LEGACY_KERAS=1 python benchmarks/mixed_batches.py [--rounds 9] [--peft] [MODEL ...]

Prints a JSON object for each model (of tfimm): the throughput of a bank relative to that of the
plain model's compiled forward pass, as the median of the ratios within a round (all contenders
take turns), with 10, 100 and 1,000 adapters in use, with one adapter for all rows, and
with ten merged models, each of which gets the rows of its adapter. Also the memory of a
slot relative to the factors and classifier of an adapter, and the time to load and to remove
one in ms. ``--peft`` adds PEFT's mixed batches (10
adapters) on timm's model, relative to timm's own forward pass, in the same process.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import numpy as np
import tensorflow as tf
import tfimm

import tfimm_lora as lora

BATCH, RANK, CLASSES, COUNTS = 32, 8, 10, (10, 100, 1000)
#: The layers that PEFT adapts, as the default targets of tfimm_lora do.
PEFT_TARGETS = {
    "vit_tiny_patch16_224": ["qkv", "proj", "fc1", "fc2"],
    "efficientnet_b0": ["conv_pw", "conv_pwl", "conv_head"],
}


def adapter_of(name):
    """An adapter with values that are not zero, and the model that it is of."""
    model = tfimm.create_model(name, nb_classes=CLASSES)
    lora.inject_lora(model, lora_rank=RANK, lora_train_classifier=True)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign(0.02 * rng.normal(size=variable.shape).astype("float32"))
    return lora.adapter_of(model), model


def compiled(model):
    """The forward pass, compiled for batches of any size."""
    shape = (None, *model.cfg.input_size, model.cfg.in_channels)

    def forward(x):
        return model(x, training=False)

    return tf.function(forward, input_signature=[tf.TensorSpec(shape)])


def names_of(count):
    """The adapters of a batch: as many different ones as there are."""
    return [f"a{(i * max(1, count // BATCH)) % count}" for i in range(BATCH)]


def times_of(contenders, rounds):
    """Contender -> its times; in each round all take turns."""
    times = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def throughput(times, of, over):
    """The median of the ratios within a round."""
    ratios = [b / a for a, b in zip(times[of], times[over])]
    return round(statistics.median(ratios), 3)


def measured(name, rounds):
    """The figures of one model."""
    adapter, tuned = adapter_of(name)
    plain = tfimm.create_model(name, nb_classes=CLASSES)
    x = np.random.default_rng(0).normal(size=(BATCH, *plain.cfg.input_size, 3))
    x = x.astype("float32")
    forward = compiled(plain)
    lora.merge_lora_weights(tuned)
    merged = [compiled(tuned) for _ in range(10)]
    base = tfimm.create_model(name, nb_classes=CLASSES)
    bank = lora.AdapterBank(base, {"a0": adapter}, capacity=max(COUNTS))
    bank.predict(x, ["a0", None] * (BATCH // 2))

    loads, removals = [], []
    for i in range(1, max(COUNTS)):
        start = time.perf_counter()
        bank.load(f"a{i}", adapter)
        loads.append(time.perf_counter() - start)
    for i in range(50):
        start = time.perf_counter()
        bank.remove(f"a{i}")
        removals.append(time.perf_counter() - start)
        bank.load(f"a{i}", adapter)

    def ten_models():
        return [model(x[i::10]).numpy() for i, model in enumerate(merged)]

    contenders = {"plain": lambda: forward(x).numpy(), "ten merged": ten_models}
    contenders["one adapter"] = lambda: bank.predict(x, ["a0"] * BATCH)
    for count in COUNTS:
        names = names_of(count)
        contenders[f"{count} adapters"] = lambda names=names: bank.predict(x, names)
    times = times_of(contenders, rounds)
    own = sum(
        value.size for update in adapter.layers.values() for value in (update.a, update.b)
    )
    own += sum(value.size for value in adapter.weights.values())
    return {
        "model": name,
        "plain_ms": round(1e3 * statistics.median(times["plain"]), 1),
        "throughput": {n: throughput(times, n, "plain") for n in contenders if n != "plain"},
        "slot_over_adapter": round(bank.packed("a0").size / own, 3),
        "adapter_mb": round(4e-6 * own, 3),
        "load_ms": round(1e3 * statistics.median(loads), 2),
        "remove_ms": round(1e3 * statistics.median(removals), 3),
    }


def measured_with_peft(name, rounds):
    """PEFT's mixed batches of ten adapters on timm's model."""
    import torchvision_schemas

    torchvision_schemas.define()
    import peft
    import timm
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    plain = timm.create_model(name, num_classes=CLASSES).eval()
    config = peft.LoraConfig(r=RANK, target_modules=PEFT_TARGETS[name], init_lora_weights=False)
    net = peft.get_peft_model(timm.create_model(name, num_classes=CLASSES), config, "a0").eval()
    for i in range(1, 10):
        net.add_adapter(f"a{i}", config)
    x = torch.randn(BATCH, 3, 224, 224)
    names = [f"a{i % 10}" for i in range(BATCH)]

    def mixed():
        with torch.inference_mode():
            return net(x, adapter_names=names)

    def alone():
        with torch.inference_mode():
            return plain(x)

    try:
        times = times_of({"plain": alone, "mixed": mixed}, rounds)
    except Exception as error:  # noqa: BLE001 - PEFT refuses some layers
        return {"model": name, "peft": f"{type(error).__name__}: {error}"}
    return {"model": name, "peft": throughput(times, "mixed", "plain")}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=list(PEFT_TARGETS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peft", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.models:
        print(json.dumps(measured(name, arguments.rounds)), flush=True)
        if arguments.peft:
            print(json.dumps(measured_with_peft(name, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
