"""Loading checkpoints of timm: keys, layouts, errors, sources, names, preprocessing.

The files that real timm wrote are in ``golden``; against the models themselves the tests in
``interop`` run.
"""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests import golden
from tests.helpers.kerases import LEGACY, ids, keras, normal, randomise, run

if not LEGACY:
    pytest.skip("tfimm needs legacy Keras", allow_module_level=True)

import ml_dtypes
import tensorflow as tf
import tfimm
from safetensors.numpy import load_file, save_file

from tests.helpers.tiny_architectures import ARCHITECTURES
from tfimm_lora.zoo.weights import hub_ids, pretrained
from tfimm_lora.zoo.weights.key_layouts import LAYOUTS, find_layout
from tfimm_lora.zoo.weights.keys import checkpoint_variables

FOLDER = Path(golden.__file__).parent
LOGITS = np.load(FOLDER / "timm_logits.npz")

#: Our names for the models of golden/make_timm.py, as variants of what tfimm has.
TINY = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        dict(
            input_size=(16, 16),
            patch_size=2,
            embed_dim=8,
            window_size=4,
            nb_blocks=(2, 1),
            nb_heads=(1, 2),
        ),
    ),
    "pvt_v2": (
        "pvt_v2_b0",
        dict(
            input_size=(32, 32),
            embed_dim=(4, 4, 8, 8),
            nb_blocks=(1, 1, 1, 1),
            nb_heads=(1, 1, 2, 2),
            mlp_ratio=(2.0,) * 4,
            sr_ratio=(2, 1, 1, 1),
        ),
    ),
    "poolformer": (
        "poolformer_s12",
        dict(input_size=(32, 32), embed_dim=(4, 6, 8, 10), nb_blocks=(1, 1, 1, 1)),
    ),
    "convnext": (
        "convnext_tiny",
        dict(input_size=(32, 32), embed_dim=(8, 8, 12, 16), nb_blocks=(1, 1, 2, 1)),
    ),
    "deit_distilled": (
        "deit_tiny_distilled_patch16_224",
        dict(input_size=(16, 16), patch_size=8, embed_dim=8, nb_blocks=2, nb_heads=2),
    ),
    "seresnet_deep": (
        "seresnext26d_32x4d",
        dict(
            input_size=(32, 32),
            nb_blocks=(1, 1, 1, 1),
            nb_channels=(4, 4, 8, 8),
            cardinality=2,
            base_width=32,
            stem_width=4,
        ),
    ),
    "resmlp": (
        "resmlp_12_224",
        dict(input_size=(16, 16), patch_size=4, embed_dim=8, nb_blocks=2),
    ),
}
RENAMED = ("swin", "pvt_v2", "poolformer")
FILES = [*TINY, *(f"{name}_old" for name in RENAMED)]


def make(name, **changes):
    base, fields = TINY[name]
    cfg = dataclasses.replace(
        tfimm.models.model_config(base), **{**fields, "nb_classes": 3, **changes}
    )
    model = tfimm.models.model_class(base)(cfg)
    model(model.dummy_inputs)
    return model


def path_of(name):
    return FOLDER / f"timm_{name}.safetensors"


def assert_logits(model, name):
    """As timm gave them, but for the order of sums."""
    expected = LOGITS[name]
    ours = run(model, golden.images(model.cfg.input_size[0]))
    np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max())


def state(model):
    return [w.numpy().copy() for w in model.weights]


def assert_same(model, before):
    for weight, value in zip(model.weights, before):
        np.testing.assert_array_equal(weight.numpy(), value)


@pytest.fixture
def tensors():
    """The ConvNeXt checkpoint as a dict, to be changed."""
    return load_file(path_of("convnext"))


@pytest.fixture
def changed(tmp_path):
    """Write tensors to a file and give its path."""

    def write(tensors, name="changed.safetensors", **config):
        save_file(tensors, tmp_path / name)
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", FILES)
def test_logits_are_those_of_timm(name):
    kind = name.removesuffix("_old")
    model = make(kind)
    assert lora.load_timm_weights(model, path_of(name)) is model
    assert_logits(model, kind)


@pytest.mark.parametrize("name", FILES)
def test_layout_is_inferred_from_the_keys(name):
    layout = find_layout(load_file(path_of(name)))
    found = LAYOUTS.index(layout) if layout else None
    assert found == (RENAMED.index(name) if name in RENAMED else None)


