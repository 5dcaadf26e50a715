"""The tasks of the study: pictures and labels, from packages that need no hub.

A task has 1,000 pictures for training at most, drawn with the seed of a run: 800 train the
model and 200 are for the choice of the learning rate, as in VTAB-1k. Where there are fewer,
one fifth is for the choice. The test pictures are the same for all seeds.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
import _data  # isort: skip - of the demo

STAMPS_PACKAGE = "tuxpaint-stamps-default"

#: Classes of at least 12 pictures. Letters and other symbols are not among them.
STAMPS = (
    *("animals", "clothes", "food", "hobbies", "household", "plants"),
    *("seasonal", "space", "sports", "town", "vehicles"),
)

#: Pictures of scikit-image of which each is a class. A patch is to be recognized.
TEXTURES = (
    *("brick", "grass", "gravel", "camera", "coins", "moon", "page", "text"),
    *("cell", "immunohistochemistry"),
)
PATCH = 24
#: The height and width of photographs with a digit.
PASTED = 96


class Data(NamedTuple):
    """Pictures (n, size, size, 3) as uint8 and labels of each part.

    The labels are class indices (n,), those of all pixels (n, size, size), and for other tasks
    (n, outputs).
    """

    train: tuple[np.ndarray, np.ndarray]
    val: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    kind: str = "classification"


class Task(NamedTuple):
    """A source of pictures: ``load(downloads)`` gives those to train with and those to test.

    ``kind`` is the task of tfimm_lora.
    """

    load: Callable[[Path], tuple]
    train: int = 1000
    test: int = 1000
    kind: str = "classification"


def data(name: str, seed: int, size: int, downloads: Path) -> Data:
    """The pictures of a run."""
    task = TASKS[name]
    (x, y), (test_x, test_y) = _loaded(name, downloads)
    rng = np.random.default_rng(seed)
    chosen = _balanced(y, min(task.train, len(y)), rng)
    val = _balanced(y[chosen], max(len(chosen) // 5, 1), rng)
    rest = np.setdiff1d(np.arange(len(chosen)), val)
    tested = _balanced(test_y, min(task.test, len(test_y)), np.random.default_rng(0))
    parts = [(x, y, chosen[rest]), (x, y, chosen[val]), (test_x, test_y, tested)]
    made = [(_resized(a[i], size), b[i]) for a, b, i in parts]
    if task.kind == "segmentation":  # masks have the size of the pictures already
        assert y.shape[1:] == (size, size), f"{name}: masks of {y.shape[1:]}, not of {size}"
    outputs = y.shape[1] if task.kind in ("multilabel", "regression") else int(y.max()) + 1
    return Data(*made, outputs, task.kind)


def order_of(count: int, job: Any, seed: int) -> np.ndarray:
    """The pictures of each step, all epochs in a row. It depends on nothing but the seed."""
    rng = np.random.default_rng(seed)
    whole = count // job.batch * job.batch
    return np.concatenate([rng.permutation(count)[:whole] for _ in range(job.epochs)])


def _balanced(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of so many pictures, of all classes in proportion, in a random order."""
    if count >= len(labels) or labels.ndim > 1:
        return rng.permutation(len(labels))[:count]
    shares = np.bincount(labels) * count / len(labels)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: count - counts.sum()]] += 1
    order = rng.permutation(len(labels))
    taken = [order[labels[order] == c][:n] for c, n in enumerate(counts)]
    return rng.permutation(np.concatenate(taken))


def _resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 pictures (n, h, w) or (n, h, w, 3) in the size of the model."""
    made = [
        np.asarray(Image.fromarray(p).convert("RGB").resize((size, size), Image.BICUBIC))
        for p in pictures
    ]
    return np.stack(made)


@functools.cache
def _loaded(name: str, downloads: Path) -> tuple:
    return TASKS[name].load(downloads)


# -- the sources -------------------------------------------------------------------------


def fashion(downloads: Path) -> tuple:
    """Photographs of garments: Fashion-MNIST."""
    source = _data.find_fashion_mnist(downloads)
    parts = (
        [_data.read_idx(source / name) for name in names] for names in (_data.TRAIN, _data.TEST)
    )
    return tuple((pictures, labels.astype("int32")) for pictures, labels in parts)


def digits(downloads: Path) -> tuple:
    """The handwritten digits of scikit-learn."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    pictures = (loaded.images * 255 / 16).round().astype("uint8")
    return _halves(pictures, loaded.target.astype("int32"))


def properties(downloads: Path) -> tuple:
    """Three labels of a digit: it is even, it is above four, it has a loop."""
    parts = []
    for pictures, y in digits(downloads):
        labels = [y % 2 == 0, y > 4, np.isin(y, (0, 6, 8, 9))]
        parts.append((pictures, np.stack(labels, 1).astype("float32")))
    return tuple(parts)


def angles(downloads: Path) -> tuple:
    """By how many degrees a digit was rotated, from -45 to 45."""
    parts = []
    for number, (pictures, _labels) in enumerate(digits(downloads)):
        drawn = np.random.default_rng(2000 + number).uniform(-45, 45, (len(pictures), 1))
        large = [Image.fromarray(p).resize((32, 32), Image.BICUBIC) for p in pictures]
        turned = [np.asarray(p.rotate(a, Image.BICUBIC)) for p, (a,) in zip(large, drawn)]
        parts.append((np.stack(turned), drawn.astype("float32")))
    return tuple(parts)


