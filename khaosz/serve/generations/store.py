"""Generations in the database of conversations: answers that this server generates for a stored
conversation, whether a client reads them or not.

A generation has the id of its message. Its text is stored in parts as it grows, so that a crash
loses only what was generated since the last write; when it ends, the message is completed.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal

from khaosz.serve.errors import ApiError
from khaosz.serve.records.conversation_store import (
    ConversationStore,
    Entry,
    find_row,
    write_entry,
)

Kind = Literal["reasoning", "content"]
State = Literal["queued", "running", "complete", "stopped", "interrupted", "failed"]
RUNNING = ("queued", "running")


@dataclass
class Head:
    """What is known before the first token. `parent`: the message that is answered; `left_out`:
    messages that the model does not see; `warning`: that it lacks the language."""

    parent: str
    model: str
    created: int
    retrieval: dict[str, Any] | None = None
    left_out: int | None = None
    warning: dict[str, str] | None = None


@dataclass
class Tail:
    """What is known at the end; the other fields are counted as it grows. `length`: characters,
    reasoning included."""

    length: int = 0
    finish_reason: str | None = None
    error: dict[str, Any] | None = None
    citations: list[dict[str, Any]] | None = None
    not_found: bool = False  # the answer says that the documents don't contain it
    tool_calls: list[dict[str, Any]] | None = None
    usage: dict[str, Any] | None = None
    wait_seconds: float | None = None  # to the first token
    generation_seconds: float = 0.0


@dataclass
class Record:
    """A stored generation. `parts`: its text in order; `raw`: the same as the model wrote it, with
    markers; `resume`: what continuing needs besides, None if nothing can follow."""

    id: str
    conversation: str
    head: Head
    state: State = "queued"
    tail: Tail = field(default_factory=Tail)
    parts: list[tuple[Kind, str]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    resume: dict[str, Any] | None = None

    def text(self, kind: Kind) -> str:
        return "".join(text for each, text in self.parts if each == kind)

    @property
    def can_continue(self) -> bool:
        grammar = self.resume is None or self.resume["grammar"]
        return self.state not in RUNNING and not grammar and not self.tail.tool_calls


@dataclass(frozen=True)
class Growth:
    """What is to be stored of a running generation: the parts of `record` are those from the
    `at`-th on. `opened`: what does not grow has changed."""

    record: Record
    at: int
    opened: bool


class GenerationStore:
    """Thread-safe. Methods that write raise `ApiError` as those of `ConversationStore` do."""

    def __init__(self, conversations: ConversationStore) -> None:
        self._conversations = conversations

    # --------------------------------------------------------------------------------------- write

    def create(self, record: Record, max_nodes: int) -> None:
        """Store a new generation and its message. Raises `ApiError` for a conversation or a parent
        that does not exist, and an id that is in use."""
        with self._conversations.writing() as db:
            entry = _entry(db, record.conversation)
            if entry is None:
                raise ApiError(404, "conversation not found")
            nodes = {node["id"]: node for node in entry.body["nodes"]}
            if record.head.parent not in nodes:
                message = f"message {record.head.parent} not found"
                raise ApiError(404, message, param="parent")
            if db.execute("SELECT 1 FROM generations WHERE id = ?", (record.id,)).fetchone():
                message = f"generation {record.id} exists"
                raise ApiError(409, message, param="message", code="generation_exists")
            node = nodes.get(record.id)
            if node is None:
                if len(nodes) >= max_nodes:
                    raise ApiError(400, f"the conversation has {max_nodes:,} messages, the maximum")
                node = {
                    "id": record.id, "parent": record.head.parent, "role": "assistant",
                    "content": "", "created": record.head.created, "reasoning": None,
                    "citations": None, "retrieval": None, "left_out": None,
                    "model": record.head.model, "finish_reason": None,
                }  # fmt: skip
                entry.body["nodes"].append(node)
                entry.body["selected"] = record.id
                write_entry(db, entry)
            elif node["content"] or (node["role"], node["parent"]) != (
                "assistant", record.head.parent,
            ):  # fmt: skip
                message = f"message {record.id} is not an empty answer to {record.head.parent}"
                raise ApiError(409, message, param="message", code="message_exists")
            db.execute(
                "INSERT INTO generations VALUES"
                " (?,?,(SELECT coalesce(max(number), 0) + 1 FROM generations),?,?,?,?)",
                (
                    record.id, record.conversation, record.state, json.dumps(asdict(record.head)),
                    json.dumps(asdict(record.tail)), _dumped(record.resume),
                ),
            )  # fmt: skip

    def restart(self, id: str) -> Record:
        """The record of a generation that is continued, which is queued again. Raises `ApiError`
        for one that is running or has nothing to continue."""
        with self._conversations.writing() as db:
            record = _record(db, id)
            if record.state in RUNNING:
                raise ApiError(409, f"generation {id} is running", code="generation_running")
            if not record.can_continue:
                message = f"generation {id} cannot be continued"
                raise ApiError(409, message, code="generation_complete")
            record.state = "queued"
            record.tail.finish_reason = record.tail.error = None
            _update(db, record)
            return record

    def grow(self, growths: Sequence[Growth]) -> set[str]:
        """Store what was generated since the last call. Returns the ids of those that are gone:
        their conversation or message was deleted."""
        gone = set()
        with self._conversations.writing() as db:
            for growth in growths:
                if _update(db, growth.record, whole=growth.opened):
                    _insert_parts(db, growth.record, growth.at)
                else:
                    gone.add(growth.record.id)
        return gone

    def finish(self, record: Record) -> bool:
        """Store a generation that has ended, and complete its message. False if it is gone."""
        with self._conversations.writing() as db:
            return _finish(db, record)

    def interrupt_unfinished(self) -> None:
        """Those that a server which has ended did not finish."""
        with self._conversations.writing() as db:
            rows = db.execute(f"SELECT id FROM generations WHERE state IN {RUNNING}").fetchall()
            for (id,) in rows:
                record = _record(db, id)
                record.state, record.tail.finish_reason = "interrupted", "interrupted"
                _finish(db, record)

    # ---------------------------------------------------------------------------------------- read

    def get(self, id: str) -> Record:
        """Raises `ApiError` if it does not exist."""
        with self._conversations.reading() as db:
            return _record(db, id)

    def page(
        self, conversation: str, limit: int, after: str | None = None
    ) -> tuple[list[Record], bool]:
        """The generations of a conversation without their texts, newest first, starting after
        `after`; and whether there are more."""
        with self._conversations.reading() as db:
            if find_row(db, conversation) is None:
                raise ApiError(404, "conversation not found")
            start = 1 << 62
            if after is not None:
                row = db.execute(
                    "SELECT number FROM generations WHERE id = ? AND conversation = ?",
                    (after, conversation),
                ).fetchone()
                if row is None:
                    raise ApiError(404, "generation not found", param="after")
                (start,) = row
            rows = db.execute(
                "SELECT id FROM generations WHERE conversation = ? AND number < ?"
                " ORDER BY number DESC LIMIT ?",
                (conversation, start, limit + 1),
            ).fetchall()
            return [_record(db, id, texts=False) for (id,) in rows[:limit]], len(rows) > limit


def merged(parts: Sequence[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """Neighbouring parts of one kind as one."""
    return [
        (kind, "".join(text for _, text in group)) for kind, group in groupby(parts, itemgetter(0))
    ]


def _finish(db: sqlite3.Connection, record: Record) -> bool:
    if not _update(db, record):
        return False
    db.execute("DELETE FROM generation_parts WHERE generation = ?", (record.id,))
    _insert_parts(db, record, 0)
    entry = _entry(db, record.conversation)
    assert entry is not None, record.conversation
    node = next(each for each in entry.body["nodes"] if each["id"] == record.id)
    node |= {
        "content": record.text("content"),
        "reasoning": record.text("reasoning") or None,
        "citations": record.tail.citations,
        "retrieval": record.head.retrieval,
        "left_out": record.head.left_out,
        "model": record.head.model,
        "finish_reason": record.tail.finish_reason,
    }
    write_entry(db, entry)
    return True


def _update(db: sqlite3.Connection, record: Record, *, whole: bool = True) -> bool:
    """Without what does not grow, unless `whole`. False if the generation does not exist."""
    tail = json.dumps(asdict(record.tail))
    changed = db.execute(
        "UPDATE generations SET state = ?, tail = ? WHERE id = ?", (record.state, tail, record.id)
    )
    if whole:
        more = json.dumps(asdict(record.head)), _dumped(record.resume)
        db.execute("UPDATE generations SET head = ?, resume = ? WHERE id = ?", (*more, record.id))
    return changed.rowcount > 0


def _dumped(resume: dict[str, Any] | None) -> str | None:
    return None if resume is None else json.dumps(resume)


def _insert_parts(db: sqlite3.Connection, record: Record, at: int) -> None:
    if record.raw:
        texts = record.text("reasoning"), record.text("content"), "".join(record.raw)
        db.execute("INSERT INTO generation_parts VALUES (?,?,?,?,?)", (record.id, at, *texts))


def _record(db: sqlite3.Connection, id: str, *, texts: bool = True) -> Record:
    row = db.execute(
        "SELECT conversation, state, head, tail, resume FROM generations WHERE id = ?", (id,)
    ).fetchone()
    if row is None:
        raise ApiError(404, "generation not found")
    conversation, state, head, tail, resume = row
    record = Record(id, conversation, Head(**json.loads(head)), state, Tail(**json.loads(tail)))
    record.resume = None if resume is None else json.loads(resume)
    if texts:
        for reasoning, content, raw in db.execute(
            "SELECT reasoning, content, raw FROM generation_parts WHERE generation = ? ORDER BY at",
            (id,),
        ):
            record.parts += [("reasoning", reasoning), ("content", content)]
            record.raw.append(raw)
    return record


def _entry(db: sqlite3.Connection, conversation: str) -> Entry | None:
    row = find_row(db, conversation)
    return None if row is None else Entry(row[0], row[1], json.loads(row[6]), row[2])
