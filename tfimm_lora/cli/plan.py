"""``tfimm-lora plan``: show what LoRA would train in a model, and its cost."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from tfimm_lora.backend import how_to_use_tensorflow
from tfimm_lora.cli.app import Json, app, emit, import_keras_to_count, import_tensorflow, note
from tfimm_lora.cli.parsing import parse_lora_fields, parse_targets
from tfimm_lora.cli.tables import show_facts, show_table
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.base.names import APPLICATIONS, canonical_name
from tfimm_lora.finetuning.base_model import open_base_model
from tfimm_lora.finetuning.report.formatting import byte_text, percent
from tfimm_lora.finetuning.step_memory import program_bytes, step_bytes
from tfimm_lora.finetuning.tasks.named import DEFAULT, task_named
from tfimm_lora.model.checkpointing import enable_gradient_checkpointing
from tfimm_lora.model.inject import inject_lora
from tfimm_lora.model.state import RANDOM, base_name, record_base_name
from tfimm_lora.training.plan import Plan, plan
from tfimm_lora.zoo.weights.hub_ids import hub_id

EXAMPLES = """Examples:

tfimm-lora plan vit_tiny_patch16_224 --rank 8 --classes 5

tfimm-lora plan applications/ResNet50 --rank 4 --all

tfimm-lora plan deit_base_patch16_224 --qkv qv --batch-size 32

tfimm-lora plan my_model.keras --rank 4 --json

tfimm-lora plan vit_tiny_patch16_224 --task segmentation --classes 5
"""


@app.command("plan", epilog=EXAMPLES)
def plan_command(
    model: Annotated[
        str,
        typer.Argument(help="The name of a tfimm model, applications/NAME, or a saved model."),
    ],
    rank: Annotated[int, typer.Option(help="Rank of the updates.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="Updates are scaled by alpha / rank. Default: rank.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Layers to adapt: a preset (attention, mlp, all), names separated by commas "
            "(fc1,fc2), or a regular expression for whole paths."
        ),
    ] = None,
    qkv: Annotated[
        str | None,
        typer.Option(help="Blocks of the fused attention projection to adapt, such as qv."),
    ] = None,
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help='Any other field of LoRAConfig as NAME=VALUE in YAML: "use_loha=true".'
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            help="Replace the classifier by one with this many classes, labels or numbers; "
            "train it."
        ),
    ] = None,
    task: Annotated[
        str,
        typer.Option(help="The task; with segmentation, include the decoder for --classes."),
    ] = DEFAULT,
    train_bias: Annotated[str, typer.Option(help="none, lora_only or all.")] = "none",
    train_classifier: Annotated[
        bool | None, typer.Option(help="Default: if --classes replaces the classifier.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, rmsprop, sgd.")] = "adamw",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Predict the memory of finetune with this batch size.", min=1),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Predict LoRA's memory with this option of finetune.",
        ),
    ] = False,
    show_all: Annotated[
        bool, typer.Option("--all", help="List every layer that is not adapted.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what LoRA would train in a model, and its memory, before any training.

    Nothing is trained and no weights are downloaded. The size of the adapter is
    the size of its files. Memory is given for float32: that of the weights,
    gradients and optimizer, or with --batch-size an estimate for the whole
    process of finetune on a CPU.
    """
    if gradient_checkpointing and batch_size is None:
        raise typer.BadParameter(
            "Received --gradient-checkpointing without --batch-size; expected both, since it "
            "only changes the memory of activations."
        )
    check_model(model)
    if canonical_name(model).startswith(APPLICATIONS) and batch_size is None:
        import_keras_to_count()
    else:
        import_tensorflow()
    # A model file does not store the normalization. The plan does not depend on it.
    dense = task_named(task).is_dense
    opened = open_base_model(model, classes=classes, normalisation="unit", dense=dense)
    base, preprocessing = opened.model, opened.preprocessing
    if opened.from_scratch:
        # The files of the adapter are those of finetune, which loads pretrained weights.
        plain = (base_name(base) or "").removesuffix(RANDOM)
        record_base_name(base, hub_id(plain) or plain)
    new = opened.new_classifier if train_classifier is None else train_classifier
    arguments = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_targets": parse_targets(targets),
        "lora_qkv": qkv,
        "lora_train_bias": train_bias,
        "lora_train_classifier": new,
        **{f"lora_{name}": value for name, value in parse_lora_fields(lora or []).items()},
    }
    result = plan(base, **arguments)
    memory = result.memory(optimizer)
    if batch_size is not None:
        shape = (*preprocessing.input_size, preprocessing.in_channels)
        counts = _step_bytes(base, arguments, shape, batch_size, gradient_checkpointing)
        if counts is None:
            note(f"activations are counted on TensorFlow only. {how_to_use_tensorflow()}.")
        else:
            memory = {way: _of_process(memory[way], count) for way, count in counts.items()}
    data = {
        "model": canonical_name(model),
        **result.to_dict(),
        "optimizer": optimizer,
        "batch_size": batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "memory": memory,
    }
    emit(data, as_json, lambda: show(result, data, show_all))


