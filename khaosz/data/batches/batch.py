"""The batch of a training step: four integer tensors of the same shape.

Legend: B rows, T positions (the window).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

IGNORE = -100
"""The label of positions that are not scored; torch's default for `ignore_index`."""

SHAPE_STEP = 64
"""Rows, and scored tokens, are padded to a multiple of this. In bf16 oneDNN generates and keeps a
kernel of about 1 MB for each new shape of a matrix product, 1,024 kernels at most: with any number
of tokens a run takes 1 GB more after a hundred steps."""


def padded(count: int) -> int:
    return count + -count % SHAPE_STEP


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows with their targets. All tensors are int64 of shape (B, T).

    ids        input tokens; cells after the last piece of a row hold the pad token
    labels     already shifted: `labels[b, t]` is the target of position t, -100 = not scored
    positions  restart at 0 with every piece of a document (and in the padding)
    doc_ids    number the pieces of a row 0, 1, 2, ...; -1 in the padding. A position attends to
               earlier positions of equal `doc_ids` only; padding attends to padding, so that no
               row of the attention matrix is ever fully masked.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    doc_ids: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(t.shape) for t in (self.ids, self.labels, self.positions, self.doc_ids)}
        assert len(shapes) == 1 and self.ids.ndim == 2, f"four (B, T) tensors, got {shapes}"

    @cached_property
    def tokens(self) -> int:
        """Number of scored labels: what a loss summed over the batch is divided by."""
        return int((self.labels != IGNORE).sum().item())

    def to(self, device: torch.device | str) -> Self:
        """The same batch on `device`; counts `tokens` here, without waiting for `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return self._replaced(**{name: value.to(device) for name, value in tensors.items()})

    def _replaced(self, **changes: Any) -> Self:
        """A copy with `changes` that keeps the count of `tokens`."""
        copy = replace(self, **changes)
        copy.__dict__["tokens"] = self.tokens
        return copy
