"""Parts whose past is a state of fixed size, where attention has keys and values.

Shapes: B rows, T positions, C channels, W width of a convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from khaosz.model.part import Part

State = tuple[Tensor, ...]  # fp32, of B rows


class Recurrent(Part):
    """`forward` hands what it makes of each position to `attend`, which calls `scan` with the state
    of a sequence: `ModelConfig.state_shapes` of it."""

    state_shapes: tuple[tuple[int, ...], ...]  # of one row

    def new_state(self, rows: int, device: torch.device) -> State:
        """The state before the first position."""
        return tuple(torch.zeros(rows, *shape, device=device) for shape in self.state_shapes)

    def scan(
        self, inputs: tuple[Tensor, ...], state: State, documents: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Outputs of T positions, from inputs (B, T, ...), and the state after them. `documents`
        (B, T) resets the state where it changes: no position sees one of another document. Without
        gradients the state of one position may be written in place."""
        raise NotImplementedError

    def initialise(self, generator: torch.Generator) -> None:
        """Fresh parameters that are not those of linear layers or norms."""


class CausalConvolution(nn.Module):
    """Each channel convolved with its own last W positions: weight (C, 1, W), the latest last."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(
        self, x: Tensor, past: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, C) after `past` (B, W - 1, C): outputs (B, T, C), and the next `past`."""
        taps = self.weight[:, 0].T  # (W, C)
        length, width = x.shape[1], len(taps)
        whole = torch.cat((past, x), dim=1)
        if length == 1:
            return (whole * taps).sum(1, keepdim=True), whole[:, 1:]
        y = x * taps[-1]
        for back in range(1, width):
            part = whole[:, width - 1 - back : width - 1 - back + length]
            if documents is not None:
                same = documents[:, back:] == documents[:, :-back]
                # Positions before the first belong to no document.
                same = torch.cat((same.new_zeros(len(same), min(back, length)), same), dim=1)
                part = part * same[..., None]
            y = torch.addcmul(y, part, taps[-1 - back])
        return y, whole[:, length:].clone()

    def initialise(self, generator: torch.Generator) -> None:
        bound = self.weight.shape[-1] ** -0.5
        self.weight.uniform_(-bound, bound, generator=generator)
