"""Finding, splitting, reading and checking labelled pictures."""

import importlib.util
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.helpers.picture_folders import (
    break_picture,
    photograph,
    touch,
    write_digits,
    write_split,
)
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, find_pictures
from tfimm_lora.finetuning.data.picture_files import EXTENSIONS, natural_order
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, check_pictures, read_picture

pytestmark = pytest.mark.once


def names(picture_set, folder):
    return [Path(os.path.relpath(p.path, folder)).as_posix() for p in picture_set.pictures]


def classes(folder, *labels, each=5):
    return touch(folder, *(f"{label}/{i}.jpg" for label in labels for i in range(each)))


def write_csv(folder, text, name="list.csv"):
    path = Path(folder) / name
    path.write_text(text)
    return path


# -- folders --------------------------------------------------------------------------------


def test_folder_with_train_and_val_is_taken_as_it_is(tmp_path):
    split = find_pictures(write_split(tmp_path, each=4))
    assert split.labels == split.train.labels == split.val.labels == ("0", "1", "2")
    assert split.train.counts() == {"0": 4, "1": 4, "2": 4}
    assert names(split.val, tmp_path) == [
        f"val/{c}/{i}.png" for c in range(3) for i in range(2)
    ]
    assert [p.label for p in split.val.pictures] == [0, 0, 1, 1, 2, 2]
    assert len(split.train) == 12 and all(os.path.isabs(p.path) for p in split.train.pictures)


@pytest.mark.parametrize(
    "present, chosen",
    [
        (["val", "test"], "val"),
        (["valid", "Testing"], "valid"),
        (["Validation"], "Validation"),
    ],
)
def test_parts_may_have_other_names_and_test_is_a_part_of_its_own(tmp_path, present, chosen):
    for name in ("Train", *present):
        classes(tmp_path / name, "a", "b", each=1)
    split = find_pictures(tmp_path)
    assert names(split.val, tmp_path) == [f"{chosen}/a/0.jpg", f"{chosen}/b/0.jpg"]
    assert names(split.train, tmp_path) == ["Train/a/0.jpg", "Train/b/0.jpg"]
    if len(present) == 1:
        assert split.test is None
    else:
        assert split.test is not None
        assert names(split.test, tmp_path) == [f"{present[1]}/{x}/0.jpg" for x in "ab"]


def test_test_pictures_are_never_used_for_validation(tmp_path):
    for name in ("train", "test"):
        classes(tmp_path / name, "a", "b", each=5)
    with pytest.warns(UserWarning, match="has no val/; pictures of train/ are used"):
        split = find_pictures(tmp_path)
    assert all(x.startswith("train/") for x in names(split.val, tmp_path))
    assert len(split.train) == 8 and len(split.val) == 2
    assert split.test is not None and len(split.test) == 10
    listed = [f"{tmp_path}/{part}/{x}/{i}.jpg,{x},{part}" for part in ("train", "test")
              for x in "ab" for i in range(5)]  # fmt: skip
    path = write_csv(tmp_path, "\n".join(["path,label,split", *listed]))
    with pytest.warns(UserWarning, match="no rows for val"):
        by_csv = find_pictures(path)
    assert by_csv.test == split.test and len(by_csv.val) == 2
    assert all("/train/" in p.path for p in by_csv.val.pictures)


