"""``tfimm-lora export`` and ``merge``: from a run or a saved model to files elsewhere."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import softmax

import tfimm_lora as lora
from tests.helpers.finished_run import SIDE, finished_run
from tests.helpers.kerases import BACKEND, LEGACY, keras, normal, randomise, run
from tests.helpers.selection import NIGHTLY_ON_LEGACY
from tfimm_lora.cli import export as export_module
from tfimm_lora.finetuning.data.pictures import read_picture
from tfimm_lora.finetuning.run import Run
from tfimm_lora.model.merge import has_lora

pytestmark = [
    pytest.mark.skipif(BACKEND != "tensorflow", reason="fine-tuning is tf.data's"),
    *NIGHTLY_ON_LEGACY,
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, and the folder in which its pictures are."""
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def of_softmax(tmp_path_factory):
    """A run whose base model ended in a softmax."""
    return finished_run(tmp_path_factory.mktemp("softmax"), "softmax")


def ordinary(end=None):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, activation="relu", name="fc"),
            keras.layers.Dense(3, end, name="head"),
        ]
    )


def predict_onnx(path, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def test_a_run_becomes_an_onnx_file_that_takes_pictures(finished, tmp_path, call):
    path = tmp_path / "digits.onnx"
    out, _ = call("export", finished.path, "--out", path, "--include-preprocessing", "--json")
    told = json.loads(out)
    assert told["path"] == str(path) and told["format"] == "onnx" and told["difference"] < 1e-4
    assert told["inputs"] == [
        {"name": "pictures", "shape": [None, SIDE, SIDE, 3], "dtype": "float32"}
    ]
    beside = json.loads((tmp_path / "digits.onnx.json").read_text(encoding="utf-8"))
    assert beside["labels"] == finished.labels and beside["preprocessing_included"] is True
    chosen = finished.split.val.pictures[:3]
    pictures = np.stack([read_picture(picture.path) for picture in chosen]).astype("float32")
    expected = run(finished.model(), pictures / 255)  # the run was normalised to "unit"
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(predict_onnx(path, pictures), expected, atol=bound)


def test_a_merged_run_is_an_ordinary_model_that_can_be_exported_on(finished, tmp_path, call):
    path = tmp_path / "merged.keras"
    out, err = call("merge", finished.path, "--out", path)
    assert str(path) in out and ("tf_keras" if LEGACY else "keras") in err
    model = keras.models.load_model(path)
    assert not has_lora(model)
    x = normal(2, SIDE, SIDE, 3)
    np.testing.assert_allclose(run(model, x), run(finished.model(), x), atol=1e-4)
    # Labels and preprocessing come from the description beside it.
    call("export", path, "--out", tmp_path / "m.onnx", "--include-preprocessing")
    beside = json.loads((tmp_path / "m.onnx.json").read_text(encoding="utf-8"))
    assert beside["labels"] == finished.labels
    pictures = 255 * np.abs(x)
    expected = run(model, pictures / 255)
    np.testing.assert_allclose(predict_onnx(tmp_path / "m.onnx", pictures), expected, atol=1e-3)
    out, err = call("merge", path, "--out", tmp_path / "again.keras", expect=1)
    assert "expected a LoRA model. Pass --adapter" in err and not out


@pytest.mark.parametrize("as_pictures", [False, True])
def test_int8_is_calibrated_with_pictures_of_a_folder(finished, tmp_path, call, as_pictures):
    import tensorflow as tf

    path = tmp_path / "digits.tflite"
    more = ["--include-preprocessing"] if as_pictures else []
    folder = finished.path.parent / "pictures"
    command = ["export", finished.path, "--out", path, "--quantize", "int8", *more]
    out, err = call(*command, "--samples", folder)
    assert "skipped: Cannot read" in err and "samples: 23 of 24" in err
    assert "same top class" in out
    predict = tf.lite.Interpreter(str(path)).get_signature_runner()
    assert list(predict.get_input_details()) == ["pictures" if as_pictures else "inputs"]
    command[3] = tmp_path / "other.tflite"
    assert "without samples" in call(*command, expect=1)[1]


def test_samples_are_what_the_file_takes(finished):
    folder = finished.path.parent / "pictures"
    normalised = export_module.sample_pictures(folder, finished.preprocessing, False)
    pictures = export_module.sample_pictures(folder, finished.preprocessing, True)
    assert normalised.shape == pictures.shape == (23, SIDE, SIDE, 3)
    assert normalised.max() <= 1 < pictures.max() <= 255
    np.testing.assert_allclose(pictures, 255 * normalised, atol=0.01)


def test_an_adapter_is_merged_into_a_base_model(tmp_path, call):
    base = ordinary()
    base.save(tmp_path / "base.keras")
    model = lora.inject_lora(base, lora_rank=2)
    randomise(model)
    lora.save_adapter(model, tmp_path / "adapter")
    path = tmp_path / "out.keras"
    call("merge", tmp_path / "base.keras", "--adapter", tmp_path / "adapter", "--out", path)
    x = normal(4, 6)
    loaded = keras.models.load_model(path)
    np.testing.assert_allclose(run(loaded, x), run(model, x), atol=1e-5)
    assert [type(x).__name__ for x in loaded.layers] == ["Dense", "Dense"]


def test_a_lora_model_in_a_file_is_merged(tmp_path, call):
    model = lora.inject_lora(ordinary(), lora_rank=2)
    randomise(model)
    model.save(tmp_path / "lora.keras")
    call("merge", tmp_path / "lora.keras", "--out", tmp_path / "m.keras")
    x = normal(4, 6)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(run(loaded, x), run(model, x), atol=1e-5)
    err = call("merge", tmp_path / "lora.keras", "--out", tmp_path / "m.keras", expect=1)[1]
    assert "--overwrite" in err


@pytest.mark.skipif(not LEGACY, reason="Keras 3 loads no folders")
def test_a_savedmodel_of_keras_is_opened_and_one_without_is_refused(tmp_path, call):
    ordinary().save(str(tmp_path / "of_keras"))
    call("export", tmp_path / "of_keras", "--out", tmp_path / "m", "--format", "savedmodel")
    err = call("export", tmp_path / "m", "--out", tmp_path / "m.onnx", expect=1)[1]
    assert "a SavedModel without a Keras model" in err


@pytest.mark.parametrize(
    "source, words",
    [
        ("nothing", "does not exist; expected the folder of a finetune run"),
        ("empty", "expected the folder of a finetune run (with config.yaml) or a saved Keras"),
        ("text.keras", "If the other Keras wrote it, set TF_USE_LEGACY_KERAS="),
    ],
)
@pytest.mark.parametrize("command", ["export", "merge"])
def test_unreadable_files_are_explained(tmp_path, call, command, source, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.keras").write_text("no model")
    out, err = call(command, tmp_path / source, "--out", tmp_path / "m.keras", expect=1)
    assert words in err and err.startswith("error: ") and not out
    assert not (tmp_path / "m.keras").exists()


def test_samples_without_preprocessing_are_refused(tmp_path, call):
    ordinary().save(tmp_path / "m.keras")
    command = ["export", tmp_path / "m.keras", "--out", tmp_path / "m.tflite"]
    err = call(*command, "--quantize", "int8", "--samples", tmp_path, expect=1)[1]
    assert "whose preprocessing is unknown" in err


def test_help_ends_with_examples(call):
    for command in ("export", "merge"):
        out, _ = call(command, "--help")
        assert f"tfimm-lora {command} runs/flowers --out" in out.split("Examples")[1]


# -- logits and probabilities ---------------------------------------------------------------


def test_a_merged_softmax_model_returns_probabilities_as_before(of_softmax, tmp_path, call):
    path = tmp_path / "m.keras"
    out, _ = call("merge", of_softmax.path, "--out", path)
    assert "returns" in out and "probabilities" in out
    x = normal(4, SIDE, SIDE, 3)
    logits = run(of_softmax.model(), x).astype("float64")
    expected = softmax(logits, axis=1)
    model = keras.models.load_model(path)
    np.testing.assert_allclose(run(model, x), expected, atol=1e-6)
    base = keras.models.load_model(of_softmax.recipe["model"])
    assert [type(x) for x in model.layers[-4:]] == [type(x) for x in base.layers[-4:]]
    call("export", of_softmax.path, "--out", tmp_path / "m.onnx")  # the same default
    np.testing.assert_allclose(predict_onnx(tmp_path / "m.onnx", x), expected, atol=1e-6)
    out, _ = call("merge", of_softmax.path, "--logits", "--out", tmp_path / "l.keras", "--json")
    assert json.loads(out)["returns"] == "logits"
    found = run(keras.models.load_model(tmp_path / "l.keras"), x)
    np.testing.assert_allclose(found, logits, atol=1e-5)
    beside = json.loads((tmp_path / "l.keras.json").read_text(encoding="utf-8"))
    assert beside["returns"] == "logits"


def test_a_run_returns_logits_or_on_request_probabilities(finished, tmp_path, call):
    out, _ = call("export", finished.path, "--out", tmp_path / "l.onnx", "--json")
    assert json.loads(out)["returns"] == "logits"
    out, _ = call("export", finished.path, "--out", tmp_path / "p.onnx", "--probabilities")
    assert "probabilities" in next(x for x in out.splitlines() if x.startswith("returns"))
    x = normal(4, SIDE, SIDE, 3)
    logits = run(finished.model(), x).astype("float64")
    np.testing.assert_allclose(predict_onnx(tmp_path / "l.onnx", x), logits, atol=1e-5)
    found = predict_onnx(tmp_path / "p.onnx", x)
    np.testing.assert_allclose(found, softmax(logits, axis=1), atol=1e-6)


def test_a_lora_model_in_a_file_keeps_its_softmax(tmp_path, call):
    model = lora.inject_lora(ordinary("softmax"), lora_rank=2)
    randomise(model)
    model.save(tmp_path / "lora.keras")
    out, _ = call("merge", tmp_path / "lora.keras", "--out", tmp_path / "m.keras", "--json")
    assert json.loads(out)["returns"] == "probabilities"
    x = normal(4, 6)
    loaded = keras.models.load_model(tmp_path / "m.keras")
    np.testing.assert_allclose(run(loaded, x), run(model, x), atol=1e-6)


def test_the_console_says_how_to_open_a_keras_file(finished, tmp_path, call):
    out, err = call("merge", finished.path, "--out", tmp_path / "m.keras", "--json")
    opening = json.loads(out)["open_with"]
    beside = json.loads((tmp_path / "m.keras.json").read_text(encoding="utf-8"))
    assert beside["open_with"] == opening
    name = "tf-keras" if LEGACY else "keras"
    assert f"install {name} {keras.__version__}" in err
    assert ("TF_USE_LEGACY_KERAS=1" in err) == LEGACY
    assert "    model = " in err and "load_model('m.keras', compile=False)" in err
    assert "install" not in call("export", finished.path, "--out", tmp_path / "m.onnx")[1]


def test_an_unfinished_run_is_named(finished, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(finished.path, folder)
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    assert "  epochs: 2\n" in config
    changed = config.replace("  epochs: 2\n", "  epochs: 5\n")
    (folder / "config.yaml").write_text(changed, encoding="utf-8")
    _, err = call("export", folder, "--out", tmp_path / "m.onnx")
    assert f"warning: the run in {folder} is unfinished: 2 of 5 epochs are complete" in err
    assert f"tfimm-lora finetune --out {folder} --resume" in err


@pytest.mark.long
def test_json_is_all_that_stdout_holds(tmp_path):
    """Converters print from C, too, which nothing in Python catches."""
    ordinary().save(tmp_path / "m.keras")
    for name in ("m.tflite", "m.onnx", "m"):
        command = [sys.executable, "-m", "tfimm_lora", "export", "m.keras", "--out", name]
        done = subprocess.run(
            [*command, "--json"],
            cwd=tmp_path,
            env={**os.environ, "TF_USE_LEGACY_KERAS": str(int(LEGACY))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert json.loads(done.stdout)["source"] == "m.keras"


def copied_run(finished, path, change=None, **facts):
    """A copy of a run with another adapter, or with other facts."""
    shutil.copytree(finished.path, path)
    copy = Run.open(path)
    copy.add_facts(**facts)
    if change is not None:
        adapter = lora.Adapter.load(copy.adapter)
        layers = {
            module: lora.LayerUpdate(x.a, x.b + change, x.scale, x.kind)
            for module, x in adapter.layers.items()
        }
        lora.Adapter(layers, adapter.weights, adapter.modules).save(copy.adapter)
    return copy


def test_several_runs_become_one_file(finished, tmp_path, call):
    import tensorflow as tf

    runs = [copied_run(finished, tmp_path / name, c) for name, c in (("a", 0.2), ("b", -0.3))]
    paths = [run_of.path for run_of in runs]
    out, _ = call(
        "export", *paths, "--format", "savedmodel", "--out", tmp_path / "both", "--json"
    )
    assert json.loads(out)["source"] == list(map(str, paths))
    serve = tf.saved_model.load(str(tmp_path / "both")).signatures["serving_default"]
    x = normal(2, SIDE, SIDE, 3)
    found = serve(inputs=x, adapter=tf.constant(["a", "b"]))["outputs"].numpy()
    for row, output, run_of in zip(x, found, runs):
        np.testing.assert_allclose(output, run(run_of.model(), row[None])[0], atol=1e-5)
    described = json.loads((tmp_path / "both.json").read_text())
    assert described["adapters"]["b"]["labels"] == finished.labels
    assert described["preprocessing"]["mean"] == list(finished.preprocessing.mean)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--quantize", "int8"], "--quantize with several runs"),
        (["--probabilities"], "--probabilities or --logits with several runs"),
        ([], "runs of another base model"),
    ],
)
def test_runs_that_cannot_be_in_one_file(finished, tmp_path, call, options, message):
    other = copied_run(finished, tmp_path / "other", base_sha256="0" * 64)
    out = tmp_path / "both.onnx"
    _, err = call("export", finished.path, other.path, "--out", out, *options, expect=1)
    assert message in err and not out.exists()
