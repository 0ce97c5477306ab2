"""Answers of several models to rank: sampled as they are needed, or ahead into a file.

A file of answers has a JSON line for each prompt and model, synced:
`{"prompt", "model", "sampling", "answers", "finish_reasons"}`. Several annotators rank the same
answers with it, and no two models have to be in memory at once.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from khaosz.data.rankings.ranking_file import append_record, repair_last_line
from khaosz.data.records.preference import Prompt, prompt_key, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.data.records.turns import Message
from khaosz.errors import (
    ConfigError,
    DataError,
    GenerationError,
    ModelError,
    TokenizerError,
    quoted,
)
from khaosz.inference.adapter import Adapter
from khaosz.inference.generator import Generator
from khaosz.inference.request import Output
from khaosz.inference.sampling import SamplingParams
from khaosz.interop.local_models import named_path
from khaosz.interop.models import check_model
from khaosz.rag.models.chat_models import SERVER_SEEDS, sampled_answer
from khaosz.rag.models.http_client import check_url, split_address

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str
    model: str
    sampling: dict[str, Any]


class Source(Protocol):
    """A model that answers. `name` is as the user gave it."""

    name: str

    def answers(self, prompt: list[Message], params: SamplingParams) -> list[Answer]:
        """`params.n` answers. Raises `GenerationError`, `DataError` or `TokenizerError` for a
        prompt that this model cannot answer, `ServerError`, `ModelError`."""

    def close(self) -> None:
        """Free the model's memory."""


class LocalSource:
    """A model of this machine, with an adapter or without, loaded when it first answers."""

    def __init__(
        self, name: str, path: Path, adapter: Path | None = None, device: str = "cpu"
    ) -> None:
        self.name, self._path, self._adapter, self._device = name, path, adapter, device
        self._loaded: tuple[Generator, Adapter | None] | None = None

    def _load(self) -> tuple[Generator, Adapter | None]:
        if self._loaded is None:
            generator, adapter = Generator.from_directory(self._path, device=self._device), None
            if self._adapter is not None:
                runner = generator.engine.runner
                adapter = Adapter(
                    runner.config, self._adapter, device=runner.device, dtype=runner.dtype
                )
            self._loaded = generator, adapter
        return self._loaded

    def answers(self, prompt: list[Message], params: SamplingParams) -> list[Answer]:
        generator, adapter = self._load()
        engine = generator.engine
        request = engine.add(generator.chat_ids(prompt), params, adapter=adapter)
        outputs: list[list[Output]] = [[] for _ in range(params.n)]
        try:
            while engine.unfinished:
                engine.step()
                for output in engine.take(request):
                    outputs[output.choice].append(output)
        finally:
            engine.cancel(request)
        sampling = asdict(params)
        for choice in outputs:
            if choice[-1].error is not None:
                raise choice[-1].error
        return [
            Answer(
                "".join(output.text for output in choice),
                str(choice[-1].finish_reason),
                self.name,
                sampling,
            )
            for choice in outputs
        ]

    def close(self) -> None:
        self._loaded = None
        gc.collect()  # the engine refers to itself


class ServerSource:
    """A model of an OpenAI-compatible server: `http://host/v1#model`. Each answer is a request of
    its own, since many servers ignore `n`."""

    def __init__(self, name: str, url: str, model: str) -> None:
        self.name, self._url, self._model = name, check_url(url), model

    def answers(self, prompt: list[Message], params: SamplingParams) -> list[Answer]:
        return [self._answer(prompt, params, i) for i in range(params.n)]

    def _answer(self, prompt: list[Message], params: SamplingParams, number: int) -> Answer:
        sampling = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": ((params.seed or 0) + number) & SERVER_SEEDS,
        }
        text, reason = sampled_answer(self._url, self._model, prompt, sampling)
        return Answer(text, reason, self.name, sampling)

    def close(self) -> None:
        pass


