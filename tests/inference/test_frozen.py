"""Adapters over matrices that stay in their file: the dequantised model's losses and gradients."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_native import KINDS, library, raw_rows  # noqa: F401
from tiny_models import random_model, tokenizer

from khaosz.config import LoRAConfig
from khaosz.inference.linear import head as head_module
from khaosz.inference.linear.frozen import TensorMatrix, frozen_model
from khaosz.inference.linear.head import stored_nats
from khaosz.inference.linear.native import dequantise
from khaosz.inference.scoring import token_nats
from khaosz.interop.gguf.blocks import dequantize
from khaosz.interop.gguf.model import load_gguf, save_gguf
from khaosz.interop.huggingface import save_model
from khaosz.interop.models import load_model, open_model
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.trainer.loss import cross_entropy_sum

IDS = torch.tensor([[1, 7, 9, 3, 250, 8, 2], [4, 4, 17, 260, 1, 1, 30]])
LABELS = torch.tensor([[7, 9, -100, 250, 8, 2, 0], [-100, -100, 260, 1, 1, 30, 5]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [16, 21])
def test_whole_matrices_of_every_type(library: ctypes.CDLL, kind: str, rows: int) -> None:  # noqa: F811
    raw = raw_rows(kind, rows, 512)
    expected = torch.from_numpy(dequantize(raw, kind))
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(rows, 512, dtype=dtype)
        dequantise(library, raw, kind, out)
        # A type with minima may be computed with one rounding less: half a unit of fp32.
        exact = torch.isclose(out.float(), expected.to(dtype).float(), rtol=2**-23, atol=0)
        same = out == expected.to(dtype)
        assert (same if dtype == torch.bfloat16 else exact).float().mean() > 0.999
        torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-6)


def losses_and_gradients(model: Transformer) -> tuple[float, list[torch.Tensor]]:
    hidden = model(IDS)
    head = model.stored_head
    loss = cross_entropy_sum(
        hidden,
        model.output_weight if head is None else head,
        LABELS,
        cap=model.config.final_logit_softcapping,
    )
    loss.backward()
    layers = named_adapters(model).values()
    gradients = [p.grad for layer in layers for p in (layer.lora_A, layer.lora_B)]
    assert all(g is not None for g in gradients)
    return float(loss.detach()), gradients  # type: ignore[return-value]


def adapted(model: Transformer, base: Any) -> Transformer:
    add_lora(model, LoRAConfig(rank=4, base=base), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in named_adapters(model).values():
            layer.lora_B.normal_(0, 0.02, generator=generator)
    return model


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16", "Q4_K_M"])
def test_same_gradients_as_the_dequantised_model(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    changes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    by = tokenizer()
    made = random_model(by.vocab_size, qk_norm=False, qkv_bias=True, **changes)
    save_gguf(made, by, path, kind)
    frozen = frozen_model(open_model(path))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert sum(p.numel() for p in frozen.parameters()) < 2_000  # vectors alone
    with torch.no_grad():
        dense = load_gguf(path)
        nats = [
            token_nats(m, m(IDS).flatten(0, 1), LABELS.clamp(0).flatten()) for m in (frozen, dense)
        ]
    torch.testing.assert_close(nats[0], nats[1], rtol=1e-5, atol=1e-5)  # sums in another order
    loss, gradients = losses_and_gradients(adapted(frozen, "file"))
    expected, exact = losses_and_gradients(adapted(dense.double(), "fp32"))
    assert loss == pytest.approx(expected, rel=1e-5)
    for ours, theirs in zip(gradients, exact, strict=True):
        # fp32 rounds to 6e-8 of values that pass through sums of 32 to 96 terms, forth and back.
        assert (ours.double() - theirs.double()).abs().max() < 1e-5 * theirs.abs().max()


def test_a_directory_stays_in_its_own_type(tmp_path: Path) -> None:
    made = random_model(tokenizer().vocab_size).to(torch.bfloat16)
    save_model(made, tmp_path, bos_id=0, eos_ids=[1], pad_id=2)
    frozen = frozen_model(open_model(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(frozen(IDS), load_model(tmp_path)(IDS), rtol=1e-5, atol=1e-5)
    table = frozen.embed_tokens.matrix
    assert isinstance(table, TensorMatrix)
    assert table.dense(torch.bfloat16).equal(made.embed_tokens.weight)


class _Head:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.shape = weight, (len(weight), weight.shape[1])
        self.most = 0

    def dense(self, dtype: torch.dtype, start: int = 0, stop: int | None = None) -> torch.Tensor:
        rows = self.weight[start:stop].to(dtype)
        self.most = max(self.most, len(rows))
        return rows

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


@pytest.mark.parametrize("cap", [None, 4.0])
def test_loss_over_parts_of_the_vocabulary(cap: float | None, monkeypatch: Any) -> None:
    monkeypatch.setattr(head_module, "_LOGITS", 2_000)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1_000, 16, generator=generator)
    hidden = torch.randn(5, 16, generator=generator).requires_grad_()
    targets = torch.tensor([0, 999, 256, 255, 500])
    logits = hidden.double() @ weight.double().t()
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, reduction="none")
    expected.sum().backward()
    head = _Head(weight)
    nats, gradient = stored_nats(hidden.detach(), head, targets, cap, gradient=True)
    assert head.most == 256
    # fp32 sums of a thousand terms.
    torch.testing.assert_close(nats.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    assert gradient is not None and hidden.grad is not None
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-5)
