"""``tfimm-lora plan``: what LoRA will train in a model, and what it costs."""

from __future__ import annotations

from typing import Annotated, Any

from tfimm_lora.cli.app import Json, app, emit, note, typer
from tfimm_lora.cli.parsing import parse_targets
from tfimm_lora.cli.tables import byte_text, show_facts, show_table
from tfimm_lora.finetuning.activation_memory import activation_bytes
from tfimm_lora.finetuning.base_model import open_base
from tfimm_lora.model.inject import inject_lora
from tfimm_lora.training.plan import Plan, plan

EXAMPLES = """Examples:

tfimm-lora plan vit_tiny_patch16_224 --rank 8 --classes 5

tfimm-lora plan applications/ResNet50 --rank 4 --all

tfimm-lora plan deit_base_patch16_224 --qkv qv --batch-size 32

tfimm-lora plan my_model.keras --rank 4 --json
"""


@app.command("plan", epilog=EXAMPLES)
def plan_command(
    model: Annotated[
        str,
        typer.Argument(help="A name of tfimm, applications/NAME of Keras, or a saved model."),
    ],
    rank: Annotated[int, typer.Option(help="Rank of the updates.")] = 8,
    alpha: Annotated[
        float | None, typer.Option(help="The update is scaled by alpha / rank; default 1.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="Layers to adapt: a preset (attention, mlp, all), names with commas between "
            "(fc1,fc2), or a regular expression for whole paths."
        ),
    ] = None,
    qkv: Annotated[
        str | None, typer.Option(help="Parts of attention's projections to adapt, as qv.")
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="A new classifier of so many classes, trained whole.")
    ] = None,
    train_bias: Annotated[str, typer.Option(help="none, lora_only or all.")] = "none",
    train_classifier: Annotated[
        bool | None, typer.Option(help="Default: where it is new, with --classes.")
    ] = None,
    optimizer: Annotated[str, typer.Option(help="adamw, adam, lion, rmsprop, sgd.")] = "adamw",
    batch_size: Annotated[
        int | None, typer.Option(help="Count activations too, for so many pictures.", min=1)
    ] = None,
    show_all: Annotated[
        bool, typer.Option("--all", help="List every layer that is left out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tell what LoRA will train in a model and what it costs, before any training.

    Nothing is trained and no weights are downloaded. The adapter's size is that
    of the files that would be written. Bytes of memory are those of float32.
    """
    # How pictures become input, which a file does not tell, has no part in a plan.
    opened = open_base(model, classes=classes, normalisation="unit")
    base, preprocessing = opened.model, opened.preprocessing
    new = opened.new_classifier if train_classifier is None else train_classifier
    arguments = {
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_targets": parse_targets(targets),
        "lora_qkv": qkv,
        "lora_train_bias": train_bias,
        "lora_train_classifier": new,
    }
    found = plan(base, **arguments)
    memory = found.memory(optimizer)
    if batch_size is not None:
        shape = (*preprocessing.input_size, preprocessing.in_channels)
        _add_activations(memory, base, arguments, shape, batch_size)
    data = {
        "model": model,
        **found.to_dict(),
        "optimizer": optimizer,
        "batch_size": batch_size,
        "memory": memory,
    }
    emit(data, as_json, lambda: show(found, data, show_all))


def _add_activations(
    memory: dict[str, dict[str, int]],
    base: Any,
    arguments: dict[str, Any],
    shape: tuple[int, ...],
    batch_size: int,
) -> None:
    """Count activations of both ways of training. The model is a LoRA model afterwards."""
    counts = {"full": activation_bytes(base, shape, batch_size)}
    inject_lora(base, **arguments)
    counts["lora"] = activation_bytes(base, shape, batch_size)
    for way, count in counts.items():
        if count is None:
            note("activations are counted on TensorFlow only: set KERAS_BACKEND=tensorflow")
            return
        memory[way]["activations"] = count
        memory[way]["together"] += count


def show(found: Plan, data: dict[str, Any], show_all: bool) -> None:
    """Print a plan."""
    rows = [
        [
            x.path,
            x.kind,
            "x".join(map(str, x.shape)),
            str(x.rank),
            f"{x.parameters:,}",
            f"{100 * x.parameters / x.kernel:.1f} %",
        ]
        for x in found.layers
    ]
    headers = ["adapted layer", "kind", "kernel", "rank", "parameters", "of the kernel"]
    show_table(headers, rows, left=("kind",))
    print()
    _show_left_out(found, show_all)
    print()
    _show_numbers(found)
    print()
    _show_memory(data)
    large = [x.path for x in found.layers if x.parameters >= x.kernel]
    if large:
        note(
            f"layers whose factors are as large as the kernel: {len(large)} ({large[0]}"
            f"{', ...' if large[1:] else ''}); a smaller --rank or other --targets cost less"
        )


def _show_left_out(found: Plan, show_all: bool) -> None:
    if show_all:
        rows = [
            [x.path or "(the model)", x.type, f"{x.parameters:,}", x.reason]
            for x in found.left_out
        ]
        headers = ["layer left out", "type", "parameters", "why"]
        show_table(headers, rows, left=("type", "why"))
        return
    sizes = dict.fromkeys(found.reasons, 0)
    for x in found.left_out:
        sizes[x.reason] += x.parameters
    rows = [[why, str(count), f"{sizes[why]:,}"] for why, count in found.reasons.items()]
    show_table(["layers left out, because", "layers", "parameters"], rows)


def _show_numbers(found: Plan) -> None:
    parts = {
        "factors": found.factors,
        "classifier": found.classifier,
        "biases": found.biases,
        "modules": found.modules,
    }
    made_of = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
    show_facts(
        [
            ("parameters", f"{found.total:,}"),
            ("trained", f"{found.trainable:,} ({made_of})"),
            ("share", f"{100 * found.share:.2f} %"),
            ("classifier", f"{found.classifier_total:,}"),
            ("adapter", f"{found.adapter_bytes:,} bytes ({byte_text(found.adapter_bytes)})"),
        ]
    )


def _show_memory(data: dict[str, Any]) -> None:
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": f"optimizer ({data['optimizer']})",
        "activations": f"activations, about (batch of {data['batch_size']})",
        "together": "together",
    }
    lora, full = data["memory"]["lora"], data["memory"]["full"]
    rows = [
        [name, byte_text(lora[key]), byte_text(full[key])]
        for key, name in names.items()
        if key in lora
    ]
    show_table(["memory in training", "LoRA", "full fine-tuning"], rows)
