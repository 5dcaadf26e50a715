"""Where the base weights come from: what is loaded, what is said, and how it is found again."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import yaml

import tfimm_lora as lora
from tests.helpers.kerases import LEGACY, array, keras, values
from tests.helpers.picture_folders import write_digits
from tfimm_lora.cli import main
from tfimm_lora.finetuning import recipe as recipe_module
from tfimm_lora.finetuning.base import of_applications
from tfimm_lora.finetuning.base.origin import weights_digest
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
from tfimm_lora.finetuning.run import Run

NAME = "MobileNetV2"


def small_application(
    weights=None, classifier_activation="softmax", classes=1000, input_shape=None
):
    """A small model with the arguments of Keras Applications."""
    layers = keras.layers
    side = (input_shape or (32, 32, 3))[0]
    model = keras.Sequential(
        [
            keras.Input((side, side, 3)),
            layers.Conv2D(4, 3, strides=4, name="Conv_1"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(classes, activation=classifier_activation, name="predictions"),
        ]
    )
    if weights is not None:
        model.load_weights(download() if weights == "imagenet" else weights)
    return model


def preprocess_input(x):
    """As Keras Applications have beside each model."""
    return x / 127.5 - 1


def download():
    """Replaced by tests."""
    raise NotImplementedError


@pytest.fixture(autouse=True)
def small_applications(monkeypatch):
    monkeypatch.setattr(of_applications, "applications", lambda: {NAME: small_application})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, a small saved model, and weights for the small application."""
    root = tmp_path_factory.mktemp("data")
    write_digits(root / "digits", labels=range(3), each=6, size=32)
    keras.utils.set_random_seed(1)
    layers = keras.layers
    keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Conv2D(4, 3, strides=4, name="conv"),
            layers.Flatten(name="flatten"),
            layers.Dense(3, name="head"),
        ]
    ).save(root / "model.keras")
    small_application().save_weights(root / "published.weights.h5")
    return root


@pytest.fixture
def published(folder, tmp_path, monkeypatch):
    """The file that is "downloaded"."""
    file = tmp_path / "published.weights.h5"
    shutil.copy(folder / "published.weights.h5", file)
    monkeypatch.setattr(sys.modules[__name__], "download", lambda: str(file))
    return file


def arguments(folder, out, *more, model=NAME):
    size = ["--input-size", "32"] if model == NAME else ["--normalisation", "unit"]
    targets = "Conv_1" if model == NAME else "conv"
    return [
        *("finetune", "--model", model, "--data", str(folder / "digits"), *size),
        *("--epochs", "1", "--batch-size", "8", "--rank", "1", "--targets", targets),
        *("--augmentation", "none", "--out", str(out), *more),
    ]


def base_in_adapter(run):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    return config["base_model_name_or_path"]


def test_a_named_model_starts_with_its_pretrained_weights(folder, published, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(folder, out)) == 0
    assert "pretrained weights of ImageNet" in capsys.readouterr().err
    run = Run.open(out)
    assert run.recipe["model"] == "applications/MobileNetV2" and run.recipe["pretrained"]
    assert "pretrained weights of ImageNet" in (out / "report.html").read_text()
    assert base_in_adapter(out) == "keras.applications.MobileNetV2"
    # It is not an id of the hub, so it is in the text of the card only.
    assert "base_model:" not in (out / "adapter" / "README.md").read_text()
    assert not (out / "base.weights.h5").exists()
    source = small_application(weights=str(published))
    kernel = array(source.get_layer("Conv_1").kernel)
    np.testing.assert_array_equal(array(run.base().get_layer("Conv_1").kernel), kernel)
    # Other weights under the same name are refused.
    source.get_layer("Conv_1").kernel.assign(kernel + 1)
    published.unlink()
    source.save_weights(published)
    with pytest.raises(ValueError, match="are not those that the run .* SHA-256"):
        run.model()


def test_random_weights_are_named_as_such_everywhere(folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(arguments(folder, out, "--from-scratch")) == 0
    assert "random weights (--from-scratch)" in capsys.readouterr().err
    assert "applications/MobileNetV2 (random weights)" in (out / "report.html").read_text()
    assert base_in_adapter(out) == "keras.applications.MobileNetV2 (random weights)"
    card = (out / "adapter" / "README.md").read_text()
    assert "random weights" in card and "base_model:" not in card
    run = Run.open(out)
    run.model()
    # The run holds the weights that nobody can create again.
    (out / "base.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match="base.weights.h5"):
        run.model()


def test_without_a_network_the_error_names_the_ways_forward(
    folder, tmp_path, capsys, monkeypatch
):
    def fail():
        print("Downloading data from https://storage.googleapis.com")
        raise Exception("URL fetch failure on https://x: None -- Name not known")

    monkeypatch.setattr(sys.modules[__name__], "download", fail)
    assert main(arguments(folder, tmp_path / "run", "--json")) == 1
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and "checking" not in err
    message = next(line for line in err.splitlines() if line.startswith("error"))
    assert "pretrained weights of applications/MobileNetV2 could not be loaded" in message
    assert "--weights FILE" in message and "--from-scratch" in message
    assert "KERAS_HOME" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--from-scratch"], "--from-scratch with the model file"),
        (["--pretrained"], "--pretrained with the model file"),
    ],
)
def test_a_file_has_its_own_weights(folder, tmp_path, capsys, more, words):
    model = str(folder / "model.keras")
    assert main(arguments(folder, tmp_path / "run", *more, model=model)) == 1
    assert words in capsys.readouterr().err


