"""Chunked cross-entropy against a float64 reference, its edge cases, and its use in a strategy."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from tiny import TINY_MODEL

from khaosz.config import ModelConfig
from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.data.batches.dataset import TokenDataset
from khaosz.model import Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.loss import chunk_loss, cross_entropy_sum
from khaosz.trainer.strategy import Compute, PTStrategy


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = hidden.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_()
    logits = (hidden @ weight.t()).flatten(0, -2)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    loss = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_equals_the_float64_reference(chunk: int, masked: bool, cap: float | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (3, 20))
    if masked:
        labels[torch.rand(3, 20) < 0.6] = IGNORE
    loss = cross_entropy_sum(hidden, weight, labels, chunk=chunk, cap=cap)
    (loss / 7).backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels, cap)
    # fp32 sums of at most 60 terms of size about 10: 1e-4 absolute is a few hundred ulp.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(grad_of(hidden).double() * 7, grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_of(weight).double() * 7, grad_weight, rtol=1e-4, atol=1e-5)


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
    assert torch.isfinite(grad_of(weight)).all()
    assert (grad_of(hidden)[0, 1] == 0).all()


def test_nothing_scored_is_zero_with_zero_gradients() -> None:
    hidden = torch.randn(2, 4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    loss = cross_entropy_sum(hidden, weight, torch.full((2, 4), IGNORE))
    loss.backward()
    assert loss == 0
    assert (grad_of(hidden) == 0).all() and (grad_of(weight) == 0).all()


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


def test_logits_of_all_tokens_never_exist_together() -> None:
    """Peak memory of a 20,000-token vocabulary stays far below one full fp32 logits tensor."""
    hidden = torch.randn(4096, 16, requires_grad=True)
    weight = torch.randn(20_000, 16, requires_grad=True)
    labels = torch.randint(0, 20_000, (4096,))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        cross_entropy_sum(hidden, weight, labels, chunk=4096).backward()
    assert largest <= 1 << 23


def test_compiled_inner_loss_gets_whole_chunks() -> None:
    torch.manual_seed(2)
    hidden = torch.randn(1, 37, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    labels = torch.randint(0, 20, (1, 37))
    labels[0, ::5] = IGNORE
    shapes = []

    def inner(
        h: torch.Tensor, w: torch.Tensor, y: torch.Tensor, cap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(len(h))
        return chunk_loss(h, w, y, cap)

    loss = cross_entropy_sum(hidden, weight, labels, chunk=16, inner=inner)
    loss.backward()
    assert shapes == [16, 16]
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    # The tolerances of the reference test above.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(grad_of(hidden).double(), grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_of(weight).double(), grad_weight, rtol=1e-4, atol=1e-5)


def test_masked_rows_of_a_chunk_are_selected_not_multiplied() -> None:
    """A row labelled `IGNORE` has no effect, whatever its values are."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(5, 8), torch.randn(10, 8)
    hidden[2] = float("nan")
    labels = torch.tensor([3, 0, IGNORE, 9, 1])
    loss, gradient = chunk_loss(hidden, weight, labels)
    recorded = [0, 1, 3, 4]
    alone, own = chunk_loss(hidden[recorded], weight, labels[recorded])
    # The same rows in a smaller matrix product, and four losses summed in another order.
    torch.testing.assert_close(loss, alone, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[recorded], own, rtol=1e-5, atol=1e-7)
    assert (gradient[2] == 0).all()


def test_bf16_logits_are_summed_in_fp32() -> None:
    """The product may be bf16; the softmax over the vocabulary and the sum over tokens may not."""
    torch.manual_seed(4)
    hidden, weight = torch.randn(300, 32).bfloat16(), (torch.randn(200, 32) * 0.2).bfloat16()
    labels = torch.randint(0, 200, (300,))
    logits = (hidden @ weight.t()).double()
    expected = F.cross_entropy(logits, labels, reduction="sum")
    actual = cross_entropy_sum(hidden, weight, labels, dtype=torch.bfloat16)
    # The same bf16 logits, in fp32 and in fp64, at most 1e-7 a term. Sums kept in
    # bf16 would be off by up to 2^-8 = 4e-3.
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)


def tiny_model() -> Transformer:
    """All weights random: the blocks of a new model are the identity and read no neighbours."""
    model = Transformer(ModelConfig.parse({**TINY_MODEL, "vocab_size": 50}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model


class Windows:
    """A data set that records the requested draws."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def batch(self, draws: range) -> Batch:
        self.asked.append(list(draws))
        shape = (len(draws), 4)
        return Batch(*(torch.zeros(shape, dtype=torch.long) for _ in range(4)))


def pt_strategy(data: Windows, rows: int, micro: int, rank: int = 0, world: int = 1) -> PTStrategy:
    parallel = ParallelContext(torch.device("cpu"), rank, world)
    return PTStrategy(cast(TokenDataset, data), rows, micro, parallel)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_hold_every_window_of_a_step(world: int) -> None:
    """The last, incomplete one of each rank included: 10 windows in threes."""
    for step in (0, 7):
        asked: list[int] = []
        for rank in range(world):
            data = Windows()
            batches = pt_strategy(data, 10, 3, rank, world).micro_batches(step)
            assert [len(draws) for draws in data.asked] == [len(batch.ids) for batch in batches]
            assert max(len(batch.ids) for batch in batches) <= 3
            asked += [draw for draws in data.asked for draw in draws]
        assert sorted(asked) == list(range(10 * step, 10 * step + 10))


def test_packed_documents_have_the_loss_of_each_alone() -> None:
    """The strategy passes the document ids: without them, a document would read its neighbour."""
    model = tiny_model()
    documents = [[7, 3, 9, 4, 1], [2, 8, 8], [5, 6, 30, 31]]
    ids, labels = torch.zeros(1, 12, dtype=torch.long), torch.full((1, 12), IGNORE)
    positions, doc_ids = torch.zeros_like(ids), torch.full_like(ids, -1)
    expected, at = 0.0, 0
    wide = copy.deepcopy(model).double()
    for number, document in enumerate(documents):
        own = torch.tensor(document)
        here = slice(at, at + len(own) - 1)
        ids[0, here], labels[0, here] = own[:-1], own[1:]
        positions[0, here], doc_ids[0, here] = torch.arange(len(own) - 1), number
        at += len(own) - 1
        with torch.no_grad():
            logits = wide.logits(wide(own[None, :-1]))[0]
        expected += float(F.cross_entropy(logits, own[1:], reduction="sum"))
    batch = Batch(ids, labels, positions, doc_ids)
    strategy = pt_strategy(Windows(), 1, 1)
    actual = strategy.loss(model, batch, Compute())
    assert strategy.count(batch) == 9
    # fp32 against float64 over nine tokens of a few nats each.
    assert actual.item() == pytest.approx(expected, rel=1e-5)
