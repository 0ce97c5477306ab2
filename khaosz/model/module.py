"""The parts of the network, for training and inference alike.

A block is given what differs between the two: `attend`, attention over packed rows or over
sequences' caches, and `linear`, how its linear layers multiply.

Shapes: ... leading dimensions ((B, T) in training, (N,) new positions in the engine), D hidden
width, Q query heads, K key/value heads, H head width, F feed-forward width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig, RopeScaling

# (layer, queries (..., Q, H), keys (..., K, H), values (..., K, H)) -> (..., Q, H)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# (part, names of its linear layers, their input) -> their outputs
Linear = Callable[["Attention | MLP", tuple[str, ...], Tensor], Sequence[Tensor]]


def linear(part: Attention | MLP, names: tuple[str, ...], x: Tensor) -> Sequence[Tensor]:
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


class Rotary(nn.Module):
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with scaling."""

    inverse_frequency: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.amplitude = rotary_frequencies(config)
        # Not saved: it follows from the configuration.
        self.register_buffer("inverse_frequency", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (...) -> cosines and signed sines (..., 1, H) for `rotate`, fp32."""
        angles = positions[..., None, None].float() * self.inverse_frequency
        cos, sin = angles.cos() * self.amplitude, angles.sin() * self.amplitude
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (H / 2,) and the factor on cosines and sines.

    Formulas: the papers named in `RopeScaling`, with transformers' rounding.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    inverse = 1.0 / (config.rope_theta ** (half / config.head_dim))
    match config.rope_scaling:
        case None:
            return inverse, 1.0
        case RopeScaling(rope_type="linear", factor=factor):
            return inverse / factor, 1.0
        case RopeScaling(rope_type="llama3") as scaling:
            return _llama3(inverse, scaling), 1.0
        case scaling:
            return _yarn(inverse, scaling, config)


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    original = scaling.original_max_position_embeddings
    assert original is not None
    turns = original * inverse / (2 * math.pi)  # rotations within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inverse + (1 - keep) * inverse / scaling.factor


def _yarn(inverse: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    width, theta = config.head_dim, config.rope_theta

    def dimension(rotations: float) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = (high - low) or 0.001
    interpolate = ((torch.arange(width // 2).float() - low) / span).clamp(0, 1)
    amplitude = scaling.attention_factor
    if amplitude is None:
        amplitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return interpolate * inverse / scaling.factor + (1 - interpolate) * inverse, amplitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + H/2) of x (..., H), the half-split layout of Hugging Face; the first
    half of `sin` is negative."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional QK-norm or QKV bias."""

    QKV, OUT = ("q_proj", "k_proj", "v_proj"), ("o_proj",)
    PRODUCTS: ClassVar = (QKV, OUT)  # linear layers with one input, which an engine may fuse

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.heads = [config.num_attention_heads, config.num_key_value_heads]
        width, bias = config.hidden_size, config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, width, bias=False)
        # QK-norm: per head, weighted, before the rotation.
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, linear: Linear
    ) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        queries, keys, values = linear(self, self.QKV, x)
        queries, keys = queries.view(shape), keys.view(shape)
        rotated = rotate(self._joined(queries, keys), cos, sin)
        queries, keys = rotated.split_with_sizes(self.heads, dim=-2)
        mixed = attend(self.layer, queries, keys, values.view(shape))  # (..., Q, H)
        return linear(self, self.OUT, mixed.flatten(-2))[0]

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


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    GATE_UP, DOWN = ("gate_proj", "up_proj"), ("down_proj",)
    PRODUCTS: ClassVar = (GATE_UP, DOWN)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        gate, up = linear(self, self.GATE_UP, x)
        return linear(self, self.DOWN, F.silu(gate) * up)[0]


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, layer)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, linear: Linear = linear
    ) -> Tensor:
        # `forward` skips the checks for hooks: 2 % of the decoding of a small model.
        normed = self.input_layernorm.forward(x)
        x = x + self.self_attn.forward(normed, cos, sin, attend, linear)
        return x + self.mlp.forward(self.post_attention_layernorm.forward(x), linear)


def block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
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
    shapes["post_attention_layernorm.weight"] = (width,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, width)
    shapes["mlp.down_proj.weight"] = (width, inner)
    return shapes
