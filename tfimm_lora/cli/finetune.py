"""``tfimm-lora finetune``: fine-tune a model on labelled pictures and write a report."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tfimm_lora.backend import installed
from tfimm_lora.cli.app import Json, app, emit, import_tensorflow, note
from tfimm_lora.cli.automatic_settings import Automatic
from tfimm_lora.cli.parsing import (
    parse_lora_fields,
    parse_rank,
    parse_rate,
    parse_size,
    parse_targets,
)
from tfimm_lora.cli.tasks import (
    CLASSES_HELP,
    COLUMNS_HELP,
    MASKS_HELP,
    TASK_HELP,
    parse_columns,
)
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base.names import is_model_file
from tfimm_lora.finetuning.distributed.strategy import is_chief, leave_strategy
from tfimm_lora.finetuning.recipe import Recipe, finetune_pictures, settings_of
from tfimm_lora.finetuning.report.formatting import percent
from tfimm_lora.finetuning.run import CONFIG, RECIPE, TUNING, Run, read_yaml
from tfimm_lora.finetuning.run_report import evaluate_run
from tfimm_lora.utils.optional_imports import require

EXAMPLES = """Examples:

tfimm-lora finetune --model MobileNetV2 --data pictures --out run

tfimm-lora finetune --model convnext_tiny --from-scratch --data pictures --out run

tfimm-lora finetune --model my.keras --normalisation unit --data a.csv --out run

tfimm-lora finetune --model MobileNetV2 --data pictures --lr auto --rank auto --out run

tfimm-lora finetune --model MobileNetV2 --data angles.csv --task regression --out run

tfimm-lora finetune --model MobileNetV2 --data streets --task segmentation --out run

tfimm-lora finetune --out run --resume

