"""What generating needs: weights, keys and values, and the buffers of a pass.

Shapes: N positions of a pass, S positions of a sequence, D hidden width, F feed-forward width; e
bytes of an element of the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch

from khaosz.config import SIZES, ModelConfig, preset
from khaosz.memory.machine import Limit
from khaosz.memory.parts import BASE, MAPPED, Memory
from khaosz.model import is_router, parameter_shapes
from khaosz.model.kv_cache import BLOCK, SequenceCache
from khaosz.model.states import States

_LEAST = 256  # tokens: with less context a model is of no use
# Bytes of a weight that is packed (inference/linear/packed.py): codes of 4 bits, and a scale and a
# zero in bf16 for each group of 32; codes of more bits are two halves. Others become dense.
_TOUCHED = 32 << 20  # bytes of the file that rows of the embedding keep in memory (`MappedRows`)
_FOUR = 0.5 + 4 / 32
_PACKED = {**dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), _FOUR)}
_PACKED |= dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q8_0", "Q8_K"), 2 * _FOUR)
_PACKED |= dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4"), 2 * _FOUR)  # as codes of 8 bits


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored and computed with.

    dtype        of activations, and of matrices that are not quantised unless `unquantised` is set
    embedding    the stored type of the embedding of a model directory, whose rows are kept so
    kinds        GGUF tensor types by name, and bytes; empty for a model directory
    native       quantised matrices are used in the mapped file (inference/linear/native.py)
    reordered    names of matrices whose rows are stored in another order, which are copied
    """

    dtype: torch.dtype
    embedding: torch.dtype = torch.float32
    kinds: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    unquantised: torch.dtype | None = None
    native: bool = False
    reordered: frozenset[str] = frozenset()

    def weights(self, config: ModelConfig) -> tuple[int, int]:
        """Bytes in memory of their own, and bytes that stay in the mapped file."""
        own = mapped = 0
        plain = self.unquantised or self.dtype
        for name, shape in parameter_shapes(config).items():
            count, (kind, nbytes) = prod(shape), self.kinds.get(name, ("", 0))
            is_table = name == "embed_tokens.weight"
            if len(shape) != 2 or is_router(name):
                own += 4 * count  # norms, biases, convolutions and routers, in fp32
            elif not kind:
                is_rows = name == "embed_per_layer.weight"
                own += count * (
                    self.embedding.itemsize if is_rows else self._element(config, is_table)
                )
            elif name == "embed_per_layer.weight" or (is_table and not config.tie_word_embeddings):
                continue  # read row by row, and released
            elif kind in ("F32", "F16", "BF16"):
                own += count * plain.itemsize
            elif self.native:
                own, mapped = (
                    (own + nbytes, mapped) if name in self.reordered else (own, mapped + nbytes)
                )
            elif self.dtype == torch.bfloat16:
                own += int(count * _PACKED.get(kind, self.dtype.itemsize))
            else:
                own += count * self.dtype.itemsize
        return own, mapped

    def buffers(self, config: ModelConfig, positions: int) -> int:
        """Bytes that packed matrices take while they multiply N rows of inputs of width K: the
        inputs in fp32, their two int8 terms and what is left between, a stripe of 512 outputs as
        numbers, and pages of the file around the rows that are read from it."""
        packed = self.kinds and self.dtype == torch.bfloat16 and not self.native
        if not packed:
            rows = not config.tie_word_embeddings or config.hidden_size_per_layer_input
            return _TOUCHED if self.kinds and rows else 0
        inputs = max(config.hidden_size, _widest(config))
        return 18 * positions * inputs + 16 * 512 * inputs + _TOUCHED

    def _element(self, config: ModelConfig, is_table: bool) -> int:
        """Bytes of an element of a matrix of a model directory."""
        if not is_table:
            return self.dtype.itemsize
        exact = torch.promote_types(self.dtype, self.embedding) == self.dtype
        if not config.tie_word_embeddings:
            return self.embedding.itemsize
        return self.dtype.itemsize + (0 if exact else self.embedding.itemsize)


