"""The parts of the Transformer.

Shapes: B rows, T positions, D hidden width, N query heads, K key/value heads, H head width,
F feed-forward width, S cached plus new positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig, RopeScaling
from khaosz.model.cache import KVCache


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class Rotary(nn.Module):
    """Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), scaling honoured."""

    inverse_frequency: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.amplitude = rotary_frequencies(config)
        # Not saved: it follows from the configuration.
        self.register_buffer("inverse_frequency", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (B, T) -> cosines and sines (B, 1, T, H), fp32."""
        angles = positions[:, None, :, None].float() * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (H / 2,) and the factor on cosines and sines.

    The formulas are those of the papers named at `RopeScaling`, with transformers' rounding.
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
    """Rotate pairs (i, i + H/2) of x (B, N, T, H), the half-split layout of Hugging Face."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional QK-norm or QKV bias."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = config.hidden_size, config.qkv_bias
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        # Qwen3's QK-norm: per head, weighted, before the rotation.
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        rows, length, _ = x.shape
        queries = self.q_proj(x).view(rows, length, self.heads, self.head_dim)
        keys = self.k_proj(x).view(rows, length, self.kv_heads, self.head_dim)
        values = self.v_proj(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries = rotate(queries.transpose(1, 2), cos, sin)  # (B, N, T, H)
        keys = rotate(keys.transpose(1, 2), cos, sin)  # (B, K, T, H)
        if cache is not None:
            keys, values = cache.append(self.layer, keys, values)  # (B, K, S, H)
        if self.heads != self.kv_heads:
            keys = keys.repeat_interleave(self.heads // self.kv_heads, dim=1)
            values = values.repeat_interleave(self.heads // self.kv_heads, dim=1)
        # Without a mask a row is one document from its first position on, or one new position.
        causal = mask is None and length > 1
        mixed = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=causal)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, self.heads * self.head_dim))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream (pre-norm)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
