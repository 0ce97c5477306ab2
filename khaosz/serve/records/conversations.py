"""The routes of conversations. A conversation is a tree of messages: an edited message and another
answer stand beside the first one, and `selected` is the leaf that is shown."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, FastAPI, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from khaosz.data.tokenizer.training_text import refuse_surrogates
from khaosz.serve.errors import ApiError, errors
from khaosz.serve.records.conversation_store import ConversationStore, Entry
from khaosz.serve.replies import Reply
from khaosz.serve.schema import RequestModel

MAX_NODES = 4096
MAX_TITLE = 512
MAX_IMPORTED = 4096

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
Id = Annotated[str, Field(pattern=f"^{_UUID}$")]
Seconds = Annotated[int, Field(ge=0, lt=2**53)]
Title = Annotated[str, Field(max_length=MAX_TITLE)]


class Node(RequestModel):
    """A message. `parent` is the one that it follows, None for a first one."""

    id: Id
    parent: Id | None
    role: Literal["user", "assistant"]
    content: str
    created: Seconds
    reasoning: str | None = None
    citations: list[dict[str, Any]] | None = None
    retrieval: dict[str, Any] | None = None
    model: str | None = None
    finish_reason: str | None = None


class Body(RequestModel):
    title: Title
    system: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    knowledge_base: str | None = None
    nodes: Annotated[list[Node], Field(max_length=MAX_NODES)]
    selected: Id | None = None


class PutConversation(Body):
    """`revision`: the one that this was made of, 0 for a new conversation. It is refused if another
    was written meanwhile; without it the last to come wins."""

    revision: Annotated[int, Field(ge=0, lt=2**53)] | None = None


class ImportedConversation(Body):
    """As `GET` and an export give it."""

    id: Id
    object: Literal["conversation"] | None = None
    created: Seconds | None = None
    updated: Seconds | None = None
    revision: int | None = None
    messages: int | None = None


class Imported(RequestModel):
    conversations: Annotated[list[ImportedConversation], Field(max_length=MAX_IMPORTED)]


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")  # not strict: what stands in an address is text

    q: Annotated[str, Field(max_length=256)] = ""
    limit: Annotated[int, Field(ge=1, le=1000)] = 50
    after: Id | None = None


class ConversationSummary(Reply):
    """`messages` counts all branches; `snippet` is the text around what was searched for."""

    object: Literal["conversation"]
    id: str
    title: str
    created: int
    updated: int
    messages: int
    revision: int
    snippet: str | None = None


class StoredConversation(ConversationSummary):
    system: str | None
    settings: dict[str, Any]
    knowledge_base: str | None
    nodes: list[Node]
    selected: str | None


class ConversationList(Reply):
    object: Literal["list"]
    data: list[ConversationSummary]
    has_more: bool


class ConversationDeleted(Reply):
    object: Literal["conversation.deleted"]
    id: str
    deleted: Literal[True]


class ImportDone(Reply):
    object: Literal["conversation.import"]
    imported: int


def conversation_routes(store: ConversationStore) -> APIRouter:
    """The routes are plain functions, which FastAPI runs in threads: SQLite waits for the disk."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    router = APIRouter(lifespan=lifespan)

    @router.get(
        "/v1/conversations",
        response_model=ConversationList,
        response_model_exclude_unset=True,
        responses=errors(400, 404),
    )
    def list_conversations(asked: Annotated[ListQuery, Query()]) -> dict[str, Any]:
        """Newest first; `q` is looked for in titles and messages, `after` is the id that the page
        before ended with."""
        found, more = store.page(asked.q, asked.limit, asked.after)
        data = [{"object": "conversation", **summary.shown()} for summary in found]
        return {"object": "list", "data": data, "has_more": more}

    @router.get(
        "/v1/conversations/export",
        response_class=StreamingResponse,
        responses={
            200: {
                "description": "A conversation in each line, as an import takes it.",
                "content": {"application/jsonl": {"schema": {"type": "string"}}},
            },
            **errors(),
        },
    )
    def export_conversations() -> StreamingResponse:
        """All of them, as JSON lines."""
        headers = {"content-disposition": 'attachment; filename="conversations.jsonl"'}
        return StreamingResponse(_lines(store), 200, headers, "application/jsonl")

    @router.post(
        "/v1/conversations/import", response_model=ImportDone, responses=errors(400, 503, 507)
    )
    def import_conversations(asked: Imported) -> dict[str, Any]:
        """All or none; a conversation with the same id is replaced."""
        entries = [
            _entry(each.id, each, f"conversations.{i}.", each.created, each.updated)
            for i, each in enumerate(asked.conversations)
        ]
        store.put_all(entries)
        return {"object": "conversation.import", "imported": len(entries)}

    @router.get(
        "/v1/conversations/{conversation:uuid}",
        response_model=StoredConversation,
        responses=errors(400, 404),
    )
    def get_conversation(conversation: UUID) -> Response:
        found = {"object": "conversation", **store.get(str(conversation))}
        return Response(_json(found), media_type="application/json")

    @router.put(
        "/v1/conversations/{conversation:uuid}",
        response_model=ConversationSummary,
        response_model_exclude_unset=True,
        responses=errors(400, 404, 409, 503, 507),
    )
    def put_conversation(conversation: UUID, asked: PutConversation) -> dict[str, Any]:
        """Begin a conversation, or replace it. It is on the disk when this answers."""
        summary = store.put(_entry(str(conversation), asked), asked.revision)
        return {"object": "conversation", **summary.shown()}

    @router.delete(
        "/v1/conversations/{conversation:uuid}",
        response_model=ConversationDeleted,
        responses=errors(400, 404, 503, 507),
    )
    def delete_conversation(conversation: UUID) -> dict[str, Any]:
        store.delete(str(conversation))
        return {"object": "conversation.deleted", "id": str(conversation), "deleted": True}

    return router


