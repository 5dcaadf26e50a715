"""From a folder of pictures to a run: the recipe, its folder, and ``tfimm-lora finetune``."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.helpers.kerases import LEGACY, array, keras, values
from tests.helpers.picture_folders import break_picture, write_digits, write_split
from tests.helpers.recipes import (
    adapter_values,
    arguments,
    assert_same_run,
    make_folder,
    recipe,
    save_model,
)
from tfimm_lora.backend import backend_of
from tfimm_lora.cli import main
from tfimm_lora.cli.parsing import parse_lora_fields
from tfimm_lora.finetuning import recipe as recipe_module
from tfimm_lora.finetuning.base.of_applications import applications
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.checkpoint import TrainingCheckpoints
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.run import Run, one_writer, read_yaml

#: The same on both Kerases; test_runs.py has whole runs on both.
pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small saved model, and pictures."""
    return make_folder(tmp_path_factory.mktemp("data"))


def test_a_run_can_be_opened_and_gives_the_model_of_its_best_epoch(folder, tmp_path):
    run = finetune_pictures(recipe(folder), tmp_path / "run", verbose="none")
    again = Run.open(tmp_path / "run")
    assert again.config == run.config and again.labels == ["0", "1", "2"]
    assert again.facts["trained_on"] == {"0": 10, "1": 10, "2": 10}
    losses = [numbers["val_loss"] for numbers in again.history]
    assert again.facts["best_epoch"] == int(np.argmin(losses)) + 1
    model, total, count = again.model(), 0.0, 0
    for x, y in PictureBatches(again.split.val, again.preprocessing, 4).in_order():
        logits = array(model(x, training=False)).astype("float64")
        normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= normalised[np.arange(len(y)), np.asarray(y)].sum()
        count += len(y)
    np.testing.assert_allclose(total / count, min(losses), rtol=1e-4)


def save_model_of_blocks(path):
    keras.utils.set_random_seed(3)
    layers = keras.layers

    def block(name, x):
        entry = keras.Input(x.shape[1:])
        y = layers.Dense(12, activation="gelu", name="fc1")(entry)
        y = layers.Dense(8, name="fc2")(layers.Dropout(0.3, name="drop")(y))
        return keras.Model(entry, layers.add([entry, y]), name=name)(x)

    pictures = keras.Input((16, 16, 3))
    x = layers.Reshape((16, 48))(pictures)
    x = block("block1", block("block0", layers.Dense(8, name="embed")(x)))
    x = layers.GlobalAveragePooling1D()(x)
    keras.Model(pictures, layers.Dense(7, name="head")(x)).save(path)


@pytest.mark.long
def test_gradient_checkpointing_trains_the_same(folder, tmp_path, capsys, monkeypatch):
    save_model_of_blocks(tmp_path / "blocks.keras")
    used, models = [], []

    def noted(model, *args, **options):
        used.append(
            [name for name in ("block0", "block1") if "call" in vars(layer(model, name))]
        )
        models.append(model)
        return train(model, *args, **options)

    def layer(model, name):
        return next(x for _, x in backend_of(model).walk(model) if x.name == name)

    train = recipe_module.finetune
    monkeypatch.setattr(recipe_module, "finetune", noted)
    words = ("--model", str(tmp_path / "blocks.keras"), "--epochs", "2")
    assert main(arguments(folder, tmp_path / "plain", *words)) == 0
    again = (*words, "--gradient-checkpointing")
    assert main(arguments(folder, tmp_path / "less", *again)) == 0
    assert used == [[], ["block0", "block1"]]
    one, two = adapter_values(tmp_path / "plain"), adapter_values(tmp_path / "less")
    for name, value in one.items():
        if not LEGACY:  # where dropout draws other numbers
            np.testing.assert_allclose(two[name], value, rtol=1e-3, atol=1e-4)
    assert not any("call" in vars(layer(model, "block0")) for model in models)
    # More epochs of the run use it, too.
    more = ("finetune", "--out", str(tmp_path / "less"), "--resume", "--epochs", "3")
    assert main(more) == 0
    assert used[2] == ["block0", "block1"]
    # A model without blocks is refused before anything is written.
    out = tmp_path / "refused"
    assert main(arguments(folder, out, "--gradient-checkpointing")) == 1
    assert "has no layers of one class with layers inside" in capsys.readouterr().err
    assert not out.exists()


