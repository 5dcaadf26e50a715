"""Masks in files of COCO: what is drawn, where the files may be, and what is reported."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.coco_pictures import box, coco, run_lengths, write_coco
from tests.helpers.commands import ask
from tests.helpers.mask_pictures import mask_recipe
from tfimm_lora.finetuning.data.check import check_data
from tfimm_lora.finetuning.data.coco_file import coco_mask, coco_reference
from tfimm_lora.finetuning.data.dataset import find_pictures
from tfimm_lora.finetuning.data.mask_targets import MaskTargets
from tfimm_lora.finetuning.data.masks import read_mask
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.run import split_text
from tfimm_lora.utils import optional_imports

pytestmark = pytest.mark.once


def messages(data, **options):
    checked = check_data(data, targets=MaskTargets(**options))
    return [x.message for x in checked.errors], [x.message for x in checked.warnings], checked


def changed(folder, change):
    """Change the content of the file in a folder."""
    path = folder / "_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return folder


def one_picture(path, objects, **options):
    path.write_text(json.dumps(coco([("a.png", 6, 8)], objects, **options)))
    return coco_mask(str(path), 0)


# -- drawing --------------------------------------------------------------------------------


def test_polygons_and_run_lengths_are_drawn_alike(tmp_path):
    expected = np.zeros((6, 8), int)
    expected[1:4, 2:7] = 7
    inside = expected > 0
    encoded = run_lengths(inside)
    halves = [*box(2, 1, 4, 4), *box(4, 1, 7, 4)]
    for shape in (box(2, 1, 7, 4), halves, encoded):
        np.testing.assert_array_equal(
            one_picture(tmp_path / "a.json", [(0, 7, shape)]), expected
        )


def test_compressed_run_lengths_are_read(tmp_path):
    from pycocotools import mask as official

    shape = np.random.default_rng(0).random((6, 8)) < 0.5
    encoded = official.encode(np.asfortranarray(shape.astype("uint8")))
    encoded["counts"] = encoded["counts"].decode()
    drawn = one_picture(tmp_path / "a.json", [(0, 1, encoded)])
    np.testing.assert_array_equal(drawn, shape.astype(int))
    same = one_picture(tmp_path / "a.json", [(0, 1, run_lengths(shape))])
    np.testing.assert_array_equal(drawn, same)


@pytest.mark.parametrize("order", [1, -1])
def test_the_smaller_of_two_objects_is_on_top(order, tmp_path):
    objects = [(0, 1, box(0, 0, 8, 6)), (0, 7, box(2, 2, 4, 4))][::order]
    mask = one_picture(tmp_path / "a.json", objects)
    assert np.bincount(mask.ravel()).tolist() == [0, 44, *[0] * 5, 4]
    assert (mask[2:4, 2:4] == 7).all()


@pytest.mark.parametrize(
    "categories, background",
    [
        (((1, "cell"), (7, "core")), 0),
        (((0, "cells"), (1, "cell"), (7, "core")), 8),
        (((0, "Background"), (1, "cell"), (7, "core")), 0),
        (((3, "background"), (1, "cell"), (7, "core")), 3),
    ],
)
def test_pixels_in_no_object_are_background(categories, background, tmp_path):
    mask = one_picture(tmp_path / "a.json", [(0, 1, box(0, 0, 4, 6))], categories=categories)
    assert (mask[:, :4] == 1).all() and (mask[:, 4:] == background).all()


@pytest.mark.parametrize(
    "shape, message",
    [
        ([[0, 0, 4, 4]], "4 numbers"),
        (run_lengths(np.ones((5, 5))), "size \\[5, 5\\], its picture \\[6, 8\\]"),
        ([["a"] * 6], "object 0 cannot be drawn"),
        ({"counts": "##"}, "object 0 cannot be drawn"),
    ],
)
def test_objects_that_cannot_be_drawn_name_the_file(shape, message, tmp_path):
    with pytest.raises(UnreadablePicture, match=message) as caught:
        one_picture(tmp_path / "a.json", [(0, 1, shape)])
    assert f"{tmp_path}/a.json#0" in str(caught.value)


# -- layouts --------------------------------------------------------------------------------


def test_a_file_beside_the_pictures_a_file_apart_and_a_csv_file_say_the_same(tmp_path):
    folder = write_coco(tmp_path / "data")
    errors, warnings, checked = messages(folder)
    assert (errors, warnings) == ([], [])
    split = checked.split
    assert split.labels == ("background", "cell", "core")
    assert (len(split.train), len(split.val)) == (6, 2)
    assert split.targets.classes_of(split.labels).values == (0, 1, 7)
    for picture in (*split.train.pictures, *split.val.pictures):
        pixels = np.asarray(Image.open(picture.path))
        expected = np.zeros((32, 32), int)
        expected[(pixels == (200, 60, 60)).all(-1)] = 1
        expected[(pixels == (60, 200, 60)).all(-1)] = 2
        np.testing.assert_array_equal(
            read_mask(picture.label, split.targets.classes_of(split.labels)), expected
        )

    apart = tmp_path / "cells.json"
    shutil.move(folder / "_annotations.coco.json", apart)
    given = find_pictures(folder, targets=MaskTargets(str(apart)))
    assert [x.path for x in given.train.pictures] == [x.path for x in split.train.pictures]
    assert given.train.pictures[0].label.startswith(f"{apart}#")
    (tmp_path / "split.csv").write_text(split_text(given))
    again = find_pictures(tmp_path / "split.csv", targets=MaskTargets())
    assert again.parts() == {
        name: type(part)(part.pictures, part.labels, again.targets)
        for name, part in given.parts().items()
    }
    assert again.targets.classes == given.targets.classes


def test_parts_as_of_roboflow_and_as_of_coco(tmp_path):
    folder = write_coco(tmp_path / "data", n=4, parts=("train", "valid", "test"))
    errors, warnings, checked = messages(folder)
    assert (errors, warnings) == ([], [])
    split = checked.split
    names = {
        part: sorted(x.path.rpartition("/")[2] for x in pictures.pictures)
        for part, pictures in split.parts().items()
    }
    assert names == {
        "train": [f"train{i}.png" for i in range(4)],
        "val": [f"valid{i}.png" for i in range(4)],
        "test": [f"test{i}.png" for i in range(4)],
    }
    other = tmp_path / "coco"
    (other / "annotations").mkdir(parents=True)
    for ours, theirs in (("train", "train2017"), ("valid", "val2017")):
        shutil.copytree(folder / ours, other / theirs)
        source = other / theirs / "_annotations.coco.json"
        shutil.move(source, other / "annotations" / f"instances_{theirs}.json")
        (other / "annotations" / f"captions_{theirs}.json").write_text("{}")
    found = find_pictures(other, targets=MaskTargets())
    assert (len(found.train), len(found.val), found.test) == (4, 4, None)
    named = find_pictures(other, targets=MaskTargets(str(other / "annotations")))
    assert [x.pictures for x in named.parts().values()] == [
        x.pictures for x in found.parts().values()
    ]


# -- faults ---------------------------------------------------------------------------------


def test_names_may_have_folders_also_of_windows(tmp_path):
    folder = write_coco(tmp_path / "data", n=4, parts=("train", "valid"))
    for part in ("train", "valid"):
        (folder / part / "more").mkdir()
        shutil.move(folder / part / f"{part}0.png", folder / part / "more" / "0.png")
        changed(folder / part, lambda x: x["images"][0].update(file_name="more\\0.png"))
    split = find_pictures(folder, targets=MaskTargets())
    assert [len(x) for x in split.parts().values()] == [4, 4]
    assert split.train.pictures[0].path == str(folder / "train" / "more" / "0.png")


def test_every_fault_of_a_picture_is_one_finding(tmp_path):
    folder = write_coco(tmp_path / "data", n=12)

    def damage(content):
        content["annotations"][0]["segmentation"] = []
        content["annotations"][2]["segmentation"] = [[1, 2, 3]]
        content["images"][2]["height"] = 16
        content["images"][3]["file_name"] = content["images"][4]["file_name"]
        content["categories"].append({"id": 9, "name": "wall"})
        content["images"] += [{"id": 20, "file_name": "no.png", "height": 1, "width": 1}]

    changed(folder, damage)
    errors, warnings, checked = messages(folder)
    text = "\n".join(errors)
    assert "has 1 picture twice: 4.png" in text
    assert "lists 1 picture that is not in" in text and "no.png" in text
    assert "1 picture has objects without a segmentation" in text and "0.png" in text
    assert "1 mask has another size than its picture" in text and "32 x 16, not 32 x 32" in text
    assert len(errors) == 4
    assert [(p.path.rpartition("/")[2], p.reason) for p in checked.problems] == [
        ("1.png", checked.problems[0].reason)
    ]
    assert "cannot be drawn: a polygon has 3 numbers" in checked.problems[0].reason
    text = "\n".join(warnings)
    assert "no objects of these categories: wall" in text
    assert "1 picture is in no file of COCO" in text and "3.png" in text


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.pop("categories"), "it has no list categories"),
        (lambda x: x["annotations"][0].pop("category_id"), "an entry without 'category_id'"),
        (lambda x: x["images"][0].pop("height"), "an entry without 'height'"),
        (lambda x: x["images"][1].update(id=0), "images have the id 0 twice"),
        (lambda x: x["images"][1].update(id="a"), "the id 'a'"),
        (lambda x: x["annotations"][0].update(image_id=77), "1 id of pictures that"),
        (lambda x: x["annotations"][0].update(category_id=5), "1 id of categories that"),
        (lambda x: x["categories"][0].update(name="core"), "classes with the same name: core"),
        (lambda x: x["images"].clear() or x["annotations"].clear(), "has no pictures"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(change, message, tmp_path):
    folder = changed(write_coco(tmp_path / "data", n=4), change)
    with pytest.raises(ValueError, match=message):
        find_pictures(folder, targets=MaskTargets())


def test_a_file_that_is_none_of_coco(tmp_path):
    folder = write_coco(tmp_path / "data", n=4)
    (folder / "_annotations.coco.json").write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        find_pictures(folder, targets=MaskTargets())
    (folder / "_annotations.coco.json").write_text("[]")
    with pytest.raises(ValueError, match="no list images and no list annotations"):
        find_pictures(folder, targets=MaskTargets())
    (folder / "more.json").write_text("[]")
    with pytest.raises(ValueError, match="2 JSON files for all pictures"):
        find_pictures(folder, targets=MaskTargets())


def test_a_damaged_file_of_a_part_is_one_error(tmp_path):
    folder = write_coco(tmp_path / "data", n=4, parts=("train", "valid"))
    (folder / "train" / "_annotations.coco.json").write_text("[]")
    errors, warnings, _ = messages(folder)
    assert len(errors) == 1 and "is not a file of COCO" in errors[0] and not warnings


def test_files_with_other_categories_are_refused(tmp_path):
    folder = write_coco(tmp_path / "data", n=4, parts=("train", "valid"))

    def swap(content):
        content["categories"] = [{"id": 1, "name": "core"}, {"id": 7, "name": "cell"}]

    changed(folder / "valid", swap)
    with pytest.raises(ValueError, match=r"1 \(cell\), 7 \(core\); .* has 1 \(core\), 7"):
        find_pictures(folder, targets=MaskTargets())
    # Also if the classes are those of a training that is over.
    trained = find_pictures(write_coco(tmp_path / "other"), targets=MaskTargets())
    changed(folder / "train", swap)
    targets = MaskTargets(classes=trained.targets.classes)
    with pytest.raises(ValueError, match=r"1 is core \(expected cell\), 7 is cell"):
        find_pictures(folder, targets=targets)


def test_the_package_that_draws_is_named(tmp_path, monkeypatch):
    folder = write_coco(tmp_path / "data", n=4)

    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(optional_imports.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "tfimm_lora\[coco\]"'):
        find_pictures(folder, targets=MaskTargets())


def test_a_reference_to_a_picture_that_is_not_in_the_file(tmp_path):
    folder = write_coco(tmp_path / "data", n=4)
    reference = coco_reference(folder / "_annotations.coco.json", 9)
    rows = [f"{i}.png,{folder / '_annotations.coco.json'}#{i}" for i in range(3)]
    (folder / "a.csv").write_text("\n".join(["path,mask", *rows, f"3.png,{reference}"]))
    checked = check_data(folder / "a.csv", targets=MaskTargets())
    assert not checked.errors and len(checked.problems) == 1
    assert "has no picture with the id 9" in checked.problems[0].reason


# -- commands -------------------------------------------------------------------------------


def test_commands_take_files_of_coco(tmp_path, capsys):
    folder = write_coco(tmp_path / "data", n=8)
    recipe = mask_recipe(tmp_path, data=str(folder), epochs=1)
    finetune_pictures(recipe, out=tmp_path / "run", verbose="none")
    more = write_coco(tmp_path / "more", n=3, seed=5)
    words = ("--data", more, "--masks", more / "_annotations.coco.json", "--json")
    told = json.loads(ask(capsys, "evaluate", tmp_path / "run", *words)[0])
    assert told["pictures"] == 3 and told["labels"] == ["background", "cell", "core"]
    words = (more / "0.png", "--out", tmp_path / "masks", "--json")
    told = json.loads(ask(capsys, "predict", tmp_path / "run", *words)[0])
    mask = np.asarray(Image.open(told["predictions"][0]["mask"]))
    assert mask.shape == (32, 32) and set(np.unique(mask)) <= {0, 1, 7}
    found = ask(capsys, "check", folder, "--task", "segmentation")[0]
    assert "core" in found and "cell" in found
