"""What all parts of a block have in common.

Shapes: ... leading dimensions ((B, T) in training, (N,) new positions in the engine), Q query
heads, K key/value heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.model.rotary import Rotation

Rotations = tuple[Rotation, ...]  # of a pass, by `ModelConfig.rotary_kind`


class Linear(Protocol):
    """The outputs of linear layers of a part, by their names, for the input that they share.
    `rows`: of which rows of the pass the input is, ascending, where it is not of all."""

    def __call__(
        self, part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None, /
    ) -> Sequence[Tensor]: ...


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class Attend(Protocol):
    """What mixes positions. For `Attention`: queries (..., Q, H), and keys and values (..., K, H)
    where the part does not read those of an earlier layer -> (..., Q, H). For a `Recurrent` part:
    its inputs (..., any shape) -> what its `scan` gives."""

    def __call__(self, part: Part, /, *tensors: Tensor) -> Tensor: ...


class Part(nn.Module):
    """Half a block, in a layer of its own number: what mixes positions, or the feed-forward.

    `PRODUCTS` names its linear layers, those with one input together, the one that writes to the
    residual stream last: an engine may fuse them, and computes them in a type and from a format of
    its own. Other parameters are read in fp32.
    """

    PRODUCTS: ClassVar[tuple[tuple[str, ...], ...]]
    layer: int

    def products(self) -> tuple[tuple[str, ...], ...]:
        """`PRODUCTS` that this part has."""
        return self.PRODUCTS

    def linear_layer(self, name: str) -> Any:
        """One of `products`: an `nn.Linear`, or what has taken its place."""
        return self.get_submodule(name) if "." in name else getattr(self, name)

    def writers(self) -> Sequence[str]:
        """The linear layers that write to the residual stream."""
        return self.products()[-1]


def linear(
    part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
) -> Sequence[Tensor]:
    """The outputs of a part's own linear layers: what training uses."""
    return [part.linear_layer(name)(x) for name in names]


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
