"""Columns of records: the spellings in use, and the names that a recipe gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from khaosz.errors import DataError, one_line

if TYPE_CHECKING:  # document loaders import this module under a limit of memory
    from khaosz.config import ColumnsConfig

Fields = dict[str, Any]

TURNS = (
    *("messages", "conversations", "conversation", "dialog", "dialogue", "chat"),
    "context_messages",  # OpenRLHF
)
QUESTIONS = ("prompt", "instruction", "question", "query", "problem", "input")
ANSWERS = ("completion", "output", "response", "solution", "answer")
SYSTEMS = ("system", "system_prompt")
LABELS = ("label", "kto_tag")
SCORES = ("helpfulness", "score", "rating")
QUERIES, POSITIVES = ("query", "anchor"), ("positive", "positives", "pos")
PROMPTS = ("prompt", *TURNS, *QUESTIONS[1:], "context", "history")


def named(record: Any, columns: ColumnsConfig | None = None) -> Fields:
    """The columns that are not null, under the names that the table knows. Raises DataError for a
    record that is not an object or lacks a column named in `columns`."""
    if not isinstance(record, dict):
        raise DataError(f"record is a {type(record).__name__}, not an object")
    fields = {key: value for key, value in record.items() if value is not None}
    if columns is None or not any(vars(columns).values()):
        return fields
    sources = column_names(columns)
    for known, source in sources.items():
        if source not in record and known not in ("system", "tools", "negative"):
            keys = key_list(record)
            raise DataError(f"no column {source}, which [columns] names, with keys {keys}")
    moved = {known: fields[source] for known, source in sources.items() if source in fields}
    replaced = set(sources.values()) | {
        name
        for group in _RIVALS
        if any(known in sources for known in group[0])
        for name in group[1]
    }
    fields = {key: value for key, value in fields.items() if key not in replaced} | moved
    if columns.role or columns.content or columns.roles:
        fields = {key: _renamed(value, columns) for key, value in fields.items()}
    return fields


# What a named column replaces: other spellings of the same thing.
_RIVALS = (
    (("messages", "prompt"), (*TURNS, *PROMPTS)),
    (("completion",), ANSWERS),
    (("system",), SYSTEMS),
    (("label",), LABELS),
    (("score",), SCORES),
    (("query",), QUERIES),
    (("positive",), POSITIVES),
)


def column_names(columns: ColumnsConfig) -> dict[str, str]:
    """Known name -> column of the data."""
    values = columns.model_dump(exclude={"role", "content", "roles"}, exclude_none=True)
    return {"completion" if key == "response" else key: value for key, value in values.items()}


def _renamed(value: Any, columns: ColumnsConfig) -> Any:
    """Messages with `role` and `content` under these names, and known roles."""
    if isinstance(value, list):
        return [_renamed(item, columns) for item in value]
    if not isinstance(value, dict):
        return value
    turn = dict(value)
    for known, source in (("role", columns.role), ("content", columns.content)):
        if source is not None and source in turn:
            turn[known] = turn.pop(source)
    for key in ("role", "from", "speaker"):
        role = turn.get(key)
        if isinstance(role, str) and role in columns.roles:
            turn[key] = columns.roles[role]
    return turn


def key_list(fields: Fields) -> str:
    """The keys of a record, for a message: escaped, and not all of many."""
    keys = [one_line(str(key))[:40] for key in list(fields)[:12]]
    return ", ".join(keys + ["..."] * (len(fields) > 12)) or "(none)"
