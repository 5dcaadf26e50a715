"""The VTAB-1k benchmark on small synthetic folders."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.vtab import __main__ as command
from benchmarks.vtab import methods, protocol, tasks
from benchmarks.vtab.pictures import TrainingBatches, read, read_in_order
from benchmarks.vtab.protocol import Settings
from benchmarks.vtab.table import PUBLISHED, table
from benchmarks.vtab.tasks import BOTH, CLASSES, GROUPS, TEST, TRAIN, VAL, find_task

#: Most of these tests train nothing.
once = pytest.mark.once

COUNTS = {"train800": 12, "val200": 6, "test": 9}
HERE = {"device": "CPU", "keras": "3", "framework": "none"}


def write_folder(folder, classes):
    """A task whose label is the brightest channel."""
    rng = np.random.default_rng(0)
    lines = {}
    for part, count in COUNTS.items():
        (folder / "images" / part).mkdir(parents=True)
        lines[part] = []
        for i in range(count):
            pixels = rng.integers(0, 60, (20, 28, 3)).astype("uint8")
            pixels[..., i % classes] += 150
            path = f"images/{part}/{i}.png"
            Image.fromarray(pixels).save(folder / path)
            lines[part].append(f"{path} {i % classes}")
    lines["train800val200"] = lines["train800"] + lines["val200"]
    for part, listed in lines.items():
        (folder / f"{part}.txt").write_text("\n".join(listed) + "\n")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    data = tmp_path_factory.mktemp("vtab-1k")
    write_folder(data / "patch_camelyon", 2)
    write_folder(data / "cifar", 3)  # its name in archives
    return data


@pytest.fixture
def data(written, tmp_path):
    return shutil.copytree(written, tmp_path / "data")


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


# -- folders -------------------------------------------------------------------------------


@once
def test_the_tasks_are_those_of_vtab():
    assert [len(group) for group in GROUPS.values()] == [7, 4, 8]
    assert len(CLASSES) == 19


@once
def test_lists_are_read(data):
    task = find_task("cifar100", data)
    part = task.part(TEST)
    assert part.labels == (0, 1, 2) * 3 and task.classes == 100
    assert part.paths[4] == data / "cifar" / "images" / "test" / "4.png"
    change(task.folder / TEST, "images/test/4.png 1", "images/test/4 4.png   1 ")
    assert task.part(TEST).paths[4].name == "4 4.png"


@once
@pytest.mark.parametrize(
    "file, old, new, error, message",
    [
        (TEST, "0.png 0", "0.png 2", ValueError, "label from 0 to 1"),
        (TRAIN, "0.png 0", "0.png", ValueError, "label from 0 to 1"),
        (TEST, "0.png 0", "0.png -1", ValueError, "label from 0 to 1"),
        (BOTH, "train800/0.png 0", "train800/0.png 1", ValueError, "do not fit"),
        (TEST, "images/test/0.png", "images/val200/0.png", ValueError, "in two parts"),
        (TEST, "test/0.png", "test/00.png", FileNotFoundError, "1 pictures .*/00.png"),
    ],
)
def test_wrong_lists_are_refused(data, file, old, new, error, message):
    change(data / "patch_camelyon" / file, old, new)
    with pytest.raises(error, match=message):
        find_task("patch_camelyon", data)


@once
def test_a_missing_folder_or_list_is_named(data):
    with pytest.raises(FileNotFoundError, match="lacks the folder of the task 'dtd'"):
        find_task("dtd", data)
    (data / "cifar" / VAL).unlink()
    with pytest.raises(FileNotFoundError, match="lacks val200.txt"):
        find_task("cifar100", data)


# -- pictures ------------------------------------------------------------------------------


@once
@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_pictures_are_resized_without_cropping(tmp_path, mode):
    """A grey picture, black on the left and white on the right."""
    pixels = np.zeros((30, 60), "uint8")
    pixels[:, 30:] = 255
    Image.fromarray(pixels).convert(mode).save(tmp_path / "x.png")
    small = read(tmp_path / "x.png", 10)
    assert small.shape == (10, 10, 3) and small.dtype == np.uint8
    assert np.all(small[:, :4] == 0) and np.all(small[:, 6:] == 255)
    ((inputs, _),) = read_in_order(tasks.Part((tmp_path / "x.png",), (0,)), 10, 4)
    black, white = inputs[0, 0, 0], inputs[0, 0, -1]
    np.testing.assert_allclose(black, [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], 1e-5)
    np.testing.assert_allclose(white, [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225], 1e-5)


@once
def test_each_epoch_has_every_picture_once(written):
    part = find_task("cifar100", written).part(TRAIN)

    def epochs(seed, first, count):
        batches = TrainingBatches(part, 8, 5, seed)
        assert batches.steps_per_epoch == 3
        stream = iter(batches.epochs(first))
        found = [[next(stream) for _ in range(3)] for _ in range(count)]
        assert [len(y) for _, y in found[0]] == [5, 5, 2]
        return [[np.concatenate([np.asarray(z) for z in xs]) for xs in zip(*e)] for e in found]

    (x0, y0), (x1, _) = epochs(0, 0, 2)
    assert sorted(y0) == sorted(part.labels)
    # The label is the brightest channel, so pictures and labels stay together.
    assert np.array_equal(x0.mean((1, 2)).argmax(-1), y0)
    assert not np.array_equal(x0, x1) and np.array_equal(np.sort(x0, 0), np.sort(x1, 0))
    assert np.array_equal(epochs(0, 1, 1)[0][0], x1)
    assert not np.array_equal(epochs(1, 0, 1)[0][0], x0)


#: Pictures of this size keep TensorFlow's thread busy when Python ends.
ENDS_EARLY = """
import sys
from benchmarks.vtab.pictures import TrainingBatches
from benchmarks.vtab.tasks import TRAIN, find_task

