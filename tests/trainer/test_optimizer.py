"""Muon and AdamW: orthogonalisation, weight decay, saved state."""

from __future__ import annotations

import io
import math

import pytest
import torch
from rich.console import Console
from tiny import Recipe

from khaosz.trainer.optimizer import Muon, build_optimizers, orthogonalise
from khaosz.trainer.run import run


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 24, 60), (2, 60, 24), (1, 1, 5)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_orthogonalise_equals_the_singular_value_decomposition(
    shape: tuple[int, ...], scale: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator) * scale
    result = orthogonalise(matrices)
    values = torch.linalg.svdvals(result.double())
    # Five steps of the paper's polynomial leave every singular value of a random matrix near 1.
    assert values.min() > 0.8 and values.max() < 1.2
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    exact = left @ right
    # The direction is that of U V^T: the cosine between them is near 1.
    cosine = (exact * result).sum() / (exact.norm() * result.double().norm())
    assert cosine > 0.98


def test_zero_gradient_stays_zero() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


def test_muon_moves_by_its_learning_rate_in_spectral_norm() -> None:
    torch.manual_seed(0)
    tall, wide = (torch.nn.Parameter(torch.zeros(s)) for s in ((40, 10), (10, 40)))
    optimizer = Muon([tall, wide], lr=0.1)
    for parameter in (tall, wide):
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    # sqrt(40 / 10) = 2 for the tall one; the polynomial ends within 20 % of 1.
    assert float(torch.linalg.matrix_norm(tall.detach(), 2)) == pytest.approx(0.2, rel=0.2)
    assert float(torch.linalg.matrix_norm(wide.detach(), 2)) == pytest.approx(0.1, rel=0.2)


def test_matrices_of_one_shape_are_updated_as_each_alone() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(8, 12) for _ in range(3)]
    together = [torch.nn.Parameter(torch.ones(8, 12)) for _ in gradients]
    alone = [torch.nn.Parameter(torch.ones(8, 12)) for _ in gradients]
    for parameter, gradient in zip(together, gradients, strict=True):
        parameter.grad = gradient.clone()
    Muon(together, lr=0.1).step()
    for parameter, gradient, joint in zip(alone, gradients, together, strict=True):
        parameter.grad = gradient.clone()
        Muon([parameter], lr=0.1).step()
        # Batched products may round differently: a few ulp of numbers below one.
        torch.testing.assert_close(parameter, joint, rtol=1e-5, atol=1e-6)


def test_decayed_parameters_and_saved_states(recipe: Recipe) -> None:
    config = recipe(max_steps=2, weight_decay=0.5)
    context = run(config, console=Console(file=io.StringIO()))
    optimizers = build_optimizers(context.model, context.config)
    decaying = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    for name, parameter in context.model.named_parameters():
        inside = name.startswith("layers.") and parameter.ndim == 2
        assert (id(parameter) in decaying) == inside, name
    tensors = context.named_optimizer_tensors()
    assert {name.rpartition("/")[0] for name in tensors} == {
        name for name, _ in context.model.named_parameters()
    }
    context.optimizers = optimizers
    context.load_optimizer_tensors(tensors)
    again = context.named_optimizer_tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    assert not any(math.isnan(float(value.float().sum())) for value in again.values())
