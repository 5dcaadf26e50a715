"""Several labels and numbers in CSV files and folders: what is read, divided and reported."""

import shutil
from collections import Counter

import numpy as np
import pytest

from tests.helpers.task_pictures import (
    COLOURS,
    NUMBERS,
    write_colours,
    write_csv,
    write_numbers,
)
from tfimm_lora.finetuning.data.check import check_data
from tfimm_lora.finetuning.data.dataset import find_pictures
from tfimm_lora.finetuning.data.label_targets import LabelTargets
from tfimm_lora.finetuning.data.listing import FoundPicture
from tfimm_lora.finetuning.data.number_targets import NumberTargets
from tfimm_lora.finetuning.run import split_text

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_colours(folder)
    return folder


def labels_of(split):
    """File name -> its labels."""
    found = {}
    for part in split.parts().values():
        for picture in part.pictures:
            names = {n for n, has in zip(part.labels, picture.label) if has}
            found[picture.path.rpartition("/")[2]] = names
    return found


def messages(data, targets):
    checked = check_data(data, targets=targets)
    return [x.message for x in checked.errors], [x.message for x in checked.warnings], checked


# -- several labels -------------------------------------------------------------------------


def test_columns_cells_and_folders_say_the_same(folder, tmp_path):
    split = find_pictures(folder / "colours.csv", targets=LabelTargets())
    assert split.labels == COLOURS and len(split) == 40
    expected = labels_of(split)
    assert set().union(*expected.values()) == set(COLOURS)
    rows = [(str(folder / name), "|".join(sorted(has))) for name, has in expected.items()]
    cells = write_csv(tmp_path / "cells.csv", ("path", "labels"), rows)
    with pytest.warns(UserWarning, match="without labels"):
        again = find_pictures(cells, targets=LabelTargets())
    assert again.labels == ("blue", "green", "red") and labels_of(again) == expected
    for name, has in expected.items():
        for label in has:
            inside = tmp_path / "folders" / label
            inside.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, inside / name)
    in_folders = find_pictures(tmp_path / "folders", targets=LabelTargets())
    assert labels_of(in_folders) == {k: v for k, v in expected.items() if v}


def test_a_split_file_is_read_as_it_was_written(folder, tmp_path):
    for data, targets in (
        (folder / "colours.csv", LabelTargets()),
        (write_numbers(tmp_path / "numbers"), NumberTargets()),
    ):
        split = find_pictures(data, targets=targets)
        (tmp_path / "split.csv").write_text(split_text(split))
        again = find_pictures(tmp_path / "split.csv", targets=type(targets)(split.labels))
        assert again.labels == split.labels
        for name, part in split.parts().items():
            assert again.parts()[name].pictures == part.pictures
        array = split.train.array()
        assert array.dtype == np.float32 and array.shape == (
            len(split.train),
            len(split.labels),
        )


def test_each_label_has_its_share_of_validation_pictures():
    rng = np.random.default_rng(0)
    names = [f"l{i}" for i in range(8)]
    frequency = np.array([0.6, 0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02])
    has = rng.random((400, 8)) < frequency
    has[:, 7] = has[:, 6] & (rng.random(400) < 0.7)  # labels that go together
    found = [
        FoundPicture(f"{i}.png", f"/{i}.png", tuple(n for n, yes in zip(names, row) if yes))
        for i, row in enumerate(has)
    ]
    train, val = LabelTargets().divided(found, 0.2, 0)
    assert sorted([*train, *val]) == sorted(found)
    assert abs(len(val) - 80) <= 4
    total = Counter(n for x in found for n in x.label)
    mine = Counter(n for x in val for n in x.label)
    # Iterative stratification: off by a few at most, where random splits are off by more.
    off = {n: abs(mine[n] - 0.2 * total[n]) for n in names}
    assert max(off.values()) <= 2, off
    assert all(mine[n] for n in names)
    shuffled = [found[i] for i in rng.permutation(400)]
    assert LabelTargets().divided(shuffled, 0.2, 0) == (train, val)
    assert LabelTargets().divided(found, 0.2, 1) != (train, val)


def test_all_faults_of_labels_are_reported_at_once(folder, tmp_path):
    rows = [(str(folder / f"{i}.png"), i % 2, 1, 0, i % 3 == 0, "me") for i in range(12)]
    rows[2] = (*rows[2][:1], "maybe", *rows[2][2:])
    rows[3] = (*rows[3][:1], "", *rows[3][2:])
    rows[4] = (*rows[4][:1], "nan", *rows[4][2:])
    rows.append((str(folder / "no.png"), 1, 1, 0, 1, "me"))
    rows = [[str(int(x)) if isinstance(x, bool) else x for x in row] for row in rows]
    header = ("path", "odd", "always", "never", "third", "author")
    data = write_csv(tmp_path / "bad.csv", header, rows)
    errors, _, checked = messages(data, LabelTargets(("odd", "always", "never", "third")))
    text = "\n".join(errors)
    assert "column odd has 'maybe', 'nan' (line 4, 6); expected 1 or 0" in text
    assert "column odd is empty in 1 row (line 5)" in text
    assert "1 file that does not exist" in text and "no.png" in text
    assert "no pictures with these labels: never" in text
    assert "training pictures have the label always" in text
    assert len(errors) == 5 and checked.split is not None
    # Without --columns, the column of text is a target too, and the message says what to do.
    errors, _, _ = messages(data, LabelTargets())
    assert any("column author has 'me'" in x and "--columns" in x for x in errors)
    errors, _, _ = messages(data, LabelTargets(("odd", "thrid")))
    assert "path,odd,thrid" in errors[0] and len(errors) == 1


