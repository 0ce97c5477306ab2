"""A mixture of experts in place of the feed-forward (Shazeer et al. 2017, arXiv:1701.06538), as
Qwen3 MoE and Granite MoE have it.

Shapes: ... leading dimensions, N positions of all of them, D hidden width, F feed-forward width of
an expert, E experts, k experts of a position, M positions of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config.model_config import ModelConfig
from khaosz.model.part import ACTIVATIONS, Linear, Part

EXPERTS = "experts"
_ROUTER = "mlp.gate.weight"


class Router(nn.Module):
    """Logits (N, E) of the experts, in fp32: rounding them would choose other experts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts or 0, config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float())


class Expert(nn.Module):
    """The linear layers of one feed-forward, which `Mixture` names and computes."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)


class Mixture(Part):
    """sum_e w_e SwiGLU_e(x) over the k experts of the largest router probability. w are those
    probabilities, with `norm_topk_prob` divided by their sum, which is the softmax of the k logits.

    An expert computes the positions that are routed to it. Where gradients are computed, one
    without positions computes none of them, so that its gradient is zero, not missing.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size or 0
        self.layer, self.activation = layer, ACTIVATIONS[config.hidden_act]
        self.chosen, self.normalised = config.num_experts_per_tok or 0, config.norm_topk_prob
        count = config.num_experts or 0
        self.gate = Router(config)
        self.experts = nn.ModuleList(Expert(width, inner) for _ in range(count))
        names = [f"{EXPERTS}.{i}." for i in range(count)]
        self._products = [((f"{n}gate_proj", f"{n}up_proj"), (f"{n}down_proj",)) for n in names]

    def products(self) -> tuple[tuple[str, ...], ...]:
        return tuple(names for pair in self._products for names in pair)

    def writers(self) -> Sequence[str]:
        return [down for _, (down,) in self._products]

    def forward(self, x: Tensor, linear: Linear) -> Tensor:
        flat = x.flatten(0, -2)  # (N, D)
        probabilities = self.gate(flat).softmax(-1)
        weights, experts = probabilities.topk(self.chosen, dim=-1)  # (N, k)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        # Positions in the order of their experts; those of one expert ascend.
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=len(self.experts)).tolist()
        positions, weights = order // self.chosen, weights.flatten()[order]
        y, start = torch.zeros_like(flat), 0
        for (gate_up, down), count in zip(self._products, counts, strict=True):
            if not count and not torch.is_grad_enabled():
                continue
            rows, each = positions[start : start + count], weights[start : start + count]
            start += count
            gate, up = linear(self, gate_up, flat[rows], rows)
            [out] = linear(self, down, self.activation(gate) * up, rows)  # (M, D)
            y.index_add_(0, rows, (out * each[:, None]).to(y.dtype))
        return y.view(x.shape)


def is_router(name: str) -> bool:
    """Whether a parameter is the matrix of a router: read and stored in fp32."""
    return name.endswith(_ROUTER)


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Router logits (N, E) of each forward pass within that computes gradients, layer by layer."""
    logits: list[Tensor] = []

    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled():
            logits.append(output)

    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(record) for router in routers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(logits: Sequence[Tensor], chosen: int, counted: Tensor | None = None) -> Tensor:
    """E sum_e f_e P_e: the load-balancing loss of Switch (Fedus et al. 2021, arXiv:2101.03961,
    equations 4 to 6) for k experts, over the positions of all layers together, as transformers
    computes it. f_e is the number of positions of an expert for each position, P_e its mean
    probability; k where all experts have as many.

    logits (N, E) of each layer; `counted` (N,), True for positions that count, None for all.
    """
    experts = logits[0].shape[-1]
    routed, probability = logits[0].new_zeros(experts), logits[0].new_zeros(experts)
    rows = 0
    for each in logits:
        each = each if counted is None else each[counted]
        probabilities = each.softmax(-1)
        routed += probabilities.topk(chosen, dim=-1).indices.flatten().bincount(minlength=experts)
        probability = probability + probabilities.sum(0)
        rows += len(each)
    return experts * (routed * probability).sum() / max(1, rows) ** 2
