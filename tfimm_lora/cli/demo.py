"""``tfimm-lora demo``: a page in the browser that answers for single pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfimm_lora.cli.app import app, import_tensorflow, note
from tfimm_lora.finetuning.report.sections import count

EXAMPLES = """Examples:

tfimm-lora demo runs/flowers

tfimm-lora demo runs/flowers runs/birds --port 9000 --no-browser
"""


@app.command("demo", epilog=EXAMPLES)
def demo_command(
    runs: Annotated[list[Path], typer.Argument(help="The folders of finetune runs.")],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for a free one.")] = 7860,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Show a page in the browser: drop a picture, see the answer and why.

    Runs with the same base model and number of labels share one model in
    memory. The page loads nothing from the internet and sends nothing there.
    (To fine-tune an example on photographs, use make demo in a clone.)
    """
    # Here, because they need packages that other commands do not.
    from tfimm_lora.demo_page.page import create_page, gradio, launch
    from tfimm_lora.demo_page.runs import DemoRuns

    gradio()  # raises before models are opened
    import_tensorflow()
    note(f"opening {', '.join(map(str, runs))}")
    opened = DemoRuns(runs)
    note(f"{count(len(opened.names), 'run')}, {count(opened.models, 'base model')} in memory")
    page = create_page(opened)
    address = launch(page, host, port, browser=browser, block=False)
    note(f"serving on {address}; stop with Ctrl-C")
    page.block_thread()
