"""A file of COCO of drawn pictures."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def run_lengths(mask):
    """The uncompressed encoding of COCO: runs of 0 and 1 in turn, column by column."""
    values = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(values.astype(int))) + 1
    runs = np.diff([0, *edges, values.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *runs] if values[0] else runs}


def box(left, top, right, bottom):
    """The polygon of the pixels [left, right) x [top, bottom)."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def coco(pictures, objects, categories=((1, "cell"), (7, "core"))):
    """The content of a file: names with sizes, and (picture, category, segmentation)."""
    return {
        "images": [
            {"id": i, "file_name": name, "height": height, "width": width}
            for i, (name, height, width) in enumerate(pictures)
        ],
        "annotations": [
            {"id": i, "image_id": picture, "category_id": category, "segmentation": shape}
            for i, (picture, category, shape) in enumerate(objects)
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
    }


def write_coco(folder, n=8, seed=0, side=32, parts=("",)) -> Path:
    """Pictures with a red and, within it, a green square, and ``_annotations.coco.json``, in a
    folder or in its parts."""
    rng = np.random.default_rng(seed)
    for part in parts:
        inside = Path(folder) / part
        inside.mkdir(parents=True, exist_ok=True)
        objects = []
        for i in range(n):
            pixels = np.full((side, side, 3), 60) + rng.uniform(-50, 50, (side, side, 3))
            y, x = rng.integers(0, side // 2, 2).tolist()
            for size, category, colour in ((16, 1, (200, 60, 60)), (8, 7, (60, 200, 60))):
                pixels[y : y + size, x : x + size] = colour
                objects.append((i, category, box(x, y, x + size, y + size)))
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(inside / f"{part}{i}.png")
        names = [(f"{part}{i}.png", side, side) for i in range(n)]
        content = json.dumps(coco(names, objects))
        (inside / "_annotations.coco.json").write_text(content)
    return Path(folder)
