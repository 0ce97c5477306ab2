"""Forward passes for inference: chunks of many sequences, one pass over the weights.

Shapes: N new positions of all chunks, D hidden width, Q query heads, K key/value heads, H head
width, S cached positions of one sequence, T new ones, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.inference.adapter import Adapter, Spans, adapted
from khaosz.inference.linear.load import Weights, dense_weights, gguf_weights, live_weights
from khaosz.inference.linear.native import library
from khaosz.interop.gguf.blocks import is_affine
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import ModelDirectory
from khaosz.interop.models import ModelSource, is_gguf, open_model
from khaosz.memory.inference import Storage
from khaosz.model import Transformer, capped
from khaosz.model.kv_cache import BLOCK, SequenceCache
from khaosz.model.module import Attention
from khaosz.model.part import Linear, Part, Rotations
from khaosz.model.recurrent import Recurrent
from khaosz.model.rotary import Rotary, Rotation
from khaosz.model.states import States

_AGAIN = 512  # positions that are computed again at a time
TILE = 16  # positions of a tile of the deterministic path
assert BLOCK % TILE == 0, (BLOCK, TILE)


@dataclass
class Chunk:
    """New positions of one sequence; logits are computed for the last `want` of them."""

    ids: Sequence[int]
    cache: SequenceCache
    want: int = 1
    adapter: Adapter | None = None


class Runner:
    """One network on one device, for any number of sequences.

    The fast path runs all chunks in one pass; neighbours affect a sequence only by the number of
    rows, for which a matrix kernel may round differently. With `deterministic` every pass
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
        self._rotary = Rotary(config).to(self.device)
        # Those of positions 0, 1, 2 and so on, also of sequences beyond the border.
        none = torch.empty(0, device=self.device)
        self._tables = {long: self._rotary(none, long) for long in (False, True)}

    @classmethod
    def from_module(
        cls,
        model: Transformer,
        *,
        dtype: torch.dtype | None = None,
        deterministic: bool = False,
    ) -> Runner:
        """Reads the module's weights in every pass: for rollouts of a model in training."""
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

        `dtype` is that of activations and, without a `cache_dtype` (int8, bf16), of caches. The
        default is fp32, but on a CPU bf16 for .gguf files whose matrices are all BF16, and for
        quantised ones where the compiled kernel is not used: PyTorch's kernels need it. Matrices
        that a .gguf file stores as F32 or F16 are computed in fp32. An explicit `dtype` holds for
        all that is not quantised; with fp32 a quantised file is dequantised. Raises `ModelError`.
        """
        if is_gguf(path) and torch.device(device).type == "cpu":
            source = GgufModel.open(path)
            return cls.from_gguf(
                source, dtype=dtype, cache_dtype=cache_dtype, deterministic=deterministic
            )
        dtype = dtype or torch.float32
        model = open_model(path)
        weights = dense_weights(model, dtype, device)
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
        dtype, unquantised, native = _gguf_types(source, dtype)
        weights = gguf_weights(source, dtype, unquantised, native)
        return cls(
            source.config,
            lambda: weights,
            dtype=dtype,
            cache_dtype=cache_dtype,
            deterministic=deterministic,
        )

    def new_cache(self, limit: int | None = None) -> SequenceCache:
        """An empty cache; `limit` as for `SequenceCache`."""
        return SequenceCache(
            self.config.cache_shapes,
            dtype=self.cache_dtype,
            device=self.device,
            limit=limit,
            states=States(self.config.all_state_shapes, self.device),
        )

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Append every chunk to its cache; logits (want, V) in fp32 of its last positions."""
        if self.config.rope_border is None:
            return self._run(chunks)
        before, rest = zip(*(self._across(chunk) for chunk in chunks), strict=True)
        pairs = zip(before, self._run(rest), strict=True)
        return [logits if first is None else torch.cat((first, logits)) for first, logits in pairs]

    def _across(self, chunk: Chunk) -> tuple[Tensor | None, Chunk]:
        """Where a sequence passes `rope_border`, its earlier positions are computed again, since
        all of them are rotated otherwise then. Returns logits of positions before the border, and
        the rest of the chunk."""
        border, cache, past = self.config.rope_border, chunk.cache, chunk.cache.length
        assert border is not None
        long, logits = past + len(chunk.ids) > border, None
        here = border - past  # of the new positions, those before the border
        if past and long and here > 0 and chunk.want > len(chunk.ids) - here:
            # As many logits as if they were computed one by one.
            first = Chunk(chunk.ids[:here], cache, here - len(chunk.ids) + chunk.want)
            first.adapter = chunk.adapter
            _, first = self._across(first)
            logits = self._run([first])[0]
            chunk = Chunk(chunk.ids[here:], cache, len(chunk.ids) - here, chunk.adapter)
        if cache.length and cache.long != long:
            ids = list(cache.ids)
            cache.truncate(0)
            cache.long = long
            for start in range(0, len(ids), _AGAIN):
                self._run([Chunk(ids[start : start + _AGAIN], cache, 0, chunk.adapter)])
        cache.long = long
        return logits, chunk

    def _run(self, chunks: Sequence[Chunk]) -> list[Tensor]:
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
        if self.config.rope_border is not None:
            chunks = [self._across(replace(chunk, want=0))[1] for chunk in chunks]
        if self.deterministic:
            return [self._tile_states(chunk) for chunk in chunks]
        weights = self.weights()
        states = weights.norm(self._forward(weights, chunks)).float()
        return list(states.split([len(chunk.ids) for chunk in chunks]))

    def _run_tiles(self, chunk: Chunk) -> Tensor:
        weights = self.weights()
        states = [self._forward(weights, [piece], pad) for piece, pad in _tiles(chunk)]
        if not chunk.want:
            return torch.empty(0, self.config.vocab_size)
        # Row by row: products of one shape, however many rows are requested.
        rows = torch.cat(states)[len(chunk.ids) - chunk.want :]
        return torch.cat([self._logits(weights, row[None]) for row in rows])

    def _tile_states(self, chunk: Chunk) -> Tensor:
        weights = self.weights()
        states = [self._forward(weights, [piece], pad) for piece, pad in _tiles(chunk)]
        return torch.cat([weights.norm(row[None]) for row in torch.cat(states)]).float()

    def _forward(
        self, weights: Weights, chunks: Sequence[Chunk], pad: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """The residual stream (N, D) after the last layer. `pad` rows before and after a single
        chunk fill a tile; they are computed, not cached and not returned."""
        before, behind = pad
        ids: list[int] = [0] * before
        positions: list[int] = []
        for chunk in chunks:
            past = chunk.cache.length
            chunk.cache.reserve(past + len(chunk.ids) + behind)
            ids.extend(chunk.ids)
            positions.extend(range(past - before, past + len(chunk.ids) + behind))
        ids.extend([0] * behind)
        rotations = self._rotations(positions, chunks, pad)
        attend = partial(self._attend, chunks, pad)
        linear = adapted(weights.linear, _spans(chunks, pad))
        if self.deterministic:
            linear = partial(_row_by_row, linear)
        x = weights.embed(ids)  # (N, D)
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        embedded = None
        if weights.inputs is not None and weights.embed_per_layer is not None:
            embedded = weights.inputs.forward(x, weights.embed_per_layer(ids), linear)
        for block in weights.blocks:
            x = block(x, rotations, attend, linear, embedded)
        for chunk in chunks:
            chunk.cache.advance(len(chunk.ids))
            if self.config.rope_border is not None:
                chunk.cache.ids.extend(chunk.ids)
        return x[before : len(x) - behind]

    def _logits(self, weights: Weights, hidden: Tensor) -> Tensor:
        normed = weights.norm(hidden)
        if self.config.logits_scaling != 1.0:
            normed = normed / self.config.logits_scaling
        return capped(weights.head(normed).float(), self.config.final_logit_softcapping)

    def _rotations(
        self, positions: list[int], chunks: Sequence[Chunk], pad: tuple[int, int]
    ) -> Rotations:
        """The rotations of a pass over N positions."""
        if len({chunk.cache.long for chunk in chunks}) == 1:
            return self._at(positions, chunks[0].cache.long)
        parts, start = [], 0
        for chunk in chunks:
            end = start + len(chunk.ids) + sum(pad)
            parts.append(self._at(positions[start:end], chunk.cache.long)[0])
            start = end
        # A model with a border has one rotation, and does not scale queries.
        joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("cos", "sin"))
        return (Rotation(*joined),)

    def _at(self, positions: list[int], long: bool) -> Rotations:
        """The rotations of positions, from tables that grow with them."""
        tables = self._tables[long]
        known, longest = len(tables[0].cos), max(positions) + 1
        if longest > known:
            count = max(longest, 2 * known, 512)
            tables = self._rotary(torch.arange(count, device=self.device), long)
            self._tables[long] = tables
        first = positions[0]
        index: slice | Tensor
        if positions[-1] - first == len(positions) - 1 == max(positions) - first:
            index = slice(first, first + len(positions))
        else:
            index = torch.tensor(positions, device=self.device)
        return tuple(table.at(index) for table in tables)

    def _attend(
        self,
        chunks: Sequence[Chunk],
        pad: tuple[int, int],
        part: Part,
        *tensors: Tensor,
    ) -> Tensor:
        """Every chunk's queries (N, Q, H) over its own cache, to which keys and values (N, K, H)
        of its new positions are added where the layer has its own; or its recurrence."""
        if isinstance(part, Recurrent):
            return self._recur(chunks, pad, part, tensors)
        assert isinstance(part, Attention)
        queries, *stored = tensors
        if queries.dtype != self.dtype:
            queries, stored = queries.to(self.dtype), [x.to(self.dtype) for x in stored]
        new = [queries, *stored]
        if len(chunks) == 1:
            return self._attend_one(chunks[0].cache, pad, part, *new)
        lengths = [len(chunk.ids) for chunk in chunks]
        split = zip(*(x.split_with_sizes(lengths) for x in new), strict=True)
        each = zip(chunks, split, strict=True)
        return torch.cat([self._attend_one(c.cache, pad, part, *tensors) for c, tensors in each])

    def _recur(
        self,
        chunks: Sequence[Chunk],
        pad: tuple[int, int],
        part: Recurrent,
        inputs: tuple[Tensor, ...],
    ) -> Tensor:
        """What a recurrent part gives at new positions (N, ...), from inputs (N, ...)."""
        outputs, start = [], pad[0]
        for chunk in chunks:
            end = start + len(chunk.ids)
            own = tuple(x[None, start:end] for x in inputs)
            outputs.append(chunk.cache.states.scan(part, own, one_by_one=self.deterministic)[0])
            start = end
        if sum(pad):
            first = outputs[0]
            outputs = [first.new_zeros(n, *first.shape[1:]) for n in pad]
            outputs.insert(1, first)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _attend_one(
        self,
        cache: SequenceCache,
        pad: tuple[int, int],
        part: Attention,
        queries: Tensor,
        *stored: Tensor,
    ) -> Tensor:
        """(T, Q, H) queries at the last T of S positions over the keys and values of a sequence."""
        before, behind = pad
        length, heads, width = queries.shape
        # The first position that the first query sees.
        first = 0 if part.window is None else max(0, cache.length - before - part.window + 1)
        if stored:
            keys, values = (x[before : length - behind] for x in stored)
            seen = cache.write(part.layer, keys, values, behind, first)  # (2K, S, H)
        else:
            seen = cache.read(part.source, length - before - behind, behind, first)
        if seen.dtype != self.dtype:  # a cache may be in a smaller one
            seen = seen.to(self.dtype)
        keys, values = seen[None].chunk(2, dim=1)  # (1, K, S, H)
        kv_heads, positions = keys.shape[1], keys.shape[2]
        if length == 1:  # the heads of a group are rows over the same keys
            grouped = queries.view(1, kv_heads, -1, width)
            mixed = F.scaled_dot_product_attention(grouped, keys, values, scale=part.scale)
            return mixed.view(1, heads, width)
        mask, near = None, part.window is not None and positions > part.window
        if positions != length or before + behind or near:
            mask = torch.ones(length, positions, dtype=torch.bool, device=keys.device)
            mask = mask.tril(positions - length)
            if near and part.window is not None:
                mask = mask.triu(positions - length - part.window + 1)
        mixed = F.scaled_dot_product_attention(
            queries.transpose(0, 1)[None],  # (1, Q, T, H)
            keys,
            values,
            mask,
            is_causal=mask is None,
            scale=part.scale,
            enable_gqa=heads != kv_heads,
        )
        return mixed[0].transpose(0, 1)


