"""The protocol: choose the settings on 200 pictures, train on all 1,000, test once."""

import dataclasses
import itertools
import time

import numpy as np

from . import methods
from .pictures import TrainingBatches, read_in_order
from .results import as_json, check_same, read_result, write_result
from .tasks import BOTH, TEST, TRAIN, VAL

#: The pictures in a batch of validation and test.
_TEST_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that a result depends on, apart from task, seed and environment.

    Attributes:
        method: A name in ``methods.METHODS``.
        arguments: Its lora_* keywords.
        rates, decays, alphas: The grid: learning rates, weight decays and ``lora_alpha``.
        model: The name of the model.
        weights: The source of its weights, None for random ones.
        size, epochs, warmup, batch: Height and width of the pictures, epochs, epochs of warm-up
            and pictures in a batch.
    """

    method: str
    arguments: dict
    rates: tuple
    decays: tuple
    alphas: tuple
    model: str
    weights: str | None
    size: int = 224
    epochs: int = 100
    warmup: int = 10
    batch: int = 64

    def grid(self):
        """Every combination of the settings to choose from, in order."""
        keys = ("learning_rate", "weight_decay", "alpha")
        return [
            dict(zip(keys, values))
            for values in itertools.product(self.rates, self.decays, self.alphas)
        ]

    def described(self, weights):
        """The settings for a result. The source of weights has a name that tells them apart."""
        return {**dataclasses.asdict(self), "weights": weights}


def run(task, settings, seed, path, *, described, environment, report=print):
    """Run the protocol for a task, or what is missing of it.

    Args:
        task: The ``Task``.
        settings: The ``Settings``.
        seed: The seed of the classifier, of the factors and of the order of the pictures.
        path: The file of the result. It is written after each trial.
        described: What the file has as its settings.
        environment: The result of ``environment()``.
        report: Called with a line of text after each step.

    Raises:
        ValueError: If the file has other settings, or another environment and is unfinished.
    """
    own = {"task": task.name, "seed": seed, "lists": task.digest()}
    expected = as_json({**described, **own})
    new = {"settings": expected, "environment": environment, "trials": []}
    result = read_result(path) or new
    check_same(path, "settings", result["settings"], expected)
    if "test" in result:
        report(f"{path.name}: finished before")
        return
    check_same(path, "environment", result["environment"], environment)
    _choose(task, settings, seed, path, result, report)
    chosen = best(result["trials"])
    started = time.perf_counter()
    net = _trained(task, task.part(BOTH), settings, chosen, seed)
    if net is None:
        raise FloatingPointError(
            f"{path.name}: the training with {chosen} has diverged on {BOTH}, although it did "
            f"not on {TRAIN}. Use lower --rates, in another folder."
        )
    result["parameters"] = methods.parameters(settings.method, net)
    tested = task.part(TEST)
    result["chosen"] = chosen
    result["test"] = {"accuracy": accuracy(net, tested, settings), "count": len(tested.labels)}
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_result(path, result)
    report(f"{path.name}: test accuracy {result['test']['accuracy']:.2%}")


def _choose(task, settings, seed, path, result, report):
    """Try the settings of the grid that were not tried yet. The test part is not read."""
    done = [trial["settings"] for trial in result["trials"]]
    for tried in settings.grid():
        if tried in done:
            continue
        started = time.perf_counter()
        net = _trained(task, task.part(TRAIN), settings, tried, seed)
        # None: the training has diverged. Its accuracy is not measured.
        score = None if net is None else accuracy(net, task.part(VAL), settings)
        del net
        seconds = round(time.perf_counter() - started, 1)
        result["trials"].append({"settings": tried, "accuracy": score, "seconds": seconds})
        write_result(path, result)
        report(f"{path.name}: {tried} {'diverged' if score is None else f'{score:.1%}'}")


def best(trials):
    """The settings of the trial with the highest accuracy; of equal ones those of the first.

    Raises:
        ValueError: If all have diverged.
    """
    scored = [trial for trial in trials if trial["accuracy"] is not None]
    if not scored:
        raise ValueError(
            f"All {len(trials)} trials have diverged; expected one that has not. Use lower "
            "--rates, in another folder."
        )
    return max(scored, key=lambda trial: trial["accuracy"])["settings"]


def _trained(task, part, settings, tried, seed):
    """A model trained on a part; None if it diverged. All trials start from the same model."""
    arguments = dict(settings.arguments)
    if tried["alpha"] is not None:
        arguments["lora_alpha"] = tried["alpha"]
    net = methods.create(
        settings.method,
        arguments,
        model=settings.model,
        weights=settings.weights,
        classes=task.classes,
        size=settings.size,
        seed=seed,
    )
    try:
        methods.train(
            net,
            TrainingBatches(part, settings.size, settings.batch, seed),
            epochs=settings.epochs,
            warmup=settings.warmup,
            rate=tried["learning_rate"],
            decay=tried["weight_decay"],
            seed=seed,
        )
    except FloatingPointError:
        return None
    return net


def accuracy(net, part, settings):
    """The share of the pictures whose label has the highest logit."""
    correct = 0
    for pictures, labels in read_in_order(part, settings.size, _TEST_BATCH):
        logits = np.asarray(net.predict_on_batch(pictures))
        correct += int(np.sum(logits.argmax(-1) == labels))
    return correct / len(part.labels)
