"""What is wrong with a file or a base: a line for people, and a word for programs, which stays."""

from __future__ import annotations

from typing import Literal, NamedTuple

from khaosz.errors import DocumentCode

Code = (
    DocumentCode
    | Literal[
        "partly",  # the file is ready, and a part of it could not be read
        "embedder_failed",
        "base_unreadable",
        "embedder_unusable",
        "unexpected",
    ]
)


class Trouble(NamedTuple):
    code: Code
    message: str


UNREADABLE = Trouble(
    "base_unreadable", "cannot be read or written; is its file broken, or the disk full?"
)
FAILING = Trouble(
    "embedder_unusable",
    "its embedder is not offered, cannot be used, or is another than it was made by",
)
UNEXPECTED = Trouble("unexpected", "met an error; the server's log has more")