def test_train_alone_is_split_with_a_warning(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    with pytest.warns(UserWarning, match="has no val/"):
        split = find_pictures(tmp_path)
    assert split.labels == ("cat", "dog") and len(split.val) == 2


def test_parts_that_cannot_be_meant_are_errors(tmp_path):
    for name in ("val", "test"):
        classes(tmp_path / "held-out" / name, "a", "b")
    refused(tmp_path / "held-out", "has test/ and val/ but no train/")
    for name in ("train", "val", "valid"):
        classes(tmp_path / "two" / name, "a", "b")
    refused(tmp_path / "two", "val/ and valid/", "expected one of them")
    for name in ("train", "val", "extra"):
        classes(tmp_path / "more" / name, "a", "b")
    with pytest.warns(UserWarning, match="ignored folders beside train/ and val/: extra"):
        find_pictures(tmp_path / "more")


def test_train_may_be_a_class(tmp_path):
    assert find_pictures(classes(tmp_path, "bus", "train")).labels == ("bus", "train")


def test_each_class_is_split_by_its_share_with_every_picture_once(tmp_path):
    classes(tmp_path, "a", each=10)
    classes(tmp_path, "b", each=2)
    classes(tmp_path, "c", each=23)
    split = find_pictures(tmp_path, validation=0.2, seed=3)
    assert split.val.counts() == {"a": 2, "b": 1, "c": 5}
    both = names(split.train, tmp_path) + names(split.val, tmp_path)
    assert sorted(both) == sorted(
        p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")
    )
    assert find_pictures(tmp_path, validation=0.95).train.counts() == {"a": 1, "b": 1, "c": 1}


def test_split_depends_on_names_and_seed_only(tmp_path, monkeypatch):
    def val(folder, seed=0):
        return names(find_pictures(folder, seed=seed).val, folder)

    first, second = tmp_path / "first", tmp_path / "elsewhere" / "second"
    classes(first, "a", "b", each=20)
    touch(second, *(f"{c}/{i}.jpg" for i in reversed(range(20)) for c in "ba"))
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    expected = val(first)
    monkeypatch.setattr(os, "scandir", Backwards)
    assert val(second) == expected
    assert val(second, seed=1) != expected
    # By sha256sum of 0/a/0.jpg and so on: the same on every machine and in every version.
    assert expected == [
        *("a/0.jpg", "a/4.jpg", "a/5.jpg", "a/7.jpg"),
        *("b/15.jpg", "b/18.jpg", "b/19.jpg", "b/6.jpg"),
    ]


def test_an_added_picture_moves_few_others(tmp_path):
    classes(tmp_path, "a", "b", each=50)
    before = set(names(find_pictures(tmp_path).val, tmp_path))
    touch(tmp_path, "a/new.jpg")
    after = set(names(find_pictures(tmp_path).val, tmp_path))
    assert len(before ^ after) <= 2


def test_a_class_with_one_picture_goes_to_train_with_a_warning(tmp_path):
    classes(tmp_path, "a", "b")
    touch(tmp_path, "c/only.png")
    with pytest.warns(UserWarning, match=r"no validation pictures of these classes: c\."):
        split = find_pictures(tmp_path)
    assert split.train.counts()["c"] == 1 and split.val.counts()["c"] == 0


def test_labels_are_sorted_as_people_count(tmp_path):
    labels = ["10", "2", "1", "b", "A", "a10", "a9"]
    assert find_pictures(classes(tmp_path, *labels, each=2)).labels == (
        *("1", "2", "10", "A", "a9", "a10", "b"),
    )
    assert sorted(["x-3", "x-20", "X-1"], key=natural_order) == ["X-1", "x-3", "x-20"]


def test_nested_folders_and_every_kind_of_name_are_found_and_hidden_ones_are_not(tmp_path):
    wanted = [f"a/deep/er/{i}{end}" for i, end in enumerate(EXTENSIONS)]
    wanted += ["a/LOUD.JPG", "a/x.y.JpEg", "b/1.png", "b/2.png"]
    touch(tmp_path, *wanted)
    touch(
        tmp_path,
        "a/.hidden.jpg",
        "a/.cache/1.jpg",
        ".git/1.jpg",
        "__MACOSX/a/1.jpg",
        "note.txt",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = find_pictures(tmp_path)
    found = names(split.train, tmp_path) + names(split.val, tmp_path)
    assert sorted(found) == sorted(wanted) and split.labels == ("a", "b")


def test_files_that_are_not_pictures_are_reported(tmp_path):
    classes(tmp_path, "a", "b")
    touch(tmp_path, "a/x.psd", "b/y.PSD", "b/README", "b/Thumbs.db")
    with pytest.warns(UserWarning, match=r"2 \.psd, 1 without extension") as caught:
        find_pictures(tmp_path)
    assert caught[0].filename == __file__


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    store = classes(tmp_path / "store", "x", each=4)
    data = classes(tmp_path / "data", "a", each=4)
    (data / "b").symlink_to(store / "x")
    (data / "a" / "up").symlink_to(data)
    (data / "a" / "same").symlink_to(data / "a")
    (data / "a" / "itself").symlink_to(data / "a" / "itself")
    with pytest.warns(UserWarning, match="1 without extension"):  # the link to itself
        split = find_pictures(data)
    assert split.labels == ("a", "b") and len(split.train) + len(split.val) == 8


def refused(data, *words, error=ValueError, **options):
    with pytest.raises(error) as caught:
        find_pictures(data, **options)
    for word in words:
        assert word in str(caught.value)


def test_folders_that_cannot_be_used_say_why_and_what_to_do(tmp_path):
    refused(tmp_path / "none", "does not exist", error=FileNotFoundError)
    refused(tmp_path, "no class folders", "a folder of pictures for each class")
    touch(tmp_path, "flat/1.jpg", "flat/2.jpg")
    refused(tmp_path / "flat", "no class folders, only pictures")
    refused(classes(tmp_path / "one", "cat"), "one class, cat", "at least two")
    classes(tmp_path / "empty", "cat", "dog")
    (tmp_path / "empty" / "fox" / "inside").mkdir(parents=True)
    refused(tmp_path / "empty", "without pictures: fox", "remove the folders")
    touch(classes(tmp_path / "beside", "cat", "dog"), "stray.PNG")
    refused(tmp_path / "beside", "1 picture beside its class folders: stray.PNG")
    (tmp_path / "beside" / "fox").mkdir()
    refused(tmp_path / "beside", "2 faults", "1. ", "stray.PNG", "2. ", "fox")
    touch(tmp_path, "single/cat/1.jpg", "single/dog/1.jpg")
    refused(tmp_path / "single", "one picture in each class")
    touch(tmp_path, "unsorted/train/1.jpg", "unsorted/val/2.jpg")
    refused(tmp_path / "unsorted", "train has no class folders")
    (tmp_path / "unsorted" / "train" / "labels.csv").write_text("path,label\n")
    refused(tmp_path / "unsorted", "contains labels.csv. If it lists the pictures, pass it")
    touch(tmp_path, "notes.xlsx")
    refused(tmp_path / "notes.xlsx", "does not end in .csv")
    for share in (0, 1, -0.1, 1.5):
        refused(tmp_path, f"validation={share}", "above 0 and below 1", validation=share)
    refused(tmp_path, "validation='half'", validation="half", error=TypeError)
    refused(5, "data=5", "the path of a folder or CSV file", error=TypeError)


def test_classes_missing_in_train_are_refused_and_those_missing_in_val_reported(tmp_path):
    classes(tmp_path / "train", "a", "b", "c", each=1)
    classes(tmp_path / "val", "a", "b", each=1)
    with pytest.warns(UserWarning, match="classes: c"):
        assert find_pictures(tmp_path).val.counts() == {"a": 1, "b": 1, "c": 0}
    classes(tmp_path / "val", "d", each=1)
    refused(tmp_path, "in val that are not in train: d", "a, b, c")


def test_pictures_beside_train_and_val_are_reported(tmp_path):
    touch(write_split(tmp_path), "overview.png")
    with pytest.warns(UserWarning, match=r"beside train/ and val/: overview\.png"):
        find_pictures(tmp_path)


@pytest.mark.parametrize("into", ["val/0/again.png", "train/1/again.png"])
def test_the_same_file_twice_is_refused(tmp_path, into):
    write_split(tmp_path)
    (tmp_path / into).symlink_to(tmp_path / "train" / "0" / "1.png")
    refused(tmp_path, "1 file occurs twice", "again.png", "train/0/1.png")


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("big cat", "big  cat"), ("é", "e\u0301")])
def test_labels_that_hardly_differ_are_reported(tmp_path, pair):
    classes(tmp_path, *pair)
    with pytest.warns(UserWarning, match="differ only in case or spaces"):
        assert len(find_pictures(tmp_path).labels) == 2


