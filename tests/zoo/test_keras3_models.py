"""Models of timm by name on Keras 3, without timm and torch."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, run
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.zoo.keras3_models import base, presets
from tfimm_lora.zoo.keras3_models.build import build
from tfimm_lora.zoo.keras3_models.folders import folder_kind
from tfimm_lora.zoo.keras3_models.known import is_known, known, names, refusal_reason
from tfimm_lora.zoo.model_table import keras3_models

keras_hub = None if LEGACY else pytest.importorskip("keras_hub")
only_keras3 = pytest.mark.skipif(LEGACY, reason="these models are for Keras 3")


@pytest.mark.once
def test_names_with_and_without_tags_are_known():
    assert known("vit_base_patch16_224").checkpoint.endswith("augreg_in21k_ft_in1k")
    tagged = known("timm/vit_base_patch16_224.augreg_in21k")
    assert tagged.config.nb_classes == 21843 and tagged.family == "vit"
    assert known("vit_base_patch16_224_in21k").config.nb_classes == 21843
    # tfimm's name means tfimm's model, a tag or another name of timm means timm's.
    assert known("efficientnet_b0").arguments["same_padding"]
    assert not known("efficientnet_b0.ra_in1k").arguments["same_padding"]
    assert not known("pt_efficientnet_b0").arguments["same_padding"]
    assert known("mobilenetv3_large_100").config.architecture == "mobilenetv3_large_100"


@pytest.mark.once
@pytest.mark.parametrize(
    "name, message",
    [
        ("resnext50_32x4d", "groups"),
        ("vgg16_bn", "BatchNorm.*Nearest.*vgg16.*"),
        ("pvt_v2_b0", "MLPs of keras_hub"),
        ("cait_xxs24_224", "neither keras_hub nor.*TF_USE_LEGACY_KERAS=1"),
        ("vit_tinny_patch16_224", "not known.*vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.nothing", "no weights with the tag.*augreg_in21k"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(name, message):
    assert not is_known(name)
    with pytest.raises(ValueError, match=f"(?s)Received model_name='{name}'.*{message}"):
        known(name)


@pytest.mark.once
def test_the_table_lists_what_can_be_built():
    table = keras3_models()
    assert list(table) == names() and all(row.in_keras3 for row in table.values())
    assert table["vit_tiny_patch16_224"].parameters == 5717416
    assert table["vit_tiny_patch16_224"].pretrained
    assert refusal_reason("vit_tiny_patch16_224") is None
    assert refusal_reason("nothing") is None


@pytest.mark.once
def test_folders_are_recognised_by_their_files(tmp_path):
    assert folder_kind(tmp_path) is None and folder_kind(tmp_path / "none") is None
    for kind, key in (
        ("keras_hub", "registered_name"),
        ("transformers", "model_type"),
        ("timm", "architecture"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({key: "x"}))
        assert folder_kind(tmp_path) == kind
    (tmp_path / "config.json").write_text("no json")
    (tmp_path / "adapter_config.json").touch()
    assert folder_kind(tmp_path) == "adapter"
    (tmp_path / "saved_model.pb").touch()
    assert folder_kind(tmp_path) == "saved_model"


@only_keras3
def test_a_model_by_name_has_lora_and_a_config():
    name = "vit_tiny_patch16_224"
    model = lora.create_model(name, nb_classes=3, input_size=(32, 48), lora_rank=2)
    assert model.output_shape == (None, 3)
    assert model.cfg.name == name and model.cfg.input_size == (32, 48)
    assert lora.create_preprocessing(model)(np.full((2, 2, 3), 255))[0, 0, 0] == 1.0
    trained = {v.path.split("/")[-1] for v in model.trainable_variables}
    assert {"kernel_lora_a", "kernel_lora_b", "kernel", "bias"} == trained  # the head is new
    assert "vit_tiny_patch16_224" in lora.list_models("vit_tiny*")
    assert "cait_m36_384" not in lora.list_models()


@only_keras3
def test_wrong_arguments_are_named_before_the_model_is_built():
    name = "vit_tiny_patch16_224"
    with pytest.raises(TypeError, match="nb_clases.*nb_classes"):
        lora.create_model(name, nb_clases=3)
    with pytest.raises(TypeError, match="lora_rnak.*lora_rank"):
        lora.create_model(name, lora_rnak=3)
    with pytest.raises(ValueError, match="input_size"):
        lora.create_model(name, input_size=(0, 3))
    with pytest.raises(ValueError, match=r"multiples of 224"):
        lora.create_model("swin_tiny_patch4_window7_224", input_size=(64, 64))
    with pytest.raises(ValueError, match="Keras 3 cannot build exactly"):
        lora.create_model("resnext50_32x4d")
    for patched in (name, "vit_small_patch16_dinov3"):
        with pytest.raises(ValueError, match=r"\(30, 32\).*multiples of 16.*dropped"):
            lora.create_model(patched, input_size=(30, 32), nb_classes=3)
    with pytest.raises(FileNotFoundError, match="./none', which does not exist; expected a"):
        lora.create_model("./none")


@only_keras3
def test_weights_move_to_other_classes_channels_and_sizes():
    from tfimm_lora.zoo.keras3_models.build import build

    name = "vit_tiny_patch16_224"
    source, _ = build(name, classes=4, input_size=(64, 64))
    target, _ = build(name, classes=2, input_size=(64, 96), in_channels=1)
    lora.transfer_weights(source, target)
    x = np.random.default_rng(0).normal(size=(1, 64, 96, 1)).astype("float32")
    assert run(target, x).shape == (1, 2)
    one, _ = build(name, classes=4, input_size=(64, 64), in_channels=1)
    lora.transfer_weights(source, one)
    x = x[:, :, :64]
    expected = run(source, np.repeat(x, 3, axis=-1))
    np.testing.assert_allclose(run(one, x), expected, atol=1e-4)


@only_keras3
@pytest.mark.parametrize("name", ["vit_base_patch32_clip_224", "vit_base_patch16_siglip_224"])
def test_the_positions_of_clip_and_siglip_are_numbered(name):
    """keras_hub gives all patches the same position. Of another size they are numbered anew."""

    def small(size):
        row = known(name)
        sizes = dict(hidden_dim=8, num_layers=1, num_heads=2, intermediate_dim=8)
        return build(row._replace(arguments=row.arguments | sizes), classes=2, input_size=size)

    source, _ = small((64, 64))
    target, _ = small((96, 96))
    patch = known(name).arguments["patch_size"]
    for model, side in ((source, 64), (target, 96)):
        (numbers,) = [v for v in model.variables if v.name == "position_ids"]
        count = (side // patch) ** 2 + ("clip" in name)
        np.testing.assert_array_equal(array(numbers), [range(count)])
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype("float32")
    moved = np.roll(x, patch, axis=1)
    assert np.abs(run(source, x) - run(source, moved)).max() > 1e-4
    lora.transfer_weights(source, target)
    back, _ = small((64, 64))
    lora.transfer_weights(source, back)
    np.testing.assert_array_equal(run(back, x), run(source, x))
    np.testing.assert_array_equal(array(numbers), [range(count)])


@only_keras3
def test_the_positions_of_a_preset_without_weights_are_numbered(monkeypatch):
    encoder = keras_hub.models.CLIPVisionEncoder(16, 8, 1, 2, 8, image_shape=(32, 32, 3))
    preset = presets.Preset(encoder, None, False)
    monkeypatch.setattr(base, "open_preset", lambda *args, **kwargs: preset)
    model = lora.create_model("hub/clip", nb_classes=2)
    (numbers,) = [v for v in model.variables if v.name == "position_ids"]
    np.testing.assert_array_equal(array(numbers), [range(5)])


@only_keras3
def test_a_preset_folder_of_keras_hub(tmp_path):
    """With a classifier, and as a backbone, which gets one."""
    models = keras_hub.models
    backbone = models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=16,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    converter = keras_hub.layers.ViTImageConverter(
        image_size=(32, 32), scale=1 / 127.5, offset=-1.0
    )
    task = models.ViTImageClassifier(
        backbone,
        4,
        preprocessor=models.ViTImageClassifierPreprocessor(image_converter=converter),
        activation="softmax",
    )
    task.save_to_preset(str(tmp_path / "task"))
    backbone.save_to_preset(str(tmp_path / "backbone"))
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")

    model = lora.create_model(str(tmp_path / "task"), lora_rank=2)
    scores = np.exp(run(model, x))
    np.testing.assert_allclose(scores / scores.sum(-1, keepdims=True), run(task, x), rtol=1e-4)
    assert model.cfg.mean == (0.5, 0.5, 0.5) and model.cfg.std == (0.5, 0.5, 0.5)
    assert lora.create_model(str(tmp_path / "task"), nb_classes=5).output_shape == (None, 5)

    base = open_base_model(str(tmp_path / "task"), classes=4)
    assert base.preprocessing.mean == (0.5, 0.5, 0.5) and not base.new_classifier
    assert base.weights == "weights of task" and not base.from_scratch
    with pytest.raises(ValueError, match="normalisation"):
        open_base_model(str(tmp_path / "backbone"), classes=3)
    base = open_base_model(str(tmp_path / "backbone"), classes=3, normalisation="unit")
    assert base.new_classifier and base.model.output_shape == (None, 3)
    features = run(base.model.layers[1], x)[:, 0]
    np.testing.assert_allclose(features, run(backbone, x)[:, 0], rtol=1e-5)


@only_keras3
def test_finetuning_takes_the_same_names():
    base = open_base_model("vit_tiny_patch16_224", classes=3, input_size=(32, 32))
    assert base.from_scratch and base.new_classifier
    assert base.preprocessing.mean == (0.5, 0.5, 0.5)
    check_model("mobilenetv3_large_100")
    check_model("hf://someone/vit")
    with pytest.raises(RuntimeError, match="resnext50_32x4d.*groups.*legacy Keras"):
        check_model("resnext50_32x4d")
    with pytest.raises(ValueError, match="hub/dinov2_base"):
        open_base_model("hub/dinov2_bas", classes=3)


@pytest.mark.skipif(not LEGACY, reason="the message of legacy Keras")
def test_presets_need_keras3():
    with pytest.raises(RuntimeError, match="TF_USE_LEGACY_KERAS=0"):
        check_model("hub/dinov2_base")


@only_keras3
@pytest.mark.long
def test_models_are_built_on_jax_without_tensorflow_and_torch():
    pytest.importorskip("jax")
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "torch", "timm", "tfimm"):
            raise ImportError(name, name=name)
sys.meta_path.insert(0, Block())
import tfimm_lora as lora
model = lora.create_model("vit_tiny_patch16_224", nb_classes=3, input_size=(32, 32))
model = lora.create_model("convnext_tiny", nb_classes=3, input_size=(32, 32))
print(model.output_shape)
"""
    environment = {"KERAS_BACKEND": "jax", "TF_USE_LEGACY_KERAS": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.stdout.strip().endswith("(None, 3)"), done.stderr[-2000:]


@pytest.mark.skipif(LEGACY, reason="of Keras 3")
def test_models_are_plain_and_their_classifiers_start_small():
    """keras_hub's tasks cannot be trained without TensorFlow or grain, and the classifier of
    keras.applications' EfficientNet starts with large weights if there are few classes."""
    model, _ = build("vit_tiny_patch16_224", classes=3, input_size=(32, 32))
    assert type(model) is keras.Model or type(model).__module__.startswith("keras.")
    model, config = build("efficientnet_lite0", classes=3, input_size=(32, 32))
    kernel = array(model.get_layer(*config.classifier).kernel)
    limit = np.sqrt(6 / sum(kernel.shape))  # of Glorot's uniform initializer
    assert 0.9 * limit < np.abs(kernel).max() <= limit
