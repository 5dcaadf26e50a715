"""Small folders of real pictures: scikit-learn's digits as files, whole and broken."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def digit_pictures(label: int) -> np.ndarray:
    """The digits of a label, (n, 8, 8) in uint8, as scikit-learn has them."""
    digits = load_digits()
    return np.rint(digits.images[digits.target == label] * (255 / 16)).astype("uint8")


def write_digits(folder, labels=range(3), each=6, size=8, suffix=".png", first=0) -> Path:
    """Class folders "0", "1", ... with pictures of each digit from the given one on; size may
    be (w, h)."""
    size = (size, size) if isinstance(size, int) else size
    for label in labels:
        inside = Path(folder) / str(label)
        inside.mkdir(parents=True, exist_ok=True)
        for i, pixels in enumerate(digit_pictures(label)[first : first + each]):
            picture = Image.fromarray(pixels).convert("RGB")
            picture.resize(size).save(inside / f"{i}{suffix}")
    return Path(folder)


def write_split(folder, labels=range(3), each=6, size=8) -> Path:
    """``train/`` and ``val/`` of class folders, with different pictures."""
    write_digits(Path(folder) / "train", labels, each, size)
    write_digits(Path(folder) / "val", labels, max(each // 2, 1), size, first=each)
    return Path(folder)


def photograph(height=40, width=56, seed=0) -> np.ndarray:
    """A smooth picture in colours, (height, width, 3) in uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3)).astype("uint8")
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def touch(folder, *names) -> Path:
    """Empty files, for what looks at names only."""
    for name in names:
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return Path(folder)


def break_picture(path, how="cut off") -> None:
    """Spoil a file: "cut off" in the middle, "empty", or "text"."""
    path = Path(path)
    whole = path.read_bytes()
    path.write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"no"}[how])