# -- CSV ------------------------------------------------------------------------------------


def test_csv_gives_the_pictures_whatever_the_order_of_its_lines(tmp_path):
    classes(tmp_path, "x", each=8)
    absolute = tmp_path / "x" / "7.jpg"
    lines = [f"x/{i}.jpg,{'cat' if i < 4 else 'dog'}" for i in range(7)] + [f"{absolute},dog"]
    first = find_pictures(write_csv(tmp_path, "path,label\n" + "\n".join(lines), "1.csv"))
    text = "\ufeffPath, Label\r\n" + "\r\n".join([*reversed(lines), "", ""])
    second = find_pictures(write_csv(tmp_path, text, "2.CSV"))
    assert first == second and first.labels == ("cat", "dog")
    assert first.val.counts() == {"cat": 1, "dog": 1}
    both = first.train.pictures + first.val.pictures
    assert {p.path: p.label for p in both} == {
        str(tmp_path / "x" / f"{i}.jpg"): int(i >= 4) for i in range(8)
    }


def test_csv_may_say_the_split(tmp_path):
    classes(tmp_path, "x", each=6)
    parts = ["train", "Train", "val", "valid", "test", "training"]
    lines = [f"x/{i}.jpg,{'ab'[i % 2]},{part}" for i, part in enumerate(parts)]
    split = find_pictures(write_csv(tmp_path, "\n".join(["path,label,split", *lines])))
    assert names(split.train, tmp_path) == ["x/0.jpg", "x/1.jpg", "x/5.jpg"]
    assert names(split.val, tmp_path) == ["x/2.jpg", "x/3.jpg"]


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("file,label\nx/0.jpg,a", ValueError, ["file, label", "path,label"]),
        ("file;label\nx/0.jpg;a", ValueError, ["file, label", "path,label"]),
        ('path,label\n"x/0.jpg,a\nx/1.jpg,b', ValueError, ["line", "unexpected end of data"]),
        ("", ValueError, ["(none)", "path,label"]),
        ("path,label\n", ValueError, ["no class", "at least two"]),
        (
            "path,label\nx/0.jpg,a\nx/1.jpg,",
            ValueError,
            ["line 3 has no path or no label", "expected both"],
        ),
        (
            "path,label\nx/0.jpg,a\nx/1.jpg",
            ValueError,
            ["line 3 has no path or no label", "expected both"],
        ),
        ("path,label,split\nx/0.jpg,a,dev", ValueError, ["line 2", "'dev'", "train, "]),
        ("path,label,split\nx/0.jpg,a", ValueError, ["line 2 has the split ''"]),
        (
            "path,label,split\nx/0.jpg,a,train\nx/1.jpg,b,train",
            ValueError,
            ["one picture in each class"],
        ),
        (
            "path,label,split\nx/0.jpg,a,val\nx/1.jpg,b,val",
            ValueError,
            ["no pictures in train"],
        ),
        (
            "path,label\nx/0.jpg,a\nx/1,2.jpg,b\nx/3.jpg,b\nx/4,5.jpg,b",
            ValueError,
            ["lines 3, 5 have more than the 2 columns", "Put quotes around"],
        ),
        ("path,label\nx/0.jpg,a\nx/../x/0.jpg,b", ValueError, ["occurs twice"]),
        (
            "path,label\n" + "\n".join(f"gone/{i}.jpg,{i % 2}" for i in range(9)),
            FileNotFoundError,
            ["lists 9 files", "gone/0.jpg", "and 4 more", "relative to"],
        ),
    ],
)
def test_an_unusable_csv_is_explained(tmp_path, text, error, words):
    classes(tmp_path, "x")
    refused(write_csv(tmp_path, text), *words, error=error)


