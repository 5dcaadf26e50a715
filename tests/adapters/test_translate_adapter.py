"""Adapters with the names of another library: translated, loaded, and what is said of them."""

import dataclasses
import json
import pickle
import re
import warnings

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import keras, normal
from tfimm_lora.model.state import random_weights, record_base_name
from tfimm_lora.zoo.weights.module_names import ModuleNames

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.once

K = keras.layers
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
WIDTH = 8


def update(seed=0, rank=2, **more):
    return lora.LayerUpdate(
        normal(rank, WIDTH, seed=seed), normal(WIDTH, rank, seed=seed + 1), **more
    )


def attention(index, name):
    return f"vit.encoder.layer.{index}.attention.attention.{name}"


def hugging_face(names=("query", "value"), blocks=2, **more):
    layers = {
        attention(i, name): update(10 * i + j, **more)
        for i in range(blocks)
        for j, name in enumerate(names)
    }
    head = {"classifier.weight": normal(3, WIDTH), "classifier.bias": normal(3)}
    return lora.Adapter(layers, head, ("classifier",), "google/vit-tiny")


def test_separate_projections_are_fused_and_split_again():
    adapter = hugging_face()
    timm = lora.translate_adapter(adapter, "timm")
    assert [*timm.layers] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert timm.modules == ("head",) and set(timm.weights) == {"head.weight", "head.bias"}
    delta = timm.layers["blocks.1.attn.qkv"].delta()
    expected = [adapter.layers[attention(1, name)].delta() for name in ("query", "value")]
    np.testing.assert_allclose(delta[:WIDTH], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(delta[WIDTH : 2 * WIDTH], 0)
    np.testing.assert_allclose(delta[2 * WIDTH :], expected[1], rtol=1e-5)
    assert lora.translate_adapter(timm, "transformers", dialect="v4") == adapter
    assert lora.translate_adapter(adapter, "transformers", dialect="v4") == adapter
    v5 = lora.translate_adapter(timm, "transformers")
    assert next(iter(v5.layers)) == "vit.layers.0.attention.q_proj"
    assert lora.translate_adapter(v5, "timm") == timm


def test_prefixes_are_found_given_and_written():
    timm = lora.translate_adapter(hugging_face(), "timm")
    bare = lora.translate_adapter(timm, "transformers", dialect="v4", prefix="")
    assert next(iter(bare.layers)) == "encoder.layer.0.attention.attention.query"
    own = lora.translate_adapter(timm, "timm", prefix="model.encoder")
    assert next(iter(own.layers)) == "model.encoder.blocks.0.attn.qkv"
    for arguments in (
        {},
        {"source_prefix": "model.encoder"},
        {"source_prefix": "model.encoder."},
    ):
        assert lora.translate_adapter(own, "timm", **arguments).layers == timm.layers
    with pytest.raises(
        ValueError, match="source_prefix='x'.*not before the names that are known"
    ):
        lora.translate_adapter(own, "timm", source_prefix="x")


@pytest.mark.parametrize(
    ("layers", "arguments", "words"),
    [
        ({"a.b": 1}, {}, "no known family, with the layers a.b; expected names of .*ViT"),
        ({"focalnet.0.x": 1}, {}, "begin with 'focalnet.'"),
        ({attention(0, "query"): 1, "vit.b": 1}, {}, "transformers 4's.*unknown name vit.b"),
        ({attention(0, "query"): 1}, dict(names="tim"), "names='tim'; expected one of timm"),
        ({attention(0, "query"): 1}, dict(dialect="v6"), "dialect='v6'; expected one of v4"),
    ],
)
def test_what_cannot_be_translated_is_named(layers, arguments, words):
    adapter = lora.Adapter({name: update() for name in layers})
    with pytest.raises(ValueError, match=words):
        lora.translate_adapter(adapter, **{"names": "timm", **arguments})


def test_a_path_is_not_an_adapter():
    with pytest.raises(TypeError, match="expected an Adapter. Read a folder with Adapter.load"):
        lora.translate_adapter("folder", "timm")


def test_errors_of_a_combination_are_in_the_names_of_the_model():
    one = dataclasses.replace(hugging_face(), weights={}, modules=())
    model, timm = backbone(), lora.translate_adapter(one, "timm")
    errors = lora.combination_errors(timm, [one], model=model)
    assert errors.keys() <= ModuleNames(model).paths.keys()
    assert max(errors.values()) < 1e-6


def backbone(blocks=2):
    """A ViT of keras_hub, with its classifier."""
    models = pytest.importorskip("keras_hub").models
    body = models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=blocks,
        num_heads=2,
        hidden_dim=WIDTH,
        mlp_dim=2 * WIDTH,
    )
    return models.ViTImageClassifier(body, num_classes=3)