@pytest.mark.parametrize("name", RENAMED)
def test_new_names_become_the_old_ones(name):
    new, old = load_file(path_of(name)), load_file(path_of(f"{name}_old"))
    layout = find_layout(new)
    renamed = {layout.rename(key): value for key, value in new.items()}
    assert renamed.keys() == old.keys()
    for key, value in old.items():
        np.testing.assert_array_equal(renamed[key], value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_variable_of_every_family_has_a_key_of_its_own(name):
    """The embeddings of SAM's prompts are variables of one layer, all called "weight"."""
    wanted = list(checkpoint_variables(ARCHITECTURES[name].make()))
    keys = [w.keys[0] for w in wanted]
    assert len(set(keys)) == len(keys)
    assert not any("___" in key or "remove" in key or "/" in key for key in keys)


def test_lora_model_takes_the_weights_and_keeps_its_factors():
    model = lora.convert_to_lora_model(make("convnext"), lora_rank=2)
    trained = ids(model.trainable_weights)
    lora.load_timm_weights(model, path_of("convnext"))
    assert_logits(model, "convnext")
    assert ids(model.trainable_weights) == trained
    randomise(model)
    factors = {id(w): w.numpy() for w in model.weights if "_lora_" in w.name}
    lora.load_timm_weights(model, path_of("convnext"))
    for weight in model.weights:
        if id(weight) in factors:
            np.testing.assert_array_equal(weight.numpy(), factors[id(weight)])
    lora.merge_lora_weights(model)
    before = state(model)
    with pytest.raises(ValueError, match=r"merged.*unmerge_lora_weights"):
        lora.load_timm_weights(model, path_of("convnext"))
    assert_same(model, before)


def test_injected_and_reloaded_models_take_the_weights(tmp_path):
    injected = lora.inject_lora(make("resmlp"), lora_targets=["fc1"])
    lora.load_timm_weights(injected, path_of("resmlp"))
    assert_logits(injected, "resmlp")
    # The names of variables lose the model's prefix in a .keras file.
    model = make("convnext")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", compile=False)
    lora.load_timm_weights(loaded, path_of("convnext"))
    assert_logits(loaded, "convnext")


def test_all_problems_are_in_one_error_and_nothing_is_loaded(tensors, changed):
    model = make("convnext")
    before = state(model)
    del tensors["stem.0.bias"]
    tensors["stem.1.weight"] = np.zeros(5, "float32")
    tensors["surplus.weight"] = np.zeros((2, 2), "float32")
    tensors["head.norm.bias"] = np.zeros(16, "int64")
    with pytest.raises(ValueError) as error:
        lora.load_timm_weights(model, changed(tensors))
    message = str(error.value)
    for words in (
        "4 problems",
        r"missing: stem.0.bias for stem/0/bias \(8,\)",
        r"wrong shape: stem.1.weight has \(5,\), stem/1/gamma expects \(8,\)",
        r"unexpected: surplus.weight of shape \(2, 2\)",
        "wrong type: head.norm.bias is I64",
        "Nothing was loaded",
    ):
        assert re.search(words, message), (words, message)
    assert_same(model, before)


def test_other_number_of_classes_says_what_to_do(tmp_path):
    model = make("convnext", nb_classes=7)
    before = state(model)
    with pytest.raises(ValueError) as error:
        lora.load_timm_weights(model, path_of("convnext"))
    message = str(error.value)
    assert "head.fc.weight has (3, 16), head/fc/kernel expects (7, 16)" in message
    assert "nb_classes=..." in message and "weights_to_ignore=['^head/fc/']" in message
    assert_same(model, before)
    lora.load_timm_weights(model, path_of("convnext"), weights_to_ignore=["^head/fc/"])
    body = make("convnext")
    lora.load_timm_weights(body, path_of("convnext"))
    x = golden.images(32)
    np.testing.assert_array_equal(
        model(x, return_features=True)[1]["features"],
        body(x, return_features=True)[1]["features"],
    )
    np.testing.assert_array_equal(model.fc.kernel.numpy(), before[index_of(model, "fc/kernel")])


def index_of(model, name):
    return next(i for i, w in enumerate(model.weights) if f"{name}:" in w.name)


def test_error_names_the_architecture_of_the_checkpoint(tmp_path):
    shutil.copy(path_of("resmlp"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "resmlp_12_224"}')
    with pytest.raises(ValueError, match="config.json of the architecture 'resmlp_12_224'"):
        lora.load_timm_weights(make("convnext"), tmp_path)


def test_only_what_is_known_to_be_no_weight_is_left_out(tensors, changed):
    for key in ("layers.0.blocks.1.attn_mask", "x.relative_position_index"):
        tensors[key] = np.zeros(3, "int64")
    tensors["bn.num_batches_tracked"] = np.array(1, "int64")
    model = make("convnext")
    lora.load_timm_weights(model, changed(tensors))
    assert_logits(model, "convnext")


def test_tensors_that_the_model_does_not_have_are_left_out_on_request(tensors, changed):
    for key in ("text_model.fc.weight", "logit_scale"):
        tensors[key] = np.ones((2, 2), "float32")
    file, model = changed(tensors), make("convnext")
    before = state(model)
    with pytest.raises(ValueError, match=r"1 problem\.\n  unexpected: logit_scale"):
        lora.load_timm_weights(model, file, weights_to_ignore=["^text_model"])
    assert_same(model, before)
    lora.load_timm_weights(model, file, weights_to_ignore=["^text_model", "^logit_scale$"])
    assert_logits(model, "convnext")


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_types_of_floats_are_converted(kind, tensors, changed):
    dtype = getattr(ml_dtypes, kind, None) or np.dtype(kind)
    rounded = {k: v.astype(dtype) for k, v in tensors.items()}
    model = make("convnext")
    lora.load_timm_weights(model, changed(rounded))
    expected = rounded["head.fc.weight"].astype("float32").T
    np.testing.assert_array_equal(model.fc.kernel.numpy(), expected)
    assert all(w.dtype == tf.float32 for w in model.weights)


def test_checkpoint_in_several_files(tensors, tmp_path):
    keys = sorted(tensors)
    parts = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({k: tensors[k] for k in part}, tmp_path / name)
    weight_map = {k: name for name, part in parts.items() for k in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model = make("convnext")
    lora.load_timm_weights(model, tmp_path)
    assert_logits(model, "convnext")
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"do not exist: model-2.safetensors"):
        lora.load_timm_weights(model, tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map to name safetensors files beside it"):
        lora.load_timm_weights(model, tmp_path)


def test_what_is_not_a_checkpoint_is_an_error(tmp_path):
    model = make("convnext")
    before = state(model)
    whole = path_of("convnext").read_bytes()
    cases = {
        "cut.safetensors": (
            whole[: len(whole) // 2],
            ValueError,
            "truncated. Get the file",
        ),
        "text.safetensors": (
            b"not a checkpoint",
            ValueError,
            "not a complete safetensors file",
        ),
        "empty.safetensors": (b"", ValueError, "not a complete safetensors file"),
        "model.pth": (whole, ValueError, "cannot be read without torch"),
        "model.npz": (whole, ValueError, "expected a safetensors file, or a .pth, .pt or"),
    }
    for name, (content, kind, words) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind, match=words):
            lora.load_timm_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="folder with 3 safetensors files.*Name the"):
        lora.load_timm_weights(model, tmp_path)
    for wrong in (tmp_path / "missing.safetensors", "a/b/c", "no such thing"):
        with pytest.raises(
            FileNotFoundError, match="expected a safetensors or torch file, a f"
        ):
            lora.load_timm_weights(model, wrong)
    with pytest.raises(FileNotFoundError, match="did you mean 'timm/convnext_tiny.fb_in1k'"):
        lora.load_timm_weights(model, "convnext_tiny.fb_in1k")
    (tmp_path / "config").mkdir()
    shutil.copy(path_of("convnext"), tmp_path / "config" / "model.safetensors")
    (tmp_path / "config" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        lora.load_timm_weights(model, tmp_path / "config")
    assert_same(model, before)


def test_unbuilt_and_foreign_models_are_refused():
    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="no weights yet"):
        lora.load_timm_weights(unbuilt, path_of("convnext"))
    with pytest.raises(TypeError, match="expected a Keras layer or model"):
        lora.load_timm_weights(object(), path_of("convnext"))


def test_any_keras_model_with_the_same_names_will_do(changed):
    """A linear layer of the one is a 1x1 convolution of the other, here and there."""
    entry = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, 1, name="stem.0")(entry)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(entry, keras.layers.Dense(2, name="head")(x))
    stem, head = normal(5, 3), normal(2, 5, 1, 1)
    zero = np.zeros
    tensors = {"stem.0.weight": stem, "head.weight": head}
    tensors |= {"stem.0.bias": zero(5, "float32"), "head.bias": zero(2, "float32")}
    lora.load_timm_weights(model, changed(tensors))
    x = normal(2, 4, 4, 3)
    expected = x.mean((1, 2)) @ stem.T @ head[:, :, 0, 0].T
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-5, atol=1e-6)


