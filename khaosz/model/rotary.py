"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with scaling.

Shapes: ... leading dimensions, H head width, R rotated width of a head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig, RopeScaling


class Rotation(NamedTuple):
    """Cosines and signed sines (..., 1, R) of positions, fp32, and what their queries are
    multiplied by (..., 1, 1)."""

    cos: Tensor
    sin: Tensor
    scale: Tensor | None = None

    def at(self, index: slice | Tensor) -> Rotation:
        """Those of some positions of a table."""
        scale = None if self.scale is None else self.scale[index]
        return Rotation(self.cos[index], self.sin[index], scale)


class Rotary(nn.Module):
    """The rotations of a model: `ModelConfig.rotary_kind` says which of them a layer uses."""

    inverse_frequency: Tensor
    local_inverse_frequency: Tensor
    long_inverse_frequency: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        frequencies, self.amplitude = rotary_frequencies(config)
        self.interleaved, self.query_scaling = config.rope_interleaved, config.query_scaling
        scaling = config.rope_scaling
        self.original = None if scaling is None else scaling.original_max_position_embeddings
        # Not saved: they follow from the configuration.
        self.register_buffer("inverse_frequency", frequencies, persistent=False)
        self.border = config.rope_border
        if self.border is not None:
            long, _ = rotary_frequencies(config, long=True)
            self.register_buffer("long_inverse_frequency", long, persistent=False)
        self.local = config.rope_local_theta is not None
        if config.rope_local_theta is not None:
            local = inverse_frequencies(
                int(config.head_dim * config.partial_rotary_factor), config.rope_local_theta
            )
            self.register_buffer("local_inverse_frequency", local, persistent=False)

    def forward(self, positions: Tensor, long: bool | None = None) -> tuple[Rotation, ...]:
        """The rotations of positions (...), for `rotate`. `long`: whether their sequences pass
        `rope_border`, by default whether one of them does."""
        frequency = self.inverse_frequency
        if self.border is not None:
            if long is None:
                long = int(positions.max()) >= self.border
            frequency = self.long_inverse_frequency if long else frequency
        wide = positions[..., None, None].float()
        scale = None
        if self.query_scaling:  # Ministral 3, as Llama 4: longer contexts, sharper attention
            assert self.original is not None
            steps = torch.floor(wide / self.original)
            scale = 1 + self.query_scaling * torch.log(1 + steps)
        main = self._rotation(wide, frequency, self.amplitude, scale)
        if not self.local:
            return (main,)
        return main, self._rotation(wide, self.local_inverse_frequency, 1.0, scale)

    def _rotation(
        self, positions: Tensor, frequency: Tensor, amplitude: float, scale: Tensor | None
    ) -> Rotation:
        angles = positions * frequency
        cos, sin = angles.cos() * amplitude, angles.sin() * amplitude
        if self.interleaved:
            cos, sin = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
            return Rotation(cos.flatten(-2), sin.flatten(-2), scale)
        return Rotation(torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1), scale)


def rotate(x: Tensor, rotation: Rotation, interleaved: bool = False) -> Tensor:
    """Rotate pairs of x (..., H): (i, i + R/2), the half-split layout of Hugging Face, or, in
    models that are `interleaved`, (i, i + 1). Elements from R on stay."""
    cos, sin = rotation.cos, rotation.sin
    width = cos.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], rotation, interleaved)
        return torch.cat((turned, x[..., width:]), dim=-1)
    other = x.roll(width // 2, -1)
    if interleaved:
        other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x * cos + other * sin).to(x.dtype)


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """Angle per position of each pair of R rotated elements, (R / 2,)."""
    half = torch.arange(0, width, 2, dtype=torch.int64).float()
    return 1.0 / (theta ** (half / width))


def rotary_frequencies(config: ModelConfig, *, long: bool = False) -> tuple[Tensor, float]:
    """Inverse frequencies (R / 2,) and the factor on cosines and sines; `long`: those of sequences
    beyond `rope_border`.

    Formulas: the papers named in `RopeScaling`, with transformers' rounding.
    """
    inverse = inverse_frequencies(config.rotary_dim, config.rope_theta)
    match config.rope_scaling:
        case None:
            return inverse, 1.0
        case RopeScaling(rope_type="linear", factor=factor):
            return inverse / factor, 1.0
        case RopeScaling(rope_type="llama3") as scaling:
            return _llama3(inverse, scaling), 1.0
        case RopeScaling(rope_type="longrope") as scaling:
            return _longrope(inverse, scaling, long)
        case RopeScaling(rope_type="proportional") as scaling:
            rotated = int(scaling.proportion * config.rotary_dim // 2)
            still = torch.arange(len(inverse)) >= rotated
            return inverse.masked_fill(still, 0.0) / scaling.factor, 1.0
        case scaling:
            return _yarn(inverse, scaling, config)


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    original = scaling.original_max_position_embeddings
    assert original is not None
    turns = original * inverse / (2 * math.pi)  # rotations within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inverse + (1 - keep) * inverse / scaling.factor


def _longrope(inverse: Tensor, scaling: RopeScaling, long: bool) -> tuple[Tensor, float]:
    original, amplitude = scaling.original_max_position_embeddings, scaling.attention_factor
    assert original is not None
    if amplitude is None:
        amplitude = math.sqrt(1 + math.log(scaling.factor) / math.log(original))
    return inverse / torch.tensor(scaling.long_factor if long else scaling.short_factor), amplitude


def _yarn(inverse: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    original = scaling.original_max_position_embeddings or config.max_position_embeddings
    width, theta = config.rotary_dim, config.rope_theta

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