def _step_bytes(
    base: Any,
    arguments: dict[str, Any],
    shape: tuple[int, ...],
    batch_size: int,
    gradient_checkpointing: bool,
) -> dict[str, int] | None:
    """The memory of a step with LoRA and of full fine-tuning, which is never checkpointed.
    Injects LoRA into the model."""
    full = step_bytes(base, shape, batch_size)
    inject_lora(base, **arguments)
    if gradient_checkpointing:
        enable_gradient_checkpointing(base)
    lora = step_bytes(base, shape, batch_size)
    return None if full is None or lora is None else {"lora": lora, "full": full}


def _of_process(memory: dict[str, int], step: int) -> dict[str, int]:
    """The memory of a whole training, of which a step takes so many bytes."""
    parts = {name: memory[name] for name in ("weights", "optimizer")}
    parts |= {"step": step, "program": program_bytes(step)}
    return {**parts, "together": sum(parts.values())}


def show(result: Plan, data: dict[str, Any], show_all: bool) -> None:
    """Print a plan."""
    rows = [
        [
            x.path,
            x.kind,
            "x".join(map(str, x.shape)),
            str(x.rank),
            f"{x.parameters:,}",
            percent(x.parameters / x.kernel),
        ]
        for x in result.layers
    ]
    headers = ["adapted layer", "kind", "kernel", "rank", "parameters", "of the kernel"]
    show_table(headers, rows, left=("kind",))
    print()
    _show_left_out(result, show_all)
    print()
    _show_numbers(result)
    print()
    _show_memory(data)
    large = [x.path for x in result.layers if x.parameters >= x.kernel]
    if large:
        note(
            f"{len(large)} layers have factors as large as their kernel ({large[0]}"
            f"{', ...' if large[1:] else ''}); use a smaller --rank or other --targets"
        )


def _show_left_out(result: Plan, show_all: bool) -> None:
    if show_all:
        rows = [
            [x.path or "(the model)", x.type, f"{x.parameters:,}", x.reason]
            for x in result.left_out
        ]
        headers = ["layer not adapted", "type", "parameters", "reason"]
        show_table(headers, rows, left=("type", "reason"))
        return
    sizes = dict.fromkeys(result.reasons, 0)
    for x in result.left_out:
        sizes[x.reason] += x.parameters
    rows = [[why, str(count), f"{sizes[why]:,}"] for why, count in result.reasons.items()]
    show_table(["reason for not adapting", "layers", "parameters"], rows)


def _show_numbers(result: Plan) -> None:
    counts = {
        "factors": result.factors,
        "classifier": result.classifier,
        "biases": result.biases,
        "modules": result.modules,
    }
    listed = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
    show_facts(
        [
            ("parameters", f"{result.total:,}"),
            ("trained", f"{result.trainable:,} ({listed})"),
            ("share", percent(result.share, 2)),
            ("classifier", f"{result.classifier_total:,}"),
            ("adapter", f"{result.adapter_bytes:,} bytes ({byte_text(result.adapter_bytes)})"),
        ]
    )


def _show_memory(data: dict[str, Any]) -> None:
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": f"optimizer ({data['optimizer']})",
        "step": f"activations and gradients (batch of {data['batch_size']})",
        "program": "TensorFlow and other parts of the program",
        "together": "total",
    }
    lora, full = data["memory"]["lora"], data["memory"]["full"]
    rows = [
        [name, byte_text(lora[key]), byte_text(full[key])]
        for key, name in names.items()
        if key in lora
    ]
    show_table(["memory in training", "LoRA", "full fine-tuning"], rows)
