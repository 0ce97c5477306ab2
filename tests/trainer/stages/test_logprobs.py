"""Chunked log-probabilities against `log_softmax` in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from khaosz.data.batches.batch import SHAPE_STEP
from khaosz.trainer.loss import cross_entropy_sum
from khaosz.trainer.stages.logprobs import token_logprobs


def drawn(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(17, 6, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(0, 17, (11,), generator=generator)


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.7, None), (0.7, 2.0)])
def test_values(chunk: int, temperature: float, cap: float | None) -> None:
    hidden, weight, labels = drawn(torch.float64)
    actual, entropy = token_logprobs(
        hidden, weight, labels, chunk=chunk, temperature=temperature, entropy=True, cap=cap
    )
    logits = hidden @ weight.t()
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    every = F.log_softmax(logits / temperature, -1)
    assert torch.allclose(actual, every.gather(-1, labels[:, None])[:, 0], rtol=1e-12)
    assert torch.allclose(entropy, -(every.exp() * every).sum(-1), rtol=1e-12)


@pytest.mark.parametrize(("temperature", "cap"), [(1.0, None), (0.7, None), (0.7, 2.0)])
def test_gradients_of_both(temperature: float, cap: float | None) -> None:
    hidden, weight, labels = drawn(torch.float64)

    def both(h: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(h, w, labels, chunk=4, temperature=temperature, entropy=True, cap=cap)

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(), weight.requires_grad_()))


def test_fp32_is_near_float64() -> None:
    hidden, weight, labels = drawn(torch.float64)
    wide, _ = token_logprobs(hidden, weight, labels)
    actual, _ = token_logprobs(hidden.float(), weight.float(), labels)
    assert actual.dtype == torch.float32
    # Sums of six products and a softmax of seventeen: a few units in the last place.
    torch.testing.assert_close(actual.double(), wide, rtol=0, atol=5e-6)


def test_without_tokens() -> None:
    hidden, weight, labels = drawn(torch.float32)
    actual, _ = token_logprobs(hidden[:0].requires_grad_(), weight.requires_grad_(), labels[:0])
    actual.sum().backward()
    assert actual.shape == (0,) and weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("loss", [token_logprobs, cross_entropy_sum])
def test_any_number_of_tokens_has_few_shapes(loss: Any) -> None:
    """In bf16 oneDNN keeps a kernel for each shape of a matrix product."""
    hidden, weight = torch.randn(400, 6, requires_grad=True), torch.randn(17, 6)
    labels, shapes = torch.arange(400) % 17, set[int]()

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function._schema.name in ("aten::mm", "aten::addmm_"):
                shapes.update(size for matrix in args[-2:] for size in matrix.shape)
            return function(*args, **kwargs or {})

    with Shapes():
        for count in range(1, 400, 3):
            result = loss(hidden[:count], weight, labels[:count], chunk=170)
            (result[0] if isinstance(result, tuple) else result).sum().backward()
    assert shapes - {6, 17} == {SHAPE_STEP, 2 * SHAPE_STEP, 170}
