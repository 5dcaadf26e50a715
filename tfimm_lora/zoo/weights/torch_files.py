"""Read the tensors of torch's files (.pth, .pt, .bin) without torch, and without unpickling.

Such a file contains a pickle, and ``pickle.load`` runs any code that the pickle names. Here its
opcodes are interpreted instead: only dictionaries, lists, tuples, numbers, strings and tensors
can result, and everything else is an error. Both formats are supported: the zip archive of
``torch.save`` since torch 1.6, and the older sequence of pickles followed by the values.
"""

from __future__ import annotations

import io
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

#: The suffixes of torch's files.
TORCH_SUFFIXES = (".pth", ".pt", ".bin")

#: torch's storage classes -> NumPy's types.
_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}

#: The first number of a file in the older format, and the version that follows it.
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001

#: Where training scripts store the weights in a checkpoint: the first that exists is read. An
#: exponential moving average is what they evaluate, so it comes first, as in timm.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_torch_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a file of torch that contains a state dict, or a checkpoint with one.

    Args:
        path: The file.

    Returns:
        The tensors by name, as contiguous arrays in torch's order of axes.

    Raises:
        ValueError: If it is not a file of torch, is truncated, or contains anything but tensors
            and plain values. Nothing in the file is executed.

    Reference: ``torch.load`` with ``weights_only=True``.
    """
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                return _state_dict(_read_zip(file))
            # A map reads no further than its end, whatever size a damaged file claims.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _state_dict(_read_sequence(mapped))
    except _Malformed as error:
        reason = str(error)
    # What reading a damaged file can raise, here and in pickletools and zipfile.
    except (
        *(ValueError, KeyError, IndexError, TypeError, EOFError, RecursionError),
        *(struct.error, zipfile.BadZipFile, NotImplementedError, OverflowError),
    ) as error:
        reason = f"damaged or truncated: {error or type(error).__name__}"
    raise ValueError(
        f"Received {str(path)!r}, which cannot be read without torch ({reason}); expected "
        "tensors by name, as torch.save(model.state_dict(), path) writes them. Load the file "
        "with the library that wrote it, only if you trust its source, and save its tensors "
        "with safetensors."
    )


class _Malformed(Exception):
    """The reason why a file is not read."""


# -- what a pickle can contain --------------------------------------------------------------


class _Global(NamedTuple):
    """A name in a module, which is never imported."""

    name: str


class _Storage(NamedTuple):
    """The values that one or several tensors share."""

    dtype: str
    key: str
    #: Where a view of the storage ``key`` begins, in elements (older format).
    first: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_Mark = object()


def _interpret(file: Any) -> Any:
    """Return the value of the pickle at the position of a file, which is then after it."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = len(stack) - 1 - stack[::-1].index(_Mark)
        values = stack[start + 1 :]
        del stack[start:]
        return values

    def taken(count: int) -> tuple[Any, ...]:
        if len(stack) < count:
            raise _Malformed("its pickle takes values that it does not have")
        values = tuple(stack[len(stack) - count :])
        del stack[len(stack) - count :]
        return values

    def update(values: list[Any]) -> None:
        if not isinstance(stack[-1], dict):
            raise _Malformed("its pickle sets items of something else than a dictionary")
        stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def extend(values: list[Any]) -> None:
        if not isinstance(stack[-1], list):
            raise _Malformed("its pickle appends to something else than a list")
        stack[-1].extend(values)

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        elif name == "STOP":
            break
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            stack.append(taken(_TUPLES[name]))
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name == "SETITEM":
            update(list(taken(2)))
        elif name == "SETITEMS":
            update(since_mark())
        elif name == "APPEND":
            extend(list(taken(1)))
        elif name == "APPENDS":
            extend(since_mark())
        elif name == "GLOBAL":
            stack.append(_Global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack.append(_Global("{}.{}".format(*taken(2))))
        elif name == "BINPERSID":
            stack.append(_storage(*taken(1)))
        elif name == "REDUCE":
            stack.append(_called(*taken(2)))
        elif name == "BUILD":
            # Attributes of a state dict, such as the versions of its modules: not weights.
            taken(1)
            if not isinstance(stack[-1], dict):
                raise _Malformed("its pickle sets the state of an object")
        else:
            raise _Malformed(f"its pickle has the opcode {name}, which no tensors need")
    if len(stack) != 1:
        raise _Malformed("its pickle does not end with one value")
    return stack[0]


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _Mark,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _called(function: Any, arguments: Any) -> Any:
    """The result of a call in a pickle, of the functions that state dicts need."""
    name = function.name if isinstance(function, _Global) else f"a {type(function).__name__}"
    if name == "collections.OrderedDict":
        return dict(*arguments)
    if name == "torch._utils._rebuild_tensor_v2":
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage):
            raise _Malformed("a tensor has no storage")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))
    if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name == "torch.Size":
        return tuple(*arguments)
    raise _Malformed(f"it calls {name}, which is more than tensors need")


def _storage(identifier: Any) -> _Storage:
    """The storage of a persistent identifier: ("storage", class, key, device, size, view)."""
    kind, cls, key = identifier[:3]
    name = cls.name.removeprefix("torch.") if isinstance(cls, _Global) else str(cls)
    if kind != "storage" or name not in _TYPES:
        known = ", ".join(name.removesuffix("Storage") for name in _TYPES)
        raise _Malformed(f"it has values of the type {name}, expected one of {known}")
    view = identifier[5] if len(identifier) > 5 else None
    return _Storage(_TYPES[name], str(key), view[1] if view else 0)


