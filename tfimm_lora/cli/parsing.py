"""Words of the command line that mean more than text."""

from __future__ import annotations

import re

from tfimm_lora.config import LoRAConfig, Targets


def parse_targets(text: str | None) -> Targets:
    r"""``lora_targets`` as a person writes them on the command line.

    Args:
        text: The name of a preset; a regular expression for whole paths, told by signs that
            no layer's name has; or names of layers with commas between. None is the default.

    Returns:
        What ``LoRAConfig`` takes.

    Example:
        >>> parse_targets("mlp"), parse_targets("fc1, mlp/fc2"), parse_targets(r"blocks/\d+/.*")
        ('mlp', ['fc1', 'mlp/fc2'], 'blocks/\\d+/.*')
    """
    if text is None or text in LoRAConfig.presets() or re.search(r"[\\()\[\]|^$*+?{}]", text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
