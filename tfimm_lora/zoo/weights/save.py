"""``save_timm_weights``: write a model's weights as a checkpoint of timm or transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.families.family import TIMM, V4
from tfimm_lora.families.recognize import Naming, lacked_by_timm
from tfimm_lora.model.merge import has_lora
from tfimm_lora.utils.atomic_files import write_file
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.zoo.weights.checkpoint import CONFIG, WEIGHTS
from tfimm_lora.zoo.weights.load import PREPROCESSING_FIELDS
from tfimm_lora.zoo.weights.module_names import ModuleNames
from tfimm_lora.zoo.weights.positions import is_resized
from tfimm_lora.zoo.weights.renamed import renamed_weights

#: The number of weights that an error message lists.
_MAX_LISTED = 20


def save_timm_weights(model: Any, path: str | os.PathLike[str], *, names: str = "timm") -> None:
    """Save the weights of a model as a checkpoint of timm or transformers.

    Weights that timm does not have, such as DINOv2's mask token, which only pretraining uses,
    are not in its checkpoints. The checkpoint can be loaded with ``load_timm_weights`` into the
    model of the same architecture on either Keras, and into timm's or transformers' model.
    Neither torch nor timm is needed.

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
        NotADirectoryError: If the path is a file.

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
    tensors = _renamed(own, names)
    from safetensors.numpy import save

    content = save(
        {key: np.ascontiguousarray(x) for key, x in tensors.items()}, {"format": "pt"}
    )
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"Received path={str(path)!r}, a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS, content)
    config = _timm_config(model) if names == "timm" else None
    if config is not None:
        write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _renamed(own: ModuleNames, library: str) -> dict[str, np.ndarray]:
    """Return the weights of a model with the names and shapes of a library."""
    computed = {x.key for x in own.weights if is_resized(x.target.name)}
    weights = {x.key: x.value() for x in own.weights if x.key not in computed}
    if own.is_tfimm and library == "timm":
        return weights
    source = own.naming
    internal = V4 if library == "transformers" else TIMM
    if source is None or internal not in source.family.libraries:
        reason = (
            "which is of no family whose names are known"
            if source is None
            else f"and family '{source.family.name}' has no names there"
        )
        raise ValueError(
            f"Received names={library!r} for model '{own.model.name}' "
            f"({type(own.model).__name__}), {reason}. "
            "docs/reference/names.md lists the families. Save it with model.save_weights."
        )
    backbone = next(iter(source.family.transformers.values()), "")
    prefix = f"{backbone}." if backbone and library == "transformers" else ""
    target = Naming(source.family, internal, prefix, depths=source.depths)
    if library == "timm":
        weights = {key: x for key, x in weights.items() if not lacked_by_timm(source, key)}
    problems: list[str] = []
    renamed = renamed_weights(weights, source, target, problems, None)
    if source.family.patch_positions and library == "timm":
        # timm adds no position to the class token, so it is in the token itself.
        positions = renamed["pos_embed"]
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:]
    if problems:
        more = len(problems) - _MAX_LISTED
        raise ValueError(
            f"Received names={library!r} for model '{own.model.name}', some of whose weights "
            f"have no name or another shape there: {'; '.join(problems[:_MAX_LISTED])}"
            f"{f'; and {more} more' if more > 0 else ''}. Save it with model.save_weights."
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