def test_all_settings_of_a_recipe_reach_the_training(folder, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def reached(model, train, validation, **options):
        raise Reached(train, options)

    monkeypatch.setattr(recipe_module, "finetune", reached)
    settings = {
        "epochs": 4,
        "learning_rate": 0.03,
        "weight_decay": 0.2,
        "warmup": 0.3,
        "clip_norm": 0.4,
        "accumulate": 2,
        "monitor": "val_accuracy",
        "patience": 3,
        "seed": 7,
    }
    data = write_digits(tmp_path / "digits", labels=range(3), each=5, size=16)
    for path in sorted((data / "2").iterdir())[2:]:
        path.unlink()  # classes of 4, 4 and 1 training pictures
    asked = recipe(folder, data=str(data), balanced=True, batch_size=4, **settings)
    with pytest.raises(Reached) as found:
        finetune_pictures(asked, tmp_path / "run")
    train, options = found.value.args
    assert {name: options[name] for name in settings} == settings
    assert options["class_weight"] == pytest.approx({0: 0.75, 1: 0.75, 2: 3.0})
    assert (train.batch_size, train.seed) == (4, 7)


def test_every_picture_of_the_split_is_written_down(folder, tmp_path):
    bad = folder / "digits" / "1" / "broken.png"
    bad.write_bytes((folder / "digits" / "1" / "0.png").read_bytes())
    break_picture(bad)
    try:
        with pytest.raises(ValueError, match=r"broken\.png"):
            finetune_pictures(recipe(folder, on_error="refuse"), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        said = []
        run = finetune_pictures(
            recipe(folder, epochs=1), tmp_path / "run", verbose="none", say=said.append
        )
    finally:
        bad.unlink()
    assert any("broken.png" in line for line in said)
    assert [Path(path).name for path, _ in run.skipped] == ["broken.png"]
    rows = list(csv.DictReader((run.path / "split.csv").read_text().splitlines()))
    assert len(rows) == 36 and {row["split"] for row in rows} == {"train", "val"}
    for row in rows:
        assert Path(row["path"]).parent.name == row["label"]


@pytest.mark.long
def test_the_same_recipe_gives_the_same_weights_and_another_seed_others(folder, tmp_path):
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        keras.utils.set_random_seed(hash(name) % 1000)
        finetune_pictures(recipe(folder, seed=seed, epochs=1), tmp_path / name, verbose="none")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    one, three = adapter_values(tmp_path / "one"), adapter_values(tmp_path / "three")
    assert any(not np.array_equal(one[key], three[key]) for key in one)


@pytest.mark.long
def test_a_finished_run_is_trained_on_for_more_epochs(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*arguments(folder, out), "--patience", "9"]) == 0
    before = Run.open(out)
    first = [row["loss"] for row in before.history]
    capsys.readouterr()
    assert main(["finetune", "--out", str(out), "--resume", "--epochs", "5"]) == 0
    said = capsys.readouterr().err
    assert f"resuming the run in {out} after epoch 3 of 5 instead of 3" in said
    run = Run.open(out)
    assert len(run.history) == 5 and run.recipe["epochs"] == 5
    assert [row["loss"] for row in run.history][:3] == first
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    assert "has all 5 epochs already" in capsys.readouterr().err
    assert main(["finetune", "--out", str(out), "--resume", "--epochs", "2"]) == 1
    assert "expected at least 5" in capsys.readouterr().err
    assert len(Run.open(out).history) == 5


def test_a_run_has_one_writer(folder, tmp_path):
    out = tmp_path / "run"
    with one_writer(out), pytest.raises(RuntimeError, match="another process is writing"):
        finetune_pictures(recipe(folder), out)
    assert not out.exists()
    with pytest.raises(ValueError, match="normalisation='no'"):
        finetune_pictures(recipe(folder, normalisation="no"), out)
    assert not out.exists()


def test_an_interruption_says_how_to_resume(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a run"

    def interrupt(epoch, logs=None):
        if epoch == 2:
            interrupted()

    callback = keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)
    monkeypatch.setattr(recipe_module, "tensorboard", lambda model, path: [callback])
    assert main(arguments(folder, out)) == 130
    said = capsys.readouterr().err
    assert f"after epoch 2; resume with: tfimm-lora finetune --out '{out}' --resume" in said
    assert "softmax or sigmoid at the end of the model is left out in training" in said
    monkeypatch.undo()
    assert main(["finetune", "--out", str(out), "--resume"]) == 0
    assert len(Run.open(out).history) == 3
    monkeypatch.setattr(recipe_module, "check_data", lambda *a, **k: interrupted())
    assert main(arguments(folder, tmp_path / "new")) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.long
def test_test_pictures_are_reported_apart_and_never_choose_the_epoch(folder, tmp_path, capsys):
    data = write_split(tmp_path / "digits", labels=range(3), each=10, size=16)
    write_digits(data / "test", labels=range(3), each=4, size=16, first=30)
    words = [str(data) if word == str(folder / "digits") else word for word in
             arguments(folder, tmp_path / "run", "--json")]  # fmt: skip
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    run = Run.open(tmp_path / "run")
    assert printed["test"]["pictures"] == 12 and run.facts["tested_on"] == dict.fromkeys(
        "012", 4
    )
    split = run.split
    logits = run.model().predict(
        np.concatenate(
            [x for x, _ in PictureBatches(split.test, run.preprocessing, 4).in_order()]
        ),
        verbose=0,
    )
    right = np.mean(logits.argmax(-1) == [p.label for p in split.test.pictures])
    assert printed["test"]["accuracy"] == pytest.approx(right)
    assert "12 test pictures" in (run.path / "report.html").read_text()
    # With other test pictures, everything else is the same.
    write_digits(data / "test", labels=range(3), each=2, size=16, first=50)
    words[words.index(str(tmp_path / "run"))] = str(tmp_path / "again")
    assert main(words) == 0
    again = Run.open(tmp_path / "again")
    assert again.history == run.history and again.facts["best_epoch"] == run.facts["best_epoch"]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(lora_init="eva", lora_freeze_a=True), marks=pytest.mark.nightly),
        pytest.param(
            dict(lora_init="pissa_niter_2", lora_use_dora=True), marks=pytest.mark.nightly
        ),
        pytest.param(
            dict(lora_bias=True, lora_targets=["conv", "fc"]), marks=pytest.mark.nightly
        ),
    ],
    ids=["eva", "pissa_dora", "bias"],
)
def test_variants_are_trained_resumed_and_opened(options, folder, tmp_path, monkeypatch):
    """Stopped after its first epoch, by an error, and gone on with: the very run."""
    asked = recipe(folder, epochs=2, lora={"lora_rank": 2, **options})
    run = finetune_pictures(asked, tmp_path / "whole", verbose="none")
    saved = TrainingCheckpoints.save

    def stop(self, progress, values):
        saved(self, progress, values)
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingCheckpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        finetune_pictures(asked, tmp_path / "run", verbose="none")
    monkeypatch.undo()
    keras.utils.set_random_seed(99)
    again = finetune_pictures(asked, tmp_path / "run", resume=True, verbose="none")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    one, two = run.model(), again.model()
    for a, b in zip(one.weights, two.weights):
        np.testing.assert_array_equal(array(a), array(b))
    layer = one.get_layer("fc")
    assert layer.lora.use_dora == bool(options.get("lora_use_dora"))
    start = open_base_model(str(folder / "model.keras"), classes=3, normalisation="unit").model
    kernel = layer.lora_values()["kernel"]
    np.testing.assert_array_equal(kernel, array(start.get_layer("fc").kernel))


