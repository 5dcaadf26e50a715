"""ConvMixer: the 1x1 convolution of every block.

Source: Trockman and Kolter, "Patches Are All You Need?", arXiv:2201.09792.
"""

from __future__ import annotations

PRESETS = {
    "default": r"blocks/\d+/1",
}
