"""The whole network, top to bottom.

Shapes: B rows, T positions, D hidden width, V vocabulary, Q query heads, K key/value heads, H head
width.
Parameter names are Hugging Face's without the leading "model.", so a checkpoint is a plain copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from khaosz.config.model_config import ModelConfig
from khaosz.model.frozen import StoredMatrix
from khaosz.model.mixture import Router
from khaosz.model.module import Attention, Block, block_shapes
from khaosz.model.part import Part, RMSNorm, Rotations, linear
from khaosz.model.per_layer import PerLayerInputs, Scale
from khaosz.model.recurrent import Recurrent
from khaosz.model.rotary import Rotary


class Rows(NamedTuple):
    """How the positions of packed rows may be mixed.

    masks       by window: True where a query may see a key; None for all before it
    documents   (B, T), the number of each position's document; None where a row is one
    """

    masks: dict[int | None, Tensor | None]
    documents: Tensor | None


class Transformer(nn.Module):
    """A decoder-only language model. `forward` gives hidden states; `logits` is a separate call,
    so that a loss can take them in chunks and a head can replace them. A `bidirectional` one is an
    encoder: every position sees later ones too."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compiled_blocks: Callable[..., Tensor] | None = None  # `blocks`, while training
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_per_layer = self.per_layer_inputs = None
        if each := config.hidden_size_per_layer_input:
            outputs = config.num_hidden_layers * each
            self.embed_per_layer = nn.Embedding(config.vocab_size, outputs)
            self.per_layer_inputs = PerLayerInputs(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = Rotary(config)

    def forward(
        self, ids: Tensor, positions: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> Tensor:
        """Hidden states (B, T, D) of token ids (B, T), after the final norm.

        `positions` (B, T) default to 0, 1, 2 and so on. `doc_ids` (B, T) keep packed documents
        apart: a position attends to earlier positions of the same id only, in a bidirectional
        model to all of the same id.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x = self.embed_tokens(ids)
        if self.config.embedding_multiplier != 1.0:
            x = x * self.config.embedding_multiplier
        embedded = None
        if self.embed_per_layer is not None and self.per_layer_inputs is not None:
            embedded = self.per_layer_inputs.forward(x, self.embed_per_layer(ids), linear)
        blocks, rows = self.compiled_blocks if self.training else None, self._rows(ids, doc_ids)
        return (blocks or self.blocks)(x, self.rotary(positions), rows, embedded)

    def _rows(self, ids: Tensor, doc_ids: Tensor | None) -> Rows:
        documents = None
        if doc_ids is not None and any(self.config.all_state_shapes):
            documents = F.pad(doc_ids.diff(dim=1) != 0, (1, 0)).cumsum(1)
        length, window = ids.shape[1], self.config.sliding_window
        causal = not self.config.bidirectional
        mask = None if doc_ids is None else document_mask(doc_ids, causal=causal)
        if mask is None and not causal:  # without a mask, attention is causal
            mask = torch.ones(1, length, dtype=torch.bool, device=ids.device)
        masks: dict[int | None, Tensor | None] = {None: mask}
        if window is not None:
            masks[window] = mask
            if length > window:  # else a row is seen as a whole, which is faster without a mask
                near = window_mask(length, window, ids.device, causal=causal)
                masks[window] = near if mask is None else mask & near
        return Rows(masks, documents)

    def blocks(
        self, x: Tensor, rotations: Rotations, rows: Rows, embedded: Tensor | None = None
    ) -> Tensor:
        """The stack of layers on embedded input (B, T, D): what a trainer compiles. The embedding
        stays outside, because its compiled backward adds in no fixed order on a CPU."""
        attend = partial(attend_rows, rows, {})
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                rest = rotations, attend, linear, embedded
                x = checkpoint(layer, x, *rest, use_reentrant=False)
            else:
                x = layer(x, rotations, attend, linear, embedded)
        return self.norm(x)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        weight = self._head.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def stored_head(self) -> StoredMatrix | None:
        """The same where it stays in the format of a file, else None."""
        return getattr(self._head, "matrix", None)

    @property
    def _head(self) -> nn.Module:
        return self.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        logits = F.linear(self.head_input(hidden), self.output_weight.to(hidden.dtype))
        return capped(logits, self.config.final_logit_softcapping)

    def head_input(self, hidden: Tensor) -> Tensor:
        """What `output_weight` multiplies: hidden states (..., D), scaled where logits are."""
        return hidden if self.config.logits_scaling == 1.0 else hidden / self.config.logits_scaling

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices uniform with variance 1 / (3 * inputs); norms at one; those that
        write to the residual stream at zero, so that every block starts as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, Router):
                bound = self.config.hidden_size**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, RMSNorm | Scale):
                module.weight.fill_(1.0)
            elif isinstance(module, Recurrent):
                module.initialise(generator)
        for layer in self.layers:
            assert isinstance(layer, Block)
            for part in (layer.mixer, layer.mlp, layer.per_layer_input):
                if part is not None:
                    for name in part.writers():
                        part.linear_layer(name).weight.zero_()
        spread = self.config.initializer_range
        if self.embed_per_layer is not None:
            self.embed_per_layer.weight.normal_(0.0, spread, generator=generator)
        self.embed_tokens.weight.normal_(0.0, spread, generator=generator)
        if self.lm_head is not None:
            self.lm_head.weight.zero_()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; afterwards the mode before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, in order, without creating it: readers of files
    check them first, and the first embedding on the meta device takes a second."""
    width = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, width)}
    if each := config.hidden_size_per_layer_input:
        outputs = config.num_hidden_layers * each
        shapes["embed_per_layer.weight"] = (config.vocab_size, outputs)
        shapes["per_layer_inputs.projection.weight"] = (outputs, width)
        shapes["per_layer_inputs.norm.weight"] = (each,)
    for i in range(config.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in block_shapes(config, i).items()}
    shapes["norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def document_mask(doc_ids: Tensor, *, causal: bool = True) -> Tensor:
    """True where a query of packed documents (B, T) may see a key: (B, 1, T, T)."""
    same = (doc_ids[:, :, None] == doc_ids[:, None, :])[:, None]
    return same.tril() if causal else same


def window_mask(length: int, window: int, device: torch.device, *, causal: bool = True) -> Tensor:
    """True where a query may see a key within its window, by default at or before its own position:
    (T, T)."""
    near = torch.ones(length, length, dtype=torch.bool, device=device).triu(1 - window)
    return near.tril(0 if causal else window - 1)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits within -cap to cap: cap * tanh(logits / cap); as they are without a cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def attend_rows(
    rows: Rows, shared: dict[int, tuple[Tensor, ...]], part: Part, *tensors: Tensor
) -> Tensor:
    """Attention within rows (B, T, Q or K, H) by the mask of the part's window, or causal where
    there is none; recurrence from their beginning. `shared` gets the keys and values that later
    layers read."""
    if isinstance(part, Recurrent):
        first = tensors[0]
        state = part.new_state(len(first), first.device)
        return part.scan(tensors, state, rows.documents)[0]
    assert isinstance(part, Attention)
    queries, *stored = tensors
    if part.is_source:
        shared[part.layer] = tuple(stored)
    keys, values = stored or shared[part.source]
    mask = rows.masks[part.window]
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    if queries.shape[1] != keys.shape[1]:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    mixed = F.scaled_dot_product_attention(
        queries, keys, values, mask, is_causal=mask is None, scale=part.scale
    )
    return mixed.transpose(1, 2)