def test_a_start_from_data_is_for_one_device(folder):
    with pytest.raises(ValueError, match="strategy='none'"):
        recipe(folder, lora={"lora_init": "eva"}, strategy="mirrored")


def test_what_the_folder_of_a_run_may_hold(folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a finetune run"):
        finetune_pictures(recipe(folder), tmp_path / "other", resume=True)
    finetune_pictures(recipe(folder, epochs=1), tmp_path / "run", verbose="none")
    with pytest.raises(FileExistsError, match="--resume"):
        finetune_pictures(recipe(folder, epochs=1), tmp_path / "run")
    with pytest.raises(ValueError, match="seed=0, now 2"):
        finetune_pictures(recipe(folder, epochs=1, seed=2), tmp_path / "run", resume=True)
    save_model(folder / "other.keras")
    run = Run.open(tmp_path / "run")
    run.recipe["model"] = str(folder / "other.keras")
    save_model(folder / "other.keras", classes=5)
    with pytest.raises(ValueError, match="has changed"):
        run.model()
    with pytest.raises(FileNotFoundError, match="not a finetune run"):
        Run.open(tmp_path / "other")


@pytest.mark.long
def test_weights_that_nobody_could_make_again_are_kept_in_the_run(folder, tmp_path):
    """A model that begins at random: the run has what the adapter is relative to."""
    options = {"model": "MobileNetV2", "normalisation": None, "epochs": 1}
    options["pretrained"] = False
    options["lora"] = {"lora_rank": 1, "lora_targets": ["Conv_1"]}
    asked = recipe(folder, input_size=[32, 32], **options)
    run = finetune_pictures(asked, tmp_path / "run", verbose="none")
    assert (run.path / "base.weights.h5").is_file()
    keras.utils.set_random_seed(77)
    model, again = run.model(), run.model()
    for a, b in zip(values(model.weights), values(again.weights)):
        np.testing.assert_array_equal(a, b)
    assert model.output_shape == (None, 3)


@pytest.mark.parametrize(
    "more, said",
    [
        (["--model", "no_such_model"], "no_such_model"),
        (["--model", "applications/MobileNetV9"], "applications/MobileNetV2"),
        (["--model", "no/such.keras"], "does not exist"),
        (["--data", "no/such/folder"], "no/such/folder"),
        (["--weights", "no.safetensors"], "no.safetensors"),
        (["--rank", "0"], "lora_rank=0"),
        (["--lora", "rnak=3"], "rank"),
        (["--lora", "rank"], "NAME=VALUE"),
        (["--targets", "nothing_like_it"], "nothing_like_it"),
        (["--epochs", "0"], "epochs=0"),
        (["--lr", "0"], "learning_rate"),
        (["--augmentation", "heavy"], "heavy"),
        (["--input-size", "big"], "224"),
        (["--normalisation", "mine"], "imagenet"),
        (["--mixed-precision", "float8"], "float8"),
        (["--validation", "1.5"], "validation"),
    ],
)
def test_wrong_arguments_are_refused_and_write_nothing(folder, tmp_path, capsys, more, said):
    assert main(arguments(folder, tmp_path / "run", *more)) == 1
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not captured.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting, said",
    [
        ("epochs: '3'", "epochs='3'; expected an integer"),
        ("learning_rate: '1e-3'", "learning_rate='1e-3'; expected a number"),
        ("epochs: 0", "epochs=0; expected an integer"),
        ("epoch: 3", "did you mean epochs?"),
        ("lora: {lora_rnak: 2}", "did you mean lora_rank?"),
        ("input_size: 96", "input_size=96; expected a height and a width"),
        ("input_size: [96, 0]", "input_size=0; expected an integer of at least 1"),
    ],
)
def test_wrong_settings_in_a_config_are_named(setting, said, folder, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {folder / 'model.keras'}\ndata: {folder / 'digits'}\n{setting}\n"
    )
    assert main(["finetune", "--config", str(config), "--out", str(tmp_path / "run")]) == 1
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err and not captured.out
    assert not (tmp_path / "run").exists()


