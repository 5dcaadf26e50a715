"""Write names.json: the names of the modules with weights in timm and transformers.

The models are on torch's meta device, which needs no memory. Run it with timm and
transformers: python -m tests.golden.make_names
"""

import tests.interop  # isort: skip # noqa: F401 (makes timm importable beside CPU torch)

import json
from pathlib import Path

import timm
import torch
import transformers

TIMM = (
    "convnext_tiny",
    "convnextv2_atto",
    "densenet121",
    "efficientnet_es",
    "efficientnet_lite0",
    "efficientnetv2_rw_t",
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "resnet18",
    "resnet50",
    "resnet50d",
    "resnetv2_50",
    "seresnet50",
    "tf_efficientnet_b0",
    "tf_efficientnet_b1",
    "tf_efficientnetv2_b0",
    "vgg11_bn",
    "vgg16",
)

#: timm's model -> the class of the same model in transformers, and its config.
TRANSFORMERS = {
    "convnext_tiny": ("ConvNextForImageClassification", {}),
    "convnextv2_atto": (
        "ConvNextV2ForImageClassification",
        dict(hidden_sizes=[40, 80, 160, 320], depths=[2, 2, 6, 2]),
    ),
    "mobilenetv1_100": ("MobileNetV1ForImageClassification", {}),
    "mobilenetv2_100": ("MobileNetV2ForImageClassification", {}),
    "resnet50": ("ResNetForImageClassification", {}),
    "resnet18": (
        "ResNetForImageClassification",
        dict(layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]),
    ),
    "tf_efficientnet_b0": (
        "EfficientNetForImageClassification",
        dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    ),
    "tf_efficientnet_b1": (
        "EfficientNetForImageClassification",
        dict(width_coefficient=1.0, depth_coefficient=1.1, hidden_dim=1280),
    ),
}


def modules(model):
    """The modules with weights of their own, and the weights outside of such modules."""
    keys = [key for key in model.state_dict() if not key.endswith("num_batches_tracked")]
    leaves = ("weight", "bias", "running_mean", "running_var")
    names = (k.rpartition(".")[0] if k.rpartition(".")[2] in leaves else k for k in keys)
    return list(dict.fromkeys(names))


def main():
    names = {"timm": {}, "transformers": {}}
    with torch.device("meta"):
        for name in TIMM:
            names["timm"][name] = modules(timm.create_model(name))
        for name, (cls, config) in TRANSFORMERS.items():
            made = getattr(transformers, cls)
            model = made(made.config_class(**config))
            names["transformers"][name] = modules(model)
    path = Path(__file__).with_name("names.json")
    path.write_text(json.dumps(names, indent=0) + "\n")


if __name__ == "__main__":
    main()