def open_sources(models: Sequence[str | Path], device: str = "cpu") -> list[Source]:
    """A MODEL is `http://host/v1#model`, a directory, .gguf file or name, each also with an adapter
    as MODEL+DIR, or the directory of an adapter that names its base. Raises `ConfigError` and
    `ModelError`; reads no weights."""
    names = [str(model) for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{twice} is given twice", hint="-n sets how many answers each gives")
    return [_source(name, device) for name in names]


def _source(name: str, device: str) -> Source:
    if (address := split_address(name)) is not None:
        return ServerSource(name, *address)
    base, plus, adapter = name.rpartition("+")
    if plus and base and not Path(name).exists() and (Path(adapter) / _ADAPTER).exists():
        path, directory = named_path(base), Path(adapter)
    elif (Path(name) / _ADAPTER).exists():
        path, directory = _base_of(Path(name)), Path(name)
    else:
        path = named_path(name)
        check_model(path)
        return LocalSource(name, path, device=device)
    check_model(path)
    return LocalSource(name, path, directory, device)


def _base_of(adapter: Path) -> Path:
    try:
        values = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8"))
        base = str(values["base_model_name_or_path"])
        if not base:
            raise KeyError
        return named_path(base)
    except (OSError, ValueError, KeyError, TypeError):
        reason = f"{adapter}: {_ADAPTER} names no base model"
    except ModelError:
        reason = f"{adapter}: base model {quoted(base)} not found on this machine"
    raise ModelError(reason, hint=f"name it: MODEL+{adapter}") from None


def prompt_params(prompt: Prompt, params: SamplingParams, seed: int) -> SamplingParams:
    """The parameters with a seed for this prompt."""
    key = prompt_key(prompt.prompt)
    return replace(params, seed=int.from_bytes(text_hash(f"{seed} {key}")) >> 65)


@dataclass
class Unanswered:
    """Prompts that a model could not answer, such as those longer than its context."""

    model: str
    count: int
    reason: str

    def line(self) -> str:
        return f"{self.model}: could not answer {self.count:,} prompts, such as: {self.reason}"


class LiveAnswers:
    """Answers sampled when they are asked for, all models loaded."""

    def __init__(self, sources: Sequence[Source], params: SamplingParams, seed: int) -> None:
        self._sources, self._params, self._seed = sources, params, seed
        self.unanswered: dict[str, Unanswered] = {}

    def __call__(self, prompt: Prompt) -> list[Answer]:
        params = prompt_params(prompt, self._params, self._seed)
        return [answer for source in self._sources for answer in self.of(source, prompt, params)]

    def of(self, source: Source, prompt: Prompt, params: SamplingParams) -> list[Answer]:
        try:
            return source.answers(prompt.prompt, params)
        except (GenerationError, DataError, TokenizerError) as error:
            entry = self.unanswered.setdefault(source.name, Unanswered(source.name, 0, str(error)))
            entry.count += 1
            return []


class AnswerFile:
    """Answers of a file, by prompt, and those that are added to it."""

    def __init__(self, path: Path) -> None:
        """Raises `DataError` for a file that is not one of answers."""
        self.path = path
        self.prompts: dict[str, list[Message]] = {}  # by key, in the order of the file
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        if path.suffix != ".jsonl":
            raise DataError(f"{path} does not end in .jsonl", hint="answers are JSON lines")
        if path.exists():
            repair_last_line(path)
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                self._read(number, line)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(model for _, model in self._answers))

    def _read(self, number: int, line: bytes) -> None:
        record = parse_line(line)
        try:
            if isinstance(record, Skip):
                raise DataError(record.reason)
            self._add(record)
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.path}, line {number} has no answers to rank",
                hint="--answers names a file that --answers-only writes",
            ) from error

    def _add(self, record: dict[str, Any]) -> None:
        prompt = to_prompt({"prompt": record["prompt"]}).prompt
        model, sampling = record["model"], record["sampling"]
        key = prompt_key(prompt)
        self.prompts.setdefault(key, prompt)
        self._answers[key, model] = [
            Answer(text, reason, model, sampling)
            for text, reason in zip(record["answers"], record["finish_reasons"], strict=True)
            if isinstance(text, str)
        ]

    def of(self, prompt: Prompt, models: Iterable[str]) -> list[Answer]:
        key = prompt_key(prompt.prompt)
        return [answer for model in models for answer in self._answers.get((key, model), [])]

    def generate(
        self,
        live: LiveAnswers,
        sources: Sequence[Source],
        prompts: Sequence[Prompt],
        params: Callable[[Prompt], SamplingParams],
        progress: Callable[[str, int, int], None],
    ) -> int:
        """Add what is missing, a model at a time; how many prompts were answered. `progress` gets
        the model, the prompts done, and all that it answers now."""
        added = 0
        distinct = list({prompt_key(prompt.prompt): prompt for prompt in prompts}.items())
        for source in sources:
            missing = [(k, p) for k, p in distinct if (k, source.name) not in self._answers]
            for done, (_, prompt) in enumerate(missing):
                progress(source.name, done, len(missing))
                answers = live.of(source, prompt, params(prompt))
                record = {
                    "prompt": prompt.prompt,
                    "model": source.name,
                    "sampling": answers[0].sampling if answers else {},
                    "answers": [answer.text for answer in answers],
                    "finish_reasons": [answer.finish_reason for answer in answers],
                }
                append_record(self.path, record)
                self._add(record)
                added += 1
            source.close()
        return added
