"""Evaluation against scikit-learn's numbers, and what is drawn and written of it."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from scipy.stats import binomtest
from sklearn import metrics
from sklearn.calibration import calibration_curve

import tfimm_lora as lora
from tests.helpers.finished_run import LABELS, finished_run
from tests.helpers.kerases import array, keras
from tests.helpers.picture_folders import break_picture, write_digits
from tfimm_lora.finetuning.data.dataset import find_pictures
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.data.preprocessing import Preprocessing
from tfimm_lora.finetuning.evaluation import evaluate, evaluate_pictures, predict_pictures
from tfimm_lora.finetuning.explained_pictures import LIMITS, explain_pictures
from tfimm_lora.finetuning.metrics import Evaluation
from tfimm_lora.finetuning.report.formatting import percent
from tfimm_lora.finetuning.report.plots import draw_confusion, draw_curves, draw_mistakes
from tfimm_lora.finetuning.run import Run
from tfimm_lora.finetuning.run_report import evaluate_run, write_report

pytestmark = pytest.mark.once

CHROMIUM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


def outputs(n=300, classes=8, missing=(), seed=0):
    """Logits of a model that is right about half of the time, and the right classes."""
    rng = np.random.default_rng(seed)
    there = [c for c in range(classes) if c not in missing]
    true = rng.choice(there, n)
    logits = rng.normal(size=(n, classes)) * 2
    logits[np.arange(n), true] += 2
    return logits, true


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


# -- numbers --------------------------------------------------------------------------------


def test_a_model_with_one_answer_for_all_pictures_is_reported():
    views = lora.Classification().views
    logits, true = outputs(classes=3)
    assert views.advice(Evaluation.of(logits, true, ("a", "b", "c"))) is None
    logits[:, 1] = 99.0
    one = Evaluation.of(logits, true, ("a", "b", "c"))
    assert views.advice(one).startswith("all pictures are classified as b.")
    # Which is right if there is nothing else.
    only = Evaluation.of(logits[true == 1], true[true == 1], ("a", "b", "c"))
    assert views.advice(only) is None


@pytest.mark.parametrize("classes, missing", [(8, ()), (8, (2, 7)), (2, ()), (5, ())])
def test_numbers_are_those_of_scikit_learn(classes, missing):
    logits, true = outputs(classes=classes, missing=missing)
    p, predicted, every = softmax(logits), logits.argmax(1), range(classes)
    value = Evaluation.of(logits, true)
    assert value.labels == tuple(map(str, every))
    assert value.accuracy == metrics.accuracy_score(true, predicted)
    np.testing.assert_allclose(value.loss, metrics.log_loss(true, p, labels=every), rtol=1e-9)
    np.testing.assert_array_equal(
        value.confusion, metrics.confusion_matrix(true, predicted, labels=every)
    )
    table = metrics.precision_recall_fscore_support(
        true, predicted, labels=every, zero_division=0
    )
    mine = [(x.precision, x.recall, x.f1, x.count) for x in value.classes]
    np.testing.assert_allclose(mine, np.transpose(table), rtol=1e-12)
    present = np.isin(predicted, true)  # sklearn warns of classes that are only predicted
    balanced = np.mean([x.recall for x in value.classes if x.count])
    np.testing.assert_allclose(value.balanced_accuracy, balanced)
    if present.all():
        expected = metrics.balanced_accuracy_score(true, predicted)
        np.testing.assert_allclose(value.balanced_accuracy, expected)
    if classes > 5:
        top5 = metrics.top_k_accuracy_score(true, p, k=5, labels=every)
        np.testing.assert_allclose(value.top5, top5)
    else:
        assert value.top5 is None
    each = [(x.probability, x.probability_of_true, x.loss) for x in value.predictions]
    rows = np.arange(len(true))
    expected = np.stack([p.max(1), p[rows, true], -np.log(p[rows, true])], 1)
    np.testing.assert_allclose(each, expected, rtol=1e-9)
    assert [x.true for x in value.predictions] == [str(t) for t in true]
    assert [x.predicted for x in value.predictions] == [str(t) for t in predicted]


def test_calibration_error_is_that_of_scikit_learns_calibration_curve():
    logits, true = outputs(n=500, classes=4)
    p = softmax(logits)
    confidence, right = p.max(1), p.argmax(1) == true
    share, mean = calibration_curve(right, confidence, n_bins=15)
    counts = np.histogram(confidence, bins=np.linspace(0, 1, 16))[0]
    expected = (np.abs(share - mean) * counts[counts > 0]).sum() / len(true)
    value = Evaluation.of(logits, true)
    np.testing.assert_allclose(value.calibration_error, expected, rtol=1e-9)
    assert expected > 0.01  # or the test could not fail
    sure = Evaluation.of(np.eye(3) * 1000, np.arange(3))
    assert sure.calibration_error == 0 and sure.loss == 0


@pytest.mark.parametrize("right, n", [(0, 7), (7, 7), (5, 9), (980, 1000)])
def test_interval_of_the_accuracy_is_wilsons(right, n):
    true = np.zeros(n, int)
    logits = np.zeros((n, 2))
    logits[:right, 0] = logits[right:, 1] = 3
    expected = binomtest(right, n).proportion_ci(method="wilson")
    found = Evaluation.of(logits, true).accuracy_interval()
    np.testing.assert_allclose(found, tuple(expected), atol=1e-7)
    assert found[0] <= right / n <= found[1]


def test_large_logits_do_not_overflow_and_single_precision_is_no_limit():
    value = Evaluation.of(np.array([[5000.0, 0.0], [0.0, 5000.0]]), np.array([1, 1]))
    assert value.loss == 2500 and value.predictions[0].probability_of_true == 0


def test_worst_mistakes_are_the_most_confident_and_pairs_the_most_frequent():
    p = np.array([[0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.05, 0.9, 0.05], [0.2, 0.1, 0.7]])
    paths = ["a", "b", "c", "d"]
    value = Evaluation.of(np.log(p), np.array([1, 0, 0, 2]), ("cat", "dog", "eel"), paths)
    assert [x.path for x in value.worst()] == ["c", "b", "a"]
    assert [x.path for x in value.worst(1)] == ["c"]
    assert value.confused() == [("cat", "dog", 2), ("dog", "cat", 1)]
    assert value.confused(1) == [("cat", "dog", 2)]
    assert Evaluation.of(np.eye(3), np.arange(3)).worst() == []


def test_the_dictionary_is_strict_json_also_with_classes_that_never_occur():
    logits, true = outputs(n=20, missing=(0, 1, 2, 3))
    told = Evaluation.of(logits, true).to_dict()
    again = json.loads(json.dumps(told, allow_nan=False))
    assert again == told and again["pictures"] == 20
    assert [x["count"] for x in again["classes"]] == np.bincount(true, minlength=8).tolist()
    assert np.array(again["confusion"]).sum() == 20


# -- models ---------------------------------------------------------------------------------


def net(classes=3, side=8, channels=3):
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((side, side, channels)),
            layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.Dropout(0.5, name="drop"),
            layers.Flatten(name="flatten"),
            layers.Dense(classes, name="head"),
        ]
    )
    return lora.inject_lora(model, lora_rank=2)


def test_evaluation_of_a_model_is_what_keras_says():
    model = net()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(21, 8, 8, 3)).astype("float32") * 3
    y = rng.integers(0, 3, 21).astype("int32")
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)  # the last one is smaller
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss, metrics=["accuracy"])
    expected = model.evaluate(dataset, verbose=0)
    value = evaluate(model, dataset, labels=("cat", "dog", "eel"))
    np.testing.assert_allclose([value.loss, value.accuracy], expected, rtol=1e-5)
    assert value.labels == ("cat", "dog", "eel") and value.predictions[0].path is None
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    assert evaluate(model, iter(batches)).to_dict()["confusion"] == value.confusion.tolist()


def test_a_smaller_batch_is_filled_up_and_changes_nothing(monkeypatch):
    """A batch of another size would be traced or compiled anew."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])
    x, y = np.random.normal(size=(10, 6)).astype("float32"), np.arange(10) % 3
    sizes, original = [], model.predict_on_batch

    def predict_on_batch(batch):
        sizes.append(len(batch))
        return original(batch)

    monkeypatch.setattr(model, "predict_on_batch", predict_on_batch)
    parts = [(x[i:j], y[i:j]) for i, j in ((0, 4), (4, 8), (8, 10))]
    found = evaluate(model, parts, labels=("a", "b", "c"))
    assert sizes == [4, 4, 4] and found.confusion.sum() == 10
    logits = x.astype("float64") @ array(model.layers[-1].kernel).astype("float64")
    assert found.accuracy == np.mean(logits.argmax(1) == y)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(expected[np.arange(10), y]).mean()
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)


