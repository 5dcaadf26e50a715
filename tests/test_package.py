"""What the package imports, and when it chooses legacy Keras."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tfimm_lora
from tests.helpers.selection import nightly_except
from tfimm_lora import backend

ROOT = Path(tfimm_lora.__file__).parent

# Each test starts a process that chooses its own Keras, or imports none.
pytestmark = pytest.mark.once


def run_python(code, **environ):
    """Run code in a new process; environment variables of None are unset."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_USE_LEGACY_KERAS",)}
    environment.update({k: v for k, v in environ.items() if v is not None})
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


def test_legacy_keras_is_chosen_where_tfimm_is_installed_and_nobody_has_chosen():
    code = "import tfimm_lora, os; print(os.environ.get('TF_USE_LEGACY_KERAS'))"
    assert run_python(code) == "1"
    assert run_python(code, TF_USE_LEGACY_KERAS="0") == "0"
    late = f"import tensorflow; {code}"
    assert run_python(late) == "None"


@pytest.mark.parametrize(
    "environ, installed, expected",
    [
        ({}, True, "1"),
        ({}, False, None),
        ({"TF_USE_LEGACY_KERAS": "0"}, True, "0"),
        ({"KERAS_BACKEND": "jax"}, True, None),
        ({"KERAS_BACKEND": "tensorflow"}, True, "1"),
    ],
)
def test_choice_of_keras(monkeypatch, environ, installed, expected):
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(backend, "installed", lambda package: installed)
    backend.prefer_legacy_for_tfimm(environ)
    assert environ.get("TF_USE_LEGACY_KERAS") == expected


def test_package_works_without_tfimm_and_tf_keras():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tfimm", "tf_keras"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import importlib.util as u
find = u.find_spec
u.find_spec = lambda n, *a: None if n in ("tfimm", "tf_keras") else find(n, *a)
import tfimm_lora as lora, keras
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dense(2)])
lora.inject_lora(model, lora_rank=2)
try:
    lora.create_model("cait_xxs24_224")
except ValueError as error:
    assert "legacy Keras" in str(error), error
else:
    raise AssertionError
print(keras.__version__[0], len(model.trainable_weights))
"""
    assert run_python(code) == "3 2"


def test_keras_3_with_tfimm_says_what_to_set():
    code = """
import tfimm_lora as lora
try:
    lora.create_model("cait_xxs24_224", lora_rank=2)
except ValueError as error:
    print(error)
"""
    message = run_python(code, TF_USE_LEGACY_KERAS="0")
    assert "legacy Keras" in message and "TF_USE_LEGACY_KERAS=1" in message


def test_readme_line_just_works():
    code = """
import tfimm_lora as lora
model = lora.create_model("vit_tiny_patch16_224", lora_rank=2)
print(type(model).__name__)
"""
    assert run_python(code) == "LoRAViT"


def test_models_of_both_kerases_in_one_process():
    code = """
import tf_keras, keras, numpy as np, tfimm_lora as lora
for k in (tf_keras, keras):
    model = k.Sequential([k.layers.Input((3,)), k.layers.Dense(4), k.layers.Dense(2)])
    lora.inject_lora(model, lora_rank=2)
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    assert len(model.trainable_weights) == 2
    lora.remove_lora(model)
    assert type(model.layers[-1]) is k.layers.Dense
print("both")
"""
    assert run_python(code, TF_USE_LEGACY_KERAS="0") == "both"


def test_every_public_name_has_a_docstring_and_is_listed():
    for name in set(tfimm_lora.__all__) - {"__version__"}:
        assert getattr(tfimm_lora, name).__doc__, name
    assert set(dir(tfimm_lora)) == set(tfimm_lora.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tfimm_lora.no_such_name


def test_importing_the_package_loads_no_keras():
    code = """
import sys, tfimm_lora
heavy = {"tensorflow", "keras", "tf_keras", "tfimm", "jax", "torch", "numpy"}
print(sorted(heavy & set(sys.modules)))
"""
    assert run_python(code) == "[]"


@pytest.mark.long
@pytest.mark.parametrize("legacy", ["1", "0"])
@pytest.mark.parametrize(
    "first",
    nightly_except(
        [
            "import tensorflow as tf; tf.keras.layers",
            "from tensorflow import keras",
            "import {package}",
            "lora.LoRADense",
            "lora.load_adapter; import {package}",
            "import tfimm",
            "from tfimm_lora.zoo.lora_classes.vit import LoRAViT",
        ],
        ["import {package}", "lora.LoRADense", "import tfimm"],
    ),
)
def test_classes_are_registered_whatever_is_imported_first(first, legacy):
    if legacy == "0" and first in (
        "import tfimm",
        "from tfimm_lora.zoo.lora_classes.vit import LoRAViT",
    ):
        pytest.skip("tfimm needs legacy Keras")
    package = "tf_keras" if legacy == "1" else "keras"
    code = f"""
import tfimm_lora as lora
{first.format(package=package)}
import {package} as keras
names = ["LoRADense", "LoRAConv2D", "FrozenConv2D", "FrozenStatisticsBatchNormalization"]
known = keras.saving.get_custom_objects()
from tfimm_lora.model import registry
missing = [name for name in names if "tfimm_lora>" + name not in known]
print(missing, len(registry._lora_classes))
"""
    expected = "[] 15" if legacy == "1" else "[] 0"
    assert run_python(code, TF_USE_LEGACY_KERAS=legacy) == expected


def test_an_optional_package_is_missing_or_cannot_be_imported(tmp_path, monkeypatch):
    from tfimm_lora.utils.optional_imports import require

    with pytest.raises(ImportError, match=r'not installed: pip install "tfimm_lora\[cli\]"'):
        require("there_is_no_such_package", extra="cli", why="This")
    # Installed, but something that it needs is not: its own error says what.
    (tmp_path / "broken_package.py").write_text("raise ImportError('needs that other one')")
    (tmp_path / "incomplete_package.py").write_text("import there_is_no_such_package")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match="^needs that other one$"):
        require("broken_package", extra="cli")
    with pytest.raises(ModuleNotFoundError, match="'there_is_no_such_package'$"):
        require("incomplete_package", extra="cli")
