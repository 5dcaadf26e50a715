"""Training steps with LoRA on TensorFlow, with and without compiled frozen layers.

    TF_USE_LEGACY_KERAS=1 python benchmarks/compiled_layers.py [--quick] [--rounds 12]

With TF_USE_LEGACY_KERAS=0 the models are those of Keras 3 instead of tfimm's.

Prints the processor, and a JSON object for each model: the median time of a step in ms with
compiled layers (``lora.use_compiled_layers``) and without, the median of the ratios within a
round, and the seconds of the first step, which traces and compiles. Both take turns in every
round.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tfimm_lora as lora  # isort: skip - chooses the Keras
import tensorflow as tf

LEGACY = os.environ["TF_USE_LEGACY_KERAS"] == "1"
if LEGACY:
    import tf_keras as keras
else:
    import keras

#: The pictures in a batch, of tfimm's models and of those of Keras 3.
TFIMM = {
    "vit_tiny_patch16_224": 8,
    "convnext_tiny": 4,
    "swin_tiny_patch4_window7_224": 4,
    "efficientnet_b0": 8,
    "vit_base_patch16_224": 4,
}
KERAS3 = {"vit_tiny": 8, "ConvNeXtTiny": 4, "EfficientNetB0": 8, "vit_base": 4}
QUICK = ("vit_tiny_patch16_224", "vit_tiny")


def lora_model(name):
    if LEGACY:
        return lora.create_model(name, lora_rank=4)
    import keras_models

    model, targets = keras_models.build(name, small=False)
    return lora.inject_lora(model, lora_rank=4, lora_targets=targets)


def training_step(name, batch, enabled):
    """A training step of a new model, and the seconds that its first call took."""
    keras.utils.set_random_seed(0)
    model = lora_model(name)
    images, labels = tf.random.normal((batch, 224, 224, 3)), tf.zeros((batch,), tf.int32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.AdamW(1e-3)

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            value = loss(labels, tf.cast(model(images, training=True), tf.float32))
        gradients = tape.gradient(value, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    started = time.perf_counter()
    with lora.use_compiled_layers(enabled):
        step()
    return step, time.perf_counter() - started


def compared(name, batch, rounds):
    """The figures of a model."""
    steps, first, times = {}, {}, {True: [], False: []}
    for enabled in (False, True):
        steps[enabled], first[enabled] = training_step(name, batch, enabled)
    for _ in range(rounds):
        for enabled, step in steps.items():
            started = time.perf_counter()
            step()
            times[enabled].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times[True], times[False])]
    return {
        "model": name,
        "batch": batch,
        "compiled_ms": round(1000 * statistics.median(times[True]), 1),
        "plain_ms": round(1000 * statistics.median(times[False]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        "first_step_s": [round(first[True], 1), round(first[False], 1)],
    }


def processor():
    """The model of the processor, as Linux reports it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one model, two rounds")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--policy", default="float32")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    keras.mixed_precision.set_global_policy(args.policy)
    version = f"Keras {keras.__version__}"
    print(json.dumps({"processor": processor(), "policy": args.policy, "keras": version}))
    for name, batch in (TFIMM if LEGACY else KERAS3).items():
        if not args.quick or name in QUICK:
            batch, rounds = (2, 2) if args.quick else (batch, args.rounds)
            print(json.dumps(compared(name, batch, rounds)), flush=True)


if __name__ == "__main__":
    main()
