"""The parts of the network, for training and inference alike.

A block is given what differs between the two: `attend`, which mixes positions of packed rows or of
sequences with caches, and `linear`, how its linear layers multiply.

Shapes: ... leading dimensions ((B, T) in training, (N,) new positions in the engine), D hidden
width, Q query heads, K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.delta_net import GatedDeltaNet
from khaosz.model.part import Attend, Linear, Part, RMSNorm, Rotations, linear
from khaosz.model.recurrent import Recurrent
from khaosz.model.rotary import rotate
from khaosz.model.short_convolution import ShortConvolution

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Attention(Part):
    """Grouped-query attention with rotary positions and optional QK-norm, QKV bias or output gate.

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
        # With a gate, of each head the rows of its query, then those of its gate (Qwen3.5).
        self.gated = config.attn_output_gate
        self.q_proj = nn.Linear(width, queries * (2 if self.gated else 1), bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        # QK-norm: per head, weighted, before the rotation or after it.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, keys, values = linear(self, self.QKV, x)
        queries = queries.view(shape)
        if self.gated:
            queries, gate = queries.unflatten(-2, (-1, 2)).unbind(-2)
        queries, keys = self._positioned(queries, keys.view(shape), rotations)
        mixed = attend(self, queries, keys, values.view(shape))  # (..., Q, H)
        if self.gated:
            mixed = mixed * gate.sigmoid()
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


# What mixes positions in layers without attention, and its name there.
_MIXERS: dict[str, tuple[str, type[Recurrent]]] = {
    "linear_attention": ("linear_attn", GatedDeltaNet),
    "conv": ("conv", ShortConvolution),
}


class Block(nn.Module):
    """Attention, or what the layer has instead, and feed-forward, each on the normalised residual
    stream (pre-norm). With `output_norms` what they add is normalised too, as Gemma 3 does."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(width, eps)
        name, kind = _MIXERS.get(config.layer_type(layer), ("self_attn", Attention))
        self.mixer_name = name
        self.add_module(name, kind(config, layer))
        self.attention_output_norm = RMSNorm(width, eps) if config.output_norms else None
        self.post_attention_layernorm = RMSNorm(width, eps)
        self.mlp = MLP(config, layer)
        self.mlp_output_norm = RMSNorm(width, eps) if config.output_norms else None

    def forward(
        self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear = linear
    ) -> Tensor:
        # `forward` skips the checks for hooks: 2 % of the decoding of a small model.
        normed = self.input_layernorm.forward(x)
        mixed = self.mixer.forward(normed, rotations, attend, linear)
        x = x + self._scaled(mixed, self.attention_output_norm)
        fed = self.mlp.forward(self.post_attention_layernorm.forward(x), linear)
        return x + self._scaled(fed, self.mlp_output_norm)

    @property
    def mixer(self) -> Attention | Recurrent:
        """What mixes positions."""
        part = self._modules[self.mixer_name]
        assert isinstance(part, Attention | Recurrent)
        return part

    def _scaled(self, y: Tensor, norm: RMSNorm | None) -> Tensor:
        """What is added to the residual stream."""
        y = y if norm is None else norm.forward(y)
        return y if self.multiplier == 1.0 else y * self.multiplier


def block_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's parameters, in their order."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    match config.layer_type(layer):
        case "linear_attention":
            shapes |= _delta_net_shapes(config, layer)
        case "conv":
            shapes["conv.conv.weight"] = (width, 1, config.conv_L_cache or 0)
            shapes["conv.in_proj.weight"] = (3 * width, width)
            shapes["conv.out_proj.weight"] = (width, width)
        case _:
            shapes |= _attention_shapes(config)
    if config.output_norms:
        shapes["attention_output_norm.weight"] = (width,)
    shapes["post_attention_layernorm.weight"] = (width,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, width)
    shapes["mlp.down_proj.weight"] = (width, inner)
    if config.output_norms:
        shapes["mlp_output_norm.weight"] = (width,)
    return shapes


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    width, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {}
    gated = queries * (2 if config.attn_output_gate else 1)
    for part, rows in (("q", gated), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{part}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (width, queries)
    if config.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (head,)
    return shapes


def _delta_net_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    (past, channels), (heads, _, value_width) = config.state_shapes(layer)
    width, values = config.hidden_size, heads * value_width
    shapes: dict[str, tuple[int, ...]] = {
        "dt_bias": (heads,),
        "A_log": (heads,),
        "in_proj_qkv.weight": (channels, width),
        "in_proj_z.weight": (values, width),
        "in_proj_b.weight": (heads, width),
        "in_proj_a.weight": (heads, width),
        "conv1d.weight": (channels, 1, past + 1),
        "norm.weight": (value_width,),
        "out_proj.weight": (width, values),
    }
    return {f"linear_attn.{name}": shape for name, shape in shapes.items()}
