"""Whole runs of every task: trained, evaluated, predicted, merged, exported and resumed."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.special import expit

import tfimm_lora as lora
from tests.helpers.commands import ask, assert_resumes_after_kill
from tests.helpers.kerases import LEGACY, array, keras
from tests.helpers.task_pictures import COLOURS, NUMBERS, save_model, task_recipe
from tfimm_lora.cli.finetune import _default_settings
from tfimm_lora.finetuning.recipe import finetune_pictures
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.run_report import evaluate_run
from tfimm_lora.model.state import recorded_task

TASKS = ("multilabel", "regression")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each task, which has learned something."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        task: finetune_pictures(
            task_recipe(folder, task, epochs=15, learning_rate=0.05),
            folder / task,
            verbose="none",
        )
        for task in TASKS
    }


def pixels(paths):
    """By Pillow: pictures of the input's size are only divided by 255."""
    return np.stack([np.array(Image.open(path)) for path in paths]).astype("float32") / 255


def predictions(run, paths):
    """What the model predicts, from its raw outputs and the config, by NumPy."""
    outputs = array(run.model()(pixels(paths), training=False)).astype("float64")
    facts = yaml.safe_load((run.path / "config.yaml").read_text())["facts"]["task"]
    if facts["name"] == "multilabel":
        return expit(outputs)
    return np.array(facts["mean"]) + np.array(facts["std"]) * outputs


@pytest.mark.parametrize("task", TASKS)
def test_a_run_records_its_task_and_its_model_has_learned_it(runs, task):
    run = Run.open(runs[task].path)
    labels = {"multilabel": COLOURS, "regression": NUMBERS}[task]
    assert run.task.name == task and run.task.labels == labels == tuple(run.labels)
    facts = run.facts["task"]
    adapter = lora.Adapter.load(run.adapter)
    assert adapter.task.to_dict() == facts == run.task.record().to_dict()
    assert recorded_task(run.model()) == adapter.task
    assert lora.adapter_of(run.model()) == adapter
    card = (run.adapter / "README.md").read_text()
    assert f"Task: {task}" in card and labels[0] in card
    evaluation = evaluate_run(run)["val"]
    assert evaluation.loss == pytest.approx(
        run.history[run.facts["best_epoch"] - 1]["val_loss"], rel=1e-4
    )
    if task == "multilabel":
        assert evaluation.mean_average_precision > 0.7  # 0.4 by chance
        assert [x.threshold for x in evaluation.scores] == facts["chosen"]["thresholds"]
    else:
        numbers = np.array([p.label for p in run.split.train.pictures])
        np.testing.assert_allclose(facts["mean"], numbers.mean(0), rtol=1e-12)
        np.testing.assert_allclose(facts["std"], numbers.std(0), rtol=1e-12)
        assert evaluation.scores[1].r2 > 0.5
        # 16 validation pictures: the ceil(17 * 0.9) = 16th smallest error, the largest.
        paths = [p.path for p in run.split.val.pictures]
        true = np.array([p.label for p in run.split.val.pictures])
        largest = np.abs(predictions(run, paths) - true).max(0)
        np.testing.assert_allclose(facts["chosen"]["half_widths"], largest, rtol=1e-3)
    for name in ("report.html", "curves.png", "mistakes.png", "split.csv"):
        assert (run.path / name).stat().st_size > 100
    page = (run.path / "report.html").read_text()
    assert all(label in page for label in labels)


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_and_predict_say_what_the_model_says(runs, task, capsys, tmp_path):
    run = runs[task]
    paths = [p.path for p in run.split.val.pictures]
    expected = predictions(run, paths)
    out, _ = ask(capsys, "evaluate", run.path, "--out", tmp_path / "e", "--json")
    told = json.loads(out)
    assert told["pictures"] == len(paths) and told["labels"] == list(run.labels)
    again, _ = ask(capsys, "evaluate", run.path, "--data", run.recipe["data"], "--json")
    assert json.loads(again)["pictures"] == 40 and json.loads(again)["trained_on"] == 24
    table, _ = ask(capsys, "evaluate", run.path)
    assert run.labels[0] in table
    assert (tmp_path / "e" / "predictions.csv").read_text().count("\n") == len(paths) + 1
    out, err = ask(capsys, "predict", run.path, *paths, "--json", "--csv", tmp_path / "p.csv")
    answers = json.loads(out)["predictions"]
    assert [x["path"] for x in answers] == paths
    if task == "multilabel":
        limits = run.facts["task"]["chosen"]["thresholds"]
        for x, row in zip(answers, expected):
            given = {one["label"]: one["probability"] for one in x["probabilities"]}
            np.testing.assert_allclose([given[n] for n in COLOURS], row, rtol=1e-3, atol=1e-5)
            above = {n for n, p, t in zip(COLOURS, row, limits) if p >= t}
            assert set(x["labels"]) == above
        out, _ = ask(capsys, "predict", run.path, paths[0], "--threshold", 1, "--json")
        assert json.loads(out)["predictions"][0]["labels"] == []
    else:
        widths = run.facts["task"]["chosen"]["half_widths"]
        for x, row in zip(answers, expected):
            np.testing.assert_allclose(list(x["numbers"].values()), row, rtol=1e-4, atol=1e-4)
            ends = np.array([x["intervals"][n] for n in NUMBERS])
            middle = np.array(list(x["numbers"].values()))
            np.testing.assert_allclose(ends.T, [middle - widths, middle + widths])
        _, err = ask(capsys, "predict", run.path, paths[0], "--top", 2, expect=1)
        assert "--top 2 for a regression" in err
    shown, _ = ask(capsys, "predict", run.path, paths[0])
    assert paths[0] in shown


