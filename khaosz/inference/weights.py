"""The weights a `Runner` multiplies with, whatever they are stored as.

Shapes: M rows, D hidden width, Q query heads, K key/value heads, H head width, F feed-forward
width, V vocabulary. A matrix is a function (M, in) -> (M, out) in the runner's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.model import Transformer
from khaosz.model.module import Block

Matrix = Callable[[Tensor], Tensor]


@dataclass
class LayerWeights:
    """One block. `qkv` gives queries, keys and values side by side: (M, (Q + 2K) * H);
    `gate_up` gate and up: (M, 2F)."""

    input_norm: Tensor  # (D,)
    qkv: Matrix
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # (H,)
    k_norm: Tensor | None
    o: Matrix
    post_norm: Tensor
    gate_up: Matrix
    down: Matrix


@dataclass
class Weights:
    """`embed` gives fp32 rows (M, D) of token ids; the residual stream stays in fp32."""

    embed: Callable[[Sequence[int]], Tensor]
    layers: Callable[[], Iterable[LayerWeights]]
    norm: Tensor
    head: Matrix


def live_weights(model: Transformer, dtype: torch.dtype) -> Weights:
    """Views of a module's parameters as they are now; cast to `dtype` where they are used."""
    table = model.embed_tokens.weight

    def embed(ids: Sequence[int]) -> Tensor:
        return table[torch.tensor(ids, device=table.device)].float()

    def matrix(*parts: nn.Linear) -> Matrix:
        def product(x: Tensor) -> Tensor:
            outs = [F.linear(x, part.weight.to(dtype)) for part in parts]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

        return product

    def layer(block: Block) -> LayerWeights:
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        biases = [part.bias for part in projections if part.bias is not None]
        return LayerWeights(
            input_norm=block.input_layernorm.weight,
            qkv=matrix(*projections),
            qkv_bias=torch.cat(biases).to(dtype) if biases else None,
            q_norm=None if attention.q_norm is None else attention.q_norm.weight,
            k_norm=None if attention.k_norm is None else attention.k_norm.weight,
            o=matrix(attention.o_proj),
            post_norm=block.post_attention_layernorm.weight,
            gate_up=matrix(mlp.gate_proj, mlp.up_proj),
            down=matrix(mlp.down_proj),
        )

    def layers() -> Iterable[LayerWeights]:
        for block in model.layers:
            assert isinstance(block, Block)
            yield layer(block)

    return Weights(
        embed=embed,
        layers=layers,
        norm=model.norm.weight,
        head=lambda x: F.linear(x, model.output_weight.to(dtype)),
    )
