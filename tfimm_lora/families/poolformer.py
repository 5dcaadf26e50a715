"""PoolFormer: the two 1x1 convolutions of every MLP.

Source: Yu et al., "MetaFormer Is Actually What You Need for Vision", arXiv:2111.11418.
"""

from __future__ import annotations

PRESETS = {
    "mlp": ("mlp/fc1", "mlp/fc2"),
}
