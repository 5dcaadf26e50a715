"""``load_timm_weights``: load a checkpoint of timm or transformers into a model."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfimm_lora.backend import backend_of
from tfimm_lora.families.family import TIMM
from tfimm_lora.families.recognize import Naming, explanation, lacked_by_timm
from tfimm_lora.families.templates import Name
from tfimm_lora.layers.base import LoRALayer
from tfimm_lora.model.classifier import classifier_paths
from tfimm_lora.model.state import record_base_name, record_class_names
from tfimm_lora.zoo.weights.checkpoint import Checkpoint, find_checkpoint
from tfimm_lora.zoo.weights.image_processor import of_transformers
from tfimm_lora.zoo.weights.key_layouts import LAYOUTS, Layout
from tfimm_lora.zoo.weights.keys import (
    CheckpointVariable,
    checkpoint_variables,
    expected_shape,
    fits,
    is_ignored_in_checkpoint,
    to_keras,
)
from tfimm_lora.zoo.weights.labels import labels_of
from tfimm_lora.zoo.weights.module_names import ModuleNames
from tfimm_lora.zoo.weights.named_tensors import NamedTensors
from tfimm_lora.zoo.weights.positions import compute_positions, is_resized
from tfimm_lora.zoo.weights.tensor_files import FLOATS, Tensors
from tfimm_lora.zoo.weights.windows import as_window

#: The fields of a checkpoint's config.json about preprocessing.
PREPROCESSING_FIELDS = ("mean", "std", "crop_pct", "interpolation")


def load_timm_weights(
    model: Any,
    source: str | os.PathLike[str],
    *,
    weights_to_ignore: Sequence[str] | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> Any:
    """Load a checkpoint of timm or transformers into a model, in place.

    The model is of tfimm, its LoRA version, or a model of keras_hub or keras.applications whose
    family is in docs/reference/names.md. Neither torch nor timm is needed. Both key layouts of
    timm (before and since 0.9) and the names of transformers are supported and recognized by
    their keys, with separate query, key and value projections where the model has a fused one,
    and the reverse. Every tensor is accounted for: either all weights of the model are loaded,
    or none. LoRA factors are not in a checkpoint and are kept.

    PoolFormer's weights were trained by its authors with normalization before pooling, as in
    tfimm. timm pools first since version 0.9, so its logits differ from tfimm's
    (docs/how-to/pretrained-weights.md).

    Args:
        model: A built model.
        source: A safetensors file; a torch file (.pth, .pt or .bin), which is read without
            torch and without executing its pickle; a folder with ``model.safetensors`` (or
            its index, if it is in several files); or the hub id of such a repository, for
            example "timm/convnext_tiny.fb_in1k", which is downloaded once to the cache of
            huggingface_hub. A ``config.json`` (timm) or ``preprocessor_config.json``
            (transformers) beside the weights sets mean, std, crop_pct and interpolation of
            ``model.cfg``, for ``create_preprocessing``. The names of the classes in it are
            returned by ``class_names``.
        weights_to_ignore: Regular expressions, searched for in the names of the model's
            weights ("blocks/0/mlp/fc1/kernel"). Weights that match are not loaded. Also in the
            keys of tensors that the model does not have: "^text_model" for the text encoder
            beside that of CLIP's images. Default: none.
        revision: Branch, tag or commit of a hub repository. Default: its main branch.
        cache_dir: Folder for downloads. Default: the cache of huggingface_hub (HF_HOME).

    Returns:
        The same model.

    Raises:
        ImportError: If safetensors, or huggingface_hub for a hub id, is not installed. Torch
            files need neither.
        FileNotFoundError: If the file, the repository, the revision or a file in it does not
            exist, or if it is not cached and HF_HUB_OFFLINE is set.
        PermissionError: If the repository needs a token.
        ConnectionError: If the hub cannot be reached or the download is interrupted.
        ValueError: If weights are missing, unexpected or of another shape; the message names
            all of them. Also if the file is damaged, the model is not built, or its LoRA is
            merged. The model is unchanged.

    Example:
        >>> import os, tempfile, tensorflow as tf, tfimm_lora as lora
        >>> from safetensors.numpy import save_file
        >>> import numpy as np
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((3,)), tf.keras.layers.Dense(2, name="fc")])
        >>> path = os.path.join(tempfile.mkdtemp(), "timm.safetensors")
        >>> save_file({"fc.weight": np.ones((2, 3), "float32"),
        ...            "fc.bias": np.zeros(2, "float32")}, path)
        >>> _ = lora.load_timm_weights(model, path)
        >>> model.layers[-1](np.ones((1, 3), "float32")).numpy().tolist()
        [[3.0, 3.0]]
    """
    _check_model(model)
    checkpoint = find_checkpoint(source, revision, cache_dir)
    with Tensors(checkpoint.files) as tensors:
        names = ModuleNames(model)
        layout = names.layout or _layout_of(names.naming)
        family = names.naming.family if names.naming is not None else None
        named = NamedTensors(tensors, family, layout)
        matches = _match(names, named, tensors, checkpoint, weights_to_ignore or ())
        # All are read before any is assigned: reading may still fail.
        values = [
            to_keras(_in_window(named.read(match.name), match.window), match.target)
            for match in matches
        ]
    backend = backend_of(model)
    for match, value in zip(matches, values):
        variable = match.target.variable
        variable.assign(value.astype(backend.to_numpy(variable).dtype))
    compute_positions(model)
    _copy_preprocessing(model, checkpoint)
    record_class_names(model, labels_of(checkpoint.config))
    # A local path has the name of the file, without the folders of this machine.
    on_disk = Path(checkpoint.source).expanduser().exists()
    record_base_name(model, Path(checkpoint.source).name if on_disk else checkpoint.source)
    return model


def _layout_of(naming: Naming | None) -> Layout | None:
    """Return timm's current key layout of a family, if timm changed it."""
    tfimm = naming.family.tfimm if naming is not None else ""
    return next((layout for layout in LAYOUTS if layout.architecture == tfimm), None)


