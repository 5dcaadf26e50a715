"""Our table of names, checked against the installed timm."""

import pytest
import tfimm
import tfimm.architectures.segment_anything
import timm
import torch
from timm.models import _registry

from tfimm_lora.zoo.weights.hub_ids import CHECKPOINTS, TORCH_FILES, WITHOUT_WEIGHTS, hub_id
from tfimm_lora.zoo.weights.key_layouts import find_layout
from tfimm_lora.zoo.weights.keys import (
    checkpoint_variables,
    expected_shape,
    fits,
    is_ignored_in_checkpoint,
)

#: tfimm's input size is not the one that timm's weights were trained at: for the first in
#: timm 0.6 neither, the two "lite" are mistakes of tfimm. All are fully convolutional.
OTHER_SIZES = {
    "ecaresnet50t": (224, 256),
    "pt_efficientnet_b1": (256, 224),
    "efficientnet_lite3": (280, 300),
    "efficientnet_lite4": (300, 380),
}

#: The files that timm 0.6 downloaded, where the tag of today's default is another one.
FILES_OF_TIMM_06 = {
    "convnext_tiny": "convnext_tiny_1k_224_ema.pth",
    "efficientnet_b0": "tf_efficientnet_b0_aa-827b6e33.pth",
    "efficientnet_b5": "tf_efficientnet_b5_ra-9a3e5369.pth",
    "efficientnet_b8": "tf_efficientnet_b8_ra-572d5dd9.pth",
    "efficientnet_v2_s": "tf_efficientnetv2_s-eb54923e.pth",
    "ig_resnext101_32x16d": "ig_resnext101_32x16-c6f796b0.pth",
    "ig_resnext101_32x32d": "ig_resnext101_32x32-e4b90b00.pth",
    "pt_efficientnet_b1": "efficientnet_b1-533bc792.pth",
    "resmlp_12_224_dino": "resmlp_12_dino.pth",
    "resnet34": "resnet34-43635321.pth",
    "resnet50": "resnet50_a1_0-14fe96d1.pth",
    "resnext50_32x4d": "resnext50_32x4d_a1h-0146ab0a.pth",
    "seresnet50": "seresnet50_ra_224-8efdb4bb.pth",
    "swin_small_patch4_window7_224": "swin_small_patch4_window7_224.pth",
    "vit_base_patch16_224_miil": "vit_base_patch16_224_1k_miil_84_4-2deb18e3.pth",
    "wide_resnet50_2": "wide_resnet50_racm-8234f177.pth",
}


def pretrained_cfg(checkpoint):
    architecture, _, tag = checkpoint.partition(".")
    return _registry._model_default_cfgs[architecture].cfgs[tag]


def test_every_name_of_tfimm_is_in_one_table():
    tables = [set(CHECKPOINTS), set(WITHOUT_WEIGHTS), set(TORCH_FILES)]
    assert set().union(*tables) == set(tfimm.list_models())
    assert sum(map(len, tables)) == len(tfimm.list_models())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint_is_on_the_hub_and_fits_the_config(name):
    told = pretrained_cfg(CHECKPOINTS[name])
    architecture = CHECKPOINTS[name].partition(".")[0]
    # timm writes "timm/" for the repository of the architecture and tag.
    assert told.hf_hub_id in ("timm/", hub_id(name)), told
    assert CHECKPOINTS[name] in timm.list_pretrained(architecture + ".*")
    cfg = tfimm.models.model_config(name)
    assert told.num_classes == cfg.nb_classes
    sizes = (cfg.input_size[0], told.input_size[-1])
    assert sizes[0] == sizes[1] or OTHER_SIZES.get(name) == sizes


@pytest.mark.parametrize("name", FILES_OF_TIMM_06)
def test_checkpoint_is_the_file_that_the_name_stood_for(name):
    told = pretrained_cfg(CHECKPOINTS[name])
    assert told.url.rpartition("/")[2] == FILES_OF_TIMM_06[name]


def test_wrong_names_of_timm_itself_are_not_copied():
    renamed = _registry._deprecated_models
    for width in (16, 32):
        name = f"ig_resnext101_32x{width}d"
        assert renamed[name].startswith("resnext101_32x8d."), "timm has mended it"
        assert CHECKPOINTS[name].startswith(f"resnext101_32x{width}d.")
    assert renamed["mixer_b16_224_in21k"].endswith("in21k_ft_in1k"), "timm has mended it"
    assert CHECKPOINTS["mixer_b16_224_in21k"] == "mixer_b16_224.goog_in21k"


@pytest.mark.parametrize("name", WITHOUT_WEIGHTS)
def test_timm_has_no_weights_either(name):
    if name == "efficientnet_v2_b3":
        return  # see test_models.py
    if name == "ig_resnext101_32x48d":
        assert not timm.is_model("resnext101_32x48d")
        return
    known = _registry._model_default_cfgs
    architecture = name.removesuffix("_in21k")
    cfgs = [c for c in known[architecture].cfgs.values() if c.hf_hub_id]
    assert all(c.num_classes != tfimm.models.model_config(name).nb_classes for c in cfgs)


def test_weights_without_a_classifier_fit_as_the_message_says():
    name = "vit_base_r50_s16_224_in21k"
    assert "nb_classes=0 and representation_size=0" in WITHOUT_WEIGHTS[name]
    checkpoint = "vit_base_r50_s16_224.orig_in21k"
    assert checkpoint in WITHOUT_WEIGHTS[name]
    model = tfimm.create_model(name, nb_classes=0, representation_size=0)
    assert misfits(model, checkpoint) == []


def misfits(model, checkpoint):
    """Where the tensors of a timm model do not fit a tfimm model, by names and shapes."""
    told = pretrained_cfg(checkpoint)
    with torch.device("meta"):
        theirs = timm.create_model(checkpoint.partition(".")[0], num_classes=told.num_classes)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    layout = find_layout(shapes)
    shapes = {(layout.rename(k) if layout else k): shape for k, shape in shapes.items()}
    problems, taken = [], set()
    for wanted in checkpoint_variables(model):
        key = next((key for key in wanted.keys if key in shapes), None)
        taken.add(key)
        if key is None or not fits(shapes[key], wanted):
            problems.append((wanted.name, expected_shape(wanted), shapes.get(key)))
    problems += [k for k in shapes if k not in taken and not is_ignored_in_checkpoint(k)]
    return problems


def main(names):
    """Check names and shapes of every entry: half an hour and 8 GB, so not a test.

    TF_USE_LEGACY_KERAS=1 python -m tests.interop.test_names [NAME ...]
    """
    import tf_keras

    for name in names or CHECKPOINTS:
        found = misfits(tfimm.create_model(name), CHECKPOINTS[name])
        tf_keras.backend.clear_session()
        print(name, CHECKPOINTS[name], found if found else "fits", flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
