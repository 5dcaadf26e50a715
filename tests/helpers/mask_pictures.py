"""Small drawn pictures with masks, and a model that can learn them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers.kerases import keras
from tfimm_lora.finetuning.recipe import Recipe

SIDE = 32
CLASSES = ("0", "1", "2")

#: How the pixels of each class look: grey, red, green.
_LOOKS = np.array([(60, 60, 60), (200, 60, 60), (60, 200, 60)])


def draw(rng, side=SIDE):
    """A picture with a red and a green square, and its mask, whose first rows are ignored."""
    mask = np.zeros((side, side), "uint8")
    for label, size in ((1, side // 2), (2, side // 3)):
        y, x = rng.integers(2, side - size, 2)
        mask[y : y + size, x : x + size] = label
    pixels = _LOOKS[mask] + rng.uniform(-50, 50, (side, side, 3))
    mask[:2] = 255
    return pixels.clip(0, 255).astype("uint8"), mask


def write_masks(folder, n=20, seed=0, side=SIDE) -> Path:
    """``images/`` and ``masks/`` in a folder."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels, mask = draw(rng, side)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
    return folder


def save_model(path, classes=5) -> None:
    """A classifier of pictures, with residual sums at an eighth of the size and the last."""
    keras.utils.set_random_seed(3)
    layers = keras.layers

    def block(x, filters, strides, name):
        x = layers.Conv2D(
            filters, 3, strides=strides, padding="same", activation="relu", name=f"{name}_down"
        )(x)
        y = layers.Conv2D(filters, 3, padding="same", activation="relu", name=f"{name}_conv")(x)
        return layers.Add(name=f"{name}_add")([x, y])

    x = inputs = keras.Input((SIDE, SIDE, 3))
    for number, filters in enumerate((8, 16, 16, 32)):
        x = block(x, filters, 2, f"block{number}")
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    outputs = layers.Dense(classes, activation="softmax", name="head")(x)
    keras.Model(inputs, outputs, name="tiny").save(path)


def mask_recipe(folder, **options) -> Recipe:
    """A recipe for a segmentation, with its model and pictures, which are made if needed."""
    folder = Path(folder)
    if not (folder / "model.keras").exists():
        save_model(folder / "model.keras")
    if not (folder / "data").exists():
        write_masks(folder / "data")
    settings = {
        "model": str(folder / "model.keras"),
        "data": str(folder / "data"),
        "task": "segmentation",
        "normalisation": "unit",
        "epochs": 3,
        "batch_size": 4,
        "learning_rate": 0.01,
        "augmentation": "none",
        "lora": {"lora_rank": 2, "lora_dropout": 0.1},
    }
    return Recipe.from_dict({**settings, **options})


def write_table(path, rows) -> Path:
    """A table of classes, of dicts, as CSV or JSON."""
    if str(path).endswith(".json"):
        Path(path).write_text(json.dumps(rows))
    else:
        lines = [",".join(map(str, row.values())) for row in rows]
        Path(path).write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    return Path(path)
