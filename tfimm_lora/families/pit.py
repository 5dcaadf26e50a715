"""PiT and distilled PiT: the projections of attention and the MLP.

Source: Heo et al., "Rethinking Spatial Dimensions of Vision Transformers",
arXiv:2103.16302.
"""

from __future__ import annotations

PRESETS = {
    "attention": ("attn/qkv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}
