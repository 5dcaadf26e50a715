"""Adapters of tfimm models: golden files of real PEFT, every family, create_model."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests import golden
from tests.helpers.kerases import LEGACY, keras, randomise, run

if not LEGACY:
    pytest.skip("tfimm needs legacy Keras", allow_module_level=True)

from tests.golden import images
from tests.helpers.selection import nightly_except
from tests.helpers.tiny_architectures import ARCHITECTURES, CLASSIFIERS, digits
from tests.zoo.test_weights import make, path_of

FOLDER = Path(golden.__file__).parent
LOGITS = np.load(FOLDER / "peft_logits.npz")

#: Adapters of golden/make_peft.py and the models that they are of.
GOLDEN = {
    "plain": "deit_distilled",
    "patterns": "swin",
    "convolutions": "convnext",
    "classifier": "pvt_v2",
    "float16": "resmlp",
    "bfloat16": "poolformer",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_adapter_that_peft_wrote_gives_pefts_logits(name, tmp_path):
    model = lora.load_timm_weights(make(GOLDEN[name]), path_of(GOLDEN[name]))
    x = images(model.cfg.input_size[0])
    plain, expected = run(model, x), LOGITS[name]
    assert np.abs(plain - expected).max() > 1e-2
    lora.load_adapter(model, FOLDER / f"peft_{name}")
    np.testing.assert_allclose(run(model, x), expected, atol=1e-4 * np.abs(expected).max())
    # Written again it is the same adapter, in PEFT's format.
    adapter = lora.adapter_of(model)
    adapter.save(tmp_path, format="peft")
    again = lora.load_timm_weights(make(GOLDEN[name]), path_of(GOLDEN[name]))
    lora.load_adapter(again, tmp_path)
    assert lora.adapter_of(again) == adapter
    theirs = lora.Adapter.load(FOLDER / f"peft_{name}")
    assert set(theirs.layers) == set(adapter.layers)
    assert set(theirs.weights) <= set(adapter.weights)
    for module, update in theirs.layers.items():
        np.testing.assert_allclose(update.delta(), adapter.layers[module].delta(), atol=1e-6)


#: With every supported layer and every bias for all families, with the defaults for some.
KINDS = [(name, "all") for name in CLASSIFIERS]
KINDS += [(name, "none") for name in ("vit", "swin", "convnext", "resnet")]
KINDS = nightly_except(KINDS, {"vit-all", "convnext-none"}, name="-".join)


@pytest.mark.parametrize("name, train_bias", KINDS)
def test_adapter_of_every_family_loads_into_its_base_model(name, train_bias, tmp_path):
    tiny = ARCHITECTURES[name]
    base = lora.convert_to_regular_model(
        lora.convert_to_lora_model(tiny.make(), lora_rank=1, nb_classes=4)
    )
    x = digits(2, tiny.size)[0]
    plain = run(base, x)
    targets = "all" if train_bias == "all" else None
    model = lora.convert_to_lora_model(
        base,
        lora_rank=2,
        lora_alpha=3,
        lora_targets=targets,
        lora_train_bias=train_bias,
        lora_train_classifier=True,
    )
    rng = np.random.default_rng(0)
    for variable in model.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign_add(0.1 * noise)
    output = run(model, x)
    assert np.abs(output - plain).max() > 1e-2
    lora.save_adapter(model, tmp_path)
    assert lora.Adapter.load(tmp_path) == lora.adapter_of(model)
    lora.load_adapter(base, tmp_path)
    np.testing.assert_allclose(run(base, x), output, rtol=1e-4, atol=1e-5)
    with lora.disable_adapter(base):
        np.testing.assert_allclose(run(base, x), plain, rtol=1e-4, atol=1e-5)
    assert lora.adapter_of(base) == lora.adapter_of(model)


def test_create_model_with_an_adapter(tmp_path):
    model = lora.create_model(
        "resnet18", nb_classes=7, lora_rank=2, lora_train_bias="lora_only"
    )
    randomise(model)
    lora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "resnet18 (random weights)"
    fresh = lora.create_model("resnet18", adapter=tmp_path)
    assert type(fresh) is lora.LoRAResNet and fresh.cfg.nb_classes == 7
    assert lora.adapter_of(fresh) == lora.adapter_of(model)
    # The whole model is saved and loaded with what the adapter asked for.
    fresh.save(str(tmp_path / "saved"), save_traces=False)
    loaded = keras.models.load_model(str(tmp_path / "saved"), compile=False)
    assert lora.adapter_of(loaded) == lora.adapter_of(model)
    with pytest.raises(TypeError, match="lora_rank and an adapter"):
        lora.create_model("resnet18", adapter=tmp_path, lora_rank=2)
    with pytest.raises(ValueError, match="does not fit.*no layer layer1.0.conv1"):
        lora.create_model("vit_tiny_patch16_224", adapter=tmp_path)
    with pytest.raises(ValueError, match=r"fc.weight has \(9, 512\), the adapter \(7, 512\)"):
        lora.create_model("resnet18", adapter=tmp_path, nb_classes=9)


def test_create_model_with_an_adapter_of_transformers(tmp_path):
    name = "deit_tiny_patch16_224"
    model = lora.create_model(name, nb_classes=7, lora_rank=2, lora_qkv="qv")
    randomise(model)
    lora.save_adapter(model, tmp_path, names="transformers", dialect="v4")
    theirs = lora.Adapter.load(tmp_path)
    assert set(theirs.weights) == {"classifier.weight", "classifier.bias"}
    fresh = lora.create_model(name, adapter=tmp_path)
    assert fresh.cfg.nb_classes == 7
    x = digits(1, (224, 224))[0]
    lora.transfer_weights(model, fresh)
    expected = run(model, x)
    lora.load_adapter(fresh, theirs)
    np.testing.assert_allclose(run(fresh, x), expected, atol=1e-4 * np.abs(expected).max())


def test_what_an_adapter_of_transformers_lacks_is_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    base = ARCHITECTURES["vit"].make()
    model = lora.convert_to_lora_model(base, lora_rank=2, lora_targets="attention")
    lora.save_adapter(model, tmp_path, names="transformers", dialect="v4")
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    fields = {**json.loads(config.read_text()), "target_modules": ["query", "output.dense"]}
    config.write_text(json.dumps(fields))
    tensors = load_file(weights)
    unused = ("intermediate", ".key.", ".value.")
    kept = {k: v for k, v in tensors.items() if not any(x in k for x in unused)}
    save_file(kept, weights)
    with pytest.warns(
        UserWarning, match="no values for 2 layers .*: vit.encoder.layer.0.output"
    ):
        lora.load_adapter(base, tmp_path)


def test_lora_class_takes_an_adapter_of_another_rank(tmp_path):
    """The config of the model follows, so that its whole-model files are right."""
    tiny = ARCHITECTURES["vit"]
    base = tiny.make()
    x = digits(2, tiny.size)[0]
    wide = lora.convert_to_lora_model(
        base, lora_rank=3, lora_targets="attention", lora_qkv="qv"
    )
    randomise(wide)
    model = lora.convert_to_lora_model(base, lora_rank=2)
    lora.load_adapter(model, lora.adapter_of(wide))
    assert type(model) is lora.LoRAViT and model.cfg.lora_rank == 3
    assert model.cfg.lora_qkv == "qv"
    np.testing.assert_allclose(run(model, x), run(wide, x), rtol=1e-4, atol=1e-5)
    model.save(str(tmp_path / "saved"), save_traces=False)
    loaded = keras.models.load_model(str(tmp_path / "saved"), compile=False)
    np.testing.assert_allclose(run(loaded, x), run(wide, x), rtol=1e-4, atol=1e-5)
    assert len(model.trainable_weights) == len(wide.trainable_weights)


INITIALIZATIONS = ("gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva")


@pytest.mark.parametrize("freeze_a", [False, True])
@pytest.mark.parametrize("init", nightly_except(INITIALIZATIONS, ["pissa"]))
def test_a_lora_class_of_any_initialization_takes_adapters_like_an_injected_model(
    init, freeze_a
):
    """Also an adapter of the same rank, and one of an initialization of its own."""
    tiny = ARCHITECTURES["vit"]
    base, x = tiny.make(), digits(2, tiny.size)[0]
    settings = dict(lora_rank=2, lora_init=init, lora_freeze_a=freeze_a)
    for other in (dict(lora_rank=2), dict(lora_rank=3), settings):
        tuned = lora.convert_to_lora_model(base, **other)
        randomise(tuned)
        adapter, expected = lora.adapter_of(tuned), run(tuned, x)
        made = lora.convert_to_lora_model(base, **settings)
        plain = tiny.make()
        lora.transfer_weights(base, plain)
        injected = lora.inject_lora(plain, lora_train_classifier=False, **settings)
        for model in (made, injected):
            lora.load_adapter(model, adapter)
            np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-5)
        assert len(made.trainable_weights) == len(injected.trainable_weights)


@pytest.mark.parametrize("settings", [dict(lora_init="pissa"), dict(lora_freeze_a=True)])
def test_lora_of_an_adapter_does_not_keep_other_settings_of_the_lora_class(settings):
    """The new LoRA has defaults beside the adapter's settings, as with inject_lora."""
    tiny = ARCHITECTURES["vit"]
    base = tiny.make()
    x = digits(2, tiny.size)[0]
    tuned = lora.convert_to_lora_model(base, lora_rank=2)
    randomise(tuned)
    model = lora.convert_to_lora_model(base, lora_rank=4, **settings)
    lora.load_adapter(model, lora.adapter_of(tuned))
    assert (model.cfg.lora_init, model.cfg.lora_freeze_a) == ("default", False)
    assert len(model.trainable_weights) == len(tuned.trainable_weights)
    np.testing.assert_allclose(run(model, x), run(tuned, x), rtol=1e-4, atol=1e-5)


