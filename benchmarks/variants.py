"""Compare the accuracy of the variants of LoRA on shifted digits.

    TF_USE_LEGACY_KERAS=1 python benchmarks/variants.py [--quick] [--out FOLDER]

A small ViT that was trained on upright digits is adapted to rotated, inverted, noisy digits, of
which few are labelled. The rate of each method is selected by validation on separate seeds, by
the same rule for all. docs/explanation/variants.md describes the method, and its table is
rewritten. An interrupted run continues: finished parts are kept in the folder of --work until
all are done.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import variants_page

import tfimm_lora as lora

import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras
from sklearn.datasets import load_digits  # isort: skip
from sklearn.model_selection import train_test_split  # isort: skip
from tfimm.architectures.vit import ViT, ViTConfig  # isort: skip
from tfimm_lora.model.merge import lora_layers  # isort: skip
from tfimm_lora.training.loraplus import loraplus_optimizer  # isort: skip

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that the numbers depend on."""

    seeds: tuple = (0, 1, 2, 3, 4, 5, 6, 7)
    validation_seeds: tuple = (100, 101)
    #: The rates are 10 ** (k / 3) for these k, and for the next ones outward as long as the
    #: best is at an edge.
    grid: tuple = (-8, -7, -6, -5)
    width: int = 64
    blocks: int = 2
    test: int = 600
    per_class: int = 40
    noise: float = 0.2
    batch: int = 20
    epochs: int = 20
    source_epochs: int = 15
    source_rate: float = 4e-3
    timed: int = 30
    jit: bool = True


QUICK = Setting(
    seeds=(0, 1),
    validation_seeds=(100,),
    grid=(-7, -6),
    width=16,
    blocks=1,
    epochs=3,
    source_epochs=2,
    timed=3,
    jit=False,
)


# -- the methods -------------------------------------------------------------------------


def every_weight(source, data):
    model = new_model(source.cfg)
    lora.transfer_weights(source, model)
    return model


def classifier_alone(source, data):
    """The LoRA layers are frozen with all that is in them; everything else is anyway."""
    model = adapted(source, lora_targets=["blocks/0/mlp/fc1"])
    for layer in lora_layers(model).values():
        layer.trainable = False
    return model


def bitfit(source, data):
    """Biases and classifier. One layer must have LoRA; its A is zero and frozen, so that the
    gradient of its B is zero as well."""
    return adapted(
        source,
        lora_rank=1,
        lora_targets=["blocks/0/attn/proj"],
        lora_initializer="zeros",
        lora_freeze_a=True,
        lora_train_bias="all",
    )


def eva(source, data):
    model = adapted(source, lora_init="eva")
    pictures, _ = data
    lora.initialize_eva(model, [pictures])
    return model


def adapted(source, **arguments):
    arguments = {"lora_rank": 8, "lora_train_classifier": True, **arguments}
    return lora.convert_to_lora_model(source, **arguments)


