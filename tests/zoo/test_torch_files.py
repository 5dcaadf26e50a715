"""Torch's files are read without torch, and nothing in them is executed.

The golden files were written by torch; tests/interop compares with torch itself.
"""

import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests import golden
from tests.helpers.kerases import LEGACY
from tfimm_lora.zoo.weights.torch_files import read_torch_tensors

FOLDER = Path(golden.__file__).parent
BOTH = pytest.mark.parametrize("name", ["torch_zip.pth", "torch_old.pth"])


@BOTH
def test_every_type_and_layout_is_read(name):
    expected = np.load(FOLDER / "torch_tensors.npz")
    found = read_torch_tensors(FOLDER / name)
    assert list(found) == expected.files
    for key, array in found.items():
        assert array.flags.c_contiguous and array.shape == expected[key].shape, key
        assert array.dtype == ("bfloat16" if key == "bfloat" else expected[key].dtype), key
        np.testing.assert_array_equal(array.astype(expected[key].dtype), expected[key])


@BOTH
def test_torch_and_safetensors_are_not_needed(name):
    program = (
        "import sys, pathlib; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from tfimm_lora.zoo.weights.torch_files import read_torch_tensors\n"
        f"print(len(read_torch_tensors(pathlib.Path({str(FOLDER / name)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "14", done.stderr


@BOTH
def test_a_damaged_file_is_an_error_wherever_it_is_damaged(name, tmp_path):
    whole = (FOLDER / name).read_bytes()
    path = tmp_path / name
    for length in range(0, len(whole) - 1, 29):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read without torch"):
            read_torch_tensors(path)
    # Other values may result, but no other kind of error.
    random = np.random.default_rng(0)
    for _ in range(150):
        changed = bytearray(whole)
        for place in random.integers(len(whole), size=3):
            changed[place] = random.integers(256)
        path.write_bytes(changed)
        try:
            read_torch_tensors(path)
        except ValueError as error:
            assert "cannot be read without torch" in str(error)


# -- files of a tiny writer -----------------------------------------------------------------


class Named:
    """What pickles as a global name, without the module."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """What pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Storage(tuple):
    """What pickles as a persistent identifier."""


class Writer(pickle._Pickler):
    """Protocol 2, as torch writes it."""

    def __init__(self, file):
        super().__init__(file, protocol=2)

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(f"c{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def tensor(values, shape=None, strides=(1,), offset=0, kind="FloatStorage"):
    storage = Storage(("storage", Named("torch", kind), "0", "cpu", values.size, None)[:5])
    shape = values.shape if shape is None else shape
    rebuild = Named("torch._utils", "_rebuild_tensor_v2")
    return Call(rebuild, storage, offset, shape, strides, False, {})


def written(path, value, values, raw=None, **more):
    """Write an archive with this value, and a storage "0"."""
    content = io.BytesIO()
    Writer(content).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content.getvalue() if raw is None else raw)
        archive.writestr("archive/data/0", values.tobytes())
        for name, text in more.items():
            archive.writestr(f"archive/{name}", text)
    return path


VALUES = np.arange(6, dtype="float32")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth"


def test_tensors_within_a_checkpoint_are_found(path):
    weights = {"w": tensor(VALUES)}
    for checkpoint in (
        {"epoch": 3, "state_dict": weights},
        {"model": weights, "optimizer": {"lr": 0.5, "steps": [1, 2]}},
        {"model": {"w": tensor(VALUES, (1,))}, "model_ema": weights},
        collections.OrderedDict(w=tensor(VALUES)),
    ):
        if isinstance(checkpoint, collections.OrderedDict):
            checkpoint = Call(Named("collections", "OrderedDict"), list(checkpoint.items()))
        found = read_torch_tensors(written(path, checkpoint, VALUES))
        np.testing.assert_array_equal(found["w"], VALUES)


def test_the_byte_order_of_the_writer_is_respected(path):
    written(path, {"w": tensor(VALUES)}, VALUES.byteswap(), byteorder="big")
    np.testing.assert_array_equal(read_torch_tensors(path)["w"], VALUES)


@pytest.mark.parametrize(
    "value, words",
    [
        ({"w": Call(Named("os", "system"), "exit 3")}, "calls os.system"),
        ({"w": Call(Named("builtins", "eval"), "1")}, "calls builtins.eval"),
        ({"w": Call(Named("torch.serialization", "load"), "x")}, "calls torch.serialization"),
        ({"w": Call(Call(Named("builtins", "getattr"), 1, "x"))}, "calls builtins.getattr"),
        ({"w": Call("text")}, "calls a str"),
        ({"w": Named("os", "system")}, "contains w beside tensors"),
        ({"w": tensor(VALUES), "epoch": 3}, "contains epoch beside tensors"),
        ({"w": tensor(VALUES, (7,))}, "larger than its storage"),
        ({"w": tensor(VALUES, (2,), (1,), 5)}, "larger than its storage"),
        ({"w": tensor(VALUES, (2,), (-1,), 3)}, "no valid shape"),
        ({"w": tensor(VALUES, (2, 2))}, "no valid shape"),
        ({"w": tensor(VALUES, (10**9,), (0,))}, "repeats values"),
        ({"w": tensor(VALUES, kind="QInt8Storage")}, "values of the type QInt8Storage"),
        ([tensor(VALUES)], "contains a list"),
        ({}, "no tensors"),
        (3, "contains a int"),
    ],
)
def test_everything_but_tensors_is_refused(value, words, path, monkeypatch):
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    with pytest.raises(ValueError, match=f"without torch.*{words}"):
        read_torch_tensors(written(path, value, VALUES))


@pytest.mark.parametrize(
    "raw",
    [
        b"cos\nsystem\n(S'exit 3'\ntR.",  # the classic of protocol 0
        b"(S'exit 3'\nios\nsystem\n.",  # INST
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x02cos\nsystem\n}b.",  # BUILD of a name
        b"\x80\x02}]0.",  # POP
        b"\x80\x02.",
        b"\x80\x02h\x07.",  # a memo that does not exist
        b"\x80\x02R.",
        b"\x80\x02}K\x01s.",
        b"\x80\x02}]]s.",
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x00x.",  # a text of 2^56 bytes
        b"",
    ],
)
def test_every_opcode_that_tensors_do_not_need_is_refused(raw, path):
    with pytest.raises(ValueError, match="cannot be read without torch"):
        read_torch_tensors(written(path, {}, VALUES, raw))
    old = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001))
    path.write_bytes(old + pickle.dumps({"little_endian": True}, 2) + raw)
    with pytest.raises(ValueError, match="cannot be read without torch"):
        read_torch_tensors(path)


