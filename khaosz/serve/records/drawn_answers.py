"""Answers that the server samples to be ranked blind: of models here, and of other servers.

A client gets them in an order of the annotator's, under ids that say nothing of the models, and
sends the ids back, ranked. The server keeps them in DATA/preference-answers.jsonl, a line per draw:
several annotators rank the very same answers, also after a restart. A draw is identified by its
prompt, models, number of answers, sampling and seed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Path
from pydantic import Field, model_validator

from khaosz.data.rankings.ranking_file import repair_last_line
from khaosz.data.records.preference import prompt_key, to_pairs, to_prompt
from khaosz.data.records.readers import Skip, parse_line
from khaosz.data.records.report import text_hash
from khaosz.data.tokenizer.training_text import refuse_surrogates
from khaosz.errors import ConfigError, DataError, KhaoszError, ServerError
from khaosz.files import append, locked
from khaosz.inference.parts import Part
from khaosz.rag.models.chat_models import SERVER_SEEDS, sampled_answer
from khaosz.rag.models.http_client import check_url, split_address
from khaosz.serve.answering import Answering
from khaosz.serve.errors import ApiError, as_api_error, errors, map_disk_full
from khaosz.serve.messages import MAX_MESSAGES, RequestModel
from khaosz.serve.records.preferences import (
    MAX_ANSWERS,
    Annotator,
    PreferenceAdded,
    PreferenceFile,
    PreferenceRequest,
    PromptMessage,
    SampledWith,
)
from khaosz.serve.replies import Reply
from khaosz.serve.schema import DEFAULT_MAX_TOKENS, ChatRequest, Seed
from khaosz.serve.worker import Busy, Failed

ANSWERS = "preference-answers.jsonl"
MAX_DRAWS = 8  # at a time
ABANDONED = 30.0  # seconds without a request, after which a draw is stopped
_PATH = "/v1/preferences/answers"
_log = logging.getLogger("khaosz.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Peer:
    """A model of another server."""

    name: str
    url: str
    model: str


def named_peers(arguments: Sequence[str]) -> list[Peer]:
    """Of NAME=http://host/v1#model. Raises `ConfigError`."""
    peers: dict[str, Peer] = {}
    for argument in arguments:
        name, _, url = argument.partition("=")
        address = split_address(url)
        if not name.strip() or len(name) > 512 or address is None:
            raise ConfigError(
                f"--peer {argument!r} is not NAME=URL",
                hint="for example other=http://127.0.0.1:8001/v1#model",
            )
        if name in peers:
            raise ConfigError(f"two peers are named {name!r}")
        peers[name] = Peer(name, check_url(address[0]), address[1])
    return list(peers.values())


ModelName = Annotated[str, Field(min_length=1, max_length=512)]


