"""Griffe extension: what the site shows of the package's docstrings."""

from __future__ import annotations

import copy
from typing import Any

import griffe

from tfimm_lora.config import LayerSettings, SharedSettings, with_settings_doc

#: The LoRA layers are created for the Keras in use; these classes have their docstrings.
LAYERS = {
    "LoRADense": "layers.dense.DenseUpdate",
    "LoRAEinsumDense": "layers.einsum_dense.EinsumDenseUpdate",
    "LoRAEmbedding": "layers.embedding.EmbeddingUpdate",
    "LoRAConv1D": "layers.conv.Conv1DUpdate",
    "LoRAConv2D": "layers.conv.ConvUpdate",
    "LoRAConv3D": "layers.conv.ConvUpdate",
    "LoRADepthwiseConv2D": "layers.conv.DepthwiseConvUpdate",
}


class Docstrings(griffe.Extension):
    """Shows examples as code, and the LoRA layers by their public names."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Complete a docstring, and write it as griffe reads it."""
        if obj.docstring is not None:
            text = obj.docstring.value
            if "{settings}" in text:
                settings = SharedSettings if obj.name == "LoRAConfig" else LayerSettings
                text = with_settings_doc(text, settings)
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        """Replace the aliases of the LoRA layers by the classes with their docstrings."""
        if pkg.name == "tfimm_lora":
            for name, source in LAYERS.items():
                layer = copy.copy(pkg[source])
                layer.name = name
                pkg.set_member(name, layer)
