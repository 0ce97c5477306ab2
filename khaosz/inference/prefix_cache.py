"""Caches of finished sequences, for prompts that begin as they did: the next turn of a chat, the
same document with another question."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from khaosz.model.kv_cache import SequenceCache

_LEAST = 8  # positions below which a copy does not pay
_MOST = 256  # entries: every new prompt is compared with all


@dataclass
class Entry:
    """Token ids int32 (S,), the cache of their S positions, and the adapter that computed it."""

    ids: np.ndarray
    cache: SequenceCache
    owner: object = None


class PrefixCache:
    """Evicts least recently used entries beyond `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._keys = count()

    @property
    def nbytes(self) -> int:
        # Other threads read this while the engine's puts and takes: `list` copies in one step.
        return sum(entry.cache.nbytes for entry in list(self._entries.values()))

    def put(self, ids: Sequence[int], cache: SequenceCache, owner: object = None) -> None:
        """Keep a finished sequence's cache; `ids` are the tokens of its positions, `owner` the
        adapter that it was computed with. If one entry is a prefix of another, only the
        longer stays."""
        if cache.length < _LEAST or cache.nbytes > self.max_bytes:
            return
        new = Entry(np.array(ids[: cache.length], dtype=np.int32), cache, owner)
        for key, entry in list(self._entries.items()):
            if entry.owner is not owner:
                continue
            shorter = min(len(entry.ids), len(new.ids))
            if common_prefix(entry.ids, new.ids) == shorter:
                if len(entry.ids) > shorter:
                    new = entry
                del self._entries[key]
        self._entries[next(self._keys)] = new
        self.shrink(self.max_bytes)

    def take(
        self,
        prompt: Sequence[int],
        running: Iterable[tuple[Sequence[int], SequenceCache]] = (),
        owner: object = None,
    ) -> SequenceCache | None:
        """A cache of the longest cached prefix of `prompt` without its last token, whose logits
        are needed; with recurrent layers, up to the last state that was kept. An entry that
        `prompt` continues is removed and returned; others, and caches of `running` sequences, are
        copied. Only entries of `owner` are used, and all `running` sequences must be its own."""
        needed = np.array(prompt[:-1], dtype=np.int32)
        best, length, chosen = None, _LEAST - 1, None
        for key, entry in self._entries.items():
            if entry.owner is not owner:
                continue
            shared = entry.cache.reachable(common_prefix(entry.ids, needed))
            if shared > length:
                best, length, chosen = entry.cache, shared, key
        for ids, cache in running:
            known = np.array(ids[: cache.length], dtype=np.int32)
            shared = cache.reachable(common_prefix(known, needed))
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
