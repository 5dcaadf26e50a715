"""Making and loading the models of a folder, and running them, in this process's version."""

import tests.interop  # isort: skip # noqa: F401 (makes timm importable beside CPU torch)

import json
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.interop.hugging_face.models import CLASSES, MODELS

# Tests run side by side.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Backbone(nn.Module):
    """A module of the user's with a timm model as backbone and a classifier of its own."""

    def __init__(self, architecture, model_args):
        super().__init__()
        self.fields = dict(architecture=architecture, model_args=model_args)
        self.backbone = timm.create_model(architecture, num_classes=0, **model_args)
        self.classifier = nn.Linear(self.backbone.num_features, CLASSES)

    def forward(self, pixel_values):
        return self.classifier(self.backbone(pixel_values))

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / "model.safetensors")
        (Path(folder) / "backbone.json").write_text(json.dumps(self.fields))


def new_model(name):
    """An initialized model of the table, or None where this version does not have it."""
    small = MODELS[name]
    if small.architecture == "Backbone":
        return Backbone(**small.config)
    cls = getattr(transformers, small.architecture, None)
    if cls is None:
        return None
    labels = {i: f"label {i}" for i in range(CLASSES)}
    config = cls.config_class(
        id2label=labels, label2id={v: k for k, v in labels.items()}, **small.config
    )
    return cls(config)


def load_model(folder, features=False):
    """The model of a folder in inference mode; with `features` without its classifier."""
    folder = Path(folder)
    if (folder / "backbone.json").exists():
        model = Backbone(**json.loads((folder / "backbone.json").read_text()))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
    config = json.loads((folder / "config.json").read_text())
    if features:
        # AutoModel of a model of text and images wants both.
        towers = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}
        cls = getattr(transformers, towers.get(config["model_type"], "AutoModel"))
        return cls.from_pretrained(folder).eval()
    architecture = config["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(
        folder, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(kind):
            raise AssertionError(f"{folder}: {kind} {info[kind]}")
    return model.eval()


def load_adapted(model_folder, adapter_folder, trainable=False):
    """The model with the adapter. PEFT must load every key of it and lack none."""
    config = json.loads((Path(adapter_folder) / "adapter_config.json").read_text())
    model = load_model(model_folder, config.get("task_type") == "FEATURE_EXTRACTION")
    results = []

    def load_adapter(self, *args, **kwargs):
        results.append(load(self, *args, **kwargs))
        return results[-1]

    load = peft.PeftModel.load_adapter
    with (
        mock.patch.object(peft.PeftModel, "load_adapter", load_adapter),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", UserWarning)
        adapted = peft.PeftModel.from_pretrained(model, adapter_folder, is_trainable=trainable)
    (result,) = results
    # PEFT reports the base's weights as missing, too.
    missing = [k for k in result.missing_keys if ".default" in k]
    if result.unexpected_keys or missing:
        raise AssertionError(
            f"{adapter_folder}: missing {missing}, unexpected {result.unexpected_keys}"
        )
    return adapted.eval()


@torch.no_grad()
def run(model, pixels):
    """The logits, or the last hidden state of a model without a classifier."""
    if isinstance(model, peft.PeftModel):
        # PEFT's model for feature extraction would give `input_ids`, too.
        model = model.base_model
    output = model(pixel_values=torch.from_numpy(np.ascontiguousarray(pixels)))
    if not isinstance(output, torch.Tensor):
        logits = getattr(output, "logits", None)
        output = output.last_hidden_state if logits is None else logits
    return output.numpy()
