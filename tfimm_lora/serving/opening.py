"""``open_service``: open the base model and the adapters of ``ServingSettings``."""

from __future__ import annotations

from collections.abc import Mapping

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.bank.bank import AdapterBank
from tfimm_lora.serving.adapter_folder import AdapterFolder
from tfimm_lora.serving.base import open_base
from tfimm_lora.serving.service import Service
from tfimm_lora.serving.settings import ServingSettings


def open_service(settings: ServingSettings) -> Service:
    """Open a base model and load all adapters of a folder.

    Raises:
        NotADirectoryError: if there is no folder of adapters.
        ValueError: if some of them cannot be served, with all reasons.
        ValueError, OSError, ImportError, RuntimeError: as ``open_base``.
    """
    folder = AdapterFolder(settings.adapters)
    base = open_base(settings)

    def make_bank(adapters: Mapping[str, Adapter]) -> AdapterBank:
        return AdapterBank(
            base.model,
            adapters,
            capacity=settings.capacity,
            max_rank=settings.max_rank,
            max_classes=settings.max_classes,
            targets=settings.targets,
        )

    return Service(base, make_bank, folder, settings.max_batch)
