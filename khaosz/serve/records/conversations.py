"""The routes of conversations. A conversation is a tree of messages: an edited message or another
answer is a sibling of the first one, and `selected` is the leaf that is displayed."""

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
from khaosz.serve.messages import RequestModel
from khaosz.serve.records.conversation_store import ConversationStore, ConversationSummary, Entry
from khaosz.serve.replies import Reply, exported, json_lines

MAX_NODES = 4096
MAX_TITLE = 512
MAX_IMPORTED = 4096

_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
Id = Annotated[str, Field(pattern=f"^{_UUID}$")]
Seconds = Annotated[int, Field(ge=0, lt=2**53)]
Title = Annotated[str, Field(max_length=MAX_TITLE)]


class Node(RequestModel):
    """A message. `parent`: the message before it, None for the first. `left_out`: of an answer, the
    oldest messages that the model did not see; `sampling`: the parameters in force."""

    id: Id
    parent: Id | None
    role: Literal["user", "assistant"]
    content: str
    created: Seconds
    reasoning: str | None = None
    citations: list[dict[str, Any]] | None = None
    retrieval: dict[str, Any] | None = None
    left_out: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    sampling: Annotated[dict[str, bool | float], Field(max_length=32)] | None = None
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
    """`revision`: the one that this is based on, 0 for a new conversation. If another was written
    meanwhile, the request fails; without it, the last write wins."""

    revision: Annotated[int, Field(ge=0, lt=2**53)] | None = None


class ImportedConversation(Body):
    """As `GET` and an export return it."""

    id: Id
    object: Literal["conversation"] | None = None
    created: Seconds | None = None
    updated: Seconds | None = None
    revision: int | None = None
    messages: int | None = None


class Imported(RequestModel):
    conversations: Annotated[list[ImportedConversation], Field(max_length=MAX_IMPORTED)]


class ListQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")  # not strict: query parameters are text

    q: Annotated[str, Field(max_length=256)] = ""
    limit: Annotated[int, Field(ge=1, le=1000)] = 50
    after: Id | None = None


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
    """The routes are not async, so FastAPI runs them in threads: SQLite waits for the disk."""

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
    def list_conversations(request: Annotated[ListQuery, Query()]) -> dict[str, Any]:
        """Newest first. `q` searches titles and messages; `after`: the last id of the previous
        page."""
        summaries, more = store.page(request.q, request.limit, request.after)
        return {"object": "list", "data": summaries, "has_more": more}

    @router.get(
        "/v1/conversations/export",
        response_class=StreamingResponse,
        responses={
            **exported("One conversation per line, in the format of an import."),
            **errors(),
        },
    )
    def export_conversations() -> StreamingResponse:
        """All of them, as JSON lines."""
        return json_lines(_lines(store), "conversations.jsonl")

    @router.post(
        "/v1/conversations/import", response_model=ImportDone, responses=errors(400, 503, 507)
    )
    def import_conversations(request: Imported) -> dict[str, Any]:
        """All or none. Conversations with the same ids are replaced."""
        entries = [
            _entry(each.id, each, f"conversations.{i}.", each.created, each.updated)
            for i, each in enumerate(request.conversations)
        ]
        store.put_all(entries)
        return {"object": "conversation.import", "imported": len(entries)}

    @router.get(
        "/v1/conversations/{conversation:uuid}",
        response_model=StoredConversation,
        responses=errors(400, 404),
    )
    def get_conversation(conversation: UUID) -> Response:
        return Response(_json(store.get(str(conversation))), media_type="application/json")

    @router.put(
        "/v1/conversations/{conversation:uuid}",
        response_model_exclude_unset=True,
        responses=errors(400, 404, 409, 503, 507),
    )
    def put_conversation(conversation: UUID, request: PutConversation) -> ConversationSummary:
        """Create or replace a conversation. It is on the disk when this returns."""
        return store.put(_entry(str(conversation), request), request.revision)

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
    request: Body,
    prefix: str = "",
    created: int | None = None,
    updated: int | None = None,
) -> Entry:
    """Raises `ApiError` for messages that are not a tree, and for values that cannot be stored.
    `prefix`: of the fields' names in errors."""
    _check_tree(request.nodes, prefix)
    if request.selected is not None and request.selected not in {node.id for node in request.nodes}:
        raise ApiError(400, f"message {request.selected} not found", param=f"{prefix}selected")
    try:
        body = request.model_dump(include=set(Body.model_fields) - {"title"})
        refuse_surrogates(request.title + _json(body))
    except ValueError:  # NaN and infinity are not JSON, though Python reads them
        message = "a number is not finite, or values are nested too deep"
        raise ApiError(400, message, param=prefix.rstrip(".") or None) from None
    return Entry(id, request.title, body, created, updated)


def _check_tree(nodes: Sequence[Node], prefix: str) -> None:
    """Raises `ApiError` for duplicate ids, unknown parents and cycles."""
    parents: dict[str, str | None] = {}
    for i, node in enumerate(nodes):
        if node.id in parents:
            raise ApiError(
                400, f"two messages have the id {node.id}", param=f"{prefix}nodes.{i}.id"
            )
        parents[node.id] = node.parent
    checked: set[str | None] = {None}  # their parents lead to a first message
    for i, node in enumerate(nodes):
        path: set[str | None] = set()
        at: str | None = node.id
        while at not in checked and at not in path:
            assert at is not None
            path.add(at)
            if parents[at] not in parents and parents[at] is not None:
                message = f"parent {parents[at]} of {at} not found"
                raise ApiError(400, message, param=f"{prefix}nodes.{i}.parent")
            at = parents[at]
        if at in path:
            message = f"parent links of {at} form a cycle"
            raise ApiError(400, message, param=f"{prefix}nodes.{i}.parent")
        checked |= path


def _lines(store: ConversationStore) -> Iterator[str]:
    for id in store.ids():
        try:
            yield _json(store.get(id)) + "\n"
        except ApiError:  # deleted meanwhile
            continue


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