class DrawRequest(RequestModel):
    """`messages` ends with the user's turn. `n`: answers of each model. The same request finds the
    same answers."""

    messages: Annotated[list[PromptMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    models: Annotated[list[ModelName], Field(min_length=1, max_length=MAX_ANSWERS)]
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    seed: Seed = 0
    sampling: SampledWith | None = None
    annotator: Annotator | None = None

    @model_validator(mode="after")
    def _check(self) -> DrawRequest:
        if len({*self.models}) < len(self.models):
            raise ValueError("a model is named twice")
        if not 2 <= self.total <= MAX_ANSWERS:
            raise ValueError(f"{self.total} answers, not 2 to {MAX_ANSWERS}")
        return self

    @property
    def total(self) -> int:
        return self.n * len(self.models)

    def settings(self) -> dict[str, Any]:
        """What tells draws apart. Raises `DataError` for a prompt that cannot be trained on."""
        for text in (*(message.content for message in self.messages), *self.models):
            refuse_surrogates(text)
        prompt = [message.model_dump() for message in self.messages]
        if to_prompt({"prompt": prompt}).prompt != prompt or prompt[-1]["role"] != "user":
            raise DataError("the prompt does not end with a user's turn")
        return {
            "prompt": prompt,
            "models": sorted(self.models),
            "n": self.n,
            "seed": self.seed,
            "sampling": self.sampling.model_dump(exclude_none=True) if self.sampling else {},
        }


class DrawnAnswer(Reply):
    id: str
    text: str
    finish_reason: Literal["stop", "length", "tool_calls"]


class Answers(Reply):
    """`ready` of `total` answers are sampled; `answers` when the draw is `done`: different ones,
    fewer where models gave the same text. `problems`: a line for each model that failed."""

    object: Literal["preferences.answers"]
    id: str
    done: bool
    ready: int
    total: int
    answers: list[DrawnAnswer]
    problems: list[str]


AnswerId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class DrawRanking(RequestModel):
    """`ranked`: ids of all answers of the draw, the best first, equal ones in a list."""

    ranked: Annotated[
        list[AnswerId | Annotated[list[AnswerId], Field(min_length=1, max_length=MAX_ANSWERS)]],
        Field(min_length=2, max_length=MAX_ANSWERS),
    ]
    annotator: Annotator | None = None


class DrawnFile:
    """The draws that are complete. Only one server writes the file; it keeps where each begins."""

    def __init__(self, path: FilePath) -> None:
        """Removes an incomplete last line. Raises `DataError` for a file that cannot be used."""
        self.path = path
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            if path.exists():
                repair_last_line(path)
                with path.open("rb") as file:
                    self._places = dict(_draws(path, file))
        except OSError as error:
            raise DataError(f"{path} cannot be used: {error.strerror or error}") from None

    def has(self, id: str) -> bool:
        return id in self._places

    def get(self, id: str) -> dict[str, Any] | None:
        if (place := self._places.get(id)) is None:
            return None
        with self.path.open("rb") as file:
            file.seek(place)
            record = parse_line(file.readline())
        if isinstance(record, Skip) or record.get("id") != id:
            raise DataError(f"{self.path.name} was changed while the server runs")
        return dict(record)

    def add(self, record: dict[str, Any]) -> None:
        """Durably, or not at all."""
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock, map_disk_full(), locked(self.path):
            place = self.path.stat().st_size if self.path.exists() else 0
            append(self.path, line)
            self._places[record["id"]] = place


def _draws(path: FilePath, file: Any) -> Any:
    place = 0
    for number, line in enumerate(file, start=1):
        record = parse_line(line)
        if isinstance(record, Skip) or not {"id", "prompt", "answers"} <= record.keys():
            raise DataError(f"{path}, line {number} has no answers to rank")
        yield record["id"], place
        place += len(line)


@dataclass
class Draw:
    """One that is being sampled. `asked`: when it was last asked for."""

    id: str
    settings: dict[str, Any]
    total: int
    asked: float
    ready: int = 0
    answers: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    task: asyncio.Task[None] | None = None
    error: ApiError | None = None
    record: dict[str, Any] | None = None


class Draws:
    """For one event loop."""

    def __init__(self, file: DrawnFile, peers: Sequence[Peer], answering: Answering) -> None:
        self._file, self._answering = file, answering
        self._peers = {peer.name: peer for peer in peers}
        self._running: dict[str, Draw] = {}

    async def find(self, request: DrawRequest) -> Draw | dict[str, Any]:
        """The draw of this request: as stored, or as far as it is; started where it is new. Raises
        `DataError`, `UnknownModel`, and `Busy`."""
        settings = request.settings()
        id = text_hash(json.dumps([prompt_key(settings["prompt"]), settings])).hex()
        if self._file.has(id):
            record = await asyncio.to_thread(self._file.get, id)
            assert record is not None
            return record
        if (draw := self._running.get(id)) is None:
            for name in settings["models"]:
                if name not in self._peers:
                    self._answering.models.find(name)
            if len(self._running) >= MAX_DRAWS:
                raise Busy
            draw = self._running[id] = Draw(id, settings, request.total, time.monotonic())
            draw.task = asyncio.create_task(self._draw(draw))
        draw.asked = time.monotonic()
        if draw.error is not None or draw.record is not None:  # it is asked for once more
            del self._running[id]
            if draw.error is not None:
                raise draw.error
            assert draw.record is not None
            return draw.record
        return draw

    async def close(self) -> None:
        tasks = [draw.task for draw in self._running.values() if draw.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _draw(self, draw: Draw) -> None:
        names = draw.settings["models"]
        sampling = [self._of_peer(draw, self._peers[name]) for name in names if name in self._peers]
        sampling.append(self._of_models(draw, [name for name in names if name not in self._peers]))
        work = asyncio.gather(*sampling)
        try:
            while not (await asyncio.wait({work}, timeout=1))[0]:
                if time.monotonic() - draw.asked > ABANDONED:
                    del self._running[draw.id]
                    return
            work.result()
            record = _record(draw)
            if len(record["answers"]) > 1:
                await asyncio.to_thread(self._file.add, record)
                del self._running[draw.id]
            else:  # nothing to rank: another request tries again
                draw.record = record
                asyncio.get_running_loop().call_later(ABANDONED, self._forget, draw)
        except Exception as error:
            _log.exception("answers to rank could not be sampled or stored")
            draw.error = as_api_error(error, _PATH)
            asyncio.get_running_loop().call_later(ABANDONED, self._forget, draw)
        finally:
            draw.stopped.set()
            work.cancel()

    def _forget(self, draw: Draw) -> None:
        if self._running.get(draw.id) is draw:
            del self._running[draw.id]

    async def _of_models(self, draw: Draw, names: Sequence[str]) -> None:
        """One after another: they need not fit into memory together."""
        settings = draw.settings
        for name in names:
            try:
                request = ChatRequest.model_validate(
                    {
                        "model": name,
                        "messages": settings["prompt"],
                        "n": settings["n"],
                        "seed": _seed(settings),
                        **settings["sampling"],
                    }
                )
                answer = await self._answering.open_chat(request)
                try:
                    pieces = await answer.collected()
                finally:
                    answer.close()
                if pieces is None:
                    raise ApiError(500, "the answer broke off")
            except (KhaoszError, ApiError, Busy, Failed, TimeoutError, RecursionError) as error:
                draw.problems.append(f"{name}: {as_api_error(error, _PATH)}")
                continue
            for piece in pieces.values():
                text = "".join(
                    part.text
                    for part in piece.parts
                    if isinstance(part, Part) and part.kind == "content"
                )
                sampling = {**settings["sampling"], "seed": _seed(settings)}
                _add(draw, name, text, piece.reason or "stop", sampling)

    async def _of_peer(self, draw: Draw, peer: Peer) -> None:
        settings = draw.settings
        for number in range(settings["n"]):
            sampling = {
                "max_tokens": DEFAULT_MAX_TOKENS,
                **settings["sampling"],
                "seed": (_seed(settings) + number) & SERVER_SEEDS,
            }

            def sample(sampling: dict[str, Any] = sampling) -> tuple[str, str]:
                return sampled_answer(
                    peer.url, peer.model, settings["prompt"], sampling, draw.stopped.is_set
                )

            try:
                text, reason = await _in_thread(sample)
            except KhaoszError as error:
                _log.warning("peer %s: %s", peer.name, error)
                reason = str(error).replace(f"{peer.url}/chat/completions: ", "")
                draw.problems.append(f"{peer.name}: {reason}")
                return
            _add(draw, peer.name, text, reason, sampling)


def _add(draw: Draw, model: str, text: str, reason: str, sampling: dict[str, Any]) -> None:
    """Equal texts are one answer."""
    draw.ready += 1
    if not text.strip():
        return
    source = {"model": model, "sampling": sampling}
    same = next((each for each in draw.answers if each["text"] == text), None)
    if same is None:
        id = secrets.token_hex(8)
        draw.answers.append({"id": id, "text": text, "finish_reason": reason, "sources": [source]})
    elif all(each["model"] != model for each in same["sources"]):
        same["sources"].append(source)


def _record(draw: Draw) -> dict[str, Any]:
    return {
        "prompt": draw.settings["prompt"],  # first, as `repair_last_line` expects
        "id": draw.id,
        **{name: value for name, value in draw.settings.items() if name != "prompt"},
        "ready": draw.ready,
        "answers": draw.answers,
        "problems": draw.problems,
        "created": int(time.time()),
    }


def _seed(settings: dict[str, Any]) -> int:
    """The same prompt has the same, and different prompts different ones."""
    key = f"{settings['seed']} {prompt_key(settings['prompt'])}"
    return int.from_bytes(text_hash(key)[:4]) & SERVER_SEEDS


async def _in_thread(work: Callable[[], T]) -> T:
    """In a daemon thread: a server that never answers must not keep this process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(act: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            act(value)

    def run() -> None:
        act: Callable[[Any], None] = future.set_exception
        value: Any
        try:
            value, act = work(), future.set_result
        except KhaoszError as error:
            value = error
        except Exception:  # of an answer in another shape than the protocol's
            _log.exception("a peer's answer could not be read")
            value = ServerError("its answer could not be read")
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, act, value)

    threading.Thread(target=run, name="khaosz-peer", daemon=True).start()
    return await future


def answer_routes(
    preferences: PreferenceFile, file: DrawnFile, peers: Sequence[Peer], answering: Answering
) -> APIRouter:
    draws = Draws(file, peers, answering)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await draws.close()

    router = APIRouter(lifespan=lifespan)

    @router.post(
        "/v1/preferences/answers",
        response_model=Answers,
        responses=errors(400, 404, 503, 504, 507),
    )
    async def answers_to_rank(request: DrawRequest) -> dict[str, Any]:
        """Answers of several models to one prompt, without their names and in an order that depends
        on the annotator. Returns at once: repeat the request until `done`. A draw without requests
        is stopped."""
        draw = await draws.find(request)
        if isinstance(draw, Draw):
            shown = {"id": draw.id, "done": False, "ready": draw.ready, "answers": []}
            problems = draw.problems
        else:
            # The terminal shuffles likewise: the order says nothing of the models.
            order = sorted(
                draw["answers"],
                key=lambda each: text_hash(f"{request.annotator} {each['id']}"),
            )
            names = ("id", "text", "finish_reason")
            answers = [{name: answer[name] for name in names} for answer in order]
            shown = {"id": draw["id"], "done": True, "ready": draw["ready"], "answers": answers}
            problems = draw["problems"]
        kind = "preferences.answers"
        return {"object": kind, **shown, "total": request.total, "problems": problems}

    @router.post(
        "/v1/preferences/answers/{draw}/ranking",
        status_code=201,
        response_model=PreferenceAdded,
        responses=errors(400, 404, 507),
    )
    def rank_answers(
        request: DrawRanking, draw: Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
    ) -> dict[str, Any]:
        """Store a ranking of drawn answers, with what gave each. It is on the disk when this
        returns."""
        if (stored := file.get(draw)) is None:
            raise ApiError(404, "these answers are not stored", param="draw")
        by_id = {answer["id"]: answer for answer in stored["answers"]}
        levels = [[each] if isinstance(each, str) else each for each in request.ranked]
        ids = [id for level in levels for id in level]
        if sorted(ids) != sorted(by_id):
            raise ApiError(400, "not each answer of the draw exactly once", param="ranked")
        finishes = [by_id[id]["finish_reason"] for id in ids]
        ranking = PreferenceRequest.model_validate(
            {
                "messages": stored["prompt"],
                "ranked": [[by_id[id]["text"] for id in level] for level in levels],
                "finish_reasons": finishes,
                "annotator": request.annotator,
            }
        )
        record = ranking.record() | {"sources": [by_id[id]["sources"] for id in ids]}
        pairs, count = len(to_pairs(record)), preferences.append(record)
        return {"object": "preference", "pairs": pairs, "count": count}

    return router
