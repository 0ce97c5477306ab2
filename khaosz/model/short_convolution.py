"""The gated short convolution of LFM2 (Liquid AI 2025, arXiv:2511.23404).

Shapes: ... leading dimensions, D hidden width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.part import Attend, Linear, Rotations
from khaosz.model.recurrent import CausalConvolution, Recurrent, State


class ShortConvolution(Recurrent):
    """c * convolution(b * x), where b, c and x are three products of the input."""

    IN, OUT = ("in_proj",), ("out_proj",)
    PRODUCTS: ClassVar = (IN, OUT)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.state_shapes = layer, config.state_shapes(layer)
        width, [(past, _)] = config.hidden_size, self.state_shapes
        self.conv = CausalConvolution(width, past + 1)
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotations: Rotations, attend: Attend, linear: Linear) -> Tensor:
        before, after, inputs = linear(self, self.IN, x)[0].chunk(3, dim=-1)
        mixed = after * attend(self, before * inputs).to(after.dtype)  # (..., D)
        return linear(self, self.OUT, mixed)[0]

    def scan(
        self, inputs: tuple[Tensor, ...], state: State, documents: Tensor | None = None
    ) -> tuple[Tensor, State]:
        [x], [past] = inputs, state
        with torch.autocast(x.device.type, enabled=False):
            mixed, past = self.conv.forward(x.float(), past, documents)
        return mixed, (past,)

    def initialise(self, generator: torch.Generator) -> None:
        self.conv.initialise(generator)