@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_predicts_in_the_units_of_the_targets(runs, task, tmp_path, capsys):
    run = runs[task]
    paths = [p.path for p in run.split.val.pictures]
    expected = predictions(run, paths)
    out, _ = ask(capsys, "merge", run.path, "--out", tmp_path / "m.keras", "--json")
    told = json.loads(out)
    kind = {"multilabel": "probabilities", "regression": "numbers"}[task]
    assert told["returns"] == kind  # the base model ended in a softmax
    merged = keras.models.load_model(tmp_path / "m.keras", compile=False)
    found = array(merged(pixels(paths), training=False))
    scale = expected.std(0)  # of 6 for numbers about 2000
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-3)
    described = json.loads((tmp_path / "m.keras.json").read_text())
    assert described["task"]["name"] == task and described["labels"] == list(run.labels)
    assert "mean" not in described["task"]
    # The description is enough to export the file again.
    words = ("export", tmp_path / "m.keras", "--out", tmp_path / "again.keras", "--json")
    out, _ = ask(capsys, *words)
    assert json.loads(out)["returns"] == kind
    again = keras.models.load_model(tmp_path / "again.keras", compile=False)
    np.testing.assert_allclose(array(again(pixels(paths), training=False)), found, rtol=1e-6)
    # The model of the run itself did not change.
    np.testing.assert_array_equal(predictions(run, paths), expected)


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("format", ["savedmodel", "tflite", "onnx"])
def test_every_format_has_the_same_outputs(runs, task, format, tmp_path):
    run = runs[task]
    paths = [p.path for p in run.split.val.pictures]
    expected = predictions(run, paths)
    probabilities = True if task == "multilabel" else None
    path = tmp_path / {"savedmodel": "m", "tflite": "m.tflite", "onnx": "m.onnx"}[format]
    exported = lora.export(run.model(), path, format, probabilities=probabilities)
    assert exported.returns == {"multilabel": "probabilities", "regression": "numbers"}[task]
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(path))
        (found,) = session.run(None, {"inputs": pixels(paths)})
        told = json.loads(session.get_modelmeta().custom_metadata_map["task"])
        assert told["name"] == task
    else:
        import tensorflow as tf

        if format == "tflite":
            call = tf.lite.Interpreter(str(path)).get_signature_runner("serving_default")
        else:
            call = tf.saved_model.load(str(path)).signatures["serving_default"]
        found = np.asarray(call(inputs=pixels(paths))["outputs"])
    scale = expected.std(0)
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-3)
    if task == "multilabel":
        logits = lora.export(run.model(), tmp_path / "l.keras", probabilities=False)
        assert logits.returns == "logits"
    else:
        with pytest.raises(ValueError, match="fine-tuned for a regression"):
            lora.export(run.model(), tmp_path / "l.keras", probabilities=False)


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_is_resumed_to_identical_weights(task, tmp_path):
    asked = task_recipe(tmp_path, task)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asked.to_dict()))
    words = ("finetune", "--config", tmp_path / "recipe.yaml")
    assert "validation pictures" in assert_resumes_after_kill(tmp_path, words)
    one, two = (Run.open(tmp_path / name).facts["task"] for name in ("run", "whole"))
    assert one == two and one["chosen"]


