"""Adapter folders: adapter_config.json, adapter_model.safetensors and a model card.

The format is PEFT's. What only this package knows is in the metadata of the weights' header,
where PEFT does not look: the parts of fused projections, the kinds that PEFT has not, and the
hash of the config that belongs to the weights.

Reading trusts nothing: sizes, types, shapes and numbers are checked before they are used, and
nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter import OWN_KINDS, Adapter, LayerUpdate
from tfimm_lora.adapters.card import MARK, model_card
from tfimm_lora.adapters.peft_config import PeftConfig, config_fields

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"

#: A config that was written, but not yet put in its place, when a process was killed.
_PENDING = CONFIG + ".new"

_PREFIX = "base_model.model."

#: Far more than any adapter has; a file that claims more is damaged or hostile.
_MOST_BYTES = {CONFIG: 4 << 20, WEIGHTS: 8 << 30}
_MOST_HEADER = 16 << 20

_FLOATS = ("F64", "F32", "F16", "BF16")

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:(?P<part>lora_[AB])\.weight|lora_embedding_(?P<embedding>[AB])"
    r"|(?P<magnitude>lora_magnitude_vector)(?:\.weight)?|(?P<bias>lora_B\.bias))"
)

#: Names of PEFT that belong to other variants of LoRA.
_OTHER_FACTOR = re.compile(r"\.lora_(magnitude_vector|[A-Z]|embedding_[A-Z])(\.|$)")

_WORDS_OF_PEFT = (".base_layer.", ".original_module.", ".modules_to_save.")


# -- writing --------------------------------------------------------------------------------


def write(adapter: Adapter, path: str | os.PathLike[str], format: str | None = None) -> None:
    """Write an adapter to a folder; see ``Adapter.save``."""
    if format not in (None, "peft"):
        raise ValueError(f"Received format={format!r}; expected None or 'peft'.")
    refused = adapter.not_in_peft()
    if refused and format == "peft":
        listed = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(
            f"Received format='peft' for an adapter with layers that PEFT cannot express: "
            f"{listed}. Leave format out to write the extension that this package reads, or "
            "train without these layers in lora_targets."
        )
    fields = config_fields(adapter, own=bool(refused))
    # Not sorted: of the patterns the first that matches counts.
    config = (json.dumps(fields, indent=2) + "\n").encode()
    weights = _serialised(adapter, hashlib.sha256(config).hexdigest())
    folder = Path(path)
    if folder.is_file():
        raise NotADirectoryError(f"Received path={str(path)!r}, a file; expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    # The weights name the config that belongs to them. Killed after the first of the two
    # renames, the config is still found under its other name; see `_config_bytes`.
    _write_synced(folder / _PENDING, config)
    with _new_file(folder, weights) as temporary:
        os.replace(temporary, folder / WEIGHTS)
    os.replace(folder / _PENDING, folder / CONFIG)
    _sync(folder)
    if _is_ours(folder / CARD):
        with _new_file(folder, model_card(adapter, fields).encode()) as temporary:
            os.replace(temporary, folder / CARD)


def _is_ours(card: Path) -> bool:
    """Whether a model card may be replaced: it is none, or one that nobody wrote."""
    return not card.exists() or MARK in card.read_text(errors="replace")


@contextlib.contextmanager
def _new_file(folder: Path, content: bytes) -> Iterator[Path]:
    """A finished file in the folder under a name of its own, to be renamed."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".adapter-", suffix=".tmp")
    os.close(handle)
    try:
        _write_synced(Path(name), content)
        # As open() would have made it; mkstemp lets nobody else read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        yield Path(name)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _serialised(adapter: Adapter, config_hash: str) -> bytes:
    save = _safetensors().numpy.save
    tensors: dict[str, np.ndarray] = {}
    for module, x in adapter.layers.items():
        names = ("lora_embedding_A", "lora_embedding_B")
        if x.kind != "embedding":
            names = ("lora_A.weight", "lora_B.weight")
        for name, value in zip(names, (x.a, x.b)):
            tensors[f"{_PREFIX}{module}.{name}"] = np.ascontiguousarray(value)
        if x.magnitude is not None:
            # Convolutions of PEFT have it in the shape that goes with their outputs.
            shape = (1, -1, *(1 for _ in x.a.shape[2:])) if x.a.ndim > 2 else (-1,)
            tensors[f"{_PREFIX}{module}.lora_magnitude_vector"] = x.magnitude.reshape(shape)
        if x.bias is not None:
            tensors[f"{_PREFIX}{module}.lora_B.bias"] = x.bias
    for key, value in adapter.weights.items():
        module, _, leaf = key.rpartition(".")
        inside = ".base_layer." if module in adapter.layers else "."
        name = f"{_PREFIX}{module}{inside}{leaf}" if module else f"{_PREFIX}{leaf}"
        tensors[name] = np.ascontiguousarray(value)
    notes: dict[str, Any] = {"version": 1, "config": config_hash}
    kinds = {m: x.kind for m, x in adapter.layers.items() if x.kind in OWN_KINDS}
    parts = {m: list(x.qkv) for m, x in adapter.layers.items() if x.qkv}
    # alpha / rank is not always the scale to the last bit.
    scales = {m: x.scale for m, x in adapter.layers.items() if x.alpha / x.rank != x.scale}
    more = (("kinds", kinds), ("qkv", parts), ("scales", scales))
    notes.update({name: value for name, value in more if value})
    metadata = {"format": "pt", "tfimm_lora": json.dumps(notes, separators=(",", ":"))}
    return _with_ordered_metadata(save(tensors, metadata))


