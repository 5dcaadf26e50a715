"""Training steps with and without gradient checkpointing.

    TF_USE_LEGACY_KERAS=1 python benchmarks/checkpointing.py [--quick] [--rounds 8]

Prints a JSON object for each model: the median of the ratios of the time of a step within a
round, and the ratio of the peak memory of a step, in new processes, beyond the memory before
the first step. With TF_USE_LEGACY_KERAS=0 the model is the ViT-B of keras_hub on the backend
that KERAS_BACKEND says, instead of models of tfimm.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import numpy as np

import tfimm_lora as lora  # isort: skip - chooses the Keras

LEGACY = os.environ["TF_USE_LEGACY_KERAS"] == "1"
if LEGACY:
    import tf_keras as keras
else:
    import keras

MODELS = ("vit_base_patch16_224", "convnext_tiny") if LEGACY else ("ViT-B of keras_hub",)


def lora_model(name):
    if LEGACY:
        return lora.create_model(name, lora_rank=8)
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(224, 224, 3),
        patch_size=16,
        num_layers=12,
        num_heads=12,
        hidden_dim=768,
        mlp_dim=3072,
    )
    pictures = keras.Input((224, 224, 3))
    tokens = keras.layers.GlobalAveragePooling1D()(backbone(pictures))
    model = keras.Model(pictures, keras.layers.Dense(10, name="head")(tokens))
    return lora.inject_lora(model, lora_rank=8, lora_targets="all")


def training_step(name, enabled, batch):
    keras.utils.set_random_seed(0)
    model = lora_model(name)
    if enabled:
        lora.enable_gradient_checkpointing(model)
    x, y = np.random.rand(batch, 224, 224, 3).astype("float32"), np.zeros(batch, "int32")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return lambda: model.train_on_batch(x, y)


def peak_memory(name, enabled, batch):
    """The peak memory of two steps in MB, in this process, which must be a new one."""
    step = training_step(name, enabled, batch)
    status = Path("/proc/self/status").read_text()
    before = int(status.split("VmRSS:")[1].split()[0])
    step(), step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_new_process(name, enabled, batch):
    words = [sys.executable, __file__, "--memory", name, str(int(enabled)), str(batch)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def compared(name, batch, rounds, memory):
    steps = [training_step(name, enabled, batch) for enabled in (False, True)]
    ratios = []
    for number in range(rounds + 1):
        times = []
        for step in steps:
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        if number:  # the first round traces
            ratios.append(times[1] / times[0])
    return {
        "model": name,
        "batch": batch,
        "memory_mb": [round(m) for m in memory],
        "memory": round(memory[1] / memory[0], 2),
        "time": round(statistics.median(ratios), 2),
        "times": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches, two rounds")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        name, enabled, batch = args.memory
        print(peak_memory(name, bool(int(enabled)), int(batch)))
        return
    batch, rounds = (1, 2) if args.quick else (8, args.rounds)
    # First, because the peak of a new process includes the memory of the one that starts it.
    memory = {n: [in_new_process(n, enabled, batch) for enabled in (0, 1)] for n in MODELS}
    for name in MODELS:
        print(json.dumps(compared(name, batch, rounds, memory[name])), flush=True)


if __name__ == "__main__":
    main()
