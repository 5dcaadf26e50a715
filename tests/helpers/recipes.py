"""Small recipes of ``finetune``, and what their runs learned."""

import numpy as np

import tfimm_lora as lora
from tests.helpers.kerases import keras
from tests.helpers.picture_folders import write_digits
from tfimm_lora.finetuning.recipe import Recipe


def make_folder(root):
    """Write a small model and pictures into a folder."""
    save_model(root / "model.keras")
    write_digits(root / "digits", labels=range(3), each=12, size=16)
    return root


def save_model(path, classes=7, size=16):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((size, size, 3)),
            layers.Conv2D(8, 3, strides=2, activation="relu", name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(0.1, name="drop"),
            layers.Flatten(name="flatten"),
            layers.Dense(16, activation="relu", name="fc"),
            layers.Dense(classes, activation="softmax", name="head"),
        ]
    )
    model.save(path)
    return model


def recipe(folder, **options):
    settings = {
        "model": str(folder / "model.keras"),
        "data": str(folder / "digits"),
        "normalisation": "unit",
        "epochs": 3,
        "batch_size": 8,
        "learning_rate": 0.01,
        "augmentation": "light",
        "lora": {"lora_rank": 2, "lora_dropout": 0.1},
    }
    return Recipe.from_dict({**settings, **options})


def settings_of(folder):
    return [
        "finetune",
        *("--model", str(folder / "model.keras"), "--data", str(folder / "digits")),
        *("--normalisation", "unit", "--epochs", "3", "--batch-size", "8", "--lr", "0.01"),
        *("--rank", "2", "--lora", "dropout=0.1"),
    ]


def arguments(folder, out, *more):
    return [*settings_of(folder), "--out", str(out), *more]


def adapter_values(run):
    adapter = lora.Adapter.load(run / "adapter")
    arrays = {f"{k}/{x}": getattr(v, x) for k, v in adapter.layers.items() for x in "ab"}
    return {**arrays, **adapter.weights}


def assert_same_run(one, two):
    first, second = adapter_values(one), adapter_values(two)
    assert first.keys() == second.keys() and first
    for key, value in first.items():
        np.testing.assert_array_equal(value, second[key])
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