def test_numbers_without_a_point_are_numbers_in_yaml(tmp_path):
    """PyYAML, which follows YAML 1.1, takes 1e-3 for a string."""
    config = tmp_path / "config.yaml"
    config.write_text("a: 1e-3\nb: [-2E5, 1e3x, '1e3', 1.5e-3, 12]\n1e1: 3\n")
    read = {"a": 0.001, "b": [-2e5, "1e3x", "1e3", 0.0015, 12], 10.0: 3}
    assert read_yaml(config) == read
    assert parse_lora_fields(["alpha=1e1", "dropout=0.1"]) == {"alpha": 10.0, "dropout": 0.1}


def test_usage_errors_are_those_of_a_shell(tmp_path, capsys):
    assert main(["finetune"]) == 2
    assert main(["finetune", "--out", str(tmp_path), "--epochs", "many"]) == 2
    assert main(["finetune", "--help"]) == 0
    assert "--resume" in capsys.readouterr().out
    assert main(["finetune", "--out", str(tmp_path / "run")]) == 1
    assert "model and data" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "DenseNet121", "EfficientNetB0"])
def test_preprocessing_of_applications_is_their_own(name):
    """Against ``preprocess_input``: scaled, centred with channels turned, standardised, raw."""
    base = open_base_model(f"applications/{name}", classes=2, input_size=(32, 32))
    prepare = sys.modules[applications()[name].__module__].preprocess_input
    x = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3)).astype("float32")
    got = base.preprocessing.function()(x)
    np.testing.assert_allclose(np.asarray(got), prepare(x.copy()), rtol=1e-5, atol=1e-3)
    assert base.model.output_shape == (None, 2)


