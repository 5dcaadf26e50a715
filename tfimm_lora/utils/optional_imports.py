"""Imports of packages that only some features need."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

#: Import names of packages that have another name on PyPI.
_PIP_NAMES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}


def require(module: str, *, extra: str, why: str = "") -> ModuleType:
    """Import an optional module.

    Args:
        module: The import name, for example "matplotlib.pyplot".
        extra: The extra of this package that installs it, for example "cli".
        why: The feature that needs it, for the error message.

    Raises:
        ImportError: if it is not installed. The message gives the command to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        root = module.partition(".")[0]
        if importlib.util.find_spec(root) is not None and error.name not in (root, module):
            raise  # the package is installed, but something that it needs is not
        package = _PIP_NAMES.get(root, root)
        raise ImportError(
            f"{why or 'This'} needs {package}, which is not installed: "
            f'pip install "tfimm_lora[{extra}]", or pip install {package}.'
        ) from error
