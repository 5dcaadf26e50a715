"""``Service``: a base model with the adapters of a folder, in one process."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tfimm_lora.adapters.adapter import Adapter
from tfimm_lora.finetuning.shared_base import SharedBase
from tfimm_lora.serving.adapter_folder import (
    NAME_IN_WORDS,
    AdapterFolder,
    Entry,
    NotRemovable,
    Version,
    is_name,
)
from tfimm_lora.serving.base import problems_of
from tfimm_lora.serving.errors import RequestError, shown

_log = logging.getLogger(__name__)


class RowPrediction(Protocol):
    """The prediction for one row, as ``AdapterBank`` returns it."""

    @property
    def labels(self) -> tuple[str, ...] | None: ...

    @property
    def probabilities(self) -> np.ndarray: ...


class Bank(Protocol):
    """What is used of ``AdapterBank``, so that the tests of HTTP need no model."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def load(self, name: str, adapter: Any, *, labels: Any = None) -> None: ...

    def remove(self, name: str) -> None: ...

    def predict(self, inputs: Any, names: Any) -> Sequence[RowPrediction]: ...

    def warm_up(self, inputs: Any) -> None: ...


class Row(NamedTuple):
    """A picture for the model, and the name of its adapter."""

    inputs: np.ndarray
    adapter: str | None


class AdapterState(NamedTuple):
    """What is known of an adapter.

    Attributes:
        version: The version of its files.
        labels: The names of its classes, if they are known.
        problem: Why it cannot be used; "" if it can.
    """

    version: Version
    labels: tuple[str, ...] | None
    problem: str