def with_lora(**arguments):
    return lambda source, data: adapted(source, **arguments)


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is made that starts where the source model is, and how it is trained."""

    make: object
    optimizer: object = lambda model, schedule: tf.keras.optimizers.Adam(schedule)
    callback: object = None
    #: Variables that are never moved though Keras counts them as trained.
    idle: str | None = None
    #: Whether a compiled model serves for all runs.
    reused: bool = True


def loraplus(model, schedule):
    return loraplus_optimizer(model, tf.keras.optimizers.Adam(schedule), ratio=16)


def allocator(model, steps):
    """From rank 12 to a mean of 8, and a third of the training after that."""
    return lora.RankAllocator(model, 8, end=2 * steps // 3, warmup=steps // 10)


METHODS = {
    "every weight": Method(every_weight),
    "classifier only": Method(classifier_alone),
    "BitFit": Method(bitfit, idle="kernel_lora_b"),
    "LoRA, rank 1": Method(with_lora(lora_rank=1)),
    "LoRA, rank 2": Method(with_lora(lora_rank=2)),
    "LoRA, rank 4": Method(with_lora(lora_rank=4)),
    "LoRA, rank 8": Method(with_lora()),
    "LoRA, rank 16": Method(with_lora(lora_rank=16)),
    "rsLoRA": Method(with_lora(lora_use_rslora=True, lora_alpha=8)),
    "DoRA": Method(with_lora(lora_use_dora=True)),
    "PiSSA": Method(with_lora(lora_init="pissa")),
    "OLoRA": Method(with_lora(lora_init="olora")),
    "EVA": Method(eva, reused=False),
    "LoRA+": Method(with_lora(), optimizer=loraplus),
    "LoRA-FA": Method(with_lora(lora_freeze_a=True)),
    "RankAllocator": Method(with_lora(lora_rank=12), callback=allocator),
}
REFERENCE, FULL = "LoRA, rank 8", "every weight"


# -- pictures and source models ----------------------------------------------------------


def pictures(setting, seed):
    """Upright digits for the source model, shifted ones to train and to test on: three sets
    of digits without one in common."""
    digits = load_digits()
    upright = (digits.images[..., None] / 8 - 1).astype("float32")
    noise = np.random.default_rng(seed).normal(0, setting.noise, upright.shape)
    shifted = (noise - np.rot90(upright, axes=(1, 2))).astype("float32")
    labels = digits.target.astype("int32")

    def split(indices, size):
        return train_test_split(
            indices, test_size=size, stratify=labels[indices], random_state=seed
        )

    rest, test = split(np.arange(len(labels)), setting.test)
    known, train = split(rest, 10 * setting.per_class)
    return {
        "source": (upright[known], labels[known]),
        "train": (shifted[train], labels[train]),
        "test": (shifted[test], labels[test]),
        "upright": (upright[test], labels[test]),
    }


def config(setting):
    return ViTConfig(
        name="digits",
        url="",
        nb_classes=10,
        in_channels=1,
        input_size=(8, 8),
        patch_size=2,
        embed_dim=setting.width,
        nb_blocks=setting.blocks,
        nb_heads=4,
    )


def new_model(cfg):
    model = ViT(cfg)
    model(model.dummy_inputs)
    return model


def accuracy(model, data):
    x, y = data
    return float(np.mean(model(x, training=False).numpy().argmax(-1) == y))


def train_sources(setting, work):
    """A source model for each seed, in a file; and how good it is."""
    found = {}
    trained = None
    for seed in (*setting.seeds, *setting.validation_seeds):
        data = pictures(setting, seed)
        tf.keras.utils.set_random_seed(seed)
        fresh = new_model(config(setting))
        steps = setting.source_epochs * (len(data["source"][0]) // setting.batch)
        trained = trained or Trained(Method(every_weight), fresh, steps, setting)
        trained.restart(fresh, setting.source_rate)
        trained.fit(data["source"], seed, steps)
        np.savez(work / f"source-{seed}.npz", *trained.model.get_weights())
        found[seed] = {k: accuracy(trained.model, data[k]) for k in ("upright", "test")}
    return found


def load_source(setting, work, seed):
    model = new_model(config(setting))
    with np.load(work / f"source-{seed}.npz") as file:
        model.set_weights([file[name] for name in file.files])
    return model


# -- training ----------------------------------------------------------------------------


class Cosine(tf.keras.optimizers.schedules.LearningRateSchedule):
    """Up in the first tenth, then a cosine to zero; the peak can be set."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.peak = tf.Variable(0.0, trainable=False)

    def __call__(self, step):
        done = (tf.cast(step, "float32") + 1) / self.steps
        return self.peak * tf.minimum(10 * done, 0.5 * (1 + tf.cos(math.pi * done)))


