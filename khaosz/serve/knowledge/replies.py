"""What knowledge bases answer."""

from __future__ import annotations

from typing import Literal

from khaosz.serve.knowledge.trouble import Code
from khaosz.serve.openai.replies import HitReply, Reply


class BaseReply(Reply):
    """chunks: passages; embedded: those that are found by meaning too; bytes: of the files as they
    came. error: why the base cannot be used, and code, a word of it that stays."""

    id: str
    object: Literal["knowledge_base"]
    created: int
    embedder: str | None
    files: int
    chunks: int
    embedded: int
    bytes: int
    error: str | None
    code: Code | None


class BaseList(Reply):
    object: Literal["list"]
    data: list[BaseReply]


class FileReply(Reply):
    """error: why it failed, or what of it could not be read; code: a word of it that stays."""

    id: str
    object: Literal["file"]
    name: str
    bytes: int
    sha256: str
    status: Literal["queued", "reading", "embedding", "ready", "failed"]
    error: str | None
    code: Code | None
    chunks: int
    embedded: int
    created: int


class FileList(Reply):
    object: Literal["list"]
    data: list[FileReply]


class Deleted(Reply):
    id: str
    object: Literal["knowledge_base", "file"]
    deleted: Literal[True]


class SearchReply(Reply):
    object: Literal["search"]
    query: str
    mode: Literal["lexical", "dense", "hybrid"]
    hits: list[HitReply]


class PassageReply(Reply):
    """`text` begins at character `text_start` of the document, which has `length`."""

    hash: str
    doc: str
    length: int
    page: int | None
    start: int
    end: int
    text_start: int
    text: str
