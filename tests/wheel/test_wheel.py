"""The sdist and the wheel: built, checked, installed outside the repository and used there."""

import os
import sys
import venv
import zipfile

import pytest

from tests.wheel.conftest import ROOT, run
from tfimm_lora.version import __version__

USE = """
import sys
import numpy as np
import tfimm_lora as lora  # before Keras: it selects the framework that is installed
import keras

assert "site-packages" in lora.__file__, lora.__file__
assert lora.__version__ == sys.argv[1]

def make():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, activation="relu"), keras.layers.Dense(3)]
    )

x, y = np.random.default_rng(0).normal(size=(32, 8)).astype("float32"), np.arange(32) % 3
model = lora.inject_lora(make(), lora_rank=2)
before = model.predict(x, verbose=0)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(x, y, epochs=3, verbose=0)
lora.save_adapter(model, "adapter")
after = model.predict(x, verbose=0)
assert abs(after - before).max() > 1e-4
fresh = lora.load_adapter(make(), "adapter")
np.testing.assert_allclose(fresh.predict(x, verbose=0), after, rtol=1e-5, atol=1e-6)
"""


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """The folder of the programs of a new environment that has the wheel."""
    folder = tmp_path_factory.mktemp("outside") / "venv"
    venv.create(folder, with_pip=True)
    (wheel,) = dist.glob("*.whl")
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"{wheel}[cli,jax]")
    return folder / "bin"


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside the repository, without the variables of the tests."""
    for name in ("PYTHONPATH", "TF_USE_LEGACY_KERAS", "KERAS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_metadata_is_accepted_by_twine(dist):
    assert len(list(dist.iterdir())) == 2
    run(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "tfimm_lora",
        f"tfimm_lora-{__version__}.dist-info",
    }
    listed = run("git", "ls-files", "tfimm_lora", cwd=ROOT).split()
    assert {name for name in names if name.startswith("tfimm_lora/")} == set(listed)
    assert any(name.endswith("/LICENSE") for name in names)


def test_the_wheel_is_used_outside_the_repository(installed, outside):
    run(installed / "python", "-c", USE, __version__, cwd=outside)


def test_the_command_line_of_the_wheel(installed, outside):
    assert __version__ in run(installed / "tfimm-lora", "--version", cwd=outside)
    # On a terminal of fixed width, so that the list of commands is not cut.
    environment = {**os.environ, "COLUMNS": "100"}
    text = run(installed / "python", "-m", "tfimm_lora", "--help", cwd=outside, env=environment)
    assert "finetune" in text and "export" in text
