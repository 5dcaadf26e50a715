"""The command line: the commands for models and adapters, exit codes, what stdout holds."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal
from tests.helpers.selection import NIGHTLY_ON_LEGACY
from tests.helpers.tiny_models import functional
from tfimm_lora.backend.frameworks import installed
from tfimm_lora.cli import inspect as inspect_module
from tfimm_lora.cli import main
from tfimm_lora.cli.app import app
from tfimm_lora.cli.commands import COMMANDS
from tfimm_lora.cli.models import known_models
from tfimm_lora.model.merge import lora_layers
from tfimm_lora.zoo.model_table import tfimm_models

pytestmark = NIGHTLY_ON_LEGACY

TESTED_HERE = ("models", "plan", "inspect", "convert", "combine", "diff")

SMALL = "resnet18" if LEGACY else "applications/MobileNetV2"


@pytest.fixture
def document(call):
    """Run a command with --json: what it printed."""
    return lambda *argv: json.loads(call(*argv, "--json")[0])


def update(rank, out=6, width=5, scale=0.5, seed=0, **more):
    a, b = normal(rank, width, seed=seed), normal(out, rank, seed=seed + 1)
    return lora.LayerUpdate(a, b, scale, **more)


def several(rank=2, seed=0, **more):
    """An adapter with a layer of each kind, and a classifier."""
    layers = {
        "blocks.0.fc": update(rank, seed=seed),
        "blocks.2.fc": update(rank, seed=seed + 10, scale=2.0),
        "blocks.10.conv": lora.LayerUpdate(
            normal(rank, 3, 3, 3, seed=seed + 20),
            normal(4, rank, 1, 1, seed=seed + 21),
            0.3,
            "conv",
        ),
        "depthwise": lora.LayerUpdate(
            normal(rank, 1, 3, 3, seed=seed + 30),
            normal(4, rank, 1, 1, seed=seed + 31),
            1.0,
            "depthwise",
        ),
        "tokens": update(rank, out=3, width=20, seed=seed + 40, kind="embedding"),
    }
    whole = {"head.weight": normal(3, 6, seed=seed), "head.bias": normal(3, seed=seed)}
    more = {"base_model": "timm/tiny", **more}
    return lora.Adapter(layers, whole, ("head",), **more)


@pytest.fixture
def saved(tmp_path):
    """Save an adapter to a folder of this name."""

    def saved(name, adapter):
        adapter.save(tmp_path / name)
        return tmp_path / name

    return saved


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_and_usage_errors_need_no_framework():
    expected = {
        "--help": 0,
        "--version": 0,
        "no-such-command": 2,
        "models": 0,
        **{f"{name} --help": 0 for name in COMMANDS},
        "plan --no-such-option": 2,
    }
    code = f"""
import contextlib, io, sys
from tfimm_lora.cli import main
for words in {list(expected)}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            code = main(words.split())
        except SystemExit as end:
            code = end.code
    heavy = {{"tensorflow", "keras", "tf_keras", "jax", "torch"}}
    if words in ("--help", "--version", "no-such-command"):
        heavy |= {{"numpy", "tfimm_lora.config", "tfimm_lora.cli.models"}}
    print(words, code or 0, *heavy & set(sys.modules))
"""
    environ = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ
    )
    found = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert found == {words: str(code) for words, code in expected.items()}, done.stderr


@pytest.mark.skipif(LEGACY, reason="legacy Keras is TensorFlow's")
@pytest.mark.parametrize("jax", [True, False])
def test_plan_of_an_application_does_not_wait_for_tensorflow(jax):
    """Keras counts the weights on NumPy: the same numbers in half of the time.

    Keras' NumPy backend imports JAX, so without JAX TensorFlow counts them.
    """
    if jax and not installed("jax"):
        pytest.skip("needs JAX")
    code = f"""
