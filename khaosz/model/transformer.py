"""The whole network, top to bottom.

Shapes: B rows, T positions, D hidden width, V vocabulary, S cached plus new positions.
Parameter names are Hugging Face's, less the leading "model.", so a checkpoint is a plain copy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from khaosz.config.model_config import ModelConfig
from khaosz.model.cache import KVCache
from khaosz.model.module import Attention, Block, RMSNorm, Rotary


class Transformer(nn.Module):
    """A decoder-only language model. `forward` gives hidden states; `logits` is a separate call,
    so that a loss can take them in chunks and a head can replace them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compiled_blocks: Callable[..., Tensor] | None = None  # `blocks`, while training
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.rotary = Rotary(config)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states (B, T, D) of token ids (B, T), after the final norm.

        `positions` (B, T) default to counting on from the cache. `doc_ids` (B, T) keep packed
        documents apart: a position attends to earlier positions of the same id only. With a
        `cache`, ids are the new positions; documents can't be packed there.
        """
        rows, length = ids.shape
        past = cache.length if cache is not None else 0
        if positions is None:
            positions = torch.arange(past, past + length, device=ids.device).expand(rows, length)
        mask = attention_mask(doc_ids, length, past, ids.device)
        cos, sin = self.rotary(positions)
        embedded = self.embed_tokens(ids)
        if self.training and self.compiled_blocks is not None:
            return self.compiled_blocks(embedded, cos, sin, mask)
        hidden = self.blocks(embedded, cos, sin, mask, cache)
        if cache is not None:
            cache.advance(length)
        return hidden

    def blocks(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The stack of layers on embedded input (B, T, D): what a trainer compiles. The embedding
        stays outside, because its compiled backward adds in no fixed order on a CPU."""
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) matrix that turns hidden states into logits."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D)."""
        return F.linear(hidden, self.output_weight.to(hidden.dtype))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: matrices uniform with variance 1 / (3 * inputs); norms at one; those that
        write to the residual stream at zero, so that every block begins as the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        for layer in self.layers:
            assert isinstance(layer, Block) and isinstance(layer.self_attn, Attention)
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        spread = self.config.initializer_range
        self.embed_tokens.weight.normal_(0.0, spread, generator=generator)
        if self.lm_head is not None:
            self.lm_head.weight.zero_()


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, in their order, without making it: readers of
    files check against them first, and a module on the meta device takes a second to import."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, width)}
    for i in range(config.num_hidden_layers):
        block = f"layers.{i}"
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (rows, width)
            if config.qkv_bias:
                shapes[f"{block}.self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, queries)
        if config.qk_norm:
            shapes[f"{block}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{block}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
        shapes[f"{block}.mlp.gate_proj.weight"] = (inner, width)
        shapes[f"{block}.mlp.up_proj.weight"] = (inner, width)
        shapes[f"{block}.mlp.down_proj.weight"] = (width, inner)
    shapes["norm.weight"] = (width,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def attention_mask(
    doc_ids: Tensor | None, length: int, past: int, device: torch.device
) -> Tensor | None:
    """True where a query may see a key: (B, 1, T, T) for packed documents, (T, S) for new
    positions after a cache, None where plain causal attention (or one new position) says it."""
    if doc_ids is not None:
        assert past == 0, "packed documents and a cache exclude each other"
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & causal)[:, None]
    if past and length > 1:
        return torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return None