class Service:
    """Adapters that follow a folder, and predictions with them. All methods block.

    Args:
        base: The base model.
        make_bank: A function that makes a bank on it, which has room for these adapters.
        folder: The folder of adapters. All of them are loaded.
        max_batch: The most rows that ``predict_rows`` gets.

    Raises:
        ValueError: listing all adapters that cannot be served, each with the reason.
    """

    def __init__(
        self,
        base: SharedBase,
        make_bank: Callable[[Mapping[str, Adapter]], Bank],
        folder: AdapterFolder,
        max_batch: int,
    ) -> None:
        self.base = base
        self.folder = folder
        self.max_batch = max_batch
        self.is_warm = False
        self._states: dict[str, AdapterState] = {}
        # One change at a time; and none disappears between the check of a batch and its run.
        self._changing, self._removing = threading.Lock(), threading.Lock()
        found, problems = self._read_all()
        self._refuse(problems)
        self.bank = make_bank({name: entry.adapter for name, (_, entry) in found.items()})
        for name, (version, entry) in found.items():
            problem = self._load(name, entry)
            self._states[name] = AdapterState(version, entry.labels, problem)
        self._refuse({name: state.problem for name, state in self._states.items()})

    # -- the adapters ----------------------------------------------------------------------

    @property
    def count(self) -> int:
        """The number of adapters that are loaded. Unlike the bank's, it waits for no batch."""
        return sum(not state.problem for state in list(self._states.values()))

    def _read_all(self) -> tuple[dict[str, tuple[Version, Entry]], dict[str, str]]:
        """The adapters in the folder, and what is wrong with each of them."""
        found, problems = {}, {}
        for name in self.folder.subfolders():
            if not is_name(name):
                problems[shown(name)] = f"expected a name of {NAME_IN_WORDS}"
                continue
            try:
                with self.folder.locked():
                    version, entry = self.folder.version(name), self.folder.read(name)
            except (OSError, ValueError, TypeError) as error:
                problems[name] = str(error)
                continue
            assert version is not None  # its files were read
            found[name] = version, entry
            problems[name] = "; ".join(problems_of(self.base, entry))
        return found, problems

    def _refuse(self, problems: Mapping[str, str]) -> None:
        """Raise if there is a problem with any adapter."""
        listed = [f"  {name}: {problem}" for name, problem in problems.items() if problem]
        if listed:
            raise ValueError(
                f"Received --adapters {self.folder.path}, of which {len(listed)} cannot be "
                f"served on {self.base.name}:\n" + "\n".join(listed) + "\nMove them to another "
                "folder."
            )

    def require(self, name: str) -> AdapterState:
        """Load, reload or remove an adapter, as its folder has changed; return its state.

        Raises:
            RequestError: if there is none of this name, or it cannot be used.
        """
        check_name(name)
        state = self._states.get(name)
        if self.folder.version(name) != (state.version if state else None):
            self._follow(name)
            state = self._states.get(name)
        if state is None:
            raise _missing(name)
        if state.problem:
            raise RequestError(
                500,
                f"a request for the adapter {name}, which cannot be loaded",
                "one whose files are complete and fit the base model; the log of the server "
                "has the reason",
            )
        return state

    def refresh(self) -> dict[str, AdapterState]:
        """Load, reload and remove adapters, until they are those of the folder.

        Returns:
            The state of each adapter, also of those that cannot be used, sorted by name.
        """
        present = {name for name in self.folder.subfolders() if is_name(name)}
        for name in present | self._states.keys():
            state = self._states.get(name)
            if self.folder.version(name) != (state.version if state else None):
                self._follow(name)
        return dict(sorted(self._states.items()))

    def _follow(self, name: str) -> None:
        """Make the bank have what the folder has for a name."""
        with self._changing:
            entry: Entry | None = None
            problem = ""
            with self.folder.locked():
                version = self.folder.version(name)
                state = self._states.get(name)
                if state is not None and state.version == version:
                    return  # another thread was faster
                if version is not None:
                    try:
                        entry = self.folder.read(name)
                    except (OSError, ValueError, TypeError) as error:
                        problem = str(error)
            if entry is not None:
                problem = "; ".join(problems_of(self.base, entry)) or self._load(name, entry)
            if entry is None or problem:
                self._forget(name)
            if problem:
                _log.error("the adapter %s cannot be loaded: %s", name, problem)
            if version is not None:
                labels = entry.labels if entry is not None else None
                self._states[name] = AdapterState(version, labels, problem)

    def _load(self, name: str, entry: Entry) -> str:
        """Load an adapter into the bank. Returns what is wrong with it, or ""."""
        try:
            self.bank.load(name, entry.adapter, labels=entry.labels)
        except (ValueError, TypeError) as error:
            return str(error)
        if entry.run is not None and entry.run.unfinished is not None:
            done, requested = entry.run.unfinished
            warnings.warn(
                f"The run {name} is unfinished: {done} of {requested} epochs are complete. Its "
                "best epoch so far is served.",
                stacklevel=2,
            )
        return ""

    def _forget(self, name: str) -> None:
        self._states.pop(name, None)
        with self._removing:
            if name in self.bank.names:
                self.bank.remove(name)

    def put(self, name: str, staged: Path) -> bool:
        """Add or replace an adapter.

        Args:
            name: Its name.
            staged: Its files, in a folder of ``AdapterFolder.staging``, which are moved.

        Returns:
            Whether it replaced one.

        Raises:
            RequestError: if it cannot be used, or may not replace what is there.
            OSError: if the folder cannot be written. After an error, nothing has changed.
        """
        try:
            entry = AdapterFolder(staged.parent).read(staged.name)
        except (OSError, ValueError, TypeError) as error:
            raise _unusable(name, str(error), staged) from error
        with self._changing, self.folder.locked():
            existed = self.folder.version(name) is not None
            self._check_removable(name)
            problem = "; ".join(problems_of(self.base, entry)) or self._load(name, entry)
            if problem:
                raise _unusable(name, problem, staged)
            try:
                self.folder.replace(name, staged)
            except OSError:
                self._forget(name)  # the next request for it reads the folder again
                raise
            version = self.folder.version(name)
            assert version is not None
            self._states[name] = AdapterState(version, entry.labels, "")
        return existed

    def delete(self, name: str) -> None:
        """Delete an adapter and its folder.

        Raises:
            RequestError: if there is none of this name, or its folder contains more.
            OSError: if the folder cannot be written.
        """
        check_name(name)
        with self._changing, self.folder.locked():
            if self.folder.version(name) is None:
                raise _missing(name)
            self._check_removable(name)
            self.folder.remove(name)
            self._forget(name)

    def _check_removable(self, name: str) -> None:
        try:
            self.folder.check_removable(name)
        except NotRemovable as reason:
            raise RequestError(
                409,
                f"a request to replace or remove {name}, but {reason}",
                "an adapter that was uploaded; change others in the folder of the server",
            ) from None

    # -- predictions -----------------------------------------------------------------------

    def predict_rows(self, rows: Sequence[Row]) -> list[RowPrediction | Exception]:
        """Predict rows in one batch.

        Returns:
            A prediction for each row; an exception for one whose adapter was removed since it
            was requested.
        """
        with self._removing:
            known = {None, *self.bank.names}
            present = [row for row in rows if row.adapter in known]
            predictions: Iterator[RowPrediction] = iter(())
            if present:
                inputs = np.stack([row.inputs for row in present])
                predictions = iter(self.bank.predict(inputs, [row.adapter for row in present]))
            return [
                next(predictions) if row.adapter in known else _missing(row.adapter)
                for row in rows
            ]

    def warm_up(self) -> None:
        """Compile the model, so that the first requests are as quick as others."""
        preprocessing = self.base.preprocessing
        shape = (*preprocessing.input_size, preprocessing.in_channels)
        self.bank.warm_up(np.zeros((self.max_batch, *shape), np.float32))
        self.is_warm = True


def check_name(name: str) -> None:
    """Raise ``RequestError`` unless a text may be the name of an adapter."""
    if not is_name(name):
        raise RequestError(422, f"the adapter {shown(name)}", f"a name of {NAME_IN_WORDS}")


def _missing(name: str | None) -> RequestError:
    return RequestError(
        404,
        f"the adapter {name}, which does not exist",
        "one of those that GET /adapters lists",
    )


def _unusable(name: str, problem: str, staged: Path) -> RequestError:
    """The error for an upload; the path of its temporary folder tells nobody anything."""
    reason = problem.replace(str(staged), name).rstrip(".")
    return RequestError(
        422, f"the adapter {name}, which cannot be used: {reason}", "one that fits the model"
    )