def test_a_moved_model_file_is_found_by_its_content(folder, tmp_path, monkeypatch, capsys):
    model, out = tmp_path / "models" / "mine.keras", tmp_path / "runs" / "run"
    model.parent.mkdir()
    shutil.copy(folder / "model.keras", model)
    assert main(arguments(folder, out, model=str(model))) == 0
    assert base_in_adapter(out) == "mine.keras"
    expected = values(Run.open(out).model().weights)
    monkeypatch.chdir(tmp_path / "models")
    moved = [out / "mine.keras", out.parent / "mine.keras", tmp_path / "here" / "mine.keras"]
    for place in moved:
        place.parent.mkdir(exist_ok=True)
        os.rename(model, place)
        monkeypatch.chdir(place.parent)
        capsys.readouterr()
        with pytest.warns(UserWarning, match="same SHA-256"):
            again = Run.open(out).model()
        for a, b in zip(expected, values(again.weights)):
            np.testing.assert_array_equal(a, b)
        os.rename(place, model)
    # On the command line it is a note.
    os.rename(model, out / "mine.keras")
    picture = str(folder / "digits" / "0" / "0.png")
    assert main(["predict", str(out), picture]) == 0
    assert f"Using {out / 'mine.keras'}" in capsys.readouterr().err
    os.rename(out / "mine.keras", tmp_path / "elsewhere.keras")
    with pytest.raises(FileNotFoundError, match="mine.keras, SHA-256 [0-9a-f]{64}.*Looked for"):
        Run.open(out).model()
    (out / "mine.keras").write_bytes(b"other")
    with pytest.raises(ValueError, match="has changed.*expected mine.keras, SHA-256"):
        Run.open(out).model()


def test_a_config_of_an_earlier_version_still_opens(folder, tmp_path):
    settings = Recipe(model=str(folder / "model.keras"), data=str(folder / "digits"))
    assert settings.pretrained is False  # as in configs that were written before
    settings = {**settings.to_dict(), "normalisation": "unit", "epochs": 1}
    run = finetune_pictures(Recipe.from_dict(settings), tmp_path / "run", verbose="none")
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    for name in ("base_origin", "base_digest", "base_in_run"):
        del written["facts"][name]
    (run.path / "config.yaml").write_text(yaml.safe_dump(written))
    Run.open(run.path).model()
    finetune_pictures(Recipe.from_dict(settings), run.path, resume=True, verbose="none")


def test_a_digest_depends_on_weights_and_not_on_names():
    def model(seed, classes=3):
        keras.utils.set_random_seed(seed)
        return keras.Sequential(
            [
                keras.Input((4,)),
                keras.layers.Dense(5),
                keras.layers.Dropout(0.5),
                keras.layers.Dense(classes, name="head"),
            ]
        )

    whole = [weights_digest(model(s), without_classifier=False) for s in (1, 1, 2)]
    assert whole[0] == whole[1] != whole[2]
    body = [weights_digest(model(1, c), without_classifier=True) for c in (3, 7)]
    assert body[0] == body[1] != whole[0]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--model", "no_such_model"], "no_such_model"),
        (["--model", "no/such.keras"], "does not exist"),
        (["--normalisation", "mine"], "imagenet"),
        (["--targets", "nothing_like_it"], "nothing_like_it"),
        (["--lora", "train_modules=[nothing]"], "nothing"),
        (["--monitor", "f1"], "val_loss"),
        (["--patience", "0"], "patience"),
        (["--input-size", "31"], "32x32"),
        (["--strategy", "many"], "many"),
    ],
    ids=" ".join,
)
def test_what_cannot_work_is_reported_before_the_pictures_are_read(
    folder, tmp_path, capsys, monkeypatch, more, words
):
    monkeypatch.setattr(recipe_module, "check_data", lambda *a, **k: pytest.fail("read"))
    model = str(folder / "model.keras")
    assert main(arguments(folder, tmp_path / "run", *more, model=model)) == 1
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in err and out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["PIL", "matplotlib", "safetensors"])
def test_missing_packages_are_reported_before_the_pictures_are_read(
    package, folder, tmp_path, capsys, monkeypatch
):
    from tfimm_lora.cli import finetune as command

    monkeypatch.setattr(command, "installed", lambda name: name != package)
    monkeypatch.setitem(sys.modules, package, None)
    model = str(folder / "model.keras")
    assert main(arguments(folder, tmp_path / "run", model=model)) == 1
    assert "pip install" in capsys.readouterr().err


# -- adapters of models by name -------------------------------------------------------------


@pytest.mark.skipif(not LEGACY, reason="needs tfimm")
def test_adapters_of_random_tfimm_models_carry_no_checkpoint():
    import tfimm

    model = lora.create_model("resnet18", lora_rank=2)
    assert lora.adapter_of(model).base_model == "resnet18 (random weights)"
    # A model that somebody else created is judged by its biases.
    random = tfimm.create_model("resnet18")
    converted = lora.convert_to_lora_model(random, lora_rank=2)
    assert lora.adapter_of(converted).base_model == "resnet18 (random weights)"
    rng = np.random.default_rng(0)
    for variable in random.weights:
        if "beta" in variable.name or "bias" in variable.name:
            variable.assign(rng.normal(size=tuple(variable.shape)))
    trained = lora.convert_to_lora_model(random, lora_rank=2)
    assert lora.adapter_of(trained).base_model == "timm/resnet18.tv_in1k"
    assert lora.adapter_of(trained, "mine").base_model == "mine"