def test_weights_of_an_application_are_kept_for_another_number_of_classes(tmp_path):
    create = applications()["MobileNetV2"]
    source = create(weights=None, alpha=1.0)
    source.save_weights(tmp_path / "w.weights.h5")
    base = open_base_model(
        "applications/MobileNetV2",
        classes=4,
        weights=tmp_path / "w.weights.h5",
        input_size=(64, 64),
    )
    x = np.random.default_rng(0).normal(size=(1, 64, 64, 3)).astype("float32")
    features = keras.Model(base.model.inputs, base.model.layers[-2].output)
    for mine, theirs in zip(features.weights, source.weights):
        np.testing.assert_array_equal(array(mine), array(theirs))
    assert base.new_classifier and array(base.model(x)).shape == (1, 4)


def test_a_model_from_a_file_gives_logits(tmp_path):
    saved = save_model(tmp_path / "m.keras")
    x = np.random.default_rng(0).uniform(size=(2, 16, 16, 3)).astype("float32")
    base = open_base_model(tmp_path / "m.keras", normalisation="unit")
    logits = array(base.model(x)).astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(array(saved(x)), expected, rtol=1e-5)
    assert not base.new_classifier
    with pytest.raises(ValueError, match="normalisation"):
        open_base_model(tmp_path / "m.keras")
    headless = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(2, 3)])
    headless.save(tmp_path / "headless.keras")
    with pytest.raises(ValueError, match="classifier"):
        open_base_model(tmp_path / "headless.keras", normalisation="unit")
    base = open_base_model(tmp_path / "headless.keras", normalisation="unit", classes=2)
    assert base.new_classifier and base.model.output_shape == (None, 2)


@pytest.mark.long
def test_config_yaml_is_plain(folder, tmp_path):
    run = finetune_pictures(recipe(folder, epochs=1), tmp_path / "run", verbose="none")
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == run.config


def test_file_names_that_are_no_text_are_kept_as_they_are(folder, tmp_path):
    """A name of bytes that are no UTF-8, as old archives hold them."""
    odd = os.fsencode(tmp_path / "digits" / "1") + b"/\xff.png"
    write_digits(tmp_path / "digits", labels=range(2), each=6, size=16)
    os.rename(tmp_path / "digits" / "1" / "0.png", odd)
    asked = recipe(folder, data=str(tmp_path / "digits"), epochs=1)
    run = finetune_pictures(asked, tmp_path / "run", verbose="none")
    split = run.split
    paths = [os.fsencode(p.path) for p in split.train.pictures + split.val.pictures]
    assert odd in paths


@pytest.mark.long
def test_warnings_reach_the_command_line_as_notes(folder, tmp_path, capsys):
    write_digits(tmp_path / "digits", labels=range(2), each=6, size=16)
    (tmp_path / "digits" / "0" / "notes.txt").write_text("no picture")
    data = ["--data", str(tmp_path / "digits"), "--epochs", "1"]
    assert main(arguments(folder, tmp_path / "run", *data)) == 0
    said = capsys.readouterr().err
    assert "warning: " in said and "ignored 1 file" in said and ".py:" not in said