def test_a_size_that_the_file_does_not_have_is_not_allocated(path):
    whole = (FOLDER / "torch_old.pth").read_bytes()
    # The counter is the only int64: its storage has one value.
    place = whole.index(struct.pack("<qq", 1, 7))
    path.write_bytes(whole[:place] + struct.pack("<q", 2**59) + whole[place + 8 :])
    with pytest.raises(ValueError, match="end early"):
        read_torch_tensors(path)


def test_other_files_are_named(path):
    path.write_bytes(pickle.dumps({"w": [1.0]}))
    with pytest.raises(ValueError, match="not a file that torch.save wrote"):
        read_torch_tensors(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    with pytest.raises(ValueError, match="without the data.pkl of torch"):
        read_torch_tensors(path)
    written(path, {"w": tensor(VALUES)}, VALUES, **{"constants.pkl": b""})
    with pytest.raises(ValueError, match="TorchScript"):
        read_torch_tensors(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
    with pytest.raises(ValueError, match="compressed"):
        read_torch_tensors(path)


@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_a_model_takes_the_weights_of_a_torch_file(path):
    import tensorflow as tf

    import tfimm_lora as lora

    model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2, name="fc")])
    value = {"fc.weight": tensor(VALUES, (2, 3), (1, 2)), "fc.bias": tensor(VALUES, (2,))}
    lora.load_timm_weights(model, written(path, value, VALUES))
    kernel, bias = model.get_weights()
    np.testing.assert_array_equal(kernel, VALUES.reshape(3, 2))
    np.testing.assert_array_equal(bias, [0, 1])
    integers = np.arange(6)
    value["fc.weight"] = tensor(integers, (2, 3), (1, 2), kind="LongStorage")
    value["fc.bias"] = tensor(integers, (2,), kind="LongStorage")
    with pytest.raises(ValueError, match="wrong type: fc.weight is int64"):
        lora.load_timm_weights(model, written(path, value, integers))
