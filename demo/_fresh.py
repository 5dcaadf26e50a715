"""Classify pictures with the exported model, as a user without tfimm_lora would.

Usage: _fresh.py MODEL PICTURES LOGITS.npy

MODEL is a SavedModel with a JSON description beside it. Only TensorFlow, NumPy and Pillow are
imported: neither tfimm_lora nor tfimm.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

model_path, folder, logits_path = map(Path, sys.argv[1:])
description = json.loads(Path(f"{model_path}.json").read_text())
labels, preprocessing = description["labels"], description["preprocessing"]
assert preprocessing["crop_pct"] == 1.0, "the pictures are resized as a whole"
predict = tf.saved_model.load(str(model_path)).signatures["serving_default"]

files = sorted(folder.glob("*/*.png"), key=lambda f: (labels.index(f.parent.name), f.name))
logits = []
for start in range(0, len(files), 100):
    pictures = [Image.open(file).convert("RGB") for file in files[start : start + 100]]
    pixels = tf.image.resize(
        np.stack(pictures),
        preprocessing["input_size"],
        preprocessing["interpolation"],
        antialias=True,
    )
    # The file contains the normalization: it takes pixels in [0, 255].
    pixels = tf.clip_by_value(pixels, 0.0, 255.0)
    (output,) = predict(pictures=pixels).values()
    logits.extend(output.numpy())
np.save(logits_path, logits)

right = sum(labels[i] == f.parent.name for i, f in zip(np.argmax(logits, 1), files))
for package in ("tfimm_lora", "tfimm", "torch"):
    if package in sys.modules:
        sys.exit(f"This process was meant to run without {package}, but it was imported.")
print(f"{right} of {len(files)} pictures right")
