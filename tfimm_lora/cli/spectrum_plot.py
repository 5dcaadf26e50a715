"""A plot of an adapter: the norm and the singular values of the update of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfimm_lora.utils.optional_imports import require

SUFFIXES = (".png", ".svg", ".pdf")

#: Height of a row in inches, which fits a line of small text.
_ROW = 0.16


def require_suffix(path: Path) -> None:
    """Raise a ValueError unless the suffix of ``path`` is one of ``SUFFIXES``."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"Received --plot {path}; expected a file with the suffix {', '.join(SUFFIXES)}."
        )


def draw(layers: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Draw the layers of an adapter to a file, one per row.

    Args:
        layers: The layers, as ``inspect.describe`` returns them.
        path: The file to write.
        title: The title of the figure.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure_module = require("matplotlib.figure", extra="cli", why="--plot")
    rows = np.arange(len(layers))
    size = (11, 1.4 + _ROW * max(len(layers), 8))
    figure = figure_module.Figure(figsize=size, dpi=120, layout="constrained")
    sizes, spectra = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    figure.suptitle(title, fontsize=10)

    sizes.barh(rows, [x["norm"] for x in layers], height=0.75, color="#3b6ea5")
    sizes.plot([x["largest"] for x in layers], rows, "|", color="#d1662b", markersize=7)
    sizes.set_yticks(rows, [x["layer"] for x in layers], fontsize=7)
    sizes.set_ylim(len(layers) - 0.5, -0.5)
    sizes.set_xlim(left=0)
    sizes.set_xlabel("Frobenius norm of the update (bar), largest singular value (mark)")
    sizes.grid(axis="x", alpha=0.3)
    sizes.set_axisbelow(True)

    shares = _shares(layers)
    spectra.set_facecolor("#eeeeee")  # shown beyond the rank of a layer
    image = spectra.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    columns = shares.shape[1]
    effective = [x["effective_rank"] - 0.5 for x in layers]
    spectra.plot(effective, rows, ".", color="white", markeredgecolor="black", markersize=6)
    spectra.set_xlim(-0.5, columns - 0.5)
    ticks = np.unique(np.linspace(0, columns - 1, min(columns, 8)).astype(int))
    spectra.set_xticks(ticks, [str(i + 1) for i in ticks])
    spectra.tick_params(axis="y", labelleft=False)
    spectra.set_xlabel("singular values, largest first (dot: effective rank)")
    length = min(1.0, 20 / len(layers))
    bar = figure.colorbar(image, ax=spectra, anchor=(0, 1), shrink=length, aspect=25)
    bar.set_label("share of the largest", fontsize=8)
    for axes in (sizes, spectra, bar.ax):
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(8)
    figure.savefig(path)


def _shares(layers: Sequence[dict[str, Any]]) -> np.ndarray:
    """Singular values over the largest of their layer, (layers, rank), padded with NaN."""
    longest = max(len(x["singular_values"]) for x in layers)
    shares = np.full((len(layers), longest), np.nan)
    for row, x in zip(shares, layers):
        row[: len(x["singular_values"])] = np.divide(
            x["singular_values"], x["largest"] if x["largest"] else 1.0
        )
    return shares
