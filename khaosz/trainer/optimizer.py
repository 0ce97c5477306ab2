"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else; or AdamW for all.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): momentum, then the nearest
semi-orthogonal matrix. The orthogonalisation is the Polar Express iteration (Amsel et al. 2025,
arXiv:2505.16932, degree 5), run on all matrices of one shape together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from khaosz.config import TrainConfig
from khaosz.model import Transformer

# Optimal odd polynomials a x + b x^3 + c x^5, from the paper's algorithm with its safety factor.
_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T of each matrix's U S V^T, roughly: singular values end within 0.85 to 1.15.

    matrices (M, rows, columns) of one shape, any scale; returned in their own dtype. `dtype` is
    what the products are computed in.
    """
    x = matrices.to(dtype)
    wide = x.shape[-2] <= x.shape[-1]
    if not wide:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-7)
    for a, b, c in _POLAR_EXPRESS:
        gram = x @ x.mT  # (M, rows, rows), the smaller side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices.dtype)


class Muon(Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that every matrix moves by `lr` times
    sqrt(max(1, rows / columns)) in spectral norm; decoupled weight decay."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters)

    def _step_shape(
        self, group: dict[str, Any], shape: torch.Size, parameters: list[nn.Parameter]
    ) -> None:
        lr, momentum = group["lr"], group["momentum"]
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer: Tensor = state["momentum_buffer"]
            buffer.lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(buffer, momentum))
        directions = orthogonalise(torch.stack(updates), self.dtype)
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(direction, alpha=-lr * scale)


def is_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix of the blocks, or of what they take beside their input."""
    return parameter.ndim == 2 and name.startswith(("layers.", "per_layer_inputs."))


def build_optimizers(
    model: Transformer, config: TrainConfig, *, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """The optimizers of a resolved `config` (lr, embedding_lr, weight_decay given).

    Each group has its `base_lr`, which the schedule multiplies. Weight decay applies to the
    matrices of the blocks only, not to embeddings, norms or biases.
    """
    assert config.lr is not None and config.embedding_lr is not None
    assert config.weight_decay is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for n, p in model.named_parameters() if is_matrix(n, p) and p.requires_grad]
    inside = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in inside]
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": config.embedding_lr, "weight_decay": 0.0}
    ]
    optimizers: list[Optimizer] = []
    # Adapters are factors of a matrix, not matrices of the network: they are trained with AdamW.
    if config.optimizer == "muon" and config.lora is None:
        optimizers.append(Muon(matrices, config.lr, 0.95, config.weight_decay, dtype))
    else:
        groups.append({"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay})
    on_device = next(model.parameters()).device.type
    # The fused kernel updates in one pass, on these backends.
    fused = on_device in ("cpu", "cuda", "mps", "xpu")
    optimizers.append(AdamW(groups, betas=config.betas, eps=1e-10, fused=fused))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
