"""Write the folder of a task with tensorflow_datasets.

The parts are those of the code of VTAB (github.com/google-research/task_adaptation, folder
``task_adaptation/data``): the 800 are the first of its training part and the 200 the first of
its validation part. They are subsets by order, so the version of each data set is fixed:
another one may have another order, which would be another benchmark. The labels of the
structured tasks are computed as there.

Two tasks depend on what is installed. ``oxford_iiit_pet`` needs version 3, which
tensorflow_datasets 4.9.10 no longer has; use the folder of an archive. ``dmlab`` is 2.0.1, the
version that later code for VTAB (github.com/google-research/scenic) uses, because 2.0.0 is no
longer available either.

tensorflow_datasets asks for files that have to be downloaded by hand (diabetic_retinopathy).
"""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from tfimm_lora.utils.atomic_files import move_into_place, temporary_path

from .tasks import BOTH, TEST, TRAIN, VAL, folder_of


def _share(percent):
    """The index of the first example after this share of a split, rounded down."""
    return lambda count: count * percent // 100


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the pictures and labels of a task come from.

    Attributes:
        dataset: Its name and version in tensorflow_datasets.
        val: The split of the validation part, and where this part begins there.
        test: The same of the test part, which ends with the split.
        label: From an example to its label.
        brightness: The pixels are multiplied by it.
    """

    dataset: str
    val: tuple[str, Callable[[int], int]]
    test: tuple[str, Callable[[int], int]]
    label: Callable[[dict], int] = lambda example: example["label"]
    brightness: int = 1


def _start(count):
    return 0


def _sixty_and_eighty(count):
    return _share(60)(count) + _share(20)(count)


def _named(key):
    return lambda example: example[key]


def _sixteenths(key, values):
    """Neighbouring values of an attribute as one of 16 classes."""
    return lambda example: int(example[key]) * 16 // values


def _above(thresholds, value):
    """The number of the last threshold that is below a value."""
    return int(np.searchsorted(np.float32(thresholds), np.float32(value), side="left")) - 1


def _closest_object(example):
    """Classes of the distance of the closest object from the camera, in units of CLEVR."""
    distance = np.min(example["objects"]["pixel_coords"][:, 2])
    return _above([0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0], distance)


def _closest_vehicle(example):
    """Below 8 m, below 20 m, farther, or no vehicle: 1000 m stand for none."""
    objects = example["objects"]
    vehicles = np.asarray(objects["type"]) < 3  # car, van, truck
    distances = np.asarray(objects["location"])[vehicles, 2]
    return _above([-100.0, 8.0, 20.0, 999.0], min(distances, default=1000.0))


_OWN_TEST = ("test", _start)
_OWN = {"val": ("validation", _start), "test": _OWN_TEST}
_LAST_TENTH = {"val": ("train", _share(90)), "test": _OWN_TEST}
_LAST_FIFTHS = {"val": ("train", _share(60)), "test": ("train", _sixty_and_eighty)}
_CLEVR = {"val": ("train", _share(90)), "test": ("validation", _start)}
_DSPRITES = {
    "val": ("train", _share(80)),
    "test": ("train", lambda count: _share(80)(count) + _share(10)(count)),
    "brightness": 255,  # its pixels are 0 and 1
}
_NORB = {"val": ("test", _start), "test": ("test", _share(50))}

SOURCES = {
    "cifar100": Source("cifar100:3.*.*", **_LAST_TENTH),
    "caltech101": Source("caltech101:3.*.*", **_LAST_TENTH),
    "dtd": Source("dtd:3.*.*", **_OWN),
    "oxford_flowers102": Source("oxford_flowers102:2.*.*", **_OWN),
    "oxford_iiit_pet": Source(
        "oxford_iiit_pet:3.*.*", val=("train", _share(80)), test=_OWN_TEST
    ),
    "svhn": Source("svhn_cropped:3.*.*", **_LAST_TENTH),
    "sun397": Source("sun397/tfds:4.*.*", **_OWN),
    "patch_camelyon": Source("patch_camelyon:2.*.*", **_OWN),
    "eurosat": Source("eurosat/rgb:2.*.*", **_LAST_FIFTHS),
    "resisc45": Source("resisc45:3.*.*", **_LAST_FIFTHS),
    "diabetic_retinopathy": Source("diabetic_retinopathy_detection/btgraham-300:3.*.*", **_OWN),
    "clevr_count": Source(
        "clevr:3.*.*", **_CLEVR, label=lambda example: len(example["objects"]["size"]) - 3
    ),
    "clevr_dist": Source("clevr:3.*.*", **_CLEVR, label=_closest_object),
    "dmlab": Source("dmlab:2.0.1", **_OWN),
    "kitti": Source("kitti:3.1.0", **_OWN, label=_closest_vehicle),
    "dsprites_loc": Source(
        "dsprites:2.*.*", **_DSPRITES, label=_sixteenths("label_x_position", 32)
    ),
    "dsprites_ori": Source(
        "dsprites:2.*.*", **_DSPRITES, label=_sixteenths("label_orientation", 40)
    ),
    "smallnorb_azi": Source("smallnorb:2.*.*", **_NORB, label=_named("label_azimuth")),
    "smallnorb_ele": Source("smallnorb:2.*.*", **_NORB, label=_named("label_elevation")),
}


def write_task(name, data):
    """Write the folder of a task, unless there is one.

    Args:
        name: The task.
        data: The folder of all tasks.

    Raises:
        ImportError: If tensorflow_datasets is not installed.
        ValueError: If it does not have the version of the data set.
    """
    if folder_of(name, data) is not None:
        return
    folder = data / name
    source = SOURCES[name]
    builder = _builder(source.dataset)
    builder.download_and_prepare()
    data.mkdir(parents=True, exist_ok=True)
    with temporary_path(folder) as unfinished:
        unfinished.mkdir()
        lines = {
            file: _write_part(builder, source, split, unfinished, file.partition(".")[0])
            for file, split in _splits(builder, source).items()
        }
        for file, listed in {**lines, BOTH: lines[TRAIN] + lines[VAL]}.items():
            (unfinished / file).write_text("".join(f"{x}\n" for x in listed), "utf-8")
        move_into_place(unfinished, folder)


def _tensorflow_datasets():
    try:
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        if error.name != "tensorflow_datasets":
            raise  # it is installed, but one of its own dependencies is not
        raise ImportError(
            "--tfds needs tensorflow_datasets, which is not installed: "
            "pip install tensorflow_datasets"
        ) from error
    return tensorflow_datasets


def _builder(dataset):
    tfds = _tensorflow_datasets()
    try:
        return tfds.builder(dataset)
    except AssertionError as error:  # how it says that it has other versions only
        raise ValueError(
            f"Received --tfds for {dataset}, the version that VTAB uses, which the installed "
            f"tensorflow_datasets {tfds.__version__} does not have: {error} Another version "
            "may select other pictures. Install an older tensorflow_datasets, or unpack the "
            "task from an archive of VTAB-1k."
        ) from error


def _splits(builder, source):
    """The slices of tensorflow_datasets for each list."""

    def at(split, start):
        return split, start(builder.info.splits[split].num_examples)

    val, first = at(*source.val)
    test, begin = at(*source.test)
    return {
        TRAIN: "train[:800]",
        VAL: f"{val}[{first}:{first + 200}]",
        TEST: f"{test}[{begin}:]",
    }


def _write_part(builder, source, split, folder, part):
    """Write the pictures of a split; return the lines of its list.

    The files are written as they are stored, without decoding and encoding them again.
    """
    tfds = _tensorflow_datasets()
    examples = builder.as_dataset(
        split=split,
        shuffle_files=False,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    (folder / "images" / part).mkdir(parents=True)
    lines = []
    for number, example in enumerate(tfds.as_numpy(examples)):
        content = example["image"]
        if source.brightness != 1:
            content = _brighter(content, source.brightness)
        suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg"
        path = f"images/{part}/{number:06}{suffix}"
        (folder / path).write_bytes(content)
        lines.append(f"{path} {int(source.label(example))}")
    return lines


def _brighter(content, factor):
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image) * np.uint8(factor)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
