"""``tune_pictures`` and ``finetune --lr auto --rank auto``: only training pictures decide."""

import contextlib
import dataclasses
import shutil
import sys

import numpy as np
import pytest
import yaml

from tests.helpers.picture_folders import write_digits, write_split
from tests.helpers.recipes import adapter_values, recipe, save_model
from tests.helpers.task_pictures import task_recipe
from tfimm_lora.cli import main
from tfimm_lora.finetuning.data.dataset import Picture, PictureSet, find_pictures
from tfimm_lora.finetuning.evaluation import outputs_on
from tfimm_lora.finetuning.multilabel_metrics import binary_cross_entropy
from tfimm_lora.finetuning.recipe import Recipe
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.tasks.multilabel import MultiLabel
from tfimm_lora.finetuning.tuning import learning_rate_finder as finder_module
from tfimm_lora.finetuning.tuning import pictures as pictures_module
from tfimm_lora.finetuning.tuning import search as search_module
from tfimm_lora.finetuning.tuning.pictures import (
    find_rate_for_pictures,
    held_out_pictures,
    tune_pictures,
)
from tfimm_lora.finetuning.tuning.record import read_search
from tfimm_lora.finetuning.tuning.storage import open_study
from tfimm_lora.finetuning.tuning.trainer import Trainer

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small saved model, and pictures with validation and test pictures."""
    root = tmp_path_factory.mktemp("data")
    save_model(root / "model.keras")
    data = write_split(root / "digits", labels=range(3), each=10, size=16)
    write_digits(data / "test", range(3), 4, 16, first=15)
    return root


def arguments(folder, out, *more):
    return [
        "finetune",
        *("--model", str(folder / "model.keras"), "--data", str(folder / "digits")),
        *("--normalisation", "unit", "--epochs", "2", "--batch-size", "8"),
        *("--augmentation", "light", "--out", str(out), *more),
    ]


def results(tuned):
    """Everything of the trainings but their times."""
    return [dataclasses.replace(trial, seconds=0.0, worker="") for trial in tuned.trials]


def search(folder, out=None, **options):
    settings = {"minutes": 60, "rank": False, "learning_rate": (1e-3, 1e-1), "trials": 3}
    return tune_pictures(recipe(folder, epochs=6), out, **{**settings, **options})


def test_labels_of_validation_and_test_pictures_change_nothing(folder, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    for part in ("val", "test"):
        classes = sorted((wrong / "digits" / part).iterdir())
        for one in classes:
            one.rename(one.with_name(f"{one.name}-moved"))
        for one, other in zip(classes, classes[1:] + classes[:1]):
            one.with_name(f"{one.name}-moved").rename(other)
    assert results(search(folder)) == results(search(wrong))


def test_a_fifth_of_each_class_is_held_out():
    labels = [0] * 10 + [1] * 3 + [2]
    pictures = tuple(Picture(str(i), label) for i, label in enumerate(labels))
    given = PictureSet(pictures, ("a", "b", "c"))
    seen, out = held_out_pictures(given, seed=0)
    assert out.counts() == {"a": 2, "b": 1, "c": 0}
    assert sorted(seen.pictures + out.pictures, key=lambda x: int(x.path)) == list(pictures)
    assert held_out_pictures(given, 0) == (seen, out) != held_out_pictures(given, 1)
    with pytest.raises(ValueError, match="one training picture in each class"):
        held_out_pictures(PictureSet(pictures[-1:], ("a", "b", "c")), 0)


@pytest.mark.long
def test_the_command_searches_trains_and_reports(folder, tmp_path, capsys):
    out = tmp_path / "run"
    words = ("--lr", "auto", "--rank", "auto", "--tune-trials", "4", "--tune-minutes", "60")
    assert main(arguments(folder, out, *words)) == 0
    said = capsys.readouterr().err
    assert "searching learning rate (0.0001 to 0.03) and rank (4, 8, 16)" in said
    assert "trained on 24 of the 30 training pictures and compared on the other 6" in said
    run, (tuned, _) = Run.open(out), read_search(out)
    assert run.recipe["learning_rate"] == tuned.learning_rate == tuned.best.learning_rate
    assert run.recipe["lora"]["lora_rank"] == tuned.rank
    assert run.facts["tuning"]["trials"] == len(tuned.trials) >= 4
    report = (out / "report.html").read_text()
    assert "Search for settings" in report and f"rank {tuned.rank}" in report
    # The config repeats the run without a search.
    again = tmp_path / "again"
    assert main(["finetune", "--config", str(out / "config.yaml"), "--out", str(again)]) == 0
    one, two = adapter_values(out), adapter_values(again)
    assert all(np.array_equal(one[key], two[key]) for key in one)
    assert not (again / "tuning").exists()
    # The same command resumes and does not search again; another search is refused.
    capsys.readouterr()
    assert main(arguments(folder, out, *words, "--resume")) == 0
    said = capsys.readouterr().err
    assert "is complete: rate" in said and "trial" not in said
    assert main(arguments(folder, out, "--lr", "auto", "--resume")) == 1
    assert "started with other settings: ranks=[4, 8, 16], now" in capsys.readouterr().err
    assert main(arguments(folder, again, "--lr", "auto", "--resume")) == 1
    assert "with a search for settings; expected a new folder" in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_search_continues_in_its_folder(folder, tmp_path, monkeypatch):
    expected = search(folder, tmp_path / "whole")
    out, count = tmp_path / "run", [0]
    train = search_module.Search._train_one

    def killed(self):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        train(self)

    monkeypatch.setattr(search_module.Search, "_train_one", killed)
    with pytest.raises(KeyboardInterrupt):
        search(folder, out)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="resume=True"):
        search(folder, out)
    with pytest.raises(ValueError, match="started with other settings: rates="):
        search(folder, out, resume=True, learning_rate=(1e-3, 1e-2))
    said = []
    tuned = search(folder, out, resume=True, say=said.append)
    assert results(tuned) == results(expected) and sum("trial" in x for x in said) >= 1
    assert tuned.recipe.learning_rate == expected.learning_rate
    again = search(folder, out, resume=True, say=said.append)
    assert again == tuned and "is complete" in said[-1]


@pytest.mark.parametrize(
    "monitor, expected", [("accuracy", "val_accuracy"), ("loss", "val_loss")]
)
def test_training_metrics_do_not_choose(folder, monitor, expected):
    found = tune_pictures(
        recipe(folder, epochs=1, monitor=monitor), minutes=60, learning_rate=False, rank=(1, 2)
    )
    assert found.monitor == expected and len(found.trials) == 2
    assert found.recipe.learning_rate == 0.01 and found.recipe.lora["lora_rank"] == found.rank


def test_a_search_trains_as_the_recipe_says(tmp_path, monkeypatch):
    """Several labels, balanced, and the initialization from pictures."""
    given, initialized = [], []

    class Recording(Trainer):
        def __init__(self, model, train, validation=None, **options):
            given.append((model, train, options))
            super().__init__(model, train, validation, **options)

    def initialize(recipe, model, pictures, preprocessing):
        initialized.append((model, pictures))

    for module in (pictures_module, finder_module):
        monkeypatch.setattr(module, "Trainer", Recording)
    monkeypatch.setattr(pictures_module, "initialize_from_pictures", initialize)
    asked = task_recipe(
        tmp_path, "multilabel", epochs=1, balanced=True, clip_norm=0.3, weight_decay=0.2, seed=4
    )
    found = tune_pictures(asked, minutes=60, learning_rate=False, rank=(1, 2))
    with contextlib.suppress(FloatingPointError):  # the curve of so few pictures is noise
        find_rate_for_pictures(asked)
    assert found.pictures == (19, 5) and len(given) == 3
    for number, (_, train, options) in enumerate(given):
        pictures = train.picture_set
        is_search = number < 2
        assert len(pictures) == (19 if is_search else 24)
        has = pictures.array()
        ratios = (1 - has).sum(0) / has.sum(0)
        np.testing.assert_allclose([options["class_weight"][i] for i in range(3)], ratios)
        assert options["task"] == MultiLabel.of(pictures)
        assert (options["clip_norm"], options["weight_decay"], options["seed"]) == (0.3, 0.2, 4)
        assert initialized[number][1] == pictures
    # The pictures to compare on are the others.
    split = find_pictures(asked.data, targets=asked.targets(), validation=0.4, seed=4)
    _, held_out = held_out_pictures(split.train, 4)
    model, train, options = given[1]
    seen = train.picture_set.pictures
    assert set(held_out.pictures) | set(seen) == set(split.train.pictures)
    outputs, labels = outputs_on(model, held_out, train.preprocessing, options["task"])
    weights = np.array([options["class_weight"][i] for i in range(3)])
    losses = binary_cross_entropy(outputs, labels) * np.where(labels, weights, 1)
    assert found.trials[1].value == pytest.approx(losses.mean(), rel=1e-3)


def test_a_shared_storage_leaves_the_trainings_of_others_alone(folder, tmp_path, monkeypatch):
    opened, alone = [], []

    def open_only(storage, settings, **options):
        opened.append(storage)
        return open_study(storage, settings, **options)

    monkeypatch.setattr(pictures_module, "open_study", open_only)
    monkeypatch.setattr(search_module.Search, "run", lambda self: None)
    monkeypatch.setattr(search_module.Search, "continue_alone", lambda self: alone.append(self))
    shared = str(tmp_path / "shared")
    for out, storage in (("a", shared), ("b", None)):
        with pytest.raises(RuntimeError, match="No training of the search is complete"):
            search(folder, tmp_path / out, storage=storage)
    assert opened == [shared, str(tmp_path / "b" / "tuning" / "journal.log")]
    assert len(alone) == 1  # of the journal of the folder, which only one process writes


def test_a_rate_is_found_in_one_pass(folder, tmp_path, capsys):
    said = []
    curve = find_rate_for_pictures(recipe(folder), say=said.append)
    assert len(curve.rates) == 30 and "batches of 1 instead of 8" in said[0]
    out = tmp_path / "run"
    assert main(arguments(folder, out, "--lr", "find", "--rank", "2", "--epochs", "1")) == 0
    rate = yaml.safe_load((out / "config.yaml").read_text())["recipe"]["learning_rate"]
    assert f"learning rate {rate:g}, from one pass of 30 steps" in capsys.readouterr().err
    assert 1e-6 <= rate <= 0.1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--lr", "atuo"), "Received --lr atuo; expected a number, auto"),
        (("--rank", "all"), "Received --rank all; expected a whole number, or auto"),
        (("--tune-minutes", "3"), "Received --tune-minutes without a search"),
        (("--lr", "find", "--tune-trials", "3"), "Received --tune-trials without a search"),
        (("--lr", "auto", "--tune-minutes", "-1"), "minutes=-1"),
        (("--rank", "auto", "--strategy", "mirrored"), "Received strategy='mirrored'"),
        (("--rank", "auto", "--accumulate", "2"), "Received accumulate=2"),
        (("--rank", "auto", "--gradient-checkpointing"), "gradient_checkpointing=True"),
    ],
)
def test_wrong_words_say_what_was_expected(folder, tmp_path, capsys, words, message):
    out = tmp_path / "run"
    assert main(arguments(folder, out, *words)) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_optuna_is_needed_before_anything_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"Searching for settings .*tfimm_lora\[tune\]"):
        tune_pictures(Recipe(model="MobileNetV2", data="none"), tmp_path / "run", minutes=1)
    assert not (tmp_path / "run").exists()


def test_a_search_that_fails_before_any_training_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "run"
    wrong = arguments(
        folder, out, "--lr", "auto", "--tune-trials", "2", "--lora", "targets=nowhere"
    )
    assert main(wrong) == 1
    assert "matches no layer" in capsys.readouterr().err and not out.exists()
