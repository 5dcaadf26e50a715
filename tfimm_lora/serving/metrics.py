"""``Metrics``: what ``GET /metrics`` reports, in the format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counts and times of one application."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tfimm_lora_requests",
            "Requests by path, method and status.",
            ("path", "method", "status"),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "tfimm_lora_request_seconds",
            "Seconds from the headers of a request to the end of its answer.",
            ("path",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_rows = Histogram(
            "tfimm_lora_batch_rows", "Rows of a batch.", buckets=_ROWS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "tfimm_lora_batch_seconds",
            "Seconds that the model takes for a batch.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is computed when it is asked for."""
        Gauge(f"tfimm_lora_{name}", help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class MeasuredRequests:
    """ASGI middleware that counts and times requests."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            # The template, not the path: names in requests must not become labels.
            path = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if path != "other" else "other"
            self.metrics.requests.labels(path, method, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - started)
