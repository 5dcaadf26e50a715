"""``save_timm_weights``: write a model's weights as a checkpoint of timm or transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.families.family import V4
from tfimm_lora.families.recognize import Naming
from tfimm_lora.families.templates import Name
from tfimm_lora.layers.qkv import LAYOUTS
from tfimm_lora.model.merge import has_lora
from tfimm_lora.utils.atomic_files import write_file
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.zoo.weights.checkpoint import CONFIG, WEIGHTS
from tfimm_lora.zoo.weights.load import PREPROCESSING_FIELDS
from tfimm_lora.zoo.weights.module_names import ModuleNames

#: Weights that timm and transformers hold with axes (1, tokens, width).
_TOKENS = ("cls_token", "dist_token", "reg_token", "pos_embed")


def save_timm_weights(model: Any, path: str | os.PathLike[str], *, names: str = "timm") -> None:
    """Save the weights of a model as a checkpoint of timm or transformers.

    The checkpoint can be loaded with ``load_timm_weights`` into the model of the same
    architecture on either Keras, and into timm's or transformers' model. Neither torch nor timm
    is needed.

    Args:
        model: A built model of tfimm, or a model of Keras 3 whose family is in
            docs/reference/names.md, without LoRA.
        path: The folder; created if missing. ``model.safetensors`` in it is replaced, and for
            timm also ``config.json`` with the architecture and the preprocessing, if the model
            has a timm name.
        names: "timm" (default) or "transformers", whose checkpoints of both versions have the
            same names. Write the config of a transformers model yourself.

    Raises:
        ImportError: If safetensors is not installed.
        ValueError: If the model has LoRA, is not built, is of no family whose names are known,
            or has weights that the library does not have; the message names all of them.
            Nothing is written.

    Example:
        >>> import os, tempfile, tfimm_lora as lora
        >>> model = lora.convert_to_regular_model(lora.create_model("resnet18", lora_rank=2))
        >>> folder = tempfile.mkdtemp()
        >>> lora.save_timm_weights(model, folder)
        >>> sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    require("safetensors", extra="weights", why="Saving timm weights")
    if names not in ("timm", "transformers"):
        raise ValueError(f"Received names={names!r}; expected 'timm' or 'transformers'.")
    if has_lora(model):
        raise ValueError(
            f"Received model '{model.name}', which has LoRA; expected an ordinary model, since "
            "checkpoints do not hold an adapter. Call convert_to_regular_model first, which "
            "merges it, or save the adapter with save_adapter."
        )
    own = ModuleNames(model)
    tensors = _in_timm(own)
    if names == "transformers":
        tensors = _in_transformers(own, tensors)
    from safetensors.numpy import save

    content = save(
        {key: np.ascontiguousarray(x) for key, x in tensors.items()}, {"format": "pt"}
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, content)
    config = _timm_config(model) if names == "timm" else None
    if config is not None:
        write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _in_timm(own: ModuleNames) -> dict[str, np.ndarray]:
    """Return the weights of a model with timm's current names and shapes."""
    if not own.is_tfimm and own.naming is None:
        raise ValueError(
            f"Received model '{own.model.name}' ({type(own.model).__name__}), which is of no "
            "family whose names in timm are known. Save it with model.save_weights."
        )
    parts: dict[str, dict[str | None, np.ndarray]] = {}
    unknown = []
    for weight in own.weights:
        names = own.timm_names(weight)
        value = weight.value()
        if not names:
            unknown.append(weight.key)
            continue
        if names[0].name.rpartition(".")[2] in _TOKENS and value.ndim < 3:
            value = value.reshape(1, *(1 for _ in range(2 - value.ndim)), *value.shape)
        parts.setdefault(names[0].name, {})[names[0].block] = value
    if unknown:
        raise ValueError(
            f"Received model '{own.model.name}', whose weights {', '.join(unknown[:20])} have "
            "no name in timm. Save it with model.save_weights."
        )
    return {name: _joined(name, found) for name, found in parts.items()}


def _joined(name: str, parts: dict[str | None, np.ndarray]) -> np.ndarray:
    """Return a weight from its blocks."""
    if None in parts:
        return parts[None]
    layout = LAYOUTS[name.rpartition(".")[0].rpartition(".")[2]]
    joined: np.ndarray = np.concatenate([parts[block] for block in layout])
    return joined


def _in_transformers(own: ModuleNames, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return weights with the names that checkpoints of transformers have."""
    family = own.naming.family if own.naming is not None else None
    if family is None or V4 not in family.libraries():
        raise ValueError(
            f"Received names='transformers' for model '{own.model.name}', whose family has no "
            "names there. Use names='timm'."
        )
    backbone = next(iter(family.transformers.values()), "")
    target = Naming(family, V4, f"{backbone}." if backbone else "")
    renamed, unknown = {}, []
    for key, value in tensors.items():
        layout = LAYOUTS.get(key.rpartition(".")[0].rpartition(".")[2], "")
        if layout and target.from_timm(Name(key, layout[0]), True) is not None:
            blocks = {Name(key, x): y for x, y in zip(layout, np.split(value, len(layout)))}
        else:
            blocks = {Name(key): value}
        for name, block in blocks.items():
            found = target.from_timm(name, True)
            if found is None:
                unknown.append(str(name))
            else:
                renamed[found] = block
    if unknown:
        raise ValueError(
            f"Received names='transformers' for model '{own.model.name}', whose weights "
            f"{', '.join(unknown[:20])} have no name there. Use names='timm'."
        )
    return renamed


def _timm_config(model: Any) -> dict[str, Any] | None:
    """Return the config.json of timm, or None if the model has no timm name."""
    cfg = getattr(model, "cfg", None)
    name = getattr(cfg, "name", "")
    if not name:
        return None
    classes = getattr(cfg, "nb_classes", None)
    fields = {x: getattr(cfg, x) for x in PREPROCESSING_FIELDS if hasattr(cfg, x)}
    size = getattr(cfg, "input_size", None)
    if size is not None:
        fields["input_size"] = [getattr(cfg, "in_channels", 3), *size]
    fields["num_classes"] = classes
    plain = {key: list(x) if isinstance(x, tuple) else x for key, x in fields.items()}
    return {"architecture": name, "num_classes": classes, "pretrained_cfg": plain}