@pytest.fixture
def digits(tmp_path):
    return find_pictures(write_digits(tmp_path / "digits", each=5, size=8)).train


UNIT = Preprocessing((8, 8), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0)


def test_files_are_evaluated_and_predicted_alike_and_as_numpy_reads_them(digits, tmp_path):
    model, told = net(), []
    value = evaluate_pictures(
        model, digits, UNIT, batch_size=5, progress=lambda *numbers: told.append(numbers)
    )
    paths = [picture.path for picture in digits.pictures]
    assert [x.path for x in value.predictions] == paths
    assert [x.true for x in value.predictions] == [
        digits.labels[picture.label] for picture in digits.pictures
    ]
    assert told == [(5, 12), (10, 12), (12, 12)]
    # Of the size of the input, a picture is only divided by 255.
    x = np.stack([np.array(Image.open(path).convert("RGB")) for path in paths]) / 255
    expected = softmax(model.predict(x.astype("float32"), verbose=0))
    got = np.stack([p for _, p in predict_pictures(model, paths, UNIT, batch_size=5)])
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    of_true = [x.probability_of_true for x in value.predictions]
    labels = [picture.label for picture in digits.pictures]
    np.testing.assert_allclose(of_true, got[np.arange(12), labels], rtol=1e-4)


def test_unreadable_files_are_reported_between_the_others(digits, tmp_path):
    model = net()
    paths = [picture.path for picture in digits.pictures]
    whole = dict(predict_pictures(model, paths, UNIT))
    break_picture(paths[1])
    broken = [*paths, tmp_path / "none.png"]
    got = list(predict_pictures(model, broken, UNIT, batch_size=4))
    assert [path for path, _ in got] == [str(path) for path in broken]
    bad = [i for i, (_, result) in enumerate(got) if isinstance(result, UnreadablePicture)]
    assert bad == [1, 12]
    for path, result in got[2:12]:
        np.testing.assert_allclose(result, whole[path], rtol=1e-5)
    only = list(predict_pictures(model, [paths[1]], UNIT))
    assert len(only) == 1 and isinstance(only[0][1], UnreadablePicture)
    assert list(predict_pictures(model, [], UNIT)) == []