class Trained:
    """A model that is compiled once, and trained anew from other starts."""

    def __init__(self, method, model, steps, setting):
        self.method, self.model, self.setting = method, model, setting
        self.steps = steps
        self.schedule = Cosine(steps)
        self.model.compile(
            method.optimizer(model, self.schedule),
            tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=10,
            jit_compile=setting.jit,
        )

    def restart(self, fresh, rate):
        """Take over the weights of a new model, and forget the last training."""
        self.model.set_weights(fresh.get_weights())
        for variable in self.model.optimizer.variables:
            variable.assign(tf.zeros_like(variable))
        self.schedule.peak.assign(rate)

    def fit(self, data, seed, steps, callbacks=()):
        """Whole epochs come as one for Keras, which spends time on the end of each."""
        x, y = data
        tf.keras.utils.set_random_seed(seed)
        batches = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed)
        batches = batches.batch(self.setting.batch, drop_remainder=True).repeat()
        if self.method.callback:
            callbacks = [self.method.callback(self.model, self.steps), *callbacks]
        self.model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=list(callbacks))

    def trained_parameters(self):
        counts = 0
        for variable in self.model.trainable_weights:
            if self.method.idle and self.method.idle in variable.name:
                assert not np.any(variable.numpy()), f"{variable.name} was trained"
            else:
                counts += int(tf.size(variable))
        return counts


