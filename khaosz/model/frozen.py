"""Layers over matrices that are stored in few bits and are not trained: what adapters stand on.

A matrix is dequantised for the product and again for its backward pass, so that memory is that of
the stored bits. Shapes: I inputs, O outputs, V vocabulary, D hidden width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StoredMatrix(Protocol):
    """A matrix in the format of a file."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop`, dequantised."""
        ...

    def for_product(self, dtype: torch.dtype) -> Tensor:
        """All rows, dequantised, until the next call for any matrix of the model."""
        ...

    def rows(self, ids: Tensor) -> Tensor:
        """fp32 (N, columns) of the rows `ids` (N,)."""
        ...


class FrozenLinear(nn.Module):
    """`nn.Linear` over a stored matrix (O, I)."""

    def __init__(self, matrix: StoredMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.matrix, self.bias = matrix, bias
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Tensor:
        """fp32 (O, I), dequantised at every access."""
        return self.matrix.dense(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the type of autocast or of x."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y: Tensor = _Product.apply(x, self.matrix)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FrozenEmbedding(nn.Module):
    """`nn.Embedding` over a stored matrix (V, D)."""

    def __init__(self, matrix: StoredMatrix) -> None:
        super().__init__()
        self.matrix = matrix

    @property
    def weight(self) -> Tensor:
        """fp32 (V, D), dequantised at every access."""
        return self.matrix.dense(torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> fp32 (..., D)."""
        unique, places = ids.unique(return_inverse=True)
        return self.matrix.rows(unique)[places]


class _Product(torch.autograd.Function):
    """x W^T. Autograd would keep every dequantised W for backward; this dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: StoredMatrix) -> Tensor:
        ctx.matrix = matrix
        return F.linear(x, matrix.for_product(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.matrix.for_product(gradient.dtype), None
