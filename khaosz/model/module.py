"""The parts of the network, for training and inference alike.

A block is given what differs between the two: `attend`, which mixes positions of packed rows or of
sequences with caches, and `linear`, how its linear layers multiply.

Shapes: ... leading dimensions ((B, T) in training, (N,) new positions in the engine), D hidden
width, Q query heads, K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.delta_net import GatedDeltaNet
from khaosz.model.mixture import Mixture
from khaosz.model.part import ACTIVATIONS, Attend, Linear, Part, RMSNorm, Rotations, linear
from khaosz.model.per_layer import PerLayerInput, Scale
from khaosz.model.recurrent import Recurrent
from khaosz.model.rotary import rotate
from khaosz.model.short_convolution import ShortConvolution


class Attention(Part):
    """Grouped-query attention with rotary positions and optional QK-norm, QKV bias or output gate.

    window    positions that are seen, the query's own included; None for all
    scale     what scores are multiplied by; None for H ** -0.5
    source    the layer whose keys and values are read: its own, or an earlier one; `is_source` of
              one that a later layer reads
    """

    QKV, OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
    PRODUCTS: ClassVar = (QKV, OUT)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_width(layer)
        self.source = config.kv_layer(layer)
        later = range(layer + 1, config.num_hidden_layers)
        self.is_source = any(config.kv_layer(other) == layer for other in later)
        self.window, self.scale = config.window(layer), config.attention_multiplier
        self.rotary, self.interleaved = config.rotary_kind(layer), config.rope_interleaved
        self.norm_last = config.qk_norm_after_rotary
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        width, bias, shared = config.hidden_size, config.qkv_bias, self.source != layer
        self.heads = [config.num_attention_heads, *([] if shared else [config.num_key_value_heads])]
        # With a gate, of each head the rows of its query, then those of its gate (Qwen3.5).
        self.gated = config.attn_output_gate
        self.q_proj = nn.Linear(width, queries * (2 if self.gated else 1), bias=bias)
        self.k_proj = None if shared else nn.Linear(width, keys, bias=bias)
        self.v_proj = None if shared else nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        # QK-norm: per head, weighted, before the rotation or after it.
        eps, norm = config.rms_norm_eps, config.qk_norm
        self.q_norm = RMSNorm(self.head_dim, eps) if norm else None
        self.k_norm = RMSNorm(self.head_dim, eps) if norm and not shared else None
        self.value_eps = eps if config.value_norm else None

    def products(self) -> tuple[tuple[str, ...], ...]:
        return self.PRODUCTS if self.source == self.layer else (self.QKV[:1], self.OUT)

    def forward(self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, *stored = (y.view(shape) for y in linear(self, self.products()[0], x))
        if self.gated:
            queries, gate = queries.unflatten(-2, (-1, 2)).unbind(-2)
        queries, *keys = self._positioned([queries, *stored[:1]], rotations)
        values = stored[1:]
        if self.value_eps is not None:
            norm = partial(F.rms_norm, normalized_shape=(self.head_dim,), eps=self.value_eps)
            values = [norm(y.float()).to(y.dtype) for y in values]
        mixed = attend(self, queries, *keys, *values)  # (..., Q, H)
        if self.gated:
            mixed = mixed * gate.sigmoid()
        return linear(self, self.OUT, mixed.flatten(-2))[0]

    def _positioned(self, heads: Sequence[Tensor], rotations: Rotations) -> Sequence[Tensor]:
        """Queries, and keys where there are some, normalised and rotated as the layer does."""
        if self.rotary is None:
            return self._joined(heads).split_with_sizes(self.heads, dim=-2)
        rotation = rotations[self.rotary]
        if self.norm_last:
            rotated = rotate(torch.cat(list(heads), dim=-2), rotation, self.interleaved)
            rotated = self._joined(rotated.split_with_sizes(self.heads, dim=-2))
        else:
            rotated = rotate(self._joined(heads), rotation, self.interleaved)
        queries, *keys = rotated.split_with_sizes(self.heads, dim=-2)
        if rotation.scale is not None:
            queries = queries * rotation.scale.to(queries.dtype)
        return [queries, *keys]

    def _joined(self, heads: Sequence[Tensor]) -> Tensor:
        """Queries and keys side by side (..., Q + K, H), normalised where the model does so."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if not norms:
            return torch.cat(list(heads), dim=-2)
        if heads[0].dtype == torch.float32:
            each = zip(norms, heads, strict=True)
            return torch.cat([norm.forward(x) for norm, x in each], dim=-2)
        # One norm without weights, then theirs: the same bits, and 1 to 2 % of a small model's
        # decoding in bf16.
        weights = [norm.weight.expand(n, -1) for norm, n in zip(norms, self.heads, strict=True)]
        both = torch.cat(list(heads), dim=-2)
        both = F.rms_norm(both, (self.head_dim,), None, norms[0].eps).to(both.dtype)
        return torch.cat(weights) * both


