"""Chunked cross-entropy against a float64 reference, and its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from khaosz.data.batch import IGNORE
from khaosz.trainer.loss import chunk_loss, cross_entropy_sum


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    loss = F.cross_entropy(
        (hidden @ weight.t()).flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_float64_reference(chunk: int, masked: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 20))
    if masked:
        labels[torch.rand(3, 20) < 0.6] = IGNORE
    loss = cross_entropy_sum(hidden, weight, labels, chunk=chunk)
    (loss / 7).backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    # fp32 sums of at most 60 terms of size about 10: 1e-4 absolute is a few hundred ulp.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double() * 7, grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double() * 7, grad_weight, rtol=1e-4, atol=1e-5)


def test_masked_positions_are_selected_not_multiplied() -> None:
    hidden = torch.randn(2, 4, 8)
    hidden[0, 1] = float("nan")
    hidden.requires_grad_()
    weight = torch.randn(10, 8, requires_grad=True)
    labels = torch.randint(0, 10, (2, 4))
    labels[0, 1] = IGNORE
    loss = cross_entropy_sum(hidden, weight, labels)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(weight.grad).all()
    assert (hidden.grad[0, 1] == 0).all()


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.full((2, 4), IGNORE))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_token_id_zero_is_a_label_like_any_other() -> None:
    hidden = torch.randn(1, 3, 8)
    weight = torch.randn(10, 8)
    assert cross_entropy_sum(hidden, weight, torch.zeros(1, 3, dtype=torch.long)) > 0


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((1, 2, 4), 100.0)
    weight = torch.eye(4) * 10
    loss = cross_entropy_sum(hidden, weight, torch.tensor([[0, 3]]))
    assert torch.isfinite(loss)


def test_bf16_is_close_to_fp32() -> None:
    torch.manual_seed(1)
    hidden, weight = torch.randn(64, 32), torch.randn(100, 32) * 0.2
    labels = torch.randint(0, 100, (64,))
    exact = cross_entropy_sum(hidden, weight, labels)
    rough = cross_entropy_sum(hidden, weight, labels, dtype=torch.bfloat16)
    # bf16 keeps 8 bits: logits of size about 1 are off by 2^-8, independently over 64 tokens.
    assert abs(exact - rough) / exact < 0.01


def test_the_logits_of_all_tokens_never_exist_together() -> None:
    """Peak memory of a 20,000-token vocabulary stays far below one full fp32 logits tensor."""
    hidden = torch.randn(4096, 16, requires_grad=True)
    weight = torch.randn(20_000, 16, requires_grad=True)
    labels = torch.randint(0, 20_000, (4096,))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        cross_entropy_sum(hidden, weight, labels, chunk=4096).backward()
    assert largest <= 1 << 23


def test_a_compiled_inner_loss_sees_whole_chunks_only() -> None:
    torch.manual_seed(2)
    hidden = torch.randn(1, 37, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (1, 37))
    labels[0, ::5] = IGNORE
    shapes = []

    def inner(
        h: torch.Tensor, w: torch.Tensor, y: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(len(h))
        return chunk_loss(h, w, y)

    loss = cross_entropy_sum(hidden, weight, labels, chunk=16, inner=inner)
    loss.backward()
    assert shapes == [16, 16]
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    # The tolerances of the reference test above.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), grad_weight, rtol=1e-4, atol=1e-5)