def _with_ordered_metadata(content: bytes) -> bytes:
    """The file with its metadata sorted: safetensors writes them in an order of chance.

    One adapter is one sequence of bytes then, so that files can be compared by their hash.
    """
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


# -- reading --------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter from a folder; see ``Adapter.load``."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Received path={str(path)!r}, which is no folder; expected one with {CONFIG} and "
            f"{WEIGHTS}, or 'hf://user/repo'."
        )
    for name in (WEIGHTS, CONFIG):
        _check_size(folder, name)
    tensors, notes = _explained(folder / WEIGHTS, lambda: _read_tensors(folder / WEIGHTS))
    content = _config_bytes(folder, notes)
    config = _explained(folder / CONFIG, lambda: PeftConfig(_parsed(content)))
    return _explained(folder, lambda: _assembled(tensors, notes, config))


def _explained(path: Path, step: Callable[[], Any]) -> Any:
    """The result of a step of reading, whose errors are told with the file's name."""
    try:
        return step()
    except ValueError as error:
        raise ValueError(f"The adapter '{path}' {error}.") from error


def _check_size(folder: Path, name: str) -> None:
    path = folder / name
    if not path.is_file():
        others = [n for n in ("adapter_model.bin",) if (folder / n).exists()]
        hint = ""
        if others and name == WEIGHTS:
            hint = (
                f" It has {others[0]}, which is pickled and never read; write it again in "
                "PEFT with safe_serialization=True."
            )
        raise FileNotFoundError(f"The adapter '{folder}' has no file {name}.{hint}")
    size = path.stat().st_size
    if size > _MOST_BYTES[name]:
        raise ValueError(
            f"The adapter file '{path}' has {size} bytes; expected at most "
            f"{_MOST_BYTES[name]}. It is no adapter, or damaged."
        )


def _config_bytes(folder: Path, notes: dict[str, Any]) -> bytes:
    """The config that belongs to the weights.

    If writing was interrupted between the two files it is still under its other name. A
    config that somebody changed by hand is taken as it is.
    """
    content = (folder / CONFIG).read_bytes()
    wanted, pending = notes.get("config"), folder / _PENDING
    if wanted and hashlib.sha256(content).hexdigest() != wanted and pending.is_file():
        other = pending.read_bytes()
        if hashlib.sha256(other).hexdigest() == wanted:
            return other
    return content


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error


def _read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file by key, and our notes in its header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > min(_MOST_HEADER, path.stat().st_size):
        raise ValueError(f"claims a header of {length} bytes, more than any adapter has")
    library = _safetensors()
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
        raise ValueError(f"is not a whole safetensors file ({error})") from error
    return tensors, _notes(metadata.get("tfimm_lora"))


def _finite(key: str, value: np.ndarray) -> np.ndarray:
    if value.dtype not in (np.float32, np.float64):
        value = value.astype("float32")
    if not np.isfinite(value).all():
        raise ValueError(f"has values in {key!r} that are not finite")
    return value


