"""``Predictor``: answers requests with a ``Service``, without blocking the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tfimm_lora.serving.batching import Batcher, BatcherClosed, BatcherFull, BatchFailed
from tfimm_lora.serving.errors import RETRY, RequestError
from tfimm_lora.serving.metrics import Metrics
from tfimm_lora.serving.pictures import picture_reader
from tfimm_lora.serving.schemas import PredictAnswer, PredictRequest, Ranked
from tfimm_lora.serving.service import Row, RowPrediction, Service
from tfimm_lora.serving.settings import ServingSettings

STARTING, READY, FAILED = "starting", "ready", "failed"

_log = logging.getLogger(__name__)


class Predictor:
    """Pictures are decoded in threads, and predicted in batches in another thread.

    It runs while it is entered (``async with``), and is ready once the model is compiled.

    Args:
        service: The model and its adapters.
        settings: The limits.
        metrics: What is measured.
    """

    def __init__(self, service: Service, settings: ServingSettings, metrics: Metrics) -> None:
        self.status = READY if service.is_warm else STARTING
        self._service, self._settings, self._metrics = service, settings, metrics
        self._read = picture_reader(service.base.preprocessing, settings.max_pixels)
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="pictures")
        self._batcher: Batcher[Row, RowPrediction] = Batcher(
            self._run,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            max_waiting=settings.max_waiting,
        )

    @property
    def in_progress(self) -> int:
        """The number of predictions in progress."""
        return self._batcher.in_progress

    async def __aenter__(self) -> Predictor:
        await self._batcher.__aenter__()
        self._warming = asyncio.create_task(self._warm_up())
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._warming.cancel()
        await self._batcher.__aexit__(*exc)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _warm_up(self) -> None:
        if self.status == READY:
            return
        try:
            await asyncio.to_thread(self._service.warm_up)
        except Exception:  # noqa: BLE001 - whatever it is, /health reports it
            _log.exception("the model cannot be run")
            self.status = FAILED
        else:
            self.status = READY

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Take a place for a request during the block; take it before the request is read.

        Raises:
            RequestError: if all places are taken, or the model is not ready.
        """
        if self.status != READY:
            raise RequestError(
                503,
                f"a request while the status of the server is {self.status}",
                'one after GET /health answers "ready"',
                headers=RETRY,
            )
        try:
            with self._batcher.place():
                yield
        except BatcherFull:
            raise RequestError(
                503,
                f"a request while {self.in_progress} others are in progress",
                "at most that many at a time; send it again later",
                headers=RETRY,
            ) from None

    async def predict(self, request: PredictRequest) -> PredictAnswer:
        """Predict a picture.

        Raises:
            RequestError: if the picture or the adapter cannot be used, or the time is over.
        """
        seconds = self._settings.timeout
        try:
            prediction = await asyncio.wait_for(self._predict(request), seconds)
        except asyncio.TimeoutError:
            raise RequestError(
                504,
                f"a request that took more than {seconds:g} s",
                "fewer requests at a time",
                headers=RETRY,
            ) from None
        except BatchFailed:
            raise RequestError(
                500,
                "a picture whose batch failed in the model",
                "another attempt; the log of the server has the reason",
            ) from None
        except BatcherClosed:
            raise RequestError(
                503, "a request while the server stops", "one to another server", headers=RETRY
            ) from None
        return _answer(request, prediction)

    async def _predict(self, request: PredictRequest) -> RowPrediction:
        loop = asyncio.get_running_loop()
        inputs = await loop.run_in_executor(self._threads, self._inputs, request)
        return await self._batcher.submit(Row(inputs, request.adapter))

    def _inputs(self, request: PredictRequest) -> np.ndarray:
        """Check the adapter, and prepare the picture for the model."""
        if request.adapter is not None:
            self._service.require(request.adapter)
        elif not self._service.base.has_classifier:
            raise RequestError(
                422,
                "no adapter, but the classifier of the base model is new and not trained",
                "one of the adapters that GET /adapters lists",
            )
        return self._read(request.file)

    def _run(self, rows: list[Row]) -> list[RowPrediction | Exception]:
        started = time.perf_counter()
        self._metrics.batch_rows.observe(len(rows))
        try:
            return self._service.predict_rows(rows)
        finally:
            self._metrics.batch_seconds.observe(time.perf_counter() - started)


def _answer(request: PredictRequest, prediction: RowPrediction) -> PredictAnswer:
    p, labels = np.asarray(prediction.probabilities), prediction.labels
    if not np.isfinite(p).all():
        raise RequestError(
            500,
            f"outputs of the adapter {request.adapter} that are not finite",
            "an adapter that is not damaged by its training",
        )
    best = np.argsort(-p, kind="stable")[: request.top]
    top = [
        Ranked(label=labels[i] if labels else None, index=int(i), probability=float(p[i]))
        for i in best
    ]
    return PredictAnswer(adapter=request.adapter, label=top[0].label, classes=len(p), top=top)