def test_extracted_adapter_of_a_fully_trained_model():
    """Also with a new classifier; all but ConvNeXt's layer scale has a place in it."""
    tiny = ARCHITECTURES["convnext"]
    base, tuned = tiny.make(), tiny.make(nb_classes=5)
    lora.transfer_weights(base, tuned)
    rng = np.random.default_rng(0)
    for variable in tuned.trainable_weights:
        noise = rng.normal(size=tuple(variable.shape)).astype("float32")
        variable.assign_add(0.05 * noise)
    with pytest.warns(UserWarning, match=r"stages.0.blocks.0.gamma.*left out"):
        lora.extract_adapter(base, tuned, rank=2)
    for mine, theirs in zip(tuned.weights, base.weights):
        if mine.name.endswith("/gamma:0") and "norm" not in mine.name:
            mine.assign(theirs)
    x = digits(4, tiny.size)[0]
    expected, errors = run(tuned, x), []
    for arguments in (dict(rank=1), dict(rank=4), dict(energy=1.0)):
        adapter = lora.extract_adapter(base, tuned, **arguments)
        assert adapter.weights["head.fc.weight"].shape == (5, 16)
        assert "head.fc" in adapter.modules and "head.norm" in adapter.modules
        model = tiny.make(nb_classes=5)
        lora.transfer_weights(base, model)
        lora.load_adapter(model, adapter)
        errors.append(np.abs(run(model, x) - expected).max())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_adapter_of_a_smaller_model_of_the_family_is_refused():
    """All layers of a ResNet-18 are in a ResNet-34, in the same shapes."""
    adapter = lora.adapter_of(lora.create_model("resnet18", lora_rank=1))
    model = lora.create_model("resnet34", lora_rank=1)
    before = lora.adapter_of(model)
    with pytest.raises(
        ValueError, match=r"nb_blocks is \(2, 2, 2, 2\) there, \(3, 4, 6, 3\) here"
    ):
        lora.load_adapter(model, adapter)
    assert lora.adapter_of(model) == before
    # What only the images differ in is no other architecture, nor is a name of one's own.
    other = dataclasses.replace(adapter, base_model="timm/resnet18.my_own")
    lora.load_adapter(lora.create_model("resnet18", lora_rank=1), other)
