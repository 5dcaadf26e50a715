"""``tfimm-lora evaluate`` and ``predict`` on a small run."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score, recall_score

from tests.helpers.finished_run import LABELS, finished_run
from tests.helpers.picture_folders import break_picture, digit_pictures, touch
from tfimm_lora.cli import main

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run):
    return run.model()


@pytest.fixture
def folder(tmp_path):
    """Pictures to predict: in a folder, in one inside it, and what is none."""
    inside = tmp_path / "pictures"
    (inside / "more").mkdir(parents=True)
    (inside / ".hidden").mkdir()
    for i, pixels in enumerate(digit_pictures(0)[:3]):
        Image.fromarray(pixels).save(inside / f"{i + 8}.png")
    for name in ("more/0.PNG", ".hidden/0.png", ".1.png"):
        Image.fromarray(digit_pictures(1)[0]).save(inside / name)
    touch(inside, "notes.txt")
    return inside


def ask(capsys, *arguments):
    """The exit code, and what was printed on stdout and stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    told = capsys.readouterr()
    return code, told.out, told.err


def probabilities(model, paths):
    """By NumPy: pictures of the input's size are only divided by 255."""
    x = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths]) / 255
    e = np.exp(model.predict(x.astype("float32"), verbose=0).astype("float64"))
    return e / e.sum(1, keepdims=True)


