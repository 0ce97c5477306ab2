"""LoRA beside a runner's weights: sequences of one pass may each have another adapter, or none.

The base's products are made once for all rows, whatever the weights are stored as; each adapter
adds its own low-rank update to the rows of its sequences (as S-LoRA does, Sheng et al. 2023,
arXiv:2311.03285). Shapes: N rows, I inputs, O outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from khaosz.config import ModelConfig
from khaosz.interop.adapter import read_adapter
from khaosz.model.lora import scale_of

Product = Literal["qkv", "o", "gate_up", "down"]


@dataclass(frozen=True)
class Update:
    """Scaled B after A, for outputs from `start` on of a product of several matrices."""

    a: Tensor  # (r, I)
    b: Tensor  # (O, r)
    start: int


class Adapter:
    """The updates of one adapter, by layer and product."""

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
        heads = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        # Where a matrix's outputs begin among those of the product that it is a part of.
        places: dict[str, tuple[Product, int]] = {
            "q_proj": ("qkv", 0),
            "k_proj": ("qkv", heads),
            "v_proj": ("qkv", heads + keys),
            "o_proj": ("o", 0),
            "gate_proj": ("gate_up", 0),
            "up_proj": ("gate_up", config.intermediate_size),
            "down_proj": ("down", 0),
        }
        self._updates: dict[tuple[int, Product], list[Update]] = {}
        for name in (name for name in tensors if name.endswith(".lora_A")):
            layer = name.removesuffix(".lora_A")
            product, start = places[layer.rpartition(".")[2]]
            index = int(layer.split(".")[1])  # layers.INDEX.part.matrix
            a, b = (tensors[f"{layer}.{which}"].float() for which in ("lora_A", "lora_B"))
            update = Update(a.to(device, dtype), (scale * b).to(device, dtype), start)
            self._updates.setdefault((index, product), []).append(update)

    @property
    def nbytes(self) -> int:
        updates = (update for some in self._updates.values() for update in some)
        return sum(update.a.nbytes + update.b.nbytes for update in updates)

    def add(self, index: int, product: Product, x: Tensor, y: Tensor) -> None:
        """To the outputs y (N, O) of the base for x (N, I), in place."""
        for update in self._updates.get((index, product), ()):
            outputs = slice(update.start, update.start + len(update.b))
            delta = (x.to(update.a.dtype) @ update.a.T) @ update.b.T
            y[:, outputs] += delta.to(y.dtype)


Spans = Sequence[tuple[Adapter, slice]]


def adapted(spans: Spans, index: int, product: Product, x: Tensor, y: Tensor) -> Tensor:
    """The base's outputs y for all rows x, with what each adapter adds to its rows, in place."""
    for adapter, rows in spans:
        adapter.add(index, product, x[rows], y[rows])
    return y
