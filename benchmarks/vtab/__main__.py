"""The command line. See ``benchmarks/vtab/__init__.py``."""

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tfimm_lora as lora

from .environment import environment
from .methods import METHODS
from .protocol import Settings, run
from .results import all_results, result_path
from .table import table
from .tasks import CLASSES, find_task

MODEL = "vit_base_patch16_224_in21k"
WEIGHTS = "timm/vit_base_patch16_224.orig_in21k"


def main(argv=None):
    args = _parser().parse_args(argv)
    if args.table:
        print(table(all_results(args.out)))
        return
    if args.data is None:
        raise SystemExit("Received no --data; expected a folder with the tasks, or --table.")
    all_settings = {method: _settings(method, args) for method in args.methods}
    weights = _weights_name(args.weights)
    if args.tfds:
        from .from_tfds import write_task

        for name in args.tasks:
            write_task(name, args.data)
    # All folders are checked before the first run, which takes hours.
    tasks = [find_task(name, args.data) for name in args.tasks]
    here = environment()
    for task in tasks:
        for method, settings in all_settings.items():
            for seed in args.seeds:
                path = result_path(args.out, args.name or method, task.name, seed)
                described = settings.described(weights)
                run(
                    task,
                    settings,
                    seed,
                    path,
                    described=described,
                    environment=here,
                    report=lambda line: print(line, flush=True),
                )


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vtab",
        description="VTAB-1k with ViT-B/16, as in V-PETL Bench.",
    )
    add = parser.add_argument
    add("--data", type=Path, help="a folder with a folder of each task, as in the archives")
    add("--tfds", action="store_true", help="write missing tasks with tensorflow_datasets")
    add("--out", type=Path, required=True, help="the folder of the results")
    add("--table", action="store_true", help="print all results as a table, and run nothing")
    add("--tasks", nargs="+", default=list(CLASSES), choices=CLASSES, metavar="TASK")
    add("--methods", nargs="+", default=["lora"], choices=METHODS)
    add("--name", help="the name of the results. Default: that of the method")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--lora", nargs="+", default=[], metavar="NAME=VALUE", help="fields of LoRAConfig")
    add("--rates", nargs="+", type=float, help="learning rates to choose from")
    add("--decays", nargs="+", type=float, help="weight decays to choose from")
    add("--alphas", nargs="+", type=float, help="values of lora_alpha to choose from")
    add("--model", default=MODEL, help="a name for lora.create_model")
    add("--weights", default=WEIGHTS, help='for lora.load_timm_weights, or "random"')
    add("--size", type=int, default=Settings.size, help="the size of the pictures in pixels")
    add("--epochs", type=int, default=Settings.epochs)
    add("--warmup", type=int, default=Settings.warmup, help="in epochs")
    add("--batch", type=int, default=Settings.batch)
    return parser


def _settings(method, args):
    """The settings of a method with those of the command line.

    Raises:
        TypeError, ValueError: If a field of LoRAConfig is unknown or out of range.
        SystemExit: If options contradict each other.
    """
    defaults = METHODS[method]
    given = dict(_field(x) for x in args.lora)
    if (given or args.alphas) and not defaults.uses_lora:
        raise SystemExit(f"Received --lora or --alphas for {method!r}; expected method lora.")
    if "lora_alpha" in given:
        raise SystemExit("Received --lora alpha=...; expected --alphas, which are chosen from.")
    if given and args.name is None:
        raise SystemExit("Received --lora without --name; expected a name for the results.")
    if args.name in METHODS:
        raise SystemExit(f"Received --name {args.name}, a method; expected another name.")
    if args.name is not None and len(args.methods) > 1:
        raise SystemExit(f"Received --name and the methods {args.methods}; expected one.")
    arguments = {**defaults.arguments, **given}
    lora.LoRAConfig(**arguments)
    # With another rank, the default alpha keeps the scale at 1.
    alphas = (float(arguments["lora_rank"]),) if defaults.uses_lora else (None,)
    return Settings(
        method=method,
        arguments=arguments,
        rates=tuple(args.rates or defaults.rates),
        decays=tuple(args.decays or defaults.decays),
        alphas=tuple(args.alphas or alphas),
        weights=None if args.weights == "random" else args.weights,
        **{
            field.name: getattr(args, field.name)
            for field in dataclasses.fields(Settings)
            if field.name in ("model", "size", "epochs", "warmup", "batch")
        },
    )


def _field(text):
    """ "use_dora=True" as ("lora_use_dora", True). Values are Python literals, or strings."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"Received --lora {text!r}; expected NAME=VALUE.")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return f"lora_{name.removeprefix('lora_')}", value


def _weights_name(weights):
    """How results name the weights: those on disk by file name and hash, without folders."""
    if not os.path.exists(weights):
        return weights
    path = Path(weights).resolve()
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        digest.update(file.read_bytes())
    return f"{path.name} sha256:{digest.hexdigest()}"


if __name__ == "__main__":
    sys.exit(main())