def _notes(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    notes = _parsed(text.encode())
    shaped = isinstance(notes, dict) and all(
        isinstance(notes.get(name, {}), dict) for name in ("kinds", "qkv", "scales")
    )
    if not shaped:
        raise ValueError("has damaged metadata of tfimm_lora")
    if notes.get("version") != 1:
        raise ValueError(
            f"was written by a later version of tfimm_lora (format {notes.get('version')!r}, "
            "known: 1); install a newer one"
        )
    return notes


def _assembled(
    tensors: dict[str, np.ndarray], notes: dict[str, Any], config: PeftConfig
) -> Adapter:
    factors: dict[str, dict[str, np.ndarray]] = {}
    embeddings: set[str] = set()
    weights: dict[str, np.ndarray] = {}
    for key, value in tensors.items():
        if not key.startswith(_PREFIX):
            raise ValueError(f"has the key {key!r}, expected keys that begin with {_PREFIX!r}")
        name = key[len(_PREFIX) :]
        found = _FACTOR.fullmatch(name)
        if found:
            module = found["module"]
            named = (name for name in ("magnitude", "bias") if found[name])
            part = found["embedding"] or next(named, None) or found["part"][-1]
            if part in factors.get(module, {}):
                raise ValueError(f"has two values for the {part} of {module}")
            factors.setdefault(module, {})[part] = value
            if found["embedding"]:
                embeddings.add(module)
        elif _OTHER_FACTOR.search(name):
            raise ValueError(f"has {key!r}, of a variant that is not supported")
        elif not name.endswith(".num_batches_tracked"):
            for word in _WORDS_OF_PEFT:
                name = name.replace(word, ".")
            if name in weights:
                raise ValueError(f"has two values for {name}")
            weights[name] = value
    layers = {}
    for module, pair in factors.items():
        for name in ("A", "B"):
            if name not in pair:
                raise ValueError(f"has no lora_{name} for {module}")
        for name, field, said in (
            ("magnitude", "use_dora", config.use_dora),
            ("bias", "lora_bias", config.lora_bias),
        ):
            if (name in pair) != said:
                has = "a" if name in pair else "no"
                raise ValueError(f"has {has} {name} for {module}, and {field}={said}")
        layers[module] = _update(module, pair, module in embeddings, notes, config)
    if not layers:
        raise ValueError("has no LoRA factors")
    meant = {name: _meant(name, weights, set(layers)) for name in config.modules}
    unused = [name for name, modules in meant.items() if not modules]
    if unused:
        raise ValueError(f"has no tensors for modules_to_save {unused}")
    modules = tuple(sorted({module for found in meant.values() for module in found}))
    outside = [k for k in weights if not any(k.startswith(f"{m}.") for m in modules)]
    odd = [k for k in outside if config.bias == "none" or not re.search(r"bias|\.beta$", k)]
    if odd:
        raise ValueError(f"has tensors that its config does not explain: {', '.join(odd)}")
    return Adapter(
        layers,
        weights,
        modules,
        config.base_model,
        config.bias,
        config.dropout,
    )


def _update(
    module: str,
    pair: dict[str, np.ndarray],
    is_embedding: bool,
    notes: dict[str, Any],
    config: PeftConfig,
) -> LayerUpdate:
    a, b = pair["A"], pair["B"]
    fitting = a.ndim == b.ndim >= 2 and a.shape[0] == b.shape[1] and min(a.shape + b.shape)
    if not fitting or any(size != 1 for size in b.shape[2:]):
        raise ValueError(f"has A {a.shape} and B {b.shape} for {module}, which do not fit")
    kind = "embedding" if is_embedding else "linear" if a.ndim == 2 else "conv"
    own = notes.get("kinds", {}).get(module)
    if own is not None:
        if not isinstance(own, str) or own not in OWN_KINDS:
            raise ValueError(f"says that {module} is of the unknown kind {own!r}")
        kind = own
    qkv = notes.get("qkv", {}).get(module)
    letters = isinstance(qkv, list) and len(qkv) == 2 and all(isinstance(x, str) for x in qkv)
    if qkv is not None and not letters:
        raise ValueError(f"has damaged metadata of tfimm_lora for {module}")
    scale = config.scale_of(module, a.shape[0])
    exact = notes.get("scales", {}).get(module)
    if isinstance(exact, float) and math.isclose(exact, scale, rel_tol=1e-12):
        scale = exact
    more = {name: pair[name].reshape(-1) for name in ("magnitude", "bias") if name in pair}
    for name, value in more.items():
        if len(value) != len(b):
            raise ValueError(
                f"has a {name} of shape {pair[name].shape} for {module} with {len(b)} outputs"
            )
    parts: Any = tuple(qkv) if qkv else None
    return LayerUpdate(a, b, scale, kind, parts, **more)


def _meant(name: str, weights: dict[str, np.ndarray], adapted: set[str]) -> list[str]:
    """The modules trained whole that a name of modules_to_save means.

    The module of this path, if it is there; else those whose path ends so, as in PEFT. A
    layer with factors is not trained whole.
    """
    if any(key.startswith(f"{name}.") for key in weights) and name not in adapted:
        return [name]
    found = (re.match(rf"(.*\.)?{re.escape(name)}(?=\.)", key) for key in weights)
    return list(dict.fromkeys(m[0] for m in found if m and m[0] not in adapted))


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Adapter files need safetensors, which is not installed: pip install safetensors"
        ) from error
    return safetensors
