"""Keys and values of one sequence in all layers, or what recurrent layers have in their place.

Shapes: L layers, K key/value heads, S positions, T new positions, H head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from khaosz.model.states import States

BLOCK = 64  # a cache grows by a multiple of this many positions


class SequenceCache:
    """A tensor (2K, capacity, H) per layer, keys before values. It grows on demand, layer by layer,
    so that no second copy of it is in memory. `truncate` drops the end (speculation, an edited
    chat); `fork` copies the beginning (a shared prefix).

    With dtype int8 each head's key and value of a position have a scale of their own: half the
    memory of bf16, at the cost of dequantising what attention reads.

    Recurrent layers have `states`. They go back to some lengths only: `reachable`.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        *,
        dtype: torch.dtype,
        device: torch.device,
        limit: int | None = None,
        states: States | None = None,
    ) -> None:
        """`shapes`: K and H of each layer, `ModelConfig.cache_shapes`; a layer that keeps other
        state has (0, 0). `limit`: positions beyond which no room is reserved ahead."""
        self.length, self.limit = 0, limit
        # Of models with a `rope_border`: the ids of all positions, and whether keys are rotated as
        # those of a sequence beyond it.
        self.ids: list[int] = []
        self.long = False
        self.shapes = list(shapes)
        self.states = states or States([()] * len(self.shapes), device)
        self._stores = [
            torch.zeros(2 * heads, 0, width, dtype=dtype, device=device) for heads, width in shapes
        ]
        self._scales: list[Tensor] = []  # fp32 (2K, capacity, 1)
        if dtype == torch.int8:
            self._scales = [torch.zeros(2 * heads, 0, 1, device=device) for heads, _ in shapes]

    @staticmethod
    def bytes_per_position(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
        scale = 4 if dtype == torch.int8 else 0
        return sum(2 * heads * (width * dtype.itemsize + scale) for heads, width in shapes)

    @property
    def capacity(self) -> int:
        return self._stores[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, filled or not."""
        own = sum(tensor.nbytes for tensor in (*self._stores, *self._scales))
        return own + self.states.nbytes

    def reserve(self, positions: int) -> None:
        """Make room for `positions` in total. A growing sequence gets up to half as much again, so
        that its copies stay linear in its length."""
        if positions <= self.capacity:
            return
        target = max(positions, min(self.capacity + self.capacity // 2, positions + 16 * BLOCK))
        if self.limit is not None:
            target = max(positions, min(target, self.limit))
        capacity = -(-target // BLOCK) * BLOCK
        for tensors in (self._stores, self._scales):
            for layer, old in enumerate(tensors):
                # Zeroed: positions after the last are masked out, but 0 * NaN would still be NaN.
                new = old.new_zeros(len(old), capacity, old.shape[2])
                new[:, : self.length] = old[:, : self.length]
                tensors[layer] = new

    @staticmethod
    def capacity_at_most(positions: int, limit: int | None = None) -> int:
        """The largest capacity that `reserve` gives a sequence of at most `positions`."""
        blocks = -(-positions // BLOCK)
        most = blocks + min(-(-blocks // 2), 16)
        return (most if limit is None else max(blocks, min(most, -(-limit // BLOCK)))) * BLOCK

    def write(self, layer: int, keys: Tensor, values: Tensor, extra: int, first: int = 0) -> Tensor:
        """Write T new positions (T, K, H) after the last. Returns the keys and values (2K, S, H)
        from position `first` on, and those of `extra` positions more: int8 as fp32, others as
        stored. `advance` moves the length, once per pass."""
        new = slice(self.length, self.length + len(keys))
        both = torch.cat((keys, values), dim=1).transpose(0, 1)  # (2K, T, H)
        store = self._stores[layer]  # (2K, capacity, H)
        if not self._scales:
            store[:, new] = both
            return self.read(layer, len(keys), extra, first)
        both, scales = both.float(), self._scales[layer]
        scales[:, new] = both.abs().amax(-1, keepdim=True) / 127
        store[:, new] = (both / scales[:, new].clamp_min(1e-30)).round().to(torch.int8)
        return self.read(layer, len(keys), extra, first)

    def read(self, layer: int, new: int, extra: int, first: int = 0) -> Tensor:
        """The keys and values that `write` of `new` positions returned in this pass, for layers
        that share them."""
        seen, store = slice(first, self.length + new + extra), self._stores[layer]
        return store[:, seen] if not self._scales else store[:, seen] * self._scales[layer][:, seen]

    def advance(self, count: int) -> None:
        self.length += count
        self.states.length = self.length
        assert self.length <= self.capacity, (self.length, self.capacity)

    def reachable(self, length: int) -> int:
        """The largest length up to `length` that `truncate` and `fork` can give: with recurrent
        layers that of a kept state."""
        assert 0 <= length <= self.length, (length, self.length)
        return self.states.reachable(length)

    def truncate(self, length: int) -> None:
        """Drop all positions from `reachable(length)` on."""
        length = self.reachable(length)
        self.states = self.states.at(length)
        self.length = length
        del self.ids[length:]

    def fork(self, length: int) -> SequenceCache:
        """A copy of the first `reachable(length)` positions."""
        length, first = self.reachable(length), self._stores[0]
        copy = SequenceCache(
            self.shapes,
            dtype=first.dtype,
            device=first.device,
            limit=self.limit,
            states=self.states.at(length, copy=True),
        )
        copy.reserve(length)
        pairs = (copy._stores, self._stores), (copy._scales, self._scales)
        for mine, theirs in pairs:
            for new, old in zip(mine, theirs, strict=True):
                new[:, :length] = old[:, :length]
        copy.length, copy.ids, copy.long = length, self.ids[:length], self.long
        return copy
