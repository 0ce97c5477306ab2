"""Every error a user can cause, drawn as the tree it is.

    KhaoszError                 one line (`str(error)`) and one `hint`; the CLI prints both, exits 1
    ├── ConfigError             a recipe, override, preset or flag that cannot be right
    ├── DataError               an input text, record or prepared directory that cannot be used
    │   ├── DocumentError       a file of documents that cannot be read; its `code` says why
    │   ├── TokenFileError      a token shard that is cut short, corrupt or of another version
    │   └── FetchError          a demo source that could not be fetched or failed its checksum
    ├── TokenizerError          a tokenizer that is missing, broken or does not fit the data
    ├── ModelError              a model directory that is missing, broken or not of our families
    │   ├── CheckpointError     training state that is missing, torn or from another configuration
    │   └── ServerError         a server that cannot be reached, refuses, or answers something else
    ├── DeviceError             a device, compute type or backend that this machine does not have
    ├── GenerationError         a request out of range: prompt too long, temperature below zero, ...
    └── TrainingError           the run itself failed: loss not finite, disk full, data exhausted

Programming mistakes stay `AssertionError` or `TypeError`; they are ours, not the user's.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

_LONGEST = 100  # characters


def shown(value: object) -> str:
    """`repr(value)` cut to one short line. A file can name a tensor with line breaks, terminal
    escapes or a megabyte of text, and what we print must not."""
    text = " ".join(repr(value[: 2 * _LONGEST] if isinstance(value, str) else value).split("\n"))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def one_line(text: str) -> str:
    """A library's message about a file, which may quote it: printable, and not without end."""
    escaped = repr(text)[1:-1]
    return escaped if len(escaped) <= 4 * _LONGEST else f"{escaped[: 4 * _LONGEST]}..."


DocumentCode = Literal[
    "encrypted",
    "damaged",
    "not_text",  # bytes in no encoding that we know
    "wrong_kind",  # another format than its name says
    "no_text",
    "too_large",  # itself, unpacked, or for its parser
    "too_slow",
    "unsafe",  # made to harm who reads it, or it looks so
    "not_read",  # nothing is wrong with the file
]


class KhaoszError(Exception):
    """A mistake we can explain: `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(KhaoszError):
    pass


class DataError(KhaoszError):
    pass


class DocumentError(DataError):
    """`code` is one of a few words that stay, for those who tell the user in words of their own."""

    def __init__(self, message: str, *, code: DocumentCode, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class TokenFileError(DataError):
    pass


class FetchError(DataError):
    pass


class TokenizerError(KhaoszError):
    pass


class ModelError(KhaoszError):
    pass


class CheckpointError(ModelError):
    pass


class ServerError(ModelError):
    """`status` and `code` (of its error's JSON) where the server answered."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status, self.code = status, code


class DeviceError(KhaoszError):
    pass


class GenerationError(KhaoszError):
    pass


class TrainingError(KhaoszError):
    pass


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None