import sys
from tfimm_lora.cli import app, main
app.installed = lambda package: package != "jax" or {jax}
sys.argv[1:] = ["plan", "MobileNetV2", "--rank", "4", "--json"]
code = main()
print(code, "tensorflow" in sys.modules, file=sys.stderr)
"""
    environ = {k: v for k, v in os.environ.items() if k != "KERAS_BACKEND"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ
    )
    assert done.stderr.splitlines()[-1] == f"0 {not jax}", done.stderr
    total = keras.applications.MobileNetV2(weights=None).count_params()
    assert json.loads(done.stdout)["total"] == total


# -- the command line itself ----------------------------------------------------------------


def command_of(name):
    importlib.import_module(f"tfimm_lora.cli.{name}")
    return typer.main.get_command(app).commands[name]


@pytest.mark.parametrize("name", TESTED_HERE)
def test_help_ends_with_examples_that_can_be_copied(name, call):
    out, _ = call(name, "--help")
    command = command_of(name)
    examples = [line for line in command.epilog.splitlines() if line.startswith("tfimm-lora")]
    assert examples
    tail = [line.strip() for line in out.splitlines() if line.strip()][-len(examples) :]
    assert tail == examples, "too long for 80 columns, or not at the end"
    for example in examples:
        words = [word.strip('"') for word in example.split()]
        assert words[1] == name
        assert command.make_context(name, words[2:], resilient_parsing=False)


def test_every_command_is_listed_and_without_one_there_is_help(call):
    out, _ = call("--help")
    text = " ".join(out.replace("│", " ").split())
    for name, sentence in COMMANDS.items():
        assert f"{name} {sentence}" in text
        assert " ".join(command_of(name).help.split("\n\n")[0].split()) == sentence
    assert "Usage: tfimm-lora " in out
    call(expect=2)
    assert call("--version")[0].strip() == lora.__version__


def test_exit_codes(call, monkeypatch):
    _, err = call("no-such-command", expect=2)
    assert "No such command" in err
    call("inspect", expect=2)
    call("plan", "x", "--rank", "two", expect=2)
    out, err = call("inspect", "no/such/folder", expect=1)
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    _, err = call("--debug", "inspect", "no/such/folder", expect=1)
    assert "Traceback" in err and "\nerror: " in err

    def interrupt(address):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_module, "open_adapter", interrupt)
    call("inspect", "x", expect=130)


@pytest.mark.long
@pytest.mark.parametrize("program", ["script", "module"])
def test_the_program_runs_in_a_process_of_its_own(program, saved, tmp_path):
    path = saved("one", several())
    script = Path(sys.executable).with_name("tfimm-lora")
    words = [str(script)] if program == "script" else [sys.executable, "-m", "tfimm_lora"]
    done = subprocess.run(
        [*words, "inspect", str(path), "--json"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["layers"] == 5


# -- models ---------------------------------------------------------------------------------


def test_models_are_those_that_can_be_made(document):
    found = {x["name"]: x for x in document("models")}
    expected = [f"applications/{n}" for n in dir(keras.applications) if n[0].isupper()]
    expected += lora.list_models()
    assert set(found) == set(expected)
    assert found["applications/InceptionV3"]["input_size"] == [299, 299]
    assert all(x["parameters"] for x in found.values())
    if LEGACY:
        assert found["vit_tiny_patch16_224"] == {
            "name": "vit_tiny_patch16_224",
            "library": "tfimm",
            "family": "ViT",
            "parameters": 5_717_416,
            "input_size": [224, 224],
            "targets": ["attn/qkv", "attn/proj", "mlp/fc1", "mlp/fc2"],
            "pretrained": True,
        }
        assert not found["mixer_s32_224"]["pretrained"]
        assert found["convmixer_768_32"]["targets"] == r"blocks/\d+/1"


def test_names_are_found_by_a_part_or_a_pattern_in_any_case(document):
    parts = [x["name"] for x in document("models", "S/MOBILENETV3")]
    assert parts == ["applications/MobileNetV3Large", "applications/MobileNetV3Small"]
    assert [x["name"] for x in document("models", "*/xcept*")] == ["applications/Xception"]


def test_names_that_match_nothing_are_answered_with_the_nearest(call):
    out, err = call("models", "ResNet5O", expect=1)
    assert out == "" and "'ResNet5O'" in err and "Most similar: " in err and "esNet50" in err
    _, err = call("models", "vit_*_999", expect=1)
    assert "TF_USE_LEGACY_KERAS" not in err
    if LEGACY:
        assert "vit_" in err
    else:
        _, err = call("models", "cait_*_224", expect=1)
        assert "TF_USE_LEGACY_KERAS=1" in err


def test_no_name_is_cut_where_stdout_is_no_terminal(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    out, err = call("models")
    lines = out.splitlines()
    assert len(lines) == 1 + len(known_models())
    assert {line.split()[0] for line in lines[1:]} == set(known_models())
    assert "…" not in out and "\x1b" not in out
    assert err.strip() == f"{len(known_models())} of {len(known_models())} models"


def test_names_are_not_cut_on_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for columns in ("40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        out, _ = call("models", "DenseNet")
        for name in ("DenseNet121", "DenseNet169", "DenseNet201"):
            assert f"applications/{name} " in out
        assert "…" not in out
        if not LEGACY:  # where the last column has patterns, which are wrapped at any letter
            assert out.split().count("classifier") == 3


# -- plan -----------------------------------------------------------------------------------


@pytest.fixture
def model_file(tmp_path):
    """A saved model of one convolution, two dense layers, and 4 + 10 biases."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv"),
            keras.layers.Flatten(),
            keras.layers.Dense(10, "relu", name="fc"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    path = tmp_path / "model.keras"
    model.save(path)
    return path


def test_plan_counts_what_can_be_counted_by_hand(model_file, document, tmp_path):
    found = document("plan", model_file, "--rank", 2, "--alpha", 6, "--optimizer", "lion")
    conv, fc = 2 * (3 * 3 * 3) + 2 * 4, 2 * 144 + 2 * 10
    assert found["layers"] == [
        dict(path="conv", kind="conv", shape=[3, 3, 3, 4], rank=2, scale=3.0, parameters=conv),
        dict(path="fc", kind="linear", shape=[144, 10], rank=2, scale=3.0, parameters=fc),
    ]
    total = (27 * 4 + 4) + (144 * 10 + 10) + (10 * 3 + 3)
    assert (found["total"], found["full"], found["trainable"]) == (total, total, conv + fc)
    assert found["classifier_total"] == 33
    assert found["memory"]["lora"] == {
        "weights": 4 * (total + conv + fc),
        "gradients": 4 * (conv + fc),
        "optimizer": 4 * (conv + fc),
        "together": 4 * (total + 3 * (conv + fc)),
    }
    assert found["memory"]["full"]["together"] == 4 * 3 * total
    # As a stranger would do it: load, adapt, save.
    model = keras.models.load_model(model_file)
    lora.inject_lora(model, lora_rank=2, lora_alpha=6)
    lora.save_adapter(model, tmp_path / "adapter", base_model=model_file.name)
    written = {name: len(data) for name, data in contents(tmp_path / "adapter").items()}
    assert found["adapter_files"] == written
    assert found["adapter_bytes"] == sum(written.values())


def test_plan_with_other_classes_trains_the_classifier(model_file, document):
    found = document(
        "plan", model_file, "--classes", 7, "--train-bias", "all", "--targets", "fc"
    )
    assert [x["path"] for x in found["layers"]] == ["fc"]
    assert (found["classifier"], found["biases"]) == (10 * 7 + 7, 4 + 10)
    assert found["reasons"] == {"not among the targets": 1, "classifier, fully trained": 1}
    closed = document("plan", model_file, "--classes", 7, "--no-train-classifier")
    assert (closed["classifier"], closed["classifier_total"]) == (0, 77)
    opened = document("plan", model_file, "--train-classifier")
    assert opened["classifier"] == 33


def test_plan_takes_every_field_of_the_config(model_file, call, document):
    plain = document("plan", model_file, "--rank", 2)
    loha = document("plan", model_file, "--rank", 2, "--lora", "use_loha=true")
    assert loha["trainable"] == 2 * plain["trainable"]
    assert document("plan", model_file, "--lora", "init=pissa")["layers"]
    _, errors = call("plan", model_file, "--lora", "use_lora=true", expect=1)
    assert "did you mean lora_use_rslora" in errors


def test_targets_are_names_presets_or_an_expression(model_file, document):
    def adapted(*targets):
        return [x["path"] for x in document("plan", model_file, *targets)["layers"]]

    assert adapted("--targets", "fc, head") == ["fc", "head"]
    assert adapted("--targets", "fc") == ["fc"]
    assert adapted("--targets", ".*(ead|onv)") == ["conv", "head"]
    assert adapted("--targets", "all") == ["conv", "fc"] == adapted()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
def test_plan_counts_activations_for_a_batch(model_file, document):
    one, two = (document("plan", model_file, "--batch-size", n)["memory"] for n in (4, 8))
    without = document("plan", model_file)["memory"]
    for way in ("lora", "full"):
        # The convolution's output, flat, and that of the hidden layer.
        assert one[way]["step"] >= 4 * 4 * (144 + 10)
        # Gradients and effective kernels W + s A B do not depend on the batch.
        assert 4 * 4 * (144 + 10) <= two[way]["step"] - one[way]["step"] <= one[way]["step"]
        kept = without[way]["weights"] + without[way]["optimizer"]
        assert one[way]["together"] == kept + one[way]["step"] + one[way]["program"]
        assert one[way]["program"] > 1e9


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counted in graphs of TensorFlow")
def test_plan_with_gradient_checkpointing(model_file, call, document, tmp_path):
    layers, path = keras.layers, tmp_path / "blocks.keras"

    def block(x, name):
        entry = keras.Input(x.shape[1:])
        y = layers.Dense(64, activation="gelu", name="fc1")(entry)
        y = layers.add([entry, layers.Dense(8, name="fc2")(y)])
        return keras.Model(entry, y, name=name)(x)

    pictures = keras.Input((16, 16, 3))
    x = layers.Dense(8, name="embed")(layers.Reshape((16, 48))(pictures))
    for number in range(6):
        x = block(x, f"block{number}")
    outputs = layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x))
    keras.Model(pictures, outputs).save(path)

    words = ("plan", path, "--batch-size", 64)
    kept = document(*words)["memory"]
    found = document(*words, "--gradient-checkpointing")
    assert found["gradient_checkpointing"] is True
    assert found["memory"]["lora"]["step"] < 0.6 * kept["lora"]["step"]
    assert found["memory"]["full"] == kept["full"]  # never checkpointed
    _, errors = call("plan", path, "--gradient-checkpointing", expect=2)
    assert "without --batch-size" in errors
    without_blocks = ("plan", model_file, "--batch-size", 4, "--gradient-checkpointing")
    _, errors = call(*without_blocks, expect=1)
    assert "no layers of one class with layers inside" in errors and "Traceback" not in errors


