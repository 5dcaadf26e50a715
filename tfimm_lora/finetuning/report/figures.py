"""Colours, fonts and files of all plots of a run.

``pyplot`` is not used, so no display is needed and no global state is changed.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tfimm_lora.utils.atomic_files import write_file
from tfimm_lora.utils.optional_imports import require

#: The output of a plot: a path, whose suffix determines the format, or an open binary file.
Target = str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True)
class Theme:
    """Colours. Blue and orange can be distinguished with any colour blindness."""

    paper: str
    ink: str
    muted: str
    grid: str
    blue: str
    orange: str


# Blue and orange as in Okabe and Ito, "Color Universal Design" (2008).
LIGHT = Theme("#ffffff", "#1d2430", "#5c6675", "#e2e6ec", "#0072b2", "#d55e00")
DARK = Theme("#171b21", "#e7eaf0", "#9aa5b4", "#2d343f", "#56b4e9", "#f0953f")

#: Fonts for scripts that the default font of matplotlib lacks, used if installed.
_FONTS = (
    *("Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei"),
    *("Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai"),
    *("Arial Unicode MS", "Hiragino Sans", "PingFang SC", "Microsoft YaHei", "Noto Emoji"),
)


@contextlib.contextmanager
def canvas(
    path: Target, width: float, height: float, dark: bool
) -> Iterator[tuple[Any, Theme]]:
    """A figure to draw on, of a size in inches, which is saved at the end of the block.

    The file is written atomically.

    Raises:
        ImportError: without matplotlib.
        ValueError: for a suffix that matplotlib does not support.
    """
    figures = require("matplotlib.figure", extra="cli", why="Drawing")
    style = require("matplotlib.style", extra="cli", why="Drawing")
    theme = DARK if dark else LIGHT
    with style.context(["default", _settings(theme)]):
        figure = figures.Figure(figsize=(width, height), dpi=150, layout="constrained")
        yield figure, theme
        drawn = io.BytesIO()
        named = isinstance(path, (str, os.PathLike))
        suffix = Path(path).suffix[1:].lower() if named else ""  # type: ignore[arg-type]
        with warnings.catch_warnings():
            # Labels in a script without a font are drawn as boxes; avoid one warning for
            # each character.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            # Tight, so that labels that are longer than estimated enlarge the plot.
            figure.savefig(drawn, format=suffix or "png", bbox_inches="tight", pad_inches=0.15)
    if named:
        write_file(Path(path), drawn.getvalue())  # type: ignore[arg-type]
    else:
        path.write(drawn.getvalue())  # type: ignore[union-attr]


def _settings(theme: Theme) -> dict[str, Any]:
    """matplotlib's settings for a theme."""
    fonts = require("matplotlib.font_manager", extra="cli", why="Drawing")
    there = {font.name for font in fonts.fontManager.ttflist}
    return {
        "font.family": ["DejaVu Sans", *(name for name in _FONTS if name in there)],
        "font.size": 9,
        "text.parse_math": False,  # a "$" in a label is a dollar
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.grid,
        "axes.labelcolor": theme.muted,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.grid,
        "ytick.color": theme.grid,
        "xtick.labelcolor": theme.muted,
        "ytick.labelcolor": theme.muted,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
