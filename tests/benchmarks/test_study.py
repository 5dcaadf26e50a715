"""The study of methods and settings: its plan, its pictures, its page, and a short run."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.kerases import LEGACY

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "benchmarks" / "study"
MODULES = (
    "plan",
    "results",
    "study",
    "runs",
    "tasks",
    "page",
    "checkpoints",
    "_data",
    "_weights",
)


@pytest.fixture
def study(monkeypatch):
    """Imports a module of the study."""
    monkeypatch.syspath_prepend(str(STUDY))
    yield __import__
    for name in MODULES:
        sys.modules.pop(name, None)


def result_of(accuracy, loss=1.0):
    return {
        "val_accuracy": accuracy,
        "val_loss": loss,
        "test_accuracy": accuracy,
        "trained": 10,
        "parameters": 100,
        "seconds": 5.0,
    }


def carry_out(plan, module, accuracy):
    """Results for all runs of a plan, from a function of (run)."""
    results = {}
    while due := plan.due(results):
        for run in due:
            results[run] = result_of(*accuracy(run))
    return results


@pytest.mark.once
def test_rates_are_tried_outward_until_the_best_is_not_at_an_edge(study):
    plan = study("plan")
    small = plan.Plan(
        methods=("everything", plan.REFERENCE),
        main=(),
        other_tasks=(),
        other_models=(),
        large_methods=(),
        kinds=(),
        settings=(),
    )
    # The best rate is above the first three of LoRA, and below those of full fine-tuning.
    best = {"everything": 3e-5, plan.REFERENCE: 1e-2}

    def accuracy(run):
        return 0.9 - 0.1 * abs(np.log10(run.rate / best[run.job.method])), 1.0

    results = carry_out(small, plan, accuracy)
    tried = {m: sorted({r.rate for r in results if r.job.method == m}) for m in best}
    assert tried == {
        "everything": [3e-5, 1e-4, 3e-4, 1e-3],
        plan.REFERENCE: [1e-3, 3e-3, 1e-2, 3e-2],
    }
    for method, rate in best.items():
        assert small.best_rate(method, results) == rate
        for task in plan.TASKS:
            at_best = {r.seed for r in results if r.job.task == task and r.rate == rate}
            assert at_best == set(plan.SEEDS)
    # Other rates have the first seed only.
    assert {r.seed for r in results if r.rate not in best.values()} == {0}


@pytest.mark.once
def test_at_equal_accuracy_the_lower_loss_decides(study):
    plan = study("plan")
    small = plan.Plan(methods=(plan.REFERENCE,), main=(), other_models=(), settings=())
    small = study("dataclasses").replace(small, large_methods=(), kinds=())
    results = carry_out(small, plan, lambda run: (0.5, abs(run.rate - 3e-3)))
    assert small.best_rate(plan.REFERENCE, results) == 3e-3


@pytest.mark.once
def test_all_methods_tasks_models_and_settings_are_run(study):
    plan = study("plan")
    results = carry_out(plan.Plan(), plan, lambda run: (0.5, abs(np.log10(run.rate / 3e-3))))
    jobs = {run.job for run in results}
    assert {job.method for job in jobs} == set(plan.RATES)
    assert {job.task for job in jobs} == {
        *(*plan.TASKS, *plan.OTHER_TASKS, *plan.KINDS, plan.LARGE)
    }
    assert {job.model for job in jobs} == {plan.MODEL, *plan.OTHER_MODELS}
    for settings in plan.SETTINGS:
        for task in plan.TASKS:
            assert plan.Plan().job(task, plan.REFERENCE, **settings) in jobs
    assert {job.size for job in jobs if job.task.endswith("digits")} == {48}


@pytest.mark.once
def test_pictures_of_a_run(study, tmp_path):
    tasks, plan = study("tasks"), study("plan")
    first, again, other = (tasks.data("digits", s, 16, tmp_path) for s in (0, 0, 1))
    for a, b in zip(first[:3], again[:3]):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])
    (x, y), (val_x, val_y), (test_x, test_y) = first[:3]
    assert x.shape == (720, 16, 16, 3) and len(val_x) == 179 and len(test_x) == 898
    assert x.dtype == np.uint8 and y.dtype == np.int32 and first.classes == 10
    # All classes in proportion.
    assert np.ptp(np.bincount(val_y)) <= 2
    # Other seeds have other pictures to train with, and the same to test.
    assert not np.array_equal(other.train[0], x)
    np.testing.assert_array_equal(np.sort(other.test[1]), np.sort(test_y))

    def rows(pictures):
        return {p.tobytes() for p in pictures}

    assert not rows(x) & rows(val_x)
    job = plan.Job("digits", plan.REFERENCE, epochs=3, batch=32)
    order = tasks.order_of(len(x), job, 0).reshape(3, -1)
    assert order.shape[1] == 704 and all(len(set(epoch)) == 704 for epoch in order)
    assert not np.array_equal(order[0], order[1])


@pytest.mark.once
def test_pictures_of_other_tasks(study, tmp_path):
    tasks = study("tasks")
    labelled = tasks.data("properties of digits", 0, 16, tmp_path)
    turned = tasks.data("angles of digits", 0, 16, tmp_path)
    assert [part[1].shape for part in labelled[:3]] == [(720, 3), (179, 3), (898, 3)]
    assert (labelled.kind, labelled.classes) == ("multilabel", 3)
    assert set(np.unique(labelled.train[1])) == {0, 1} and labelled.train[0].dtype == np.uint8
    assert (turned.kind, turned.classes, turned.train[1].shape) == ("regression", 1, (720, 1))
    (x, y), _, (test_x, test_y), classes, kind = tasks.data(
        "digits on photographs", 0, tasks.PASTED, tmp_path
    )
    assert (classes, kind, x.shape, y.shape) == (
        *(3, "segmentation", (720, 96, 96, 3), (720, 96, 96)),
    )
    assert len(test_x) == len(test_y) == 300 and set(np.unique(y)) == {0, 1, 2}
    # All pixels of a digit have one colour and one class.
    for picture, mask in zip(x[:5], y[:5]):
        assert len(np.unique(mask)) == 2 and len(np.unique(picture[mask > 0], axis=0)) == 1
    assert 20 < turned.train[1].std() < 30 and np.abs(turned.test[1]).max() <= 45


@pytest.mark.once
def test_the_tables_of_the_page(study, tmp_path):
    plan, page = study("plan"), study("page")
    small = plan.Plan(
        methods=("everything", plan.REFERENCE, "LoRA, rank 1"),
        main=("everything", plan.REFERENCE),
        large_methods=(),
    )
    level = {"everything": 0.8, plan.REFERENCE: 0.9, "LoRA, rank 1": 0.5}
    level["LoRA, rank 4"] = 0.5  # of the former defaults
    jitter = {s: 0.001 * (s - 2) for s in plan.SEEDS}

    def accuracy(run):
        tasks = [*plan.TASKS, *plan.OTHER_TASKS, *plan.KINDS]
        task = 0.01 * tasks.index(run.job.task)
        # The difference between two methods depends on the seed.
        factor = 1 + (run.job.method == "everything")
        return level[run.job.method] + task + factor * jitter[run.seed], abs(run.rate - 1e-3)

    results = carry_out(small, plan, accuracy)
    study_page = page.Study(small, results)
    table = study_page.methods_table().splitlines()
    assert table[0].split(" | ")[1:4] == list(plan.TASKS)
    everything = next(line for line in table if line.startswith("| everything"))
    # The interval, from the formula: t sd / sqrt(n).
    error = 2.78 * statistics.stdev(100 * j for j in jitter.values()) / 5**0.5
    assert f"\N{MINUS SIGN}10.0 ± {error:.1f}" in everything
    assert everything.split(" | ")[1:5] == ["80.0", "81.0", "82.0", "**81.0**"]
    assert study_page.settings_table().count("\n") == 1 + 1 + len(plan.SETTINGS)
    before, since = study_page.defaults_table().splitlines()[2:]
    assert before.startswith("| before |") and before.endswith("|  |")
    assert since.startswith("| since |") and "+40.0 ± 0.0" in since
    markers = [f"<!-- {n} -->\nold\n<!-- end of {n} -->" for n, _ in study_page.parts()]
    (tmp_path / "explanation").mkdir()
    target = tmp_path / "explanation" / "study.md"
    target.write_text("\n".join(["before", *markers, "after"]))
    page.write(small, results, tmp_path)
    text = target.read_text()
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert "Not measured yet." in text  # the large task
    svg = (tmp_path / "images" / "study.svg").read_text()
    page.write(small, results, tmp_path)
    assert (tmp_path / "images" / "study.svg").read_text() == svg


@pytest.mark.once
def test_searches_are_compared_with_the_best_of_the_grid(study, tmp_path):
    plan, page, lines = study("plan"), study("page"), study("results")
    methods = ("LoRA, rank 4", plan.REFERENCE, "LoRA, rank 16")
    small = study("dataclasses").replace(
        plan.QUICK, methods=methods, tasks=plan.TASKS, seeds=plan.SEEDS
    )

    def accuracy(run):
        rank = int(run.job.method.rpartition(" ")[2])
        return 0.7 + 0.01 * run.seed + 0.001 * rank - abs(run.rate - 3e-3), 1.0

    results = carry_out(small, plan, accuracy)
    assert page.Study(small, results).search_table() == ""
    assert not any(table for _, table in page.Study(small, {}).parts())  # nothing is done yet
    for task in small.tasks:
        for seed in plan.SEARCH_SEEDS:
            values = {"task": task, "seed": seed, "search_seconds": 2.0}
            for name, more in (("best", 0.0), ("together", 0.02), ("mean update", -0.01)):
                accuracy = 0.716 + 0.01 * seed + more + 0.005 * (seed == 1)
                values[name] = {"accuracy": accuracy, "calibration_error": 0.1 + more}
            lines.write_line(tmp_path / "s.jsonl", values)
    searches = lines.read_searches(tmp_path / "s.jsonl")
    table = page.Study(small, results, searches).search_table()
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| ")][2:]
    assert rows[0][0] == "| the best of the grid (LoRA, rank 16, 0.003)"
    assert [row[4] for row in rows] == ["**72.6**", "**72.8**", "**74.8**", "**71.8**"]
    # The differences are 0, 0.5 and 0: t sd / sqrt(n) = 4.3 * 0.2887 / 1.732.
    assert [row[5] for row in rows[1:]] == [
        "+0.2 ± 0.7",
        "+2.2 ± 0.7",
        "\N{MINUS SIGN}0.8 ± 0.7",
    ]
    assert [row[6][:5] for row in rows[1:]] == ["0.100", "0.120", "0.090"]
    runs = sum(run.seed == 0 for run in results)
    assert f"The grid has {runs // 3} trainings for each task." in table
    assert f"took {100 * 6 / (5 * runs):.0f} % of its processor time" in table


@pytest.mark.once
def test_results_are_lines_that_are_read_again(study, tmp_path):
    plan, results = study("plan"), study("results")
    run = plan.Run(plan.Plan().job("stamps", plan.REFERENCE, epochs=20), 3e-3, 2)
    results.write_result(
        tmp_path / "r.jsonl", run, {"rate": 3e-3, "seed": 2, **result_of(0.123456789)}
    )
    ((read, values),) = results.read_results(tmp_path / "r.jsonl").items()
    assert read == run and values["val_accuracy"] == 0.12346


@pytest.mark.once
def test_names_of_torchvision_become_those_of_timm(study):
    name = study("checkpoints").mobilenet_name
    for theirs, timm in {
        "features.0.0.weight": "conv_stem.weight",
        "features.0.1.bias": "bn1.bias",
        "features.1.conv.0.0.weight": "blocks.0.0.conv_dw.weight",
        "features.1.conv.1.weight": "blocks.0.0.conv_pw.weight",
        "features.1.conv.2.running_var": "blocks.0.0.bn2.running_var",
        "features.2.conv.0.0.weight": "blocks.1.0.conv_pw.weight",
        "features.2.conv.1.1.weight": "blocks.1.0.bn2.weight",
        "features.3.conv.2.weight": "blocks.1.1.conv_pwl.weight",
        "features.17.conv.3.bias": "blocks.6.0.bn3.bias",
        "features.18.0.weight": "conv_head.weight",
        "features.18.1.weight": "bn2.weight",
        "classifier.1.bias": "classifier.bias",
    }.items():
        assert name(theirs) == timm


@pytest.mark.skipif(not LEGACY, reason="of a tfimm model")
@pytest.mark.parametrize("method", ["everything", "LoRA, rank 8"])
def test_statistics_of_batch_normalization_change_where_the_method_says_so(study, method):
    from tests.helpers.tiny_architectures import ARCHITECTURES

    methods = study("methods").METHODS
    x = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
    trained = {}
    for name in (method, f"{method.partition(',')[0]}, statistics too"):
        model = ARCHITECTURES["resnet"].make()
        methods[name].prepare(model, (x, np.zeros(8, "int32")), lambda x: x)
        before = {w.name: w.numpy() for w in model.weights}
        model(x, training=True)
        changed = {w.name for w in model.weights if (w.numpy() != before[w.name]).any()}
        assert bool(changed) == name.endswith("too")
        assert all("moving_" in key for key in changed)
        trained[name] = len(model.trainable_weights)
    one, other = trained.values()
    assert (one < other) == (method != "everything")


@pytest.mark.skipif(not LEGACY, reason="of a tfimm model")
def test_a_seed_may_have_weights_of_other_shapes(study, monkeypatch, tmp_path):
    """As with EVA, whose ranks depend on the pictures."""
    import tensorflow as tf

    plan, runs, tasks = study("plan"), study("runs"), study("tasks")
    widths, made = {0: 3, 1: 5, 2: 3}, []

    def prepared(self, parts, seed):
        made.append(seed)
        self.preprocess = lambda x: tf.cast(x, "float32") / 255
        layers = tf.keras.layers
        model = tf.keras.Sequential(
            [
                tf.keras.Input((4, 4, 3)),
                layers.Flatten(),
                layers.Dense(widths[seed], kernel_initializer="ones"),
                layers.Dense(2),
            ]
        )
        model.layers[1].bias.assign_add(tf.fill((widths[seed],), float(seed)))
        return model

    x, y = np.zeros((100, 4, 4, 3), "uint8"), np.zeros(100, "int32")
    parts = tasks.Data((x, y), (x, y), (x, y), 2)
    monkeypatch.setattr(runs.Runs, "prepared", prepared)
    monkeypatch.setattr(runs, "data", lambda *args: parts)
    trainer = runs.Runs(plan.Job("digits", "everything", size=4, epochs=5, batch=20), tmp_path)
    for seed in (0, 1, 2, 0):
        trainer.run(0.0, seed)  # with a rate of 0 the weights stay
        bias = trainer.model.layers[1].bias.numpy()
        assert bias.shape == (widths[seed],) and (bias == seed).all()
    assert made == [0, 1, 2]  # the last has the shapes of the first, too


@pytest.mark.once
def test_pictures_are_loaded_before_processes_start(study, monkeypatch, tmp_path):
    """Several processes would download the same files at the same time."""
    program, plan = study("study"), study("plan")
    small = study("dataclasses").replace(plan.QUICK, tasks=("garments", "stamps"))
    loaded = []

    class Source:
        def __init__(self, name):
            self.name = name

        def load(self, downloads):
            loaded.append((self.name, downloads))

    def start(*args, **kwargs):
        raise ChildProcessError

    monkeypatch.setattr(program, "TASKS", {name: Source(name) for name in small.tasks})
    monkeypatch.setattr(program.concurrent.futures, "ProcessPoolExecutor", start)
    monkeypatch.setattr(study("checkpoints"), "write_checkpoint", lambda *args: None)
    args = SimpleNamespace(minutes=1, processes=2, work=tmp_path, results=tmp_path / "r.jsonl")
    with pytest.raises(ChildProcessError):
        program.do_runs(small, args)
    assert sorted(loaded) == [(name, tmp_path / "downloads") for name in small.tasks]


@pytest.mark.nightly
@pytest.mark.skipif(not LEGACY, reason="of a tfimm model")
def test_a_short_search(tmp_path):
    program = [sys.executable, str(STUDY / "searches.py"), "--quick", "--seeds", "0"]
    program += ["--results", str(tmp_path / "s.jsonl"), "--work", str(tmp_path / "work")]
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}

    def run():
        return subprocess.run(program, capture_output=True, text=True, env=environment)

    # The study writes the checkpoint.
    quick = [sys.executable, str(STUDY / "study.py"), "--quick", "--minutes", "0"]
    quick += ["--results", str(tmp_path / "r.jsonl"), "--work", program[-1]]
    (tmp_path / "explanation").mkdir()
    shutil.copy(ROOT / "docs" / "explanation" / "study.md", tmp_path / "explanation")
    written = subprocess.run(
        [*quick, "--out", str(tmp_path)], capture_output=True, text=True, env=environment
    )
    if "is not installed" in written.stderr or "are not installed" in written.stderr:
        pytest.skip(written.stderr.splitlines()[-1])
    assert written.returncode == 0, written.stderr[-3000:]
    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    first = (tmp_path / "s.jsonl").read_text()
    found = json.loads(first)
    assert (found["task"], found["seed"], len(found["settings"])) == ("digits", 0, 3)
    # Three different models: one setting, several, and the mean of their updates.
    scores = [found[name] for name in ("best", "together", "mean update")]
    assert all(0.3 < x["accuracy"] <= 1 for x in scores)
    assert len({x["loss"] for x in scores}) == 3
    assert run().returncode == 0  # there is nothing left to do
    assert (tmp_path / "s.jsonl").read_text() == first


@pytest.mark.nightly
@pytest.mark.skipif(not LEGACY, reason="of a tfimm model")
def test_a_short_study_is_continued(tmp_path):
    (tmp_path / "docs" / "explanation").mkdir(parents=True)
    page = ROOT / "docs" / "explanation" / "study.md"
    (tmp_path / "docs" / "explanation" / "study.md").write_text(page.read_text())
    program = [sys.executable, str(STUDY / "study.py"), "--quick"]
    program += ["--results", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "docs")]
    program += ["--work", str(tmp_path / "work")]

    def run(*more):
        environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
        return subprocess.run(
            [*program, *more], capture_output=True, text=True, env=environment
        )

    done = run()
    if "is not installed" in done.stderr or "are not installed" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(lines) >= 6 and f"all {len(lines)} runs done" in done.stdout
    assert {json.loads(line)["seed"] for line in lines} == {0}
    # Without the last two, only these are done again, with the same results.
    (tmp_path / "r.jsonl").write_text("\n".join(lines[:-2]) + "\n")
    assert run().returncode == 0

    def without_times(text):
        return {json.dumps({**json.loads(line), "seconds": 0}) for line in text}

    again = (tmp_path / "r.jsonl").read_text().splitlines()
    assert without_times(again) == without_times(lines)
    assert again[:-2] == lines[:-2]