def test_dora_on_some_blocks_needs_the_base_model():
    adapter = hugging_face(magnitude=np.ones(WIDTH, "f4"))
    with pytest.raises(ValueError, match="Pass the base model"):
        lora.translate_adapter(adapter, "timm")
    other = keras.Sequential([keras.Input((WIDTH,)), K.Dense(WIDTH, name="fc")])
    with pytest.raises(
        ValueError, match="family is not known, for an adapter of the family ViT"
    ):
        lora.translate_adapter(adapter, "timm", model=other)
    model = backbone()
    timm = lora.translate_adapter(adapter, "timm", model=model)
    magnitude = timm.layers["blocks.0.attn.qkv"].magnitude
    names = ModuleNames(model)
    key = next(x for p, x in names.layers.items() if p.endswith("block_1/mha/key"))
    kernel = np.asarray(key.kernel).reshape(WIDTH, WIDTH)
    np.testing.assert_allclose(
        magnitude[WIDTH : 2 * WIDTH], np.linalg.norm(kernel, axis=0), 1e-5
    )


# -- what a file lacks ----------------------------------------------------------------------


def written(folder, adapter, leave_out=(), **config):
    """Write an adapter as PEFT does, without this package's metadata."""
    adapter.save(folder)
    tensors = load_file(folder / WEIGHTS)
    kept = {k: v for k, v in tensors.items() if not any(x in k for x in leave_out)}
    save_file(kept, folder / WEIGHTS, {"format": "pt"})
    fields = json.loads((folder / CONFIG).read_text())
    fields.update({"target_modules": ["query", "value"], **config})
    (folder / CONFIG).write_text(json.dumps(fields))
    return lora.Adapter.load(folder)


def warned(model, adapter):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora.load_adapter(model, adapter)
    return " ".join(str(w.message) for w in caught if "adapter has" in str(w.message))


def test_a_complete_adapter_of_transformers_raises_no_alarm(tmp_path):
    assert warned(backbone(), written(tmp_path, hugging_face())) == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            dict(leave_out=["layer.1"]),
            "2 layers .*: vit.encoder.layer.1.*query, vit.*value. They",
        ),
        (
            dict(leave_out=["1.attention.attention.value"]),
            "1 layers .*layer.1.*value. They stay",
        ),
        (dict(leave_out=["classifier"]), "no values for 1 layers .*: predictions"),
        (dict(target_modules=["query"]), "does not select: .*0.*value, .*1.*value. They are"),
    ],
)
def test_what_an_adapter_of_transformers_lacks_is_named(given, words, tmp_path):
    adapter = written(tmp_path, hugging_face(), **given)
    assert re.search(words, warned(backbone(), adapter))


def test_an_adapter_of_a_smaller_model_is_noticed_after_two_translations(tmp_path):
    adapter = written(tmp_path, hugging_face())
    twice = lora.translate_adapter(lora.translate_adapter(adapter, "timm"), "transformers")
    twice = pickle.loads(pickle.dumps(twice))
    assert "vit.encoder.layer.2.attention.attention.query" in warned(backbone(3), twice)
    some = dataclasses.replace(twice, layers=dict([*twice.layers.items()][:2]))
    assert warned(backbone(3), some) == ""  # it was changed, so its config says nothing of it


def test_a_fully_trained_module_with_only_some_weights_is_refused(tmp_path):
    adapter = written(tmp_path, hugging_face(), leave_out=["classifier.weight"])
    with pytest.raises(ValueError, match="has no predictions.weight, but other weights of its"):
        lora.load_adapter(backbone(), adapter)


# -- messages -------------------------------------------------------------------------------


def plain():
    return keras.Sequential([keras.Input((WIDTH,)), K.Dense(WIDTH, name="fc")], name="plain")


def test_a_model_of_no_known_family_is_told_apart():
    with pytest.raises(
        ValueError, match="ViT behind the prefix 'vit.', and the family of the mo"
    ):
        lora.load_adapter(plain(), hugging_face())


