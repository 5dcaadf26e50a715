"""LoRA versions of tfimm's architectures, one file per family, imported when first used."""

import importlib
import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def register_all() -> None:
    """Import every family, which registers its LoRA version."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
