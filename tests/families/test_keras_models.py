"""Keras models of the convolutional families: their names in timm, and their adapters there."""

import json
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, keras, normal, randomise, run
from tests.helpers.selection import nightly_except
from tfimm_lora.adapters.model_names import in_library
from tfimm_lora.model.naming import timm_view
from tfimm_lora.zoo.weights.module_names import ModuleNames

if LEGACY:
    pytest.skip("keras_hub needs Keras 3", allow_module_level=True)

NAMES = json.loads((Path(__file__).parents[1] / "golden" / "names.json").read_text())["timm"]
CLASSES = 3
_SIZE = (32, 32, 3)


def application(name, **arguments):
    return lambda: getattr(keras.applications, name)(
        weights=None, classes=CLASSES, input_shape=_SIZE, **arguments
    )


def convnext():
    from keras.src.applications.convnext import ConvNeXt

    return ConvNeXt(
        depths=(1, 1, 2, 1),
        projection_dims=(8, 16, 16, 24),
        weights=None,
        classes=CLASSES,
        input_shape=_SIZE,
        name="convnext_tiny",
    )


def efficientnet():
    from keras.src.applications.efficientnet import EfficientNet

    return EfficientNet(
        0.25, 1.0, 32, weights=None, classes=CLASSES, input_shape=_SIZE, name="efficientnetb0"
    )


def efficientnet_b1():
    from keras.src.applications.efficientnet import EfficientNet

    return EfficientNet(
        0.25, 1.1, 32, weights=None, classes=CLASSES, input_shape=_SIZE, name="efficientnetb1"
    )


def efficientnet_v2():
    from keras.src.applications.efficientnet_v2 import EfficientNetV2

    return EfficientNetV2(
        0.25,
        1.0,
        32,
        weights=None,
        classes=CLASSES,
        input_shape=_SIZE,
        name="efficientnetv2-b0",
    )


def hub(name, task=True, **arguments):
    def make():
        models = pytest.importorskip("keras_hub").models
        backbone = getattr(models, f"{name}Backbone")(image_shape=_SIZE, **arguments)
        if not task:
            return backbone
        return getattr(models, f"{name}ImageClassifier")(backbone, num_classes=CLASSES)

    return make


def _resnet(blocks, block="bottleneck_block", deep=False, **arguments):
    return hub(
        "ResNet",
        input_conv_filters=[8, 8, 64] if deep else [64],
        input_conv_kernel_sizes=[3, 3, 3] if deep else [7],
        stackwise_num_filters=[64, 8, 8, 16],
        stackwise_num_blocks=blocks,
        stackwise_num_strides=[1, 2, 2, 2],
        block_type=block,
        **arguments,
    )


def _efficientnet(**arguments):
    stages = len(arguments["stackwise_num_repeats"])
    return hub(
        "EfficientNet",
        stackwise_width_coefficients=[0.25] * stages,
        stackwise_depth_coefficients=[1.0] * stages,
        stackwise_force_input_filters=[0] * stages,
        stackwise_nores_option=[False] * stages,
        stackwise_kernel_sizes=[3] * stages,
        stackwise_strides=[1] * stages,
        stackwise_input_filters=[16] * stages,
        stackwise_output_filters=[16] * stages,
        num_features=16,
        **arguments,
    )


def mobilenet_hub():
    from keras_hub.src.utils.timm.convert_mobilenet import convert_backbone_config

    config = convert_backbone_config({"architecture": "mobilenetv3_small_100"})
    return hub("MobileNet", **config)()