def test_plan_of_a_model_with_a_name(call, document):
    found = document("plan", SMALL, "--classes", 5, "--rank", 4)
    assert found["total"] < tfimm_models()["resnet18"].parameters
    assert found["share"] == found["trainable"] / found["total"]
    assert found["classifier"] == found["classifier_total"] == 5 * (513 if LEGACY else 1281)
    out, _ = call("plan", SMALL, "--classes", 5, "--rank", 4)
    for layer in found["layers"]:
        assert f"{layer['path']} " in out
    assert "full fine-tuning" in out and f"{found['adapter_bytes']:,} bytes" in out
    assert "no LoRA for BatchNormalization" in out


def test_all_layers_that_are_left_out_are_listed_on_request(model_file, call):
    words = ["plan", model_file, "--targets", "fc"]
    brief, everything = (call(*words, *more)[0].splitlines() for more in ([], ["--all"]))
    left_out = [["conv", "Conv2D", "112", "not among the targets"], ["head", "Dense", "33"]]
    for cells in left_out:
        assert any(all(cell in line for cell in cells) for line in everything)
        assert not any(line.startswith(cells[0]) for line in brief)
    counted = next(line for line in brief if line.startswith("not among the targets"))
    assert counted.split()[-2:] == ["1", "112"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["resnet81"], "resnet"),
        (["applications/ResNet51"], "applications/ResNet50"),
        (["missing.keras"], "missing.keras"),
        (["FILE", "--rank", "0"], "lora_rank=0"),
        (["FILE", "--alpha", "nan"], "lora_alpha=nan"),
        (["FILE", "--targets", "fd"], "nearest first: fc"),
        (["FILE", "--targets", "("], "not a regular expression"),
        (["FILE", "--qkv", "x"], "lora_qkv='x'"),
        (["FILE", "--train-bias", "some"], "train_bias='some'"),
        (["FILE", "--optimizer", "adamm"], "expected one of adamw"),
    ],
)
def test_plan_refuses_what_cannot_be_planned(words, message, call, model_file):
    words = [str(model_file) if word == "FILE" else word for word in words]
    out, err = call("plan", *words, expect=1)
    if words[0] == "resnet81" and not LEGACY:
        message = "TF_USE_LEGACY_KERAS=1"
    assert message in err and out == ""


