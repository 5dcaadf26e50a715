"""What ``--model`` may be, and what is said about names that are not known."""

import os
import subprocess
import sys

import pytest

from tests.helpers.kerases import LEGACY
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base.names import canonical_name, is_model_file
from tfimm_lora.finetuning.recipe import Recipe


@pytest.mark.once
@pytest.mark.parametrize(
    "typed, name",
    [
        ("MobileNetV2", "applications/MobileNetV2"),
        ("mobilenetv2", "applications/MobileNetV2"),
        ("Applications/mobilenetV2", "applications/MobileNetV2"),
        ("keras.applications.MobileNetV2", "applications/MobileNetV2"),
        ("mobilenet_v2", "applications/MobileNetV2"),  # tfimm has mobilenet_v2_100, ...
        ("mobilenet-v3-small", "applications/MobileNetV3Small"),
        ("mobilenet_v2_100", "mobilenet_v2_100"),
        ("ViT_Tiny_Patch16_224", "vit_tiny_patch16_224"),
        ("convnext-tiny", "convnext_tiny"),
        ("ConvNeXtTiny", "applications/ConvNeXtTiny"),
        # Both libraries have it: the spelling decides.
        ("resnet50", "resnet50"),
        ("ResNet50", "applications/ResNet50"),
        # The checkpoint that a tfimm name stands for is that name.
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224_in21k"),
        ("hf-hub:timm/resnet50.a1_in1k", "resnet50"),
        ("timm/resnet18", "resnet18"),
        ("timm/convnext_base.fb_in22k", "convnext_base_in22k"),
        # Another checkpoint of the same architecture keeps its tag.
        ("resnet50.a2_in1k", "timm/resnet50.a2_in1k"),
        # Unknown names and files are unchanged.
        ("eva02_base.mim", "eva02_base.mim"),
        ("hf-hub:me/mine", "hf-hub:me/mine"),
        ("folder/my.keras", "folder/my.keras"),
        ("resnet50.keras", "resnet50.keras"),
    ],
)
def test_names_are_understood_as_people_type_them(typed, name):
    assert canonical_name(typed) == name
    assert canonical_name(name) == name


@pytest.mark.once
def test_a_folder_with_the_name_of_a_model_does_not_hide_the_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    assert not is_model_file("resnet18")
    assert Recipe(model="resnet18", data="x").model == "resnet18"
    (tmp_path / "resnet18" / "saved_model.pb").touch()
    assert is_model_file("resnet18")


@pytest.mark.once
@pytest.mark.parametrize(
    "name, expected",
    [
        ("mobilenetv9", ["applications/MobileNetV2", "mobilenet_v2"]),
        ("convnxt_tiny", ["applications/ConvNeXtTiny", "convnext_tiny"]),
        ("applications/ResNet5", ["applications/ResNet50"]),
        ("timm/eva02_base.mim", ["only timm's checkpoints"]),
    ],
)
def test_one_error_suggests_from_both_libraries_at_once(name, expected):
    """In a new process, as on the command line: nothing heavy is imported."""
    code = f"""
import sys
from tfimm_lora.finetuning.base.early import check_model
try:
    check_model({name!r})
except ValueError as error:
    print(error)
assert not {{"tensorflow", "keras", "tf_keras", "tfimm"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Received model {name!r}" in done.stdout and "tfimm-lora models" in done.stdout
    for words in expected:
        assert words in done.stdout


@pytest.mark.skipif(LEGACY, reason="legacy Keras has them")
def test_models_of_the_other_keras_say_what_to_set():
    with pytest.raises(RuntimeError, match="LEGACY_KERAS=1.*applications/EfficientNetV2B3"):
        check_model("efficientnet_v2_b3")
    with pytest.raises(ValueError, match="Keras 3 does not have.*TF_USE_LEGACY_KERAS=1"):
        check_model("RegNetX002")


@pytest.mark.skipif(not LEGACY, reason="needs tfimm")
def test_names_without_weights_name_the_ways_forward():
    with pytest.raises(ValueError, match="nobody has published.*--weights.*--from-scratch"):
        check_model("mixer_s32_224", pretrained=True)
    check_model("mixer_s32_224", pretrained=False)
    check_model("mixer_s32_224", pretrained=True, weights=os.path.abspath(__file__))