#: The model, and timm's model with the same modules, or None if there is no such model.
MODELS = {
    "convnext": (convnext, None),
    "efficientnet": (efficientnet, "tf_efficientnet_b0"),
    "efficientnet_b1": (efficientnet_b1, "tf_efficientnet_b1"),
    "efficientnet_v2": (efficientnet_v2, "tf_efficientnetv2_b0"),
    "mobilenet": (application("MobileNet", alpha=0.25), "mobilenetv1_100"),
    "mobilenet_v2": (application("MobileNetV2", alpha=0.35), "mobilenetv2_100"),
    "mobilenet_v3": (application("MobileNetV3Small", alpha=0.75), "mobilenetv3_small_100"),
    "mobilenet_v3_large": (
        application("MobileNetV3Large", alpha=0.75),
        "mobilenetv3_large_100",
    ),
    "hub_resnet18": (_resnet([2, 2, 2, 2], "basic_block"), "resnet18"),
    "hub_resnet50": (_resnet([3, 4, 6, 3]), "resnet50"),
    "hub_resnet50d": (_resnet([3, 4, 6, 3], "bottleneck_block_vd", True), "resnet50d"),
    "hub_resnetv2_50": (_resnet([3, 4, 6, 3], use_pre_activation=True), "resnetv2_50"),
    "hub_efficientnet_lite0": (
        _efficientnet(
            stackwise_num_repeats=[1, 2, 2, 3, 3, 4, 1],
            stackwise_expansion_ratios=[1, *[6] * 6],
            stackwise_squeeze_and_excite_ratios=[0] * 7,
            stackwise_block_types=["v1"] * 7,
        ),
        "efficientnet_lite0",
    ),
    "hub_efficientnet_es": (
        _efficientnet(
            stackwise_num_repeats=[1, 2, 4, 5, 4, 2],
            stackwise_expansion_ratios=[4] * 6,
            stackwise_squeeze_and_excite_ratios=[0] * 6,
            stackwise_block_types=["fused"] * 3 + ["unfused"] * 3,
        ),
        "efficientnet_es",
    ),
    "hub_efficientnetv2_rw_t": (
        _efficientnet(
            stackwise_num_repeats=[2, 4, 4, 6, 9, 14],
            stackwise_expansion_ratios=[1, 4, 4, 4, 6, 6],
            stackwise_squeeze_and_excite_ratios=[0, 0, 0, 0.25, 0.25, 0.25],
            stackwise_block_types=["cba"] + ["fused"] * 2 + ["unfused"] * 3,
        ),
        "efficientnetv2_rw_t",
    ),
    "hub_mobilenet_v3": (mobilenet_hub, "mobilenetv3_small_100"),
    "hub_vgg16": (
        hub(
            "VGG",
            task=False,
            stackwise_num_repeats=[2, 2, 3, 3, 3],
            stackwise_num_filters=[4, 4, 8, 8, 8],
        ),
        "vgg16",
    ),
    "hub_densenet121": (
        hub("DenseNet", stackwise_num_repeats=[6, 12, 24, 16], growth_rate=4),
        "densenet121",
    ),
}

#: Small enough to train and run often.
SMALL = {
    "convnext": convnext,
    "efficientnet": efficientnet,
    "mobilenet_v2": MODELS["mobilenet_v2"][0],
    "mobilenet_v3": MODELS["mobilenet_v3"][0],
    "hub_resnet": _resnet([2, 1, 1, 1]),
    "hub_vgg": hub(
        "VGG",
        task=False,
        stackwise_num_repeats=[1, 1, 2, 2, 2],
        stackwise_num_filters=[4, 4, 8, 8, 8],
    ),
    "hub_densenet": hub("DenseNet", stackwise_num_repeats=[2, 1, 1], growth_rate=4),
}
LIBRARIES = {
    name: ["timm", "transformers"]
    for name in ("convnext", "efficientnet", "mobilenet_v2", "hub_resnet")
}


@pytest.mark.parametrize("name", MODELS)
def test_every_variable_has_a_name_in_timm_one_to_one(name):
    make, timm = MODELS[name]
    names = ModuleNames(make())
    found = {}
    for weight in names.weights:
        if type(weight.layer).__name__ == "Normalization":
            continue  # preprocessing
        translated = names.naming.to_timm(weight.key, is_weight=True)
        assert translated is not None, weight.key
        assert translated not in found, (weight.key, found[translated])
        assert names.naming.from_timm(translated, is_weight=True) == weight.key
        found[translated] = weight.key
    if timm:
        modules = {key.name.rpartition(".")[0] for key in found}
        extra = ("pre_logits.fc1", "pre_logits.fc2", "head.fc") if name == "hub_vgg16" else ()
        assert modules == set(NAMES[timm]) - set(extra)


