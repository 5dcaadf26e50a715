"""Adapters without a model, to test HTTP: a bank in NumPy, and folders of adapters."""

import contextlib
import io
import threading
import time
from typing import NamedTuple

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

import tfimm_lora as lora
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.shared_base import SharedBase
from tfimm_lora.serving.adapter_folder import AdapterFolder
from tfimm_lora.serving.app import create_app
from tfimm_lora.serving.service import Service
from tfimm_lora.serving.settings import ServingSettings

TOKEN = "a-token-of-the-tests"
SIDE = 4
#: Pictures as they are, in [0, 1].
PREPROCESSING = Preprocessing((SIDE, SIDE), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)


class NumPyPrediction(NamedTuple):
    adapter: str | None
    logits: np.ndarray
    labels: tuple[str, ...] | None

    @property
    def probabilities(self):
        e = np.exp(self.logits - self.logits.max())
        return e / e.sum()


class NumPyBank:
    """A bank of linear models: the logits are B A times the mean colour, or just the colour.

    ``calls`` has the names of each batch. While ``gate`` is closed, predictions wait.
    """

    def __init__(self):
        self.weights, self.labels, self.calls = {}, {}, []
        self.gate = threading.Event()
        self.gate.set()

    @property
    def names(self):
        return tuple(self.weights)

    def load(self, name, adapter, *, labels=None):
        update = adapter.layers["fc"]
        if update.a.shape[1] != 3:
            raise ValueError(
                f"Adapter {name!r}: fc has {update.a.shape[1]} inputs; expected 3."
            )
        weight = update.scale * update.b @ update.a
        if labels is not None and len(labels) != len(weight):
            raise ValueError(f"Received {len(labels)} labels for {len(weight)} classes.")
        self.weights[name], self.labels[name] = weight, labels

    def remove(self, name):
        del self.weights[name], self.labels[name]

    def predict(self, inputs, names):
        assert inputs.shape == (len(names), SIDE, SIDE, 3), inputs.shape
        self.calls.append(list(names))
        assert self.gate.wait(30)
        if "broken" in names:
            raise RuntimeError("broken in the model")
        colours = np.asarray(inputs).mean((1, 2))
        return [
            NumPyPrediction(
                name, self.weights[name] @ x if name else x, self.labels[name] if name else None
            )
            for name, x in zip(names, colours)
        ]

    def warm_up(self, inputs):
        assert self.gate.wait(30)


def make_adapter(seed=0, classes=4, inputs=3):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, inputs)), rng.normal(size=(classes, 2))
    return lora.Adapter({"fc": lora.LayerUpdate(a, b, scale=0.5)})


def write_adapter(folder, name, seed=0, classes=4, labels=True):
    """Write an adapter into a folder of adapters, with labels like "rose-0"."""
    make_adapter(seed, classes).save(folder / name)
    if labels:
        text = "".join(f"{name}-{i}\n" for i in range(classes))
        (folder / name / "labels.txt").write_text(text)


def form_of(folder):
    """The files of an adapter as the form that PUT takes."""
    names = {
        "config": "adapter_config.json",
        "weights": "adapter_model.safetensors",
        "labels": "labels.txt",
    }
    return {
        field: (file, (folder / file).read_bytes())
        for field, file in names.items()
        if (folder / file).exists()
    }


def picture(seed=0, format="PNG", size=(SIDE, SIDE)):
    """A picture of one colour: the bytes of its file, and its colour in [0, 1]."""
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    content = io.BytesIO()
    Image.new("RGB", size, tuple(map(int, colour))).save(content, format, lossless=True)
    return content.getvalue(), colour / 255


def expected(colour, seed=0, classes=4):
    """The probabilities that an adapter gives for a picture of one colour."""
    update = make_adapter(seed, classes).layers["fc"]
    logits = update.scale * (update.b @ (update.a @ colour))
    e = np.exp(logits)
    return e / e.sum()


def make_service(folder, bank, has_classifier=True, **settings):
    """A service without a model, and its settings."""
    settings = ServingSettings("base", str(folder), **{"token": TOKEN, **settings})
    base = SharedBase("base", None, PREPROCESSING, None, has_classifier)
    service = Service(base, lambda adapters: bank, AdapterFolder(folder), settings.max_batch)
    return service, settings


def authorization(token=TOKEN):
    return {"Authorization": f"Bearer {token}"}


def ready(client):
    """Wait until the application is ready."""
    for _ in range(3000):
        if client.get("/health").status_code == 200:
            return
        time.sleep(0.01)
    raise AssertionError(client.get("/health").json())


@contextlib.contextmanager
def started(adapters, bank, **settings):
    """Start an application, and end it after the block."""
    app = create_app(*make_service(adapters, bank, **settings))
    with TestClient(app, raise_server_exceptions=False) as client:
        ready(client)
        yield client
