"""Masks: what is read, what is reported, and that they move with their pictures."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.mask_pictures import draw, write_masks, write_table
from tfimm_lora.finetuning.data import augmentation as augmentation_module
from tfimm_lora.finetuning.data import batches as batches_module
from tfimm_lora.finetuning.data.augmentation import Augmentation
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.data.check import check_data
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, find_pictures
from tfimm_lora.finetuning.data.mask_classes import (
    MaskClasses,
    default_palette,
    read_classes,
)
from tfimm_lora.finetuning.data.mask_targets import MaskTargets
from tfimm_lora.finetuning.data.masks import read_mask
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, check_pictures
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.run import split_text
from tfimm_lora.zoo.weights import preprocessing as preprocessing_module

pytestmark = pytest.mark.once

NEAREST = Image.Resampling.NEAREST

RGB = [
    {"name": "ground", "r": 0, "g": 0, "b": 0},
    {"name": "car", "r": 128, "g": 0, "b": 0},
    {"name": "tree", "r": 0, "g": 128, "b": 0},
]


@pytest.fixture
def folder(tmp_path):
    return write_masks(tmp_path / "data", n=8)


def messages(data, **options):
    checked = check_data(data, targets=MaskTargets(**options))
    return [x.message for x in checked.errors], [x.message for x in checked.warnings], checked


def pairs(split):
    return {
        p.path.rpartition("/")[2]: p.label.rpartition("/")[2]
        for part in split.parts().values()
        for p in part.pictures
    }


# -- layouts --------------------------------------------------------------------------------


def test_folders_and_csv_files_say_the_same(folder, tmp_path):
    errors, warnings, checked = messages(folder)
    assert (errors, warnings) == ([], []) and checked.split.labels == ("0", "1", "2")
    split = checked.split
    assert len(split.train) == 6 and len(split.val) == 2
    apart = find_pictures(
        folder / "images", targets=MaskTargets(str(folder / "masks")), validation=0.2
    )
    assert apart.train.pictures == split.train.pictures
    (tmp_path / "split.csv").write_text(split_text(split))
    again = find_pictures(tmp_path / "split.csv", targets=MaskTargets())
    assert again.train.pictures == split.train.pictures
    assert again.val.pictures == split.val.pictures


def test_parts_may_be_above_or_below_the_folders(folder, tmp_path):
    found = []
    for style in ("{part}/images/{name}", "images/{part}/{name}"):
        root = tmp_path / style[:3]
        for i in range(8):
            part = ("train", "val", "test")[min(i // 3, 2)]
            for kind in ("images", "masks"):
                path = root / style.replace("images", kind).format(part=part, name=f"{i}.png")
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / kind / f"{i}.png", path)
        split = find_pictures(root, targets=MaskTargets())
        found.append([[p.path[-5:] for p in x.pictures] for x in split.parts().values()])
    assert (
        found[0]
        == found[1]
        == [
            ["0.png", "1.png", "2.png"],
            ["3.png", "4.png", "5.png"],
            ["6.png", "7.png"],
        ]
    )


def test_names_of_masks_may_end_in_mask(folder):
    for path in (folder / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    assert pairs(find_pictures(folder, targets=MaskTargets()))["3.png"] == "3_mask.png"


# -- values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "RGB", "RGBA"])
def test_every_mode_of_a_mask_is_read_alike(mode, tmp_path):
    _, mask = draw(np.random.default_rng(1))
    path, colours = tmp_path / "mask.png", mode in ("RGB", "RGBA")
    if colours:
        palette = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)] + [(9, 9, 9)] * 253, "uint8")
        image = Image.fromarray(palette[mask]).convert(mode)
        void = {"name": "ignore", "r": 9, "g": 9, "b": 9}
        classes = read_classes(write_table(tmp_path / "classes.csv", [*RGB, void]))
        assert classes.names == ("ground", "car", "tree")
        np.testing.assert_array_equal(classes.palette, palette[:3])
    else:
        classes = MaskClasses(("a", "b", "c"), (0, 1, 2))
        image = Image.fromarray(mask.astype("uint16") if mode == "I;16" else mask)
        if mode == "P":
            image = image.convert("P") if image.mode == "P" else image
            image.putpalette(list(range(256)) * 3)
        assert image.mode == mode
    image.save(path)
    expected = np.where(mask == 255, -1, mask.astype(int))
    np.testing.assert_array_equal(read_mask(str(path), classes), expected)


def test_tables_of_classes(tmp_path):
    index = [{"name": "a", "index": 7}, {"name": "b", "index": 255}]
    for name in ("t.csv", "t.json"):
        table = read_classes(write_table(tmp_path / name, index))
        assert table == MaskClasses(("a", "b"), (7, 255))
        assert table.unused == ()  # 255 is a class here
        assert MaskClasses.from_dict(table.names, table.to_dict()).unused == ()
    both = [{**row, "index": i} for i, row in enumerate(RGB)]
    table = read_classes(write_table(tmp_path / "both.csv", both))
    assert table.values == (0, 1, 2) and table.colours[1] == "#800000"
    assert MaskClasses.from_dict(table.names, table.to_dict()).palette[1].tolist() == [
        128,
        0,
        0,
    ]
    names = read_classes(write_table(tmp_path / "names.csv", [{"name": "a"}, {"name": "b"}]))
    assert names.values == (0, 1) and names.unused == (255,)
    # As in the devkit of Pascal VOC: aeroplane, bicycle, bird, boat, bottle, ..., cow.
    expected = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert list(map(tuple, default_palette(11)))[:5] == expected
    assert default_palette(11)[10].tolist() == [64, 128, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"label": "a", "index": 1}], "its columns are label, index"),
        ([{"name": "a", "index": "x"}, {"name": "b", "index": 1}], "'a' has index 'x'"),
        ([{"name": "a", "index": 1}, {"name": "b", "index": 1}], "same value: 1"),
        ([{"name": "a", "index": 1}, {"name": "a", "index": 2}], "same name: a"),
        ([{"name": "a", "index": 1}], "expected at least two"),
        ([{"name": "a", "r": 300, "g": 0, "b": 0}], "the colour 300, 0, 0"),
    ],
)
def test_a_damaged_table_says_what_is_wrong(rows, message, tmp_path, folder):
    table = write_table(tmp_path / "t.csv", rows)
    with pytest.raises(ValueError, match=message):
        read_classes(table)
    errors, _, _ = messages(folder, classes=str(table))
    assert len(errors) == 1 and message in errors[0]


# -- faults ---------------------------------------------------------------------------------


def test_every_fault_is_one_finding(folder):
    masks = folder / "masks"
    Image.open(masks / "0.png").resize((20, 16), NEAREST).save(masks / "0.png")
    for name in ("1.png", "2.png"):
        values = np.array(Image.open(masks / name))
        values[5, 5] = 9
        Image.fromarray(values).save(masks / name)
    (masks / "3.png").write_text("no picture")
    (masks / "4.png").rename(masks / "other.png")
    table = write_table(
        folder / "classes.csv", [{"name": n, "index": i} for i, n in enumerate("abcz")]
    )
    errors, warnings, checked = messages(folder, classes=str(table))
    assert len(errors) == 3
    without, sized, unknown = errors
    assert "1 picture in" in without and "4.png" in without and "no mask" in without
    assert "(20 x 16, not 32 x 32)" in sized and "same width and height" in sized
    assert "2 masks have pixels with an index that no class has" in unknown
    assert "9 in" in unknown and "1.png" in unknown and "2.png" in unknown
    assert "expected 0 (a), 1 (b), 2 (c), 3 (z), or 255 (ignored)" in unknown
    [problem] = checked.problems
    assert problem.path.endswith("images/3.png") and "mask" in problem.reason
    assert any("other.png" in x and "no picture" in x for x in warnings)
    # What is left can be used.
    assert {p[-5:] for p in pairs(checked.split)} == {"5.png", "6.png", "7.png"}


def test_classes_that_never_occur_are_warned_of(folder):
    rows = [{"name": name, "index": i} for i, name in enumerate(("a", "b", "c", "never"))]
    table = write_table(folder / "classes.csv", rows)
    errors, warnings, checked = messages(folder, classes=str(table))
    assert not errors and checked.split.labels == ("a", "b", "c", "never")
    assert warnings == [
        "No mask has pixels of these classes: never. The model cannot learn them."
    ]
    counts = checked.split.targets.pixels(checked.split.train)
    masks = [np.array(Image.open(p.label)) for p in checked.split.train.pictures]
    assert counts["b"] == sum(int((mask == 1).sum()) for mask in masks) and counts["never"] == 0


def test_masks_of_one_class_name_the_table(folder):
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == 1, 255, 0).astype("uint8")).save(path)
    errors, _, _ = messages(folder)
    assert len(errors) == 1
    assert "the indices 0, 255, of which 255 is ignored" in errors[0]
    table = write_table(
        folder / "c.json", [{"name": "ground", "index": 0}, {"name": "car", "index": 255}]
    )
    assert messages(folder, classes=str(table))[0] == []


def test_colours_without_a_table_and_unknown_colours(folder):
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(default_palette(256)[mask % 255]).save(path)
    errors, _, _ = messages(folder)
    assert len(errors) == 1 and "expected at least two classes" in errors[0]
    table = str(write_table(folder / "classes.csv", RGB))
    assert messages(folder, classes=table)[:2] == ([], [])
    short = str(write_table(folder / "short.csv", RGB[:2]))
    errors, _, _ = messages(folder, classes=short)
    assert len(errors) == 1 and "#008000 (0, 128, 0) in" in errors[0]
    assert "expected #000000 (ground), #800000 (car)" in errors[0]


def test_identical_pictures_may_have_identical_masks(folder):
    for kind in ("images", "masks"):
        shutil.copy(folder / kind / "0.png", folder / kind / "8.png")
    _, _, checked = messages(folder)
    assert not [x for x in checked.problems if "whose label" in x.reason]
    shutil.copy(folder / "masks" / "1.png", folder / "masks" / "8.png")
    _, _, checked = messages(folder)
    assert len([x for x in checked.problems if "whose label" in x.reason]) == 2


def test_pictures_for_an_evaluation_are_checked_too(folder):
    split = find_pictures(folder, targets=MaskTargets())
    mask = folder / "masks" / "0.png"
    Image.open(mask).resize((8, 8), NEAREST).save(mask)
    everything = PictureSet(
        split.train.pictures + split.val.pictures, split.labels, split.targets
    )
    with pytest.raises(ValueError, match="another size than its picture"):
        check_pictures(everything)
    with pytest.raises(UnreadablePicture, match="index 9"):
        path = folder / "nine.png"
        Image.fromarray(np.full((4, 4), 9, "uint8")).save(path)
        read_mask(str(path), MaskClasses(("a", "b"), (0, 1)))


# -- batches --------------------------------------------------------------------------------


@pytest.fixture(params=["tensorflow", "numpy"])
def path_of_pictures(request, monkeypatch):
    """Both ways in which pictures are read: with tf.data, and without TensorFlow."""
    if request.param == "numpy":
        for module in (augmentation_module, batches_module, preprocessing_module):
            monkeypatch.setattr(module, "installed", lambda package: package != "tensorflow")
    return request.param


def own_masks(folder, n=6):
    """Pictures of which each is its own mask: grey 40 c for class c."""
    rng, found = np.random.default_rng(0), []
    for i in range(n):
        mask = np.kron(rng.integers(0, 6, (7, 9)), np.ones((11, 13))).astype("uint8")
        Image.fromarray(40 * mask).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"{i}-mask.png")
        found.append(Picture(str(folder / f"{i}.png"), str(folder / f"{i}-mask.png")))
    classes = MaskClasses(tuple("abcdef"), tuple(range(6)))
    return PictureSet(tuple(found), classes.names, MaskTargets(classes=classes))


@pytest.mark.parametrize(
    "augmentation",
    [
        None,
        Augmentation(scale=(0.3, 1.0), flip=True),
        Augmentation(scale=(0.3, 1.0), flip=True, rotate=45),
        Augmentation(scale=(0.3, 1.0), flip=True, brightness=0.5, contrast=0.3),
    ],
)
@pytest.mark.parametrize("crop_mode", ["squash", "center"])
def test_a_mask_moves_with_its_picture(augmentation, crop_mode, path_of_pictures, tmp_path):
    prepare = Preprocessing(
        (32, 48), (0.0,) * 3, (1 / 255,) * 3, interpolation="nearest", crop_mode=crop_mode
    )
    batches = PictureBatches(own_masks(tmp_path), prepare, 4, augmentation=augmentation, seed=3)
    seen = 0
    for x, y in batches.epoch(1):
        x, y = np.asarray(x)[..., 0], np.asarray(y)
        assert x.shape == y.shape and y.dtype == np.int32 and set(np.unique(y)) <= set(range(6))
        if augmentation is not None and augmentation.brightness:
            # The colours change, each alike everywhere in a picture, and the mask does not.
            for one, mask in zip(x, y):
                for label in np.unique(mask):
                    values = one[mask == label]
                    assert values.max() - values.min() < 1e-2
        elif augmentation is not None and augmentation.rotate:
            # Pictures are interpolated between pixels: a mask has one of those around.
            assert np.mean(np.abs(x - 40 * y) < 1) > 0.75
            assert np.mean(np.abs(x - 40 * y[:, :, ::-1]) < 1) < 0.5
        else:
            np.testing.assert_array_equal(np.rint(x), 40 * y)
        seen += len(y)
    assert seen == 6


def test_both_ways_of_reading_have_the_same_masks(tmp_path, monkeypatch):
    prepare = Preprocessing((24, 24), (0.5,) * 3, (0.5,) * 3, crop_mode="squash", crop_pct=1.0)
    augmentation = Augmentation(scale=(0.4, 1.0), flip=True, rotate=30)
    pictures = own_masks(tmp_path)
    batches = PictureBatches(pictures, prepare, 3, augmentation=augmentation, seed=1)
    expected = [(x.numpy(), y.numpy()) for x, y in batches.epoch(2)]
    plain = [(x.numpy(), y.numpy()) for x, y in batches.in_order()]
    for module in (augmentation_module, batches_module, preprocessing_module):
        monkeypatch.setattr(module, "installed", lambda package: package != "tensorflow")
    for found, wanted in ((batches.epoch(2), expected), (batches.in_order(), plain)):
        for (x, y), (x2, y2) in zip(found, wanted):
            np.testing.assert_allclose(x, x2, atol=2e-2)
            assert np.mean(y == y2) > 0.995  # a place between two pixels may be rounded
    # Nothing is cut off in evaluation: all classes of the picture are there, by Pillow.
    for picture, mask in zip(pictures.pictures, np.concatenate([y for _, y in plain])):
        image = Image.open(picture.label).resize((24, 24), NEAREST)
        assert np.mean(np.asarray(image) == mask) > 0.97
