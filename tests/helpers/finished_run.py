"""A small run of finetune, with pictures, labels and paths as strangers may write them."""

import csv
from pathlib import Path

from PIL import Image

from tests.helpers.kerases import keras
from tests.helpers.picture_folders import break_picture, digit_pictures
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
from tfimm_lora.finetuning.run import Run

#: Each would do harm where it is not escaped.
LABELS = (
    '</title><script>alert("1")</script>',
    '"><img src="http://a.test/x.png">',
    "$x^$ & y",
)
SIDE = 8


def save_model(path, end=None) -> None:
    """A small model of pictures, with random weights, for three classes.

    ``end`` is the activation at its end.
    """
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((SIDE, SIDE, 3)),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(8, activation="relu", name="fc"),
            layers.Dense(len(LABELS), end, name="head"),
        ]
    )
    model.save(path)


def write_pictures(folder, each=8) -> Path:
    """Digits of three classes, one file of them broken, and ``labels.csv`` beside them."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rows = []
    for digit, label in enumerate(LABELS):
        for i, pixels in enumerate(digit_pictures(digit)[:each]):
            name = f"<b>{digit} & '{i}'.png"
            Image.fromarray(pixels).save(folder / name)
            rows.append((name, label))
    break_picture(folder / rows[0][0])
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label"), *rows])
    return folder / "labels.csv"


def finished_run(folder, end=None) -> Run:
    """Fine-tune for two epochs, on a few pictures."""
    folder = Path(folder)
    save_model(folder / "model.keras", end)
    recipe = Recipe(
        model=str(folder / "model.keras"),
        data=str(write_pictures(folder / "pictures")),
        normalisation="unit",
        epochs=2,
        batch_size=8,
        validation=0.5,
        augmentation="none",
        lora={"lora_rank": 2, "lora_targets": ["conv", "fc"], "lora_train_classifier": True},
    )
    return finetune_pictures(recipe, folder / "run", verbose="none")
