"""``tfimm-lora serve``: answer requests over HTTP with one base model and many adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfimm_lora.cli.app import app, import_tensorflow, note
from tfimm_lora.cli.parsing import parse_size, parse_targets
from tfimm_lora.finetuning.base.early import check_model
from tfimm_lora.finetuning.run import CONFIG

EXAMPLES = """Examples:

tfimm-lora serve runs/flowers --adapters runs

tfimm-lora serve convnext_tiny --adapters adapters --port 9000

tfimm-lora serve my.keras --normalisation unit --adapters adapters

tfimm-lora serve runs/flowers --adapters adapters --token-file token
"""

_MODEL, _ADAPTERS, _LIMITS = "Base model", "Adapters", "Limits"


@app.command("serve", epilog=EXAMPLES)
def serve_command(
    base: Annotated[
        str,
        typer.Argument(
            help="The folder of a finetune run, or a model as for finetune --model."
        ),
    ],
    adapters: Annotated[
        Path,
        typer.Option(help="A folder whose subfolders are adapters or finetune runs."),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="A file with the token for adding and removing adapters. Default: the "
            "environment variable TFIMM_LORA_TOKEN; without one nobody can.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Load weights from this file.", rich_help_panel=_MODEL),
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(help="Height and width, 224 or 224x288.", rich_help_panel=_MODEL),
    ] = None,
    normalisation: Annotated[
        str | None,
        typer.Option(help="imagenet, inception, unit or raw.", rich_help_panel=_MODEL),
    ] = None,
    capacity: Annotated[
        int,
        typer.Option(
            min=1,
            help="Adapters on the device; others are in the memory of the host.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = 64,
    max_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The largest rank of an adapter. Default: that in the folder.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    max_classes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The most classes of an adapter. Default: the most in the folder.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="The layers of adapters, as for finetune. Default: those in the folder.",
            rich_help_panel=_ADAPTERS,
            show_default=False,
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Pictures in a batch.", rich_help_panel=_LIMITS)
    ] = 32,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            min=0, help="How long a picture waits for others.", rich_help_panel=_LIMITS
        ),
    ] = 5.0,
    max_upload_mb: Annotated[
        float, typer.Option(help="The size of a picture.", rich_help_panel=_LIMITS)
    ] = 10.0,
    max_adapter_mb: Annotated[
        float, typer.Option(help="The size of an uploaded adapter.", rich_help_panel=_LIMITS)
    ] = 256.0,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="The pixels of a picture.", rich_help_panel=_LIMITS)
    ] = 25_000_000,
    timeout: Annotated[
        float, typer.Option(help="Seconds of a request.", rich_help_panel=_LIMITS)
    ] = 30.0,
) -> None:
    """Predict pictures over HTTP: one base model in memory, and many adapters.

    Requests name an adapter, and those of different adapters are computed in
    one batch. Adapters that are added to or removed from the folder are noticed.
    """
    # Here, because they need packages that other commands do not.
    from tfimm_lora.serving.opening import open_service
    from tfimm_lora.serving.server import listen, serve
    from tfimm_lora.serving.settings import ServingSettings, read_token

    settings = ServingSettings(
        base,
        str(adapters),
        weights=None if weights is None else str(weights),
        input_size=None if input_size is None else parse_size(input_size),
        normalisation=normalisation,
        capacity=capacity,
        max_rank=max_rank,
        max_classes=max_classes,
        targets=parse_targets(targets),
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_upload_mb=max_upload_mb,
        max_adapter_mb=max_adapter_mb,
        max_pixels=max_pixels,
        timeout=timeout,
        token=read_token(token_file),
    )
    if not (Path(base) / CONFIG).is_file():
        check_model(base, pretrained=True, weights=settings.weights)
    with listen(host, port) as opened:
        import_tensorflow()
        note(f"opening {base}")
        serve(open_service(settings), settings, opened, note)
