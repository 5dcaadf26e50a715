"""Which method, learning rate and rank for pretrained image models? Run ``make experiment``.

    TF_USE_LEGACY_KERAS=1 python benchmarks/study/study.py [--minutes 180] [--quick]

Fine-tunes models with ImageNet weights on small sets of pictures (``tasks.py``) with many
methods (``methods.py``), as ``plan.py`` says. Each finished run is a line of results.jsonl; an
interrupted study continues with the runs that are missing. Then the page of the study is
written.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import page
from plan import QUICK, Job, Plan, Run
from results import RESULTS, ROOT, SEARCHES, read_results, read_searches, write_result
from tasks import TASKS


def one_thread() -> None:
    """Two processes on two cores get further than two threads of a small model."""
    import tfimm_lora  # noqa: F401 - chooses legacy Keras before TensorFlow is imported

    import tensorflow as tf  # isort: skip

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)


def work_on(runs: list[Run], work: Path, results: Path, deadline: float) -> int:
    """Do the runs of one job; return how many were done."""
    from runs import Runs

    trainer = Runs(runs[0].job, work)
    for done, run in enumerate(runs):
        if time.time() > deadline:
            return done
        write_result(results, run, trainer.run(run.rate, run.seed))
    return len(runs)


def next_job(due: list[Run], busy: set[Job]) -> list[Run]:
    """The runs of the first job that no process works on."""
    first = next((run for run in due if run.job not in busy), None)
    return [run for run in due if first is not None and run.job == first.job]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")
    parser.add_argument("--minutes", type=float, default=180, help="stop after so long")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="for the page")
    parser.add_argument("--work", type=Path, default=ROOT / ".experiment", help="for downloads")
    args = parser.parse_args()
    plan = QUICK if args.quick else Plan()
    if not args.page:
        do_runs(plan, args)
    results = read_results(args.results)
    left = len(plan.due(results))
    print(f"{len(results)} runs; {left} are left" if left else f"all {len(results)} runs done")
    page.write(plan, results, args.out, read_searches(SEARCHES))


def do_runs(plan: Plan, args: argparse.Namespace) -> None:
    """Do all runs that are due, a job at a time in each process, until time is up."""
    import checkpoints

    started = time.time()
    deadline = started + 60 * args.minutes

    for model in {run.job.model for run in plan.due({})} | set(plan.other_models):
        folder = args.work / "checkpoints" / model
        if not (folder / "config.json").exists():
            checkpoints.write_checkpoint(model, folder)
    # Before the processes start, which would download the same files at the same time.
    for task in {run.job.task for run in plan.due(read_results(args.results))}:
        TASKS[task].load(args.work / "downloads")
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        args.processes, context, one_thread, max_tasks_per_child=4
    ) as pool:
        working: dict[concurrent.futures.Future, Job] = {}
        while True:
            due = plan.due(read_results(args.results)) if time.time() < deadline else []
            while due and len(working) < args.processes:
                runs = next_job(due, set(working.values()))
                if not runs:
                    break
                future = pool.submit(work_on, runs, args.work, args.results, deadline)
                working[future] = runs[0].job
            if not working:
                break
            finished, _ = concurrent.futures.wait(
                working, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in finished:
                job = working.pop(future)
                print(
                    f"{time.time() - started:6.0f} s  {job.method}, {job.task}, {job.model}: "
                    f"{future.result()} runs",
                    flush=True,
                )


if __name__ == "__main__":
    main()
