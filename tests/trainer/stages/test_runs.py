"""Whole alignment runs: output, exact resumption, refused settings."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import stopping_after

from khaosz.errors import CheckpointError, ConfigError, ModelError, TrainingError
from khaosz.interop.huggingface import is_reward_model, load_reward_model
from khaosz.interop.models import load_model
from khaosz.trainer.checkpoint import resolve
from khaosz.trainer.run import run
from khaosz.trainer.stages.reward_sources import ModelReward
from khaosz.trainer.stages.rlhf import RLHFStrategy
from khaosz.trainer.train_context import TrainContext

QUIET = Console(file=io.StringIO())
ROLLOUT = {"prompts": 4, "group": 3, "max_new_tokens": 8, "epochs": 2, "minibatches": 2}
LORA = {"rank": 4, "alpha": 8.0}


def go(config: Any, **more: Any) -> TrainContext:
    return run(config, console=QUIET, **more)


def rows(config: Any) -> list[dict[str, Any]]:
    lines = (config.out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_reward_model_is_saved_for_serving(align: Any) -> None:
    config = align("rm")
    context = go(config)
    directory = resolve(config.out / "last")
    assert directory is not None and is_reward_model(directory)
    loaded = load_reward_model(directory)
    for name, parameter in context.model.named_parameters():
        assert torch.equal(loaded.state_dict()[name], parameter)
    with pytest.raises(ModelError, match="is a reward model"):
        load_model(directory)
    last = rows(config)[-1]
    assert {"accuracy", "margin", "reward_chosen", "val_loss", "val_accuracy"} <= last.keys()
    assert (config.out / "loss.png").stat().st_size > 10_000


def test_transformers_reads_the_reward_model(align: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = align("rm", max_steps=3)
    context = go(config)
    directory = resolve(config.out / "last")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    assert theirs.config.num_labels == 1
    torch.nn.init.normal_(context.model.score.weight)
    theirs.score.weight.data = context.model.score.weight.data
    ids = torch.tensor([[5, 9, 30, 7], [8, 40, 41, 7]])
    with torch.no_grad():
        expected = theirs.eval()(ids).logits[:, 0]
        model = context.model.eval()
        actual = model.rewards(model(ids)[:, -1])
    # fp32 in another order of operations.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_dpo_learns_the_preferences(align: Any) -> None:
    config = align("dpo", max_steps=20, val_fraction=0.0)
    go(config)
    first, last = rows(config)[0], rows(config)[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["accuracy"] == 0.5 and first["kl"] == 0.0
    assert last["loss"] < 0.6 and last["accuracy"] > 0.7 and last["margin"] > 0.1
    assert {"logprob_chosen", "logprob_rejected", "reward_chosen"} <= last.keys()


STAGES = {
    "rm": {},
    "dpo": {},
    "dpo-lora": {"lora": LORA},
    "ppo": {"rollout": {**ROLLOUT, "kl_target": 0.5}},
    "grpo": {},
    "grpo-lora": {"lora": {**LORA, "base": "int8"}},
}


@pytest.mark.parametrize("name", STAGES)
def test_resumed_run_equals_uninterrupted_run(
    align: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Stopped after three of six steps: for PPO and GRPO between the epochs of a rollout."""
    stage = name.partition("-")[0]
    whole = align(stage, out=tmp_path / "whole", **STAGES[name])
    go(whole)
    parts = align(stage, out=tmp_path / "parts", **STAGES[name])
    with stopping_after(3, monkeypatch):
        assert go(parts).progress.step == 3
    torch.manual_seed(99)  # a run must not depend on what the process did before
    assert go(parts, resume=True).progress.step == 6
    one, two = resolve(whole.out / "last"), resolve(parts.out / "last")
    assert one is not None and two is not None
    for file in ("model.safetensors", "state/optimizer.safetensors", "state/critic.safetensors",
                 "adapter/adapter_model.safetensors", "state/rollout-0.safetensors"):  # fmt: skip
        assert (one / file).exists() == (two / file).exists()
        if (one / file).exists():
            a, b = load_file(one / file), load_file(two / file)
            assert a.keys() == b.keys()
            for key in a:
                assert torch.equal(a[key], b[key]), f"{file}: {key}"
    clocks = {"tokens_per_s", "elapsed_s", "mfu"}
    for a, b in zip(rows(whole), rows(parts), strict=True):
        assert {k: v for k, v in a.items() if k not in clocks} == {
            k: v for k, v in b.items() if k not in clocks
        }
    if stage in ("ppo", "grpo"):
        recorded = [(c.out / "samples.jsonl").read_text().splitlines() for c in (whole, parts)]
        assert recorded[0] == recorded[1]
        assert {"step", "prompt", "text", "reward"} == json.loads(recorded[0][-1]).keys()


def test_lost_reference_table_is_computed_from_the_start(align: Any, tmp_path: Path) -> None:
    """Without its stored table, the reference is computed from the initial model again."""
    start = align("rm", out=tmp_path / "other", max_steps=1)  # any tokenizer and shape
    del start
    config = align("dpo", max_steps=2)
    go(config)
    table = load_file(config.out / "reference.safetensors")["logprobs"]
    (config.out / "reference.safetensors").unlink()
    longer = align("dpo", max_steps=2)
    go(longer, resume=True)
    again = load_file(config.out / "reference.safetensors")["logprobs"]
    assert torch.equal(table, again)


