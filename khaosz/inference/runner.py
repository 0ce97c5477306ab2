"""Forward passes for inference: chunks of many sequences, one pass over the weights.

Shapes: N new positions of all chunks, D hidden width, Q query heads, K key/value heads, G = Q / K,
H head width, S cached positions of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.inference.adapter import Adapter, Spans, adapted
from khaosz.inference.linear.load import (
    LayerWeights,
    Weights,
    fused_weights,
    gguf_weights,
    live_weights,
)
from khaosz.inference.linear.native import library
from khaosz.interop import GgufModel, is_gguf, load_model
from khaosz.interop.gguf.blocks import is_affine
from khaosz.model import Transformer
from khaosz.model.kv_cache import BLOCK, SequenceCache
from khaosz.model.module import rotary_frequencies

TILE = 16  # positions of a tile of the deterministic path
assert BLOCK % TILE == 0, (BLOCK, TILE)


@dataclass
class Chunk:
    """New positions of one sequence. `want`: for how many of the last ones logits are needed."""

    ids: Sequence[int]
    cache: SequenceCache
    want: int = 1
    adapter: Adapter | None = None


class Runner:
    """One network on one device, for any number of sequences.

    The fast path takes all chunks in one pass; a sequence sees nothing of its neighbours but the
    number of rows, on which a matrix kernel may round differently. With `deterministic` every pass
    is one tile of `TILE` positions of one sequence, aligned to its positions: the same position
    is always computed in the same row of products of the same shape, so its bits depend on its
    past alone, not on batch, chunk size, cache or speculation.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[], Weights],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.cache_dtype = cache_dtype or dtype
        self.deterministic = deterministic
        self.weights = weights
        self._scale = config.head_dim**-0.5
        frequencies, self._amplitude = rotary_frequencies(config)
        self._frequencies = frequencies.to(self.device)
        self._cos = self._sin = torch.empty(0, 1, config.head_dim, device=self.device)

    @classmethod
    def from_module(
        cls,
        model: Transformer,
        *,
        dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> Runner:
        """Reads the module's weights anew in every pass: a model in training, for rollouts."""
        weight = model.embed_tokens.weight
        dtype = dtype or weight.dtype
        return cls(
            model.config,
            lambda: live_weights(model, dtype),
            device=weight.device,
            dtype=dtype,
            deterministic=deterministic,
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> Runner:
        """A model directory or a .gguf file, its weights laid out for inference.

        `dtype` is that of activations and, without a `cache_dtype` (int8, bf16), of caches. By
        default it is fp32, but bf16 for .gguf files on a CPU that are not quantised, or where the
        compiled kernel is not used: PyTorch's want it. fp32 asked for on a quantised file
        dequantises it. Raises `ModelError`.
        """
        if is_gguf(path) and torch.device(device).type == "cpu":
            source = GgufModel.open(path)
            return cls.from_gguf(
                source, dtype=dtype, cache_dtype=cache_dtype, deterministic=deterministic
            )
        dtype = dtype or torch.float32
        model = load_model(path, device=device)
        weights = fused_weights(model, dtype)
        return cls(
            model.config,
            lambda: weights,
            device=device,
            dtype=dtype,
            cache_dtype=cache_dtype,
            deterministic=deterministic,
        )

    @classmethod
    def from_gguf(
        cls,
        source: GgufModel,
        *,
        dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> Runner:
        """On the CPU; `dtype` as for `open`."""
        native = None
        if not deterministic and dtype != torch.float32:
            quantised = any(is_affine(source.kind(name)) for name in source.names)
            native = library() if quantised else None
        dtype = dtype or (torch.bfloat16 if native is None else torch.float32)
        weights = gguf_weights(source, dtype, native)
        return cls(
            source.config,
            lambda: weights,
            dtype=dtype,
            cache_dtype=cache_dtype,
            deterministic=deterministic,
        )

    def new_cache(self) -> SequenceCache:
        config = self.config
        return SequenceCache(
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
            dtype=self.cache_dtype,
            device=self.device,
        )

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Append every chunk to its cache; logits (want, V) in fp32 of its last positions."""
        if self.deterministic:
            return [self._run_tiles(chunk) for chunk in chunks]
        weights = self.weights()
        hidden = self._forward(weights, chunks)  # (N, D)
        rows: list[int] = []
        start = 0
        for chunk in chunks:
            start += len(chunk.ids)
            rows.extend(range(start - chunk.want, start))
        if not rows:
            return [torch.empty(0, self.config.vocab_size) for _ in chunks]
        if len(rows) < len(hidden):
            hidden = hidden[rows]
        logits = self._logits(weights, hidden)
        return list(logits.split([chunk.want for chunk in chunks]))

    @torch.inference_mode()
    def hidden(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Hidden states (T, D) of every chunk after the final norm, in fp32; caches advance."""
        if self.deterministic:
            return [self._tile_states(chunk) for chunk in chunks]
        weights = self.weights()
        states = self._norm(self._forward(weights, chunks), weights.norm).float()
        return list(states.split([len(chunk.ids) for chunk in chunks]))

    def _run_tiles(self, chunk: Chunk) -> Tensor:
        weights = self.weights()
        states = [self._forward(weights, [piece], pad) for piece, pad in _tiles(chunk)]
        if not chunk.want:
            return torch.empty(0, self.config.vocab_size)
        # Row by row: a product of one shape, whatever was asked for beside it.
        rows = torch.cat(states)[len(chunk.ids) - chunk.want :]
        return torch.cat([self._logits(weights, row[None]) for row in rows])

    def _tile_states(self, chunk: Chunk) -> Tensor:
        weights = self.weights()
        states = [self._forward(weights, [piece], pad) for piece, pad in _tiles(chunk)]
        return torch.cat([self._norm(row, weights.norm) for row in torch.cat(states)]).float()

    def _logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        return weights.head(self._norm(hidden, weights.norm)).float()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _forward(
        self, weights: Weights, chunks: Sequence[Chunk], pad: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """The residual stream (N, D) after the last layer. `pad` rows before and behind a single
        chunk fill up a tile; they are computed, not cached and not returned."""
        before, behind = pad
        ids: list[int] = [0] * before
        positions: list[int] = []
        for chunk in chunks:
            past = chunk.cache.length
            chunk.cache.reserve(past + len(chunk.ids) + behind)
            ids.extend(chunk.ids)
            positions.extend(range(past - before, past + len(chunk.ids) + behind))
        ids.extend([0] * behind)
        cos, sin = self._rotation(positions)
        spans = _spans(chunks, pad)
        x = weights.embed(ids)  # (N, D)
        for index, layer in enumerate(weights.layers()):
            normed = self._norm(x, layer.input_norm).to(self.dtype)
            x = x + self._attention(index, layer, normed, cos, sin, chunks, pad, spans)
            normed = self._norm(x, layer.post_norm).to(self.dtype)
            both = adapted(spans, index, "gate_up", normed, layer.gate_up(normed))
            gate, up = both.chunk(2, dim=-1)
            inner = F.silu(gate) * up
            x = x + adapted(spans, index, "down", inner, layer.down(inner))
        for chunk in chunks:
            chunk.cache.advance(len(chunk.ids))
        return x[before : len(x) - behind]

    def _rotation(self, positions: list[int]) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (N, 1, H), from a table that grows with the positions."""
        longest = max(positions) + 1
        if longest > len(self._cos):
            count = max(longest, 2 * len(self._cos), 512)
            angles = torch.arange(count, device=self.device)[:, None].float() * self._frequencies
            cos, sin = angles.cos() * self._amplitude, angles.sin() * self._amplitude
            self._cos = torch.cat((cos, cos), dim=-1)[:, None]
            self._sin = torch.cat((-sin, sin), dim=-1)[:, None]
        first = positions[0]
        if positions[-1] - first == len(positions) - 1 == max(positions) - first:
            return (
                self._cos[first : first + len(positions)],
                self._sin[first : first + len(positions)],
            )
        index = torch.tensor(positions, device=self.device)
        return self._cos[index], self._sin[index]

    def _attention(
        self,
        index: int,
        layer: LayerWeights,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        chunks: Sequence[Chunk],
        pad: tuple[int, int],
        spans: Spans,
    ) -> Tensor:
        config = self.config
        heads, kv_heads, width = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        projected = adapted(spans, index, "qkv", x, layer.qkv(x))
        if layer.qkv_bias is not None:
            projected = projected + layer.qkv_bias
        projected = projected.view(len(x), heads + 2 * kv_heads, width)
        turning = projected[:, : heads + kv_heads]  # (N, Q + K, H)
        if layer.q_norm is not None and layer.k_norm is not None:
            wide = turning.float()
            queries = self._norm(wide[:, :heads], layer.q_norm)
            turning = torch.cat((queries, self._norm(wide[:, heads:], layer.k_norm)), dim=1)
        # `sin` has its sign in it: x * cos + (second half, first half) * (-sin, sin).
        turned = torch.addcmul(turning * cos, turning.roll(width // 2, -1), sin).to(self.dtype)
        values = projected[:, heads + kv_heads :]
        mixed = torch.empty(len(x), heads, width, dtype=self.dtype, device=x.device)
        start = 0
        before, behind = pad
        for chunk in chunks:
            length = before + len(chunk.ids) + behind
            end = start + length
            real = slice(start + before, end - behind)
            keys, vals = chunk.cache.write(
                index, turned[real, heads:], values[real], extra=behind
            )  # (K, S, H)
            keys, vals = keys.to(self.dtype), vals.to(self.dtype)  # a cache may be in a smaller one
            mixed[start:end] = self._attend(turned[start:end, :heads], keys, vals, bool(sum(pad)))
            start = end
        mixed = mixed.view(len(x), heads * width)
        return adapted(spans, index, "o", mixed, layer.o(mixed))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, tile: bool) -> Tensor:
        """(T, Q, H) queries at the last T of S positions over keys and values (K, S, H)."""
        length, heads, width = queries.shape
        kv_heads, seen = keys.shape[0], keys.shape[1]
        group = heads // kv_heads
        if length == 1:  # the heads of a group are rows over the same keys
            q = queries.view(1, kv_heads, group, width)
            mixed = F.scaled_dot_product_attention(q, keys[None], values[None], scale=self._scale)
            return mixed.reshape(1, heads, width)
        q = queries.transpose(0, 1)[None]  # (1, Q, T, H)
        mask = None
        if seen != length or tile:
            mask = torch.ones(length, seen, dtype=torch.bool, device=keys.device)
            mask = mask.tril(seen - length)
        mixed = F.scaled_dot_product_attention(
            q,
            keys[None],
            values[None],
            mask,
            is_causal=mask is None,
            scale=self._scale,
            enable_gqa=group > 1,
        )
        return mixed[0].transpose(0, 1)


def _spans(chunks: Sequence[Chunk], pad: tuple[int, int]) -> Spans:
    """Rows of a pass that have an adapter; those of neighbours that share one in one span."""
    spans: list[tuple[Adapter, slice]] = []
    start = 0
    for chunk in chunks:
        end = start + pad[0] + len(chunk.ids) + pad[1]
        if chunk.adapter is not None:
            if spans and spans[-1][0] is chunk.adapter and spans[-1][1].stop == start:
                spans[-1] = chunk.adapter, slice(spans[-1][1].start, end)
            else:
                spans.append((chunk.adapter, slice(start, end)))
        start = end
    return spans


def _tiles(chunk: Chunk) -> list[tuple[Chunk, tuple[int, int]]]:
    """A chunk cut at multiples of `TILE`, each piece with the rows that fill its tile."""
    pieces = []
    position, done = chunk.cache.length, 0
    while done < len(chunk.ids):
        before = position % TILE
        count = min(TILE - before, len(chunk.ids) - done)
        pad = (before, TILE - before - count)
        ids = chunk.ids[done : done + count]
        pieces.append((Chunk(ids, chunk.cache, adapter=chunk.adapter), pad))
        position += count
        done += count
    return pieces
