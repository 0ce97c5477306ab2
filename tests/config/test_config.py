"""Configuration is closed: every error is one line with the key and what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_models import SHAPE

from khaosz.config import (
    ModelConfig,
    RopeScaling,
    TrainConfig,
    load_recipe,
    load_stages,
    parse_overrides,
    save_config,
    shipped_recipe,
)
from khaosz.errors import ConfigError

MINIMAL: dict[str, Any] = {"stage": "pt", "data": "a.jsonl", "out": "runs/a", "max_steps": 10}


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def one_line(error: ConfigError) -> str:
    """Message and hint together; the message is one line."""
    assert "\n" not in str(error)
    return f"{error} | {error.hint or ''}"


@pytest.mark.parametrize(
    ("extra", "wrong", "right"),
    [
        ({"qqq": 1e-3}, "qqq", None),
        ({"weight_decy": 0.1}, "weight_decy", "weight_decay"),
        ({"schedule": {"warmup_step": 5}}, "schedule.warmup_step", "schedule.warmup_steps"),
        ({"parallel": {"devise": "cpu"}}, "parallel.devise", "parallel.device"),
        ({"model": {"hiden_size": 64}}, "hiden_size", "hidden_size"),
    ],
)
def test_unknown_key_suggests_the_nearest(
    extra: dict[str, Any], wrong: str, right: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse({**MINIMAL, **extra}, source="r.toml")
    text = one_line(error.value)
    assert text.startswith("r.toml: ") and f"'{wrong}'" in text
    assert f"'{right}'" in text if right else "known keys: " in text and "lr" in text


def test_unknown_key_of_a_model_config() -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.parse({**SHAPE, "rope_thetta": 1.0}, source="[model]")
    assert error.value.hint == "did you mean 'rope_theta'?"
    with pytest.raises(ConfigError) as error:
        ModelConfig.parse({**SHAPE, "rope_scaling": {"rope_type": "linear", "facto": 2.0}})
    assert "rope_scaling.facto" in str(error.value) and error.value.hint is not None
    assert "rope_scaling.factor" in error.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("lr", "fast"),
        ("seed", -1),
        ("window", 0),
        ("max_steps", 0),
        ("max_minutes", float("inf")),
        ("micro_batch", 2.5),
        ("val_fraction", 1.0),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("grad_clip", 0.0),
        ("stage", "dpoo"),
        ("optimizer", "sgd"),
        ("dtype", "fp16"),
        ("size", "nanoo"),
        ("mix", {"zh": 0.0}),
        ("mix", {"zh": -1.0, "en": 2.0}),
        ("mix", {}),
        ("schedule", {"decay_fraction": 1.5}),
        ("schedule", "wsd"),
        ("loggers", ["tensorbord"]),
        ("data", None),
    ],
)
def test_invalid_value_names_its_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        TrainConfig.parse({**MINIMAL, key: value}, source="r.toml")
    assert f"r.toml: {key}" in one_line(error.value)


def test_unknown_size_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'nano'"):
        TrainConfig.parse({**MINIMAL, "size": "nanoo"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": None}, "set the length of the run"),
        ({"stage": "sft"}, "sft needs init_from"),
        ({"init_from": "m", "model": {"hidden_size": 64}}, "excludes init_from"),
    ],
)
def test_contradictory_settings_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        TrainConfig.parse({**MINIMAL, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True, "qkv_bias": True}, "no model family"),
        ({"num_key_value_heads": 3}, "must be a multiple"),
        ({"head_dim": 7}, "must be even"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"rope_theta": 0.0}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "original_max_position"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "original_max_position_embeddings": 64,
                    "low_freq_factor": 4.0,
                }
            },
            "must be above low_freq_factor",
        ),
    ],
)
def test_unsupported_shapes_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.parse({**SHAPE, **changes})


def test_several_errors_are_counted() -> None:
    with pytest.raises(ConfigError, match=r"\(and 1 more\)"):
        TrainConfig.parse({**MINIMAL, "lr": -1, "seed": -1})


def test_configuration_is_frozen() -> None:
    config = TrainConfig.parse(MINIMAL)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        config.schedule.name = "cosine"


def test_updated_validates_and_copies() -> None:
    config = TrainConfig.parse({**MINIMAL, "schedule": {"name": "cosine"}})
    changed = config.updated(seed=3)
    assert (config.seed, changed.seed, changed.schedule.name) == (0, 3, "cosine")
    with pytest.raises(ConfigError, match="seed"):
        config.updated(seed=-3)
    with pytest.raises(ConfigError, match="unknown key 'sed'"):
        config.updated(sed=3)


def test_overrides_are_toml_or_strings() -> None:
    parsed = parse_overrides(
        [
            "lr=1e-3",
            "max_steps=20",
            "dedup=false",
            "schedule.name=wsd",
            "--size=1b",
            'out="runs/a b"',
            r"data=C:\texts\a=b.jsonl",
            'prompts=["你好", "Hi"]',
            "mix={zh = 0.5, en = 0.5}",
        ]
    )
    assert parsed == {
        "lr": 0.001,
        "max_steps": 20,
        "dedup": False,
        "schedule.name": "wsd",
        "size": "1b",
        "out": "runs/a b",
        "data": r"C:\texts\a=b.jsonl",
        "prompts": ["你好", "Hi"],
        "mix": {"zh": 0.5, "en": 0.5},
    }


@pytest.mark.parametrize("text", ["lr", "=1", "--resume"])
def test_invalid_override(text: str) -> None:
    with pytest.raises(ConfigError, match="not an override") as error:
        parse_overrides([text])
    assert text in str(error.value) and error.value.hint is not None


def test_recipe_with_overrides(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        'stage = "pt"\ndata = "a"\nout = "b"\nmax_steps = 5\n[schedule]\nname = "cosine"\n',
    )
    config = load_recipe(
        path, ["schedule.warmup_steps=3", "parallel.device=cpu", "data=文本.jsonl"]
    )
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 3)
    assert config.parallel.device == "cpu"
    assert config.data == Path("文本.jsonl")
    assert config.max_steps == 5


def test_override_below_a_value(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'stage = "pt"\ndata = "a"\nout = "b"\nmax_steps = 5\n')
    with pytest.raises(ConfigError, match="'max_steps' is a value"):
        load_recipe(path, ["max_steps.x=1"])


def test_unknown_override_suggests_the_nearest(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'stage = "pt"\ndata = "a"\nout = "b"\nmax_steps = 5\n')
    with pytest.raises(ConfigError, match=r"unknown key 'schedule\.nam'") as error:
        load_recipe(path, ["schedule.nam=wsd"])
    assert error.value.hint == "did you mean 'schedule.name'?"


STAGES = """
size = "nano"
max_steps = 5
out = "runs/x"

