"""Time and memory of LoRA beside the floor, full fine-tuning, and everybody else's LoRA.

    make benchmark
    python benchmarks/performance.py [--quick] [--models vit_tiny resnet50] [--rank 8] ...

Each contender is a process of its own (``worker``), and in every round each takes its turn,
so that ratios are taken within a round: on a machine that does other things too they say
more than seconds. The floor is the model with everything frozen but one bias at its bottom:
gradients flow all the way down, and nothing else is paid for.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import memory
import performance_page as page
from entrants import CONTENDERS, MODELS, absent
from worker import Failed, Worker, environment

MEASURED = ("vit_tiny", "vit_base", "convnext_tiny", "swin_tiny", "resnet50", "efficientnet_b0")
PARTS = ("models", "growth", "operations")


def tasks_of_models(args):
    """Label -> task for each model, and why some contenders are not in it."""
    for model in args.models:
        tasks, missing = {}, {}
        for contender in args.contenders:
            reason = absent(contender, model)
            if args.quick and model == "convnext_tiny" and contender not in ("floor", "tfimm"):
                reason = "left out by --quick"
            if reason:
                missing[contender] = reason
            else:
                tasks[contender] = task(args, contender, model)
        yield model, tasks, missing


def tasks_of_growth(args):
    """What grows -> label -> task, all of ours."""
    base = "vit_tiny" if args.quick else "vit_base"
    batch = 2
    sizes = ("vit_tiny",) if args.quick else ("vit_tiny", "vit_small", "vit_base")
    ranks = (4, 64) if args.quick else (1, 4, 8, 16, 64, 128)
    batches = (2,) if args.quick else (1, 4, 16, 32)
    return {
        f"rank ({base}, batch {batch})": {
            str(r): task(args, "ours", base, rank=r, batch=batch) for r in ranks
        },
        f"batch (vit_tiny, rank {args.rank})": {
            str(b): task(args, "ours", "vit_tiny", batch=b) for b in batches
        },
        f"model (batch {batch}, rank {args.rank})": {
            m: task(args, "ours", m, batch=batch) for m in sizes
        },
    }


def task(args, contender, model, rank=None, batch=None):
    return {
        "contender": contender,
        "model": model,
        "rank": rank or args.rank,
        "batch": batch or args.batch or (2 if args.quick else MODELS[model].batch),
        "threads": args.threads,
        "small": args.quick,
    }


def started(task):
    return Worker(task).start()


def race(tasks, args):
    """Measure tasks in turns: label -> seconds of each action by round, memory, or why not."""
    entries, workers = {}, {}
    with ThreadPoolExecutor(args.threads) as pool:
        starts = {
            label: pool.submit(lambda t: Worker(t).start(), t) for label, t in tasks.items()
        }
    for label, start in starts.items():
        try:
            workers[label] = start.result()
        except Failed as error:
            entries[label] = {"failed": str(error)}
    for label, worker in workers.items():
        about = worker.about
        entries[label] = {
            "trained": about["trained"],
            "memory": about["memory"],
            "seconds": {action: [] for action in about["actions"]},
        }
    order, end = list(workers), time.monotonic() + args.seconds
    for number in range(args.rounds):
        if number >= args.least and time.monotonic() > end:
            break
        for action in ("step", "forward", "merged"):
            for label in order:
                if action in workers[label].about["actions"]:
                    took = workers[label].do(action)[args.clock]
                    entries[label]["seconds"][action].append(took)
        order = order[1:] + order[:1]  # nobody always comes after the same one
    for worker in workers.values():
        worker.end()
    return {label: entries[label] for label in tasks}


def measured_operations(args):
    command = [sys.executable, "benchmarks/operations.py", "--rank", str(args.rank)]
    command += ["--quick", "--rounds", str(args.least)] if args.quick else []
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        env=environment(task(args, "ours", "vit_tiny")),
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def versions():
    found = {"python": platform.python_version()}
    for name in ("tensorflow", "tf_keras", "keras", "tfimm", "torch", "timm", "peft"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(args):
    """All results, as they are kept in JSON. What is done is printed and kept as it comes."""
    results = {
        "threads": args.threads,
        "clock": args.clock,
        "rank": args.rank,
        "versions": versions(),
        "models": {},
        "growth": {},
    }
    if "models" in args.parts:
        for model, tasks, missing in tasks_of_models(args):
            entries = race(tasks, args)
            entries.update({name: {"absent": reason} for name, reason in missing.items()})
            batch = next(iter(tasks.values()))["batch"] if tasks else None
            results["models"][model] = {"batch": batch, "contenders": entries}
            tell(page.of_model(model, results["models"][model]), results, args)
    if "growth" in args.parts:
        for name, tasks in tasks_of_growth(args).items():
            results["growth"][name] = race(tasks, args)
            tell(page.of_growth(name, results["growth"][name]), results, args)
    if "operations" in args.parts:
        results["operations"] = measured_operations(args)
        tell(page.of_operations(results["operations"]), results, args)
    return results


def tell(text, results, args):
    """Print a table, and write what there is so far."""
    print(f"\n{text}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(page.rounded(results), indent=1) + "\n")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="tiny models and pictures, two rounds")
    add("--models", nargs="*", choices=MODELS)
    add("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    add("--parts", nargs="*", choices=PARTS, default=PARTS)
    add("--batch", type=int, help="pictures in a batch; default 8, of larger models 4")
    add("--rank", type=int, default=8)
    add("--rounds", type=int, default=15, help="at most so many")
    add("--seconds", type=float, default=60, help="no new round after so long, per table")
    add("--threads", type=int, default=memory.threads())
    add(
        "--clock",
        choices=("wall", "processor"),
        default="wall",
        help="processor: for one thread on a machine that others work on too",
    )
    add("--json", type=Path, help="write all that was measured")
    add("--picture", type=Path, help="draw it; .svg or .png")
    add("--read", type=Path, help="print and draw an earlier --json instead of measuring")
    args = parser.parse_args()
    args.least = 2 if args.quick else 3
    args.rounds = 2 if args.quick else max(args.rounds, args.least)
    args.models = args.models or (["vit_tiny", "convnext_tiny"] if args.quick else MEASURED)
    return args


def main():
    args = arguments()
    if args.read:
        results = json.loads(args.read.read_text())
        print(page.whole(results))
    else:
        results = measure(args)
        print(f"\n{page.of_figures(results)}")
    if args.picture:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        page.draw(results, args.picture)


if __name__ == "__main__":
    main()