CONFIG = dict(
    architecture="convnext_tiny",
    num_classes=3,
    pretrained_cfg=dict(
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
        crop_pct=0.95,
        interpolation="bilinear",
        input_size=[3, 32, 32],
    ),
)


def test_config_of_the_checkpoint_reaches_the_model_and_its_preprocessing(tensors, changed):
    path = changed(tensors, "model.safetensors", **CONFIG)
    model = make("convnext")
    registered = tfimm.models.model_config("convnext_tiny")
    shared = model.cfg
    lora.load_timm_weights(model, path)
    assert model.cfg.mean == (0.1, 0.2, 0.3) and model.cfg.std == (0.4, 0.5, 0.6)
    assert model.cfg.crop_pct == 0.95 and model.cfg.interpolation == "bilinear"
    # The config that was given may belong to tfimm's registry or to another model.
    assert shared.mean == registered.mean == (0.485, 0.456, 0.406)
    lora_model = lora.convert_to_lora_model(model, lora_rank=2)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = (images / 255.0 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    for m in (model, lora_model):
        result = lora.create_preprocessing(m)(images)
        assert result.dtype == tf.float32
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_preprocessing_of_images_batches_and_datasets():
    preprocess = lora.create_preprocessing("convnext_tiny")
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24, 3), dtype=np.uint8)
    theirs = tfimm.create_preprocessing("convnext_tiny")(images)
    np.testing.assert_allclose(preprocess(images), theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(preprocess(images[0]), theirs[0], rtol=1e-5, atol=1e-6)
    mapped = next(iter(tf.data.Dataset.from_tensors(images).map(preprocess)))
    np.testing.assert_allclose(mapped, theirs, rtol=1e-5, atol=1e-6)
    half = lora.create_preprocessing("convnext_tiny", dtype="float16")(images)
    assert half.dtype == tf.float16
    five = lora.create_preprocessing("convnext_tiny", in_channels=5)
    wide = np.concatenate([images, images[..., :2]], axis=-1)
    assert five(wide).shape == (3, 20, 24, 5)
    np.testing.assert_array_equal(five(wide)[..., 3:], five(wide)[..., :2])


def test_preprocessing_resizes_and_crops_the_middle():
    preprocess = lora.create_preprocessing("convnext_tiny", resize=True)
    # Of a picture twice as wide as high the middle remains, less 1 - 0.875 at the borders.
    ramp = np.broadcast_to(np.linspace(0, 255, 512)[None, :, None], (256, 512, 3))
    result = np.asarray(preprocess(ramp.astype("uint8")))
    assert result.shape == (224, 224, 3)
    back = result * tfimm.models.model_config("convnext_tiny").std
    back = (back + tfimm.models.model_config("convnext_tiny").mean) * 255
    assert abs(back[:, :, 0].mean() - 127.5) < 1
    assert abs((back[0, -1, 0] - back[0, 0, 0]) - 255 * 0.4375) < 1.5

    def pictures():
        for height, width in ((300, 240), (224, 500)):
            yield np.zeros((height, width, 3), "uint8")

    spec = tf.TensorSpec((None, None, 3), tf.uint8)
    dataset = tf.data.Dataset.from_generator(pictures, output_signature=spec)
    batch = next(iter(dataset.map(preprocess).batch(2)))
    assert batch.shape == (2, 224, 224, 3)
    assert dataset.map(preprocess).element_spec.shape == (224, 224, 3)


def test_preprocessing_refuses_what_it_cannot_know():
    with pytest.raises(ValueError, match="Nearest: convnext_tiny"):
        lora.create_preprocessing("convnext_tny")
    with pytest.raises(TypeError, match="cfg has mean, std"):
        lora.create_preprocessing(keras.Sequential())
    # tfimm has a std of zero for this model, which would give infinities.
    result = lora.create_preprocessing("vit_base_patch16_224_miil")(np.full((2, 2, 3), 255))
    np.testing.assert_array_equal(result, np.ones((2, 2, 3)))


def test_model_path_may_be_a_checkpoint(tmp_path):
    name, fields = TINY["convnext"]
    shutil.copy(path_of("convnext"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for path in (path_of("convnext"), tmp_path):
        model = lora.create_model(name, model_path=str(path), nb_classes=3, **fields)
        assert type(model) is lora.LoRAConvNeXt
        assert_logits(model, "convnext")
    assert model.cfg.mean == (0.1, 0.2, 0.3)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A tiny registered model whose name stands for a checkpoint on the disk."""
    base, fields = TINY["convnext"]
    cfg = dataclasses.replace(
        tfimm.models.model_config(base), **fields, name="tiny_pretrained", nb_classes=3
    )

    def tiny_pretrained():
        return tfimm.models.model_class(base), cfg

    tiny_pretrained.__module__ = __name__
    tfimm.models.register_model(tiny_pretrained)
    folder = tmp_path / "timm" / "tiny.tag"
    folder.mkdir(parents=True)
    shutil.copy(path_of("convnext"), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setitem(hub_ids.CHECKPOINTS, "tiny_pretrained", "tiny.tag")
    monkeypatch.chdir(tmp_path)  # "timm/tiny.tag" is then also a folder
    return "tiny_pretrained"


def test_pretrained_uses_the_checkpoint_that_the_name_stands_for(local_hub):
    model = lora.create_model(local_hub, pretrained=True, lora_rank=2)
    assert_logits(model, "convnext")
    assert model.cfg.mean == (0.1, 0.2, 0.3)
    other = lora.create_model(local_hub, pretrained=True, nb_classes=5, in_channels=1)
    assert other.fc.units == 5 and other.cfg.lora_train_classifier
    assert other.cfg.mean == (0.1, 0.2, 0.3) and other.cfg.crop_pct == 0.95
    own = lora.create_model(local_hub, pretrained=True, mean=(0.5, 0.5, 0.5))
    assert own.cfg.mean == (0.5, 0.5, 0.5) and own.cfg.std == (0.4, 0.5, 0.6)
    x = golden.images(32)
    # One channel takes the sum over the old ones.
    gray = np.repeat(x[..., :1], 3, axis=-1)
    _, features = other(x[..., :1], return_features=True)
    _, expected = model(gray, return_features=True)
    np.testing.assert_allclose(features["features"], expected["features"], atol=1e-4)


@pytest.mark.long
def test_tfimms_own_cache_comes_first(local_hub, tmp_path):
    model = tfimm.create_model(local_hub)
    model.save(str(tmp_path / "cached"))
    tfimm.utils.set_model_cache(local_hub, str(tmp_path / "cached"))
    try:
        cached = lora.create_model(local_hub, pretrained=True)
    finally:
        tfimm.utils.clear_model_cache(local_hub)
    x = golden.images(32)
    np.testing.assert_allclose(run(cached, x), run(model, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, words",
    [
        ("efficientnet_v2_b3", "24 channels in blocks.0 where EfficientNetV2-B3 has 16"),
        ("mixer_s32_224", "nobody has published weights"),
        ("ig_resnext101_32x48d", "no longer has this variant"),
        ("vit_large_patch32_224_in21k", "nb_classes=0 and representation_size=0"),
    ],
)
def test_names_without_weights_say_why(name, words):
    with pytest.raises(ValueError, match=f"{name}.*no weights for it.*{words}"):
        pretrained.create_pretrained(tfimm, name)


def test_torch_files_ask_for_torch(monkeypatch):
    monkeypatch.setattr(pretrained, "installed", lambda package: package != "torch")
    with pytest.raises(ImportError, match="torch file only.*pip install torch"):
        pretrained.create_pretrained(tfimm, "pvt_tiny")


def test_every_name_of_tfimm_is_in_a_table():
    import tfimm.architectures.segment_anything

    tables = (hub_ids.CHECKPOINTS, hub_ids.WITHOUT_WEIGHTS, hub_ids.TORCH_FILES)
    known = [name for table in tables for name in table]
    registered = [n for n in tfimm.list_models() if not n.startswith("tiny_")]
    assert sorted(known) == sorted(registered)


def test_what_is_not_installed_is_asked_for(monkeypatch):
    model = make("convnext")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="needs huggingface_hub.*pip install huggingface_hub"):
        lora.load_timm_weights(model, "timm/convnext_tiny.fb_in1k")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="needs safetensors.*pip install safetensors"):
        lora.load_timm_weights(model, path_of("convnext"))


def test_package_imports_neither_torch_nor_the_clients():
    code = """
import sys, tfimm_lora
print([m for m in ("torch", "timm", "safetensors", "huggingface_hub") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