def test_file_that_is_no_csv_whatever_its_name_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    Image.fromarray(photograph()).save(path, "PNG")
    refused(path, "not a CSV file")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_columns_may_be_separated_otherwise(tmp_path, separator):
    classes(tmp_path, "a", "b", each=2)
    rows = [["path", "label"], *([f"{x}/{i}.jpg", x] for x in "ab" for i in range(2))]
    split = find_pictures(write_csv(tmp_path, "\n".join(map(separator.join, rows))))
    assert split.labels == ("a", "b") and len(split.train) == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_text_may_be_encoded_otherwise(tmp_path, encoding):
    classes(tmp_path, "ä", "ж", each=2)
    text = "path,label\r\n" + "".join(f"{x}/{i}.jpg,{x}\r\n" for x in "äж" for i in range(2))
    path = tmp_path / "list.csv"
    path.write_bytes(text.encode(encoding))
    assert find_pictures(path).labels == ("ä", "ж")


def test_paths_of_windows_and_spaces_are_understood(tmp_path):
    classes(tmp_path, "a b", "c", each=2)
    text = "path , label\n a b\\0.jpg ,a\na b\\1.jpg,a \n c/0.jpg,\tc\nc/1.jpg , c,,\n"
    with pytest.warns(UserWarning, match="spaces around the labels of 2 rows"):
        split = find_pictures(write_csv(tmp_path, text))
    both = names(split.train, tmp_path) + names(split.val, tmp_path)
    assert sorted(both) == ["a b/0.jpg", "a b/1.jpg", "c/0.jpg", "c/1.jpg"]
    assert split.labels == ("a", "c")


def test_other_columns_are_ignored_with_a_warning(tmp_path):
    classes(tmp_path, "a", "b", each=2)
    rows = [f"{i},{x}/{i}.jpg,{x},none" for x in "ab" for i in range(2)]
    with pytest.warns(UserWarning, match="ignored 2 columns: id, author"):
        split = find_pictures(write_csv(tmp_path, "\n".join(["id,path,label,author", *rows])))
    assert len(split) == 4


