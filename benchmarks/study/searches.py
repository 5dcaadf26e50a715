"""Is a search for rate and rank as good as the grid, and do several of its settings help?

    TF_USE_LEGACY_KERAS=1 python benchmarks/study/searches.py [--seeds 0 1 2] [--quick]

For each task and seed, ``lora.tune`` chooses a rate and a rank from the pictures that the grid
of the study uses: those to train with and those to choose with. Its three best settings are
trained in full, as in the study. Compared on the test pictures: the best one, the three
together (the mean of their probabilities), and one model with the mean of their updates. Each
search is a line of searches.jsonl.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import numpy as np
from plan import QUICK, SEARCH_SEEDS, SEARCHED_RANKS, Plan
from results import ROOT, SEARCHES, read_searches, write_line
from runs import Runs, task_of
from study import one_thread
from tasks import data

import tensorflow as tf  # isort: skip - after tfimm_lora, which chooses legacy Keras

import tfimm_lora as lora
from tfimm_lora.finetuning.optimizer import LEARNING_RATE
from tfimm_lora.finetuning.recipe import RANK


def search(plan: Plan, task: str, seed: int, work: Path) -> dict[str, Any]:
    """The search of a task and a seed, and what its settings are worth."""

    def runs_of(rank: int) -> Runs:
        return Runs(plan.job(task, f"LoRA, rank {rank}"), work)

    job = plan.job(task, f"LoRA, rank {RANK}")
    parts = data(task, seed, job.size, work / "downloads")
    kind, plain = task_of(parts), runs_of(RANK)
    plain.prepared(parts, seed)  # for its preprocessing

    def batches(x: np.ndarray, y: np.ndarray, shuffled: bool) -> tf.data.Dataset:
        dataset = tf.data.Dataset.from_tensor_slices((x, y))
        dataset = dataset.shuffle(len(x), seed) if shuffled else dataset
        dataset = dataset.batch(job.batch, drop_remainder=shuffled)
        return dataset.map(lambda x, y: (plain.preprocess(x), y)).prefetch(2)

    started = time.process_time()
    tuned = lora.tune(
        lambda rank: runs_of(rank).prepared(parts, seed),
        batches(*parts.train, shuffled=True),
        batches(*parts.val, shuffled=False),
        minutes=60,
        rank=SEARCHED_RANKS,
        epochs=job.epochs,
        first=(LEARNING_RATE, RANK),
        task=kind,
        seed=seed,
    )
    seconds = time.process_time() - started
    # What was trained for longer is better known.
    ranked = sorted(
        tuned.trials, key=lambda x: (-x.epochs, np.inf if x.value is None else x.value)
    )
    chosen = (tuned.learning_rate, tuned.rank)
    settings = list(dict.fromkeys([chosen, *((x.learning_rate, x.rank) for x in ranked)]))[:3]
    outputs, adapters, took = [], [], []
    for rate, rank in settings:
        runs = runs_of(rank)
        took.append(runs.run(rate, seed)["seconds"])
        outputs.append(runs.outputs(parts.test[0]).astype("float64"))
        adapters.append(lora.adapter_of(runs.model))
    share = 1 / len(settings)
    runs.model = lora.load_adapter(
        runs.model,
        lora.combine_adapters(adapters, [share] * len(settings), trained_whole="average"),
    )
    runs.forward = tf.function(lambda x: runs.model(runs.preprocess(x), training=False))
    probabilities = np.mean([kind.values(x) for x in outputs], axis=0)

    def scores(found: np.ndarray) -> dict[str, float]:
        evaluation = kind.evaluate(found, parts.test[1])
        names = ("accuracy", "loss", "calibration_error")
        return {name: float(getattr(evaluation, name)) for name in names}

    return {
        "task": task,
        "seed": seed,
        "settings": settings,
        "search_seconds": round(seconds, 2),
        "seconds": took,
        "best": scores(outputs[0]),
        "together": scores(np.log(np.maximum(probabilities, 1e-300))),
        "mean update": scores(runs.outputs(parts.test[0]).astype("float64")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEARCH_SEEDS))
    parser.add_argument("--results", type=Path, default=SEARCHES)
    parser.add_argument("--work", type=Path, default=ROOT / ".experiment", help="for downloads")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    one_thread()
    for seed in args.seeds:
        for task in plan.tasks:
            if (task, seed) not in read_searches(args.results):
                found = search(plan, task, seed, args.work)
                write_line(args.results, found)
                print(task, seed, found["settings"], found["best"]["accuracy"], flush=True)


if __name__ == "__main__":
    main()
