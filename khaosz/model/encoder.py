"""Encoders, in which every token sees every other.

BERT (Devlin et al. 2019, arXiv:1810.04805), RoBERTa and XLM-RoBERTa learn positions and differ only
in what counts as position 0. Embedders (E5, BGE, GTE) and cross-encoders are such models.
EmbeddingGemma (Vera et al. 2025, arXiv:2509.20354) is a bidirectional `Transformer`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.model.transformer import Transformer

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class EncoderConfig:
    """first_position: where a text's positions begin; RoBERTa's begin behind the padding id.
    labels: outputs of the classification head, 0 without one. pooler: whether BERT's
    dense layer over the first token comes before it, or RoBERTa's own."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    first_position: int = 0
    labels: int = 0
    pooler: bool = True

    @property
    def longest(self) -> int:
        """Tokens of a text."""
        return self.max_position_embeddings - self.first_position


class EncoderLayer(nn.Module):
    """Attention and MLP, each added and then normalised."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.heads, self.activation = config.num_attention_heads, _ACTIVATIONS[config.activation]
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.output = nn.Linear(width, width), nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps)
        self.up = nn.Linear(width, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, width)
        self.mlp_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D); mask (B, 1, 1, T), true where there is a token."""
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, self.heads, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )  # (B, H, T, D / H)
        mixed = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape)
        x = self.attention_norm(x + self.output(mixed))
        return self.mlp_norm(x + self.down(self.activation(self.up(x))))


class Encoder(nn.Module):
    """Ids to hidden states, and to class logits with a classification head."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        if config.labels:
            self.dense = nn.Linear(width, width)
            self.classes = nn.Linear(width, config.labels)

    @property
    def width(self) -> int:
        """D of the hidden states."""
        return self.config.hidden_size

    @property
    def longest(self) -> int:
        """Tokens of a text."""
        return self.config.longest

    def forward(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of ids (B, T), padded on the right to T; lengths (B,). The
        content of the padding has no effect."""
        length = ids.shape[1]
        places = torch.arange(length, device=ids.device)
        types = torch.zeros_like(ids) if types is None else types
        types = types.clamp(max=self.config.type_vocab_size - 1)  # RoBERTa has one type
        x = self.words(ids) + self.positions(places + self.config.first_position)
        x = self.norm(x + self.types(types))
        mask = None
        if int(lengths.min()) < length:
            mask = (places < lengths[:, None])[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Class logits (B, labels), from the first token of hidden (B, T, D)."""
        return self.classes(torch.tanh(self.dense(hidden[:, 0])))


class TransformerEncoder(nn.Module):
    """A bidirectional `Transformer`, called as an `Encoder` is."""

    def __init__(self, body: Transformer) -> None:
        super().__init__()
        assert body.config.bidirectional
        self.body = body
        self.width, self.longest = body.config.hidden_size, body.config.max_position_embeddings

    def forward(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of ids (B, T), padded on the right to T; lengths (B,)."""
        del types  # it has none
        padding = torch.arange(ids.shape[1], device=ids.device) >= lengths[:, None]
        return self.body(ids, doc_ids=padding)