def test_lora_trains_adapters_only(align: Any) -> None:
    config = align("dpo", lora=LORA, max_steps=4)
    context = go(config)
    names = set(context.trained())
    assert names and all(".lora_A" in n or ".lora_B" in n for n in names)
    directory = resolve(config.out / "last")
    assert directory is not None and (directory / "adapter/adapter_config.json").exists()
    merged = load_model(directory)  # as it is served
    ids = torch.tensor([[5, 9, 30, 7]])
    context.model.eval()
    # Merged weights against base and update separately.
    torch.testing.assert_close(merged(ids), context.model(ids), rtol=1e-4, atol=1e-5)
    assert rows(config)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not (config.out / "reference.safetensors").exists()


def test_lora_for_pretraining_and_reward_models(align: Any, recipe: Any) -> None:
    config = recipe(lora=LORA, max_steps=3)
    context = go(config)
    assert all("lora" in name for name in context.trained())
    reward_run = align(
        "rm", lora={**LORA, "dropout": 0.1}, max_steps=3, out=config.out.parent / "rm"
    )
    context = go(reward_run)
    assert "score.weight" in context.trained() and len(context.trained()) > 1
    assert is_reward_model(resolve(reward_run.out / "last"))


def test_ppo_with_a_reward_model(align: Any, tmp_path: Path) -> None:
    reward_run = align("rm", out=tmp_path / "rm", max_steps=3)
    go(reward_run)
    config = align(
        "ppo",
        reward_function=None,
        reward_model=reward_run.out / "last",
        rollout=ROLLOUT,
        max_steps=5,
    )
    context = go(config)
    strategy = context.rollouts
    assert isinstance(strategy, RLHFStrategy) and isinstance(strategy.reward_source, ModelReward)
    assert strategy.reference is not None and strategy.critic is context.critic is not None
    frozen = load_reward_model(reward_run.out / "last")
    for name, parameter in strategy.reward_source.model.named_parameters():
        assert torch.equal(parameter, frozen.state_dict()[name])
    last = rows(config)[-1]
    expected = {"reward", "kl", "clip_fraction", "value_loss", "finished", "answer_tokens"}
    assert expected <= last.keys()
    assert all(math.isfinite(v) for v in last.values())


def test_largest_seed(align: Any) -> None:
    """Seeds of answers were seed * 2^40: above 8,388,607 they left the range of a seed."""
    context = go(align("grpo", seed=2**63 - 1, max_steps=1))
    assert context.progress.step == 1


class TestBadInput:
    def test_refuses_a_missing_reward_source(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="needs a reward"):
            align("ppo", reward_function=None)

    def test_refuses_a_reward_source_for_dpo(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="for ppo and grpo, not dpo"):
            align("dpo", reward_function="khaosz.rewards:brevity")

    def test_refuses_a_group_of_one(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="2 or more"):
            align("grpo", rollout={**ROLLOUT, "group": 1})

    def test_refuses_minutes_for_rollouts(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="needs max_steps or epochs"):
            align("ppo", max_steps=None, max_minutes=3)

    def test_refuses_dropout_in_a_log_ratio(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="dropout"):
            go(align("dpo", lora={**LORA, "dropout": 0.1}))

    def test_refuses_an_answer_as_long_as_the_window(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="no room for a prompt"):
            go(align("grpo", rollout={**ROLLOUT, "max_new_tokens": 128}))

    def test_refuses_a_language_model_as_reward_model(self, align: Any, tmp_path: Path) -> None:
        other = align("dpo", out=tmp_path / "lm", max_steps=1)
        go(other)
        config = align("ppo", reward_function=None, reward_model=other.out / "last")
        with pytest.raises(ModelError, match="is not a reward model"):
            go(config)

    def test_refuses_a_reward_model_with_another_tokenizer(
        self, align: Any, tmp_path: Path
    ) -> None:
        reward_run = align("rm", out=tmp_path / "rm", max_steps=1, tokenizer=None, vocab_size=300)
        go(reward_run)
        config = align("ppo", reward_function=None, reward_model=reward_run.out / "last")
        with pytest.raises(ConfigError, match="another tokenizer"):
            go(config)

    def test_refuses_a_reference_with_another_vocabulary(self, align: Any, tmp_path: Path) -> None:
        other = align("dpo", out=tmp_path / "lm", max_steps=1, tokenizer=None, vocab_size=300)
        go(other)
        with pytest.raises(ConfigError, match="the reference"):
            go(align("grpo", reference=other.out / "last"))

    def test_reward_function_that_raises_leaves_the_checkpoints(
        self, align: Any, tmp_path: Path
    ) -> None:
        source = tmp_path / "moody.py"
        source.write_text(
            "calls = []\n"
            "def f(messages, answer, extra):\n"
            "    calls.append(1)\n"
            "    if len(calls) > 12: raise ValueError('enough')\n"
            "    return len(answer)\n"
        )
        config = align("grpo", reward_function=f"{source}:f")
        with pytest.raises(TrainingError, match="enough"):
            go(config)
        assert resolve(config.out / "last") is not None  # step 4, the end of the first rollout

    def test_resume_refuses_other_data(self, align: Any, tmp_path: Path, pairs_file: Path) -> None:
        config = align("rm", max_steps=2)
        go(config)
        fewer = tmp_path / "fewer.jsonl"
        fewer.write_text("\n".join(pairs_file.read_text().splitlines()[:8]) + "\n")
        with pytest.raises(CheckpointError, match="the run began with"):
            go(align("rm", max_steps=2, data=fewer), resume=True)

    def test_refuses_a_misspelt_key(self, align: Any) -> None:
        with pytest.raises(ConfigError, match="rollout"):
            align("grpo", rollout={"promts": 3})
