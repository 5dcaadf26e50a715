"""Griffe extension: what the site shows of the package's docstrings."""

from __future__ import annotations

import copy
import re
from typing import Any

import griffe

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


#: Names of arguments with one description that go on in a second line.
SPLIT_NAMES = re.compile(r"(?m)^( +(?:\w+, )*\w+,)\n +(?=(?:\w+, )*\w+: )")


class Docstrings(griffe.Extension):
    """Shows examples as code, and the LoRA layers by their public names."""

    def on_object(self, *, obj: Any, **kwargs: Any) -> None:
        """Write docstrings as griffe reads them: "Examples:", and names in one line."""
        if obj.docstring is not None:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = SPLIT_NAMES.sub(r"\1 ", text)

    def on_package(self, *, pkg: Any, **kwargs: Any) -> None:
        """Replace the aliases of the LoRA layers by the classes with their docstrings."""
        if pkg.name == "tfimm_lora":
            for name, source in LAYERS.items():
                layer = copy.copy(pkg[source])
                layer.name = name
                pkg.set_member(name, layer)