# -- inspect --------------------------------------------------------------------------------


def test_numbers_of_an_adapter_are_those_of_the_full_updates(saved, document):
    adapter = several(rank=3)
    found = document("inspect", saved("one", adapter))
    assert [x["layer"] for x in found["layers"]] == [
        "blocks.0.fc",
        "blocks.2.fc",
        "blocks.10.conv",
        "depthwise",
        "tokens",
    ]
    norms = []
    for x in found["layers"]:
        made = adapter.layers[x["layer"]]
        matrix = made.delta().reshape(made.shape[0], -1)
        values = np.linalg.svd(matrix, compute_uv=False)
        kept = min(3, *matrix.shape)
        # The factors are of float32.
        np.testing.assert_allclose(x["singular_values"][:kept], values[:kept], rtol=1e-6)
        np.testing.assert_allclose(x["norm"], np.linalg.norm(matrix), rtol=1e-6)
        np.testing.assert_allclose(x["largest"], values[0], rtol=1e-6)
        share = values[:kept] / values[:kept].sum()
        entropy = np.exp(-(share * np.log(share)).sum())
        np.testing.assert_allclose(x["effective_rank"], entropy, rtol=1e-5)
        held = [(values[:k] ** 2).sum() / (values**2).sum() for k in range(1, kept + 1)]
        assert x["rank_of_90_percent"] == 1 + sum(h < 0.9 for h in held)
        assert (x["shape"], x["kind"]) == (list(made.shape), made.kind)
        assert (x["rank"], x["scale"]) == (3, made.scale)
        assert x["alpha"] == pytest.approx(3 * made.scale)
        norms.append(np.linalg.norm(matrix))
    assert found["totals"]["norm"] == pytest.approx(np.linalg.norm(norms))
    assert found["totals"]["bytes"] == adapter.size
    assert (found["base_model"], found["modules"]) == ("timm/tiny", ["head"])
    assert [x["name"] for x in found["whole"]] == ["head.bias", "head.weight"]
    assert found["totals"]["whole"] == 3 + 18
    assert list(found["not_in_peft"]) == ["depthwise"]