tfimm-lora finetune --config run/config.yaml --seed 1 --out run-1
"""

Text = Optional[str]  # noqa: UP045 - typer reads the annotations at run time
Whole = Optional[int]  # noqa: UP045
Number = Optional[float]  # noqa: UP045
Flag = Optional[bool]  # noqa: UP045

#: What a run needs after its training, so that nothing is missing then.
_PACKAGES = ("PIL", "safetensors", "matplotlib")

_LORA = "LoRA"
_DATA = "Pictures"
_TRAINING = "Training"
_SEARCH = "Search for settings (--lr auto, --rank auto)"


def _option(*names: str, help: str, panel: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False)


@app.command(epilog=EXAMPLES)
def finetune(
    out: Annotated[str, typer.Option(help="The folder for the run and all its results.")],
    model: Annotated[
        Text,
        typer.Option(
            help="The name of a model of tfimm or Keras Applications (see tfimm-lora models), "
            "or a saved Keras model."
        ),
    ] = None,
    data: Annotated[
        Text,
        typer.Option(
            help="A folder of class folders; or of train/, val/ and test/ with class folders; "
            "or a CSV file with path,label. tfimm-lora check reports what is wrong with it."
        ),
    ] = None,
    task: Annotated[Text, typer.Option(help=TASK_HELP, show_default=False)] = None,
    columns: Annotated[Text, _option(help=COLUMNS_HELP, panel=_DATA)] = None,
    masks: Annotated[Text, _option(help=MASKS_HELP, panel=_DATA)] = None,
    classes: Annotated[Text, _option(help=CLASSES_HELP, panel=_DATA)] = None,
    pretrained: Annotated[
        Flag,
        typer.Option(
            "--pretrained/--from-scratch",
            help="Start with the pretrained weights of the named model (default), or with "
            "random ones.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Text, typer.Option(help="Load weights from this file (of timm, or of Keras).")
    ] = None,
    config: Annotated[
        Text,
        typer.Option(help="A YAML file with defaults, such as the config.yaml of a run."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume the run in --out, if there is one.")
    ] = False,
    rank: Annotated[
        Text,
        _option(help="Rank of the updates, or auto to search for it. Default: 8.", panel=_LORA),
    ] = None,
    alpha: Annotated[
        Number, _option(help="Updates are scaled by alpha / rank. Default: rank.", panel=_LORA)
    ] = None,
    targets: Annotated[
        Text,
        _option(
            help='A preset ("attention", "mlp", "all"), layer names separated by commas, or a '
            "regular expression. Default: depends on the architecture.",
            panel=_LORA,
        ),
    ] = None,
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        _option(
            help='Any other field of LoRAConfig as NAME=VALUE in YAML: "dropout=0.1", '
            '"train_bias=all", "qkv=qv".',
            panel=_LORA,
        ),
    ] = None,
    input_size: Annotated[
        Text,
        _option(help="Height and width, 224 or 224x288. Default: the model's.", panel=_DATA),
    ] = None,
    normalisation: Annotated[
        Text,
        _option(
            help="imagenet, inception ([-1, 1]), unit ([0, 1]) or raw. Default: the model's.",
            panel=_DATA,
        ),
    ] = None,
    validation: Annotated[
        Number, _option(help="Share of pictures for validation. Default: 0.2.", panel=_DATA)
    ] = None,
    on_error: Annotated[
        Text, _option(help="Unreadable pictures: skip or refuse. Default: skip.", panel=_DATA)
    ] = None,
    augmentation: Annotated[
        Text, _option(help="none, light or strong. Default: light.", panel=_DATA)
    ] = None,
    balanced: Annotated[
        Flag,
        _option(help="Give rare classes or labels a larger weight in the loss.", panel=_DATA),
    ] = None,
    epochs: Annotated[Whole, _option(help="Default: 20.", panel=_TRAINING)] = None,
    batch_size: Annotated[Whole, _option(help="Default: 32.", panel=_TRAINING)] = None,
    accumulate: Annotated[
        Whole,
        _option(
            help="Compute each batch in this many parts, which need less memory. Default: 1.",
            panel=_TRAINING,
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        Flag,
        _option(
            help="Compute blocks again in the backward pass: less memory, more time.",
            panel=_TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        Text,
        _option(
            "--lr",
            "--learning-rate",
            help="Peak rate; auto to search for it; find to take it from one pass with a "
            "growing rate. Default: 0.003.",
            panel=_TRAINING,
        ),
    ] = None,
    weight_decay: Annotated[Number, _option(help="Default: 0.01.", panel=_TRAINING)] = None,
    warmup: Annotated[
        Number, _option(help="Share of the steps for warm-up. Default: 0.1.", panel=_TRAINING)
    ] = None,
    clip_norm: Annotated[
        Number,
        _option(
            help="Largest norm of the gradient; 0 for no clipping. Default: 1.", panel=_TRAINING
        ),
    ] = None,
    patience: Annotated[
        Whole, _option(help="Stop after this many epochs without improvement.", panel=_TRAINING)
    ] = None,
    monitor: Annotated[
        Text,
        _option(
            help="val_loss, or val_accuracy (multilabel: val_pr_auc; segmentation: "
            "val_mean_iou). Default: val_loss.",
            panel=_TRAINING,
        ),
    ] = None,
    mixed_precision: Annotated[
        Text,
        _option(help="mixed_float16 or mixed_bfloat16. Default: float32.", panel=_TRAINING),
    ] = None,
    strategy: Annotated[
        Text,
        _option(
            help="none; on TensorFlow mirrored (this machine), multiworker (several machines) "
            "or tpu; on JAX data-parallel (this machine) or multihost (several machines). "
            "Default: none.",
            panel=_TRAINING,
        ),
    ] = None,
    seed: Annotated[Whole, _option(help="Random seed. Default: 0.", panel=_TRAINING)] = None,
    tune_minutes: Annotated[
        Number, _option(help="Time for the search. Default: 10.", panel=_SEARCH)
    ] = None,
    tune_trials: Annotated[
        Whole,
        _option(help="Settings to try. Default: 6 (rank alone: 3).", panel=_SEARCH),
    ] = None,
    tune_storage: Annotated[
        Text,
        _option(
            help="A file or database URL (of Optuna) through which several machines share the "
            "search. Default: a file in the run.",
            panel=_SEARCH,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on labelled pictures; write an adapter and a report."""
    names = {f.name for f in dataclasses.fields(Recipe)}
    given = {k: v for k, v in locals().items() if k in names and v is not None and k != "lora"}
    if "input_size" in given:
        given["input_size"] = parse_size(given["input_size"])
    if "columns" in given:
        given["columns"] = parse_columns(given["columns"])
    rate, of_rank = parse_rate(learning_rate), parse_rank(rank)
    limits = {"minutes": tune_minutes, "trials": tune_trials, "storage": tune_storage}
    automatic = Automatic(
        rate if isinstance(rate, str) else None,
        of_rank if isinstance(of_rank, str) else None,
        {name: value for name, value in limits.items() if value is not None},
    )
    given["learning_rate"] = None if automatic.rate else rate
    lora_fields = {
        "rank": None if automatic.rank else of_rank,
        "alpha": alpha,
        "targets": parse_targets(targets),
        **parse_lora_fields(lora or []),
    }
    fields = {f"lora_{name}": value for name, value in lora_fields.items() if value is not None}
    given = {name: value for name, value in given.items() if value is not None}
    defaults = _default_settings(out, config, resume)
    settings = {**defaults, **given, "lora": {**defaults.get("lora", {}), **fields}}
    recipe = Recipe.from_dict(settings)
    if pretrained is not None:
        _check_origin(recipe, pretrained)
    check_model(recipe.model, pretrained=recipe.pretrained, weights=recipe.weights)
    for package in _PACKAGES:
        if not installed(package):
            require(package, extra="cli", why="tfimm-lora finetune")
    import_tensorflow()
    bar = sys.stderr.isatty() and not as_json
    try:
        recipe = automatic.apply(recipe, out, resume)
        run = finetune_pictures(
            recipe,
            out,
            resume=resume or automatic.searches,
            verbose="bar" if bar else "lines",
            say=note,
        )
    except KeyboardInterrupt:
        note(_how_to_resume(out))
        raise
    leave_strategy(recipe.strategy)  # the chief writes the report alone
    facts = ("best_epoch", "trainable", "parameters")
    result = {"out": str(run.path), **{name: run.facts[name] for name in facts}}
    if not is_chief(recipe.strategy):
        emit(result, as_json, lambda: print("trained; the chief worker writes the report"))
        return
    evaluations = evaluate_run(run)
    evaluation, test = evaluations["val"], evaluations.get("test")
    views = run.task.views
    result.update(views.scores(evaluation))
    if test is not None:
        result["test"] = {**views.scores(test), "pictures": len(test.predictions)}
    result["report"] = str(run.path / "report.html")

    def show() -> None:
        share = percent(result["trainable"] / result["parameters"], 2)
        print(
            f"{views.headline(evaluation, 'validation')} (epoch {result['best_epoch']}), with "
            f"{share} of the parameters trained"
        )
        if test is not None:
            print(views.headline(test, "test"))
        print(f"adapter: {run.adapter}\nreport:  {result['report']}")

    emit(result, as_json, show)
    advice = views.advice(evaluation)
    if advice is not None:
        note(f"note: {advice}")


