"""Caches of finished sequences, for prompts that begin as they did: the next turn of a chat, the
same document with another question."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from khaosz.model.kv_cache import SequenceCache

_LEAST = 8  # positions below which a copy is not worth the trouble
_MOST = 256  # entries: all are compared with every new prompt


@dataclass
class Held:
    """Token ids int32 (S,), the cache of their S positions, and whose weights made it."""

    ids: np.ndarray
    cache: SequenceCache
    owner: object = None


class PrefixCache:
    """Least recently used entries go first once `max_bytes` are passed."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, Held] = OrderedDict()
        self._keys = count()

    @property
    def nbytes(self) -> int:
        # Others ask while the engine's thread puts and takes: a list is made in one piece.
        return sum(entry.cache.nbytes for entry in list(self._entries.values()))

    def put(self, ids: Sequence[int], cache: SequenceCache, owner: object = None) -> None:
        """Keep a finished sequence's cache; `ids` are the tokens of its positions, `owner` the
        adapter that it was computed with. Of two of which one begins with the other only the
        longer is of use."""
        if cache.length < _LEAST or cache.nbytes > self.max_bytes:
            return
        held = Held(np.array(ids[: cache.length], dtype=np.int32), cache, owner)
        for key, entry in list(self._entries.items()):
            if entry.owner is not owner:
                continue
            shorter = min(len(entry.ids), len(held.ids))
            if common_prefix(entry.ids, held.ids) == shorter:
                if len(entry.ids) > shorter:
                    held = entry
                del self._entries[key]
        self._entries[next(self._keys)] = held
        self.shrink(self.max_bytes)

    def take(
        self,
        prompt: Sequence[int],
        running: Iterable[tuple[Sequence[int], SequenceCache]] = (),
        owner: object = None,
    ) -> SequenceCache | None:
        """A cache of the longest known beginning of `prompt`, short of its last token, whose
        logits are needed. An entry that `prompt` goes on from is handed over, others are copied;
        so are the caches of `running` sequences. Only what `owner` has put counts, and all that
        is running must be its own."""
        wanted = np.array(prompt[:-1], dtype=np.int32)
        best, length, chosen = None, _LEAST - 1, None
        for key, entry in self._entries.items():
            if entry.owner is not owner:
                continue
            shared = common_prefix(entry.ids, wanted)
            if shared > length:
                best, length, chosen = entry.cache, shared, key
        for ids, cache in running:
            known = np.array(ids[: cache.length], dtype=np.int32)
            shared = common_prefix(known, wanted)
            if shared > length:
                best, length, chosen = cache, shared, None
        if best is None:
            return None
        if chosen is None:
            return best.fork(length)
        if length < len(self._entries[chosen].ids) - 1:  # the last token may end a turn
            self._entries.move_to_end(chosen)
            return best.fork(length)
        del self._entries[chosen]
        best.truncate(length)
        return best

    def shrink(self, max_bytes: int) -> None:
        while len(self._entries) > _MOST or self.nbytes > max_bytes:
            self._entries.popitem(last=False)

    def clear(self) -> None:
        self._entries.clear()


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """How many leading elements are equal."""
    shorter = min(len(first), len(second))
    differ = np.flatnonzero(first[:shorter] != second[:shorter])
    return int(differ[0]) if len(differ) else shorter