@pytest.mark.once
def test_what_a_task_cannot_do_is_said_before_the_training(tmp_path):
    save_model(tmp_path / "model.keras")
    recipe = task_recipe(tmp_path, "regression")
    with pytest.raises(ValueError, match="no classes to balance"):
        dataclasses.replace(recipe, balanced=True)
    with pytest.raises(ValueError, match="monitor"):
        dataclasses.replace(recipe, monitor="val_accuracy")
    with pytest.raises(ValueError, match="task='segments'"):
        dataclasses.replace(recipe, task="segments")
    with pytest.raises(ValueError, match="column label"):
        dataclasses.replace(recipe, task="classification", columns=["a"])
    save_model(tmp_path / "no_bias.keras", bias=False)
    without = dataclasses.replace(recipe, model=str(tmp_path / "no_bias.keras"))
    with pytest.raises(ValueError, match="with a bias"):
        finetune_pictures(without, tmp_path / "run", verbose="none")
    assert not (tmp_path / "run").exists()


@pytest.mark.once
def test_a_task_is_one_class_in_the_table_of_tasks(tmp_path, monkeypatch, capsys):
    """A fourth task needs nothing else to work through the commands."""
    from tfimm_lora.finetuning.tasks import named
    from tfimm_lora.finetuning.tasks.regression import Regression

    class Counting(Regression):
        name = "counting"

        def values(self, outputs):
            return np.rint(super().values(outputs))

    monkeypatch.setitem(named.TASKS, "counting", Counting)
    recipe = task_recipe(tmp_path, "regression", epochs=1).to_dict() | {"task": "counting"}
    run = finetune_pictures(lora.Recipe.from_dict(recipe), tmp_path / "run", verbose="none")
    assert lora.Adapter.load(run.adapter).task.name == "counting"
    picture = run.split.val.pictures[0].path
    ask(capsys, "evaluate", run.path)
    out, _ = ask(capsys, "predict", run.path, picture, "--json")
    numbers = json.loads(out)["predictions"][0]["numbers"]
    assert all(value == round(value) for value in numbers.values())


@pytest.mark.once
def test_runs_of_earlier_versions_are_classifications(tmp_path):
    from tests.helpers.recipes import make_folder, recipe

    make_folder(tmp_path)
    asked = recipe(tmp_path, epochs=1, augmentation="strong")
    run = finetune_pictures(asked, tmp_path / "run", verbose="none")
    config = yaml.safe_load(run.config_path.read_text())
    for name in ("task", "columns", "accumulate", "clip_norm", "gradient_checkpointing"):
        del config["recipe"][name]
    for name in ("task", "pictures"):
        del config["facts"][name]
    config["recipe"]["augmentation"] = "default"  # the former name
    run.config_path.write_text(yaml.safe_dump(config))
    old = Run.open(run.path)
    assert old.task.name == "classification" and old.task.labels == ("0", "1", "2")
    assert evaluate_run(old)["val"].accuracy is not None
    # They did not clip the gradient, and a command that resumes one does not, too.
    with pytest.raises(ValueError, match=r"clip_norm=0, now 1\.0"):
        finetune_pictures(dataclasses.replace(asked, epochs=2), run.path, resume=True)
    told = {**_default_settings(str(run.path), None, resume=True), "epochs": 2}
    more = lora.Recipe.from_dict(told)
    assert len(finetune_pictures(more, run.path, resume=True, verbose="none").history) == 2


@pytest.mark.skipif(LEGACY, reason="does not depend on Keras")
def test_functions_do_what_the_commands_do(runs, tmp_path):
    split = lora.find_pictures(
        runs["regression"].recipe["data"], targets=lora.Regression.targets(), validation=0.4
    )
    task = lora.Regression.of(split.train)
    run = runs["regression"]
    batches = lora.PictureBatches(split.val, run.preprocessing, 8).in_order()
    value = lora.evaluate(run.model(), batches, task=run.task)
    np.testing.assert_allclose(value.scores[0].mae, evaluate_run(run)["val"].scores[0].mae)
    model = keras.models.load_model(run.recipe["model"], compile=False)
    model.layers[-1].activation = keras.activations.linear
    model = keras.Sequential([*model.layers[:-1], keras.layers.Dense(2, name="numbers")])
    model.build((None, 8, 8, 3))
    lora.inject_lora(model, lora_rank=2, lora_train_classifier=True)
    train = lora.PictureBatches(split.train, run.preprocessing, 8)
    trained = lora.finetune(model, train, batches, epochs=2, task=task, verbose="none")
    assert trained.history[1]["loss"] < trained.history[0]["loss"]
    assert {"loss", "mae", "val_loss", "val_mae"} <= set(trained.history[0])
