"""The two versions of transformers, from the side of the tests: no transformers is imported."""

import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

#: Version -> the folder whose packages come before those of this Python, if any.
VERSIONS = {"4": Path(sys.prefix) / "transformers-4", "5": None}
_ROOT = Path(__file__).parents[3]


def missing(version):
    """Why this version cannot be used, or None."""
    first = VERSIONS[version] or Path(np.__file__).parents[1]
    if (first / "transformers").is_dir():
        return None
    return f"transformers {version} is not installed; `make test-interop` installs it"


class Environment:
    """The models and adapters that one version of transformers made, and its programs."""

    def __init__(self, version, folder):
        self.version = version
        self.folder = Path(folder)

    def run(self, program, *arguments):
        """Run `make`, `check` or `train`; a failure is shown with the end of its output."""
        first = VERSIONS[self.version]
        path = [str(_ROOT), *([str(first)] if first else [])]
        # transformers 4 would import TensorFlow.
        changes = {"PYTHONPATH": os.pathsep.join(path), "USE_TF": "0", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                f"tests.interop.hugging_face.{program}",
                *map(str, arguments),
            ],
            cwd=_ROOT,
            env={**os.environ, **changes},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise AssertionError(f"{program} {arguments} failed:\n{done.stderr[-4000:]}")

    @cached_property
    def index(self):
        return json.loads((self.folder / "index.json").read_text())

    @property
    def models(self):
        """Model -> its entry: class, adapters, skipped_adapters, parameters, modules."""
        return self.index["models"]

    def base(self, model):
        """The folder with config.json and model.safetensors."""
        return self.folder / model / "base"

    def adapter(self, model, name):
        return self.folder / model / "adapters" / name

    def adapter_config(self, model, name):
        return json.loads((self.adapter(model, name) / "adapter_config.json").read_text())

    def base_tensors(self, model):
        return load_file(self.base(model) / "model.safetensors")

    def adapter_tensors(self, model, name):
        return load_file(self.adapter(model, name) / "adapter_model.safetensors")

    def batch(self, model):
        """pixel_values (batch, channels, height, width) and labels."""
        return dict(np.load(self.folder / model / "batch.npz"))

    def outputs(self, model):
        """The outputs for the batch: "base", "base_features", and one for each adapter."""
        return dict(np.load(self.folder / model / "outputs.npz"))

    def check(self, model, adapters, out):
        """The outputs of a model with each of some adapter folders, by real PEFT.

        Args:
            model: The name of a model, or the folder of another base.
            adapters: Folders of adapters, or None for the model alone.
            out: An existing folder for temporary files.
        """
        base = self.base(model) if isinstance(model, str) else model
        batch = base.parent / "batch.npz"
        files = [Path(out) / f"outputs-{i}.npz" for i, _ in enumerate(adapters)]
        arguments = []
        for adapter, file in zip(adapters, files):
            arguments += [base, adapter or "-", batch, file]
        self.run("check", *arguments)
        return [np.load(file)["outputs"] for file in files]