def _entry(
    id: str,
    asked: Body,
    where: str = "",
    created: int | None = None,
    updated: int | None = None,
) -> Entry:
    """Raises `ApiError` for what is no tree or cannot be kept."""
    _check_tree(asked.nodes, where)
    if asked.selected is not None and asked.selected not in {node.id for node in asked.nodes}:
        raise ApiError(400, f"there is no message {asked.selected}", param=f"{where}selected")
    try:
        body = asked.model_dump(include=set(Body.model_fields) - {"title"})
        refuse_surrogates(asked.title + _json(body))
    except ValueError:  # NaN and infinity are not JSON, though Python reads them
        message = "a number that is not finite, or values nested too deep"
        raise ApiError(400, message, param=where.rstrip(".") or None) from None
    return Entry(id, asked.title, body, created, updated)


def _check_tree(nodes: Sequence[Node], where: str) -> None:
    """Every parent is there, and everyone's forebears end with a first message."""
    parents: dict[str, str | None] = {}
    for i, node in enumerate(nodes):
        if node.id in parents:
            raise ApiError(400, f"two messages are {node.id}", param=f"{where}nodes.{i}.id")
        parents[node.id] = node.parent
    sound: set[str | None] = {None}
    for i, node in enumerate(nodes):
        line: set[str | None] = set()
        at: str | None = node.id
        while at not in sound and at not in line:
            assert at is not None
            line.add(at)
            if parents[at] not in parents and parents[at] is not None:
                message = f"the parent of {at} is not there: {parents[at]}"
                raise ApiError(400, message, param=f"{where}nodes.{i}.parent")
            at = parents[at]
        if at in line:
            raise ApiError(400, f"{at} is its own forebear", param=f"{where}nodes.{i}.parent")
        sound |= line


def _lines(store: ConversationStore) -> Iterator[str]:
    for id in store.ids():
        try:
            found = store.get(id)
        except ApiError:  # deleted meanwhile
            continue
        yield _json({"object": "conversation", **found}) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
