"""Which model of the catalogue suits this machine, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from khaosz.errors import FetchError
from khaosz.interop.fetch.catalogue import Entry, catalogue
from khaosz.interop.fetch.sources import HuggingFace, ModelScope, reachable, sources
from khaosz.interop.gguf.architectures import ARCHITECTURES

# Good and bilingual, the best first; beyond these a processor writes slower than people read.
_BEST = (
    "qwen3.5-4b", "qwen3-4b-2507", "qwen3.5-2b", "qwen3-1.7b", "qwen2.5-coder-1.5b",
    "qwen3.5-0.8b", "qwen3-0.6b", "qwen2.5-coder-0.5b", "smollm2-135m",
)  # fmt: skip
_LARGEST = 2_000_000_000  # bytes that are read for each token


@dataclass(frozen=True)
class Proposal:
    entry: Entry
    reason: str


def propose(source: str | None, free: int | None) -> Proposal:
    """The best model of which half of the `free` bytes of memory hold 4,096 tokens, and that a
    reachable source has. Raises `FetchError` where none has one."""
    reached = [each for each in sources(source) if _is_reachable(each)]
    for entry in fitting(free):
        if having := [each.label for each in reached if each.carries(entry)]:
            room = "" if free is None else f" of {free / 1e9:.1f} GB that are free"
            return Proposal(
                entry,
                f"{entry.name}: {entry.languages}; {entry.bytes / 1e9:.2f} GB from {having[0]},"
                f" licence {entry.licence}; needs about {entry.memory / 1e9:.1f} GB{room}."
                " The best of the catalogue that a processor runs at reading speed, half of the"
                " memory holds and a reachable source has.",
            )
    raise FetchError(
        "no model of the catalogue fits this machine and its sources",
        hint="`khaosz models` lists them all",
    )


def fitting(free: int | None) -> Iterator[Entry]:
    """The models of which half of the `free` bytes of memory hold 4,096 tokens, the best first.
    Sends no request."""
    for name in _BEST:
        # A catalogue of one's own may lack some of them.
        entry = catalogue().get(name)
        if entry is None or (free is not None and entry.memory > free / 2):
            continue
        if entry.bytes <= _LARGEST and entry.architecture in ARCHITECTURES:
            yield entry


def _is_reachable(source: Any) -> bool:
    match source:
        case HuggingFace():
            return reachable(source.endpoint)
        case ModelScope():
            return source.is_reachable()
    return True
