"""Small drawn pictures with several labels or numbers, and a model that can learn them."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.kerases import keras
from tfimm_lora.finetuning.recipe import Recipe

SIDE = 8
COLOURS = ("red", "green", "blue")
NUMBERS = ("brightness", "balance")


def _save(pixels, path) -> None:
    Image.fromarray(np.rint(pixels).clip(0, 255).astype("uint8")).save(path)


def write_csv(path, header, rows) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return Path(path)


def write_colours(folder, n=40, seed=0) -> Path:
    """Pictures with some of three colours, in ``colours.csv`` with a column for each."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        has = rng.random(3) < (0.5, 0.4, 0.25)
        pixels = rng.uniform(0, 60, (SIDE, SIDE, 3)) + 150 * has
        _save(pixels, folder / f"{i}.png")
        rows.append((f"{i}.png", *map(int, has)))
    return write_csv(folder / "colours.csv", ("path", *COLOURS), rows)


def write_numbers(folder, n=40, seed=0) -> Path:
    """Pictures with the numbers brightness (about 2000) and balance (about 0)."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(n):
        brightness, balance = rng.uniform(60, 190), rng.uniform(-1, 1)
        pixels = np.full((SIDE, SIDE, 3), brightness) + rng.uniform(-9, 9, (SIDE, SIDE, 3))
        pixels[..., 0] += 50 * balance
        pixels[..., 2] -= 50 * balance
        _save(pixels, folder / f"{i}.png")
        rows.append((f"{i}.png", f"{2000 + brightness / 10:.3f}", f"{balance:.4f}"))
    return write_csv(folder / "numbers.csv", ("path", *NUMBERS), rows)


def save_model(path, classes=5, bias=True) -> None:
    keras.utils.set_random_seed(3)
    layers = keras.layers
    keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(8, activation="relu", name="fc"),
            layers.Dense(classes, activation="softmax", use_bias=bias, name="head"),
        ]
    ).save(path)


def task_recipe(folder, task, **options) -> Recipe:
    """A recipe for a task, with its model and pictures, which are made if needed."""
    folder = Path(folder)
    data = {"multilabel": "colours/colours.csv", "regression": "numbers/numbers.csv"}[task]
    if not (folder / "model.keras").exists():
        save_model(folder / "model.keras")
    if not (folder / data).exists():
        write = {"multilabel": write_colours, "regression": write_numbers}[task]
        write((folder / data).parent)
    settings = {
        "model": str(folder / "model.keras"),
        "data": str(folder / data),
        "task": task,
        "normalisation": "unit",
        "epochs": 3,
        "batch_size": 8,
        "validation": 0.4,
        "learning_rate": 0.02,
        "augmentation": "none",
        "lora": {"lora_rank": 2, "lora_dropout": 0.1},
    }
    return Recipe.from_dict({**settings, **options})
