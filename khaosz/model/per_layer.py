"""An embedding of each token for each layer, as Gemma 4 has (and Gemma 3n before).

Shapes: ... leading dimensions, D hidden width, L layers, P width of the embedding of a layer.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.part import ACTIVATIONS, Linear, Part, RMSNorm


class PerLayerInputs(Part):
    """What tokens are in each layer beside the residual stream (..., L, P): rows of a second
    embedding, and a projection of the first."""

    PROJECTION = ("projection",)
    PRODUCTS: ClassVar = (PROJECTION,)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = config.num_hidden_layers  # after the blocks
        self.width = config.hidden_size_per_layer_input
        outputs = config.num_hidden_layers * self.width
        self.projection = nn.Linear(config.hidden_size, outputs, bias=False)
        self.norm = RMSNorm(self.width, config.rms_norm_eps)

    def forward(self, x: Tensor, rows: Tensor, linear: Linear) -> Tensor:
        """x (..., D) and rows (..., L * P) of the two embeddings."""
        shape = (*x.shape[:-1], -1, self.width)
        projected = linear(self, self.PROJECTION, x)[0] * x.shape[-1] ** -0.5
        normed = self.norm.forward(projected.view(shape))
        return (normed + rows.view(shape) * self.width**0.5) * 2**-0.5


class PerLayerInput(Part):
    """P inputs of a layer, gated by the residual stream, into the stream."""

    GATE, OUT = ("gate",), ("projection",)
    PRODUCTS: ClassVar = (GATE, OUT)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[config.hidden_act]
        width, each = config.hidden_size, config.hidden_size_per_layer_input
        self.gate = nn.Linear(width, each, bias=False)
        self.projection = nn.Linear(each, width, bias=False)

    def forward(self, x: Tensor, embedded: Tensor, linear: Linear) -> Tensor:
        gate = self.activation(linear(self, self.GATE, x)[0])
        return linear(self, self.OUT, gate * embedded[..., self.layer, :])[0]


class Scale(nn.Module):
    """A learned number that all of its input is multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight
