"""``predict_masks``: the class of each pixel of picture files, at their own size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.finetuning.data.mask_classes import MaskClasses
from tfimm_lora.finetuning.data.pictures import UnreadablePicture, read_picture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.evaluation import OutputsOf
from tfimm_lora.finetuning.report.overlays import overlay
from tfimm_lora.finetuning.tasks.base import Task
from tfimm_lora.finetuning.tiles import tiled_classes
from tfimm_lora.utils.optional_imports import require
from tfimm_lora.validation import check_integer
from tfimm_lora.zoo.weights.resizing import resized


def predict_masks(
    model: Any,
    paths: Sequence[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    *,
    task: Task,
    batch_size: int = 32,
    tile: bool = False,
) -> Iterator[tuple[str, np.ndarray | UnreadablePicture]]:
    """Predict the class of each pixel of picture files, one after the other.

    A picture is resized to the input of the model, and the logits back to the picture
    (bilinear); or it is cut into tiles of the size of the input (``tiled_classes``).

    Args:
        model: A model that returns logits for each pixel.
        paths: The files.
        preprocessing: The preprocessing of the model.
        task: The segmentation.
        batch_size: The number of pictures in a batch. Default: 32.
        tile: Whether pictures that are larger than the input are cut into tiles. Default: they
            are resized.

    Yields:
        The path of a file, with the index of the class of each pixel, int32 (h, w), or with the
        exception if the file cannot be read. The picture is upright: the orientation in its
        EXIF data is applied.

    Raises:
        TypeError: if ``paths`` is one path, or ``batch_size`` no integer.
        ValueError: if the task is no segmentation, ``batch_size`` is not positive, or the model
            does not return a logit of each class for each pixel.

    Example:
        >>> import numpy as np, tensorflow as tf, tfimm_lora as lora
        >>> from PIL import Image
        >>> Image.fromarray(np.zeros((4, 6, 3), "uint8")).save("black.png")
        >>> model = tf.keras.Sequential([
        ...     tf.keras.Input((2, 2, 3)), tf.keras.layers.Conv2D(2, 1)])
        >>> model.layers[-1].set_weights([np.zeros((1, 1, 3, 2)), np.array([0.0, 1.0])])
        >>> plain = lora.Preprocessing((2, 2), (0.0,) * 3, (1.0,) * 3)
        >>> task = lora.Segmentation(("white", "black"))
        >>> for path, classes in lora.predict_masks(model, ["black.png"], plain, task=task):
        ...     print(classes.shape, classes.max())
        (4, 6) 1
    """
    check_integer(batch_size, "batch_size", 1)
    if isinstance(paths, (str, os.PathLike)):
        raise TypeError(f"Received paths={os.fspath(paths)!r}; expected a list of paths.")
    if not task.is_dense:
        raise ValueError(f"Received the task {task.name!r}; expected a segmentation.")
    return _predicted(model, paths, preprocessing, task, batch_size, tile)


def _predicted(
    model: Any,
    paths: Sequence[str | os.PathLike[str]],
    preprocessing: Preprocessing,
    task: Task,
    batch_size: int,
    tile: bool,
) -> Iterator[tuple[str, np.ndarray | UnreadablePicture]]:
    """What ``predict_masks`` yields."""
    prepare, logits_of_model = preprocessing.function(resize=True), OutputsOf(model, task)

    def outputs_of(batch: np.ndarray) -> np.ndarray:
        logits: np.ndarray = logits_of_model(batch)
        if logits.shape[-1] != len(task.labels):
            raise ValueError(
                f"The model '{model.name}' returns {logits.shape[-1]} logits for each pixel; "
                f"expected one for each of the {len(task.labels)} classes of the task."
            )
        return logits

    prepare_tiles = preprocessing.function()

    def logits_of_tiles(tiles: np.ndarray) -> np.ndarray:
        starts = range(0, len(tiles), batch_size)
        parts = [prepare_tiles(tiles[i : i + batch_size]) for i in starts]
        return np.concatenate([outputs_of(np.asarray(x, np.float32)) for x in parts])

    def load(path: str) -> tuple[np.ndarray, tuple[int, int]] | np.ndarray | UnreadablePicture:
        try:
            pixels = read_picture(path, preprocessing.in_channels)
        except UnreadablePicture as problem:
            return problem
        sides = zip(pixels.shape, preprocessing.input_size)
        if tile and any(side > limit for side, limit in sides):
            return pixels
        return np.asarray(prepare(pixels), np.float32), (pixels.shape[0], pixels.shape[1])

    names = [os.fspath(path) for path in paths]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        upcoming = pool.map(load, names[:batch_size])
        for start in range(0, len(names), batch_size):
            # The next batch is read while the model processes this one.
            batch, end = list(upcoming), start + batch_size
            upcoming = pool.map(load, names[end : end + batch_size])
            inputs = [x[0] for x in batch if isinstance(x, tuple)]
            logits = iter(outputs_of(np.stack(inputs)) if inputs else ())
            for name, x in zip(names[start:end], batch):
                if isinstance(x, tuple):
                    yield name, upsampled(next(logits), x[1])
                elif isinstance(x, np.ndarray):
                    yield name, tiled_classes(x, preprocessing.input_size, logits_of_tiles)
                else:
                    yield name, x


def upsampled(logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The class with the largest logit after resizing (bilinear), int32 (height, width).

    Args:
        logits: (h, w, classes).
        size: The height and width of the result.

    The classes are resized one after the other, so that of a large picture with many classes
    the logits are never in memory together.

    Example:
        >>> import numpy as np
        >>> from tfimm_lora.finetuning.mask_prediction import upsampled
        >>> upsampled(np.array([[[1.0, 0.0], [0.0, 4.0]]]), (1, 4)).tolist()
        [[0, 1, 1, 1]]
    """
    best: np.ndarray | None = None
    found = np.zeros(size, np.int32)
    for place in range(logits.shape[-1]):
        plane = resized(logits[..., place : place + 1], size, "bilinear")[..., 0]
        if best is None:
            best = plane
            continue
        larger = plane > best
        found[larger], best[larger] = place, plane[larger]
    return found