def test_an_untrained_adapter_has_size_zero(saved, document, call, tmp_path):
    model = lora.inject_lora(functional(), lora_rank=2)
    lora.save_adapter(model, tmp_path / "zero")
    found = document("inspect", tmp_path / "zero")
    assert len(found["layers"]) == len(lora_layers(model))
    for x in found["layers"]:
        assert x["norm"] == x["largest"] == x["effective_rank"] == x["rank_of_90_percent"] == 0
    call("inspect", tmp_path / "zero", "--plot", tmp_path / "zero.png")


def test_the_table_of_an_adapter_is_complete(saved, call, tmp_path):
    names = [
        f"a.very.long.name.of.a.layer.in.a.deep.model.{i}.attention.qkv" for i in range(40)
    ]
    qkv = lora.LayerUpdate(normal(4, 6), np.kron([[1, 0], [0, 0], [0, 1]], normal(2, 2)))
    layers = {name: update(2) for name in names}
    layers["attn.qkv"] = lora.LayerUpdate(qkv.a, qkv.b, 1.0, "linear", ("qv", "qkv"))
    out, err = call("inspect", saved("many", lora.Adapter(layers)))
    assert all(name in out for name in names) and err == ""
    assert "qv of qkv" in out and "unknown" in out
    assert "PEFT format" in out and "yes" in out.splitlines()[-1]
    out, _ = call("inspect", saved("one", several()))
    assert "cannot express 1 layers" in out and "head.weight" in out and "timm/tiny" in out


def test_the_folder_of_a_run_is_as_good_as_that_of_its_adapter(saved, document, tmp_path):
    saved("run/adapter", several())
    assert document("inspect", tmp_path / "run")["totals"]["layers"] == 5