def test_all_faults_of_a_csv_are_in_one_error(tmp_path):
    classes(tmp_path, "a", "b")
    text = (
        "path,label,split\na/0.jpg,a,train\nb/0.jpg,b,train\na/1,2.jpg,a,train\n,a,train\n"
        "a/9.jpg,a,val\na/1.jpg,a,dev\nb/1.jpg,b,val"
    )
    refused(
        write_csv(tmp_path, text),
        *("4 faults", "line 4 has more", "line 5 has no path", "the split 'dev'", "a/9.jpg"),
    )


def test_files_without_a_suffix_are_known_by_their_first_bytes(tmp_path):
    write_digits(tmp_path, each=4)
    for format, name in (("JPEG", "1/photo"), ("WEBP", "1/IMG_0001"), ("AVIF", "2/x")):
        Image.fromarray(photograph(seed=len(name))).save(tmp_path / name, format)
    touch(tmp_path, "2/README")
    with pytest.warns(UserWarning, match="ignored 1 file without the suffix"):
        split = find_pictures(tmp_path)
    both = names(split.train, tmp_path) + names(split.val, tmp_path)
    assert {"1/photo", "1/IMG_0001", "2/x"} <= set(both)
    assert len(check_pictures(split)[1]) == 0


# -- reading --------------------------------------------------------------------------------


def png_chunk(kind, data):
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png_of_16_bits(path, pixels, transparent=None):
    """A grey or RGB png of 16 bits, written by hand: Pillow writes no RGB ones."""
    height, width = pixels.shape[:2]

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    colour = 2 if pixels.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [png_chunk(b"IHDR", header)]
    if transparent is not None:
        parts.append(png_chunk(b"tRNS", struct.pack(">H", transparent)))
    parts += [png_chunk(b"IDAT", zlib.compress(lines)), png_chunk(b"IEND", b"")]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def on_white(rgba):
    """Independent of Pillow: colours over white by their share."""
    rgba = rgba.astype(float)
    share = rgba[..., 3:] / 255
    return rgba[..., :3] * share + 255 * (1 - share)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm"])
def test_lossless_rgb_is_read_as_it_was_written(tmp_path, suffix):
    pixels = photograph()
    Image.fromarray(pixels).save(tmp_path / f"x{suffix}")
    found = read_picture(tmp_path / f"x{suffix}")
    assert found.dtype == np.uint8 and found.flags.writeable
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_rgb_is_nearly_what_was_written(tmp_path, suffix):
    Image.fromarray(photograph()).save(tmp_path / f"x{suffix}", quality=95)
    difference = read_picture(tmp_path / f"x{suffix}").astype(float) - photograph()
    assert np.abs(difference).mean() < 4  # colours are kept at half the size


def test_grey_is_repeated_or_kept(tmp_path):
    grey = photograph()[..., 0]
    Image.fromarray(grey).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", 1), grey[..., None])
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png"), np.stack([grey] * 3, -1))


def test_colours_become_grey_by_their_brightness(tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "x.png")
    expected = photograph() @ np.array([0.299, 0.587, 0.114])
    found = read_picture(tmp_path / "x.png", 1)
    assert found.shape == (40, 56, 1) and np.abs(found[..., 0] - expected).max() <= 1


def test_one_bit_is_black_and_white(tmp_path):
    bits = photograph()[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", 1)[..., 0], bits * 255)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_transparent_parts_become_white(tmp_path, suffix):
    rgba = np.concatenate([photograph(), photograph(seed=1)[..., :1]], -1)
    rgba[:5, :, 3], rgba[5:10, :, 3] = 0, 255
    Image.fromarray(rgba).save(
        tmp_path / f"x{suffix}", **({"lossless": True} if suffix == ".webp" else {})
    )
    found = read_picture(tmp_path / f"x{suffix}")
    assert np.abs(found - on_white(rgba)).max() <= 1
    np.testing.assert_array_equal(found[5:10], rgba[5:10, :, :3])


def test_grey_with_transparency_becomes_grey_on_white(tmp_path):
    la = photograph()[..., :2]
    Image.fromarray(la, "LA").save(tmp_path / "x.png")
    expected = on_white(la[..., [0, 0, 0, 1]])[..., :1]
    assert np.abs(read_picture(tmp_path / "x.png", 1) - expected).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palettes_become_colours_and_their_transparent_entry_white(tmp_path, suffix):
    colours = np.array([[200, 30, 40], [10, 220, 90], [0, 0, 255]], "uint8")
    indices = np.arange(24, dtype="uint8").reshape(4, 6) % 3
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    image.save(tmp_path / f"plain{suffix}")
    np.testing.assert_array_equal(read_picture(tmp_path / f"plain{suffix}"), colours[indices])
    image.save(tmp_path / f"x{suffix}", transparency=1)
    expected = np.where((indices == 1)[..., None], 255, colours[indices])
    np.testing.assert_array_equal(read_picture(tmp_path / f"x{suffix}"), expected)


def test_cmyk_becomes_rgb(tmp_path):
    cmyk = np.zeros((16, 16, 4), "uint8")
    cmyk[:8, :, 0], cmyk[8:, :, 3] = 255, 128  # cyan, half black
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "x.jpg", quality=100)
    Image.fromarray(cmyk, "CMYK").save(tmp_path / "x.tiff")
    for name in ("x.jpg", "x.tiff"):
        found = read_picture(tmp_path / name).astype(int)
        assert np.abs(found[:8] - [0, 255, 255]).max() <= 3, name
        assert np.abs(found[8:] - 127).max() <= 3, name