def _row_by_row(
    linear: Linear, part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
) -> Sequence[Tensor]:
    """`linear`, for an expert one row at a time: how many rows of a tile it has depends on others
    than the row's past, and products of one shape do not."""
    if rows is None:
        return linear(part, names, x, rows)
    each = [linear(part, names, x[i : i + 1], rows[i : i + 1]) for i in range(len(rows))]
    return [torch.cat(outputs) for outputs in zip(*each, strict=True)]


def _gguf_types(
    source: GgufModel, dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype, ctypes.CDLL | None]:
    """The types of activations and of matrices that are not quantised, and the compiled kernels
    where they are used."""
    kinds = source.matrix_kinds
    quantised = any(map(is_affine, kinds))
    native = library() if quantised and dtype != torch.float32 else None
    # What is stored with more bits than bf16 has is not rounded unless asked for.
    unquantised = dtype or (torch.bfloat16 if kinds == {"BF16"} else torch.float32)
    if dtype is None:
        packed = quantised and native is None
        dtype = torch.bfloat16 if packed else unquantised
    return dtype, unquantised, native


def storage_of(
    source: ModelSource, device: str | torch.device, dtype: torch.dtype | None
) -> Storage:
    """How `Runner.open` will store the weights of a model."""
    if isinstance(source, ModelDirectory) or torch.device(device).type != "cpu":
        plain = dtype or torch.float32
        return Storage(plain, source.dtype("embed_tokens.weight"))
    dtype, unquantised, native = _gguf_types(source, dtype)
    return Storage(
        dtype,
        kinds={name: (source.kind(name), source.nbytes(name)) for name in source.shapes},
        unquantised=unquantised,
        native=native is not None,
        reordered=frozenset(filter(source.is_reordered, source.shapes)),
    )


def _spans(chunks: Sequence[Chunk], pad: tuple[int, int]) -> Spans:
    """Rows of a pass that have an adapter; neighbours with the same adapter share a span."""
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
