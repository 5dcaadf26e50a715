"""Folders of VTAB-1k that are written with tensorflow_datasets, here with a small stand-in."""

import io
import sys
import types

import numpy as np
import pytest
from PIL import Image

from benchmarks.vtab import from_tfds
from benchmarks.vtab.from_tfds import SOURCES, write_task
from benchmarks.vtab.pictures import read
from benchmarks.vtab.tasks import BOTH, CLASSES, TEST, TRAIN, VAL, find_task

pytestmark = pytest.mark.once


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, "uint8")).save(file, "PNG")
    return file.getvalue()


class Builder:
    """A data set of numbered examples."""

    def __init__(self, sizes, example):
        splits = {name: types.SimpleNamespace(num_examples=n) for name, n in sizes.items()}
        self.info = types.SimpleNamespace(splits=splits)
        self.example, self.read = example, []

    def download_and_prepare(self):
        self.prepared = True

    def as_dataset(self, split, shuffle_files, decoders):
        assert self.prepared and not shuffle_files and decoders == {"image": "undecoded"}
        self.read.append(split)
        name, _, limits = split.rstrip("]").partition("[")
        first, _, last = limits.partition(":")
        numbers = range(self.info.splits[name].num_examples)
        chosen = numbers[int(first or 0) : int(last) if last else None]
        return [self.example(name, i) for i in chosen]


@pytest.fixture
def install(monkeypatch):
    """Install a stand-in that has one data set."""

    def put(expected, builder):
        def find(name):
            if name != expected:
                raise AssertionError(f"Dataset cannot be loaded at version {name}.")
            return builder

        decode = types.SimpleNamespace(SkipDecoding=lambda: "undecoded")
        module = types.SimpleNamespace(
            builder=find, as_numpy=list, decode=decode, __version__="4.9"
        )
        monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)

    return put


def test_every_task_has_a_source():
    assert set(SOURCES) == set(CLASSES)


def test_a_folder_is_written(install, tmp_path):
    """3,060 pictures for training: the validation part begins at 90 percent."""

    def example(split, i):
        return {"image": png(np.full((4, 4, 3), i % 251)), "label": np.int64(i % 102)}

    builder = Builder({"train": 3060, "test": 5}, example)
    install("caltech101:3.*.*", builder)
    write_task("caltech101", tmp_path)
    task = find_task("caltech101", tmp_path)
    assert builder.read == ["train[:800]", "train[2754:2954]", "test[0:]"]
    counts = {TRAIN: 800, VAL: 200, BOTH: 1000, TEST: 5}
    assert {file: len(task.part(file).paths) for file in counts} == counts
    val = task.part(VAL)
    assert val.labels[3] == 2757 % 102
    assert np.all(read(val.paths[3], 2) == 2757 % 251)
    builder.read.clear()
    write_task("caltech101", tmp_path)  # it is there
    assert not builder.read


def test_an_interrupted_folder_is_not_left(install, tmp_path):
    def example(split, i):
        if split == "test":
            raise KeyboardInterrupt
        return {"image": png(np.zeros((2, 2))), "label": 0}

    install("dtd:3.*.*", Builder({"train": 3, "validation": 3, "test": 1}, example))
    with pytest.raises(KeyboardInterrupt):
        write_task("dtd", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_an_archive_is_kept(tmp_path):
    (tmp_path / "cifar").mkdir()
    write_task("cifar100", tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["cifar"]


@pytest.mark.parametrize(
    "task, sizes, val, test",
    [
        ("eurosat", {"train": 27000}, "train[16200:16400]", "train[21600:]"),
        ("resisc45", {"train": 31500}, "train[18900:19100]", "train[25200:]"),
        ("dsprites_ori", {"train": 737280}, "train[589824:590024]", "train[663552:]"),
        (
            "clevr_dist",
            {"train": 70000, "validation": 9},
            "train[63000:63200]",
            "validation[0:]",
        ),
        ("svhn", {"train": 73257, "test": 9}, "train[65931:66131]", "test[0:]"),
        ("smallnorb_azi", {"test": 24300}, "test[0:200]", "test[12150:]"),
        ("oxford_iiit_pet", {"train": 3680, "test": 9}, "train[2944:3144]", "test[0:]"),
    ],
)
def test_parts_are_those_of_vtab(task, sizes, val, test):
    """The numbers of Scenic's configs of VTAB, which are written out there."""
    splits = from_tfds._splits(Builder(sizes, None), SOURCES[task])
    assert splits == {TRAIN: "train[:800]", VAL: val, TEST: test}


@pytest.mark.parametrize("distance, label", [(7.9, 0), (8.0, 0), (8.2, 1), (9.7, 4), (10.5, 5)])
def test_clevr(distance, label):
    coordinates = np.array([[1, 2, 12], [1, 2, distance], [1, 2, 11]], "float32")
    objects = {"pixel_coords": coordinates, "size": np.zeros(7)}
    assert SOURCES["clevr_dist"].label({"objects": objects}) == label
    assert SOURCES["clevr_count"].label({"objects": objects}) == 4


@pytest.mark.parametrize(
    "kinds, distances, label",
    [
        ([0, 4], [7.5, 3], 0),
        ([1, 2], [30, 8.5], 1),
        ([2, 7], [25, 1], 2),
        ([3, 7], [2, 5], 3),  # a pedestrian and others
        ([], [], 3),
    ],
)
def test_kitti(kinds, distances, label):
    location = np.array([[0, 0, z] for z in distances], "float32").reshape(-1, 3)
    objects = {"type": np.array(kinds, "int64"), "location": location}
    assert SOURCES["kitti"].label({"objects": objects}) == label


def test_dsprites_and_smallnorb(install, tmp_path):
    labels = [SOURCES["dsprites_ori"].label({"label_orientation": i}) for i in range(40)]
    assert labels == [int(i // 2.5) for i in range(40)] and labels[-1] == 15
    labels = [SOURCES["dsprites_loc"].label({"label_x_position": i}) for i in range(32)]
    assert labels == [i // 2 for i in range(32)]
    angles = {"label_azimuth": 17, "label_elevation": 8}
    assert SOURCES["smallnorb_azi"].label(angles) == 17
    assert SOURCES["smallnorb_ele"].label(angles) == 8

    def example(split, i):
        return {"image": png([[0, 1], [1, 0]]), "label_x_position": 31}

    install("dsprites:2.*.*", Builder({"train": 20}, example))
    write_task("dsprites_loc", tmp_path)
    path = tmp_path / "dsprites_loc" / "images" / "train800" / "000000.png"
    assert read(path, 2)[..., 0].tolist() == [[0, 255], [255, 0]]


def test_another_version_or_none_is_refused(install, tmp_path, monkeypatch):
    install("oxford_iiit_pet:4.*.*", None)
    with pytest.raises(ValueError, match="oxford_iiit_pet:3.*tensorflow_datasets 4.9 does not"):
        write_task("oxford_iiit_pet", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow_datasets"):
        write_task("dtd", tmp_path)
    assert list(tmp_path.iterdir()) == []
