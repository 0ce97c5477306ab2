"""Prompt-lookup speculation: what followed the last tokens before may follow them again.

Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding. It pays where answers quote their
prompt: documents, editing, code.
"""

from __future__ import annotations

from collections.abc import Sequence

_SIZES = (4, 3, 2)  # lengths of the n-grams looked up, most reliable first
# PyTorch's int4 kernel takes up to four rows at little more than the price of one.
_DRAFT = 3
_TRIAL = 24  # drafted tokens after which acceptance is judged
_LEAST = 0.35  # below this share a wider pass costs more than it brings
_REST = 64  # tokens without drafts after that, doubled each time


class PromptLookup:
    """Proposes draft tokens for one sequence, and stops proposing when they are not accepted."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        # Where the continuation of an n-gram begins, the latest place.
        self._places: dict[tuple[int, ...], int] = {}
        self._drafted = self._accepted = 0
        self._rest, self._resting = _REST, 0
        self.extend(ids)

    def extend(self, ids: Sequence[int]) -> None:
        """Add tokens of the sequence. An n-gram is entered once its follower is known, so the last
        tokens never match themselves."""
        for token in ids:
            end = len(self._ids)
            for size in _SIZES:
                if end >= size:
                    self._places[tuple(self._ids[end - size :])] = end
            self._ids.append(token)
        self._resting = max(0, self._resting - len(ids))

    def propose(self) -> list[int]:
        if self._resting:
            return []
        for size in _SIZES:
            place = self._places.get(tuple(self._ids[-size:]))
            if place is not None and len(self._ids) >= size:
                return self._ids[place : place + _DRAFT]
        return []

    def judge(self, drafted: int, accepted: int) -> None:
        """Record how many tokens of a draft were accepted."""
        self._drafted += drafted
        self._accepted += accepted
        if self._drafted >= _TRIAL:
            if self._accepted < _LEAST * self._drafted:
                self._resting = self._rest
                self._rest *= 2
            self._drafted = self._accepted = 0