# -- the two formats ------------------------------------------------------------------------


class _Content(NamedTuple):
    """The value of a file's pickle, and a function that reads the bytes of a storage."""

    value: Any
    read: Callable[[str], bytes]
    byte_order: str


def _read_zip(file: BinaryIO) -> _Content:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise _Malformed("a zip archive without the data.pkl of torch")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}constants.pkl" in names or f"{folder}code/" in names:
        raise _Malformed("a TorchScript program")
    order = "little"
    if f"{folder}byteorder" in names:
        order = archive.read(f"{folder}byteorder").decode()
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise _Malformed("a compressed archive, which torch does not write")
    value = _interpret(io.BytesIO(archive.read(pickles[0])))
    # All are read now, since the file is closed before the tensors are used.
    used = {tensor.storage.key for tensor in _tensors(value)}
    stored = {key: archive.read(f"{folder}data/{key}") for key in used}
    return _Content(value, stored.__getitem__, order)


def _read_sequence(file: mmap.mmap) -> _Content:
    """Read magic number, version, system, value and keys; then for each key its values."""
    try:
        header = [_interpret(file), _interpret(file)]
    except (_Malformed, ValueError):
        header = []
    if header != [_MAGIC, _VERSION]:
        raise _Malformed("not a file that torch.save wrote")
    system = _interpret(file)
    order = "little" if system["little_endian"] else "big"
    value = _interpret(file)
    sizes: dict[str, int] = {}
    for tensor in _tensors(value):
        sizes[tensor.storage.key] = np.dtype(_numpy_type(tensor.storage.dtype)).itemsize
    stored = {}
    for key in _interpret(file):
        (count,) = struct.unpack("<q" if order == "little" else ">q", file.read(8))
        if key not in sizes:
            raise _Malformed(f"it has the storage {key!r}, which no tensor uses")
        if count < 0:
            raise _Malformed(f"its storage {key!r} has a negative size")
        stored[key] = file.read(count * sizes[key])
        if len(stored[key]) < count * sizes[key]:
            raise EOFError(f"the values of {key!r} end early")
    return _Content(value, stored.__getitem__, order)


def _tensors(value: Any) -> list[_Tensor]:
    """All tensors within dictionaries and lists."""
    found: list[_Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        x = waiting.pop()
        if isinstance(x, _Tensor):
            found.append(x)
        elif isinstance(x, (dict, list, tuple)) and id(x) not in seen:
            seen.add(id(x))
            waiting.extend(x.values() if isinstance(x, dict) else x)
    return found


# -- from the value of a file to arrays -----------------------------------------------------


def _state_dict(content: _Content) -> dict[str, np.ndarray]:
    value = content.value
    if isinstance(value, dict) and not any(isinstance(x, _Tensor) for x in value.values()):
        value = next((value[name] for name in _NESTED if value.get(name)), value)
    if not isinstance(value, dict):
        raise _Malformed(f"it contains a {type(value).__name__.lstrip('_').lower()}")
    named = {key: x for key, x in value.items() if isinstance(x, _Tensor)}
    others = [str(key) for key in value if key not in named]
    if others or not named or not all(isinstance(key, str) for key in named):
        raise _Malformed(
            f"it contains {', '.join(others[:5])} beside tensors" if others else "no tensors"
        )
    arrays: dict[str, np.ndarray] = {}
    return arrays | {key: _array(key, tensor, content) for key, tensor in named.items()}


def _array(key: str, tensor: _Tensor, content: _Content) -> np.ndarray:
    """A tensor as a contiguous array, after a check that its storage contains it."""
    dtype = _numpy_type(tensor.storage.dtype)
    values: np.ndarray = np.frombuffer(content.read(tensor.storage.key), dtype)
    if content.byte_order == "big":
        values = values.byteswap()
    integers = (*tensor.shape, *tensor.strides, tensor.offset, tensor.storage.first)
    if len(tensor.shape) != len(tensor.strides) or not all(
        isinstance(n, int) and n >= 0 for n in integers
    ):
        raise _Malformed(f"the tensor {key} has no valid shape")
    start = tensor.storage.first + tensor.offset
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, dtype)
    last = start + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides))
    if last >= len(values):
        raise _Malformed(f"the tensor {key} is larger than its storage")
    # A small file must not become a large array: strides of 0 would repeat values.
    if np.prod(tensor.shape, dtype=object) > len(values):
        raise _Malformed(f"the tensor {key} repeats values")
    view = np.lib.stride_tricks.as_strided(
        values[start:],
        tensor.shape,
        [stride * values.itemsize for stride in tensor.strides],
        writeable=False,
    )
    return np.ascontiguousarray(view).reshape(tensor.shape)


def _numpy_type(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class TorchFile:
    """The tensors of a torch file, with the methods of ``safetensors.safe_open``."""

    def __init__(self, path: Path) -> None:
        self._tensors = read_torch_tensors(path)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        """The names of the tensors."""
        return list(self._tensors)

    def get_slice(self, key: str) -> _Header:
        """The shape and the type of a tensor."""
        return _Header(self._tensors[key])

    def get_tensor(self, key: str) -> np.ndarray:
        """The value of a tensor."""
        return self._tensors[key]


class _Header(NamedTuple):
    array: np.ndarray

    def get_shape(self) -> list[int]:
        return list(self.array.shape)

    def get_dtype(self) -> str:
        """The type, with the names of safetensors."""
        return _SAFETENSORS.get(self.array.dtype.name, self.array.dtype.name)


_SAFETENSORS: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}
