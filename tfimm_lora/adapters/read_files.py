"""Read an adapter from a folder.

Files are untrusted input: sizes, types, shapes and values are checked before they are used,
and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tfimm_lora.adapters import loha_tensors
from tfimm_lora.adapters.adapter_data import AdapterData, FileSelection
from tfimm_lora.adapters.file_format import (
    CONFIG,
    METADATA_KEY,
    METADATA_VERSION,
    PENDING_CONFIG,
    PREFIX,
    WEIGHTS,
    safetensors,
)
from tfimm_lora.adapters.layer_update import OWN_KINDS, LayerUpdate
from tfimm_lora.adapters.peft_config import PeftConfig, target_modules
from tfimm_lora.adapters.tensor_names import (
    FACTOR,
    NAMED_FACTOR,
    OTHER_FACTOR,
    in_model,
    is_copy,
)
from tfimm_lora.families.recognize import recognize_surely
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.peft.matching import outermost, with_parents

#: Far more than any adapter has. A larger file is damaged or hostile.
_MAX_BYTES = {CONFIG: 4 << 20, WEIGHTS: 8 << 30}
_MAX_HEADER = 16 << 20

#: The number of keys that are enough to recognize whose they are, also in a hostile file.
_MAX_RECOGNIZED = 1000

_FLOATS = ("F64", "F32", "F16", "BF16")

_T = TypeVar("_T")


def read(path: str | os.PathLike[str]) -> AdapterData:
    """Read an adapter from a folder; see ``Adapter.load``."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Received path={str(path)!r}, which is not a folder; expected a folder with "
            f"{CONFIG} and {WEIGHTS}, or 'hf://user/repo'."
        )
    for name in (WEIGHTS, CONFIG):
        _check_size(folder, name)
    weights = folder / WEIGHTS
    tensors, metadata = _with_path(weights, lambda: _read_tensors(weights))
    content = _config_bytes(folder, metadata)
    config = _with_path(folder / CONFIG, lambda: PeftConfig(_parsed(content)))
    if metadata.get("config") == hashlib.sha256(content).hexdigest():
        config.names_are_exact = True
    return _with_path(folder, lambda: _assembled(tensors, metadata, config))


def check_subfolder(subfolder: str | None) -> None:
    """Raise unless a subfolder is None or a path inside the folder around it."""
    if subfolder is not None and not isinstance(subfolder, str):
        raise TypeError(f"Received subfolder={subfolder!r}; expected a string.")
    if subfolder is not None and (os.path.isabs(subfolder) or ".." in Path(subfolder).parts):
        raise ValueError(
            f"Received subfolder={subfolder!r}; expected a folder inside the path. Pass the "
            "folder itself as the path."
        )


def find_subfolder(path: str | os.PathLike[str], subfolder: str) -> Path:
    """Return a folder inside a path.

    Raises:
        FileNotFoundError: If it does not exist; the message names those with adapters.
    """
    folder = Path(path) / subfolder
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Received subfolder={subfolder!r}, which is not a folder in '{os.fspath(path)}'."
            f"{_subfolders_hint(Path(path))}"
        )
    return folder


def _with_path(path: Path, step: Callable[[], _T]) -> _T:
    """Return the result of ``step``, and add the path to the message of its errors."""
    try:
        return step()
    except ValueError as error:
        raise ValueError(f"The adapter '{path}' {error}.") from error


# -- the two files --------------------------------------------------------------------------


def _check_size(folder: Path, name: str) -> None:
    path = folder / name
    if not path.is_file():
        hint = ""
        if name == WEIGHTS and (folder / "adapter_model.bin").exists():
            hint = (
                " It has adapter_model.bin, which is pickled and never read; save it again in "
                "PEFT with safe_serialization=True."
            )
        raise FileNotFoundError(
            f"The adapter '{folder}' has no file {name}.{hint}{_subfolders_hint(folder)}"
        )
    size = path.stat().st_size
    if size > _MAX_BYTES[name]:
        raise ValueError(
            f"The adapter file '{path}' has {size} bytes; expected at most "
            f"{_MAX_BYTES[name]}. It is damaged or not an adapter."
        )