def test_plot_draws_every_layer(saved, call, tmp_path):
    from PIL import Image

    hundred = lora.Adapter({f"blocks.{i}.fc": update(1 + i % 4, seed=i) for i in range(100)})
    path = saved("many", hundred)
    _, err = call("inspect", path, "--plot", tmp_path / "new" / "many.png")
    assert "many.png" in err
    call("inspect", saved("one", several()), "--plot", tmp_path / "few.svg")
    with Image.open(tmp_path / "new" / "many.png") as picture:
        width, height = picture.size
        dark = np.asarray(picture.convert("L")) < 128
    # A line of 7 point for each: at 120 dots an inch some 12 dots high.
    assert height > 100 * 12 and width > 1000
    assert dark.any(axis=1)[height // 10 : -height // 10].mean() > 0.5
    svg = (tmp_path / "few.svg").read_text()
    assert svg.count("<!-- blocks.") == 3 and "effective rank" in svg


def test_a_plot_replaces_a_file_only_on_request_and_is_complete(
    saved, call, tmp_path, monkeypatch
):
    path, plot = saved("one", several()), tmp_path / "pictures" / "plot.png"
    plot.parent.mkdir()
    plot.write_bytes(b"mine")
    _, err = call("inspect", path, "--plot", plot, expect=1)
    assert "--overwrite" in err and contents(plot.parent) == {"plot.png": b"mine"}
    _, err = call("inspect", path, "--plot", tmp_path / "plot.gif", expect=1)
    assert ".png, .svg, .pdf" in err
    _, err = call("inspect", path, "--plot", tmp_path / "one", "--overwrite", expect=1)
    call("inspect", path, "--overwrite", expect=2)

    def fail(self, file, **kwargs):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", fail)
        _, err = call("inspect", path, "--plot", plot, "--overwrite", expect=1)
    assert "disk full" in err and contents(plot.parent) == {"plot.png": b"mine"}
    assert os.listdir(plot.parent) == ["plot.png"]
    call("inspect", path, "--plot", plot, "--overwrite")
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_adapter_is_refused(saved, call, tmp_path):
    for words in (
        ["inspect", "X"],
        ["diff", "X", "OK"],
        ["combine", "OK", "X", "--out", "OUT"],
    ):
        good = saved("good", several())
        empty, broken = tmp_path / "empty", saved("broken", several())
        empty.mkdir(exist_ok=True)
        (broken / "adapter_model.safetensors").write_bytes(b"no tensors")
        (tmp_path / "file").write_text("x")
        for bad in (tmp_path / "missing", empty, broken, tmp_path / "file"):
            names = {"X": bad, "OK": good, "OUT": tmp_path / "out"}
            out, err = call(*[names.get(word, word) for word in words], expect=1)
            assert out == "" and str(bad) in err, err
    assert not (tmp_path / "out").exists()


# -- combine --------------------------------------------------------------------------------


def test_a_combination_is_the_weighted_sum(saved, call, document, tmp_path):
    one, other = several(rank=2), several(rank=3, seed=1)
    paths = saved("one", one), saved("other", other)
    words = ["combine", *paths, "--weights", "-0.5,2", "--trained-whole", "2"]
    told = document(*words, "--out", tmp_path / "sum")
    assert told["ranks"] == [5] and told["largest_error"] < 1e-6
    made = lora.Adapter.load(tmp_path / "sum")
    for path, layer in made.layers.items():
        expected = -0.5 * one.layers[path].delta() + 2 * other.layers[path].delta()
        np.testing.assert_allclose(layer.delta(), expected, atol=1e-5)
    np.testing.assert_array_equal(made.weights["head.weight"], other.weights["head.weight"])
    assert made == lora.combine_adapters([one, other], [-0.5, 2], trained_whole=1)
    out, _ = call(*words, "--out", tmp_path / "again")
    assert "-0.5, 2" in out and str(tmp_path / "again") in out


@pytest.mark.parametrize(
    "words, arguments",
    [
        (["--method", "svd", "--rank", "2"], dict(combination_type="svd", rank=2)),
        (
            ["--method", "ties_svd", "--density", "0.5", "--majority-sign", "frequency"],
            dict(combination_type="ties_svd", density=0.5, majority_sign_method="frequency"),
        ),
        (
            ["--method", "dare_linear", "--density", "0.5", "--seed", "3"],
            dict(combination_type="dare_linear", density=0.5, seed=3),
        ),
        (["--trained-whole", "average"], dict(trained_whole="average")),
    ],
)
def test_methods_are_those_of_combine_adapters(words, arguments, saved, call, tmp_path):
    one, other = several(), several(seed=5)
    paths = saved("one", one), saved("other", other)
    if "trained_whole" not in arguments:
        words, arguments = [*words, "--trained-whole", "1"], {**arguments, "trained_whole": 0}
    _, err = call("combine", *paths, *words, "--out", tmp_path / "out")
    with pytest.warns() if "warning" in err else pytest.MonkeyPatch.context():
        expected = lora.combine_adapters([one, other], **arguments)
    assert lora.Adapter.load(tmp_path / "out") == expected
    assert "UserWarning" not in err


def test_a_loss_by_truncation_is_reported(saved, call, tmp_path):
    paths = [saved(f"{i}", lora.Adapter({"fc": update(2, seed=9 * i)})) for i in range(2)]
    words = ["combine", *paths, "--method", "svd", "--rank", "1", "--out", tmp_path / "out"]
    out, err = call(*words, "--json")
    assert err.startswith("warning: ") and "lost" in err
    error = json.loads(out)["errors"]["fc"]
    both = sum(lora.Adapter.load(path).layers["fc"].delta() for path in paths)
    values = np.linalg.svd(both, compute_uv=False)
    expected = np.linalg.norm(values[1:]) / np.linalg.norm(values)
    assert error == pytest.approx(expected, rel=1e-5)


def test_combining_replaces_a_file_only_on_request(saved, call, tmp_path):
    one, out = saved("one", several()), saved("out", several(seed=3))
    (out / "mine.txt").write_text("kept")
    before = contents(out)
    _, err = call("combine", one, one, "--out", out, expect=1)
    assert "--overwrite" in err and contents(out) == before
    call("combine", one, one, "--out", out, "--overwrite")
    assert (out / "mine.txt").read_text() == "kept"
    assert lora.Adapter.load(out).layers["tokens"].rank == 4
    (tmp_path / "empty").mkdir()
    call("combine", one, "--out", tmp_path / "empty")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--weights", "1,x"], "--weights '1,x'"),
        (["--weights", "1"], "1 weights for 2 adapters"),
        (["--weights", "1,inf"], "finite"),
        (["--method", "tie"], "did you mean"),
        (["--method", "ties"], "density"),
        (["--rank", "3"], "rank=3"),
        (["--method", "svd", "--rank", "0"], "0"),
        (["--method", "ties", "--density", "2"], "density=2.0"),
        (["--trained-whole", "3"], "1 to 2"),
        (["--trained-whole", "0"], "1 to 2"),
    ],
)
def test_combine_refuses_what_does_not_go(words, message, saved, call, tmp_path):
    paths = saved("one", several()), saved("other", several())
    _, err = call("combine", *paths, *words, "--out", tmp_path / "out", expect=1)
    assert message in err and not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_together_are_refused(saved, call, tmp_path):
    out = tmp_path / "out"
    one = saved("one", lora.Adapter({"fc": update(2)}, base_model="timm/a"))
    wide = saved("wide", lora.Adapter({"fc": update(2, out=7)}, base_model="timm/a"))
    _, err = call("combine", one, wide, "--out", out, expect=1)
    assert "(6, 5), (7, 5)" in err
    named = saved("named", lora.Adapter({"fc": update(2)}, base_model="timm/b"))
    _, err = call("combine", one, named, "--out", out, expect=1)
    assert "timm/a, timm/b" in err and not out.exists()
    call("combine", one, named, "--base-model", "timm/c", "--out", out)
    assert lora.Adapter.load(out).base_model == "timm/c"
    heads = [saved(f"head{i}", several(seed=i)) for i in range(2)]
    _, err = call("combine", *heads, "--out", tmp_path / "heads", expect=1)
    assert "fully trained weights differ" in err


