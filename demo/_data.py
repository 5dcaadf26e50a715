"""The pictures of the demo: Fashion-MNIST, written as files in class folders.

Fashion-MNIST has 70,000 photographs of garments in ten classes, grey and 28 pixels wide (Xiao,
Rasul and Vollgraf, 2017, arXiv:1708.07747; MIT license). A small part of them is used, as if
someone had photographed and sorted a few dozen pieces of each kind.
"""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

#: The classes, in the order of Fashion-MNIST.
LABELS = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)

#: The files: pictures and labels, for training and for testing.
TRAIN = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz")
TEST = ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")

DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = "usr/share/datasets/fashion-mnist"

#: Without a network, a connection should fail soon. In seconds.
CONNECT_TIMEOUT, APT_TIMEOUT = 10, 120


def find_fashion_mnist(cache: Path) -> Path:
    """Return the folder with the four files; download them if this machine does not have them.

    In this order: the Debian package where it is installed; the cache of Keras; ``cache``,
    where an earlier run unpacked the Debian package; a download with Keras; a download of the
    Debian package with apt, which needs no root.

    Raises:
        FileNotFoundError: If none of these has the files.
    """
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    in_keras, in_cache = home / "datasets" / "fashion-mnist", cache / DEBIAN_FOLDER
    for folder in (Path("/", DEBIAN_FOLDER), in_keras, in_cache):
        if _complete(folder):
            return folder
    reasons = []
    for name, download, folder in (
        ("Keras", _download_with_keras, in_keras),
        ("apt", lambda: _download_with_apt(cache), in_cache),
    ):
        try:
            download()
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(f"{name}: {str(error) or type(error).__name__}")
        else:
            if _complete(folder):
                return folder
            reasons.append(f"{name}: the files are incomplete")
    raise FileNotFoundError(
        f"The pictures of Fashion-MNIST are not on this machine and could not be downloaded "
        f"({'; '.join(reasons)}). Either connect to the network and run the demo again (Keras "
        f"downloads 31 MB to {in_keras}), or on Debian and Ubuntu install the package: "
        f"apt-get install {DEBIAN_PACKAGE}"
    )


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (*TRAIN, *TEST))


def _download_with_keras() -> None:
    from tensorflow.keras.datasets import fashion_mnist

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT)
    try:
        fashion_mnist.load_data()
    except (OSError, EOFError, zlib.error):
        raise
    except Exception as error:  # Keras wraps what went wrong in an Exception
        raise OSError(str(error)) from error
    finally:
        socket.setdefaulttimeout(before)


def _download_with_apt(cache: Path) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise FileNotFoundError("there is no apt-get here")
    cache.mkdir(parents=True, exist_ok=True)

    def run(*command: str) -> None:
        subprocess.run(command, cwd=cache, check=True, capture_output=True, timeout=APT_TIMEOUT)

    run("apt-get", "download", "-qq", DEBIAN_PACKAGE)
    packages = sorted(cache.glob(f"{DEBIAN_PACKAGE}_*.deb"))
    run("dpkg-deb", "-x", packages[-1].name, ".")
    for package in packages:
        package.unlink()


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the IDX format of MNIST."""
    content = gzip.decompress(path.read_bytes())
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + sizes.nbytes).reshape(sizes)


def write_pictures(source: Path, folder: Path, train: int, val: int, test: int) -> Path:
    """Write pictures as PNG files: ``folder/train/Bag/00023.png`` and so on.

    Args:
        source: The folder with the files of Fashion-MNIST.
        folder: The folder to write.
        train, val: How many pictures of each class to take of the 60,000 for training: the
            first ones, and those that follow.
        test: How many of each class to take of the 10,000 for testing: the first ones.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for names, parts in ((TRAIN, {"train": train, "val": val}), (TEST, {"test": test})):
        pictures, labels = (read_idx(source / name) for name in names)
        for number, label in enumerate(LABELS):
            of_class = np.flatnonzero(labels == number)
            for part, count in parts.items():
                target = folder / part / label
                target.mkdir(parents=True)
                for i in of_class[:count]:
                    Image.fromarray(pictures[i]).save(target / f"{i:05}.png")
                of_class = of_class[count:]
    return folder