def _check_origin(recipe: Recipe, pretrained: bool) -> None:
    """Raise if --pretrained or --from-scratch is given with weights from a file."""
    other = (
        f"--weights {recipe.weights}"
        if recipe.weights is not None
        else f"the model file {recipe.model}"
    )
    if recipe.weights is not None or is_model_file(recipe.model):
        flag = "--pretrained" if pretrained else "--from-scratch"
        raise ValueError(
            f"Received {flag} with {other}; expected one of them. The file contains the "
            "weights."
        )


def _how_to_resume(out: str) -> str:
    """What to do after an interruption."""
    if (Path(out) / TUNING).is_dir() and not (Path(out) / CONFIG).is_file():
        return "interrupted before training; continue with the same command and --resume"
    if not (Path(out) / CONFIG).is_file():
        return f"interrupted before training; nothing was written to {out}"
    done = len(Run.open(out).history)
    return (
        f"interrupted after epoch {done}; resume with: "
        f"tfimm-lora finetune --out {shlex.quote(out)} --resume"
    )


def _default_settings(out: str, config: str | None, resume: bool) -> dict[str, Any]:
    """The settings that the options of the command line override."""
    if config is not None:
        read = read_yaml(config)
        return dict(read.get(RECIPE, read))
    if resume and (Path(out) / CONFIG).is_file():
        return settings_of(Run.open(out))
    return {}
