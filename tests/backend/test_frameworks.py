"""Which framework Keras 3 runs on, where TensorFlow or any other is not installed."""

import json
import os
import subprocess
import sys

import pytest

from tfimm_lora.backend import frameworks

# They start processes that choose their own framework, or replace what is installed.
pytestmark = pytest.mark.once

#: Start of a program that runs as if these packages were not installed.
WITHOUT = """
import importlib.util, sys
missing = {packages!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
find = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n in missing else find(n, *a)
"""


def run_without(packages, code, *arguments, **environ):
    """Run a program without packages; return its exit code and output."""
    environment = {**os.environ, **environ}
    for name in ("KERAS_BACKEND", "TF_USE_LEGACY_KERAS"):
        if name not in environ:
            environment.pop(name, None)
    program = WITHOUT.format(packages=tuple(packages)) + code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def selection(monkeypatch, tmp_path):
    """A function that selects in an environment where these packages are installed."""

    def select(*packages, configured=None, keras_is_imported=False, **environ):
        if configured is not None:
            (tmp_path / "keras.json").write_text(json.dumps({"backend": configured}))
        monkeypatch.setattr(frameworks, "installed", lambda package: package in packages)
        if keras_is_imported:
            monkeypatch.setitem(sys.modules, "keras", object())
        else:
            monkeypatch.delitem(sys.modules, "keras", raising=False)
        monkeypatch.setattr(frameworks, "automatic", None)
        environ["KERAS_HOME"] = str(tmp_path)
        frameworks.prefer_installed_framework(environ)
        return environ.get("KERAS_BACKEND")

    return select


@pytest.mark.parametrize(
    "installed, expected",
    [
        (("tensorflow",), None),
        (("tensorflow", "jax", "torch"), None),
        (("jax",), "jax"),
        (("torch",), "torch"),
        (("jax", "torch"), "jax"),
        ((), None),
    ],
)
@pytest.mark.parametrize("configured", [None, "tensorflow"])
def test_the_installed_framework_is_selected(selection, installed, expected, configured):
    assert selection(*installed, configured=configured) == expected
    assert frameworks.automatic == expected


def test_the_selection_of_the_user_is_kept(selection):
    assert selection("jax", KERAS_BACKEND="tensorflow") == "tensorflow"
    assert selection("jax", "torch", KERAS_BACKEND="torch") == "torch"
    assert selection("jax", "torch", configured="torch") is None  # Keras reads the file
    assert selection("jax", keras_is_imported=True) is None


def test_the_selection_is_reported_with_the_alternative(selection):
    assert frameworks.automatic_selection() == ""
    selection("jax", "torch")
    assert frameworks.automatic_selection() == (
        "TensorFlow is not installed: Keras 3 runs on JAX (for torch, set KERAS_BACKEND=torch)"
    )


@pytest.mark.parametrize("content", ["", "[]", "{", '{"floatx": "float32"}'])
def test_an_unreadable_configuration_means_tensorflow(tmp_path, content):
    (tmp_path / "keras.json").write_text(content)
    assert frameworks.selected_framework({"KERAS_HOME": str(tmp_path)}) == "tensorflow"


def test_a_folder_that_an_uninstalled_package_left_is_not_a_package(tmp_path, monkeypatch):
    (tmp_path / "leftover").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not frameworks.installed("leftover")
    (tmp_path / "leftover" / "__init__.py").touch()
    assert frameworks.installed("leftover")


OPEN = "import tfimm_lora as lora; lora.LoRADense"


@pytest.mark.parametrize(
    "missing, environ, words",
    [
        (("tensorflow", "jax", "torch"), {}, "needs TensorFlow, JAX or torch, and none"),
        (("jax", "torch"), {"KERAS_BACKEND": "jax"}, "TensorFlow can be used. Set"),
        (
            ("jax", "torch"),
            {"KERAS_BACKEND": "torch", "TF_USE_LEGACY_KERAS": "0"},
            "KERAS_BACKEND=torch.*not installed; TensorFlow can.*KERAS_BACKEND=tensorflow",
        ),
        (("tf_keras",), {"TF_USE_LEGACY_KERAS": "1"}, "Legacy Keras, selected by.*tf_keras"),
    ],
)
def test_a_missing_framework_is_one_clear_sentence(missing, environ, words):
    code = f"import re\ntry:\n    {OPEN}\nexcept ImportError as e:\n    print(e)"
    code += f"\n    assert re.search({words!r}, str(e)), e"
    code += "\n    assert 'pip install' in str(e)\nelse:\n    raise AssertionError"
    result, output = run_without((*missing, "tfimm"), code, **environ)
    assert result == 0, output


COMMAND = """
from tfimm_lora.cli import main
print("exit code", main(sys.argv[1:]))
"""


def test_the_command_line_reports_a_missing_framework():
    missing = ("tensorflow", "jax", "torch", "tfimm")
    result, output = run_without(missing, COMMAND, "plan", "applications/MobileNet")
    assert result == 0 and "exit code 1" in output
    assert "error: Keras 3 needs TensorFlow, JAX or torch" in output and "Trace" not in output
    result, output = run_without(missing, COMMAND, "--help")
    assert "finetune" in output and "exit code 0" in output


def test_legacy_keras_is_not_selected_without_tensorflow():
    code = "import os, tfimm_lora; print(os.environ.get('TF_USE_LEGACY_KERAS'))"
    assert run_without(("tensorflow",), code) == (0, "None\n")


def test_tfimm_names_what_it_needs():
    code = """
from tfimm_lora.zoo.tfimm_models import import_tfimm
try:
    import_tfimm()
except ImportError as error:
    print(error)
"""
    _, output = run_without(("tensorflow",), code)
    assert "models of tfimm need tensorflow" in output and "pip install" in output
