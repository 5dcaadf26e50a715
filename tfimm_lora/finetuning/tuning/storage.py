"""The Optuna study of a search: in memory, in a file, or in a database that machines share."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfimm_lora.utils.optional_imports import require

#: The name of the study in its storage, and the attribute with the settings of the search.
NAME, SETTINGS = "tfimm-lora", "settings"

#: The seconds between attempts to open a database. Optuna does not create its tables as one
#: transaction: where two processes open a new database at the same time, one of them is told
#: that a table exists already, and succeeds as soon as the other has created them all.
PAUSES = (0.1, 0.3, 1.0, 2.0)


def require_optuna() -> Any:
    """Import Optuna, or say what to install."""
    return require("optuna", extra="tune", why="Searching for settings")


def open_study(
    storage: str | os.PathLike[str] | None,
    settings: Mapping[str, Any],
    *,
    name: str = NAME,
    direction: str = "minimize",
) -> Any:
    """Create or open a study.

    Args:
        storage: None for memory, the path of a journal file, or the URL of a database.
        settings: What has to be the same for all that share the study.
        name: The name of the study.
        direction: "minimize" or "maximize".

    Raises:
        ImportError: without Optuna, or the driver of a database.
        ValueError: if the study was started with other settings.
    """
    optuna = require_optuna()
    options = {"study_name": name, "direction": direction, "load_if_exists": True}
    with _quiet(optuna):
        study = _create_or_load(optuna, storage, options)
    found = study.user_attrs.get(SETTINGS)
    if found is None:
        study.set_user_attr(SETTINGS, plain(settings))
    else:
        check_settings(found, settings, f"in {storage}")
    return study


def _create_or_load(
    optuna: Any, storage: str | os.PathLike[str] | None, options: Mapping[str, Any]
) -> Any:
    errors = require("sqlalchemy.exc", extra="tune", why="Searching for settings")
    for pause in PAUSES:
        try:
            return optuna.create_study(storage=_storage(optuna, storage), **options)
        except errors.DBAPIError:
            time.sleep(pause)
    return optuna.create_study(storage=_storage(optuna, storage), **options)


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are read from JSON, for comparison."""
    values: dict[str, Any] = json.loads(json.dumps(settings))
    return values


def check_settings(found: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Raise if a search was started with other settings."""
    wanted = plain(settings)
    changed = [
        f"{key}={found.get(key)!r}, now {wanted.get(key)!r}"
        for key in {**found, **wanted}
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise ValueError(
            f"The search {where} was started with other settings: {'; '.join(changed)}. "
            "Continue it with the same settings, or use another folder or storage."
        )


def _storage(optuna: Any, storage: str | os.PathLike[str] | None) -> Any:
    if storage is None:
        return optuna.storages.InMemoryStorage()
    if "://" in str(storage):
        return str(storage)
    journal = require("optuna.storages.journal", extra="tune", why="Searching for settings")
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    # This lock works on network file systems and on Windows.
    lock = journal.JournalFileOpenLock(str(storage))
    return optuna.storages.JournalStorage(journal.JournalFileBackend(str(storage), lock))


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Optuna reports each study on stderr; the search has messages of its own."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
