"""The models of a service: loaded on first use, unloaded when memory is short."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from khaosz.data.tokenizer.thinking import Thinking
from khaosz.errors import ConfigError, ModelError, NotEnoughMemoryError
from khaosz.inference.adapter import Adapter
from khaosz.inference.engine import Engine
from khaosz.inference.generator import Generator
from khaosz.inference.runner import storage_of
from khaosz.interop.huggingface_config import load_config
from khaosz.interop.languages import Languages, known_languages
from khaosz.interop.models import is_gguf, open_model, thinking_in
from khaosz.interop.sampling import FALLBACK, sampling_defaults
from khaosz.model import parameter_shapes
from khaosz.serve.worker import Busy, EngineThread


@dataclass(frozen=True)
class Limits:
    """max_queue: running and waiting requests of one model; max_batch: sequences in one pass.
    memory: bytes for weights and prefix caches of all models together, None for no limit.
    context: tokens of prompt and answer at most; memory_check: refuse what cannot fit."""

    max_queue: int = 128
    max_batch: int = 64
    memory: int | None = None
    context: int | None = None
    memory_check: bool = True


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
    """A served model, under its own name and those of its adapters. `sampling`: what a request
    that names nothing gets; `languages`: None for a model that the catalogue does not have."""

    name: str
    source: Path
    adapters: dict[str, Path]
    context: int
    weights: int  # bytes when it is loaded
    thinking: Thinking = field(default_factory=Thinking)
    sampling: Mapping[str, float] = field(default_factory=lambda: FALLBACK)
    languages: Languages | None = None
    loaded: Loaded | None = None
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def names(self) -> list[str]:
        return [self.name, *self.adapters]


@dataclass(frozen=True)
class Use:
    """A loaned model, which stays loaded until it is given back."""

    name: str  # as requested: the model's or an adapter's
    generator: Generator
    worker: EngineThread
    adapter: Adapter | None


class UnknownModel(Exception):
    pass


class Models:
    """All methods are for one event loop."""

    def __init__(
        self,
        models: Sequence[Model],
        limits: Limits,
        *,
        device: str = "cpu",
        deterministic: bool = False,
    ) -> None:
        """`models` may be empty, and more added later. Raises `ConfigError` for a duplicate name, a
        model larger than the limit, and a context beyond that of every model."""
        self.limits, self.device, self.deterministic = limits, device, deterministic
        self.started = int(time.time())
        self._by_name: dict[str, Model] = {}
        self.all: list[Model] = []
        longest = max((model.context for model in models), default=0)
        for model in models:
            self.add(model)
        if models and limits.context is not None and limits.context > longest:
            raise ConfigError(
                f"--context {limits.context:,} is beyond {longest:,}, the models' own"
            )
        self._load_lock = asyncio.Lock()

    def add(self, model: Model) -> None:
        """Serve one more model, which is loaded on first use. Raises `ConfigError` for a duplicate
        name and a model larger than the limit."""
        for i, name in enumerate(model.names):
            if name in self._by_name or name in model.names[:i]:
                raise ConfigError(f"two models are named {name!r}", hint="NAME=PATH names one")
        limit = self.limits.memory
        if limit is not None and model.weights > limit:
            raise ConfigError(
                f"{model.name} needs {model.weights >> 20:,} MB, --memory-limit leaves"
                f" {limit >> 20:,}"
            )
        if self.limits.context is not None:
            model.context = min(model.context, self.limits.context)
        self._by_name |= dict.fromkeys(model.names, model)
        self.all.append(model)

    def name_of(self, source: Path) -> str | None:
        """The name by which the model at this path is served, None if it is not."""
        source = source.resolve()
        return next((each.name for each in self.all if each.source.resolve() == source), None)

    @property
    def names(self) -> list[str]:
        return list(self._by_name)

    def find(self, name: str) -> Model:
        """Raises `UnknownModel`."""
        if name not in self._by_name:
            raise UnknownModel(name)
        return self._by_name[name]

    def check_capacity(self, name: str) -> None:
        """Raises `UnknownModel`, and `Busy` when the model's queue is full."""
        loaded = self.find(name).loaded
        if loaded is not None:
            loaded.worker.check_capacity()

    def preload(self) -> None:
        """Load the first model, if there is one, before the event loop runs, so that its errors end
        the start. Raises `ModelError`."""
        if self.all:
            self.all[0].loaded = self._load(self.all[0])

    async def take(self, name: str) -> Use:
        """Load the model if needed and mark it as in use. Every use must be given back.

        Raises `UnknownModel`, `Busy` when models in use leave no memory for it under the limit,
        `NotEnoughMemoryError` when the machine has none, `ModelError`.
        """
        model = self.find(name)
        async with model.loading:
            if model.loaded is None:
                async with self._load_lock:  # one at a time
                    await self._free_memory(model)
                    model.loaded = await self._load_or_unload(model)
            loaded = model.loaded
            loaded.worker.start()
            loaded.users += 1
        return Use(name, loaded.generator, loaded.worker, loaded.adapters.get(name))

    def give_back(self, use: Use) -> None:
        loaded = self.find(use.name).loaded
        assert loaded is not None and loaded.users > 0, use.name
        loaded.users -= 1
        loaded.used = time.monotonic()
        self._shrink_caches()

    def interrupt(self) -> None:
        """Running and waiting requests raise `Stopping`."""
        for model in self.all:
            if model.loaded is not None:
                model.loaded.worker.interrupt()

    async def stop(self) -> None:
        """Running requests fail."""
        for model in self.all:
            if model.loaded is not None:
                await model.loaded.worker.stop()

    async def _load_or_unload(self, model: Model) -> Loaded:
        """Load a model; while the machine's memory is short, unload idle ones first."""
        while True:
            try:
                return await asyncio.to_thread(self._load, model)
            except NotEnoughMemoryError:
                if not await self._unload_idle():
                    raise

    async def _free_memory(self, model: Model) -> None:
        """Unload idle models until this one fits the limit."""
        if self.limits.memory is None:
            return
        while sum(each.nbytes for each in self._loaded()) + model.weights > self.limits.memory:
            if not await self._unload_idle():
                raise Busy

    async def _unload_idle(self) -> bool:
        """Unload the model that was used least recently of those that are idle, if there is one."""
        idle = [
            (each.loaded.used, i)
            for i, each in enumerate(self.all)
            if each.loaded is not None and not each.loaded.users
        ]
        if not idle:
            return False
        oldest = self.all[min(idle)[1]]
        loaded, oldest.loaded = oldest.loaded, None
        assert loaded is not None
        await loaded.worker.stop()
        return True

    def _shrink_caches(self) -> None:
        """Prefix caches grow after a model was loaded: shrink them to the limit, starting with the
        least recently used model's."""
        if self.limits.memory is None:
            return
        over = sum(each.nbytes for each in self._loaded()) - self.limits.memory
        for each in sorted(self._loaded(), key=lambda each: each.used):
            cached = each.nbytes - each.weights
            if over > 0 and cached:
                each.worker.shrink_prefix_cache(max(0, cached - over))
                over -= cached

    def _loaded(self) -> Iterator[Loaded]:
        return (model.loaded for model in self.all if model.loaded is not None)

    def _load(self, model: Model) -> Loaded:
        generator = Generator.from_directory(
            model.source,
            device=self.device,
            deterministic=self.deterministic,
            context=None if self.limits.context is None else model.context,
            memory_check=self.limits.memory_check,
        )
        runner, model.context = generator.engine.runner, generator.context
        generator.engine = Engine(
            runner,
            generator.tokenizer,
            max_batch=self.limits.max_batch,
            context=generator.context,
        )
        adapters = {
            name: Adapter(runner.config, path, device=runner.device, dtype=runner.dtype)
            for name, path in model.adapters.items()
        }
        weights = model.weights + sum(adapter.nbytes for adapter in adapters.values())
        worker = EngineThread(generator.engine, self.limits.max_queue)
        return Loaded(generator, worker, adapters, weights)


def describe(name: str, source: Path, adapters: dict[str, Path]) -> Model:
    """A model described by its files; weights are not loaded. Raises `ModelError`, for adapters
    too."""
    if not source.exists():
        raise ModelError(f"{source} does not exist")
    if is_gguf(source):
        model = open_model(source)
        config = model.config
        weights = sum(storage_of(model, "cpu", None).weights(config))  # those in the file included
    else:
        config = load_config(source)
        if config.bidirectional:
            open_model(source)  # raises
        weights = 4 * sum(prod(shape) for shape in parameter_shapes(config).values())  # fp32
    for path in adapters.values():
        Adapter(config, path)
    thinking, sampling = thinking_in(source), sampling_defaults(source)
    context = config.max_position_embeddings
    languages = known_languages(source)
    return Model(name, source, adapters, context, weights, thinking, sampling, languages)