[[stages]]
stage = "pt"
data = "a.jsonl"

[[stages]]
stage = "sft"
data = "b.jsonl"
init_from = "runs/x/last"
max_steps = 7
"""


def test_stages_inherit_the_keys_above_them(tmp_path: Path) -> None:
    overrides = ["sft.schedule.name=cosine", "pt.max_steps=9", "seed=4"]
    pt, sft = load_stages(recipe(tmp_path, STAGES), overrides)
    assert (pt.stage, pt.size, pt.max_steps, pt.schedule.name, pt.seed) == (
        "pt",
        "nano",
        9,
        "wsd",
        4,
    )
    assert (sft.stage, sft.size, sft.max_steps, sft.seed) == ("sft", "nano", 7, 4)
    assert (sft.schedule.name, sft.out) == ("cosine", pt.out)


@pytest.mark.parametrize("stages", ["stages = 3", "stages = [1]", '[stages]\nstage = "pt"'])
def test_stages_must_be_tables(tmp_path: Path, stages: str) -> None:
    with pytest.raises(ConfigError, match=r"must be \[\[stages\]\] tables"):
        load_stages(recipe(tmp_path, stages))


def test_load_recipe_expects_one_stage(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has 2 stages"):
        load_recipe(recipe(tmp_path, STAGES))
    with pytest.raises(ConfigError, match="unknown key 'dpo'"):
        load_stages(recipe(tmp_path, STAGES), ["dpo.lr=1"])


def test_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    path = recipe(tmp_path, 'stage = "pt"\ndata = \n')
    with pytest.raises(ConfigError, match=r"recipe\.toml: not valid TOML: .*line 2"):
        load_recipe(path)


def test_missing_or_unreadable_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe not found"):
        load_recipe(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path)
    path = tmp_path / "gbk.toml"
    path.write_bytes('data = "文本"'.encode("gbk"))
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(path)


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_text('stage = "pt"\ndata = "a"\nout = "b"\nmax_steps = 5\n', encoding="utf-8-sig")
    assert load_recipe(path).max_steps == 5


def test_shipped_recipes_are_valid() -> None:
    recipes = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
    assert recipes
    for path in recipes:
        assert load_stages(path)
        assert shipped_recipe(path.name) == path


def test_saved_configuration_can_be_read(tmp_path: Path) -> None:
    config = TrainConfig.parse(
        {
            **MINIMAL,
            "model": {"hidden_size": 64, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "mix": {"中文": 0.7, "en": 0.3},
            "schedule": {"name": "sgdr", "cycles": 3},
            "prompts": ["你好"],
            "lr": 0.1 + 0.2,
        }
    )
    path = tmp_path / "config.json"
    save_config(config, path)
    read = TrainConfig.parse(json.loads(path.read_text(encoding="utf-8")))
    assert read == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_rope_scaling_is_kept() -> None:
    scaling = RopeScaling.parse({"rope_type": "yarn", "factor": 4})
    config = ModelConfig.parse({**SHAPE, "rope_scaling": scaling})
    assert config.rope_scaling == scaling
    assert config.updated(vocab_size=65).rope_scaling == scaling


def test_embed_is_a_stage_and_a_table(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('stage = "embed"\ndata = "d"\nout = "o"\nsize = "nano"\nmax_steps = 1\n')
    changed = ["embed.temperature=0.5", "embed.lr=0.25", "embed.schedule.name=cosine"]
    config = load_recipe(recipe, changed)
    assert (config.embed.temperature, config.lr, config.schedule.name) == (0.5, 0.25, "cosine")
    with pytest.raises(ConfigError, match=r"embed\.temprature") as error:
        load_recipe(recipe, ["embed.temprature=1"])
    assert error.value.hint == "did you mean 'embed.temperature'?"
