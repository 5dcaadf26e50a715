"""``Adapter.summary``: an adapter as a text table."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tfimm_lora.adapters.adapter_data import AdapterData
from tfimm_lora.adapters.model_names import in_names_of
from tfimm_lora.adapters.torch_layout import weight_norm
from tfimm_lora.utils.text_table import aligned_lines
from tfimm_lora.zoo.weights.module_names import ModuleNames


def summary(adapter: AdapterData, model: Any = None) -> str:
    """Return the table; see ``Adapter.summary``."""
    if model is not None:
        adapter = in_names_of(ModuleNames(model), adapter)
    norms = _weight_norms(adapter, model) if model is not None else {}
    header = ["layer", "rank", "scale", "norm", "effective rank", "parameters"]
    if norms:
        header.insert(4, "of weight")
    rows = []
    for path, update in adapter.layers.items():
        values = update.singular_values()
        norm = float(np.sqrt((values**2).sum()))
        row = [path, str(update.rank), f"{update.scale:.4g}", f"{norm:.4g}"]
        if norms:
            row.append(f"{100 * norm / norms[path]:.2f} %" if norms[path] else "-")
        row += [f"{effective_rank(values):.2f}", f"{update.size:,}"]
        rows.append(row)
    rows += [
        [key, "full", *[""] * (len(header) - 3), f"{value.size:,}"]
        for key, value in adapter.weights.items()
    ]
    totals = (
        f"{len(adapter.layers)} layers, {adapter.parameters:,} parameters, "
        f"{adapter.size:,} bytes"
    )
    left = [index == 0 for index in range(len(header))]
    return "\n".join([*aligned_lines([header, *rows], left), totals])


def effective_rank(singular_values: np.ndarray) -> float:
    """Return exp(-sum p log p), p being the singular values over their sum; 0 for zeros."""
    total = singular_values.sum()
    if not total:
        return 0.0
    share = singular_values / total
    share = share[share > 0]
    return math.exp(-float((share * np.log(share)).sum()))


def _weight_norms(adapter: AdapterData, model: Any) -> dict[str, float]:
    names = ModuleNames(model)
    missing = [module for module in adapter.layers if module not in names.paths]
    if missing:
        raise ValueError(
            f"Received model '{model.name}', which has no layers {', '.join(missing)}; "
            "expected the base model of the adapter."
        )
    return {m: weight_norm(names.layers[names.paths[m]]) for m in adapter.layers}
