"""Damaged and hostile adapter folders.

Whatever a folder contains, ``Adapter.load`` returns an adapter or raises a ValueError that
names the file. ``HOSTILE`` lists known attacks and bugs found earlier; the remaining inputs
are seeded random mutations.
"""

import json
import re
import resource
import struct

import numpy as np
import pytest

import tfimm_lora as lora

pytestmark = pytest.mark.once

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

#: How many mutated folders are read.
MUTATIONS = 12_000


def small():
    rng = np.random.default_rng(0)

    def update(*shape_a, out=3):
        a = rng.normal(size=shape_a).astype("float32")
        b = rng.normal(size=(out, shape_a[0], *(1 for _ in shape_a[2:]))).astype("float32")
        return lora.LayerUpdate(a, b, 0.75, "conv" if len(shape_a) > 2 else "linear")

    return lora.Adapter(
        {"blocks.0.attn.qkv": update(2, 5), "conv1": update(1, 2, 3, 3)},
        {"head.weight": np.ones((2, 3), "float32"), "conv1.bias": np.ones(3, "float32")},
        ("head",),
        bias="lora_only",
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The bytes of a good folder, by file."""
    folder = tmp_path_factory.mktemp("good")
    small().save(folder)
    assert lora.Adapter.load(folder) == small()
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


def read(folder, files):
    """Whether the folder loads; any error other than the documented ones fails the test."""
    for name, content in files.items():
        (folder / name).write_bytes(content)
    try:
        lora.Adapter.load(folder)
        good = True
    except ValueError as error:
        assert str(folder) in str(error), error
        good = False
    except FileNotFoundError:
        good = False
    return good


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(change):
    def damaged(files):
        header, data = header_of(files[WEIGHTS])
        change(header)
        text = json.dumps(header).encode()
        return {**files, WEIGHTS: struct.pack("<Q", len(text)) + text + data}

    return damaged


def with_config(**fields):
    def damaged(files):
        config = {**json.loads(files[CONFIG]), **fields}
        return {**files, CONFIG: json.dumps(config).encode()}

    return damaged


KEY = "base_model.model.blocks.0.attn.qkv.lora_A.weight"
DEEP = b"[" * 100_000 + b"]" * 100_000

#: What was done -> (how, words of the error; None where the folder is still good).
HOSTILE = {
    "empty weights": (lambda f: {**f, WEIGHTS: b""}, "safetensors"),
    "cut off": (lambda f: {**f, WEIGHTS: f[WEIGHTS][:-5]}, "safetensors"),
    "huge header": (
        lambda f: {**f, WEIGHTS: struct.pack("<Q", 2**62) + f[WEIGHTS][8:]},
        "claims a header of",
    ),
    "header longer than the file": (
        lambda f: {**f, WEIGHTS: struct.pack("<Q", 10**6) + f[WEIGHTS][8:]},
        "claims a header of",
    ),
    "overlapping tensors": (
        with_header(lambda h: h[KEY.replace("_A", "_B")].update(data_offsets=[0, 24])),
        "safetensors",
    ),
    "absurd shape": (
        with_header(lambda h: h[KEY].update(shape=[2**40, 2**40])),
        "safetensors",
    ),
    "shape of no size": (with_header(lambda h: h[KEY].update(shape=[0, 5])), "safetensors"),
    "unknown type": (with_header(lambda h: h[KEY].update(dtype="Q7")), "safetensors"),
    "integers": (with_header(lambda h: h[KEY].update(dtype="I32")), "type I32"),
    "tensor renamed": (
        with_header(lambda h: h.update({KEY.replace("lora_A", "lora_C"): h.pop(KEY)})),
        "not supported",
    ),
    "path in a name": (
        with_header(lambda h: h.update({"../../etc/passwd": h.pop(KEY)})),
        "keys that begin with",
    ),
    "path in a module": (
        with_header(lambda h: h.update({f"base_model.model.../x{KEY[16:]}": h.pop(KEY)})),
        "no lora_",
    ),
    "half a layer": (
        with_header(lambda h: h.update({"base_model.model.x.bias": h.pop(KEY)})),
        "no lora_A for blocks.0.attn.qkv",
    ),
    "metadata is no JSON": (
        with_header(lambda h: h["__metadata__"].update(tfimm_lora="{")),
        "not JSON",
    ),
    "metadata of a later version": (
        with_header(lambda h: h["__metadata__"].update(tfimm_lora='{"version": 2}')),
        "later version",
    ),
    "metadata of another type": (
        with_header(lambda h: h["__metadata__"].update(tfimm_lora='{"version":1,"qkv":3}')),
        "damaged metadata",
    ),
    "kind that is not known": (
        with_header(
            lambda h: h["__metadata__"].update(
                tfimm_lora='{"version":1,"kinds":{"conv1":"magic"}}'
            )
        ),
        "unknown kind 'magic'",
    ),
    "config is no JSON": (lambda f: {**f, CONFIG: b"{"}, "not JSON"),
    "config is not text": (lambda f: {**f, CONFIG: b"\xff\xfe\x00"}, "not JSON"),
    "config is deep": (lambda f: {**f, CONFIG: DEEP}, "not JSON|expected an object"),
    "config is a list": (lambda f: {**f, CONFIG: b"[1]"}, "holds a list"),
    "config of numbers beyond floats": (
        lambda f: {
            **f,
            CONFIG: f[CONFIG].replace(b'"lora_alpha": 1.5', b'"lora_alpha": 1e999'),
        },
        "finite alpha",
    ),
    "another type": (with_config(peft_type="IA3"), "peft_type='IA3'"),
    "rank of text": (with_config(r="2"), "r='2'"),
    "rank zero": (with_config(r=0, rank_pattern={}), "r=0"),
    "rank that the tensors have not": (with_config(r=7, rank_pattern={}), "rank 7"),
    "alpha of text": (with_config(lora_alpha=[1]), r"lora_alpha=\[1\]"),
    "pattern of text": (with_config(alpha_pattern={"conv1": "x"}), "alpha_pattern"),
    "pattern that is none": (with_config(alpha_pattern={"(": 1}), "not a regular expression"),
    "modules of numbers": (with_config(modules_to_save=[1]), "expected names"),
    "modules that are not there": (with_config(modules_to_save=["tail"]), r"\['tail'\]"),
    "DoRA": (with_config(use_dora=True), "use_dora=True"),
    "changed base": (with_config(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "a field of the future": (with_config(use_magic=True), "use_magic=True .unknown"),
    "biases that nobody trained": (with_config(bias="none"), "does not explain"),
    "bias of another word": (with_config(bias="some"), "bias='some'"),
    "harmless fields": (with_config(peft_version="9.9", inference_mode=False), None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_folder_is_refused_with_what_is_wrong(what, original, tmp_path):
    damage, words = HOSTILE[what]
    files = damage(dict(original))
    assert files != original
    good = read(tmp_path, files)
    if words is None:
        assert good
        return
    assert not good
    with pytest.raises(ValueError, match=words):
        lora.Adapter.load(tmp_path)


def test_a_pattern_that_never_ends_is_stopped():
    """Backtracking makes the match exponential in the length of the name.

    Without the limit, pytest's timeout ends this test.
    """
    from tfimm_lora.adapters.peft_config import value_by_pattern

    with pytest.raises(ValueError, match="takes too long to match"):
        value_by_pattern("a" * 60, {"(a|a|aa)+b": 1}, 8)


def test_values_that_are_not_finite_are_refused(original, tmp_path):
    for value in (np.nan, np.inf):
        content = bytearray(original[WEIGHTS])
        content[-4:] = np.float32(value).tobytes()
        assert not read(tmp_path, {**original, WEIGHTS: bytes(content)})


def test_missing_and_pickled_files_are_refused(original, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        lora.Adapter.load(tmp_path / "nothing")
    (tmp_path / CONFIG).write_bytes(original[CONFIG])
    with pytest.raises(FileNotFoundError, match=WEIGHTS):
        lora.Adapter.load(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickled and never read"):
        lora.Adapter.load(tmp_path)
    big = tmp_path / WEIGHTS
    with open(big, "wb") as file:
        file.truncate(9 << 30)  # takes no space
    with pytest.raises(ValueError, match="expected at most"):
        lora.Adapter.load(tmp_path)


def mutated(content, rng):
    """The bytes with one to three random mutations."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        if not content:
            break
        place = int(rng.integers(len(content)))
        kind = rng.integers(6)
        if kind == 0:
            content[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            content[place] = int(rng.integers(256))
        elif kind == 2:
            del content[place:]
        elif kind == 3:
            del content[place : place + int(rng.integers(1, 40))]
        elif kind == 4:
            content[place:place] = rng.bytes(int(rng.integers(1, 20)))
        else:  # another number in the text
            found = list(re.finditer(rb"\d+", bytes(content[:2000])))
            if found:
                match = found[int(rng.integers(len(found)))]
                new = (b"0", b"-1", b"99999999999999999999", b"1e400", b"null", b'"x"')
                content[match.start() : match.end()] = new[int(rng.integers(len(new)))]
    return bytes(content)


@pytest.mark.long
def test_thousands_of_mutated_files_only_raise_errors(original, tmp_path):
    rng = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = 0
    for i in range(MUTATIONS):
        files = dict(original)
        name = (CONFIG, WEIGHTS)[i % 2]
        files[name] = mutated(files[name], rng)
        good += read(tmp_path, files)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    print(f"{MUTATIONS} mutated folders: {good} still read, {MUTATIONS - good} refused")
    assert 0 < good < MUTATIONS / 2
    assert grown < 200 * 1024
