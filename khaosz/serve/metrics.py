"""Counters of the service in Prometheus' format."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from khaosz.inference.request import Output
from khaosz.serve.models import Models


@dataclass
class Usage:
    """Tokens of a request, counted from its outputs."""

    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # by prompt: tokens, cached
    generated: dict[int, int] = field(default_factory=dict)  # by choice
    first: float | None = None  # time of the first output, by `time.perf_counter`

    def count(self, output: Output) -> None:
        if self.first is None:
            self.first = time.perf_counter()
        _, cached = self.prompts.get(output.request_id, (0, 0))
        self.prompts[output.request_id] = output.prompt_tokens, max(cached, output.cached_tokens)
        self.generated[output.choice] = output.generated

    @property
    def prompt(self) -> int:
        return sum(tokens for tokens, _ in self.prompts.values())

    @property
    def cached(self) -> int:
        return sum(cached for _, cached in self.prompts.values())

    def body(self) -> dict[str, Any]:
        generated = sum(self.generated.values())
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": generated,
            "total_tokens": self.prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Meters:
    """Used by the event loop's thread only."""

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
        self._request_seconds = histogram("request_seconds", "Duration of requests.", "route")
        self._first = histogram("first_token_seconds", "Time to the first output.", "model")
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", "model")
        self._cached = counter("cached_tokens", "Prompt tokens found in the prefix cache.", "model")
        self._generated = counter("generated_tokens", "Tokens of answers.", "model")

    def answered(self, model: str, usage: Usage, started: float) -> None:
        """`started`: by `time.perf_counter`."""
        if usage.first is not None:
            self._first.labels(model).observe(usage.first - started)
        self._prompt.labels(model).inc(usage.prompt)
        self._cached.labels(model).inc(usage.cached)
        self._generated.labels(model).inc(sum(usage.generated.values()))

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _State(Collector):
    """Gauges, read when they are collected."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterable[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"khaosz_{name}", text, labels=["model"])

        requests = gauge("requests_held", "Running and waiting requests.")
        loaded = gauge("model_loaded", "1 if it is loaded.")
        size = gauge("model_bytes", "Weights and prefix cache.")
        for model in self._models.all:
            instance = model.loaded
            requests.add_metric([model.name], instance.worker.open_requests if instance else 0)
            loaded.add_metric([model.name], int(instance is not None))
            size.add_metric([model.name], instance.nbytes if instance else 0)
        return requests, loaded, size


class Metered:
    """ASGI middleware: counts requests by route."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = 500, time.perf_counter()

        async def send_and_note(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            # An unknown path would let clients create labels.
            route = getattr(scope.get("route"), "path", "other")
            self._meters.request(route, status, time.perf_counter() - started)
