"""``Adapter``: the result of a LoRA fine-tuning as a value, with its files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.hub_download import download, is_hub_address
from tfimm_lora.adapters.read_files import check_subfolder, find_subfolder, read
from tfimm_lora.adapters.summary import summary
from tfimm_lora.adapters.write_files import write


@dataclass(frozen=True, eq=False, repr=False)
class Adapter(AdapterData):
    """A LoRA fine-tuning as an immutable value: the factors of each layer, and metadata.

    Create one with ``Adapter.load`` or ``adapter_of``. Load it into a model with
    ``load_adapter``.

    Attributes:
        layers: Module path -> ``LayerUpdate``. Module paths are timm's for tfimm models
            ("blocks.0.attn.qkv"), and for others the path of the layer with dots.
        weights: Key -> value of the fully trained weights, with torch's names and order of
            axes: "head.weight", "blocks.0.norm1.bias".
        modules: The fully trained modules (PEFT's modules_to_save), for example ("head",).
            Weights outside of them are biases.
        base_model: The model that the adapter was trained on: a hub id, a tfimm name, or "".
        bias: Which biases were trained: "none", "lora_only" or "all".
        dropout: The lora_dropout of the training.
        selection: What the config of its file selects, or None. ``load_adapter`` uses it to
            find layers that the file lacks.
        task: What the model was fine-tuned for and what its outputs mean, or None if it is not
            known; see ``TaskRecord``.

    Two adapters are equal if all of these but the selection are exactly equal.

    Example:
        >>> import numpy as np, tfimm_lora as lora
        >>> update = lora.LayerUpdate(np.ones((2, 8)), np.ones((4, 2)), scale=0.5)
        >>> adapter = lora.Adapter({"fc": update})
        >>> adapter.layers["fc"].delta().shape
        (4, 8)

    Reference: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> Adapter:
        """Read an adapter from a folder or from the hub.

        Args:
            path: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``, as
                written by ``save`` or PEFT; or "hf://user/repo" for a repository on the hub.
            subfolder: The folder of the adapter within the path or repository. PEFT saves an
                adapter whose name is not "default" in a folder of its name.
            revision: For the hub: branch, tag or commit. Default: the main branch.
            cache_dir: For the hub: the folder for downloads.

        Returns:
            The adapter.

        Raises:
            FileNotFoundError: If the folder, a file or the repository does not exist.
            TypeError: If an option is for the hub and the path is a folder, or ``subfolder`` is
                not a string.
            ValueError: If ``subfolder`` is not inside the path; or if a file is damaged or uses
                an unsupported feature, which the message names. Nothing is ever unpickled.
            ImportError: If safetensors or huggingface_hub is needed and not installed.

        Example:
            >>> import tempfile, numpy as np, tfimm_lora as lora
            >>> update = lora.LayerUpdate(np.ones((2, 8)), np.ones((4, 2)))
            >>> folder = tempfile.mkdtemp()
            >>> lora.Adapter({"fc": update}).save(folder)
            >>> lora.Adapter.load(folder)
            Adapter(1 layers of rank 2, base_model='')
        """
        check_subfolder(subfolder)
        if is_hub_address(path):
            path = download(os.fspath(path), subfolder, revision, cache_dir)
        elif revision is not None or cache_dir is not None:
            raise TypeError(
                f"Received revision={revision!r} and cache_dir={cache_dir!r} with path="
                f"{os.fspath(path)!r}; expected them only with a path on the hub, "
                "'hf://user/repo'."
            )
        elif subfolder is not None:
            path = find_subfolder(path, subfolder)
        return cls(*read(path)._values())

    def save(self, path: str | os.PathLike[str], format: str | None = None) -> None:
        """Write the adapter to a folder in PEFT's format, with a model card.

        Each file is replaced atomically: if the process is killed at any moment, the folder
        holds either the old adapter or the new one.

        Args:
            path: The folder; created if missing.
            format: None (default) writes PEFT's format. For layers that PEFT cannot express
                (standardised, grouped or depthwise convolutions) it writes an extension that
                PEFT refuses and ``Adapter.load`` reads. "peft" never writes the extension.

        Raises:
            ValueError: With format="peft", if PEFT cannot express a layer; the message names
                the layers and the reasons. Nothing is written.
            ImportError: If safetensors is not installed.
        """
        write(self, path, format)

    def summary(self, model: Any = None) -> str:
        """Return a table of the layers: rank, scale, norm and number of parameters.

        Args:
            model: The base model or LoRA model. If given, the table also has the norm of each
                update relative to the norm of the layer's frozen weight.

        Returns:
            Text with one line per layer and a line of totals. The columns are: the module
            path; rank; scale; the Frobenius norm of dW; this norm over the norm of the
            weight; the effective rank, which is the exponential of the entropy of the
            normalised singular values (Roy and Vetterli, "The effective rank", 2007); the
            number of parameters.

        Raises:
            ValueError: If the model does not have all layers of the adapter.
        """
        return summary(self, model)
