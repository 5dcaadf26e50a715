"""What the tests in legacy Keras need of Keras 3 on JAX, in a process of its own.

    python -m tests.interop.keras3_program TASK.json

TASK has the fields `family` ("vit"), `config` (of transformers), `weights`, `adapter`, `batch`,
and what to do: `outputs` (an npz file), `save` (a list of folder, names, dialect), or `train`
(a folder for the adapter after 20 steps of SGD).
"""

import json
import sys

import numpy as np


def vit(hub, config, classes):
    backbone = hub.ViTBackbone(
        image_shape=(config["image_size"], config["image_size"], 3),
        patch_size=config["patch_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        layer_norm_epsilon=config["layer_norm_eps"],
    )
    return hub.ViTImageClassifier(backbone=backbone, num_classes=classes)


def swin(hub, config, classes):
    backbone = hub.SwinTransformerBackbone(
        image_shape=(config["image_size"], config["image_size"], 3),
        patch_size=config["patch_size"],
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        drop_path_rate=0.0,
    )
    return hub.SwinTransformerImageClassifier(backbone=backbone, num_classes=classes)


MODELS = {"vit": vit, "swin": swin}


def main(task):
    import keras
    import keras_hub

    import tfimm_lora as lora

    config = task["config"]
    model = MODELS[task["family"]](keras_hub.models, config, len(config["id2label"]))
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