def test_oddities_of_labels_are_reported(folder, tmp_path):
    rows = [(str(folder / f"{i}.png"), "ab"[i % 2]) for i in range(8)]
    data = write_csv(tmp_path / "a.csv", ("path", "labels"), rows)
    _, warned, _ = messages(data, LabelTargets())
    assert any("no picture has more than one label" in x for x in warned)
    data = write_csv(tmp_path / "b.csv", ("path", "labels"), [(r[0], "split") for r in rows])
    assert "name of a column" in messages(data, LabelTargets())[0][0]
    data = write_csv(tmp_path / "c.csv", ("path", "a", "a"), [(r[0], 1, 0) for r in rows])
    assert "more than one column with the name a" in messages(data, LabelTargets())[0][0]
    data = write_csv(tmp_path / "d.csv", ("path", "labels"), [(r[0], "") for r in rows])
    assert "has no labels" in messages(data, LabelTargets())[0][0]
    header = ("path", "labels", "split")
    rows = [(r[0], "a|b" if i % 3 else "b", "train") for i, r in enumerate(rows)]
    rows += [(str(folder / "9.png"), "a|c", "val")]
    assert (
        "labels in val that are not in train: c"
        in messages(write_csv(tmp_path / "e.csv", header, rows), LabelTargets())[0][0]
    )


# -- numbers --------------------------------------------------------------------------------


def test_numbers_are_read_with_their_columns(tmp_path):
    data = write_numbers(tmp_path)
    split = find_pictures(data, targets=NumberTargets())
    assert split.labels == NUMBERS and (len(split.train), len(split.val)) == (32, 8)
    one = find_pictures(data, targets=NumberTargets(("balance",)))
    assert one.labels == ("balance",)
    assert {p.path for p in one.val.pictures} == {p.path for p in split.val.pictures}
    values = {p.path: p.label[1] for p in split.train.pictures}
    assert {p.path: p.label[0] for p in one.train.pictures} == values


def test_all_faults_of_numbers_are_reported_at_once(tmp_path):
    write_numbers(tmp_path)
    cells = ["1", "2", "three", "", "nan", "inf", "1e3", "1_0", "3,5", "-4.5", "6", "7"]
    rows = [(f"{i}.png", cell, 5, 1e9 + i, "a") for i, cell in enumerate(cells)]
    rows.append(("none.png", 1, 5, 1e9, "a"))
    data = write_csv(tmp_path / "bad.csv", ("path", "x", "same", "time", "who"), rows)
    errors, warned, checked = messages(data, NumberTargets(("x", "same", "time")))
    text = "\n".join(errors)
    assert "column x has 'three', 'nan', 'inf' and 2 more (line 4, 6, 7, 9, 10)" in text
    assert "Write decimals with a point" in text
    assert "column x is empty in 1 row (line 5)" in text
    assert "none.png" in text
    assert "the target same is 5 for all" in text
    assert "the target time has a standard deviation of" in text and "float32" in text
    assert len(errors) == 5 and len(checked.listed) == 6
    assert "ignored 1 column: who" in "\n".join(warned)
    errors, _, _ = messages(data, NumberTargets())
    assert any("column who has 'a'" in x and "--columns" in x for x in errors)
    assert any("none.png" in x for x in errors)  # although no row has a target


def test_a_folder_and_a_missing_column_are_no_numbers(tmp_path):
    data = write_numbers(tmp_path / "a")
    for name in ("x", "y"):
        (tmp_path / "folder" / name).mkdir(parents=True)
    errors, _, _ = messages(tmp_path / "folder", LabelTargets(("x",)))
    assert any("columns=['x'] with the folder" in x for x in errors)
    errors, _, _ = messages(tmp_path / "folder", NumberTargets())
    assert len(errors) == 1 and "expected a CSV file with path and a column" in errors[0]
    errors, _, _ = messages(data, NumberTargets(("angle",)))
    assert len(errors) == 1 and "path,angle" in errors[0] and "brightness" in errors[0]


def test_pictures_left_out_can_leave_a_constant_target(tmp_path):
    write_numbers(tmp_path, n=6)
    rows = [(f"{i}.png", 1, "train" if i < 4 else "val") for i in range(6)]
    rows[0] = ("0.png", 2, "train")
    (tmp_path / "0.png").write_bytes(b"no picture")
    data = write_csv(tmp_path / "one.csv", ("path", "x", "split"), rows)
    errors, _, checked = messages(data, NumberTargets())
    assert len(errors) == 1 and "the target x is 1 for all 3" in errors[0]
    assert checked.split is None


def test_pictures_that_look_alike_may_have_different_numbers(tmp_path):
    write_numbers(tmp_path, n=8)
    for i in range(1, 4):  # identical ones may not
        shutil.copy(tmp_path / "0.png", tmp_path / f"{i}.png")
    rows = [(f"{i}.png", i) for i in range(8)]
    checked = check_data(
        write_csv(tmp_path / "x.csv", ("path", "x"), rows), targets=NumberTargets()
    )
    assert {x.path.rpartition("/")[2] for x in checked.problems} == {
        f"{i}.png" for i in range(4)
    }
    assert all("identical to" in x.reason and "x " in x.reason for x in checked.problems)
    assert not any("look alike but" in x.message for x in checked.findings)
