"""Convolutions with one group per channel, with and without TensorFlow's depthwise routine.

    TF_USE_LEGACY_KERAS=0 python benchmarks/depthwise.py [--quick] [--rounds 5]

Prints a JSON object in each line, for keras.applications' ConvNeXtTiny and for frozen Conv2D
layers of several sizes: the median time with the routine and without it in ms, and the median
of the ratios within a round, forward and for a training step (of a layer: with the gradient of
its input). Both take turns in every round.
"""

import argparse
import json
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "0")

import keras
import keras_models
import tensorflow as tf

import tfimm_lora as lora
from tfimm_lora.backend.interface import Backend

#: Size of the picture, channels, filters per channel, window, stride, dilation, dtype.
LAYERS = [
    (56, 96, 1, 7, 1, 1, "float32"),
    (14, 384, 1, 7, 1, 1, "float32"),
    (7, 768, 1, 7, 1, 1, "float32"),
    (56, 4, 1, 7, 1, 1, "float32"),
    (56, 3, 8, 7, 1, 1, "float32"),
    (112, 32, 1, 3, 1, 1, "float32"),
    (112, 32, 1, 3, 2, 1, "float32"),
    (14, 384, 1, 3, 1, 1, "float32"),
    (28, 32, 1, 3, 1, 2, "float32"),
    (28, 32, 2, 3, 1, 1, "float32"),
    (112, 3, 32, 3, 1, 1, "float32"),
    (56, 4, 1, 3, 1, 1, "float32"),
    (8, 8, 1, 3, 1, 1, "float32"),
    (8, 2, 1, 3, 1, 1, "float32"),
    (56, 96, 1, 7, 1, 1, "mixed_bfloat16"),
    (56, 96, 1, 7, 1, 1, "mixed_float16"),
    (14, 384, 1, 3, 1, 1, "mixed_bfloat16"),
    (56, 4, 1, 3, 1, 1, "mixed_bfloat16"),
]
BATCH = 4
#: What is shorter is repeated, in seconds.
SHORT = 0.05


def layer(size, channels, multiplier, window, stride, dilation, dtype):
    """The forward pass and the gradient step of one frozen layer."""
    conv = keras.layers.Conv2D(
        channels * multiplier,
        window,
        strides=stride,
        dilation_rate=dilation,
        padding="same",
        groups=channels,
        dtype=dtype,
    )
    head = keras.layers.Dense(1, name="head")
    net = keras.Sequential([keras.Input((size, size, channels)), conv, head])
    lora.inject_lora(net, lora_rank=1, lora_targets=["head"])
    images = tf.random.normal((BATCH, size, size, channels))

    def step():
        with tf.GradientTape() as tape:
            tape.watch(images)
            y = conv(images)
        return tape.gradient(y, images, y)

    return {"forward": lambda: conv(images), "step": step}


def convnext(small):
    """The forward pass and the training step of ConvNeXtTiny with LoRA."""
    net, adapted = keras_models.build("ConvNeXtTiny", small)
    lora.inject_lora(net, lora_rank=8, lora_targets=adapted)
    images = tf.random.normal((BATCH, *net.input_shape[1:]))
    variables = net.trainable_variables
    values = [v.value for v in variables]
    optimizer = keras.optimizers.Adam(1e-4)
    optimizer.build(variables)

    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = tf.reduce_mean(tf.math.square(net(images, training=True)))
        optimizer.apply(tape.gradient(loss, values), variables)
        return loss

    return {"forward": lambda: net(images, training=False), "step": step}


def compare(functions, rounds):
    """Medians with and without the routine, and the ratio, of each function."""
    results = {}
    for name, function in functions.items():
        traced = [_traced(function, routine) for routine in (True, False)]
        seconds = [[_seconds(f) for f in traced] for _ in range(rounds)]
        with_routine, without = (statistics.median(x) for x in zip(*seconds))
        results[name] = {
            "with ms": round(1e3 * with_routine, 3),
            "without ms": round(1e3 * without, 3),
            "ratio": round(statistics.median(a / b for a, b in seconds), 3),
        }
    return results


def _traced(function, routine):
    """A compiled function, traced with the routine or as if there were a GPU."""
    on_cpu = Backend.is_tensorflow_on_cpu
    if not routine:
        Backend.is_tensorflow_on_cpu = lambda self: False
    try:
        compiled = tf.function(function).get_concrete_function()
    finally:
        Backend.is_tensorflow_on_cpu = on_cpu
    compiled()
    return compiled


def _seconds(function):
    """The time of one call."""
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SHORT:
        function().numpy()
        calls += 1
    return passed / calls


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small pictures, no layers")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(json.dumps({"ConvNeXtTiny": compare(convnext(args.quick), args.rounds)}), flush=True)
    for size in [] if args.quick else LAYERS:
        name = " ".join(map(str, size))
        print(json.dumps({name: compare(layer(*size), args.rounds)}), flush=True)


if __name__ == "__main__":
    main()
