"""Whole runs on both Kerases: from the command line, killed and resumed, of a tfimm model."""

import json

import pytest

from tests.helpers.commands import assert_resumes_after_kill
from tests.helpers.kerases import LEGACY
from tests.helpers.recipes import (
    arguments,
    assert_same_run,
    make_folder,
    recipe,
    settings_of,
)
from tfimm_lora.cli import main
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.run import Run

pytestmark = [pytest.mark.long] if LEGACY else []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small saved model, and pictures."""
    return make_folder(tmp_path_factory.mktemp("data"))


def test_the_command_line_does_it_all(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "run", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    run = Run.open(tmp_path / "run")
    assert told["trainable"] == run.facts["trainable"] < told["parameters"]
    best = run.history[told["best_epoch"] - 1]
    assert told["accuracy"] == pytest.approx(best["val_accuracy"], abs=1e-6)
    for name in ("report.html", "curves.png", "confusion.png", "logs", "labels.txt"):
        assert (run.path / name).exists(), name
    # The config is enough to repeat it.
    more = ["--config", str(run.path / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(["finetune", *more]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "again")
    capsys.readouterr()
    assert main(["finetune", *more]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main(["finetune", "--out", str(tmp_path / "again"), "--resume"]) == 0


@pytest.mark.long
def test_a_killed_run_is_resumed_to_identical_weights(folder, tmp_path):
    assert "accuracy" in assert_resumes_after_kill(tmp_path, settings_of(folder))


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="needs tfimm")
def test_a_tfimm_model_is_fine_tuned(folder, tmp_path):
    asked = recipe(
        folder,
        model="vit_tiny_patch16_224",
        pretrained=False,
        normalisation=None,
        input_size=[32, 32],
        epochs=1,
        lora={"lora_rank": 2, "lora_targets": "attention", "lora_qkv": "qv"},
    )
    run = finetune_pictures(asked, tmp_path / "run", verbose="none")
    assert run.preprocessing.mean == (0.5, 0.5, 0.5)
    model = run.model()
    assert model.cfg.nb_classes == 3 and model.cfg.input_size == (32, 32)
