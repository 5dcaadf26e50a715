"""Adapt a small image model to pictures of another kind, with LoRA: run ``make demo``.

A ConvNeXt of tfimm learns handwritten digits (the source domain). Then the pictures change:
they are rotated, inverted and noisy (the target domain). The model is adapted in four ways:
not at all, its classifier only, with LoRA, and as a whole. LoRA should come within one
point of training everything, with under a tenth of the parameters.

After that the LoRA model is merged, made an ordinary tfimm model and saved; another process,
without tfimm_lora, loads it and must make identical predictions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import tfimm_lora as lora  # before TensorFlow: it chooses the Keras that tfimm needs

# isort: split
import numpy as np
import tensorflow as tf
from _data import Domain, load_domains
from _report import Result, console, draw, print_table, progress_bar
from tfimm.architectures.convnext import ConvNeXt, ConvNeXtConfig

HERE = Path(__file__).resolve().parent

EPOCHS, QUICK_EPOCHS = 25, 2  # the same for the source and for every way of adapting
BATCH = 32
TRAIN_NOISE = 0.3  # fresh in every epoch; without it the few pictures are learnt by heart

# Each way has the rate that suits it. LoRA takes a larger one than training everything.
SOURCE_RATE = 3e-3
CLASSIFIER_RATE = 5e-2
LORA_RATE = 1.4e-2
EVERYTHING_RATE = 3e-3

LORA = {
    "lora_rank": 8,
    # The default for ConvNeXt is the two layers of each MLP. Turned pictures also need
    # other filters, hence the convolutions as well.
    "lora_targets": ["stem/0", "conv_dw", "mlp/fc1", "mlp/fc2"],
    "lora_train_classifier": True,
}

# The promises of this demo.
MAX_POINTS_BEHIND = 1.0
MAX_SHARE = 0.10
MAX_LOGIT_DIFFERENCE = 1e-6


def create_model() -> ConvNeXt:
    """A new ConvNeXt for 8x8 pictures: 4x4 patches of 2x2 pixels, two blocks."""
    model = ConvNeXt(
        ConvNeXtConfig(
            name="digits_convnext",
            url="",
            nb_classes=10,
            in_channels=1,
            input_size=(8, 8),
            patch_size=2,
            embed_dim=(128,),
            nb_blocks=(2,),
            drop_path_rate=0.0,
            init_scale=1.0,  # tfimm's 1e-6 is for networks of many blocks
        )
    )
    model(model.dummy_inputs)  # creates the weights
    return model


def copy_of(model: ConvNeXt) -> ConvNeXt:
    """Another model with the same weights."""
    copy = create_model()
    lora.transfer_weights(model, copy)
    return copy


def train(
    label: str,
    model: tf.keras.Model,
    variables: list[tf.Variable],
    rate: float,
    epochs: int,
    data: Domain,
    seed: int,
) -> float:
    """Train these variables and no others; return the seconds that it took.

    This is the one training loop of the demo. With the same seed, every way sees the same
    pictures in the same order.
    """
    start = time.perf_counter()
    steps = len(data.train_x) // BATCH
    schedule = tf.keras.optimizers.schedules.CosineDecay(rate, epochs * steps)
    optimizer = tf.keras.optimizers.Adam(schedule, jit_compile=False)
    optimizer.build(variables)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x, training=True))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return loss

    rng = np.random.default_rng(seed)
    with progress_bar() as bar:
        task = bar.add_task(label, total=epochs, loss=float("nan"))
        for _ in range(epochs):
            order = rng.permutation(len(data.train_x))[: steps * BATCH]
            noise = rng.normal(0.0, TRAIN_NOISE, data.train_x.shape).astype("float32")
            losses = [
                step(tf.constant(data.train_x[b] + noise[b]), tf.constant(data.train_y[b]))
                for b in order.reshape(steps, BATCH)
            ]
            bar.update(task, advance=1, loss=float(np.mean(losses)))
    return time.perf_counter() - start


def logits_of(model: tf.keras.Model, pictures: np.ndarray) -> np.ndarray:
    """The outputs of a model, shape (n, 10)."""
    return model(pictures, training=False).numpy()


def accuracy(model: tf.keras.Model, data: Domain) -> float:
    """Per cent of the held-out pictures that a model gets right."""
    return 100.0 * float(np.mean(logits_of(model, data.test_x).argmax(-1) == data.test_y))


def adapt_four_ways(
    source_model: ConvNeXt, target: Domain, epochs: int, seed: int
) -> tuple[list[Result], tf.keras.Model]:
    """Adapt the source model to the target domain; return the results and the LoRA model."""
    classifier_model = copy_of(source_model)
    everything_model = copy_of(source_model)
    # This is all that LoRA takes. The source model stays as it is.
    lora_model = lora.convert_to_lora_model(source_model, **LORA)

    ways = [
        ("not at all", source_model, [], 0.0),
        (
            "classifier only",
            classifier_model,
            classifier_model.fc.trainable_weights,
            CLASSIFIER_RATE,
        ),
        # A LoRA model itself says what is trained: here the factors and the classifier.
        ("LoRA", lora_model, lora_model.trainable_weights, LORA_RATE),
        (
            "everything",
            everything_model,
            everything_model.trainable_weights,
            EVERYTHING_RATE,
        ),
    ]
    frozen = [w.numpy() for w in lora_model.non_trainable_weights]
    results = []
    for way, model, variables, rate in ways:
        seconds = 0.0
        if variables:
            seconds = train(way, model, variables, rate, epochs, target, seed)
        trained = sum(int(np.prod(v.shape)) for v in variables)
        results.append(
            Result(
                way=way,
                accuracy=accuracy(model, target),
                trained=trained,
                share=trained / source_model.count_params(),
                seconds=seconds,
                predictions=logits_of(model, target.test_x).argmax(-1),
            )
        )
    for before, after in zip(frozen, lora_model.non_trainable_weights):
        if not np.array_equal(before, after.numpy()):
            raise RuntimeError(f"LoRA training changed the frozen weight {after.name}.")
    return results, lora_model


def export(lora_model: tf.keras.Model, pictures: np.ndarray, out: Path) -> bool:
    """Merge, convert, save and load elsewhere; return whether predictions stay the same."""
    unmerged = logits_of(lora_model, pictures)

    lora.merge_lora_weights(lora_model)  # kernel + A B, in place
    merged = logits_of(lora_model, pictures)

    regular_model = lora.convert_to_regular_model(lora_model)  # an ordinary ConvNeXt
    regular = logits_of(regular_model, pictures)

    regular_model.save(out / "model.keras")
    np.save(out / "pictures.npy", pictures)
    fresh_class = predict_in_fresh_process(out)
    fresh = np.load(out / "logits.npy")

    console.print(f"Loaded without tfimm_lora as [bold]{fresh_class}[/].")
    same = [
        compare("LoRA, merged", unmerged, merged, 1e-3),  # another order of float sums
        compare("merged, regular model", merged, regular, MAX_LOGIT_DIFFERENCE),
        compare("regular model, fresh process", regular, fresh, MAX_LOGIT_DIFFERENCE),
    ]
    return all(same)


def predict_in_fresh_process(out: Path) -> str:
    """Predict with the saved model in a process without tfimm_lora; return its class."""
    files = [out / "model.keras", out / "pictures.npy", out / "logits.npy"]
    files[-1].unlink(missing_ok=True)  # never compare with those of an earlier run
    child = subprocess.run(
        [sys.executable, HERE / "_fresh.py", *files],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return child.stdout.split()[-1]


def compare(names: str, first: np.ndarray, second: np.ndarray, tolerance: float) -> bool:
    """Print and return whether two models predict the same, their logits within a tolerance."""
    difference = float(np.abs(first - second).max())
    moved = int(np.sum(first.argmax(-1) != second.argmax(-1)))
    ok = difference <= tolerance and moved == 0
    amount = "logits exactly equal" if difference == 0 else f"logits within {difference:.1e}"
    verdict = "[green]identical predictions[/]" if ok else "[bold red]DIFFERENT[/]"
    console.print(f"  {names:<30} {verdict}, {amount}, {moved} of {len(first)} changed")
    return ok


def promise_kept(results: list[Result]) -> bool:
    """Print and return whether LoRA is as good and as small as promised."""
    by_way = {r.way: r for r in results}
    adapted, everything = by_way["LoRA"], by_way["everything"]
    behind = everything.accuracy - adapted.accuracy
    ok = behind <= MAX_POINTS_BEHIND and adapted.share < MAX_SHARE
    word = "behind" if behind >= 0 else "ahead of"
    console.print(
        f"LoRA is {abs(behind):.1f} points {word} training everything, with "
        f"{adapted.share:.1%} of the parameters: "
        + ("[green]as promised[/]." if ok else "[bold red]NOT as promised[/].")
    )
    return ok


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / ".demo", help="for files")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    parser.add_argument(
        "--quick", action="store_true", help="a short run that does not judge the accuracy"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; return 0 if all that it promises holds, else 1."""
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    epochs = QUICK_EPOCHS if args.quick else EPOCHS
    tf.keras.utils.set_random_seed(args.seed)

    source, target = load_domains(args.seed)
    console.rule("1. Train on the digits as they are")
    model = create_model()
    train("source", model, model.trainable_weights, SOURCE_RATE, epochs, source, args.seed)
    console.print(
        f"Held-out digits: {accuracy(model, source):.1f} % right. Rotated, inverted and "
        f"noisy: {accuracy(model, target):.1f} %."
    )

    console.rule("2. Adapt to the rotated, inverted, noisy digits")
    results, lora_model = adapt_four_ways(model, target, epochs, args.seed)

    console.rule("3. Merge, convert, save, load without tfimm_lora")
    same = export(lora_model, target.test_x, args.out)

    console.rule("Result")
    print_table(results, len(target.test_y))
    kept = args.quick or promise_kept(results)
    console.print(f"Identical predictions in a fresh process: {'yes' if same else 'NO'}")
    picture = draw(results, source, target, args.out / "report.png")
    console.print(f"Picture: {os.path.relpath(picture)}", soft_wrap=True)
    return 0 if kept and same else 1


if __name__ == "__main__":
    sys.exit(main())
