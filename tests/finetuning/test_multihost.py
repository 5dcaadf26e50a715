"""Training in several JAX processes: the result of one process, and clear ends."""

import json
import signal

import numpy as np
import pytest

import tfimm_lora as lora
from tests.finetuning.test_distributed import (
    ALL,
    adapter_of,
    assert_close,
    ended,
    folder,
    free_addresses,
    settings,
    start,
)
from tests.helpers.kerases import BACKEND, keras
from tfimm_lora.finetuning.distributed.devices import Devices
from tfimm_lora.finetuning.distributed.processes import process_settings
from tfimm_lora.finetuning.distributed.strategy import check_strategy
from tfimm_lora.finetuning.metrics_csv import read_metrics
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures

assert folder is not None  # the fixture

needs_jax = pytest.mark.skipif(BACKEND != "jax", reason="of JAX")


def start_processes(*commands, **environ):
    (address,) = free_addresses(1)
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    return [
        start(
            *command,
            **environ,
            **{
                f"KERAS_DISTRIBUTION_{name}": str(value)
                for name, value in zip(names, (address, len(commands), i))
            },
        )
        for i, command in enumerate(commands)
    ]


# -- settings --------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    "values",
    [
        ("10.0.0.1:80", "2", ""),
        ("10.0.0.1:80", "2", "2"),
        ("10.0.0.1", "2", "0"),
        ("10.0.0.1:80", "two", "0"),
        ("10.0.0.1:80,10.0.0.2:80", "3", "0"),
    ],
)
def test_impossible_variables_are_reported(values):
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    environ = {f"KERAS_DISTRIBUTION_{n}": v for n, v in zip(names, values)}
    with pytest.raises(ValueError, match="KERAS_DISTRIBUTION_JOB_ADDRESSES=10.*expected"):
        process_settings(environ)


@pytest.mark.once
def test_without_variables_jax_looks_for_a_cluster():
    assert process_settings({}) is None


@pytest.mark.skipif(BACKEND == "jax", reason="of other frameworks")
def test_the_strategy_needs_jax():
    with pytest.raises(ValueError, match="KERAS_BACKEND=jax"):
        check_strategy("multihost")


def agree(mine, other):
    """As process 0 of two, of which process 1 has other settings."""
    rows = []

    class Recording(Devices):
        workers = 2

        def _gathered(self, numbers):
            rows.append(numbers)
            return np.stack([numbers, numbers])

    class Process(Devices):
        workers = 2

        def _gathered(self, numbers):
            return np.stack([numbers, rows.pop(0)])

    Recording().agree("recipe", other)
    Process().agree("recipe", mine)


@pytest.mark.once
def test_processes_with_different_settings_are_refused():
    settings = {"rate": 0.1, "labels": ("a", "b"), "seed": 0}
    agree(settings, dict(reversed(settings.items())))
    with pytest.raises(ValueError, match="worker 1 has another labels, seed than worker 0"):
        agree(settings, {**settings, "labels": ("b", "a"), "seed": 1})
    with pytest.raises(ValueError, match="worker 1 has another list of settings"):
        agree(settings, {"rate": 0.1})


# -- training --------------------------------------------------------------------------------


class Numbers:
    """Batches of 6, 6 and 4 examples in even epochs, and of 6, 6 and 3 in odd ones."""

    steps_per_epoch = 3

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x = rng.normal(size=(16, 8)).astype("float32")
        self.y = rng.integers(0, 3, 16).astype("int32")

    def epochs(self, first):
        epoch = first
        while True:
            order = np.random.default_rng(epoch).permutation(16 - epoch % 2)
            for i in (0, 6, 12):
                chosen = order[i : i + 6]
                yield self.x[chosen], self.y[chosen]
            epoch += 1


def train_small(distribution=None, out=None):
    """Losses and weights of a small model, trained in the scope of a distribution."""
    if distribution is not None:
        keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", name="fc"),
            keras.layers.Dropout(0.2, name="drop"),
            keras.layers.Dense(3, name="head"),
        ]
    )
    lora.inject_lora(model, lora_rank=2, lora_targets=["fc"], lora_train_classifier=True)
    data = Numbers()
    trained = lora.finetune(
        model,
        data,
        epochs=2,
        class_weight={0: 1.0, 1: 2.0, 2: 0.5},
        out=out,
        verbose="none",
    )
    return trained, [np.asarray(v) for v in model.trainable_variables]


SMALL = """
import json, sys
import keras
from tests.finetuning.test_multihost import train_small

keras.distribution.initialize()
trained, weights = train_small(keras.distribution.DataParallel(), sys.argv[1])
print(json.dumps([trained.history, [w.tolist() for w in weights]]))
"""


