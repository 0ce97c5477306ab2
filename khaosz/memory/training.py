"""What a step of training needs: weights, gradients, optimizer state, and what autograd keeps.

Shapes: N tokens of a micro-batch in rows of T, D hidden width, F feed-forward width, Q query and K
key heads of width H, V vocabulary, C tokens of a chunk of logits, r rank of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from khaosz.config import EXPERT_TARGETS, LoRAConfig, ModelConfig
from khaosz.memory.inference import pass_buffers, sequence_bytes
from khaosz.memory.parts import BASE, Memory
from khaosz.model import parameter_shapes
from khaosz.model.lora import target_of
from khaosz.model.module import block_shapes

# Logits of a chunk at most (trainer/loss.py).
CHUNK_LOGITS = 1 << 23
_BATCH = 32  # answers that are sampled at once (inference/engine.py)
# Imported while a run goes: what optimizers need of PyTorch's compiler, kernels, plots.
_LATER = 100 << 20
# Free blocks between those in use, as a share of activations. glibc's malloc keeps blocks of up to
# 32 MB in its heap, whose holes are not given back. With a fixed MALLOC_MMAP_THRESHOLD_ of 64 KB,
# the peaks of steps were the sums to 1 %, and steps took longer. Tensors that live shortly (of
# adapters, of a layer that is computed again) leave more holes.
_HOLES, _MORE_HOLES = 0.6, 1.0
# What oneDNN keeps of a matrix product in bf16 for each shape, 0.3 to 0.9 MB measured: most of it
# for the product of the forward pass, less for those of the two gradients.
_KERNEL = 700 << 10
# What compiled layers take of the parts that autograd keeps of others, in fp32 and in bf16, and the
# compiler's own modules: within 8 % for nano, mini and small (bench/RESULTS.md).
_COMPILED, _COMPILED_HALF, _COMPILER = 0.45, 0.4, 80 << 20


@dataclass(frozen=True)
class Packed:
    """The largest micro-batch of packed sequences: its tokens, and how many of them are scored.
    longest: tokens of the longest sequence. several: a step has more micro-batches. shapes: how
    many numbers of tokens, and of scored tokens, micro-batches have (`SHAPE_STEP`)."""

    tokens: int
    scored: int
    longest: int
    several: bool
    shapes: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class TrainingPlan:
    """One stage of training, as far as its memory depends on it.

    rows           of `window` tokens in a micro-batch, on one rank
    several        a step has several micro-batches: gradients are there while activations are
    dtypes         compute types: all that calibration will try
    head           the loss reads logits; False for reward models and embedders
    frozen         copies of the model that are not trained: a reference, a reward model
    critic         a reward model is trained beside the policy
    rollout        answers that are sampled at the same time
    packed         the largest micro-batch, where sequences do not fill its rows
    records        bytes of encoded records, where they are not in a mapped file
    stored         with lora.base=file, bytes of the matrices and of the embeddings in the file
    compiled       no micro-batch is computed without the compiler
    """

    config: ModelConfig
    rows: int
    window: int
    several: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    optimizer: str = "muon"
    lora: LoRAConfig | None = None
    gradient_checkpointing: bool = False
    loss_chunk: int = 1024
    head: bool = True
    frozen: int = 0
    critic: bool = False
    rollout: int = 0
    packed: Packed | None = None
    records: int = 0
    stored: int | None = None
    compiled: bool = False

    @property
    def tokens(self) -> int:
        whole = self.rows * self.window
        return whole if self.packed is None else min(whole, self.packed.tokens)

    @property
    def scored(self) -> int:
        return self.tokens if self.packed is None else min(self.tokens, self.packed.scored)

    def memory(self, base: int) -> Memory:
        """`base`: bytes that the process takes without the run."""
        state = self._state()
        moments = [self._forward(dtype) for dtype in self.dtypes]
        forward = max(moments, key=lambda moment: sum(moment.values()))
        passing = sum(forward.values())
        # When the optimizer steps, and while answers are sampled, activations are gone.
        kept = 0 if self.several else state["gradients"]
        other = max(self._update(), self._sampling() - state["gradients"]) + kept
        parts = {BASE: base + _LATER, "records": self.records, **state, **forward}
        parts["kernels"] = self._kernels()
        if not self.several:
            # Gradients come as activations go: the larger of the two counts.
            parts["gradients"] = max(0, state["gradients"] - passing)
            passing += parts["gradients"]
        if other > passing:
            parts["buffers"] = parts.get("buffers", 0) + other - passing
        return Memory({name: count for name, count in parts.items() if count})

    # -------------------------------------------------------------------- what stays between steps

    def _state(self) -> dict[str, int]:
        """Weights in fp32, and for each that is trained a gradient and the optimizer's moments: two
        of AdamW, one of Muon, which has the matrices of the blocks."""
        total, matrices = self._parameters()
        adapters, targets = self._adapters()
        weights, trained, muon = 4 * total, total, matrices
        if self.lora is not None:
            weights += 4 * adapters
            trained, muon = adapters, 0
            if self.stored is not None:
                weights = 4 * adapters + self.stored
            if self.lora.base == "int8":  # codes of one byte, and a scale in fp32 for each row
                rows = sum(shape[0] for shape in targets)
                weights += 4 * rows - 3 * sum(shape[0] * shape[1] for shape in targets)
        if self.optimizer != "muon":
            muon = 0
        optimizer = 4 * muon + 8 * (trained - muon)
        if self.critic:
            body = self._body()
            weights += 4 * body
            trained += body
            second = matrices if self.optimizer == "muon" and self.lora is None else 0
            optimizer += 4 * second + 8 * (body - second)
        weights += 4 * self.frozen * total
        return {"weights": weights, "gradients": 4 * trained, "optimizer": optimizer}

    def _parameters(self) -> tuple[int, int]:
        """All parameters, and those in matrices of the blocks."""
        matrices = sum(rows * columns for rows, columns in self._matrices())
        return (self.config.parameters() if self.head else self._body()), matrices

    def _body(self) -> int:
        config = self.config
        head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return config.parameters() - head + config.hidden_size

    def _matrices(self) -> list[tuple[int, ...]]:
        shapes = parameter_shapes(self.config)
        inside = ("layers.", "per_layer_inputs.")
        return [s for name, s in shapes.items() if name.startswith(inside) and len(s) == 2]

    def _adapters(self) -> tuple[int, list[tuple[int, ...]]]:
        """Parameters of the adapters, and the shapes of the matrices that have one."""
        if self.lora is None:
            return 0, []
        targets: list[tuple[int, ...]] = [
            shape
            for name, shape in parameter_shapes(self.config).items()
            if len(shape) == 2
            and target_of(name.removesuffix(".weight")) in self.lora.target_modules
        ]
        return sum(self.lora.rank * sum(shape) for shape in targets), targets

    # --------------------------------------------------------------------------- forward and loss

    def _forward(self, dtype: torch.dtype) -> dict[str, int]:
        """Bytes by part when the loss of a micro-batch is computed: everything that backward needs
        is there, and a chunk of logits."""
        config, tokens, size = self.config, self.tokens, dtype.itemsize
        layers, width = config.num_hidden_layers, config.hidden_size
        each = [
            layer_activations(config, tokens, self.window, dtype, self.lora, layer)
            for layer in range(layers)
        ]
        if self.gradient_checkpointing:  # the inputs of all layers, and one layer in full
            activations = layers * 4 * tokens * width + max(each)
        else:
            activations = sum(each)
        # The final norm's input, its product without weights and with them; cosines and sines.
        rotated = config.widest_head + (config.head_dim if config.rope_local_theta else 0)
        activations += tokens * (12 * width + 8 * rotated + 12)
        # Of the inputs of each layer: the norm's input, its product, and their sum with the rows.
        numbers = 12 if self.lora is None else 4
        activations += tokens * layers * numbers * config.hidden_size_per_layer_input
        matrices = self._parameters()[1]
        if self.critic:
            activations *= 2
            matrices *= 2
        # Under autocast each matrix has a copy in the compute type until its backward pass.
        copies = size * matrices if dtype != torch.float32 and self.stored is None else 0
        if self.gradient_checkpointing:
            copies //= layers
        parts = {"activations": activations, "buffers": copies}
        if self.stored is not None:  # one dequantised matrix at a time
            parts["buffers"] += size * max(rows * columns for rows, columns in self._matrices())
        elif self.lora is not None and self.lora.base == "int8":
            # One dequantised matrix at a time: in fp32, and in the compute type.
            largest = max((rows * columns for rows, columns in self._matrices()), default=0)
            parts["buffers"] += (4 + size) * largest
        if self.head:
            parts["logits"] = self._loss(dtype)
        brief = self.lora is not None or self.gradient_checkpointing
        # Backward of the MLP: the gradients of its four products.
        inner = max(map(config.feed_forward_width, range(layers)))
        passing = activations + parts["buffers"] + 4 * tokens * inner * size
        parts["allocator"] = int((_MORE_HOLES if brief else _HOLES) * passing)
        if self.compiled:
            share = _COMPILED if dtype == torch.float32 else _COMPILED_HALF
            for name in ("activations", "buffers", "allocator"):
                parts[name] = int(share * parts[name])
            parts["compiler"] = _COMPILER
        return parts

    def _loss(self, dtype: torch.dtype) -> int:
        """Logits of a chunk, exponentials, their quotient, one-hot labels as bool and as numbers,
        their difference (C, V), and the gradient of the chunk before; the head's gradient in fp32
        (V, D) and its weight in the compute type; the loss's input and its gradient (N, D)."""
        config, size = self.config, dtype.itemsize
        vocabulary, width = config.vocab_size, config.hidden_size
        if self.stored is not None:  # rows of the head at a time, and what is summed over them
            rows = min(vocabulary, max(256, CHUNK_LOGITS // max(self.scored, width)))
            logits = (12 + size) * self.scored * rows + size * rows * width
            return logits + (8 + 2 * size) * self.scored * width
        chunk = max(1, min(self.loss_chunk, CHUNK_LOGITS // vocabulary, self.scored))
        numbers = 5 if config.final_logit_softcapping is None else 7  # capped, and their slope
        logits = (numbers * 4 + 1 + size) * chunk * vocabulary
        gradient = 0 if self.lora is not None else 4
        head = (gradient + (size if dtype != torch.float32 else 0)) * vocabulary * width
        return logits + head + 2 * size * self.scored * width

    def _kernels(self) -> int:
        """Of the matrix products of a layer, which have four shapes, and of the logits: three each,
        forward and for the gradients of both factors."""
        if self.packed is None or torch.bfloat16 not in self.dtypes:
            return 0
        tokens, scored = self.packed.shapes
        return 3 * _KERNEL * (4 * tokens + (scored if self.head else 0))

    # ------------------------------------------------------------------- other moments of a step

    def _update(self) -> int:
        """Muon's buffers beside activations: the updates of all matrices of one shape, stacked, and
        three products of their size in the iteration; Gram matrices of the smaller side. AdamW's
        kernel needs none."""
        if self.optimizer != "muon" or self.lora is not None:
            return 0
        groups: dict[tuple[int, ...], int] = {}
        for shape in self._matrices():
            groups[shape] = groups.get(shape, 0) + 1
        size = max(dtype.itemsize for dtype in self.dtypes)
        most = 0
        for (rows, columns), count in groups.items():
            gram = min(rows, columns) ** 2
            most = max(most, count * (8 * rows * columns + size * (2 * rows * columns + 3 * gram)))
        return most

    def _sampling(self) -> int:
        """Keys and values of all answers of a rollout, and the buffers of a pass."""
        if not self.rollout:
            return 0
        at_once = min(self.rollout, _BATCH)
        longest = self.packed.longest if self.packed else self.window
        cache = at_once * sequence_bytes(self.config, torch.float32, longest)
        logits = 8 * at_once * self.config.vocab_size
        return cache + logits + pass_buffers(self.config, torch.float32, 512, longest)


def layer_activations(
    config: ModelConfig,
    tokens: int,
    window: int,
    dtype: torch.dtype,
    lora: LoRAConfig | None = None,
    layer: int = 0,
) -> int:
    """Bytes that autograd keeps of a layer for N tokens in packed rows.

    In fp32, of each norm its input, its product without weights and with them (4 D each, and 4 for
    the scale), which is the input of linear layers; queries and keys before and after QK-norm and
    after the rotation, values, the mixture and its log-sum of each head; gate, silu(gate), up, and
    the product of the two. Keys and values are repeated where they are fewer than queries; the mask
    is a row of T numbers for each token.

    Under autocast the residual stream stays fp32, and every linear layer has a copy of its input in
    the compute type of its own: five of the norms'. A weight that is frozen keeps no input: what
    norms multiply with their weights is not kept; an adapter keeps its own input and r numbers.

    Of a recurrent layer the numbers are measured: the triangular systems of a DeltaNet's chunks
    and their solutions take most of it, in fp32.
    Norms of what is added keep their input and product, in fp32; that of values its input. An
    embedding of the layer keeps the stream as its gate's input, the gate before and after its
    activation, the product and what its norm keeps; the scale of a layer keeps its input.
    """
    width, inner, size = config.hidden_size, config.feed_forward_width(layer), dtype.itemsize
    head, shared = config.head_width(layer), config.kv_layer(layer) != layer
    heads, kv_heads = config.num_attention_heads, 0 if shared else config.num_key_value_heads
    repeated = config.num_key_value_heads < heads
    queries, keys = heads * head, kv_heads * head
    frozen = lora is not None
    shapes = config.state_shapes(layer)
    if len(shapes) == 2:
        (_, channels), (heads, key_width, value_width) = shapes
        key_heads = (channels - heads * value_width) // (2 * key_width)
        each = 24 * width + heads * (72 * key_width + 32 * value_width + 800) + 9 * channels
        each += 32 * key_heads * key_width + size * 4 * inner
    elif shapes:
        each = 56 * width + size * 4 * inner
    elif dtype == torch.float32:
        each = (16 if frozen else 24) * width + 8
        if config.qk_norm:
            each += (4 if frozen else 8) * (queries + keys) + 4 * (heads + kv_heads)
        each += 4 * (queries + keys) + (8 * queries if repeated else 4 * keys)
    else:
        each = (18 if frozen else 26) * width + 8
        if config.qk_norm:
            each += (4 if frozen else 6) * (queries + keys) + 4 * (heads + kv_heads)
        each += 6 * queries if not shared else 4 * queries if repeated else 0
    if not shapes:
        each += 4 * heads + size * (queries + 4 * inner + window)
        each += (4 + 2 * size) * queries if config.attn_output_gate else 0
    chosen = (config.num_experts_per_tok or 0) if config.has_experts(layer) else 0
    if chosen:
        each += (chosen - 1) * size * 4 * inner
        still = frozen and not set(EXPERT_TARGETS) & set(lora.target_modules if lora else ())
        each += _routed(config, size, still)
    norm = (4 if frozen else 8 if dtype == torch.float32 else 6) * width + 4
    each += 2 * norm if config.output_norms else 0
    each += 4 * (keys + kv_heads) if config.value_norm else 0
    each += 4 * width if config.layer_scalar and not frozen else 0
    if config.hidden_size_per_layer_input:
        gate = size if frozen else 3 * size if dtype == torch.float32 else 4 * size
        each += norm + gate * config.hidden_size_per_layer_input + (0 if frozen else size * width)
    if lora is not None:
        layers = (name.removesuffix(".weight") for name in block_shapes(config, layer))
        names = set(map(target_of, layers)) & set(lora.target_modules)
        each += size * lora.rank * len(names - set(EXPERT_TARGETS))
        each += size * lora.rank * chosen * len(names & set(EXPERT_TARGETS))
    return tokens * each


def _routed(config: ModelConfig, size: int, frozen: bool) -> int:
    """Bytes of a token that autograd keeps of a mixture beside the products of its k experts: of
    each the token's input, its output, that times the expert's weight, and indices; probabilities
    of the router, which the load-balancing loss computes again. With experts that are frozen the
    inputs of the router and of the last product are not kept."""
    experts, chosen, width = (
        config.num_experts or 0,
        config.num_experts_per_tok or 0,
        config.hidden_size,
    )
    each = 32 * chosen + 4 * experts + 4 + (8 * experts if config.router_aux_loss_coef else 0)
    if frozen:
        inner = config.moe_intermediate_size or 0
        return each + (4 + size) * chosen * width - 4 * width - size * chosen * inner
    return each + (8 + size) * chosen * width
