"""Training on several devices and machines: the same result, and clear ends."""

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import tfimm_lora as lora
from tests.helpers.kerases import BACKEND, LEGACY, keras
from tests.helpers.picture_folders import write_digits
from tfimm_lora.finetuning.metrics_csv import read_metrics
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures

ROOT = Path(__file__).parents[2]
#: Seconds after which a process of a test has failed.
PATIENCE = 300

needs_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")


# -- a small run, and processes --------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small saved models, 25 pictures to train on and 9 to validate on."""
    root = tmp_path_factory.mktemp("data")
    layers = keras.layers
    for name, rate in (("model", 0.1), ("plain", 0.0)):
        keras.utils.set_random_seed(3)
        keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                layers.Conv2D(8, 3, strides=2, activation="relu", name="conv"),
                layers.BatchNormalization(name="bn"),
                layers.Dropout(rate, name="drop"),
                layers.Flatten(name="flatten"),
                layers.Dense(16, activation="relu", name="fc"),
                layers.Dense(7, activation="softmax", name="head"),
            ]
        ).save(root / f"{name}.keras")
    write_digits(root / "digits" / "train", labels=range(3), each=9, size=16)
    for label in "02":
        (root / "digits" / "train" / label / "0.png").unlink()
    write_digits(root / "digits" / "val", labels=range(3), each=3, size=16)
    return root


def settings(folder, name="plain", **options):
    return {
        "model": str(folder / f"{name}.keras"),
        "data": str(folder / "digits"),
        "normalisation": "unit",
        "epochs": 3,
        "batch_size": 10,
        "learning_rate": 0.01,
        "augmentation": "light",
        "balanced": True,
        "lora": {"lora_rank": 2},
        **options,
    }


def start(*command, **environ):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
    )


def ended(*processes):
    """The exit codes of processes and what they said, when all have ended by themselves."""
    try:
        # At once: one that nobody listens to would wait with its pipe full, and the others
        # for it.
        with ThreadPoolExecutor() as pool:
            said = list(pool.map(lambda p: p.communicate(timeout=PATIENCE), processes))
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said)]


def adapter_of(run):
    adapter = lora.Adapter.load(run / "adapter")
    arrays = {f"{k}/{x}": getattr(v, x) for k, v in adapter.layers.items() for x in "ab"}
    return {**arrays, **adapter.weights}


def assert_close(one, two, names):
    """Sums in another order: the last digits of float32, which Adam's divisions enlarge."""
    a, b = (read_metrics(run / "metrics.csv") for run in (one, two))
    assert len(a) == len(b) == 3
    for name in names:
        first, second = ([numbers[name] for numbers in rows] for rows in (a, b))
        np.testing.assert_allclose(second, first, rtol=1e-4, err_msg=name)
    first, second = adapter_of(one), adapter_of(two)
    assert first.keys() == second.keys() and first
    for key in first:
        np.testing.assert_allclose(second[key], first[key], rtol=1e-3, atol=1e-4)


VALIDATION = ("val_loss", "val_accuracy")
ALL = ("loss", "accuracy", *VALIDATION)


# -- several devices of one machine ----------------------------------------------------------

DEVICES = """
import json, os, sys
import tensorflow as tf
settings, strategy, out = json.loads(sys.argv[1]), *sys.argv[2:]
if strategy == "mirrored":
    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
for batch in (8, 10):
    for name in ("none", strategy):
        recipe = Recipe.from_dict({**settings, "batch_size": batch, "strategy": name})
        said = []
        finetune_pictures(recipe, f"{out}/{name}-{batch}", say=said.append, verbose="none")
        assert ("training on 2 devices" in said) == (name != "none"), said
"""


def train_on_devices(folder, out, strategy, **environ):
    given = json.dumps(settings(folder))
    [(code, _, errors)] = ended(start("-c", DEVICES, given, strategy, out, **environ))
    assert code == 0, errors[-3000:]
    # Last batches of 5 pictures, on which the devices have 3 and 2, and of a single one.
    return [[out / f"{name}-{batch}" for name in ("none", strategy)] for batch in (10, 8)]


@pytest.mark.long
@needs_tensorflow
def test_two_mirrored_devices_train_as_one_does(folder, tmp_path):
    five, single = train_on_devices(folder, tmp_path, "mirrored")
    assert_close(*five, ALL)
    # Where a device would have nothing it has the picture again, with weight 0. Keras'
    # numbers of the training, but nothing else, count it.
    assert_close(*single, VALIDATION)


@pytest.mark.long
@pytest.mark.backends
@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
def test_data_parallel_devices_of_jax_train_as_one_does(folder, tmp_path):
    flags = "--xla_force_host_platform_device_count=2"
    for runs in train_on_devices(folder, tmp_path, "data-parallel", XLA_FLAGS=flags):
        assert_close(*runs, VALIDATION)


