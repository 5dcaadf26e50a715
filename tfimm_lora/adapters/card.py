"""README.md of an adapter folder: the model card that the hub shows."""

from __future__ import annotations

import re
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.model.state import has_random_weights
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
    lines += ["tags:", "- lora", "- tfimm_lora", "- image-classification", "---", ""]
    ranks = ", ".join(str(r) for r in sorted({x.rank for x in adapter.layers.values()}))
    title = f"LoRA adapter for {base}" if base else "LoRA adapter"
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
    lines += ["", "In Keras:", "", "```python", "import tfimm_lora as lora", ""]
    lines += ['lora.load_adapter(model, "path/of/this/folder")', "```", ""]
    if fields["peft_type"] == "LORA":
        lines += ["In PyTorch:", "", "```python", "from peft import PeftModel", ""]
        lines += ['PeftModel.from_pretrained(timm_model, "path/of/this/folder")', "```"]
    else:
        lines.append(
            "PEFT cannot read it, since it has layers that PEFT cannot express "
            f"({', '.join(sorted(adapter.not_in_peft()))})."
        )
    lines += ["", f"{MARK} {__version__}.", ""]
    return "\n".join(lines)
