"""MLP-Mixer, ResMLP, gMLP and gMixer: the MLPs over tokens and over channels.

Source: Tolstikhin et al., "MLP-Mixer", arXiv:2105.01601; Touvron et al., "ResMLP",
arXiv:2105.03404; Liu et al., "Pay Attention to MLPs", arXiv:2105.08050.
"""

from __future__ import annotations

PRESETS = {
    "mlp": (
        "mlp_tokens/fc1",
        "mlp_tokens/fc2",
        "linear_tokens",
        "mlp_channels/fc1",
        "mlp_channels/gate/proj",
        "mlp_channels/fc2",
    ),
}
