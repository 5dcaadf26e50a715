"""CaiT: the projections of attention and the MLP, also in the class attention blocks.

The projections over heads (proj_l, proj_w) are not included, since they are no larger than a
LoRA factor.

Source: Touvron et al., "Going deeper with Image Transformers", arXiv:2103.17239.
"""

from __future__ import annotations

PRESETS = {
    "attention": ("attn/qkv", "attn/q", "attn/k", "attn/v", "attn/proj"),
    "mlp": ("mlp/fc1", "mlp/fc2"),
}
