"""All errors that a user can cause, and helpers for their messages.

    KhaoszError                 one line (`str(error)`) and one `hint`; the CLI prints both, exits 1
    ├── ConfigError             an invalid recipe, override, preset or flag
    ├── DataError               an unusable input text, record or prepared directory
    │   ├── DocumentError       a document that cannot be read; `code` gives the reason
    │   ├── TokenFileError      a token shard that is truncated, corrupt or of another version
    │   └── FetchError          a download that failed, or whose checksum does not match
    ├── TokenizerError          a tokenizer that is missing, broken or does not fit the data
    ├── ModelError              a model that is missing, broken or of an unsupported family
    │   ├── CheckpointError     training state that is missing, torn or from another configuration
    │   └── ServerError         a server that is unreachable, refuses, or replies unexpectedly
    ├── DeviceError             a device, compute type or backend that this machine does not have
    ├── GenerationError         a request out of range: temperature below zero, ...
    │   └── ContextLengthError  a prompt that is longer than the model's context
    ├── NotEnoughMemoryError    a task that needs more memory than this process may take
    └── TrainingError           a failed run: loss not finite, disk full, data exhausted

Programming mistakes raise `AssertionError` or `TypeError`: they are bugs, not the user's mistakes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

DocumentCode = Literal[
    "encrypted",
    "damaged",
    "not_text",  # no supported encoding fits
    "wrong_kind",  # the content does not match the file extension
    "no_text",
    "too_large",  # as stored, unpacked, or for its parser
    "too_slow",
    "unsafe",  # malicious, or looks like it
    "not_read",  # the file itself is fine
]


FetchCode = Literal[
    "no_network",  # a host could not be reached, or sent nothing
    "disk_full",
    "wrong_hash",
    "being_pulled",  # by another process
    "not_allowed",  # gated or private
]


class KhaoszError(Exception):
    """A user's mistake: `message` says what is wrong, `hint` how to fix it."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(KhaoszError):
    pass


class DataError(KhaoszError):
    pass


class DocumentError(DataError):
    """`code` is stable, for callers that show the user a message of their own."""

    def __init__(self, message: str, *, code: DocumentCode, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class TokenFileError(DataError):
    pass


class FetchError(DataError):
    """`code`: as that of `DocumentError`, where the reason has one."""

    def __init__(
        self, message: str, *, hint: str | None = None, code: FetchCode | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class TokenizerError(KhaoszError):
    pass


class ModelError(KhaoszError):
    pass


class CheckpointError(ModelError):
    pass


class ServerError(ModelError):
    """`status` and `code` come from the server's JSON error; None if it did not answer."""

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
    """`param`: the field of `SamplingParams` that is wrong, None where it is none of them. `str` of
    the error is the field and the `reason`."""

    def __init__(self, reason: str, *, param: str | None = None, hint: str | None = None) -> None:
        super().__init__(f"{param} {reason}" if param else reason, hint=hint)
        self.param, self.reason = param, reason


class ContextLengthError(GenerationError):
    """`limit`: the tokens that the prompt exceeds."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the prompt has more than {limit} tokens, the model's context")
        self.limit = limit


class NotEnoughMemoryError(KhaoszError):
    pass


class TrainingError(KhaoszError):
    pass


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelled one, or None."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint that names the closest known name, or `otherwise`."""
    guess = nearest(name, known)
    return f"did you mean '{guess}'?" if guess else otherwise


_MAX_LENGTH = 100  # characters


def quoted(value: object) -> str:
    """`repr(value)` on one line, cut to 100 characters. A file can name a tensor with line
    breaks, terminal escapes or a megabyte of text, none of which belongs in a message."""
    text = " ".join(repr(value[: 2 * _MAX_LENGTH] if isinstance(value, str) else value).split("\n"))
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]}..."


def one_line(text: str) -> str:
    """A library's error message, which may quote the file: escaped and cut to 400 characters."""
    escaped = repr(text)[1:-1]
    return escaped if len(escaped) <= 4 * _MAX_LENGTH else f"{escaped[: 4 * _MAX_LENGTH]}..."
