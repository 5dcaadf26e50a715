"""The commands of README and docs run in new environments, made by README's install lines.

There is one environment for each kind of setup. The unpacked sdist stands for the clone in
which the install lines run. Every command in a bash block is run here or listed in ``NOT_RUN``.
"""

import os
import re
import shutil
import subprocess
import tarfile
import venv

import pytest

from tests.helpers.documents import commands_in, documents
from tests.helpers.picture_folders import write_digits
from tests.wheel.conftest import run

#: The environment -> how its install line is recognized.
SETUPS = {
    "jax": r"pip install \S*cli,jax\S*$",
    "tfimm": r"pip install .*&& .*tfimm==",
    "tensorflow": r"pip install \S*cli,onnx,tensorflow\S*$",
}

#: The environment -> the documents whose commands run in it.
DOCUMENTS = {
    "jax": ["README.md"],
    "tfimm": ["README.md", "docs/how-to/fine-tune-on-pictures.md"],
    "tensorflow": ["README.md", "docs/how-to/export.md"],
}

#: Commands that are not run here, as "document: command" -> the reason.
NOT_RUN = {
    r"pip install \S*cli,torch": "torch is large; JAX shows that TensorFlow is not needed, and "
    "`make test-torch` runs the tests on torch",
    r"pip install \S*cli,tensorflow": "the tensorflow setup with fewer extras",
    r"make (demo|test)$": "CI runs them",
    r"^docs/tutorials/pictures-to-report.md": "run by tests/docs/test_examples.py",
    r"^docs/tutorials/demo.md": "they need the files of `make demo`, which takes minutes",
    r"tfimm-lora (convert|inspect hf)": "tests/cli/test_convert.py runs convert and inspect",
    r"python -m benchmarks.vtab": "it needs VTAB-1k and a GPU; tests/benchmarks runs it small",
    r"--lr auto|\[tune\]": "a search takes minutes; tests/finetuning/tuning runs searches",
    r"^docs/how-to/choose-settings.md": "they need pretrained weights from a hub",
    r"^docs/how-to/serving.md": "tests/serving run the server, which does not end by itself",
    r"^docs/how-to/several-labels-and-numbers.md": "tests/finetuning/tasks runs them",
    r"^docs/how-to/segmentation.md": "tests/finetuning/tasks runs them",
    r"^docs/how-to/explain-predictions.md": "tests/cli/test_predict.py runs predict --explain",
    r"^docs/how-to/demo-page.md": "tests/demo_page runs the page, which does not end by itself",
    r"^docs/how-to/several-devices.md": "tests/finetuning/test_distributed.py runs strategies",
}

#: So that the commands are quick, and need no network: replaced text -> its replacement.
SMALLER = {
    # Pretrained weights would be downloaded.
    r"(finetune --model vit_tiny_patch16_224)": r"\1 --from-scratch",
    # Building and compiling MobileNetV2 takes a minute on JAX.
    r"--model applications/MobileNetV2": "--model small.keras --normalisation unit --epochs 1",
    r"(finetune .*vit_tiny.*) --out run$": r"\1 --epochs 1 --out run",
    # All commands of a document run in one folder, which then contains a run.
    r"(usable\.csv.*) --out run$": r"\1 --out run-usable",
}

#: Saves small.keras with the Keras that the package selects.
MAKE_MODEL = """
import tfimm_lora
from tfimm_lora.backend import default_backend
keras = default_backend().keras
layers = keras.layers
model = keras.Sequential([
    layers.Input((32, 32, 3)), layers.Conv2D(8, 3, strides=4, activation="relu"),
    layers.BatchNormalization(), layers.Flatten(), layers.Dense(5, activation="softmax")])
model.save("small.keras")
"""


def reasons_for(document, command):
    """The patterns of ``NOT_RUN`` that match a command."""
    return {p for p in NOT_RUN if re.search(p, f"{document}: {command}")}


def is_installation(command):
    return command.startswith("pip install")


def test_every_command_of_the_documents_is_run_or_has_a_reason():
    run_here = {document for several in DOCUMENTS.values() for document in several}
    used = set()
    for document in documents():
        for command in commands_in(document):
            reasons = reasons_for(document, command)
            installs = any(re.search(pattern, command) for pattern in SETUPS.values())
            is_run = document in run_here and not is_installation(command)
            assert reasons or installs or is_run, (document, command)
            used |= reasons
    assert used == set(NOT_RUN), set(NOT_RUN) - used


@pytest.fixture(scope="module")
def clone(dist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clone")
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


#: Another installation of TensorFlow takes minutes: `pytest tests/wheel -m nightly` runs it.
QUICK = [
    pytest.param(x, marks=pytest.mark.nightly if x == "tensorflow" else ()) for x in SETUPS
]


@pytest.fixture(params=QUICK)
def setup(request, clone, tmp_path, monkeypatch):
    """The name of a setup, after its install line was run in a new environment."""
    for name in ("PYTHONPATH", "TF_USE_LEGACY_KERAS", "KERAS_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    venv.create(tmp_path / "venv", with_pip=True)
    monkeypatch.setenv("PATH", str(tmp_path / "venv" / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    # As in a new account: Keras writes the file keras.json there.
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (line,) = {c for c in commands_in("README.md") if re.search(SETUPS[request.param], c)}
    run("bash", "-ec", line, cwd=clone)
    return request.param


@pytest.mark.timeout(1800)  # it installs packages
def test_commands(setup, tmp_path):
    if setup != "tfimm":  # installed with --no-deps, since it declares an older Python
        run("pip", "check")
    run("python", "-W", "error", "-c", "import tfimm_lora", cwd=tmp_path)
    assert "finetune" in run("tfimm-lora", "--help", cwd=tmp_path)
    run("python", "-c", MAKE_MODEL, cwd=tmp_path)
    for document in DOCUMENTS[setup]:
        folder = tmp_path / document.replace("/", "-")
        write_digits(folder / "pictures", each=6, size=32)
        shutil.copy(folder / "pictures" / "0" / "0.png", folder / "cat.jpg")
        shutil.copy(tmp_path / "small.keras", folder)
        if "export.md" in document:  # it starts with a run
            (folder / "run").symlink_to(tmp_path / "README.md" / "run")
        for command in commands_in(document):
            if not is_installation(command) and not reasons_for(document, command):
                run("bash", "-ec", smaller(command), cwd=folder)
        assert (folder / "run" / "report.html").exists()
    if setup == "jax":
        check_without_tensorflow(tmp_path / "README.md")


def smaller(command):
    for pattern, replacement in SMALLER.items():
        command = re.sub(pattern, replacement, command)
    return command


def check_without_tensorflow(folder):
    """What needs TensorFlow says so, and names the command to install it."""
    find = "import importlib.util as u; print(u.find_spec('tensorflow'))"
    assert run("python", "-c", find).strip() == "None"
    for arguments, words in {
        "models --help": "",
        "finetune --model vit_tiny_patch16_224 --data pictures --out x": "pip install",
        "finetune --model applications/VGG16 --data pictures --out x --strategy mirrored": (
            "pip install tensorflow"
        ),
    }.items():
        done = subprocess.run(
            ["tfimm-lora", *arguments.split()], cwd=folder, capture_output=True, text=True
        )
        assert done.returncode == (1 if words else 0), done.stderr
        assert words in done.stderr and "Traceback" not in done.stderr