class _Match(NamedTuple):
    target: CheckpointVariable
    name: Name
    window: int | None


def _in_window(value: np.ndarray, size: int | None) -> np.ndarray:
    return value if size is None else as_window(value, size)


def _window_of(
    target: CheckpointVariable, names: ModuleNames, found: Name | None
) -> int | None:
    """Return the size of the window of a module that is linear in some libraries, else None."""
    module, _, leaf = ("" if found is None else found.name).rpartition(".")
    if leaf != "weight" or names.naming is None or names.naming.names.window(module) is None:
        return None
    shape = expected_shape(target)
    return shape[-1] if len(shape) > 2 else 0


def _check_model(model: Any) -> None:
    if not any(True for _ in checkpoint_variables(model)):
        raise ValueError(
            f"Received model '{model.name}', which has no weights yet; expected a built model. "
            "Call it on an input first: model(model.dummy_inputs)."
        )
    merged = [
        path
        for path, layer in backend_of(model).walk(model)
        if isinstance(layer, LoRALayer) and layer.merged
    ]
    if merged:
        raise ValueError(
            f"Received model '{model.name}', whose LoRA layers are merged ({merged[0]}, ...); "
            "expected an unmerged model, since loading would mix old updates with new weights. "
            "Call unmerge_lora_weights first."
        )


def _match(
    names: ModuleNames,
    named: NamedTensors,
    tensors: Tensors,
    checkpoint: Checkpoint,
    patterns: Sequence[str],
) -> list[_Match]:
    """Match variables with tensors, or raise one error that names all that do not fit."""
    matches, problems, classifier = [], [], False
    taken: set[Name] = set()
    heads = classifier_paths(names.model)
    for weight in names.weights:
        target, wanted = weight.target, names.timm_names(weight)
        if is_resized(target.name):
            continue
        found = next((name for name in wanted if named.sources(name)), None)
        taken.update(named.sources(found) if found is not None else ())
        name = target.name
        own = f"{weight.path}/{name.rpartition('/')[2]}" if weight.path else name
        if any(re.search(pattern, own) for pattern in patterns):
            continue
        if found is None and type(weight.layer).__name__ == "Normalization":
            continue  # preprocessing in a model of keras.applications
        if found is None and _is_not_in_timm(weight.key, names.naming, named.naming):
            continue  # such as the mask token of DINOv2, which only pretraining uses
        window = _window_of(target, names, found)
        problem = _problem(target, own, wanted, found, named, window)
        if problem is None and found is not None:
            matches.append(_Match(target, found, window))
            continue
        problems.append(problem)
        classifier |= weight.path in heads
    unexpected = [key for name, key in named.keys().items() if name not in taken]
    problems += [
        f"unexpected: {key} of shape {tensors.shapes[key]}"
        for key in dict.fromkeys([*named.unknown, *unexpected])
        if not any(re.search(pattern, key) for pattern in patterns)
    ]
    if problems:
        raise ValueError(
            _message(names, checkpoint, named, tensors, problems, heads if classifier else [])
        )
    return matches