def shares(classes: np.ndarray, count: int) -> np.ndarray:
    """The share of the pixels of each class, (count,)."""
    counted: np.ndarray = np.bincount(classes.ravel(), minlength=count) / classes.size
    return counted


def write_mask(path: Path, found: np.ndarray, classes: MaskClasses) -> None:
    """Write a mask as PNG, with the values that the masks of the training have.

    Classes with indices up to 255 give a picture with a palette of the colours of the classes;
    with larger ones a grey picture of 16 bits; classes with colours a picture with these.

    Args:
        path: The file.
        found: The index of the class of each pixel, (h, w).
        classes: The classes.
    """
    image_module = require("PIL.Image", extra="cli", why="Writing masks")
    if classes.of_colours or max(classes.numbers) > 255:
        values = classes.palette if classes.of_colours else np.array(classes.numbers, np.uint16)
        image = image_module.fromarray(values[found])
    else:
        image = image_module.fromarray(np.array(classes.numbers, np.uint8)[found]).convert("P")
        palette = np.zeros((256, 3), np.uint8)
        palette[list(classes.numbers)] = classes.palette
        image.putpalette(palette.ravel().tolist())
    image.save(path, format="PNG")


def write_overlay(path: Path, picture: str, found: np.ndarray, classes: MaskClasses) -> None:
    """Write ``mask_over`` as PNG."""
    image_module = require("PIL.Image", extra="cli", why="Writing masks")
    image_module.fromarray(mask_over(picture, found, classes)).save(path, format="PNG")


def mask_over(picture: str, found: np.ndarray, classes: MaskClasses) -> np.ndarray:
    """A picture file with the colours of the classes over it, uint8 (h, w, 3).

    Raises:
        UnreadablePicture: if the picture cannot be read.
    """
    return overlay(read_picture(picture), found, classes.palette)
