"""The key/value cache of autoregressive decoding: one growing tensor pair per layer.

Shapes: B rows, N key/value heads, S cached positions, H head dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 256  # positions a cache grows by at least, so that a long chat copies rarely


class KVCache:
    """Keys and values of every position seen so far. All rows have the same length."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new positions (B, N, T, H) to a layer; returns all of them (B, N, S, H).

        `length` moves only by `advance`, once per forward pass, so every layer writes at the same
        place.
        """
        end = self.length + keys.shape[2]
        stored_keys, stored_values = self._keys[layer], self._values[layer]
        if stored_keys is None or stored_values is None or stored_keys.shape[2] < end:
            stored_keys = self._grown(stored_keys, keys, end)
            stored_values = self._grown(stored_values, values, end)
            self._keys[layer], self._values[layer] = stored_keys, stored_values
        stored_keys[:, :, self.length : end] = keys
        stored_values[:, :, self.length : end] = values
        return stored_keys[:, :, :end], stored_values[:, :, :end]

    def advance(self, count: int) -> None:
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on (a chat that goes back, a shared prefix)."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def _grown(self, old: Tensor | None, like: Tensor, end: int) -> Tensor:
        # Half as much again each time: the copies of a growing chat stay linear in its length.
        capacity = max(end + end // 2, end + _BLOCK)
        rows, heads, _, width = like.shape
        new = torch.empty(rows, heads, capacity, width, dtype=like.dtype, device=like.device)
        if old is not None:
            new[:, :, : self.length] = old[:, :, : self.length]
        return new