def write_csv(path, *rows, header=("path", "label")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# -- evaluate -------------------------------------------------------------------------------


def test_evaluate_is_of_the_validation_pictures_and_what_scikit_learn_says(run, model, capsys):
    code, out, _ = ask(capsys, "evaluate", run.path, "--json", "--batch-size", 5)
    data = json.loads(out)
    val = run.split.val
    true = [run.labels[picture.label] for picture in val.pictures]
    p = probabilities(model, [picture.path for picture in val.pictures])
    predicted = [run.labels[i] for i in p.argmax(1)]
    assert code == 0 and data["pictures"] == len(val) and data["trained_on"] == 0
    assert data["accuracy"] == accuracy_score(true, predicted)
    rows = np.arange(len(val)), [picture.label for picture in val.pictures]
    np.testing.assert_allclose(data["loss"], -np.log(p[rows]).mean(), rtol=1e-4)
    recall = recall_score(true, predicted, labels=run.labels, average=None, zero_division=0)
    np.testing.assert_allclose([x["recall"] for x in data["classes"]], recall)
    assert data["labels"] == run.labels and set(run.labels) == set(LABELS)

    code, out, _ = ask(capsys, "evaluate", run.path)
    assert code == 0 and f"{data['loss']:.4f}" in out
    for label, scores in zip(run.labels, data["classes"]):
        line = next(line for line in out.splitlines() if line.startswith(label))
        assert line.endswith(f"{scores['f1']:.3f}")


def test_evaluate_other_pictures_also_of_some_of_the_classes_only(run, tmp_path, capsys):
    for i, pixels in enumerate(digit_pictures(2)[8:12]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    data = write_csv(tmp_path / "some.csv", *((f"{i}.png", LABELS[2]) for i in range(4)))
    break_picture(tmp_path / "3.png")
    code, out, err = ask(capsys, "evaluate", run.path, "--data", data, "--json")
    found = json.loads(out)
    assert code == 0 and found["pictures"] == 3 and found["data"] == str(data)
    counts = {x["label"]: x["count"] for x in found["classes"]}
    assert counts == {LABELS[0]: 0, LABELS[1]: 0, LABELS[2]: 3}
    assert [x["path"] for x in found["skipped"]] == [str(tmp_path / "3.png")]
    assert f"skipped {tmp_path / '3.png'}" in err
    code, out, _ = ask(capsys, "evaluate", run.path, "--data", data)
    assert code == 0
    lines = [line.split() for line in out.splitlines() if line.startswith(LABELS[0])]
    assert lines[0][-3:] == ["-", "-", "-"]  # nothing is known of a class without pictures


def test_evaluate_uses_the_validation_part_and_warns_of_training_pictures(
    run, tmp_path, capsys
):
    train, val = run.split.train.pictures[0], run.split.val.pictures[0]
    rows = [(x.path, run.labels[x.label], part) for x, part in ((train, "val"), (val, "train"))]
    data = write_csv(tmp_path / "s.csv", *rows, header=("path", "label", "split"))
    code, out, err = ask(capsys, "evaluate", run.path, "--data", data, "--json")
    found = json.loads(out)
    assert (code, found["pictures"], found["trained_on"]) == (0, 1, 1)
    assert "1 of 1 pictures were used for training" in err


def test_evaluate_prefers_the_test_part_of_other_data(run, tmp_path, capsys):
    val, *tested = run.split.val.pictures[:3]
    rows = [(val.path, run.labels[val.label], "val")]
    rows += [(x.path, run.labels[x.label], "test") for x in tested]
    data = write_csv(tmp_path / "s.csv", *rows, header=("path", "label", "split"))
    code, out, _ = ask(capsys, "evaluate", run.path, "--data", data, "--json")
    assert (code, json.loads(out)["pictures"]) == (0, 2)


def test_evaluate_names_classes_that_the_run_does_not_know(run, folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(folder, tmp_path / "data" / "wolf")
    shutil.copytree(folder, tmp_path / "data" / "bear")
    code, printed, err = ask(
        capsys, "evaluate", run.path, "--data", tmp_path / "data", "--out", out
    )
    assert code == 1 and not printed and not out.exists()
    assert "2 classes that the model was not trained on: bear, wolf" in err
    assert all(label in err for label in LABELS)
    assert "warning: " in err and "2 .txt" in err and "UserWarning" not in err


def test_evaluate_writes_pictures_and_predictions(run, model, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    code, printed, _ = ask(capsys, "evaluate", run.path, "--out", out, "--json")
    assert code == 0
    names = ["confusion.png", "mistakes.png", "predictions.csv"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in names[:2]:
        Image.open(out / name).verify()
    rows = list(csv.DictReader((out / "predictions.csv").read_text("utf-8").splitlines()))
    right = np.mean([row["label"] == row["predicted"] for row in rows])
    np.testing.assert_allclose(right, json.loads(printed)["accuracy"])
    p = probabilities(model, [row["path"] for row in rows])
    np.testing.assert_allclose([float(x["probability"]) for x in rows], p.max(1), rtol=1e-4)
    of_label = [one[run.labels.index(x["label"])] for one, x in zip(p, rows)]
    found = [float(x["probability_of_label"]) for x in rows]
    np.testing.assert_allclose(found, of_label, rtol=1e-4)
    np.testing.assert_allclose(
        [float(x["loss"]) for x in rows], -np.log(of_label), rtol=1e-4, atol=1e-6
    )

    (out / "mistakes.png").write_text("mine")
    code, _, err = ask(capsys, "evaluate", run.path, "--out", out)
    assert code == 1 and "--overwrite" in err
    assert (out / "mistakes.png").read_text() == "mine"
    code, _, _ = ask(capsys, "evaluate", run.path, "--out", out, "--overwrite")
    assert code == 0
    Image.open(out / "mistakes.png").verify()


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (("evaluate", "no/such"), 1, "not a finetune run"),
        (("predict", "no/such", "x.png"), 1, "not a finetune run"),
        (("evaluate", "RUN", "--data", "no/such"), 1, "does not exist"),
        (("evaluate", "RUN", "--batch-size", "0"), 2, "--batch-size"),
        (("predict", "RUN"), 2, "pictures"),
        (("predict", "RUN", "x.png", "--top", "0"), 2, "--top"),
    ],
)
def test_impossible_requests_are_explained(run, arguments, code, message, capsys):
    given = [run.path if word == "RUN" else word for word in arguments]
    found, out, err = ask(capsys, *given)
    assert (found, out) == (code, "") and message in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_help_ends_with_examples(command, capsys):
    code, out, _ = ask(capsys, command, "--help")
    assert code == 0 and f"tfimm-lora {command} runs/" in out.partition("Examples:")[2]


# -- predict --------------------------------------------------------------------------------


def test_predict_files_and_folders_as_the_model_does(run, model, folder, capsys):
    extra = folder / "notes.dat"  # a file that is named is a picture, whatever its name
    shutil.copy(folder / "8.png", extra)
    code, out, _ = ask(
        capsys, "predict", run.path, folder, extra, folder / "9.png", "--json", "--top", 2
    )
    data = json.loads(out)
    paths = [Path(x["path"]) for x in data["predictions"]]
    below = [folder / name for name in ("8.png", "9.png", "10.png", "more/0.PNG")]
    assert paths == [*below, extra] and data["unreadable"] == []
    p = probabilities(model, paths)
    for one, expected in zip(data["predictions"], p):
        order = np.argsort(-expected)[:2]
        assert [x["label"] for x in one["top"]] == [run.labels[i] for i in order]
        found = [x["probability"] for x in one["top"]]
        np.testing.assert_allclose(found, expected[order], rtol=1e-4)
        assert {"label": one["label"], "probability": one["probability"]} == one["top"][0]
    assert code == 0

    code, again, _ = ask(
        capsys, "predict", run.path, *paths, "--json", "--top", 2, "--batch-size", 2
    )
    for one, two in zip(json.loads(again)["predictions"], data["predictions"]):
        assert one["path"] == two["path"] and one["label"] == two["label"]
        np.testing.assert_allclose(one["probability"], two["probability"], rtol=1e-5)

    code, out, _ = ask(capsys, "predict", run.path, folder / "8.png")
    first = data["predictions"][0]
    assert str(folder / "8.png") in out and first["label"] in out
    assert f"{100 * first['probability']:.1f} %" in out


def test_predict_continues_after_unreadable_files_and_fails_at_the_end(run, folder, capsys):
    break_picture(folder / "9.png")
    gone = folder / "gone\x1b[2J.png"
    code, out, err = ask(capsys, "predict", run.path, gone, folder, "--json")
    data = json.loads(out)
    assert code == 1 and len(data["predictions"]) == 3
    assert [x["path"] for x in data["unreadable"]] == [str(gone), str(folder / "9.png")]
    assert all(x["reason"] for x in data["unreadable"])
    assert "9.png" in err and "2 of 5 files" in err
    assert "\x1b" not in err and "gone\\x1b[2J.png" in err
    code, out, err = ask(capsys, "predict", run.path, folder / "9.png")
    assert (code, out) == (1, "") and "1 of 1 files" in err


def test_predict_without_pictures_is_an_error(run, tmp_path, capsys):
    touch(tmp_path, "notes.txt")
    code, out, err = ask(capsys, "predict", run.path, tmp_path)
    assert code == 1 and not out and "contains no pictures" in err and ".jpg" in err
    assert str(tmp_path) in err and "left out 1 file" in err


def test_predict_writes_a_table(run, folder, tmp_path, capsys):
    table = tmp_path / "out" / "p.csv"
    code, out, _ = ask(capsys, "predict", run.path, folder, "--csv", table, "--json")
    assert code == 0
    rows = list(csv.DictReader(table.read_text("utf-8").splitlines()))
    for row, one in zip(rows, json.loads(out)["predictions"], strict=True):
        assert row["path"] == one["path"]
        pairs = [
            ("label", "probability"),
            *((f"label_{i}", f"probability_{i}") for i in (2, 3)),
        ]
        assert [row[label] for label, _ in pairs] == [x["label"] for x in one["top"]]
        found = [float(row[probability]) for _, probability in pairs]
        np.testing.assert_allclose(found, [x["probability"] for x in one["top"]], rtol=1e-5)
        np.testing.assert_allclose(sum(found), 1, rtol=1e-4)
    table.write_text("mine")
    code, _, err = ask(capsys, "predict", run.path, folder, "--csv", table)
    assert code == 1 and "--overwrite" in err and table.read_text() == "mine"
    code, _, _ = ask(capsys, "predict", run.path, folder, "--csv", table, "--overwrite")
    assert code == 0 and table.read_text("utf-8").startswith("path,label,probability,label_2")
