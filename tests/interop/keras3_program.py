"""What the tests in legacy Keras need of Keras 3 on JAX, in a process of its own.

    python -m tests.interop.keras3_program TASK.json

TASK has the fields `family` (a function of `keras3/models.py`), `config` (of transformers),
`weights`, `adapter`, `batch`, and what to do: `outputs` (an npz file), `save` (a list of
folder, names, dialect), or `train` (a folder for the adapter after 20 steps of SGD).
"""

import json
import sys

import numpy as np


def main(task):
    import keras

    import tfimm_lora as lora
    from tests.interop.keras3 import models

    config = task["config"]
    model = getattr(models, task["family"])(config, len(config["id2label"]))
    lora.load_timm_weights(model, task["weights"])
    batch = np.load(task["batch"])
    x = batch["pixel_values"].transpose(0, 2, 3, 1)
    if task.get("adapter"):
        lora.load_adapter(model, task["adapter"])
    if task.get("train"):
        optimizer = keras.optimizers.SGD(float(task["rate"]))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, jit_compile=False)
        for _ in range(20):
            model.train_on_batch(x, batch["labels"])
        lora.save_adapter(model, task["train"], names="transformers", dialect="v5")
    for folder, names, dialect in task.get("save", []):
        lora.save_adapter(model, folder, names=names, dialect=dialect)
    if task.get("outputs"):
        np.savez(task["outputs"], outputs=np.asarray(model(x, training=False)))


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
