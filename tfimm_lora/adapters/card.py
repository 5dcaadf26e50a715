"""README.md of an adapter folder: the model card that the hub shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.model.state import has_random_weights
from tfimm_lora.model.task_record import TaskRecord
from tfimm_lora.peft.fields import OWN_TYPE
from tfimm_lora.version import __version__

#: Marks a card that this package wrote, which it may replace.
MARK = "Written by tfimm_lora"

#: What the hub accepts as a base model. Other names are in the text only.
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(adapter: AdapterData, fields: dict[str, Any]) -> str:
    """Return the text of the card. The hub indexes its header."""
    base = adapter.base_model
    lines = ["---", "library_name: peft"]
    if _HUB_ID.fullmatch(base):
        lines.append(f"base_model: {base}")
    task = adapter.task
    kind = "image-classification" if task is None or task.activation else task.name
    variant = "LoHa" if adapter.use_loha else "LoRA"
    lines += ["tags:", f"- {variant.lower()}", "- tfimm_lora", f"- {kind}", "---", ""]
    ranks = ", ".join(str(r) for r in sorted({x.rank for x in adapter.layers.values()}))
    title = f"{variant} adapter for {base}" if base else f"{variant} adapter"
    lines += [
        f"# {title}",
        "",
        f"{len(adapter.layers)} layers of rank {ranks}; {adapter.size:,} bytes of weights.",
    ]
    if has_random_weights(base):
        lines.append(
            "The base model started with random weights, which no checkpoint contains. The "
            "adapter is of use only with the weights that it was trained with."
        )
    if adapter.modules:
        lines.append(f"Fully trained: {', '.join(adapter.modules)}.")
    if adapter.bias != "none":
        lines.append(f"Trained biases: {adapter.bias}.")
    if task is not None:
        lines += _task_lines(task)
    lines += ["", "In Keras:", "", "```python", "import tfimm_lora as lora", ""]
    lines += ['lora.load_adapter(model, "path/of/this/folder")', "```", ""]
    if fields["peft_type"] != OWN_TYPE:
        lines += ["In PyTorch:", "", "```python", "from peft import PeftModel", ""]
        lines += ['PeftModel.from_pretrained(timm_model, "path/of/this/folder")', "```"]
    else:
        lines.append(
            "PEFT cannot read it, since it has layers or weights that PEFT cannot express "
            f"({', '.join(sorted(adapter.not_in_peft()))})."
        )
    lines += ["", f"{MARK} {__version__}.", ""]
    return "\n".join(lines)


def _task_lines(task: TaskRecord) -> list[str]:
    """What the outputs mean, with a table of the numbers that belong to them."""
    columns: dict[str, Sequence[float]] = {}
    if task.mean is not None and task.std is not None:
        columns.update(mean=task.mean, std=task.std)
    numbers = dict(task.chosen)
    columns.update({k: v for k, v in numbers.items() if not isinstance(v, (int, float))})
    meaning = {
        "softmax": "The outputs are logits: a softmax gives the probabilities.",
        "sigmoid": "The outputs are logits: a sigmoid gives the probability of each label.",
    }.get(task.activation or "", "The outputs are numbers.")
    if task.mean is not None:
        meaning = "The predictions are mean + std * output."
    lines = ["", f"Task: {task.name}. {meaning}", ""]
    lines.append(" | ".join(("| output", "label", *map(_plain, columns))) + " |")
    lines.append("|---" * (2 + len(columns)) + "|")
    for i, label in enumerate(task.labels):
        cells = (str(i), _plain(label), *(f"{values[i]:.6g}" for values in columns.values()))
        lines.append(f"| {' | '.join(cells)} |")
    scalars = {k: v for k, v in numbers.items() if isinstance(v, (int, float))}
    lines += [f"\n{_plain(name)}: {value:g}." for name, value in scalars.items()]
    return lines


def _plain(text: str) -> str:
    """A name without characters that have a meaning in Markdown or HTML."""
    return re.sub(r"[^\w .,:;()+%°/-]", "_", text)