@pytest.mark.parametrize("name", ["x.png", "x.tiff", "x.ppm"])
def test_sixteen_bits_of_grey_are_scaled_not_cut(tmp_path, name):
    values = np.arange(0, 65536, 17, dtype="uint16").reshape(-1, 16)
    image = Image.fromarray(values)
    (image.convert("I") if name == "x.ppm" else image).save(tmp_path / name)
    expected = np.rint(values / 257)
    np.testing.assert_array_equal(read_picture(tmp_path / name, 1)[..., 0], expected)


def test_sixteen_bits_of_colour_are_scaled_not_cut(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (7, 9, 3)).astype("uint16")
    png_of_16_bits(tmp_path / "x.png", values)
    # Pillow takes the upper byte, which is at most one off.
    assert np.abs(read_picture(tmp_path / "x.png") - values / 257).max() <= 1


def test_transparent_value_of_sixteen_bits_becomes_white(tmp_path):
    values = np.array([[0, 1000, 40000], [1000, 1001, 65535]], "uint16")
    png_of_16_bits(tmp_path / "x.png", values, transparent=1000)
    assert read_picture(tmp_path / "x.png", 1)[..., 0].tolist() == [
        [0, 255, 156],
        [255, 4, 255],
    ]


def test_twelve_bits_are_scaled_by_their_own_range(tmp_path):
    values = np.array([[0, 2048], [1024, 4095]], "uint16")
    packed = bytes([0, 8, 0, 64, 15, 255])  # 0x000 800 400 FFF
    entries = [
        *((256, 4, 2), (257, 4, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1)),
        *((273, 4, 8), (277, 3, 1), (278, 4, 2), (279, 4, len(packed))),
    ]
    head = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    (tmp_path / "x.tif").write_bytes(head + struct.pack("<H", len(entries)) + table + bytes(4))
    found = read_picture(tmp_path / "x.tif", 1)[..., 0]
    np.testing.assert_array_equal(found, np.rint(values * (255 / 4095)))


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_thirty_two_bits_are_refused_since_nothing_tells_their_range(tmp_path, kind):
    Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / "x.tiff")
    with pytest.raises(UnreadablePicture, match="8 or 16 bits"):
        read_picture(tmp_path / "x.tiff")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tiff", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x{suffix}"
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(photograph()).save(path, exif=exif, **options)
    with Image.open(path) as image:
        stored = np.array(image) if suffix != ".tiff" else photograph()
    plain = Image.fromarray(stored)
    plain.getexif()[0x0112] = orientation
    expected = np.array(ImageOps.exif_transpose(plain))
    assert expected.shape[0] == (56 if orientation > 4 else 40)
    np.testing.assert_array_equal(read_picture(path), expected)


def test_orientation_of_a_grey_picture_of_sixteen_bits_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(0, 60000, 5000, dtype="uint16").reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
    expected = np.rot90(np.rint(values / 257), -1)
    np.testing.assert_array_equal(read_picture(tmp_path / "x.png", 1)[..., 0], expected)


def test_damaged_exif_data_leave_the_picture_readable(tmp_path):
    path = tmp_path / "x.jpg"
    Image.fromarray(photograph()).save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        assert read_picture(path).shape == (40, 56, 3)
    Image.fromarray(photograph()).save(path, exif=b"Exif\0\0nonsense")
    assert read_picture(path).shape == (40, 56, 3)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tiff", ".png"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (6, 4), c) for c in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:], **options)
    found = read_picture(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(found, np.full((4, 6, 3), [255, 0, 0]))


def test_a_file_is_read_by_what_is_in_it_not_by_its_name(tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "x.jpg", "PNG")
    np.testing.assert_array_equal(read_picture(tmp_path / "x.jpg"), photograph())


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tiff", ".bmp"])
@pytest.mark.parametrize("how", ["cut off", "empty", "text"])
def test_broken_files_are_unreadable_with_their_name_and_a_reason(tmp_path, suffix, how):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(photograph()).save(path)
    break_picture(path, how)
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(path)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value) and caught.value.path == str(path)
    assert len(caught.value.reason) > 5 and caught.value.reason in str(caught.value)


