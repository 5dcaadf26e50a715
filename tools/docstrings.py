"""For the site: our docstrings say "Example:", which griffe only knows as "Examples:"."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Shows the examples of docstrings as code."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called with every module, class and function that is documented."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
