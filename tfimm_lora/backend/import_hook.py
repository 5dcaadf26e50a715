"""Run code as soon as a package that somebody else imports has been imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import wrapt


def after_import(package: str, callback: Callable[[], None], around: tuple[str, ...]) -> None:
    """Call ``callback`` after each import of ``package`` or one of ``around`` that completes.

    It is not called before ``package`` is there, nor while one of ``around`` is still being
    imported: TensorFlow imports Keras in the middle of its own import and hides errors there,
    and tfimm does the same with both.

    Args:
        package: The package to wait for.
        callback: A function without arguments. It must bear to be called more than once.
        around: Packages that import ``package`` while they are imported themselves.
    """
    names = (package, *around)
    complete: set[str] = set()

    def imported(module: ModuleType) -> None:
        complete.add(module.__name__)
        in_progress = [name for name in names if name in sys.modules and name not in complete]
        if package in complete and not in_progress:
            callback()

    for name in names:
        wrapt.register_post_import_hook(imported, name)
