"""Adapters of models of keras_hub in the names of other libraries, and loaded again."""

import numpy as np
import pytest

from tests.helpers.kerases import LEGACY
from tests.helpers.kerases import run as run_model
from tests.helpers.selection import nightly_except

pytestmark = pytest.mark.skipif(LEGACY, reason="keras_hub runs on Keras 3")

if not LEGACY:
    import keras

    import tfimm_lora as lora
    from tests.families.hub_models import CLASSES, MODELS

#: The variants of LoRA, with the projections of q and v by timm's or the model's own name.
VARIANTS = {
    "default": {},
    "dora_of_query_and_value": dict(
        lora_use_dora=True, lora_qkv="qv", lora_targets="attention"
    ),
    "bias": dict(lora_bias=True),
    "all_biases": dict(lora_train_bias="all", lora_train_classifier=True),
    "ranks": dict(
        lora_rank_pattern={"query": 1, "key": 3}, lora_alpha_pattern={"query": 5, "value": 2}
    ),
}


def images(model):
    return np.random.default_rng(0).normal(size=(2, *model.input_shape[1:])).astype("float32")


def make(name, weights=None):
    model = MODELS[name]()
    random = np.random.default_rng(1)
    for index, variable in enumerate(model.weights):
        if weights is not None:
            variable.assign(weights[index])
        elif "seed" not in variable.path:
            noise = random.normal(size=variable.shape)
            variable.assign(np.asarray(variable) + 0.1 * noise.astype("float32"))
    return model, [np.asarray(variable) for variable in model.weights]


def randomize(model):
    """Give every trained variable another value."""
    random = np.random.default_rng(2)
    for variable in model.trainable_variables:
        noise = 0.2 * random.normal(size=variable.shape)
        variable.assign(np.asarray(variable) + noise.astype("float32"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_other_names(variant, tmp_path):
    model, weights = make("vit")
    lora.inject_lora(model, **{"lora_rank": 2, **VARIANTS[variant]})
    randomize(model)
    x = images(model)
    wanted = run_model(model, x)
    for names, dialect in (("timm", None), ("transformers", "v4"), ("transformers", "v5")):
        folder = tmp_path / f"{names}-{dialect}"
        lora.save_adapter(model, folder, names=names, dialect=dialect)
        other, _ = make("vit", weights)
        assert np.abs(run_model(other, x) - wanted).max() > 1e-3
        lora.load_adapter(other, folder)
        np.testing.assert_allclose(run_model(other, x), wanted, rtol=1e-5, atol=1e-5)


FAMILIES = ("deit_distilled", "swin", "dinov2_registers", "segformer")


@pytest.mark.parametrize("name", nightly_except(FAMILIES, ["deit_distilled", "segformer"]))
def test_families(name, tmp_path):
    model, weights = make(name)
    lora.inject_lora(model, lora_rank=2)
    randomize(model)
    x = images(model) if not isinstance(model.input_shape, dict) else None
    x = {"images": np.ones((1, 32, 32, 3), "float32")} if x is None else x
    wanted = run_model(model, x)
    for names in ("timm", "transformers"):
        folder = tmp_path / names
        if name == "segformer" and names == "timm":
            with pytest.raises(ValueError, match="SegFormer, which has no names there"):
                lora.save_adapter(model, folder, names=names)
            continue
        lora.save_adapter(model, folder, names=names)
        other, _ = make(name, weights)
        lora.load_adapter(other, folder)
        np.testing.assert_allclose(run_model(other, x), wanted, rtol=1e-5, atol=1e-5)


def test_decoder_of_segformer_is_translated(tmp_path):
    model, _ = make("segformer")
    trained = ["conv2d", "seg_former_backbone/linear_8", "seg_former_backbone/sequential"]
    trained = [x for x in trained if x != "conv2d"] + [model.layers[-2].name]
    lora.inject_lora(model, lora_rank=2, lora_train_modules=trained)
    lora.save_adapter(model, tmp_path, names="transformers")
    keys = {x for x in lora.Adapter.load(tmp_path).weights if x.startswith("decode_head.")}
    assert "decode_head.linear_projections.0.proj.weight" in keys
    assert "decode_head.linear_fuse.weight" in keys
    assert "decode_head.batch_norm.running_mean" in keys


def test_backbone_inside_of_other_models():
    """Depth Anything holds the layers of DINOv2 in a model of its features."""
    import keras_hub

    from tfimm_lora.model.naming import timm_view

    encoder = keras_hub.models.DINOV2Backbone(8, 4, 32, 4, 64, image_shape=(64, 64, 3))
    depth = keras_hub.models.DepthAnythingBackbone(
        image_encoder=encoder,
        patch_size=8,
        backbone_hidden_dim=32,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=4,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )
    paths = set(timm_view(depth).paths.values())
    assert {"blocks/0/attn/qkv", "blocks/3/mlp/fc2", "patch_embed/proj"} <= paths
    lora.inject_lora(depth, lora_rank=2)
    adapted = {name for name in lora.adapter_of(depth).layers}
    assert all(name.startswith("functional.encoder.") for name in adapted)
    assert len(adapted) == 4 * 6


def test_image_encoder_of_clip():
    import keras_hub
    from keras_hub.src.models.clip.clip_text_encoder import CLIPTextEncoder

    text = CLIPTextEncoder(20, 16, 16, 1, 2, 32, max_sequence_length=8)
    model = keras_hub.models.CLIPBackbone(MODELS["clip"](), text, 16)
    lora.inject_lora(model, lora_rank=2)
    adapted = lora.adapter_of(model).layers
    assert len(adapted) == 2 * 6
    assert all(name.startswith("clip_vision_encoder.") for name in adapted)


def test_new_classifier_is_timms_head(tmp_path):
    backbone = MODELS["dinov2"]()
    inputs = keras.Input((32, 32, 3))
    outputs = keras.layers.Dense(CLASSES, name="my_head")(backbone({"images": inputs})[:, 0])
    model = keras.Model(inputs, outputs)
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    lora.save_adapter(model, tmp_path, names="timm")
    assert lora.Adapter.load(tmp_path).modules == ("head",)
