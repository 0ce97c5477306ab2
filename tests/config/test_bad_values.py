"""Every key of a recipe refuses impossible values before work, in one line that names the key."""

from __future__ import annotations

import math
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from test_effects import dotted_fields

from khaosz.config import ModelConfig, TrainConfig
from khaosz.config.stages import STAGES_OF
from khaosz.errors import ConfigError

BASE: dict[str, Any] = {
    "data": "d.jsonl", "out": "runs/x", "size": "nano", "max_steps": 10,
    "reward_function": "khaosz.rewards:brevity", "rollout": {"group": 4},
}  # fmt: skip
# Besides what no number is: values that fit the type, and that no run can use.
BAD: dict[str, list[Any]] = {
    "stage": ["ptt", "PT"],
    "data": [""],
    "out": [""],
    "seed": [-1, 2**63],
    "size": ["nanoo", "1B"],
    "vocab_size": [0, 2**21],
    "window": [7],
    "max_minutes": [0],
    "epochs": [0.0],
    "lr": [0, -1e-3],
    "embedding_lr": [0],
    "betas": [[0.9], [0.9, 1.0], [-0.1, 0.9], [0.9, math.nan], 0.9],
    "weight_decay": [-0.1],
    "grad_clip": [0],
    "schedule.warmup_fraction": [1.0],
    "schedule.decay_fraction": [0, 1.1],
    "schedule.min_ratio": [1.1],
    "schedule.cycle_growth": [0.5],
    "parallel.threads": [0, 100_000],
    "loss_chunk": [0],
    "lora.rank": [0],
    "lora.alpha": [0],
    "lora.dropout": [1.0],
    "lora.target_modules": [[], ["q"], "q_proj"],
    "preference.beta": [0],
    "preference.label_smoothing": [0.5],
    "rollout.temperature": [0, 1e-9, 1e9],
    "rollout.clip": [0, 1.0],
    "rollout.gamma": [0, 1.1],
    "rollout.lam": [1.1],
    "rollout.kl_target": [0],
    "rollout.minibatches": [0, 65],
    "rollout.group": [0],
    "embed.temperature": [0],
    "embed.max_length": [1],
    "mix": [{}, {"zh": 0.0}, {"zh": -1.0, "en": 2.0}, {"zh": math.nan}, {"zh": 1.0, "en": 1e-9},
            {"zh": 1e300}, {"zh": "much"}, ["zh"]],
    "val_fraction": [1.0],
    "prompts": [[""], "Hi", [3]],
    "loggers": [["wandbb"], "wandb"],
    "model": [{"hiden_size": 4}, 3],
}  # fmt: skip


def annotation(owner: type[BaseModel], key: str) -> Any:
    name, _, inner = key.partition(".")
    kind = owner.model_fields[name].annotation
    if not inner:
        return kind
    nested = [kind, *get_args(kind)]
    table = next(each for each in nested if isinstance(each, type) and issubclass(each, BaseModel))
    return annotation(table, inner)


def members(kind: Any) -> set[Any]:
    union = get_origin(kind) in (Union, UnionType)
    return {each for each in get_args(kind)} if union else {kind}


def of_another_type(owner: type[BaseModel], key: str) -> list[Any]:
    kinds = members(annotation(owner, key)) - {type(None)}
    if kinds <= {int, float}:
        numbers = [
            math.nan,
            math.inf,
            -math.inf,
            -1,
            True,
            "x",
            [],
            {},
            None if len(kinds) > 1 else "",
            1e39,
        ]
        return [*numbers, *([2.5, 10**30] if kinds == {int} else [])]
    if kinds == {bool}:
        return ["maybe", 2, []]
    if get_origin(next(iter(kinds))) is Literal:
        return ["", "xyz", 3, []]
    if kinds <= {str, Path}:
        return [3, [], {}]
    return [3]


def values_of(key: str, value: Any) -> dict[str, Any]:
    stages = STAGES_OF[key]
    stage = next(one for one in ("grpo", "ppo", "dpo", "rm", "embed", "sft", "pt") if one in stages)
    values = {**BASE, "stage": stage}
    if stage not in ("ppo", "grpo"):
        del values["reward_function"], values["rollout"]
    table, _, inner = key.partition(".")
    values[table] = {**values.get(table, {}), inner: value} if inner else value
    return values


@pytest.mark.parametrize("key", sorted(dotted_fields()))
def test_every_key_refuses_impossible_values(key: str) -> None:
    TrainConfig.parse(values_of("rollout.kl", 0.1))
    for value in [*of_another_type(TrainConfig, key), *BAD.get(key, [])]:
        with pytest.raises(ConfigError) as error:
            TrainConfig.parse(values_of(key, value), source="r.toml")
            pytest.fail(f"{key}={value!r} was accepted")
        text = str(error.value)
        assert text.startswith("r.toml: ") and "\n" not in text, text
        assert key.rpartition(".")[2] in text, f"{key}={value!r}: {text}"


SHAPE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(dotted_fields(ModelConfig)))
def test_every_key_of_a_model_refuses_impossible_values(key: str) -> None:
    table, _, inner = key.partition(".")
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    for value in of_another_type(ModelConfig, key):
        values = {**SHAPE, table: {**scaling, inner: value} if inner else value}
        with pytest.raises(ConfigError) as error:
            ModelConfig.parse(values, source="[model]")
            pytest.fail(f"{key}={value!r} was accepted")
        assert key in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("pt", {"schedule": {"warmup_fraction": 0.5}}, "more than the whole run together"),
        (
            "pt",
            {"schedule": {"warmup_fraction": 0.3, "decay_fraction": 0.8}},
            "warmup_fraction=0.3 and decay_fraction=0.8",
        ),
        ("pt", {"schedule": {"warmup_steps": 5}}, "5 steps of warm-up and 6 of decay do not fit"),
        (
            "pt",
            {"schedule": {"name": "cosine", "warmup_steps": 11}},
            "11 steps of warm-up do not fit into 10 steps",
        ),
        (
            "pt",
            {"schedule": {"name": "sgdr", "cycles": 900, "cycle_growth": 2.0}},
            "cycle_growth=2",
        ),
        ("dpo", {"lora": {"dropout": 0.1}}, "lora.dropout=0.1: a log-ratio"),
        ("embed", {"lora": {"dropout": 0.1}}, "lora.dropout=0.1: texts are embedded twice"),
        ("ppo", {"rollout": {"minibatches": 17}}, "minibatches=17 is more than the 16 answers"),
    ],
)
def test_values_that_contradict_each_other(
    stage: str, changes: dict[str, Any], message: str
) -> None:
    values = {**BASE, "stage": stage}
    if stage != "ppo":
        del values["reward_function"], values["rollout"]
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse({**values, **changes})
    assert message in str(error.value)


def test_whole_run_of_warm_up_and_decay_is_allowed() -> None:
    values = {**BASE, "stage": "pt"}
    del values["reward_function"], values["rollout"]
    for schedule in (
        {"warmup_fraction": 0.1, "decay_fraction": 0.9},
        {"warmup_fraction": 0.7, "decay_fraction": 0.3},
        {"warmup_steps": 4},
        {"name": "constant", "warmup_steps": 9},
    ):
        TrainConfig.parse({**values, "schedule": schedule})


def test_messages_stay_one_line() -> None:
    values = {**BASE, "stage": "pt"}
    del values["reward_function"], values["rollout"]
    for wrong in ({"size": "a\nb" * 500}, {"a\nb": 1}, {"schedule": {"x\x1b[2J\n": 1}}):
        with pytest.raises(ConfigError) as error:
            TrainConfig.parse({**values, **wrong})
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
