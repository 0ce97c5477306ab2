"""Mixtures of experts in training: their gradients, and the load-balancing loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from khaosz.config import LoRAConfig, ModelConfig
from khaosz.data.batches.batch import Batch
from khaosz.errors import ConfigError
from khaosz.interop.huggingface import save_model
from khaosz.model import Transformer
from khaosz.model.lora import add_lora, named_adapters
from khaosz.model.mixture import balance_loss, recorded_routing
from khaosz.parallel import ParallelContext
from khaosz.trainer.strategy import Compute, LossModule, PTStrategy

transformers = pytest.importorskip("transformers")

MIXTURE: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
    "qk_norm": True,
}


def module(model: Transformer) -> LossModule:
    strategy = PTStrategy(None, 1, 1, ParallelContext(torch.device("cpu")))  # type: ignore[arg-type]
    return LossModule(model.train(), strategy, Compute())


def batch(padding: int = 0) -> Batch:
    """Two rows of 20, the second with padding."""
    ids = torch.randint(1, 61, (2, 20), generator=torch.Generator().manual_seed(0))
    positions, doc_ids = torch.arange(20).repeat(2, 1), torch.zeros_like(ids)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    if padding:
        ids[1, -padding:], doc_ids[1, -padding:], labels[1, -padding - 1 :] = 0, -1, -100
    return Batch(ids, labels, positions, doc_ids)


@pytest.mark.parametrize("padding", [0, 7])
def test_loss_is_that_of_transformers(padding: int, tmp_path: Path) -> None:
    """The loss and the gradient of every parameter, with the load-balancing loss in them."""
    model = tiny_model(**MIXTURE, router_aux_loss_coef=0.5, mlp_only_layers=[0])
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    some = batch(padding)
    written = some.doc_ids >= 0
    output = theirs(
        some.ids, attention_mask=written.long(), labels=some.labels, output_router_logits=True,
        shift_labels=some.labels,
    )  # fmt: skip
    output.loss.backward()
    ours = module(model)
    total = ours(some) / some.tokens
    total.backward()
    torch.testing.assert_close(total, output.loss)
    aux = ours.strategy.metric_sums["router_aux_loss"] / some.tokens
    torch.testing.assert_close(aux, output.aux_loss)
    torch.testing.assert_close(
        model.layers[1].mlp.gate.weight.grad, theirs.model.layers[1].mlp.gate.weight.grad
    )


def test_checkpointed_gradients_are_equal() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model(**MIXTURE, router_aux_loss_coef=0.5)
        model.gradient_checkpointing = checkpointed
        module(model)(batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_experts_without_tokens_have_zero_gradients() -> None:
    model = tiny_model(**{**MIXTURE, "num_experts": 40})
    logits = module(model)(batch())
    logits.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if ".experts." in n}
    unused = [n for n, g in gradients.items() if g is not None and not g.any()]
    assert None not in gradients.values() and 3 <= len(unused) < len(gradients)


def test_balance_of_even_and_uneven_routing() -> None:
    """k if all experts have as many positions, more otherwise."""
    even = torch.eye(4).repeat(5, 1) * 50
    torch.testing.assert_close(balance_loss([even], 1), torch.tensor(1.0))
    torch.testing.assert_close(balance_loss([torch.zeros(8, 4)], 4), torch.tensor(4.0))
    uneven = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    torch.testing.assert_close(balance_loss([uneven], 1), torch.tensor(4.0))
    torch.testing.assert_close(
        balance_loss([torch.cat([even, uneven])], 1, torch.arange(28) < 20), torch.tensor(1.0)
    )


def test_routing_is_recorded_with_gradients_only() -> None:
    model, ids = tiny_model(**MIXTURE), batch().ids
    with recorded_routing(model) as logits:
        with torch.no_grad():
            model(ids)
        assert not logits
        model(ids)
    assert [tuple(each.shape) for each in logits] == [(40, 6)] * 2
    model(ids)
    assert len(logits) == 2


def test_adapters_of_experts_only_where_named() -> None:
    model = tiny_model(**MIXTURE)
    add_lora(model, LoRAConfig(rank=2))
    assert {name.split(".")[2] for name in named_adapters(model)} == {"self_attn"}
    model = tiny_model(**MIXTURE, mlp_only_layers=[1])
    add_lora(model, LoRAConfig(rank=2, target_modules=("up_proj", "experts.down_proj")))
    assert list(named_adapters(model)) == [
        *(f"layers.0.mlp.experts.{i}.down_proj" for i in range(6)),
        "layers.1.mlp.up_proj",
    ]
    with pytest.raises(ConfigError, match="has no layers named up_proj"):
        add_lora(tiny_model(**MIXTURE), LoRAConfig(rank=2, target_modules=("up_proj",)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "require each other"),
        ({"moe_intermediate_size": None}, "require each other"),
        ({"num_experts_per_tok": 7}, "above num_experts"),
        ({"mlp_only_layers": [2]}, "ascending numbers of the 2 layers"),
        ({"num_experts": 4096, "num_hidden_layers": 9999}, "too many"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    config = tiny_model(**MIXTURE).config
    with pytest.raises(ConfigError, match=message):
        config.updated(**changes)
    with pytest.raises(ConfigError, match="norm_topk_prob requires num_experts"):
        tiny_model(norm_topk_prob=True)


def test_counts_of_parameters_and_operations() -> None:
    model = tiny_model(**MIXTURE, mlp_only_layers=[0])
    config: ModelConfig = model.config
    assert config.parameters() == sum(p.numel() for p in model.parameters())
    unused = 4 * 3 * 32 * 20  # four of six experts, in one layer
    assert config.active_parameters() == config.parameters() - unused
    chosen = config.updated(num_experts=2)
    assert config.flops_per_token(64) == chosen.flops_per_token(64) + 6 * 4 * 32