def test_an_adapter_of_another_family_is_recognized():
    layers = {f"swin.encoder.layers.0.blocks.{i}.attention.self.query": update() for i in "012"}
    with pytest.raises(
        ValueError, match="no layer swin.*Its family is Swin .* the model's ViT"
    ):
        lora.load_adapter(backbone(), lora.Adapter(layers))


def test_layers_that_the_table_lacks_are_listed():
    layers = {**hugging_face().layers, "vit.encoder.layer.0.adapter": update()}
    with pytest.raises(ValueError, match="unknown name vit.encoder.layer.0.adapter"):
        lora.load_adapter(backbone(), lora.Adapter(layers))


def test_keys_without_the_prefix_of_peft_are_explained(tmp_path):
    hugging_face().save(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({k[len(P) :]: v for k, v in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match="begin with 'base_model.model.'. They are transformers 4"
    ):
        lora.Adapter.load(tmp_path)
    whole = {f"{attention(i, 'query')}.weight": normal(WIDTH, WIDTH) for i in range(3)}
    save_file(whole, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match="'vit.', of whole weights: a checkpoint, which load_timm"
    ):
        lora.Adapter.load(tmp_path)


def test_a_checkpoint_of_another_family_is_recognized(tmp_path):
    names = [f"swin.encoder.layers.0.blocks.{i}.layernorm_before.weight" for i in range(4)]
    save_file({name: normal(WIDTH) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="Its family is Swin .* the model's ViT"):
        lora.load_timm_weights(backbone(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="names of Swin .* family of the model is not known"):
        lora.load_timm_weights(plain(), tmp_path / "model.safetensors")


def test_adapters_with_names_of_different_libraries_are_not_combined():
    adapter = dataclasses.replace(hugging_face(), weights={}, modules=())
    timm = lora.translate_adapter(adapter, "timm")
    for call in (lora.combine_adapters, lambda pair: lora.combination_errors(timm, [adapter])):
        with pytest.raises(ValueError, match="transformers 4's.*timm's.*Translate them first"):
            call([adapter, timm])
    v4 = lora.translate_adapter(timm, "transformers", dialect="v4")
    assert [*lora.combine_adapters([adapter, v4]).layers] == [*adapter.layers]


# -- base models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "named", "differ"),
    [
        ("google/vit-tiny", "google/vit-base", True),
        ("timm/vit_tiny.a", "timm/vit_tiny.b", True),
        ("google/vit-tiny", "google/vit-tiny", False),
        ("mirror/vit-tiny", "google/vit-tiny", False),
        ("timm/vit_tiny.a", "timm/vit_tiny", False),
        ("hf://google/vit-tiny@main", "google/vit-tiny", False),
        (random_weights("vit-tiny"), "google/vit-base", False),
        ("google/vit-tiny", "/models/vit-base", False),
        ("model.safetensors", "google/vit-base", False),
        ("google/vit-tiny", "", False),
    ],
)
def test_another_base_model_is_warned_of(base, named, differ):
    model = lora.inject_lora(plain(), lora_rank=2, lora_targets=["fc"])
    adapter = dataclasses.replace(lora.adapter_of(model), base_model=named)
    record_base_name(model, base)
    bank = lora.AdapterBank(other := plain(), targets=["fc"])
    record_base_name(other, base)
    for call in (lora.load_adapter, lambda _, adapter: bank.load("a", adapter)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(model, adapter)
        found = [w for w in caught if "trained on" in str(w.message)]
        texts = [str(w.message) for w in found]
        assert len(texts) == differ
        assert all(repr(base) in text and repr(named) in text for text in texts)
        assert all(w.filename == __file__ for w in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(dialect="v4"), "without names, where they have no effect"),
        (dict(prefix="encoder."), "without names, where they have no effect"),
        (dict(names="timm", dialect="v4"), "only with names='transformers'"),
        (dict(names="torchvision"), "expected one of timm"),
    ],
)
def test_arguments_without_effect_are_errors(arguments, message, tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    with pytest.raises(ValueError, match=message):
        lora.save_adapter(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_prefix_is_a_string(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="fc")])
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"])
    adapter = lora.adapter_of(model)
    for call in (
        lambda: lora.save_adapter(model, tmp_path / "out", names="timm", prefix=3),
        lambda: lora.load_adapter(model, adapter, prefix=3),
    ):
        with pytest.raises(TypeError, match="prefix=3; expected a string"):
            call()