def _is_not_in_timm(key: str, model: Naming | None, file: Naming | None) -> bool:
    """Whether a file of timm lacks a weight because timm has no such weight."""
    of_timm = file is None or file.library == TIMM
    return of_timm and model is not None and lacked_by_timm(model, key)


def _problem(
    target: CheckpointVariable,
    own: str,
    wanted: list[Name],
    found: Name | None,
    named: NamedTensors,
    window: int | None,
) -> str | None:
    if found is None:
        key = wanted[0] if wanted else "a tensor that has a name in timm"
        return f"missing: {key} for {own} {tuple(target.variable.shape)}"
    shape = named.shape(found)
    if shape is None or not fits(_shape_in_window(shape, window), target):
        return (
            f"wrong shape: {named.key(named.sources(found)[0])} has {shape}, {own} "
            f"expects {expected_shape(target)} (in torch's order of axes)"
        )
    wrong = named.wrong_type(found)
    if wrong:
        key = named.key(named.sources(found)[0])
        return f"wrong type: {key} is {wrong}, expected one of {FLOATS}"
    return None


def _shape_in_window(shape: tuple[int, ...], size: int | None) -> tuple[int, ...]:
    try:
        return shape if size is None else as_window(np.empty(shape, "bool"), size).shape
    except ValueError:
        return shape


def _message(
    names: ModuleNames,
    checkpoint: Checkpoint,
    named: NamedTensors,
    tensors: Tensors,
    problems: Sequence[str | None],
    heads: list[str],
) -> str:
    model, architecture = names.model, checkpoint.config.get("architecture")
    keys = [key for key in tensors.shapes if not is_ignored_in_checkpoint(key)]
    hint = architecture if isinstance(architecture, str) else ""
    translated = named.naming is not None and 2 * len(named.unknown) < len(keys)
    translated &= names.naming is not None
    whose = ""
    if not translated:
        whose = explanation(keys, names.naming, hint=hint, is_weight=True)
    of = f" (config.json of the architecture {architecture!r})" if architecture else ""
    if named.naming is not None and translated:
        of += f" (with {named.naming})"
    name = getattr(getattr(model, "cfg", None), "name", "") or model.name
    lines = "".join(f"\n  {problem}" for problem in problems)
    remedy = "\nNothing was loaded. Load it into the model of its architecture"
    if heads:
        patterns = [f"^{head}/" for head in heads]
        remedy += (
            "; for another number of classes use create_model(..., pretrained=True, "
            f"nb_classes=...), or keep the model's classifier with weights_to_ignore={patterns}"
        )
    else:
        remedy += ", or pass patterns of what to leave out as weights_to_ignore"
    return (
        f"Received source={checkpoint.source!r}{of}, whose weights do not fit model '{name}' "
        f"({type(model).__name__}): {len(problems)} problem{'s' * (len(problems) > 1)}."
        f"{f' {whose}' if whose else ''}{lines}{remedy}."
    )


def _copy_preprocessing(model: Any, checkpoint: Checkpoint) -> None:
    """Copy the checkpoint's preprocessing to the config of the model."""
    fields = preprocessing_of(checkpoint)
    cfg = getattr(model, "cfg", None)
    if not fields or cfg is None:
        return
    # A copy, since tfimm's registry and other models may share the config.
    cfg = copy.copy(cfg)
    for name, value in fields.items():
        if hasattr(cfg, name):
            setattr(cfg, name, tuple(value) if isinstance(value, list) else value)
    model.cfg = cfg


def preprocessing_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the ``PREPROCESSING_FIELDS`` that the files of a checkpoint have."""
    fields = checkpoint.config.get("pretrained_cfg")
    if isinstance(fields, dict):
        given = {name: fields.get(name) for name in PREPROCESSING_FIELDS}
    else:
        given = of_transformers(checkpoint.preprocessor)
    return {name: value for name, value in given.items() if value is not None}
