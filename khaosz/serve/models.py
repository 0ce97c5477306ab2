"""The models of a service: loaded when they are first asked for, let go when memory is short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from khaosz.errors import ConfigError, ModelError
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.interop import GgufModel, is_gguf, load_config
from khaosz.model import parameter_shapes
from khaosz.serve.worker import Busy, EngineThread


@dataclass(frozen=True)
class Limits:
    """max_queue: requests that one model holds; max_batch: sequences in one pass. memory: bytes
    for weights and kept caches of all models together, None for no limit."""

    max_queue: int = 128
    max_batch: int = 64
    memory: int | None = None


@dataclass
class Loaded:
    generator: Generator
    worker: EngineThread
    adapters: dict[str, Adapter]
    weights: int  # bytes
    users: int = 0
    used: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        return self.weights + self.generator.engine.prefixes.nbytes


@dataclass
class Model:
    """One that is served, under its name and those of its adapters."""

    name: str
    source: Path
    adapters: dict[str, Path]
    context: int
    weights: int  # bytes that loading it will take
    loaded: Loaded | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def names(self) -> list[str]:
        return [self.name, *self.adapters]


@dataclass(frozen=True)
class Use:
    """A model that stays loaded while somebody uses it."""

    name: str  # that was asked for
    generator: Generator
    worker: EngineThread
    adapter: Adapter | None


class UnknownModel(Exception):
    pass


class Models:
    """Its methods belong to one event loop."""

    def __init__(self, models: Sequence[Model], limits: Limits, *, device: str = "cpu") -> None:
        """Raises `ConfigError` for a name that stands twice, and a model that alone is larger
        than the limit."""
        self.limits, self.device = limits, device
        self.started = int(time.time())
        self._by_name: dict[str, Model] = {}
        for model in models:
            for name in model.names:
                if name in self._by_name:
                    raise ConfigError(f"two models are named {name!r}", hint="NAME=PATH names one")
                self._by_name[name] = model
            if limits.memory is not None and model.weights > limits.memory:
                raise ConfigError(
                    f"{model.name} needs {model.weights >> 20:,} MB, --memory-limit leaves"
                    f" {limits.memory >> 20:,}"
                )
        self.all = list(models)
        self._making_room = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Model:
        """Raises `UnknownModel`."""
        if name not in self._by_name:
            raise UnknownModel(name)
        return self._by_name[name]

    def check_room(self, name: str) -> None:
        """Raises `UnknownModel`, and `Busy` when the model holds as many requests as it may."""
        loaded = self.find(name).loaded
        if loaded is not None:
            loaded.worker.check_room()

    def preload(self) -> None:
        """The first, before there is an event loop: what is wrong with it is known at once.
        Raises `ModelError`."""
        self.all[0].loaded = self._load(self.all[0])

    async def take(self, name: str) -> Use:
        """Loads it first where it isn't. Every use must be given back.

        Raises `UnknownModel`, `Busy` when others that are in use leave no room, `ModelError`.
        """
        model = self.find(name)
        async with model.loading:
            if model.loaded is None:
                async with self._making_room:  # one loads at a time
                    await self._make_room(model)
                    model.loaded = await asyncio.to_thread(self._load, model)
            loaded = model.loaded
            loaded.worker.start()
            loaded.users += 1
        return Use(name, loaded.generator, loaded.worker, loaded.adapters.get(name))

    def give_back(self, use: Use) -> None:
        loaded = self.find(use.name).loaded
        assert loaded is not None and loaded.users > 0, use.name
        loaded.users -= 1
        loaded.used = time.monotonic()
        self._forget_caches()

    async def stop(self) -> None:
        """Requests that are still under way fail."""
        for model in self.all:
            if model.loaded is not None:
                await model.loaded.worker.stop()

    async def _make_room(self, wanted: Model) -> None:
        """Let idle models go, the longest unused first, until this one has room."""
        if self.limits.memory is None:
            return
        while sum(each.nbytes for each in self._loaded()) + wanted.weights > self.limits.memory:
            idle = [
                model for model in self.all if model.loaded is not None and not model.loaded.users
            ]
            if not idle:
                raise Busy
            oldest = min(idle, key=lambda model: model.loaded.used if model.loaded else 0.0)
            loaded, oldest.loaded = oldest.loaded, None
            assert loaded is not None
            await loaded.worker.stop()

    def _forget_caches(self) -> None:
        """Kept caches grow after a model was let in: those beyond the limit go, beginning with the
        longest unused model's."""
        if self.limits.memory is None:
            return
        over = sum(each.nbytes for each in self._loaded()) - self.limits.memory
        for each in sorted(self._loaded(), key=lambda each: each.used):
            kept = each.nbytes - each.weights
            if over > 0 and kept:
                each.worker.keep_at_most(max(0, kept - over))
                over -= kept

    def _loaded(self) -> Iterator[Loaded]:
        return (model.loaded for model in self.all if model.loaded is not None)

    def _load(self, model: Model) -> Loaded:
        generator = Generator.from_directory(model.source, device=self.device)
        runner = generator.engine.runner
        generator.engine = Engine(runner, generator.tokenizer, max_batch=self.limits.max_batch)
        adapters = {
            name: Adapter(runner.config, path, device=runner.device, dtype=runner.dtype)
            for name, path in model.adapters.items()
        }
        weights = model.weights + sum(adapter.nbytes for adapter in adapters.values())
        worker = EngineThread(generator.engine, self.limits.max_queue)
        return Loaded(generator, worker, adapters, weights)


def describe(name: str, source: Path, adapters: dict[str, Path]) -> Model:
    """A model as its files say, without its weights. Raises `ModelError`, for adapters too."""
    if not source.exists():
        raise ModelError(f"{source} does not exist")
    if is_gguf(source):
        config, weights = GgufModel.open(source).config, source.stat().st_size
    else:
        config = load_config(source)
        weights = 4 * sum(prod(shape) for shape in parameter_shapes(config).values())  # fp32
    for path in adapters.values():
        Adapter(config, path)
    return Model(name, source, adapters, config.max_position_embeddings, weights)
