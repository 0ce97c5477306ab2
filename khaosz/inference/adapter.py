"""LoRA beside a runner's weights: sequences of one pass may each have another adapter, or none.

The base's products are computed once for all rows, in any weight format; each adapter
adds its own low-rank update to the rows of its sequences (as S-LoRA does, Sheng et al. 2023,
arXiv:2311.03285). Shapes: N rows, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.interop.adapter import read_adapter
from khaosz.model.lora import scale_of
from khaosz.model.part import Linear, Part


class Adapter:
    """One adapter's A (r, I) and scaled B (O, r), by layer and linear layer."""

    def __init__(
        self,
        config: ModelConfig,
        directory: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises `ModelError` as `read_adapter` does."""
        lora, tensors = read_adapter(config, directory)
        scale = scale_of(lora)
        self._updates: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
        for path in (name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")):
            _, index, _, name = path.split(".", 3)  # layers.INDEX.part.name
            a, b = (tensors[f"{path}.{which}"].float() for which in ("lora_A", "lora_B"))
            self._updates[int(index), name] = a.to(device, dtype), (scale * b).to(device, dtype)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self._updates.values())

    def add(self, layer: int, name: str, x: Tensor, y: Tensor) -> None:
        """Add to the outputs y (N, O) of a linear layer for x (N, I), in place."""
        if (layer, name) in self._updates:
            a, b = self._updates[layer, name]
            y += ((x.to(a.dtype) @ a.T) @ b.T).to(y.dtype)


Spans = Sequence[tuple[Adapter, slice]]


def adapted(linear: Linear, spans: Spans) -> Linear:
    """`linear` of all rows, with what each adapter adds to its own rows."""
    if not spans:
        return linear

    def both(
        part: Part, names: tuple[str, ...], x: Tensor, rows: Tensor | None = None
    ) -> Sequence[Tensor]:
        outputs = linear(part, names, x, rows)
        for adapter, span in spans:
            if rows is not None:  # those of the span among the rows that are here
                ends = torch.tensor([span.start, span.stop], device=rows.device)
                span = slice(*torch.searchsorted(rows, ends).tolist())
            for name, y in zip(names, outputs, strict=True):
                adapter.add(part.layer, name, x[span], y[span])
        return outputs

    return both