# -- diff -----------------------------------------------------------------------------------


def test_distances_are_those_of_the_full_updates(saved, document):
    one, other = several(rank=2), several(rank=3, seed=4, bias="lora_only", dropout=0.1)
    found = document("diff", saved("one", one), saved("other", other))
    assert not found["identical"]
    assert found["settings"] == {"bias": ["none", "lora_only"], "dropout": [0.0, 0.1]}
    for x in found["layers"]:
        a, b = one.layers[x["layer"]].delta(), other.layers[x["layer"]].delta()
        away = np.linalg.norm(a - b) / np.linalg.norm(a)
        cosine = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        np.testing.assert_allclose([x["distance"], x["cosine"]], [away, cosine], rtol=1e-9)
        assert x["changed"] == {"rank": [2, 3]}
    head = next(x for x in found["whole"] if x["name"] == "head.weight")
    a, b = one.weights["head.weight"], other.weights["head.weight"]
    assert head["distance"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))


def test_the_same_update_in_other_factors_has_distance_zero(saved, document, call):
    made = update(2)
    turned = lora.LayerUpdate(made.a[::-1] * 2, made.b[:, ::-1], made.scale / 2)
    paths = saved("one", lora.Adapter({"fc": made})), saved("two", lora.Adapter({"fc": turned}))
    layer = document("diff", *paths)["layers"][0]
    assert layer["distance"] == 0 and layer["cosine"] == pytest.approx(1)
    assert not layer["identical"] and layer["changed"] == {"scale": [0.5, 0.25]}
    same = document("diff", paths[0], paths[0])
    assert same["identical"] and same["layers"][0]["identical"]
    assert call("diff", paths[0], paths[0])[0] == "identical: 1 layers, all values equal\n"


