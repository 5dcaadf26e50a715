"""The page, made with Gradio. It loads nothing from other servers and reports nothing."""

from __future__ import annotations

import os
from typing import Any

from tfimm_lora.demo_page.runs import Answer, DemoRuns
from tfimm_lora.finetuning.data.pictures import UnreadablePicture
from tfimm_lora.finetuning.explained_pictures import LIMITS
from tfimm_lora.finetuning.report.html import Html, joined, tag
from tfimm_lora.utils.optional_imports import require

#: Fonts of the system; those of Gradio's themes come from another server.
_FONTS, _MONOSPACED = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]

_WIDTH = "main {max-width: 72rem !important}"


def gradio() -> Any:
    """Gradio, which is not to report to its makers that it is used.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return require("gradio", extra="demo", why="tfimm-lora demo")


def create_page(runs: DemoRuns) -> Any:
    """The page for some runs, a ``gradio.Blocks``.

    Its function ``/answer`` (picture, name of a run, whether to explain) returns the table as
    HTML, the pictures with their captions, and a text about them.
    """
    gr = gradio()

    def answer(picture: str | None, name: str, explain: bool) -> tuple[str, list[Any], str]:
        if picture is None:
            return "", [], ""
        try:
            found = runs.answer(name, picture, explain)
        except UnreadablePicture as problem:
            raise gr.Error(f"The picture cannot be read: {problem.reason}") from problem
        except ValueError as problem:
            raise gr.Error(str(problem)) from problem
        about = joined(tag("p", f"{found.method}."), tag("p", LIMITS)) if found.method else ""
        return _table(found), _gallery(found), about

    names = list(runs.names)
    with gr.Blocks(title="tfimm_lora", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column():
                name = gr.Dropdown(names, value=names[0], label="Run", elem_id="run")
                about = gr.HTML(tag("p", runs.about(names[0])), elem_id="about")
                # As a lossless file, so that the model gets the pixels that predict gets.
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    elem_id="picture",
                )
                explain = gr.Checkbox(value=True, label="Explain the answer")
            with gr.Column():
                table = gr.HTML(label="Answer", elem_id="answer")
                gallery = gr.Gallery(
                    label="Mask, or places that decided",
                    columns=2,
                    format="png",
                    elem_id="maps",
                )
                method = gr.HTML(elem_id="method")
        outputs = [table, gallery, method]
        inputs = [picture, name, explain]
        picture.change(answer, inputs, outputs, api_name="answer")
        for control in (name, explain):
            control.change(answer, inputs, outputs, api_visibility="private")
        name.change(
            lambda name: tag("p", runs.about(name)), name, about, api_visibility="private"
        )
    return page


def _table(answer: Answer) -> Html:
    """The row of the table, one line for each cell."""
    header, rows, _ = answer.table
    lines = (
        tag("tr", tag("th", key, scope="row"), tag("td", value))
        for key, value in zip(header, rows[0])
    )
    return joined(tag("table", *lines), *(tag("p", note) for note in answer.notes))


def _gallery(answer: Answer) -> list[Any]:
    if answer.masked is not None:
        return [(answer.masked, "the class of each pixel")]
    if not answer.pictures:
        return []
    explained = [(x.drawn, label) for x, label in zip(answer.pictures, answer.labels)]
    return [(answer.pictures[0].seen, "what the model sees"), *explained]


def launch(page: Any, host: str, port: int, *, browser: bool, block: bool = True) -> str:
    """Serve a page until the process is interrupted.

    Args:
        page: The page.
        host: The address to listen on.
        port: The port; 0 for a free one.
        browser: Whether to open it in a browser.
        block: Whether to wait for the end of the server.

    Returns:
        The address of the page.

    Raises:
        OSError: if the address cannot be used.
    """
    gr = gradio()
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        inbrowser=browser,
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Default(font=_FONTS, font_mono=_MONOSPACED),
        css=_WIDTH,
    )
    if block:
        page.block_thread()
    return str(address)
