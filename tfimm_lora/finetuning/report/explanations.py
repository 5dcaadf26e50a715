"""The section of ``report.html`` that explains some predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tfimm_lora.finetuning.explained_pictures import LIMITS, explain_pictures, png
from tfimm_lora.finetuning.report.html import Html, data_uri, joined, tag
from tfimm_lora.finetuning.report.sections import captioned, count

if TYPE_CHECKING:
    from tfimm_lora.finetuning.run import Run
    from tfimm_lora.finetuning.tasks.base import Example

#: The largest number of predictions that are explained.
_SHOWN = 6


def explanations(run: Run, model: Any, examples: Sequence[Example]) -> Html | None:
    """The worst predictions with their heat maps, or why there are none.

    Args:
        run: The run.
        model: Its model.
        examples: The predictions, the worst first. Without any there is no section.
    """
    shown = examples[:_SHOWN]
    if not shown:
        return None
    try:
        pictures, found = explain_pictures(
            model, [(x.path, x.target) for x in shown], run.preprocessing
        )
    except Exception as error:  # noqa: BLE001 - a training that is complete does not fail here
        return tag("p", f"There are no explanations: {error or type(error).__name__}")
    items, about = [], run.task.views.explained
    for example, picture in zip(shown, pictures):
        image = tag("img", src=data_uri(png(picture.drawn)), alt="")
        items.append(tag("li", captioned(run, example.path, example.lines, image)))
    return joined(
        tag(
            "p",
            f"Where the evidence for {about} is, in {count(len(shown), 'example')}: "
            f"{found}. The pictures are shown in grey, as the model sees them, resized and "
            "cropped. The lighter the colour, the more evidence.",
        ),
        tag("p", LIMITS, class_="quiet"),
        tag("ol", *items, class_="mistakes"),
    )