def test_what_only_one_adapter_has_is_listed(saved, document, call):
    common = update(2)
    zero = lora.LayerUpdate(common.a, 0 * common.b)
    one = lora.Adapter(
        {"a": common, "b": common, "z": zero}, {"head.bias": normal(3)}, ("head",)
    )
    other = lora.Adapter(
        {"b": update(2, out=7), "c": common, "z": common},
        {"head.bias": normal(4), "more.bias": normal(2)},
        ("head", "more"),
    )
    paths = saved("one", one), saved("other", other)
    found = document("diff", *paths)
    assert (found["only_in_one"], found["only_in_other"]) == (["a"], ["c"])
    assert found["settings"]["modules"] == [["head"], ["head", "more"]]
    layers = {x["layer"]: x for x in found["layers"]}
    # There is no distance between shapes, and none from nothing.
    assert layers["b"]["distance"] is None and layers["b"]["cosine"] is None
    assert layers["b"]["changed"] == {"shape": [[6, 5], [7, 5]]}
    assert layers["z"]["distance"] is None and layers["z"]["cosine"] is None
    assert [x["distance"] for x in found["whole"]] == [None, None]
    out, _ = call("diff", *paths)
    for text in (f"only in {paths[0]}: 1 layers", "shape 6x5 -> 7x5", "only in the second"):
        assert text in out


def test_two_empty_states_are_equal(saved, document):
    none = lora.LayerUpdate(normal(2, 5), np.zeros((6, 2), "float32"))
    other = lora.LayerUpdate(normal(2, 5, seed=1), none.b)
    paths = saved("one", lora.Adapter({"z": none})), saved("two", lora.Adapter({"z": other}))
    assert document("diff", *paths)["layers"][0]["distance"] == 0


def test_magnitudes_and_biases_of_branches_are_reported(tmp_path, capsys):
    plain = lora.LayerUpdate(np.ones((1, 3)), np.ones((4, 1)))
    for name, more in (
        ("plain", {}),
        ("dora", {"magnitude": np.ones(4)}),
        ("other", {"magnitude": np.full(4, 1.5)}),
    ):
        lora.Adapter({"fc": dataclasses.replace(plain, **more)}).save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in ("plain", "dora", "other")}
    assert main(["inspect", paths["dora"], "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["use_dora"] and not data["lora_bias"] and data["totals"]["factors"] == 11
    assert main(["diff", paths["plain"], paths["dora"]]) == 0
    assert "magnitude only in the second" in capsys.readouterr().out
    assert main(["diff", paths["dora"], paths["other"]]) == 0
    assert "magnitude by 0.5000" in capsys.readouterr().out
