"""The routes of the catalogue: list it, fetch a model, watch and cancel that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from khaosz.errors import ConfigError, FetchError, KhaoszError
from khaosz.interop.fetch.propose import fitting
from khaosz.interop.fetch.store import models_folder
from khaosz.memory.machine import memory_limits
from khaosz.serve.catalogue.pulls import Pull, Pulls
from khaosz.serve.catalogue.rows import Origin, Row, rows
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.replies import Reply


class PullRequest(BaseModel):
    """`accept_licence`: needed for a licence that limits who may use the model, or for what."""

    model_config = ConfigDict(extra="forbid", strict=True)

    accept_licence: bool = False


class PullReply(Reply):
    """`bytes` of `total` have arrived; when all have, the file is checked. rate: bytes a second;
    remaining: seconds. model: the name by which the complete one is served. error: why it failed;
    code: a stable name of the error."""

    name: str
    object: Literal["model.pull"]
    state: Literal["running", "complete", "failed", "cancelled"]
    bytes: int
    total: int
    rate: float | None
    remaining: float | None
    source: str | None
    model: str | None
    error: str | None
    code: str | None


class CatalogueEntry(Reply):
    """`memory`: bytes with 4,096 tokens of context, null if not known, without keys and values
    unless `memory_is_whole`. fits: whether the machine's free memory and the server's limit hold
    it. here: it is on this machine; problem: why it can't be used. served: its name in
    `GET /v1/models`. staged: bytes that an interrupted pull has received. sources: that are tried,
    in their order. Where the catalogue does not know a model, licence and what follows are null."""

    name: str
    origin: Origin
    bytes: int
    memory: int | None
    memory_is_whole: bool
    fits: bool | None
    here: bool
    problem: str | None
    served: str | None
    staged: int
    sources: list[str]
    kind: Literal["chat", "translation"] | None
    licence: str | None
    limited: bool
    languages: str | None
    context: int | None
    thinking: str | None
    pull: PullReply | None


class CatalogueReply(Reply):
    """Bytes that are free: memory, null if not known, and disk. memory_limit: that of the server.
    proposed: the name of the best model that half of the free memory holds."""

    object: Literal["list"]
    free_memory: int | None
    memory_limit: int | None
    free_disk: int
    proposed: str | None
    data: list[CatalogueEntry]


def catalogue_routes(pulls: Pulls, runs: Path) -> APIRouter:
    """Models of the catalogue and those on this machine, below `runs` too."""
    router = APIRouter(prefix="/v1/catalogue")

    async def row_of(name: str) -> Row:
        for row in await run_in_threadpool(rows, runs, pulls.source):
            if row.name == name:
                return row
        raise ApiError(404, f"model {name!r} not found in the catalogue", code="model_not_found")

    @router.get("", response_model=CatalogueReply, responses=errors())
    async def list_catalogue() -> dict[str, Any]:
        """Models that generate text: the catalogue, and what is on this machine. Nothing is asked
        of another host."""
        listed = await run_in_threadpool(rows, runs, pulls.source)
        free = min((limit.free for limit in memory_limits(pulls.models.device)), default=None)
        limit = pulls.models.limits.memory
        room = min((each for each in (free, limit) if each is not None), default=None)
        names = {row.name for row in listed}
        best = (entry.name for entry in fitting(room) if entry.name in names)
        return {
            "object": "list",
            "free_memory": free,
            "memory_limit": limit,
            "free_disk": shutil.disk_usage(_existing(models_folder())).free,
            "proposed": next(best, None),
            "data": [_entry(row, pulls, room) for row in listed],
        }

    # Names may have slashes, as ollama/qwen3:0.6b.
    @router.post(
        "/{name:path}/pull",
        response_model=PullReply,
        status_code=202,
        responses=errors(400, 404, 409),
    )
    async def start_pull(name: str, body: PullRequest | None = None) -> dict[str, Any]:
        """Serve this model from now on; it is fetched first, unless it is here. What an interrupted
        pull has received is used."""
        row = await row_of(name)
        if row.problem is not None:
            raise ApiError(409, f"{name}: {row.problem}", code="model_unusable")
        accepted = body is not None and body.accept_licence
        if row.path is None and row.entry is not None and row.entry.is_limited and not accepted:
            raise ApiError(
                409,
                f"{name} has the {row.entry.licence} licence: send accept_licence",
                param="accept_licence",
                code="licence_not_accepted",
            )
        return _reply(pulls.start(row))

    @router.get("/{name:path}/pull", response_model=PullReply, responses=errors(404))
    async def get_pull(name: str) -> dict[str, Any]:
        """How far a pull is."""
        return _reply(_found(pulls.get(name), name))

    @router.delete("/{name:path}/pull", response_model=PullReply, responses=errors(400, 404))
    async def cancel_pull(name: str, discard: bool = False) -> dict[str, Any]:
        """End a pull. What has arrived stays for the next one, unless `discard`."""
        row = await row_of(name)
        current = pulls.cancel(row.name, discard=discard)
        if current is None and row.staged:  # interrupted in an earlier process
            current = Pull(row.name, row.bytes, row.staged, "cancelled")
        return _reply(_found(current, name))

    return router


def _found(pull: Pull | None, name: str) -> Pull:
    if pull is None:
        raise ApiError(404, f"{name!r} is not being pulled", code="pull_not_found")
    return pull


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.exists())


def _entry(row: Row, pulls: Pulls, room: int | None) -> dict[str, Any]:
    entry, pull = row.entry, pulls.get(row.name)
    return {
        "name": row.name,
        "origin": row.origin,
        "bytes": row.bytes,
        "memory": row.memory,
        "memory_is_whole": row.memory_is_whole,
        "fits": None if row.memory is None or room is None else row.memory <= room,
        "here": row.path is not None,
        "problem": row.problem,
        "served": None if row.path is None else pulls.models.name_of(row.path),
        "staged": row.staged,
        "sources": list(row.sources),
        "kind": entry and entry.kind,
        "licence": entry and entry.licence.removesuffix(", limited"),
        "limited": entry is not None and entry.is_limited,
        "languages": entry and entry.languages,
        "context": entry and entry.context,
        "thinking": entry and entry.thinking,
        "pull": None if pull is None else _reply(pull),
    }


def _reply(pull: Pull) -> dict[str, Any]:
    rate = pull.rate
    error = pull.error
    message = None if error is None else str(error) if isinstance(error, KhaoszError) else "failed"
    return {
        "name": pull.name,
        "object": "model.pull",
        "state": pull.state,
        "bytes": pull.bytes,
        "total": pull.total,
        "rate": rate,
        "remaining": (pull.total - pull.bytes) / rate if rate else None,
        "source": pull.source,
        "model": pull.model,
        "error": message,
        "code": None if error is None else _code(error),
    }


def _code(error: Exception) -> str | None:
    match error:
        case FetchError(code=code):
            return code
        case ConfigError():
            return "memory_limit"
        case KhaoszError():
            return "model_unusable"
    return "unexpected"