def test_missing_files_folders_and_programs_are_unreadable(tmp_path):
    (tmp_path / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name, reason in (
        ("gone.png", "No such file"),
        (".", "directory"),
        ("script.png", "none of JPEG"),
    ):
        with pytest.raises(UnreadablePicture, match=reason):
            read_picture(tmp_path / name)


def test_a_small_file_that_would_fill_the_memory_is_unreadable(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
    (tmp_path / "x.png").write_bytes(start + png_chunk(b"IDAT", b""))
    with pytest.raises(UnreadablePicture, match="3600000000 pixels"):
        read_picture(tmp_path / "x.png")


def test_channels_other_than_one_and_three_are_refused(tmp_path):
    with pytest.raises(ValueError, match="channels=4; expected 3"):
        read_picture(tmp_path / "x.png", 4)


def test_large_jpegs_are_read_smaller_but_never_too_small(tmp_path):
    pixels = photograph(240, 320)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    for at_least, size in (
        (240, (240, 320)),
        (121, (240, 320)),
        (120, (120, 160)),
        (29, (30, 40)),
    ):
        found = read_picture(tmp_path / "x.jpg", at_least=at_least)
        assert found.shape[:2] == size
        expected = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX)
        assert np.abs(found.astype(float) - np.asarray(expected)).mean() < 3
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert read_picture(tmp_path / "x.png", at_least=29).shape == (240, 320, 3)


# -- checking -------------------------------------------------------------------------------


def test_bad_pictures_are_listed_and_left_out_of_both_parts(tmp_path):
    split = find_pictures(write_split(tmp_path, each=4))
    train, val = tmp_path / "train", tmp_path / "val"
    break_picture(train / "1" / "2.png", "cut off")
    break_picture(val / "0" / "0.png", "text")
    Image.new("L", (1, 9)).save(train / "2" / "3.png")
    steps = []
    clean, problems = check_pictures(split, workers=2, progress=lambda *a: steps.append(a))
    assert [(Path(p.path).relative_to(tmp_path).as_posix(), p.label) for p in problems] == [
        ("train/1/2.png", "1"),
        ("train/2/3.png", "2"),
        ("val/0/0.png", "0"),
    ]
    assert "1 x 9 pixels" in problems[1].reason and all(p.reason for p in problems)
    bad = {p.path for p in problems}
    for before, after in ((split.train, clean.train), (split.val, clean.val)):
        assert after.pictures == tuple(p for p in before.pictures if p.path not in bad)
        assert after.labels == split.labels
    assert steps == [(i, 18) for i in range(1, 19)]
    assert len(split.train) == 12  # the caller's is as it was


def test_good_pictures_come_back_as_they_are(tmp_path):
    split = find_pictures(write_digits(tmp_path))
    assert check_pictures(split) == (split, [])
    assert check_pictures(split.val) == (split.val, [])


def copy_picture(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def test_identical_files_with_two_labels_are_both_left_out(tmp_path):
    write_digits(tmp_path, each=8)
    copy_picture(tmp_path / "0/3.png", tmp_path / "1/copy.png")
    clean, problems = check_pictures(find_pictures(tmp_path))
    assert {(Path(x.path).parent.name, Path(x.path).name) for x in problems} == {
        ("0", "3.png"),
        ("1", "copy.png"),
    }
    reasons = {Path(x.path).name: x.reason for x in problems}
    assert f"identical to {tmp_path}/0/3.png, whose label is 0" in reasons["copy.png"]
    assert len(clean) == 3 * 8 - 1


def test_a_training_picture_that_is_held_out_too_is_left_out(tmp_path):
    write_digits(tmp_path / "train", each=8)
    for part, number in (("val", 1), ("test", 2)):
        for label in range(3):
            source = tmp_path / f"train/{label}/{number}.png"
            copy_picture(source, tmp_path / part / str(label) / "held-out.png")
    copy_picture(tmp_path / "val/0/held-out.png", tmp_path / "test/0/both.png")
    clean, problems = check_pictures(find_pictures(tmp_path))
    left_out = {Path(x.path).relative_to(tmp_path).as_posix() for x in problems}
    assert left_out == {f"train/{i}/{n}.png" for i in range(3) for n in (1, 2)} | {
        "val/0/held-out.png"
    }
    assert {x.reason.split("which is in ")[1] for x in problems} == {"val.", "test."}
    assert (len(clean.train), len(clean.val), len(clean.test)) == (18, 2, 4)
    with pytest.raises(ValueError, match="7 of 31 pictures cannot be used"):
        check_pictures(find_pictures(tmp_path), "refuse")


def test_identical_files_of_one_class_are_kept_with_a_warning(tmp_path):
    write_split(tmp_path, each=4)
    copy_picture(tmp_path / "train/0/1.png", tmp_path / "train/0/copy.png")
    with pytest.warns(UserWarning, match="1 picture is identical to another of the same class"):
        clean, problems = check_pictures(find_pictures(tmp_path))
    assert problems == [] and clean.train.counts()["0"] == 5


def test_pictures_that_look_alike_are_reported(tmp_path):
    for label, seeds in (("a", range(6)), ("b", range(6, 12))):
        for seed in seeds:
            (tmp_path / label).mkdir(exist_ok=True)
            image = Image.fromarray(photograph(96, 128, seed))
            image.save(tmp_path / label / f"{seed}.png")
    smaller = Image.fromarray(photograph(96, 128, 2)).resize((100, 75))
    smaller.save(tmp_path / "b" / "again.jpg", quality=80)
    with pytest.warns(UserWarning) as caught:
        clean, problems = check_pictures(find_pictures(tmp_path))
    (message,) = [str(x.message) for x in caught]
    assert message.startswith("1 pair of pictures look alike but have different labels: ")
    assert f"{tmp_path}/a/2.png" in message and f"{tmp_path}/b/again.jpg" in message
    assert problems == [] and len(clean) == 13


def test_blank_and_different_pictures_do_not_look_alike(tmp_path):
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(4):
            shade = 10 * i + (5 if label == "b" else 0)
            Image.new("RGB", (20, 20), (shade,) * 3).save(tmp_path / label / f"{i}.png")
            Image.fromarray(photograph(seed=100 * i + ord(label))).save(
                tmp_path / label / f"photo{i}.png"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_pictures(find_pictures(tmp_path))


def test_heic_needs_a_package_that_the_reason_names(tmp_path):
    path = tmp_path / "iphone.heic"
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UnreadablePicture) as caught:
        read_picture(path)
    if importlib.util.find_spec("pillow_heif") is None:
        assert 'pip install "tfimm_lora[heif]"' in caught.value.reason


def test_refusing_names_the_first_and_counts_all(tmp_path):
    split = find_pictures(write_digits(tmp_path, each=8))
    for i in range(7):
        break_picture(tmp_path / "0" / f"{i}.png", "empty")
    with pytest.raises(
        ValueError, match=r"7 of 24 pictures cannot be used.* and 2 more\. Repair"
    ):
        check_pictures(split, "refuse")
    with pytest.raises(ValueError, match='on_error=\'stop\'; expected "skip" or "refuse"'):
        check_pictures(split, "stop")


def test_skipping_is_refused_if_a_class_or_everything_would_be_lost(tmp_path):
    split = find_pictures(write_split(tmp_path, each=2))
    for i in range(2):
        break_picture(tmp_path / "train" / "1" / f"{i}.png", "empty")
    with pytest.raises(
        ValueError, match="No training pictures of these classes can be used: 1"
    ):
        check_pictures(split)
    for label in range(3):
        break_picture(tmp_path / "val" / str(label) / "0.png", "empty")
    with pytest.raises(ValueError, match="None of 3 pictures can be used"):
        check_pictures(split.val)


def test_more_pictures_than_one_block_stay_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("tfimm_lora.finetuning.data.pictures._BLOCK", 4)
    split = find_pictures(write_digits(tmp_path, each=5))
    break_picture(split.train.pictures[9].path, "text")
    clean, problems = check_pictures(split.train)
    assert [p.path for p in problems] == [split.train.pictures[9].path]
    assert len(clean) == len(split.train) - 1


def test_a_file_that_vanishes_is_a_problem_not_a_crash(tmp_path):
    write_digits(tmp_path, each=3)
    gone = Picture(str(tmp_path / "gone.png"), 0)
    there = Picture(str(tmp_path / "0" / "0.png"), 0)
    clean, problems = check_pictures(PictureSet((there, gone), ("0",)))
    assert clean.pictures == (there,) and "No such file" in problems[0].reason
