"""LoRA: a trained low-rank update beside a frozen matrix (Hu et al. 2021, arXiv:2106.09685).

    y = W x + scale * B A dropout(x)        scale = alpha / r; rsLoRA: alpha / sqrt(r)

B begins at zero, hence training at the base model. With rsLoRA (Kalajdzievski 2023,
arXiv:2312.03732) the update keeps its size at any rank. Shapes: I inputs, O outputs, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from khaosz.config import EXPERT_TARGETS, LORA_TARGETS, LoRAConfig
from khaosz.errors import ConfigError
from khaosz.model.frozen import FrozenLinear


def scale_of(config: LoRAConfig) -> float:
    """What B A is multiplied by."""
    return config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank)


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, config: LoRAConfig) -> Tensor:
    """W + scale * B A (O, I), summed in fp32 and returned in the type of `weight`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        update = b.to(wide) @ a.to(wide)
    return (weight.to(wide) + scale_of(config) * update).to(weight.dtype)


class LoRALinear(nn.Module):
    """A frozen layer `base`, its update `lora_A` (r, I) and `lora_B` (O, r), both fp32."""

    def __init__(
        self,
        base: nn.Linear | FrozenLinear,
        config: LoRAConfig,
        *,
        quantize_base: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = Int8Linear(base) if quantize_base else base
        device = base.weight.device if isinstance(base, nn.Linear) else None
        self.config, self.enabled = config, True  # see `without_lora`
        self.scale = scale_of(config)
        a = nn.init.kaiming_uniform_(
            torch.empty(config.rank, base.in_features), a=math.sqrt(5), generator=generator
        )
        b = torch.zeros(base.out_features, config.rank)
        self.lora_A, self.lora_B = (nn.Parameter(x.to(device)) for x in (a, b))
        self.train(base.training)  # or dropout would run in an evaluated model

    @property
    def weight(self) -> Tensor:
        """`merged_weight` of the layer: what a `Runner` multiplies by."""
        base = self.base.weight
        if not self.enabled:
            return base
        return merged_weight(base, self.lora_A, self.lora_B, self.config)

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the type of the base's answer."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        x = F.dropout(x, self.config.dropout, self.training).to(self.lora_A.dtype)
        return y + F.linear(self.scale * F.linear(x, self.lora_A), self.lora_B).to(y.dtype)


class Int8Linear(nn.Module):
    """A frozen layer whose W[o, i] is codes[o, i] * scales[o], off by at most scales[o] / 2."""

    codes: Tensor  # (O, I) int8
    scales: Tensor  # (O, 1) fp32

    def __init__(self, base: nn.Linear | FrozenLinear) -> None:
        super().__init__()
        weight = base.weight.detach().float()
        # Clamped for rows of zeros or subnormals, where largest / 127 is zero.
        scales = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo().tiny)
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = base.bias

    @property
    def weight(self) -> Tensor:
        return self.codes * self.scales

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Int8Product.apply(x, self.codes, self.scales)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """x W^T. Autograd would keep every dequantised W for backward; this dequantises it again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, (codes * scales).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient @ (codes * scales).to(gradient.dtype), None, None


def target_of(layer: str) -> str:
    """The name in `target_modules` of a linear layer: "q_proj" of "layers.0.self_attn.q_proj",
    "experts.up_proj" of "layers.0.mlp.experts.7.up_proj"."""
    *path, name = layer.split(".")
    return f"{path[-2]}.{name}" if path[-2:-1] == ["experts"] else name


def named_adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers, each under the name of the layer it stands for: one at least."""
    found = {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}
    assert found, "the model has no adapters"
    return found


def add_lora(
    model: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None
) -> None:
    """Wrap the target layers in place and freeze the rest. The CPU's `generator` draws A. Targets
    that the model does not have are left out of its configuration. Raises `ConfigError` if it has
    none of them."""
    adapted = any(isinstance(part, LoRALinear) for part in model.modules())
    assert not adapted, "the model has adapters already"
    model.requires_grad_(False)
    int8 = config.base == "int8"
    kinds = nn.Linear | FrozenLinear
    linear = [(name, part) for name, part in model.named_modules() if isinstance(part, kinds)]
    names = {target_of(name) for name, _ in linear}
    targets = [name for name in config.target_modules if name in names]
    if not targets:
        known = [name for name in (*LORA_TARGETS, *EXPERT_TARGETS) if name in names]
        raise ConfigError(
            f"the model has no layers named {', '.join(config.target_modules)}",
            hint=f"target_modules of this model: {', '.join(known)}",
        )
    config = config.updated(target_modules=targets)
    for name, layer in linear:
        if target_of(name) in targets:
            new = LoRALinear(layer, config, quantize_base=int8, generator=generator)
            model.set_submodule(name, new)


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold the updates in, summed in fp32: a plain model in place, all of it trainable again."""
    for name, layer in named_adapters(model).items():
        assert layer.enabled, "merging within without_lora would drop the adapters"
        weight = nn.Parameter(layer.weight)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        plain.weight = weight
        plain.register_parameter("bias", layer.bias)
        model.set_submodule(name, plain.train(layer.training))
    model.requires_grad_(True)


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """The base model within: the reference of DPO and PPO, from the same weights. Nests. A
    backward pass that checkpoints gradients computes the forward again, so keep it inside too."""
    before = [(layer, layer.enabled) for layer in named_adapters(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer, under "layers.0.self_attn.q_proj.lora_A" and so on."""
    layers = named_adapters(model).items()
    return {f"{n}.{k}": getattr(m, k).detach() for n, m in layers for k in ("lora_A", "lora_B")}
