"""The methods of the VTAB-1k benchmark on a tiny ViT, of tfimm or keras_hub."""

import functools
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tfimm_lora as lora
from benchmarks.vtab import __main__ as command
from benchmarks.vtab import methods
from benchmarks.vtab.pictures import TrainingBatches
from benchmarks.vtab.tasks import TRAIN, find_task
from tests.benchmarks.test_vtab import write_folder
from tests.helpers.kerases import LEGACY, array

WIDTH, BLOCKS, MLP = 8, 1, 32
SMALL = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--size", "16"]


def small_hub_model(name, *, nb_classes, input_size, **arguments):
    """What ``lora.create_model`` makes on Keras 3, with other sizes."""
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(*input_size, 3),
        patch_size=(8, 8),
        num_layers=BLOCKS,
        num_heads=2,
        hidden_dim=WIDTH,
        mlp_dim=MLP,
    )
    net = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=nb_classes)
    return lora.inject_lora(net, **arguments)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    sizes = {"embed_dim": WIDTH, "nb_blocks": BLOCKS, "nb_heads": 2, "patch_size": 8}
    made = functools.partial(lora.create_model, **sizes) if LEGACY else small_hub_model
    monkeypatch.setattr(methods.lora, "create_model", made)


def create(method, weights=None):
    return methods.create(
        method,
        methods.METHODS[method].arguments,
        model="vit_tiny_patch16_224",
        weights=weights,
        classes=3,
        size=16,
        seed=0,
    )


HEAD = 3 * (WIDTH + 1)
#: Of q, k, v, the projection, both layers of the MLP, two normalizations of each block; of the
#: patches and the last normalization.
BIASES = BLOCKS * (3 * WIDTH + WIDTH + MLP + WIDTH + 2 * WIDTH) + 2 * WIDTH


@pytest.mark.parametrize(
    "method, trained",
    [
        ("linear", HEAD),
        ("bitfit", HEAD + BIASES),
        ("lora", HEAD + BLOCKS * 2 * 8 * 2 * WIDTH),
        ("full", None),
    ],
)
def test_each_method_trains_its_parameters(method, trained, tmp_path):
    net = create(method)
    counted = methods.parameters(method, net)
    assert counted["classifier"] == HEAD
    assert counted["trained"] == (trained or counted["all"])
    before = {v.name if LEGACY else v.path: array(v) for v in net.weights}
    write_folder(tmp_path / "eurosat", 3)
    batches = TrainingBatches(find_task("eurosat", tmp_path).part(TRAIN), 16, 12, seed=0)
    methods.train(net, batches, epochs=2, warmup=0, rate=1e-2, decay=0.1, seed=0)
    changed = 0
    for v in net.weights:
        different = not np.array_equal(array(v), before[v.name if LEGACY else v.path])
        idle = "kernel_lora" in v.name and method == "bitfit"
        assert not (different and idle)  # its product stays zero
        changed += different * int(np.prod(v.shape))
    assert 0.5 * counted["trained"] < changed <= counted["trained"]


def test_trials_begin_with_the_same_model():
    first, second = create("lora"), create("lora")
    for a, b in zip(first.weights, second.weights, strict=True):
        assert np.array_equal(array(a), array(b))


@pytest.mark.parametrize("classes", [5, 0])
def test_weights_are_loaded_without_their_classifier(tmp_path, classes):
    """Checkpoints for other classes, and those without a classifier, as on ImageNet-21k."""
    source = create("full")
    for v in source.weights:
        v.assign(np.random.default_rng(1).normal(size=v.shape).astype("float32"))
    file = tmp_path / "model.safetensors"
    lora.save_timm_weights(source, tmp_path)
    tensors = load_file(file)
    for name in ("head.weight", "head.bias"):
        head = tensors.pop(name)
        if classes:
            tensors[name] = np.zeros((classes, *head.shape[1:]), "float32")
    save_file(tensors, file)
    loaded = create("full", file)
    same = [np.array_equal(array(a), array(b)) for a, b in zip(source.weights, loaded.weights)]
    sizes = [int(np.prod(v.shape)) for v, x in zip(source.weights, same) if not x]
    assert sum(sizes) == HEAD and same.count(False) == 2


def test_the_benchmark_runs(tmp_path, capsys):
    """One task from the command line to the table, with the real training."""
    write_folder(tmp_path / "data" / "patch_camelyon", 2)
    options = ["--out", str(tmp_path / "out"), "--name", "dora", "--lora", "use_dora=True"]
    training = ["--epochs", "15", "--warmup", "1", "--batch", "4", "--rates", "0.03"]
    choice = ["--tasks", "patch_camelyon", "--decays", "0"]
    program = ["--data", str(tmp_path / "data"), *options, *training, *choice, *SMALL]
    command.main(program)
    (file,) = (tmp_path / "out").iterdir()
    result = json.loads(file.read_text())
    assert file.name == "dora-patch_camelyon-0.json"
    assert result["settings"]["arguments"]["lora_use_dora"] is True
    assert result["environment"]["keras"] == ("legacy" if LEGACY else "3")
    assert "numpy" in result["environment"]["versions"]
    assert result["trials"][0]["settings"]["learning_rate"] == 0.03
    # The brightest channel of three is easy; guessing gives 0.5.
    assert result["trials"][0]["accuracy"] == 1 and result["test"]["accuracy"] == 1
    command.main(program)
    assert "finished before" in capsys.readouterr().out
    command.main(["--out", str(tmp_path / "out"), "--table"])
    assert "| patch_camelyon | 100.0 |" in capsys.readouterr().out