class Fixed:
    """A model that gives what it is told."""

    name = "fixed"

    def __init__(self, logits):
        self.logits = np.asarray(logits)

    def predict_on_batch(self, x):
        return self.logits


@pytest.mark.parametrize(
    "logits, y, labels, message",
    [
        ([[0.0, 1], [2, 0]], [0, 2], None, "labels from 0 to 2 for a model with 2 outputs"),
        ([[0.0, 1], [2, 0]], [-1, 0], None, "labels from -1"),
        ([[0.0, 1], [2, 0]], [0.0, 1.0], None, "type float64.*integers"),
        ([[0.0, 1], [2, 0]], [[0, 1], [1, 0]], None, r"shape \(2, 2\)"),
        ([[0.2, 0.8], [0.5, 0.5]], [0, 1], None, "returns probabilities; expected logits"),
        ([[np.nan, 1], [2, 0]], [0, 1], None, "NaN or infinity for 1 of 2"),
        ([[0.0, 1], [2, 0]], [0, 1], ("a", "b", "c"), "3 labels"),
        ([[0.0, 1], [2, 0]], [0, 1], ("a", "a"), "1 of them different"),
        ([[0.0], [2]], [0, 0], None, "two outputs"),
        ([0.0, 2], [0, 0], None, r"outputs of shape \(2,\) for 2 pictures"),
        ([[0.0, 1]], [0, 0], None, r"outputs of shape \(1, 2\) for 2 pictures"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(logits, y, labels, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Fixed(logits), [(np.zeros((2, 1)), np.array(y))], labels)


def test_datasets_without_pictures_and_without_end_are_refused():
    with pytest.raises(ValueError, match="without batches"):
        evaluate(Fixed([[0.0, 1]]), [])
    pictures, labels = np.zeros((1, 1)), np.zeros(1, int)
    endless = tf.data.Dataset.from_tensors((pictures, labels)).repeat()
    with pytest.raises(ValueError, match="infinite dataset"):
        evaluate(Fixed([[0.0, 1]]), endless)


@pytest.mark.long
def test_a_model_on_two_devices_is_evaluated_once():
    program = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import tfimm_lora as lora
from tfimm_lora.finetuning.evaluation import evaluate
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model = tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(3)])
model.layers[-1].set_weights([np.eye(3) * 9, np.zeros(3)])
x, y = np.eye(3, dtype="float32")[[0, 1, 2, 0, 1]], np.array([0, 1, 2, 2, 1])
value = evaluate(model, [(x[:4], y[:4]), (x[4:], y[4:])])
assert value.confusion.tolist() == [[1, 0, 0], [0, 2, 0], [1, 0, 1]], value.confusion
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- pictures -------------------------------------------------------------------------------

HISTORY = [
    {"accuracy": 0.4, "loss": 1.5, "val_accuracy": 0.5, "val_loss": 1.3},
    {"accuracy": 0.7, "loss": 0.9, "val_accuracy": 0.6, "val_loss": 1.1},
    {"accuracy": 0.9, "loss": 0.4, "val_accuracy": 0.6, "val_loss": 1.2},
]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def near(image, colour, within=40):
    """Where an image has about a colour."""
    return np.abs(image - np.array(colour)).sum(-1) < within


def assert_nothing_is_cut_off(image, paper):
    edges = [image[:3], image[-3:], image[:, :3], image[:, -3:]]
    for edge in edges:
        assert near(edge, paper, 10).all()
    assert not near(image, paper, 10).all()


@pytest.mark.parametrize("dark, paper", [(False, (255, 255, 255)), (True, (23, 27, 33))])
def test_plots_are_complete_for_few_and_for_many_classes(tmp_path, dark, paper):
    settings = dict(matplotlib.rcParams)
    for name, history, best in (("a", HISTORY, 2), ("b", HISTORY[:1], None)):
        draw_curves(history, tmp_path / f"{name}.png", best, dark=dark)
        assert_nothing_is_cut_off(pixels(tmp_path / f"{name}.png"), paper)
    sizes = {}
    for classes in (2, 200) if not dark else (13,):
        logits, true = outputs(n=3 * classes, classes=classes)
        labels = [
            f"$x_{i}^ {'a long name of a class' * (i % 3)}\n\x1b鳥" for i in range(classes)
        ]
        path = tmp_path / f"{classes}.png"
        draw_confusion(Evaluation.of(logits, true, labels), path, dark=dark)
        assert_nothing_is_cut_off(pixels(path), paper)
        sizes[classes] = pixels(path).shape
    assert max(max(shape) for shape in sizes.values()) < 2400
    assert dict(matplotlib.rcParams) == settings


def test_confusion_has_the_true_class_in_the_row_and_mistakes_in_orange(tmp_path):
    true, predicted = np.array([0] * 5 + [1] * 5), np.ones(10, int)
    value = Evaluation.of(np.eye(2)[predicted] * 9, true, ("cat", "dog"))
    draw_confusion(value, tmp_path / "c.png")
    image = pixels(tmp_path / "c.png")[:, :600]  # without the scale beside it
    rows, columns = np.nonzero(near(image, (0xD5, 0x5E, 0x00)))
    blue_rows, blue_columns = np.nonzero(near(image, (0x00, 0x72, 0xB2)))
    assert len(rows) > 10_000 and len(blue_rows) > 10_000
    assert np.median(rows) < np.median(blue_rows) - 100  # true "cat": the upper row
    assert abs(np.median(columns) - np.median(blue_columns)) < 20  # both taken for "dog"


def test_curves_show_what_was_measured(tmp_path):
    rising = [{"accuracy": i / 10, "val_accuracy": 1 - i / 10} for i in range(1, 10)]
    draw_curves(rising, tmp_path / "c.png")
    image = pixels(tmp_path / "c.png")
    image = image[: int(0.8 * len(image))]  # without the legend
    for colour, sign in (((0x00, 0x72, 0xB2), -1), ((0xD5, 0x5E, 0x00), 1)):
        rows, columns = np.nonzero(near(image, colour))
        # Downwards in a picture is less.
        assert sign * np.corrcoef(rows, columns)[0, 1] > 0.95
    with pytest.raises(ValueError, match="without epochs"):
        draw_curves([], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_mistakes_are_drawn_and_what_is_right_is_not(tmp_path):
    paths = []
    for name, colour in (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("lost", (9, 9, 9))):
        paths.append(str(tmp_path / f"{name}.png"))
        Image.new("RGB", (30, 20), colour).save(paths[-1])
    logits = np.eye(2)[[1, 0, 1]] * 5
    value = Evaluation.of(logits, np.array([0, 0, 0]), ("cat", "dog"), paths)
    break_picture(paths[2])
    draw_mistakes(value, tmp_path / "m.png")
    image = pixels(tmp_path / "m.png")
    assert near(image, (200, 0, 0)).sum() > 5000 and not near(image, (0, 200, 0), 20).any()
    assert_nothing_is_cut_off(image, (255, 255, 255))
    draw_mistakes(Evaluation.of(np.eye(2), np.arange(2), None, paths[:2]), tmp_path / "n.png")
    assert_nothing_is_cut_off(pixels(tmp_path / "n.png"), (255, 255, 255))
    with pytest.raises(ValueError, match="without the paths"):
        draw_mistakes(Evaluation.of(np.eye(2), np.arange(2)), tmp_path / "x.png")


def test_a_plot_is_written_completely_or_not_at_all(tmp_path):
    (tmp_path / "c.xyz").write_text("mine")
    with pytest.raises(ValueError, match="xyz"):
        draw_curves(HISTORY, tmp_path / "c.xyz")
    assert [x.name for x in tmp_path.iterdir()] == ["c.xyz"]
    assert (tmp_path / "c.xyz").read_text() == "mine"
    draw_curves(HISTORY, tmp_path / "c.svg")
    assert (tmp_path / "c.svg").read_text().startswith("<?xml")
    file = io.BytesIO()
    draw_curves(HISTORY, file)
    assert file.getvalue().startswith(b"\x89PNG")


# -- the report -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def evaluation(run):
    return evaluate_run(run)["val"]


class Page(HTMLParser):
    """What is on a page; an element that is not closed, or not opened, is an error."""

    VOID = ("meta", "img", "source", "br", "hr", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], Counter(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return "\n".join(self.texts)


def values(page, *names):
    return [value for _, name, value in page.attributes if name in names]


def assert_has_the_numbers(text, run, evaluation):
    for number in (
        percent(evaluation.accuracy),
        percent(evaluation.balanced_accuracy),
        percent(evaluation.calibration_error),
        f"{evaluation.loss:.3f}",
        f"{run.facts['trainable']:,} of {run.facts['parameters']:,} parameters",
        "rank 2 in 2 layers; head fully trained",
        f"{len(run.split.train)} for training, {len(run.split.val)} for validation",
        *(f"{scores.f1:.3f}" for scores in evaluation.classes),
        *LABELS,
    ):
        assert number in text, number


def test_the_report_is_complete_escaped_and_self_contained(run, evaluation):
    text = (run.path / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    addresses = values(page, "src", "srcset", "href", "action", "data", "poster")
    assert addresses and all(x.startswith(("data:image/", "#")) for x in addresses)
    assert not re.search(r"url\(|@import", text)
    ids = values(page, "id")
    assert len(set(ids)) == len(ids)
    assert all(x[1:] in ids for x in addresses if x.startswith("#"))
    assert_has_the_numbers(page.text, run, evaluation)
    assert len(page.texts) == len([x for x in page.texts if "\x1b" not in x])
    # Every mistake is there as a picture, and the broken file is listed.
    shown = len(evaluation.worst(24))
    explained = min(shown, 6)
    assert shown and page.tags["figure"] == shown + explained
    assert "Grad-CAM on layer 'conv' (3 x 3 places)" in page.text
    assert LIMITS in page.text
    assert "<b>0 & '0'.png" in page.text and run.skipped[0][1] in page.text
    assert f"tfimm-lora export {run.path} --out model.onnx" in page.text
    assert f"finetune --config {run.path}/config.yaml" in page.text
    assert len(text) < 1_500_000


def test_the_run_has_its_pictures_and_the_embedded_ones_open(run, evaluation):
    for name in ("curves.png", "confusion.png", "mistakes.png"):
        Image.open(run.path / name).verify()
    page = Page((run.path / "report.html").read_text(encoding="utf-8"))
    for uri in values(page, "src", "srcset"):
        kind, _, content = uri.partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(content)))
        image.load()
        assert kind == f"data:image/{image.format.lower()}"
        assert not image.getexif()


@pytest.fixture
def copy(run, evaluation, tmp_path):
    """The run in another place, to write other reports of it."""
    return Run.open(shutil.copytree(run.path, tmp_path / "copy"))


def test_a_report_without_mistakes_says_so(copy):
    logits = np.eye(3)[[0, 1, 2, 0]] * 9.0
    right = Evaluation.of(logits, np.array([0, 1, 2, 0]), LABELS, ["a", "b", "c", "d"])
    text = Page(write_report(copy, right).read_text(encoding="utf-8")).text
    assert "No mistakes among 4 pictures" in text and "No class was confused" in text


def test_the_report_says_that_a_model_has_learned_nothing(copy, evaluation):
    note = "Note: all pictures are classified as"
    assert note not in Page(write_report(copy, evaluation).read_text(encoding="utf-8")).text
    logits = np.tile([0.0, 9.0, 0.0], (4, 1))
    one = Evaluation.of(logits, np.array([0, 1, 2, 0]), LABELS, ["a", "b", "c", "d"])
    text = Page(write_report(copy, one).read_text(encoding="utf-8")).text
    assert f"{note} {LABELS[1]}. The model has learned nothing" in text


def test_pictures_that_are_gone_and_names_that_are_no_text_do_not_matter(copy):
    logits, gone = np.eye(3)[[0, 1]] * 9.0, ["a", "b\udcff"]
    wrong = Evaluation.of(logits, np.array([1, 2]), LABELS, gone)
    page = Page(write_report(copy, wrong).read_text(encoding="utf-8"))
    assert page.text.count("cannot be read now") == 2 and "b\\udcff" in page.text


def test_few_pictures_are_explained_at_once_and_all_of_them():
    """Gradients keep all activations of the pictures of a batch."""
    layers, rng = keras.layers, np.random.default_rng(0)
    model = keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.GlobalAveragePooling2D()]
    )
    model.build((None, 8, 8, 3))
    pictures = rng.integers(0, 255, (5, 8, 8, 3), dtype="uint8")
    plain, sizes = Preprocessing((8, 8), (0.0,) * 3, (1.0,) * 3, crop_pct=1.0), []
    convolution = model.layers[0]
    original = convolution.call
    convolution.call = lambda x: sizes.append(len(x)) or original(x)
    explained, found = explain_pictures(model, [(x, 1) for x in pictures], plain)
    assert max(sizes) == 2 and len(explained) == len(found.maps) == 5
    convolution.call = original
    for picture, one in zip(pictures, found.maps):
        alone = explain_pictures(model, [(picture, 1)], plain)[1].maps[0]
        np.testing.assert_allclose(one, alone, atol=1e-5)


