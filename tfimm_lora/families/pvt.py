"""PVT: the projections of attention and the MLP.

Source: Wang et al., "Pyramid Vision Transformer", arXiv:2102.12122.
"""

from __future__ import annotations

PRESETS = {
    "attention": ("attn/q", "attn/kv", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}
