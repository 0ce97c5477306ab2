"""Packed rows against the slow truth: every document alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, tiny_model
from torch import Tensor

from khaosz.model import Transformer
from khaosz.model.transformer import document_mask

torch.set_num_threads(1)

# Masked and plain attention are different kernels and sum in different orders: fp32 rounding
# through two layers, on values of size 1.
FP32 = 1e-5

WINDOW = 16
LENGTHS = [[5, 1, 7], [16], [3, 3, 3, 3]]  # rows with and without padding behind


def build(**changes: Any) -> Transformer:
    return tiny_model(0.2, **changes)


def documents() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(0, 61, (n,), generator=generator) for n in row] for row in LENGTHS]


def pack(rows: list[list[Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and doc_ids (B, T) in the layout of `khaosz.data.batches.batch.Batch`."""
    ids = torch.zeros(len(rows), WINDOW, dtype=torch.long)
    positions, doc_ids = torch.zeros_like(ids), torch.full_like(ids, -1)
    for b, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            end = at + len(document)
            ids[b, at:end] = document
            positions[b, at:end] = torch.arange(len(document))
            doc_ids[b, at:end] = number
            at = end
    return ids, positions, doc_ids


def unpack(hidden: Tensor) -> list[list[Tensor]]:
    return [list(hidden[b, : sum(row)].split(row)) for b, row in enumerate(LENGTHS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_document_matches_document_alone(family: str) -> None:
    model, rows = build(**FAMILIES[family]), documents()
    with torch.no_grad():
        packed = unpack(model(*pack(rows)))
        for row, parts in zip(rows, packed, strict=True):
            for document, hidden in zip(row, parts, strict=True):
                alone = model(document[None])[0]
                torch.testing.assert_close(hidden, alone, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gradients_match_documents_alone(family: str) -> None:
    model, rows = build(**FAMILIES[family]), documents()
    weights = torch.randn(32, generator=torch.Generator().manual_seed(2))

    def taken() -> dict[str, Tensor]:
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return grads

    for row in rows:
        for document in row:
            (model(document[None])[0] @ weights).square().sum().backward()
    alone = taken()
    ids, positions, doc_ids = pack(rows)
    hidden = model(ids, positions, doc_ids)[doc_ids >= 0]
    (hidden @ weights).square().sum().backward()
    packed = taken()
    assert alone.keys() == packed.keys() == dict(model.named_parameters()).keys()
    for name, grad in alone.items():
        # Relative to the tensor's largest gradient: sums over 40 positions in another order.
        error = (packed[name] - grad).abs().max() / grad.abs().max()
        assert error < 1e-5, (name, error)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_finite_and_has_no_gradient(family: str) -> None:
    model, rows = build(**FAMILIES[family]), documents()
    rows = [*rows, []]  # a row of nothing but padding
    ids, positions, doc_ids = pack(rows)
    hidden = model(ids, positions, doc_ids)
    assert hidden.isfinite().all()
    hidden[doc_ids >= 0].sum().backward()
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight":
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    # What stands in the padding changes nothing before it.
    with torch.no_grad():
        filled = torch.where(doc_ids < 0, torch.full_like(ids, 7), ids)
        assert torch.equal(model(filled, positions, doc_ids)[doc_ids >= 0], hidden[doc_ids >= 0])


def test_every_position_sees_itself_at_least() -> None:
    """Attention kernels differ on rows with nothing to see, NaN among the answers: have none."""
    _, _, doc_ids = pack([*documents(), []])
    assert document_mask(doc_ids).diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_no_document_sees_another(changed: int) -> None:
    model, rows = build(qk_norm=True), documents()
    with torch.no_grad():
        before = model(*pack(rows))
        rows[0][changed] = (rows[0][changed] + 1) % 61
        after = model(*pack(rows))
    for number, (old, new) in enumerate(zip(unpack(before)[0], unpack(after)[0], strict=True)):
        # The same kernel on the same shapes: bitwise.
        assert torch.equal(old, new) == (number != changed)
    assert torch.equal(before[1:], after[1:])


def test_given_positions_are_used() -> None:
    model, rows = build(), documents()
    ids, positions, doc_ids = pack(rows)
    running = torch.arange(WINDOW).expand_as(ids)
    with torch.no_grad():
        same = model(ids, running, doc_ids)
        # Rotary attention sees differences of positions only; a document moved as a whole keeps
        # its hidden states up to the rounding of larger angles.
        valid = doc_ids >= 0
        torch.testing.assert_close(
            same[valid], model(ids, positions, doc_ids)[valid], rtol=1e-4, atol=1e-4
        )
        torn = positions.clone()
        torn[0, 1:5] += 3  # not moved as a whole
        assert (model(ids, torn, doc_ids)[0, 1:5] - same[0, 1:5]).abs().max() > 1e-3
