"""What a service has done, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from khaosz.inference.request import Output
from khaosz.serve.models import Models

if TYPE_CHECKING:
    pass


@dataclass
class Usage:
    """Tokens of a request, from what its outputs say so far."""

    prompt: int = 0
    cached: int = 0
    generated: dict[int, int] = field(default_factory=dict)  # by choice
    first: float | None = None  # when the first output came, by `time.perf_counter`

    def count(self, output: Output) -> None:
        if self.first is None:
            self.first = time.perf_counter()
        self.prompt = output.prompt_tokens
        self.cached = max(self.cached, output.cached_tokens)
        self.generated[output.choice] = output.generated

    def body(self) -> dict[str, Any]:
        answered = sum(self.generated.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": answered,
            "total_tokens": self.prompt + answered,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """Counted on the event loop's thread."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, models: Models) -> None:
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(_State(models))
        self._registry = registry

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"khaosz_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"khaosz_{name}", text, labels, registry=registry, buckets=_SECONDS)

        self._requests = counter("requests", "Requests answered.", "route", "status")
        self._request_seconds = histogram("request_seconds", "Of whole requests.", "route")
        self._first = histogram("first_token_seconds", "Until an answer's first text.", "model")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._cached = counter("cached_tokens", "Of those, found in a cache.", "model")
        self._generated = counter("generated_tokens", "Tokens of answers.", "model")

    def answered(self, model: str, usage: Usage, began: float) -> None:
        """`began`: by `time.perf_counter`."""
        if usage.first is not None:
            self._first.labels(model).observe(usage.first - began)
        self._prompt.labels(model).inc(usage.prompt)
        self._cached.labels(model).inc(usage.cached)
        self._generated.labels(model).inc(sum(usage.generated.values()))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _State(Collector):
    """What is so at the moment that it is asked for."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        held = GaugeMetricFamily("khaosz_requests_held", "Under way and waiting.", labels=["model"])
        loaded = GaugeMetricFamily("khaosz_model_loaded", "1 where it is.", labels=["model"])
        size = GaugeMetricFamily("khaosz_model_bytes", "Weights and kept caches.", labels=["model"])
        for model in self._models.all:
            now = model.loaded
            held.add_metric([model.name], now.worker.held if now else 0)
            loaded.add_metric([model.name], int(now is not None))
            size.add_metric([model.name], now.nbytes if now else 0)
        return held, loaded, size


class Metered:
    """ASGI middleware: counts requests by the route that took them."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()

        async def noted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            # A path that is no route would be a label of a stranger's choice.
            route = getattr(scope.get("route"), "path", "other")
            self._meters.request(route, status, time.perf_counter() - began)
