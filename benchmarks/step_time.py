"""Time of a training step and of a forward pass, as ratios measured side by side.

    TF_USE_LEGACY_KERAS=1 python benchmarks/step_time.py [--quick] [--out FILE.json]

Step over the floor: the floor is the same model with everything frozen but one bias at its
bottom, so that gradients flow all the way and nothing else is paid for. Forward over the plain
model. The kinds are interleaved; medians and quartiles of the ratios within a round.
"""

import argparse
import json
import statistics
import time

import numpy as np

import tfimm_lora as lora

import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras
import tfimm  # isort: skip


def bottom_bias(model):
    """The bias of the first convolution: the lowest variable there is."""
    for layer in model._flatten_layers():
        if isinstance(layer, tf.keras.layers.Conv2D):
            return layer.bias
    raise ValueError("no convolution")


def training_step(model, variables, images, labels):
    optimizer = tf.keras.optimizers.SGD(1e-3)

    @tf.function
    def step():
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            logits = model(images, training=True)
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    return step


def forward(model, images):
    @tf.function
    def step():
        return model(images, training=False)

    return step


def measure(kinds, rounds):
    """Seconds of each kind in each round; the first call of each, which traces, is not
    counted."""
    for function in kinds.values():
        function()
        function()
    seconds = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, function in kinds.items():
            start = time.perf_counter()
            result = function()
            if result is not None:
                result.numpy()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds, reference):
    """Median and quartiles of each kind over the reference of the same round."""
    table = {}
    for name, times in seconds.items():
        values = [t / r for t, r in zip(times, seconds[reference], strict=True)]
        low, median, high = statistics.quantiles(values, n=4)
        table[name] = {"median": median, "low": low, "high": high}
    return table


def benchmark(name, batch, rank, rounds, **kwargs):
    plain = tfimm.create_model(name, **kwargs)
    adapted = lora.convert_to_lora_model(plain, lora_rank=rank)
    merged = lora.merge_lora_weights(lora.convert_to_lora_model(plain, lora_rank=rank))
    images = tf.random.normal((batch, *plain.cfg.input_size, plain.cfg.in_channels))
    labels = tf.constant(np.arange(batch) % plain.cfg.nb_classes)
    steps = {
        "floor": training_step(plain, [bottom_bias(plain)], images, labels),
        "lora": training_step(adapted, adapted.trainable_weights, images, labels),
        "full": training_step(plain, plain.trainable_weights, images, labels),
    }
    forwards = {
        "plain": forward(plain, images),
        "lora": forward(adapted, images),
        "merged": forward(merged, images),
    }
    return {
        "step": ratios(measure(steps, rounds), "floor"),
        "forward": ratios(measure(forwards, rounds), "plain"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one tiny model, few rounds")
    parser.add_argument(
        "--models", nargs="*", default=["vit_tiny_patch16_224", "convnext_tiny"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="write the table as JSON")
    args = parser.parse_args()
    results = {}
    for name in args.models[:1] if args.quick else args.models:
        small = dict(input_size=(32, 32), nb_blocks=1) if args.quick else {}
        rounds = 4 if args.quick else args.rounds
        results[name] = benchmark(name, args.batch, args.rank, rounds, **small)
        print(f"{name}: batch {args.batch}, rank {args.rank}, {rounds} rounds")
        for kind, table in results[name].items():
            for row, r in table.items():
                print(
                    f"  {kind:8} {row:8} {r['median']:.3f}  ({r['low']:.3f} to {r['high']:.3f})"
                )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