def test_a_report_is_the_same_every_time_and_left_alone_after_an_error(run, copy, evaluation):
    path, first = copy.path / "report.html", (run.path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="without the paths"):
        write_report(copy, Evaluation.of(np.eye(3), np.array([1, 1, 1]), LABELS))
    assert path.read_bytes() == first
    assert write_report(copy, evaluation) == path
    # Its folder is all that differs.
    assert path.read_bytes().replace(str(copy.path).encode(), str(run.path).encode()) == first


# -- in a browser ---------------------------------------------------------------------------


def browse(address, tmp_path, *options):
    """The page as Chromium has it in the end, what its console said, what it asked for."""
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--disable-default-apps", "--enable-logging=stderr"),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            *options,
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    told = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser asks for things of its own, which no page has started.
    by_pages = [x for x in told if x.get("initiator", "not an origin") != "not an origin"]
    return done.stdout, console, {x["url"] for x in by_pages}


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_the_report_and_asks_for_nothing(run, evaluation, tmp_path):
    path = run.path / "report.html"
    dom, console, asked = browse(path.as_uri(), tmp_path)
    assert_has_the_numbers(Page(dom).text, run, evaluation)
    assert console == [] and asked == set()
    # So that the above means something: a page that does what the report must not.
    bad = tmp_path / "bad.html"
    bad.write_text('<img src="http://127.0.0.1:9/x.png"><script>console.error("no")</script>')
    _, console, asked = browse(bad.as_uri(), tmp_path)
    assert console and asked == {"http://127.0.0.1:9/x.png"}


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [360, 1200])
def test_the_report_fits_its_window(run, evaluation, tmp_path, width):
    report = (run.path / "report.html").as_uri()
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<body><iframe src="{report}" width={width} height=900 style="border:0"></iframe>'
        "<script>onload = () => { const page = frames[0].document.documentElement;"
        "document.body.dataset.found = page.scrollWidth + ' ' + page.scrollHeight }</script>"
    )
    dom, _, _ = browse(outer.as_uri(), tmp_path, "--allow-file-access-from-files")
    found = re.search(r'data-found="(\d+) (\d+)"', dom)
    assert int(found[1]) <= width and int(found[2]) > 2000