#: The last parts of timm's names of the layers that are adapted by default.
LEAVES = {
    "convnext": "fc1 fc2",
    "efficientnet": "conv_pw conv_pwl conv_head",
    "mobilenet_v2": "conv_pw conv_pwl conv_head",
    "mobilenet_v3": "conv conv_pw conv_pwl conv_head",
    "hub_resnet": "conv1 conv2 conv3",
    "hub_vgg": "3 6 8 11 13 16 18",
    "hub_densenet": "conv conv1 conv2",
}


@pytest.mark.parametrize("name", SMALL)
def test_the_default_targets_are_those_of_the_family(name):
    model = lora.inject_lora(SMALL[name](), lora_rank=2)
    names = ModuleNames(model)
    adapted = {names.naming.to_timm(names.modules[path]).name for path in names.adapted()}
    assert {name.rpartition(".")[2] for name in adapted} == set(LEAVES[name].split())
    assert not {"conv1", "conv_stem", "features.0", "features.conv0"} & adapted


@pytest.mark.backends
@pytest.mark.parametrize("variant", nightly_except(["plain", "dora"], ["dora"]))
@pytest.mark.parametrize("name", SMALL)
def test_an_adapter_in_the_names_of_another_library_is_the_same(name, variant, tmp_path):
    make = SMALL[name]
    model = make()
    initial = [np.asarray(w) for w in model.get_weights()]
    head = [n for n in ("predictions", "head_dense", "logits") if _has(model, n)]
    is_dora = variant == "dora"
    arguments = dict(lora_rank=2, lora_use_dora=is_dora, lora_train_modules=tuple(head))
    lora.inject_lora(model, **arguments)
    randomise(model)
    for weight in model.trainable_weights:
        if "lora" not in weight.name:
            weight.assign(normal(*weight.shape, seed=5) * 0.1)
    x = normal(2, *_SIZE)
    expected = run(model, x)
    for library in LIBRARIES.get(name, ["timm"]):
        lora.save_adapter(model, tmp_path / library, names=library)
        kinds = {u.kind for u in lora.Adapter.load(tmp_path / library).layers.values()}
        assert kinds <= {"linear", "conv"}
        fresh = make()
        fresh.set_weights(initial)
        lora.load_adapter(fresh, tmp_path / library)
        np.testing.assert_allclose(run(fresh, x), expected, rtol=1e-5, atol=1e-6)


def _has(model, name):
    return any(layer.name == name for layer in model.layers)


def test_shapes_are_those_of_the_other_library():
    model = SMALL["mobilenet_v3"]()
    lora.inject_lora(model, lora_rank=2, lora_targets=["logits", "conv_2"])
    randomise(model)
    there = in_library(ModuleNames(model), lora.adapter_of(model), "timm", None, None)
    classifier, head = there.layers["classifier"], there.layers["conv_head"]
    assert classifier.kind == "linear" and classifier.a.ndim == classifier.b.ndim == 2
    assert head.kind == "conv" and head.a.shape[2:] == (1, 1)


def test_resnets_of_keras_applications_are_not_those_of_timm():
    model = keras.applications.ResNet50(weights=None, classes=CLASSES, input_shape=_SIZE)
    assert timm_view(model) is None


def test_a_few_layers_of_the_same_names_are_no_family():
    model = keras.Sequential(
        [
            keras.Input(_SIZE),
            keras.layers.Conv2D(4, 3, name="conv_pw_1"),
            keras.layers.Conv2D(4, 3, name="conv_pw_2"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(3, name="conv_preds"),
        ]
    )
    assert timm_view(model) is None
