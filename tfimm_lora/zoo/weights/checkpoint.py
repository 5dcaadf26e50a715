"""From what the user names (a file, a folder, a hub id) to files on this machine."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from tfimm_lora.backend import installed
from tfimm_lora.zoo.weights import hub

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OTHER_FORMATS = (".pth", ".pt", ".bin", ".tar", ".npz", ".h5", ".ckpt", ".pkl")


class Checkpoint(NamedTuple):
    """Where the parts of a checkpoint are."""

    #: As the user named it, for messages.
    source: str
    files: list[Path]
    #: The content of timm's config.json, empty where there is none.
    config: dict[str, Any]


def find_checkpoint(
    source: str | os.PathLike[str], revision: str | None, cache_dir: str | None
) -> Checkpoint:
    """The files of a checkpoint; those of a hub id are downloaded unless they are cached."""
    _require("safetensors")
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        return _single_file(name, path)
    identifier = re.sub(r"^(hf-hub|hf_hub):", "", name)
    if not _HUB_ID.fullmatch(identifier) or path.suffix == ".safetensors":
        raise FileNotFoundError(
            f"Received source={name!r}; expected a safetensors file, a folder with one, or a "
            "hub id such as 'timm/convnext_tiny.fb_in1k'. There is no such file or folder"
            + ("." if "/" in name else f"; did you mean 'timm/{name}'?")
        )
    _require("huggingface_hub")
    return _on_hub(identifier, revision, cache_dir)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a safetensors file or a folder with one, and no SavedModel."""
    found = Path(os.fspath(path)).expanduser()
    if found.is_dir():
        return not (found / "saved_model.pb").exists() and any(found.glob("*.safetensors"))
    return found.suffix == ".safetensors"


def _require(package: str) -> None:
    if not installed(package):
        raise ImportError(
            f"Loading timm weights needs {package}, which is not installed. Install it with: "
            "pip install safetensors huggingface_hub"
        )


def _single_file(source: str, path: Path) -> Checkpoint:
    if path.suffix in _OTHER_FORMATS:
        raise ValueError(
            f"Received source={source!r}; expected a safetensors file. Load it with the "
            "library that wrote it and write its tensors with safetensors.save_file."
        )
    # Only under its usual name is a file sure to be the one that config.json describes.
    config = path.with_name(CONFIG) if path.name == WEIGHTS else None
    return Checkpoint(source, [path], _read_config(config))


def _in_folder(source: str, folder: Path) -> Checkpoint:
    config = _read_config(folder / CONFIG)
    if (folder / WEIGHTS).is_file():
        return Checkpoint(source, [folder / WEIGHTS], config)
    if (folder / INDEX).is_file():
        files = [folder / name for name in _shards(folder / INDEX)]
        missing = [f.name for f in files if not f.is_file()]
        if missing:
            raise FileNotFoundError(
                f"Received source={source!r}, whose {INDEX} names files that are not there: "
                f"{', '.join(missing)}."
            )
        return Checkpoint(source, files, config)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return Checkpoint(source, files, config)
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
    return Checkpoint(identifier, files, _read_config(where.download_optional(CONFIG)))


def _shards(index: Path) -> list[str]:
    """The files that the index of a checkpoint in several files names."""
    content = _read_json(index)
    names = content.get("weight_map", {}).values() if isinstance(content, dict) else ()
    shards = sorted({str(name) for name in names})
    if not shards or any(Path(name).name != name for name in shards):
        raise ValueError(
            f"Received {str(index)!r}; expected its weight_map to name safetensors files "
            f"beside it. It names {shards}."
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
            f"Received {str(path)!r}, which is not JSON ({error}). Get it again."
        ) from error