@dataclass(frozen=True)
class InferencePlan:
    """A model and how much it computes at once.

    step_tokens  N, of all sequences together
    sequences    that run at the same time, each of `context` positions
    """

    config: ModelConfig
    storage: Storage
    context: int
    cache_dtype: torch.dtype
    sequences: int = 1
    step_tokens: int = 512

    def memory(self, base: int) -> Memory:
        """`base`: bytes that the process has taken before the model is loaded."""
        own, mapped = self.storage.weights(self.config)
        parts = {
            BASE: base,
            "weights": own,
            MAPPED: mapped,
            "KV cache": self.cache,
            "activations": pass_buffers(
                self.config, self.storage.dtype, min(self.step_tokens, self.context), self.context
            )
            + self.storage.buffers(self.config, min(self.step_tokens, self.context)),
            # Logits of one position of each sequence, and a sorted copy while one is sampled.
            "logits": 4 * self.config.vocab_size * (self.sequences + 4),
        }
        return Memory({name: count for name, count in parts.items() if count})

    @property
    def cache(self) -> int:
        """Bytes of keys and values. A growing cache is copied layer by layer: one layer's old and
        new tensors are there together."""
        each = sequence_bytes(self.config, self.cache_dtype, self.context, self.context)
        return self.sequences * each + each // self.config.num_hidden_layers

    def fitting(self, base: int, limits: Sequence[Limit]) -> InferencePlan | None:
        """The plan with the longest context that fits, up to its own; None if none does."""
        blocks, least = -(-self.context // BLOCK), -(-min(self.context, _LEAST) // BLOCK)

        def of(blocks: int) -> InferencePlan:
            return replace(self, context=min(self.context, blocks * BLOCK))

        def fits(plan: InferencePlan) -> bool:
            return plan.memory(base).exceeded(limits) is None

        if not fits(of(least)):
            return None
        if fits(self):
            return self
        while blocks - least > 1:
            middle = (blocks + least) // 2
            least, blocks = (middle, blocks) if fits(of(middle)) else (least, middle)
        return of(least)

    def smaller(
        self, base: int, limits: Sequence[Limit], native: bool | None
    ) -> Iterator[tuple[str, Memory]]:
        """What would fit instead: a shorter context, a quantised file of the same model, or else
        the largest preset. `native`: whether the kernels of quantised files are compiled; None on
        a device where such files take no less."""
        fits = self.fitting(base, limits)
        if fits is not None and fits.context < self.context:
            yield f"--context {fits.context}", fits.memory(base)
        any_fits = fits is not None
        for kind in () if native is None else ("Q8_0", "Q4_0"):
            if not self._is_larger_than(kind):
                continue
            small = self._as(self.config, quantised(self.config, kind, native=bool(native)))
            if (fits := small.fitting(base, limits)) is not None:
                words = f"a {kind} file (khaosz quantize MODEL --to {kind})"
                yield f"{words} with {fits.context:,} tokens", fits.memory(base)
                any_fits = True
                if fits.context == self.context:
                    return
        if any_fits:
            return
        for size in reversed(SIZES):
            shape = preset(size).model
            storage, kind = Storage(self.storage.dtype), ""
            if native is not None:
                storage, kind = quantised(shape, "Q4_0", native=native), " in a Q4_0 file"
            small = self._as(shape, storage)
            fits = small.fitting(base, limits)
            if fits is not None or size == SIZES[0]:
                fits = fits or replace(small, context=min(small.context, _LEAST))
                words = f"a model of {shape.parameters() / 1e6:,.0f}M parameters{kind}"
                yield f"{words} with {fits.context:,} tokens", fits.memory(base)
                return

    def _as(self, config: ModelConfig, storage: Storage) -> InferencePlan:
        """Another model, computed as much with as with this one."""
        context = min(self.context, config.max_position_embeddings)
        cache = storage.dtype if storage.kinds else self.cache_dtype
        return replace(self, config=config, storage=storage, context=context, cache_dtype=cache)

    def _is_larger_than(self, kind: str) -> bool:
        """Whether `khaosz quantize --to kind` would make the model's matrices smaller."""
        own = sum(self.storage.weights(self.config))
        return sum(quantised(self.config, kind, native=True).weights(self.config)) < 0.9 * own


def quantised(config: ModelConfig, to: str, *, native: bool) -> Storage:
    """A model as `khaosz quantize --to` writes it: the outer matrices in 8 bits, as the others are
    with Q8_0. Without compiled kernels it is packed, and computed in bf16."""
    kinds = {}
    for name, shape in parameter_shapes(config).items():
        kind = "Q8_0" if name.startswith(("embed_tokens", "lm_head")) else to
        kinds[name] = kind, prod(shape) // 32 * (34 if kind == "Q8_0" else 18)
    return Storage(torch.float32 if native else torch.bfloat16, kinds=kinds, native=native)


def sequence_bytes(
    config: ModelConfig, dtype: torch.dtype, positions: int, limit: int | None = None
) -> int:
    """Bytes of one sequence's keys and values, with the room that it reserves ahead, up to `limit`
    positions; and of its states."""
    each = SequenceCache.bytes_per_position(config.cache_shapes, dtype)
    states = States.bytes_at_most(config.all_state_shapes)
    return SequenceCache.capacity_at_most(positions, limit) * each + states


def positions_in(config: ModelConfig, dtype: torch.dtype, room: int) -> int:
    """The most positions of one sequence whose `sequence_bytes` are at most `room`."""
    least, beyond = 0, config.max_position_embeddings // BLOCK + 2  # blocks
    while beyond - least > 1:
        middle = (least + beyond) // 2
        fits = sequence_bytes(config, dtype, middle * BLOCK) <= room
        least, beyond = (middle, beyond) if fits else (least, middle)
    return least * BLOCK


def pass_buffers(config: ModelConfig, dtype: torch.dtype, positions: int, context: int) -> int:
    """Bytes that a pass over N positions takes beside weights and cache.

    The most is there in the MLP: residual stream, normalised input and its copy in the compute
    type (D: 4 + 4 + e), gate and up side by side, silu(gate) and its product with up (4 F e). Or in
    attention over a cache: the mask (N, S), as bool and as a number. No scores: the kernel computes
    them in tiles. Or in a recurrent layer, in fp32: inputs of the convolution, its sum and a copy;
    queries, keys, values and solutions of each head, and products of positions in a chunk of 64.
    Inputs of each layer, while all layers run: rows of the embedding, their scaled copy, what is
    projected and normalised (4 L P each). In a mixture all positions may choose the same expert:
    beside its products, their input, its output and that times the expert's weight, and the sum
    (4 D each); probabilities, and indices of the k experts.
    """
    size, width = dtype.itemsize, config.hidden_size
    stream = positions * width * (8 + size)
    mlp = 4 * positions * _widest(config) * size
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    attention = 4 * positions * heads * config.widest_head * size
    attention += positions * context * (1 + size)
    if config.num_experts is not None:
        mlp += positions * (16 * width + 16 * config.num_experts)
        mlp += 40 * positions * (config.num_experts_per_tok or 0)
    recurrent = 0
    for shapes in config.all_state_shapes:
        channels = sum(shape[1] for shape in shapes[:1])
        each = sum(heads * (8 * keys + 5 * values + 256) for heads, keys, values in shapes[1:])
        recurrent = max(recurrent, 4 * positions * (4 * channels + each))
    inputs = 16 * positions * config.num_hidden_layers * config.hidden_size_per_layer_input
    return stream + inputs + max(mlp, attention, recurrent)


def _widest(config: ModelConfig) -> int:
    return max(map(config.feed_forward_width, range(config.num_hidden_layers)))
