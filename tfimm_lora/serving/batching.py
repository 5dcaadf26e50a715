"""``Batcher``: the rows of many requests, in batches for one function in one thread."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Row = TypeVar("Row")
Result = TypeVar("Result")

_log = logging.getLogger(__name__)


class BatcherFull(Exception):
    """There are as many requests in progress as there may be."""


class BatchFailed(Exception):
    """The function raised an error for the batch of a row."""


class BatcherClosed(Exception):
    """The batcher was closed before the row was run."""


@dataclass(eq=False)
class _Waiting(Generic[Row]):
    row: Row
    arrived: float
    future: asyncio.Future[Any]


class Batcher(Generic[Row, Result]):
    """Collect rows for a few milliseconds and run them in one batch.

    A batch starts when it is full, or when its first row has waited ``max_wait`` seconds and
    the thread is free. Rows keep their order. Use it in one event loop.

    Args:
        run: A function from rows to as many results. A result that is an exception is raised
            for its row. If the function itself raises, all rows of the batch, and only these,
            get ``BatchFailed``.
        max_batch: The most rows in a batch.
        max_wait: The seconds that the first row of a batch waits for others.
        max_waiting: The most places, see ``place``.
    """

    def __init__(
        self,
        run: Callable[[list[Row]], Sequence[Result | Exception]],
        *,
        max_batch: int,
        max_wait: float,
        max_waiting: int,
    ) -> None:
        self._run = run
        self._max_batch, self._max_wait, self._max_waiting = max_batch, max_wait, max_waiting
        self._waiting: deque[_Waiting[Row]] = deque()
        self._places = 0
        self._some, self._enough = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._task: asyncio.Task[None] | None = None

    @property
    def in_progress(self) -> int:
        """The number of places that are taken."""
        return self._places

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place in the queue during the block.

        Take it before a request is read, so that neither rows nor uploads accumulate.

        Raises:
            BatcherFull: if ``max_waiting`` places are taken.
        """
        if self._places >= self._max_waiting:
            raise BatcherFull
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def submit(self, row: Row) -> Result:
        """Run a row in some batch and return its result.

        A row whose caller is cancelled, as by a timeout, is left out if its batch has not
        started.

        Raises:
            BatchFailed: if its batch failed.
            BatcherClosed: if the batcher is closed.
        """
        if self._task is None:
            raise BatcherClosed
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Waiting(row, loop.time(), future))
        self._notify()
        return await future

    async def __aenter__(self) -> Batcher[Row, Result]:
        self._task = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End after the batch that is running; rows that still wait get ``BatcherClosed``."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for waiting in self._waiting:
            if not waiting.future.done():
                waiting.future.set_exception(BatcherClosed())
        self._waiting.clear()
        await asyncio.to_thread(self._thread.shutdown)

    def _notify(self) -> None:
        for event, least in ((self._some, 1), (self._enough, self._max_batch)):
            event.set() if len(self._waiting) >= least else event.clear()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            left = self._waiting[0].arrived + self._max_wait - loop.time()
            if left > 0:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), left)
            count = min(len(self._waiting), self._max_batch)
            taken = [self._waiting.popleft() for _ in range(count)]
            self._notify()
            batch = [x for x in taken if not x.future.done()]
            if batch:
                # Shielded, so that closing waits for the batch that is running.
                await asyncio.shield(self._run_batch(batch))

    async def _run_batch(self, batch: list[_Waiting[Row]]) -> None:
        loop = asyncio.get_running_loop()
        results: Sequence[Result | Exception]
        try:
            results = await loop.run_in_executor(
                self._thread, self._run, [x.row for x in batch]
            )
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} rows")
        except Exception:  # noqa: BLE001 - whatever it is, the next batch may work
            _log.exception("a batch of %d rows failed", len(batch))
            results = [BatchFailed() for _ in batch]
        for waiting, result in zip(batch, results):
            if waiting.future.done():
                continue
            if isinstance(result, Exception):
                waiting.future.set_exception(result)
            else:
                waiting.future.set_result(result)
