"""The parts of the network, for training and inference alike.

A block is given what differs between the two: `attend`, attention over packed rows or over
sequences' caches, and `linear`, how its linear layers multiply.

Shapes: ... leading dimensions ((B, T) in training, (N,) new positions in the engine), D hidden
width, Q query heads, K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.rotary import Rotation, rotate

Rotations = tuple[Rotation, ...]  # of a pass, by `ModelConfig.rotary_kind`
# (part, queries (..., Q, H), keys (..., K, H), values (..., K, H)) -> (..., Q, H)
Attend = Callable[["Attention", Tensor, Tensor, Tensor], Tensor]
# (part, names of its linear layers, their input) -> their outputs
Linear = Callable[["Part", tuple[str, ...], Tensor], Sequence[Tensor]]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Part(nn.Module):
    """Half a block, in a layer of its own number: what mixes positions, or the feed-forward.

    `PRODUCTS` names its linear layers, those with one input together: an engine may fuse them,
    and computes them in a type and from a format of its own. Other parameters are vectors.
    """

    PRODUCTS: ClassVar[tuple[tuple[str, ...], ...]]
    layer: int


def linear(part: Part, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
    """The outputs of a part's own linear layers: what training uses."""
    return [getattr(part, name)(x) for name in names]


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return weight * F.rms_norm(x.float(), weight.shape, None, self.eps).to(x.dtype)


class Attention(Part):
    """Grouped-query attention with rotary positions and optional QK-norm or QKV bias.

    window    positions that are seen, the query's own included; None for all
    scale     what scores are multiplied by; None for H ** -0.5
    """

    QKV, OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
    PRODUCTS: ClassVar = (QKV, OUT)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.window, self.scale = config.window(layer), config.attention_multiplier
        self.rotary, self.interleaved = config.rotary_kind(layer), config.rope_interleaved
        self.norm_last = config.qk_norm_after_rotary
        self.heads = [config.num_attention_heads, config.num_key_value_heads]
        width, bias = config.hidden_size, config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        # QK-norm: per head, weighted, before the rotation or after it.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, keys, values = linear(self, self.QKV, x)
        queries, keys = self._positioned(queries.view(shape), keys.view(shape), rotations)
        mixed = attend(self, queries, keys, values.view(shape))  # (..., Q, H)
        return linear(self, self.OUT, mixed.flatten(-2))[0]

    def _positioned(
        self, queries: Tensor, keys: Tensor, rotations: Rotations
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys normalised and rotated, where the layer does so."""
        if self.rotary is None:
            joined = self._joined(queries, keys)
            queries, keys = joined.split_with_sizes(self.heads, dim=-2)
            return queries, keys
        rotation = rotations[self.rotary]
        if self.norm_last:
            rotated = rotate(torch.cat((queries, keys), dim=-2), rotation, self.interleaved)
            rotated = self._joined(*rotated.split_with_sizes(self.heads, dim=-2))
        else:
            rotated = rotate(self._joined(queries, keys), rotation, self.interleaved)
        queries, keys = rotated.split_with_sizes(self.heads, dim=-2)
        if rotation.scale is not None:
            queries = queries * rotation.scale.to(queries.dtype)
        return queries, keys

    def _joined(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Queries and keys side by side (..., Q + K, H), normalised where the model does so."""
        if self.q_norm is None or self.k_norm is None:
            return torch.cat((queries, keys), dim=-2)
        if queries.dtype == torch.float32:
            return torch.cat((self.q_norm.forward(queries), self.k_norm.forward(keys)), dim=-2)
        # One norm without weights, then theirs: the same bits, and 1 to 2 % of a small model's
        # decoding in bf16.
        weights = [
            norm.weight.expand(heads, -1)
            for norm, heads in zip((self.q_norm, self.k_norm), self.heads, strict=True)
        ]
        both = torch.cat((queries, keys), dim=-2)
        both = F.rms_norm(both, (self.head_dim,), None, self.q_norm.eps).to(both.dtype)
        return torch.cat(weights) * both


class MLP(Part):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), or with another activation."""

    GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
    PRODUCTS: ClassVar = (GATE_UP, DOWN)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, _ACTIVATIONS[config.hidden_act]
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        gate, up = linear(self, self.GATE_UP, x)
        return linear(self, self.DOWN, self.activation(gate) * up)[0]


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream (pre-norm). With
    `output_norms` what they add is normalised too, as Gemma 3 does."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(width, eps)
        self.self_attn = Attention(config, layer)
        self.attention_output_norm = RMSNorm(width, eps) if config.output_norms else None
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(config, layer)
        self.mlp_output_norm = RMSNorm(width, eps) if config.output_norms else None

    def forward(
        self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear = linear
    ) -> Tensor:
        # `forward` skips the checks for hooks: 2 % of the decoding of a small model.
        normed = self.input_layernorm.forward(x)
        mixed = self.self_attn.forward(normed, rotations, attend, linear)
        x = x + self._scaled(mixed, self.attention_output_norm)
        fed = self.mlp.forward(self.post_attention_layernorm.forward(x), linear)
        return x + self._scaled(fed, self.mlp_output_norm)

    def _scaled(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """What is added to the residual stream."""
        y = y if norm is None else norm.forward(y)
        return y if self.multiplier == 1.0 else y * self.multiplier


def block_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's parameters, in their order."""
    width, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    for part, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (width, queries)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (head,)
    if config.output_norms:
        shapes["attention_output_norm.weight"] = (width,)
    shapes["post_attention_layernorm.weight"] = (width,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, width)
    shapes["mlp.down_proj.weight"] = (width, inner)
    if config.output_norms:
        shapes["mlp_output_norm.weight"] = (width,)
    return shapes