part = find_task("cifar100", sys.argv[1]).part(TRAIN)
iterator = iter(TrainingBatches(part, 224, 5, 0).epochs(0))
print(next(iterator)[0].shape)
"""


@once
@pytest.mark.long
def test_python_ends_although_batches_are_left(written):
    done = subprocess.run(
        [sys.executable, "-c", ENDS_EARLY, str(written)],
        env={**os.environ, "TF_USE_LEGACY_KERAS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "(5, 224, 224, 3)\n" and done.returncode == 0, done.stderr


# -- the protocol, with a model that is as good as its learning rate ------------------------


class Fake:
    """Recognizes the brightest channel after training with the rate 0.1; else the darkest."""

    trained = ()

    def predict_on_batch(self, x):
        return x.mean((1, 2)) * (1 if self.rate == 0.1 else -1)


@pytest.fixture
def trainings(monkeypatch):
    """The number of pictures and the rate of each training."""
    done = []

    def train(net, batches, *, rate, **_):
        if rate > 1:
            raise FloatingPointError
        net.rate = rate
        done.append((len(batches.labels), rate))

    monkeypatch.setattr(methods, "create", lambda *_, **__: Fake())
    monkeypatch.setattr(methods, "train", train)
    monkeypatch.setattr(methods, "parameters", lambda *_: {})
    return done


def run(task, path, rates=(0.01, 0.1, 0.2), here=HERE, **changes):
    settings = Settings(
        method="lora",
        arguments={},
        rates=rates,
        decays=(0.0,),
        alphas=(8.0,),
        model="fake",
        weights=None,
        size=8,
        epochs=1,
        warmup=0,
        **changes,
    )
    protocol.run(
        task,
        settings,
        0,
        path,
        described=settings.described(None),
        environment=here,
        report=lambda line: None,
    )
    return json.loads(path.read_text())


@once
def test_settings_are_chosen_by_validation_and_tested_once(
    written, tmp_path, trainings, monkeypatch
):
    task, reading = find_task("cifar100", written), []
    monkeypatch.setattr(
        tasks.Task, "part", lambda self, file, part=tasks.Task.part: (
            reading.append(file) or part(self, file)
        )
    )  # fmt: skip
    result = run(task, tmp_path / "lora.json")
    assert trainings == [(12, 0.01), (12, 0.1), (12, 0.2), (18, 0.1)]
    assert reading == [TRAIN, VAL] * 3 + [BOTH, TEST]
    assert [trial["accuracy"] for trial in result["trials"]] == [0, 1, 0]
    assert result["chosen"] == {"learning_rate": 0.1, "weight_decay": 0.0, "alpha": 8.0}
    assert result["test"] == {"accuracy": 1.0, "count": 9}


@once
def test_wrong_test_labels_do_not_change_the_choice(data, tmp_path, trainings):
    file = data / "cifar" / TEST
    file.write_text("".join(line[:-1] + "7\n" for line in file.read_text().splitlines()))
    result = run(find_task("cifar100", data), tmp_path / "lora.json")
    assert result["chosen"]["learning_rate"] == 0.1
    assert result["test"]["accuracy"] == 0


@once
def test_of_equal_trials_the_first_is_chosen_and_diverged_ones_do_not_count(
    written, tmp_path, trainings
):
    task = find_task("cifar100", written)
    result = run(task, tmp_path / "a.json", rates=(2.0, 0.02, 0.01))
    assert result["chosen"]["learning_rate"] == 0.02
    assert result["trials"][0]["accuracy"] is None
    with pytest.raises(ValueError, match="All 2 trials have diverged"):
        run(task, tmp_path / "b.json", rates=(2.0, 3.0))


@once
def test_an_interrupted_run_continues(written, tmp_path, trainings, monkeypatch):
    task, path, train = find_task("cifar100", written), tmp_path / "lora.json", methods.train

    def interrupted(net, batches, *, rate, **_):
        if rate == 0.2:
            raise KeyboardInterrupt
        train(net, batches, rate=rate)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(task, path)
    before = path.read_text()
    with pytest.raises(ValueError, match="another environment: device=CPU, now GPU"):
        run(task, path, here={**HERE, "device": "GPU"})
    assert path.read_text() == before and "test" not in json.loads(before)
    result = run(task, path)
    assert trainings == [(12, 0.01), (12, 0.1), (12, 0.2), (18, 0.1)]
    # A finished one is not run again, wherever it was run.
    assert run(task, path, here={**HERE, "device": "GPU"}) == result
    assert len(trainings) == 4


@once
def test_other_settings_or_pictures_are_refused(data, tmp_path, trainings):
    path = tmp_path / "lora.json"
    result = run(find_task("cifar100", data), path)
    with pytest.raises(ValueError, match=r"another settings: batch=64, now 32"):
        run(find_task("cifar100", data), path, batch=32)
    change(data / "cifar" / TEST, "0.png 0", "0.png 1")
    with pytest.raises(ValueError, match="another settings: lists="):
        run(find_task("cifar100", data), path)
    assert json.loads(path.read_text()) == result and len(trainings) == 4


# -- the table -----------------------------------------------------------------------------


def finished(accuracies, name="lora", seed=0, **settings):
    """Results by file name, from accuracies in percent."""
    made = {}
    for task, accuracy in accuracies.items():
        described = {"task": task, "seed": seed, "lists": task, "model": "vit", "weights": None}
        made[f"{name}-{task}-{seed}.json"] = {
            "settings": {**described, "size": 224, "epochs": 100, **settings},
            "environment": HERE,
            "trials": [],
            "test": {"accuracy": accuracy / 100},
        }
    return made


def cells(text, row):
    (line,) = [x for x in text.splitlines() if x.startswith(f"| {row} |")]
    return [x.strip() for x in line.split("|")[2:-1]]


@once
def test_the_table_has_means_of_complete_results_only():
    values = dict(zip(CLASSES, np.linspace(40, 90, 19)))
    half = dict(list(values.items())[:18])
    results = {**finished(values), **finished(half, "linear")}
    del results["linear-svhn-0.json"]["test"]
    text = table(results)
    assert cells(text, "Task") == ["lora", "linear"]
    assert cells(text, "cifar100") == ["40.0", "40.0"]
    assert cells(text, "svhn") == [f"{values['svhn']:.1f}", "unfinished"]
    assert cells(text, "smallnorb_ele") == ["90.0", "missing"]
    listed = np.array(list(values.values()))
    groups = [listed[:7].mean(), listed[7:11].mean(), listed[11:].mean()]
    assert cells(text, "**Mean over tasks**") == [f"{listed.mean():.1f}", "incomplete"]
    assert cells(text, "**Mean over groups**") == [f"{np.mean(groups):.1f}", "incomplete"]
    assert cells(text, "V-PETL Bench, over tasks") == ["72.3", "52.9"]
    assert "FacT 73.2" in text and "- lora: vit, weights random, 224 pixels" in text
    assert set(PUBLISHED) == set(methods.METHODS)


@once
def test_the_table_has_the_deviation_over_seeds():
    first, second = ({task: value for task in CLASSES} for value in (50.0, 54.0))
    results = {**finished(first, "dora"), **finished(second, "dora", seed=1)}
    text = table(results)
    assert cells(text, "dtd") == ["52.0 ± 2.8"]  # sqrt(8)
    assert cells(text, "**Mean over tasks**") == ["52.0 ± 2.8"]
    assert cells(text, "V-PETL Bench, over tasks") == [""]
    del results["dora-dtd-1.json"]
    assert cells(table(results), "**Mean over tasks**") == ["incomplete"]


@once
def test_a_column_with_different_settings_is_refused():
    results = {**finished({"dtd": 50}), **finished({"svhn": 50}, epochs=10)}
    with pytest.raises(ValueError, match="epochs=100 and 10"):
        table(results)


# -- the command line ----------------------------------------------------------------------


@once
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--lora", "use_dora=True"], "without --name"),
        (["--lora", "use_dora", "--name", "dora"], "expected NAME=VALUE"),
        (["--lora", "alpha=16", "--name", "x"], "expected --alphas"),
        (["--methods", "linear", "--alphas", "1"], "expected method lora"),
        (["--name", "x", "--methods", "lora", "full"], "expected one"),
        (["--name", "full"], "expected another name"),
    ],
)
def test_contradicting_options_are_refused(data, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        command.main(["--data", str(data), "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


@once
def test_fields_of_lora_config_are_options():
    options = ["--out", "out", "--lora", "rank=16", "targets=all", "lora_qkv=None"]
    args = command._parser().parse_args([*options, "--name", "all", "--rates", "1e-3"])
    settings = command._settings("lora", args)
    assert settings.arguments == {"lora_rank": 16, "lora_targets": "all", "lora_qkv": None}
    assert settings.alphas == (16.0,) and settings.rates == (1e-3,)
    args = command._parser().parse_args(["--out", "x", "--name", "y", "--lora", "rnk=1"])
    with pytest.raises(TypeError, match="lora_rnk"):
        command._settings("lora", args)


@once
def test_weights_on_disk_are_named_without_their_folder(tmp_path):
    file = tmp_path / "vit.safetensors"
    file.write_bytes(b"abc")
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert command._weights_name(str(file)) == f"vit.safetensors {expected}"
    assert command._weights_name(str(tmp_path)) == f"{tmp_path.name} {expected}"
    assert command._weights_name("timm/vit") == "timm/vit"
