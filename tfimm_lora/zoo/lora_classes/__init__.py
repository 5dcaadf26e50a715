"""LoRA versions of tfimm's architectures, one file per family, imported when first used.

Each file has the source of the architecture, a config class with the targets by preset name,
and the model class, which ``register_lora_architecture`` registers.
"""

import importlib
import pkgutil

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def register_all() -> None:
    """Import every family, which registers its LoRA version."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