@pytest.mark.backends
@needs_jax
def test_finetune_in_two_processes_is_that_in_one(tmp_path):
    outs = [tmp_path / str(i) for i in range(2)]
    processes = start_processes(*(["-c", SMALL, out] for out in outs))
    expected, weights = train_small()
    for code, said, errors in ended(*processes):
        assert code == 0, errors[-3000:]
        history, found = json.loads(said.strip().splitlines()[-1])
        # In its mean of an odd epoch Keras counts the place that was filled up.
        np.testing.assert_allclose(history[0]["loss"], expected.history[0]["loss"], rtol=1e-5)
        for value, wanted in zip(found, weights, strict=True):
            np.testing.assert_allclose(value, wanted, atol=1e-5)
    assert (outs[0] / "adapter").is_dir() and not outs[1].exists()


PROCESS = """
import json, os, sys
from tfimm_lora.cli import main
from tfimm_lora.finetuning import training
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures

plain, other, out = *map(json.loads, sys.argv[1:3]), sys.argv[3]
process = int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"])
for differs in ({"seed": process}, {"data": plain["data"] + "/train" * process}):
    try:
        finetune_pictures(Recipe.from_dict({**plain, **differs}), f"{out}/none")
    except ValueError as error:
        print("refused:", error, file=sys.stderr)
for name, values in (("plain", plain), ("whole", other)):
    finetune_pictures(Recipe.from_dict(values), f"{out}/{name}", verbose="none")

end = training._EpochRecorder._end
def die(self, epoch, logs=None):
    end(self, epoch, logs)
    if process == 1 and epoch == 0:
        os.kill(os.getpid(), 9)
training._EpochRecorder._end = die
config = f"{out}/whole/config.yaml"
sys.exit(main(["finetune", "--config", config, "--out", f"{out}/run"]))
"""


@pytest.mark.long
@needs_jax
def test_two_processes_train_as_one_and_resume_after_a_kill(folder, tmp_path):
    plain = settings(folder, strategy="multihost", seed=0)
    other = settings(folder, "model", strategy="multihost", batch_size=8)
    other["lora"]["lora_dropout"] = 0.1
    command = ["-c", PROCESS, json.dumps(plain), json.dumps(other), tmp_path]
    chief, killed = ended(*start_processes(command, command))
    assert killed[0] == -signal.SIGKILL, killed[2][-3000:]
    assert chief[0] == 1, chief[2][-3000:]
    last = [line for line in chief[2].splitlines() if line.startswith("error: ")][-1]
    assert last.startswith("error: Process 0 of 2 cannot continue: process 1 has ended")
    assert "--resume" in last
    for _, _, errors in (chief, killed):
        refused = [line for line in errors.splitlines() if line.startswith("refused: ")]
        assert "worker 1 has another seed" in refused[0] and len(refused) == 2
        assert "worker 1 has another" in refused[1] and "train, " in refused[1]
    assert not (tmp_path / "none").exists()

    for name, made in (("plain", plain), ("whole", other)):
        one = Recipe.from_dict({**made, "strategy": "none"})
        finetune_pictures(one, tmp_path / f"one-{name}", verbose="none")
        expected, found = (
            read_metrics(tmp_path / run / "metrics.csv") for run in (f"one-{name}", name)
        )
        # With dropout too: the mask of a batch does not depend on how it is divided.
        for numbers, wanted in zip(found, expected, strict=True):
            for metric in ("loss", "val_loss"):
                np.testing.assert_allclose(numbers[metric], wanted[metric], rtol=1e-5)
        assert_close(tmp_path / f"one-{name}", tmp_path / name, ALL)

    run, whole = tmp_path / "run", tmp_path / "whole"
    assert len(read_metrics(run / "metrics.csv")) == 1
    resume = ["-m", "tfimm_lora", "finetune", "--out", run, "--resume", "--json"]
    for code, said, errors in ended(*start_processes(resume, resume)):
        assert code == 0, errors[-3000:]
        assert "resuming the run" in errors
        assert ("accuracy" in json.loads(said)) == ("epoch 2/3" in errors)
    first, second = adapter_of(whole), adapter_of(run)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (run / "report.html").is_file()


FAILS = """
import os, sys
from tfimm_lora.finetuning.distributed import processes, strategy

strategy.PATIENCE = 5.0
process = os.environ["KERAS_DISTRIBUTION_PROCESS_ID"]
with processes.noted_failure():
    strategy.is_chief("multihost")
    if process == "1":
        raise ValueError("a picture of this process")
    devices = strategy.open_strategy("multihost")
    with devices.together():
        devices.agree("recipe", {})
"""


@pytest.mark.long
@needs_jax
def test_a_process_that_fails_or_is_missing_ends_the_others():
    command = ["-c", FAILS]
    waiting, failed = ended(*start_processes(command, command))
    assert failed[0] == waiting[0] == 1
    assert "ValueError: a picture of this process" in failed[2]
    assert "RuntimeError: Process 0 of 2 cannot continue" in waiting[2]
    (alone, _) = start_processes(command, ["-c", ""])
    [(code, _, errors)] = ended(alone)
    assert code == 1
    assert "error: Process 0 of 2 has waited 5 seconds for the others" in errors
