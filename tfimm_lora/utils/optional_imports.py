"""Packages that only some features need: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

#: What pip calls packages that Python calls otherwise.
_PIP_NAMES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}


def require(module: str, *, extra: str, why: str = "") -> ModuleType:
    """Import an optional module.

    Args:
        module: Its name in Python, for example "matplotlib.pyplot".
        extra: The extra of this package that installs it, for example "cli".
        why: What needs it, for the message.

    Raises:
        ImportError: if it is not installed, saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != root:
            raise  # it is installed, but something that it needs is not
        package = _PIP_NAMES.get(root, root)
        raise ImportError(
            f"{why or 'This'} needs {package}, which is not installed: "
            f'pip install "tfimm_lora[{extra}]", or pip install {package}.'
        ) from error
