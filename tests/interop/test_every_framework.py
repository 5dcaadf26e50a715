"""One adapter in tfimm, Keras 3 on JAX, transformers and timm: the same outputs and factors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import tensorflow as tf
import tfimm
import torch
from safetensors.numpy import load_file

import tfimm_lora as lora
from tests.interop.hugging_face.models import make_timm

pytest.importorskip("keras_hub")

ROOT = Path(__file__).parents[2]


def keras3(folder, **task):
    """Run ``keras3_program`` on JAX."""
    path = folder / "task.json"
    path.write_text(json.dumps(task, default=str))
    environ = {
        **os.environ,
        "TF_USE_LEGACY_KERAS": "0",
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.interop.keras3_program", str(path)],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def tfimm_vit(config):
    """tfimm's ViT of the sizes in a config of transformers."""
    name = "vit_tiny_patch16_224"
    cfg = tfimm.models.model_config(name)
    size = config["image_size"]
    fields = {
        **cfg.__dict__,
        "input_size": (size, size),
        "patch_size": config["patch_size"],
        "embed_dim": config["hidden_size"],
        "nb_blocks": config["num_hidden_layers"],
        "nb_heads": config["num_attention_heads"],
        "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        "nb_classes": len(config["id2label"]),
    }
    model = tfimm.models.model_class(name)(type(cfg)(**fields))
    model(model.dummy_inputs)
    return model


def relative(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def test_one_adapter_in_every_framework_and_back(transformers_5, tmp_path):
    """tfimm -> Keras 3 on JAX -> transformers -> timm -> tfimm, each with the real library."""
    env = transformers_5
    config = json.loads((env.base("vit") / "config.json").read_text())
    batch = env.batch("vit")
    x = tf.constant(batch["pixel_values"].transpose(0, 2, 3, 1))

    model = tfimm_vit(config)
    lora.load_timm_weights(model, env.base("vit"))
    assert relative(model(x).numpy(), env.outputs("vit")["base"]) < 1e-5
    lora.save_timm_weights(model, tmp_path / "weights")

    targets = ["attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"]
    pattern = {"mlp.fc1": 2}
    lora.inject_lora(
        model,
        lora_rank=3,
        lora_alpha=6,
        lora_targets=targets,
        lora_rank_pattern=pattern,
        lora_train_classifier=True,
    )
    rng = np.random.default_rng(0)
    for variable in lora.lora_trainable_weights(model):
        variable.assign(variable + rng.normal(0, 0.3, size=variable.shape))
    start, expected = lora.adapter_of(model), model(x).numpy()
    assert relative(expected, env.outputs("vit")["base"]) > 0.01
    lora.save_adapter(model, tmp_path / "tfimm")

    common = dict(family="vit", config=config, batch=env.base("vit").parent / "batch.npz")
    keras3(
        tmp_path,
        **common,
        weights=tmp_path / "weights",
        adapter=tmp_path / "tfimm",
        outputs=tmp_path / "keras.npz",
        save=[[tmp_path / "transformers", "transformers", "v5"]],
    )
    assert relative(np.load(tmp_path / "keras.npz")["outputs"], expected) < 1e-5

    (outputs,) = env.check("vit", [tmp_path / "transformers"], tmp_path)
    assert relative(outputs, expected) < 1e-5
    np.savez(tmp_path / "none.npz", **batch, steps=0)
    arguments = (env.base("vit"), tmp_path / "transformers", tmp_path / "none.npz")
    env.run("train", *arguments, tmp_path / "peft")

    keras3(
        tmp_path,
        **common,
        weights=tmp_path / "weights",
        adapter=tmp_path / "peft",
        save=[[tmp_path / "timm", "timm", None]],
    )
    timm = make_timm("vit")
    weights = load_file(tmp_path / "weights" / "model.safetensors")
    timm.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    adapted = peft.PeftModel.from_pretrained(timm, tmp_path / "timm").eval()
    with torch.no_grad():
        outputs = adapted(torch.from_numpy(batch["pixel_values"])).numpy()
    assert relative(outputs, expected) < 1e-5
    adapted.save_pretrained(tmp_path / "timm-peft")

    other = tfimm_vit(config)
    lora.load_timm_weights(other, tmp_path / "weights")
    lora.load_adapter(other, tmp_path / "timm-peft")
    assert relative(other(x).numpy(), expected) < 1e-6
    end = lora.adapter_of(other)
    assert end.layers.keys() == start.layers.keys()
    for name, update in start.layers.items():
        # The projection was separated and fused again: A is shared, B is stacked.
        np.testing.assert_array_equal(end.layers[name].a, update.a)
        np.testing.assert_array_equal(end.layers[name].b, update.b)
        assert end.layers[name].scale == update.scale
    assert end.weights.keys() == start.weights.keys()
    for name, value in start.weights.items():
        np.testing.assert_array_equal(end.weights[name], value)


@pytest.mark.nightly
def test_training_is_that_of_transformers(transformers_5, tmp_path):
    """20 steps of SGD from the same adapter: the same factors in PEFT and in Keras on JAX."""
    env = transformers_5
    config = json.loads((env.base("vit") / "config.json").read_text())
    start = env.adapter("vit", "classifier")
    batch = tmp_path / "batch.npz"
    np.savez(batch, **env.batch("vit"), lr=0.02)
    env.run("train", env.base("vit"), start, batch, tmp_path / "peft")
    keras3(
        tmp_path,
        family="vit",
        config=config,
        weights=env.base("vit"),
        adapter=start,
        batch=batch,
        train=tmp_path / "keras",
        rate=0.02,
    )
    before = lora.Adapter.load(start)
    one, other = lora.Adapter.load(tmp_path / "peft"), lora.Adapter.load(tmp_path / "keras")
    assert one.layers.keys() == other.layers.keys()
    for name, update in one.layers.items():
        for factor in ("a", "b"):
            theirs, ours = getattr(update, factor), getattr(other.layers[name], factor)
            moved = np.abs(theirs - getattr(before.layers[name], factor)).max()
            assert moved > 1e-2 * np.abs(theirs).max()
            assert np.abs(ours - theirs).max() < 1e-3 * np.abs(theirs).max()
    for name, value in one.weights.items():
        assert relative(other.weights[name], value) < 1e-3
