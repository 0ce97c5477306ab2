"""Keys and values of one sequence, in all layers.

Shapes: L layers, K key/value heads, S positions, T new positions, H head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # positions by which a cache grows at least


class SequenceCache:
    """One tensor (L, 2K, capacity, H), keys before values; grown on demand, never to the maximum
    in advance. `truncate` forgets the end (speculation, a chat that goes back); `fork` copies the
    beginning (a shared prefix)."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.length = 0
        self.kv_heads = kv_heads
        self._store = torch.zeros(layers, 2 * kv_heads, 0, head_dim, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        return self._store.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        return self._store.numel() * self._store.element_size()

    def reserve(self, positions: int) -> None:
        """Room for `positions` in all, by half as much again at least: the copies of a growing
        sequence stay linear in its length."""
        if positions <= self.capacity:
            return
        wanted = max(positions, min(self.capacity + self.capacity // 2, positions + 16 * BLOCK))
        layers, rows, _, width = self._store.shape
        # Zeroed: positions behind the last are masked out, but 0 * NaN would still be NaN.
        grown = self._store.new_zeros(layers, rows, -(-wanted // BLOCK) * BLOCK, width)
        grown[:, :, : self.length] = self._store[:, :, : self.length]
        self._store = grown

    @staticmethod
    def capacity_at_most(positions: int) -> int:
        """What `reserve` may come to for a sequence that never has more than `positions`."""
        blocks = -(-positions // BLOCK)
        return (blocks + min(-(-blocks // 2), 16)) * BLOCK

    def write(self, layer: int, keys: Tensor, values: Tensor, extra: int) -> tuple[Tensor, Tensor]:
        """Put T new positions (T, K, H) behind the last; returns keys and values (K, S, H) up to
        them and `extra` positions more. `advance` moves the length, once per pass."""
        end = self.length + len(keys)
        store = self._store[layer]  # (2K, capacity, H)
        store[: self.kv_heads, self.length : end] = keys.transpose(0, 1)
        store[self.kv_heads :, self.length : end] = values.transpose(0, 1)
        return store[: self.kv_heads, : end + extra], store[self.kv_heads :, : end + extra]

    def advance(self, count: int) -> None:
        self.length += count
        assert self.length <= self.capacity, (self.length, self.capacity)

    def truncate(self, length: int) -> None:
        """Forget everything from position `length` on."""
        assert 0 <= length <= self.length, (length, self.length)
        self.length = length

    def fork(self, length: int) -> SequenceCache:
        """A copy of the first `length` positions."""
        assert 0 <= length <= self.length, (length, self.length)
        layers, _, _, width = self._store.shape
        copy = SequenceCache(
            layers, self.kv_heads, width, dtype=self._store.dtype, device=self._store.device
        )
        copy.reserve(length)
        copy._store[:, :, :length] = self._store[:, :, :length]
        copy.length = length
        return copy
