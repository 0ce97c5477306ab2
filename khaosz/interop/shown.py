"""Names and values out of files, as an error message may carry them."""

from __future__ import annotations

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
