"""Presets: exact parameter counts that fit the names, and a reason for each number."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, SHAPE

from khaosz.config import SIZES, ModelConfig, preset, size_for_minutes
from khaosz.config.presets import nearest_size, training_numbers
from khaosz.errors import ConfigError
from khaosz.model import Transformer


def count_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Transformer(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_counted_exactly(size: str) -> None:
    config = preset(size).model
    assert config.parameters() == count_parameters(config)


@pytest.mark.parametrize("switches", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_exactly_in_every_family(
    switches: dict[str, bool], tied: bool
) -> None:
    config = ModelConfig.parse({**SHAPE, "tie_word_embeddings": tied, **switches})
    assert config.parameters() == count_parameters(config)


@pytest.mark.parametrize(("size", "billions"), [("1b", 1.0), ("7b", 7.0), ("13b", 13.0)])
def test_size_name_matches_the_parameter_count(size: str, billions: float) -> None:
    assert 0.95 <= preset(size).model.parameters() / (billions * 1e9) <= 1.15


def test_sizes_grow() -> None:
    counts = [preset(size).model.parameters() for size in SIZES]
    assert counts == sorted(counts) and len(set(counts)) == len(counts)


@pytest.mark.parametrize("stage", ["pt", "sft"])
@pytest.mark.parametrize("size", SIZES)
def test_every_derived_number_has_a_reason(size: str, stage: str) -> None:
    chosen = preset(size, stage=stage)
    reasons = {number.name: number for number in chosen.derived}
    assert len(reasons) == len(chosen.derived)
    assert all(len(number.reason) > 3 for number in chosen.derived)
    # Every value that a preset sets is listed.
    for name in chosen.model.model_fields_set:
        assert reasons[name].value == getattr(chosen.model, name)
    for name in ("window", "batch_tokens", "lr", "embedding_lr", "weight_decay"):
        assert reasons[name].value == getattr(chosen, name)


@pytest.mark.parametrize("size", SIZES)
def test_preset_is_consistent(size: str) -> None:
    pt, sft = preset(size), preset(size, stage="sft")
    assert pt.window <= pt.model.max_position_embeddings == sft.window
    assert pt.batch_tokens % pt.window == 0
    assert pt.model.num_attention_heads * pt.model.head_dim == pt.model.hidden_size
    assert sft.lr < pt.lr


def test_vocab_size_replaces_the_derived_one() -> None:
    chosen = preset("nano", vocab_size=777)
    assert chosen.model.vocab_size == 777
    reason = next(n.reason for n in chosen.derived if n.name == "vocab_size")
    assert reason == "from the tokenizer"


def test_unknown_size() -> None:
    with pytest.raises(ConfigError, match="unknown size 'smal'") as error:
        preset("smal")
    assert error.value.hint == "did you mean 'small'?"
    with pytest.raises(ConfigError) as error:
        preset("zzz")
    assert error.value.hint is not None and "nano" in error.value.hint


def test_size_grows_with_the_minutes() -> None:
    for accelerator in (False, True):
        minutes = (0.1, 6.0, 30.0, 60.0, 300.0, 10_000.0)
        sizes = [str(size_for_minutes(m, accelerator=accelerator).value) for m in minutes]
        ranks = [SIZES.index(size) for size in sizes]
        assert ranks == sorted(ranks) and len(set(ranks)) > 1
    assert size_for_minutes(6.0).value == "nano"
    assert SIZES.index(size_for_minutes(6.0, accelerator=True).value) > SIZES.index("nano")


def test_nearest_size() -> None:
    assert [nearest_size(width) for width in (1, 256, 700, 5_000)] == [
        "nano",
        "nano",
        "base",
        "13b",
    ]


def test_learning_rate_scales_with_one_over_sqrt_width() -> None:
    def lr(width: int) -> float:
        return float(next(n.value for n in training_numbers(width, "pt") if n.name == "lr"))

    assert lr(1024) == pytest.approx(lr(256) / 2, abs=1e-6)  # rounded to six places


def test_flops_per_token_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=2,
    )
    # q 4x4, k and v 4x2 each, o 4x4, three feed-forward 4x8; the norms (2 x 4) are counted with
    # the block. Head 10x4. Attention: 12 * layers * query width * context / 2.
    matrices = 2 * (16 + 16 + 16 + 96 + 8) + 40
    assert config.flops_per_token(100) == 6 * matrices + 12 * 2 * 4 * 100 / 2