class MLP(Part):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202), or with another activation."""

    GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
    PRODUCTS: ClassVar = (GATE_UP, DOWN)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[config.hidden_act]
        width, inner = config.hidden_size, config.feed_forward_width(layer)
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

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
    stream (pre-norm). With `output_norms` what they add is normalised too, as Gemma 3 does. Gemma 4
    adds an embedding of the token for each layer, and scales the stream."""

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
        self.mlp = (Mixture if config.has_experts(layer) else MLP)(config, layer)
        self.mlp_output_norm = RMSNorm(width, eps) if config.output_norms else None
        self.per_layer_input = self.per_layer_norm = None
        if config.hidden_size_per_layer_input:
            self.per_layer_input = PerLayerInput(config, layer)
            self.per_layer_norm = RMSNorm(width, eps)
        self.layer_scalar = Scale() if config.layer_scalar else None

    def forward(
        self,
        x: Tensor,
        rotations: Rotations,
        attend: Attend,
        linear: Linear = linear,
        embedded: Tensor | None = None,
    ) -> Tensor:
        """`embedded`: (..., L, P), what `PerLayerInputs` has for all layers."""
        # `forward` skips the checks for hooks: 2 % of the decoding of a small model.
        normed = self.input_layernorm.forward(x)
        mixed = self.mixer.forward(normed, rotations, attend, linear)
        x = x + self._scaled(mixed, self.attention_output_norm)
        fed = self.mlp.forward(self.post_attention_layernorm.forward(x), linear)
        x = x + self._scaled(fed, self.mlp_output_norm)
        if self.per_layer_input is not None and embedded is not None:
            added = self.per_layer_input.forward(x, embedded, linear)
            x = x + self._scaled(added, self.per_layer_norm)
        return x if self.layer_scalar is None else self.layer_scalar.forward(x)

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
    width, inner = config.hidden_size, config.feed_forward_width(layer)
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (width,)}
    match config.layer_type(layer):
        case "linear_attention":
            shapes |= _delta_net_shapes(config, layer)
        case "conv":
            shapes["conv.conv.weight"] = (width, 1, config.conv_L_cache or 0)
            shapes["conv.in_proj.weight"] = (3 * width, width)
            shapes["conv.out_proj.weight"] = (width, width)
        case _:
            shapes |= _attention_shapes(config, layer)
    if config.output_norms:
        shapes["attention_output_norm.weight"] = (width,)
    shapes["post_attention_layernorm.weight"] = (width,)
    prefixes = ["mlp."]
    if config.has_experts(layer):
        count = config.num_experts or 0
        shapes["mlp.gate.weight"] = (count, width)
        prefixes = [f"mlp.experts.{i}." for i in range(count)]
    for prefix in prefixes:
        shapes[f"{prefix}gate_proj.weight"] = shapes[f"{prefix}up_proj.weight"] = (inner, width)
        shapes[f"{prefix}down_proj.weight"] = (width, inner)
    if config.output_norms:
        shapes["mlp_output_norm.weight"] = (width,)
    if each := config.hidden_size_per_layer_input:
        shapes["per_layer_input.gate.weight"] = (each, width)
        shapes["per_layer_input.projection.weight"] = (width, each)
        shapes["per_layer_norm.weight"] = (width,)
    if config.layer_scalar:
        shapes["layer_scalar.weight"] = (1,)
    return shapes


def _attention_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    width, head, shared = (
        config.hidden_size,
        config.head_width(layer),
        config.kv_layer(layer) != layer,
    )
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes: dict[str, tuple[int, ...]] = {}
    gated = queries * (2 if config.attn_output_gate else 1)
    for part, rows in (("q", gated), ("k", keys), ("v", keys))[: 1 if shared else 3]:
        shapes[f"self_attn.{part}_proj.weight"] = (rows, width)
        if config.qkv_bias:
            shapes[f"self_attn.{part}_proj.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (width, queries)
    for part in ("q", "k")[: 1 if shared else 2] if config.qk_norm else ():
        shapes[f"self_attn.{part}_norm.weight"] = (head,)
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
