"""Find the files of a checkpoint: a file, a folder or a hub repository."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from tfimm_lora.utils.optional_imports import require
from tfimm_lora.zoo.weights import hub
from tfimm_lora.zoo.weights.torch_files import TORCH_SUFFIXES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
#: How transformers prepares images.
PREPROCESSOR = "preprocessor_config.json"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OTHER_FORMATS = (".tar", ".npz", ".h5", ".ckpt", ".pkl")


class Checkpoint(NamedTuple):
    """The local files of a checkpoint."""

    #: The ``source`` argument, for messages.
    source: str
    files: list[Path]
    #: The content of config.json of timm or transformers; empty if there is none.
    config: dict[str, Any]
    #: The content of transformers' preprocessor_config.json; empty if there is none.
    preprocessor: dict[str, Any]


def find_checkpoint(
    source: str | os.PathLike[str], revision: str | None, cache_dir: str | None
) -> Checkpoint:
    """Find the files of a checkpoint; download those of a hub id unless they are cached.

    Raises:
        ImportError: If safetensors, or huggingface_hub for a hub id, is not installed.
        FileNotFoundError, PermissionError, ConnectionError, ValueError: As
            ``load_timm_weights``.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.suffix not in TORCH_SUFFIXES:
        _require("safetensors")
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        return _single_file(name, path)
    identifier = re.sub(r"^(hf-hub|hf_hub):", "", name)
    if not _HUB_ID.fullmatch(identifier) or path.suffix == ".safetensors":
        raise FileNotFoundError(
            f"Received source={name!r}, which does not exist; expected a safetensors or torch "
            "file, a folder with safetensors, or a hub id such as 'timm/convnext_tiny.fb_in1k'"
            + ("." if "/" in name else f"; did you mean 'timm/{name}'?")
        )
    _require("huggingface_hub")
    return _on_hub(identifier, revision, cache_dir)


def repository_config(identifier: str) -> dict[str, Any]:
    """Return the config.json of a repository on the hub; empty if it has none.

    Raises:
        ImportError: If huggingface_hub is not installed.
        FileNotFoundError, PermissionError, ConnectionError, ValueError: As
            ``load_timm_weights``.
    """
    _require("huggingface_hub")
    path = hub.Repository(identifier, None, None).download_optional(CONFIG)
    return {} if path is None else _read_config(path)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a safetensors or torch file, or a folder with safetensors files."""
    found = Path(os.fspath(path)).expanduser()
    if found.is_dir():
        return not (found / "saved_model.pb").exists() and any(found.glob("*.safetensors"))
    return found.suffix in (".safetensors", *TORCH_SUFFIXES)


def _require(package: str) -> None:
    require(package, extra="weights", why="Loading timm weights")


def _single_file(source: str, path: Path) -> Checkpoint:
    if path.suffix in _OTHER_FORMATS:
        raise ValueError(
            f"Received source={source!r}; expected a safetensors file, or a .pth, .pt or .bin "
            "file of torch. Load it with the library that wrote it, and save its tensors with "
            "safetensors.save_file."
        )
    # config.json describes the file of the usual name, but not always other files.
    is_usual = path.name == WEIGHTS
    config = _read_config(path.with_name(CONFIG)) if is_usual else {}
    preprocessor = _read_config(path.with_name(PREPROCESSOR)) if is_usual else {}
    return Checkpoint(source, [path], config, preprocessor)


def _in_folder(source: str, folder: Path) -> Checkpoint:
    config = _read_config(folder / CONFIG)
    preprocessor = _read_config(folder / PREPROCESSOR)
    if (folder / WEIGHTS).is_file():
        return Checkpoint(source, [folder / WEIGHTS], config, preprocessor)
    if (folder / INDEX).is_file():
        files = [folder / name for name in _shards(folder / INDEX)]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Received source={source!r}, whose {INDEX} names files that do not exist: "
                f"{', '.join(missing)}. Add them to the folder."
            )
        return Checkpoint(source, files, config, preprocessor)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Checkpoint(source, files, config, preprocessor)
    raise FileNotFoundError(
        f"Received source={source!r}, a folder with {len(files)} safetensors files"
        + (f" ({', '.join(f.name for f in files)})" if files else "")
        + f"; expected {WEIGHTS}, {INDEX}, or exactly one file. Name the file."
    )


def _on_hub(identifier: str, revision: str | None, cache_dir: str | None) -> Checkpoint:
    where = hub.Repository(identifier, revision, cache_dir)
    weights = where.download_optional(WEIGHTS)
    if weights is not None:
        files = [weights]
    else:
        index = where.download_optional(INDEX)
        if index is None:
            raise where.not_found(f"neither {WEIGHTS} nor {INDEX}")
        files = [where.download(name) for name in _shards(index)]
    config = _read_config(where.download_optional(CONFIG))
    # timm's repositories do not have this file.
    of_transformers = "model_type" in config
    preprocessor = where.download_optional(PREPROCESSOR) if of_transformers else None
    return Checkpoint(identifier, files, config, _read_config(preprocessor))


def _shards(index: Path) -> list[str]:
    """Return the file names in the index of a checkpoint in several files."""
    content = _read_json(index)
    names = content.get("weight_map", {}).values() if isinstance(content, dict) else ()
    shards = sorted({str(name) for name in names})
    if not shards or any(Path(name).name != name for name in shards):
        raise ValueError(
            f"Received {str(index)!r} with the files {shards}; expected its weight_map to name "
            "safetensors files beside it. Get the index again."
        )
    return shards


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {}
    content = _read_json(path)
    return content if isinstance(content, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"Received {str(path)!r}, which is not JSON ({error}). Get the file again."
        ) from error