def _subfolders_hint(folder: Path) -> str:
    """Return which subfolders hold adapters: PEFT saves one that has a name in a subfolder."""
    try:
        found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    except OSError:
        return ""
    if not found:
        return ""
    listed = ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
    return f" Its subfolders with adapters: {listed}. Pass for example subfolder={found[0]!r}."


def _config_bytes(folder: Path, metadata: dict[str, Any]) -> bytes:
    """Return the content of the config that belongs to the weights.

    If writing was interrupted between the two files, it is still under its other name. A
    config that was edited by hand is used as it is.
    """
    content = (folder / CONFIG).read_bytes()
    expected, pending = metadata.get("config"), folder / PENDING_CONFIG
    if expected and hashlib.sha256(content).hexdigest() != expected and pending.is_file():
        other = pending.read_bytes()
        if hashlib.sha256(other).hexdigest() == expected:
            return other
    return content


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the tensors of a file by key, and the metadata of this package."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER, path.stat().st_size):
        raise ValueError(f"claims a header of {length} bytes, more than any adapter has")
    library = safetensors()
    tensors: dict[str, np.ndarray] = {}
    try:
        with library.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (not a dict)
                dtype = file.get_slice(key).get_dtype()
                if dtype not in _FLOATS and not key.endswith(".num_batches_tracked"):
                    raise ValueError(f"has {key!r} of type {dtype}, expected {_FLOATS}")
                tensors[key] = _finite(key, file.get_tensor(key))
    except library.SafetensorError as error:
        raise ValueError(f"is not a complete safetensors file ({error})") from error
    return tensors, _own_metadata(metadata.get(METADATA_KEY))


def _finite(key: str, value: np.ndarray) -> np.ndarray:
    if value.dtype not in (np.float32, np.float64):
        value = value.astype("float32")
    if not np.isfinite(value).all():
        raise ValueError(f"has values in {key!r} that are not finite")
    return value


