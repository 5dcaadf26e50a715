"""``tfimm-lora check``: everything that is wrong with a folder of pictures."""

import csv
import json

import pytest

from tests.helpers.picture_folders import break_picture, touch, write_digits, write_split
from tfimm_lora.cli import main

pytestmark = pytest.mark.once


@pytest.fixture
def call(capsys):
    def run(*argv, code=0):
        assert main(["check", *map(str, argv)]) == code
        return capsys.readouterr()

    return run


def test_good_pictures_pass(tmp_path, call):
    out = call(write_digits(tmp_path / "digits", each=5)).out
    rows = [line.split() for line in out.splitlines()]
    assert ["class", "train", "val", "left", "out"] in rows
    assert ["0", "4", "1", "0"] in rows and ["all", "12", "3", "0"] in rows
    assert "can use all 15 pictures" in out


def test_everything_is_reported_in_one_pass(tmp_path, call):
    data = write_digits(tmp_path / "digits", each=20)
    touch(data, "stray.png", "0/notes.psd")
    (data / "empty").mkdir()
    break_picture(data / "1" / "2.png", "cut off")
    (data / "2" / "copy.png").write_bytes((data / "0" / "3.png").read_bytes())
    out = call(data, code=1).out
    for words in (
        "error: " + str(data) + " has 1 picture beside its class folders: stray.png",
        "1 class folder without pictures: empty",
        "warning: " + str(data) + ": ignored 1 file without the suffix of a picture: 1 .psd",
        "3 pictures cannot be used",
        "1/2.png: ",
        "identical to",
        "2 errors would stop finetune",
        "--usable usable.csv",
    ):
        assert words in out
    read = json.loads(call(data, "--json", code=1).out)
    assert [len(read[name]) for name in ("errors", "left_out", "warnings")] == [2, 3, 1]
    assert read["errors"][0]["files"] == [str(data / "stray.png")]
    assert sum(sum(parts.values()) for parts in read["counts"].values()) == 58


def test_the_usable_pictures_can_be_used(tmp_path, call):
    data = write_split(tmp_path / "digits", each=5)
    touch(data, "train/stray.png")
    break_picture(data / "val" / "1" / "0.png", "text")
    usable = tmp_path / "usable.csv"
    assert f"written: {usable}" in call(data, "--usable", usable, code=1).err
    with open(usable, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 5 + 3 * 2 - 1
    assert "can use all 20 pictures" in call(usable).out
    assert "already exists" in call(data, "--usable", usable, code=1).err
    call(data, "--usable", usable, "--overwrite", code=1)


def test_a_class_that_loses_its_validation_pictures_is_named(tmp_path, call):
    data = write_split(tmp_path / "my digits", each=2)
    break_picture(data / "val" / "1" / "0.png", "empty")
    out = call(data, code=1).out
    assert "No validation pictures of these classes can be used: 1." in out
    assert f"finetune --data '{data}' would leave out 1 picture" in out


def test_too_few_pictures_write_nothing(tmp_path, call):
    data = touch(tmp_path / "digits", "a/1.png", "a/2.png", "b/1.png")
    shown = call(data, "--usable", tmp_path / "usable.csv", code=1)
    assert "error: None of 2 pictures can be used" in shown.out
    assert "too few pictures" in shown.out and "not written" in shown.err
    assert not (tmp_path / "usable.csv").exists()


@pytest.mark.parametrize("pictures", ["none", "list.csv", "one"])
def test_data_that_cannot_be_listed(tmp_path, call, pictures):
    (tmp_path / "list.csv").write_text("file\nx.png\n")
    touch(tmp_path, "one/cat/1.png")
    words = {
        "none": "does not exist",
        "list.csv": "has the columns file",
        "one": "one class, cat",
    }
    assert words[pictures] in call(tmp_path / pictures, code=1).out