# -- several workers -------------------------------------------------------------------------

WORKER = """
import json, os, sys
import numpy as np
from tfimm_lora.cli import main
from tfimm_lora.finetuning import training
from tfimm_lora.finetuning.distributed.cluster import Cluster
from tfimm_lora.finetuning.data.dataset import find_pictures
from tfimm_lora.finetuning.data.batches import PictureBatches
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures
from tfimm_lora.finetuning.distributed.strategy import open_strategy

plain, other, mine, shared = *map(json.loads, sys.argv[1:3]), *sys.argv[3:]
worker = Cluster.from_environment().index
finetune_pictures(Recipe.from_dict(plain), f"{mine}/plain", verbose="none")
run = finetune_pictures(Recipe.from_dict(other), f"{mine}/whole", verbose="none")

devices = open_strategy("multiworker")
pictures = find_pictures(other["data"]).train
batches = PictureBatches(pictures, run.preprocessing, 10)
epoch, _ = devices.training(batches, 0, None)
seen = []
for batch in devices.strategy.experimental_distribute_dataset(epoch.take(3)):
    [x], y, [weight] = map(devices.strategy.experimental_local_results, batch)
    assert (weight.numpy() > 0).all()
    seen.append(x.numpy())
assert os.path.isdir(mine) == (worker == 0)
np.savez(f"{shared}/seen-{worker}", *seen)

end = training._EpochRecorder._end
def die(self, epoch, logs=None):
    end(self, epoch, logs)
    if worker == 1 and epoch == 0:
        os.kill(os.getpid(), 9)
training._EpochRecorder._end = die
arguments = ["finetune", "--config", f"{mine}/whole/config.yaml", "--out", f"{shared}/run"]
if worker:
    arguments[2] = arguments[2].replace(mine, f"{shared}/0")
sys.exit(main(arguments))
"""


def free_addresses(count):
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    addresses = ["{}:{}".format(*door.getsockname()) for door in doors]
    for door in doors:
        door.close()
    return addresses


def tf_config(addresses, index):
    task = {"type": "worker", "index": index}
    return json.dumps({"cluster": {"worker": addresses}, "task": task})


def start_workers(*commands):
    addresses = free_addresses(len(commands))
    numbered = enumerate(commands)
    return [start(*c, TF_CONFIG=tf_config(addresses, i)) for i, c in numbered], addresses


@pytest.mark.long
@pytest.mark.skipif(not LEGACY, reason="Keras 3 cannot")
def test_two_workers_train_as_one_device_and_resume_after_a_kill(folder, tmp_path):
    plain = settings(folder, strategy="multiworker")
    other = settings(folder, "model", strategy="multiworker")
    other["lora"]["lora_dropout"] = 0.1
    program = ["-c", WORKER, json.dumps(plain), json.dumps(other)]
    workers, addresses = start_workers(
        *([*program, tmp_path / str(i), tmp_path] for i in range(2))
    )
    chief, killed = ended(*workers)
    assert killed[0] == -signal.SIGKILL, killed[2][-3000:]
    assert chief[0] == 1, chief[2][-3000:]
    last = chief[2].strip().splitlines()[-1]
    assert last.startswith("error: Worker 0 of 2 cannot continue"), chief[2][-3000:]
    assert f"worker 1 ({addresses[1]}) has ended" in last and "--resume" in last

    # Each picture of an epoch was seen by one of them, in the batches of one device.
    seen = [np.load(tmp_path / f"seen-{i}.npz") for i in range(2)]
    sizes = [[len(x) for x in shard.values()] for shard in seen]
    assert sizes == [[5, 5, 3], [5, 5, 2]]
    shards = [{x.tobytes() for batch in shard.values() for x in batch} for shard in seen]
    assert len(shards[0]) == 13 and len(shards[1]) == 12 and not shards[0] & shards[1]

    finetune_pictures(Recipe.from_dict(settings(folder)), tmp_path / "one", verbose="none")
    assert_close(tmp_path / "one", tmp_path / "0" / "plain", ALL)

    run, whole = tmp_path / "run", tmp_path / "0" / "whole"
    assert len(read_metrics(run / "metrics.csv")) == 1
    resume = ["-m", "tfimm_lora", "finetune", "--out", run, "--resume", "--json"]
    workers, _ = start_workers(resume, resume)
    for code, out, errors in ended(*workers):
        assert code == 0, errors[-3000:]
        assert "resuming the run" in errors
        assert ("accuracy" in json.loads(out)) == ("epoch 2/3" in errors)
    first, second = adapter_of(whole), adapter_of(run)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    assert (run / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert (run / "report.html").is_file()
    assert not [path for path in tmp_path.rglob("*worker*")]