def _own_metadata(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    metadata = _parsed(text.encode())
    valid = isinstance(metadata, dict) and all(
        isinstance(metadata.get(name, {}), dict)
        for name in ("kinds", "qkv", "scales", "windows")
    )
    whole = metadata.get("whole", []) if valid else []
    valid = valid and isinstance(whole, list) and all(isinstance(x, str) for x in whole)
    if not valid:
        raise ValueError("has damaged metadata of tfimm_lora")
    version = metadata.get("version")
    if version != METADATA_VERSION:
        raise ValueError(
            f"was written by a later version of tfimm_lora (format {version!r}, supported: "
            f"{METADATA_VERSION}); install a newer one"
        )
    return dict(metadata)


# -- from tensors to an adapter -------------------------------------------------------------


def _assembled(
    tensors: dict[str, np.ndarray], metadata: dict[str, Any], config: PeftConfig
) -> AdapterData:
    _warn_of_other_dropouts(config)
    factors, weights = _sorted_tensors(tensors, metadata.get("whole", []))
    layers = {
        module: _update(module, found, metadata, config) for module, found in factors.items()
    }
    if not layers:
        raise ValueError("has no factors of LoRA or LoHa")
    modules = _full_modules(config, weights, set(layers))
    outside = [k for k in weights if not any(k.startswith(f"{m}.") for m in modules)]
    odd = [k for k in outside if config.bias == "none" or not re.search(r"bias|\.beta$", k)]
    if odd:
        raise ValueError(
            f"has tensors that its config does not explain: {', '.join(odd)} (bias="
            f"{config.bias!r}, modules_to_save={list(config.modules)})"
        )
    return AdapterData(
        layers,
        weights,
        modules,
        config.base_model,
        config.bias,
        config.dropout,
        _selection(config, layers),
        _task(metadata.get("task")),
    )


def _warn_of_other_dropouts(config: PeftConfig) -> None:
    if config.other_dropouts:
        listed = " and ".join(f"{k}={v}" for k, v in config.other_dropouts.items())
        warnings.warn(
            f"The adapter was trained with {listed}, which is not supported here. What it "
            "computes is the same; further training goes on without, and it is not saved.",
            stacklevel=7,
        )


def _task(values: Any) -> TaskRecord | None:
    if values is None:
        return None
    try:
        return TaskRecord.from_dict(values)
    except ValueError as error:
        raise ValueError(f"has a damaged record of its task ({error})") from error


def _selection(config: PeftConfig, layers: dict[str, LayerUpdate]) -> FileSelection | None:
    """Return what the config selects, or None if its names are known to be exact.

    Raises:
        ValueError: If layers are missing of which the exact names are known.
    """
    if not config.names_are_exact:
        return FileSelection(config.selection, frozenset(layers))
    given = config.selection.targets
    if given is not None and _names(given) != _names(target_modules(layers)):
        raise ValueError(
            f"has values for {len(layers)} layers, and its config names others: {given}"
        )
    return None


def _names(targets: str | Collection[str]) -> str | list[str]:
    return targets if isinstance(targets, str) else sorted(targets)


def _sorted_tensors(
    tensors: dict[str, np.ndarray], whole: Collection[str]
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Return module path -> the tensors of its update, and key -> fully trained weight.

    The tensors of an update are named "A", "B", "magnitude" and "bias"; those of LoHa as in the
    file. Those of an embedding also have the name "embedding".

    Args:
        tensors: The tensors of the file by key.
        whole: The keys of fully trained weights that look like tensors of an update.
    """
    factors: dict[str, dict[str, np.ndarray]] = {}
    others: dict[str, np.ndarray] = {}
    other = [key for key in tensors if not key.startswith(PREFIX)]
    if other:
        raise ValueError(
            f"has the key {other[0]!r}, expected keys that begin with {PREFIX!r}"
            f"{_whose_keys(other)}"
        )
    for key, value in tensors.items():
        name = key[len(PREFIX) :]
        found = None if name in whole else FACTOR.fullmatch(name)
        if found:
            own = factors.setdefault(found["module"], {})
            vector = next((name for name in ("magnitude", "bias") if found[name]), None)
            factor = found["embedding"] or vector or found["loha"] or found["factor"][-1]
            if factor in own:
                raise ValueError(f"has two values for the {factor} of {found['module']}")
            own[factor] = value
            if found["embedding"]:
                own["embedding"] = value
        elif name not in whole and (named := NAMED_FACTOR.fullmatch(name)):
            raise ValueError(
                f"has the key {key!r} with the name of an adapter, "
                f"{named['name'] or named['other']!r}, as in the state dict of a PEFT model; "
                "expected the keys of a saved adapter, without it. Save it with "
                "PeftModel.save_pretrained"
            )
        elif name not in whole and OTHER_FACTOR.search(name):
            raise ValueError(f"has {key!r}, of a variant that is not supported")
        elif not name.endswith(".num_batches_tracked"):
            others[name] = value
    return factors, _plain_weights(others, set(factors), whole)


def _whose_keys(keys: list[str]) -> str:
    """Return what keys without PEFT's prefix are, for the end of an error message."""
    keys = keys[:_MAX_RECOGNIZED]
    matches = [FACTOR.fullmatch(key) or NAMED_FACTOR.fullmatch(key) for key in keys]
    modules = [*dict.fromkeys(found["module"] for found in matches if found)]
    if modules:
        naming = recognize_surely(modules)
        found = f"They are {naming} without it. " if naming else ""
        return f". {found}Save the adapter with PeftModel.save_pretrained"
    naming = recognize_surely(keys, is_weight=True)
    return (
        f". They are {naming}, of whole weights: a checkpoint, which load_timm_weights loads"
        if naming
        else ""
    )


def _plain_weights(
    tensors: dict[str, np.ndarray], adapted: set[str], whole: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the weights that are not of updates by their names in the model."""
    weights: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if key not in whole and is_copy(key, tensors):
            continue
        name = in_model(key, adapted)
        if name in weights:
            raise ValueError(f"has two values for {name}")
        weights[name] = value
    return weights


def _update(
    module: str, found: dict[str, np.ndarray], metadata: dict[str, Any], config: PeftConfig
) -> LayerUpdate:
    is_loha = any(name.startswith(loha_tensors.PREFIX) for name in found)
    if is_loha != config.use_loha:
        kinds = ("LoHa", "LoRA") if is_loha else ("LoRA", "LoHa")
        raise ValueError(f"has factors of {kinds[0]} for {module}, and a config of {kinds[1]}")
    if is_loha:
        window = metadata.get("windows", {}).get(module)
        (a, b), (a2, b2) = loha_tensors.pairs_from(module, found, window)
        kind = "linear" if a.ndim == 2 else "conv"
        return LayerUpdate(
            a,
            b,
            _scale(module, len(a), metadata, config),
            _own_kind(module, metadata) or kind,
            _qkv(module, metadata),
            a2=a2,
            b2=b2,
        )
    for name in ("A", "B"):
        if name not in found:
            raise ValueError(f"has no lora_{name} for {module}")
    for name, field, expected in (
        ("magnitude", "use_dora", config.use_dora),
        ("bias", "lora_bias", config.lora_bias),
    ):
        if (name in found) != expected:
            article = "a" if name in found else "no"
            raise ValueError(f"has {article} {name} for {module}, and {field}={expected}")
    a, b = found["A"], found["B"]
    if a.ndim == b.ndim > 2 and a.shape[0] > b.shape[1] and a.shape[0] % b.shape[1] == 0:
        raise ValueError(
            f"has A {a.shape} and B {b.shape} for {module}, as PEFT writes them for a "
            "convolution with groups. These are not supported, nor can PEFT merge them: leave "
            "such layers out of target_modules"
        )
    fitting = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] and min(a.shape + b.shape)
    if not fitting or any(size != 1 for size in b.shape[2:]):
        raise ValueError(f"has A {a.shape} and B {b.shape} for {module}, which do not fit")
    vectors = {name: found[name].reshape(-1) for name in ("magnitude", "bias") if name in found}
    for name, value in vectors.items():
        if len(value) != len(b):
            raise ValueError(
                f"has a {name} of shape {found[name].shape} for {module} with {len(b)} outputs"
            )
    kind = "embedding" if "embedding" in found else "linear" if a.ndim == 2 else "conv"
    return LayerUpdate(
        a,
        b,
        _scale(module, a.shape[0], metadata, config),
        _own_kind(module, metadata) or kind,
        _qkv(module, metadata),
        **vectors,
    )


def _scale(module: str, rank: int, metadata: dict[str, Any], config: PeftConfig) -> float:
    scale = config.scale_of(module, rank)
    exact = metadata.get("scales", {}).get(module)
    if isinstance(exact, float) and math.isclose(exact, scale, rel_tol=1e-12):
        return exact
    return scale


def _own_kind(module: str, metadata: dict[str, Any]) -> str | None:
    kind = metadata.get("kinds", {}).get(module)
    if kind is None or (isinstance(kind, str) and kind in OWN_KINDS):
        return kind
    raise ValueError(f"has the unknown kind {kind!r} for {module}")


def _qkv(module: str, metadata: dict[str, Any]) -> tuple[str, str] | None:
    qkv = metadata.get("qkv", {}).get(module)
    if qkv is None:
        return None
    if not isinstance(qkv, list) or len(qkv) != 2 or not all(isinstance(x, str) for x in qkv):
        raise ValueError(f"has damaged metadata of tfimm_lora for {module}")
    return qkv[0], qkv[1]


def _full_modules(
    config: PeftConfig, weights: dict[str, np.ndarray], adapted: set[str]
) -> tuple[str, ...]:
    """Return the paths of the fully trained modules that modules_to_save names.

    This package writes full paths. In PEFT a name is the end of one or more paths, and names
    that the model does not have are ignored. A layer with factors is not fully trained.
    """
    around = with_parents(key.rpartition(".")[0] for key in weights)
    if config.names_are_exact:
        unused = [name for name in config.modules if name not in around]
        if unused:
            raise ValueError(f"has no tensors for modules_to_save {unused}")
        return tuple(sorted(config.modules))
    found = [m for m in around if m not in adapted and config.selection.trains(m)]
    inner = [module for module in found if module.rpartition(".")[0] in found]
    if inner:
        raise ValueError(
            f"has modules_to_save={list(config.modules)!r}, which names {inner[0]} and the "
            "module that it is in. PEFT trains a copy of the outer one, saves other values of "
            "the inner one, and cannot load the file. Train it again with the outer name only"
        )
    return tuple(outermost(found))