def changed_digits(downloads: Path) -> tuple:
    """The same, rotated by up to 90 degrees, half of them inverted, with noise."""
    parts = []
    for number, (pictures, labels) in enumerate(digits(downloads)):
        rng = np.random.default_rng(1000 + number)
        changed = []
        for picture in pictures:
            large = Image.fromarray(picture).resize((32, 32), Image.BICUBIC)
            turned = np.asarray(large.rotate(rng.uniform(-90, 90), Image.BICUBIC), float)
            turned = 255 - turned if rng.random() < 0.5 else turned
            changed.append(np.clip(turned + rng.normal(0, 40, turned.shape), 0, 255))
        parts.append((np.stack(changed).astype("uint8"), labels))
    return tuple(parts)


def pasted_digits(downloads: Path) -> tuple:
    """Where is a digit on a photograph, and is it even? 0 is the photograph."""
    from skimage import data as pictures_of

    photographs = [pictures_of.astronaut(), pictures_of.chelsea(), pictures_of.coffee()]
    parts = []
    for number, (pictures, y) in enumerate(digits(downloads)):
        rng, made, masks = np.random.default_rng(3000 + number), [], []
        for picture, digit in zip(pictures, y):
            photograph = photographs[rng.integers(len(photographs))]
            top, left = (rng.integers(n - PASTED) for n in photograph.shape[:2])
            made.append(photograph[top : top + PASTED, left : left + PASTED].copy())
            side = int(rng.integers(24, 49))
            large = np.asarray(Image.fromarray(picture).resize((side, side), Image.BICUBIC))
            ink = large > 96
            top, left = rng.integers(PASTED - side, size=2)
            made[-1][top : top + side, left : left + side][ink] = rng.integers(256, size=3)
            masks.append(np.zeros((PASTED, PASTED), "int32"))
            masks[-1][top : top + side, left : left + side][ink] = 1 + digit % 2
        parts.append((np.stack(made), np.stack(masks)))
    return tuple(parts)


def stamps(downloads: Path) -> tuple:
    """Photographs and drawings of things in eleven categories: the stamps of Tux Paint."""
    folder = find_stamps(downloads)
    pictures, labels = [], []
    for label, category in enumerate(STAMPS):
        for path in sorted((folder / category).rglob("*.png")):
            with Image.open(path) as opened:
                picture = opened.convert("RGBA")
            picture.thumbnail((128, 128))
            square = Image.new("RGBA", (128, 128), "white")
            offset = ((128 - picture.width) // 2, (128 - picture.height) // 2)
            square.alpha_composite(picture, offset)
            pictures.append(np.asarray(square.convert("RGB")))
            labels.append(label)
    return _halves(np.stack(pictures), np.array(labels, "int32"))


def textures(downloads: Path) -> tuple:
    """Patches of pictures of scikit-image: which of them is it from? The upper halves are for
    training, and the lower ones for testing. The patches are turned at random."""
    from skimage import data as pictures_of

    parts: list[tuple[list, list]] = [([], []), ([], [])]
    for label, name in enumerate(TEXTURES):
        picture = getattr(pictures_of, name)()
        picture = picture if picture.ndim == 2 else picture[..., 0]
        middle = len(picture) // 2
        for half, (patches, labels) in zip((picture[:middle], picture[middle:]), parts):
            rng = np.random.default_rng(label)
            for _ in range(120):
                top = rng.integers(half.shape[0] - PATCH + 1)
                left = rng.integers(half.shape[1] - PATCH + 1)
                patch = half[top : top + PATCH, left : left + PATCH]
                patches.append(np.rot90(patch, rng.integers(4)))
                labels.append(label)
    return tuple((np.stack(p), np.array(y, "int32")) for p, y in parts)


def _halves(pictures: np.ndarray, labels: np.ndarray) -> tuple:
    """For training and for testing, the same for all seeds."""
    test = np.sort(_balanced(labels, len(labels) // 2, np.random.default_rng(0)))
    train = np.setdiff1d(np.arange(len(labels)), test)
    return (pictures[train], labels[train]), (pictures[test], labels[test])


def find_stamps(downloads: Path) -> Path:
    """The folder of the stamps; the Debian package is downloaded if it is not installed."""
    inside = "usr/share/tuxpaint/stamps"
    for folder in (Path("/", inside), downloads / inside):
        if folder.is_dir():
            return folder
    if not shutil.which("apt-get"):
        raise FileNotFoundError(f"Install the Debian package {STAMPS_PACKAGE}.")
    downloads.mkdir(parents=True, exist_ok=True)
    for command in (["apt-get", "download", "-qq", STAMPS_PACKAGE],):
        subprocess.run(command, cwd=downloads, check=True, capture_output=True)
    (package,) = downloads.glob(f"{STAMPS_PACKAGE}_*.deb")
    subprocess.run(["dpkg-deb", "-x", package.name, "."], cwd=downloads, check=True)
    package.unlink()
    return downloads / inside


TASKS = {
    "garments": Task(fashion),
    "stamps": Task(stamps),
    "digits": Task(digits),
    "changed digits": Task(changed_digits),
    "textures": Task(textures),
    "10,000 garments": Task(fashion, train=10000),
    "properties of digits": Task(properties, kind="multilabel"),
    "angles of digits": Task(angles, kind="regression"),
    "digits on photographs": Task(pasted_digits, test=300, kind="segmentation"),
}