class Runs:
    """The runs of one method."""

    def __init__(self, name, setting, work):
        self.method, self.setting, self.work = METHODS[name], setting, work
        self.trained = None
        self.steps = setting.epochs * (10 * setting.per_class // setting.batch)

    def start(self, seed, rate):
        data = pictures(self.setting, seed)
        source = load_source(self.setting, self.work, seed)
        tf.keras.utils.set_random_seed(seed)
        fresh = self.method.make(source, data["train"])
        if self.trained is None or not self.method.reused:
            self.trained = Trained(self.method, fresh, self.steps, self.setting)
        self.trained.restart(fresh, rate)
        x, _ = data["test"]
        difference = np.abs(self.trained.model(x) - source(x)).max()
        assert difference < 1e-3, f"starts {difference:g} away from the source model"
        return data

    def accuracy(self, seed, rate):
        data = self.start(seed, rate)
        self.trained.fit(data["train"], seed, self.steps)
        return accuracy(self.trained.model, data["test"])

    def choose(self):
        """Every rate that was tried, as its exponent, with its accuracies; the best one."""
        tried = {}
        due = list(self.setting.grid)
        while due:
            for k in due:
                tried[k] = [self.accuracy(s, rate_of(k)) for s in self.setting.validation_seeds]
            best = max(tried, key=lambda k: (statistics.mean(tried[k]), -k))
            due = [k for k in (best - 1, best + 1) if k not in tried]
        return tried, best

    def step_time(self):
        """Time of ten steps over that of training every weight, in turn."""
        full = every_weight_compiled(self.setting, self.work)
        data = self.start(self.setting.seeds[0], 0.0)
        clock = Clock(full, data["train"], self.setting.batch)
        self.trained.fit(data["train"], 0, 10 * (self.setting.timed + 1), [clock])
        low, median, high = statistics.quantiles(clock.ratios[1:], n=4)
        return {"median": median, "low": low, "high": high}


@functools.cache
def every_weight_compiled(setting, work):
    """For comparison, once in a process."""
    runs = Runs(FULL, setting, work)
    data = runs.start(setting.seeds[0], 0.0)
    runs.trained.fit(data["train"], 0, 10)
    return runs.trained.model


def rate_of(exponent):
    return 10 ** (exponent / 3)


class Clock(tf.keras.callbacks.Callback):
    """Times each execution of a training against one of another model, right after it."""

    def __init__(self, other, data, batch):
        super().__init__()
        self.other, self.ratios = other, []
        self.batches = iter(tf.data.Dataset.from_tensor_slices(data).batch(batch).repeat())

    def on_train_batch_begin(self, batch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        own = time.perf_counter() - self.started
        started = time.perf_counter()
        float(self.other.train_function(self.batches)["loss"])
        self.ratios.append(own / (time.perf_counter() - started))


def measure(name, setting, work):
    """Everything about one method."""
    started = time.perf_counter()
    runs = Runs(name, setting, work)
    tried, best = runs.choose()
    reported = [runs.accuracy(seed, rate_of(best)) for seed in setting.seeds]
    second = {}
    if name == REFERENCE:  # to see what the choice of a rate does to all differences
        other = max((k for k in tried if k != best), key=lambda k: statistics.mean(tried[k]))
        again = [runs.accuracy(seed, rate_of(other)) for seed in setting.seeds]
        second = {"second": {"rate": rate_of(other), "accuracy": again}}
    return {
        **second,
        "rate": rate_of(best),
        "validation": {f"{rate_of(k):.4g}": tried[k] for k in sorted(tried)},
        "accuracy": reported,
        "trained": runs.trained.trained_parameters(),
        "parameters": load_source(setting, work, setting.seeds[0]).count_params(),
        "step": runs.step_time(),
        "seconds": time.perf_counter() - started,
    }


# -- all of them -------------------------------------------------------------------------


def one_thread():
    """Two processes on two cores get further than two threads of a small model."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def kept(path, setting, make):
    """What a function gives, or gave in a run with the same setting that was ended."""
    described = json.loads(json.dumps(dataclasses.asdict(setting)))
    if path.exists():
        known = json.loads(path.read_text())
        if known["setting"] == described:
            return known["result"]
    result = json.loads(json.dumps(make()))
    path.write_text(json.dumps({"setting": described, "result": result}))
    return result


def kept_sources(setting, work):
    return kept(work / "sources.json", setting, lambda: train_sources(setting, work))


def kept_method(name, setting, work):
    file = work / f"{name.replace(' ', '-').replace(',', '')}.json"
    return kept(file, setting, lambda: measure(name, setting, work))


def summary(results):
    """Means, deviations, and differences from LoRA of rank 8 on the same seeds."""
    reference = results[REFERENCE]["accuracy"]
    table = {}
    for name, result in results.items():
        table[name] = {
            **result,
            "share": result["trained"] / result["parameters"],
            **against(reference, result["accuracy"]),
        }
        if "second" in result:
            second = result["second"]
            table[name]["second"] = {**second, **against(reference, second["accuracy"])}
    return table


def against(reference, accuracies):
    differences = [a - b for a, b in zip(accuracies, reference)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "mean": statistics.mean(accuracies),
        "std": statistics.stdev(accuracies),
        "difference": {"mean": statistics.mean(differences), "error": error},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="for the page")
    parser.add_argument("--work", type=Path, default=ROOT / ".experiment", help="until done")
    args = parser.parse_args()
    setting = QUICK if args.quick else Setting()
    args.work.mkdir(parents=True, exist_ok=True)
    names = [n for n in METHODS if n in args.methods or n == REFERENCE]
    started = time.perf_counter()
    with concurrent.futures.ProcessPoolExecutor(
        args.processes, multiprocessing.get_context("spawn"), one_thread
    ) as pool:
        sources = pool.submit(kept_sources, setting, args.work).result()
        print(f"source models after {time.perf_counter() - started:.0f} s", flush=True)
        futures = {pool.submit(kept_method, n, setting, args.work): n for n in names}
        results = {}
        for future in concurrent.futures.as_completed(futures):
            name, result = futures[future], future.result()
            results[name] = result
            print(
                f"{name:<16} {statistics.mean(result['accuracy']):.1%} at the rate "
                f"{result['rate']:.2g} after {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    everything = {
        "setting": dataclasses.asdict(setting),
        "reference": REFERENCE,
        "sources": sources,
        "methods": summary({name: results[name] for name in names}),
    }
    variants_page.write(everything, args.out)
    shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
