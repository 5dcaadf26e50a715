"""MkDocs hooks: add the notebooks, which lie outside of docs/, to the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Any, config: Any) -> Any:
    """Add notebooks/*.ipynb."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
