"""Keys without effect are errors, and unknown keys are traced to what they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from khaosz.config import TrainConfig, load_stages
from khaosz.config.stages import STAGES, STAGES_OF
from khaosz.errors import ConfigError

NEEDS: dict[str, dict[str, Any]] = {
    "ppo": {"reward_function": "khaosz.rewards:brevity"},
    "grpo": {"reward_function": "khaosz.rewards:brevity", "rollout.group": 4},
}


def written(path: Path, tables: list[dict[str, Any]], **shared: Any) -> Path:
    """A recipe of `table.key` values."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in shared.items()]
    for table in tables:
        lines += ["[[stages]]"] if len(tables) > 1 else []
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def stage_of(name: str, **changes: Any) -> dict[str, Any]:
    values = {"stage": name, "data": "d.jsonl", "out": f"runs/{name}", "max_steps": 10}
    start = {} if "init_from" in changes else {"size": "nano"}
    return {**values, **start, **NEEDS.get(name, {}), **changes}


def dotted_fields(model: type[BaseModel] = TrainConfig, prefix: str = "") -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        inner = [
            kind
            for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        names |= dotted_fields(inner[0], f"{prefix}{name}.") if inner else {f"{prefix}{name}"}
    return names


def test_every_field_declares_the_stages_in_which_it_has_an_effect() -> None:
    assert dotted_fields() == set(STAGES_OF)
    assert all(set(stages) <= set(STAGES) and stages for stages in STAGES_OF.values())


VALUES: dict[str, Any] = {
    "val": "v.jsonl", "val_fraction": 0.1, "early_stop": 2, "max_minutes": 3, "min_steps": 5,
    "batch_tokens": 4096,
    "mix": {"zh": 1.0}, "dedup": False, "eval_tokens": 10, "loss_chunk": 64, "prompts": ["Hi"],
    "sample_every": 5, "batch_pairs": 4, "reference": "m", "reward_model": "m",
    "reward_function": "khaosz.rewards:brevity",
    "preference.loss": "sigmoid", "embed.pooling": "mean", "embed.query_prefix": "q: ",
    "embed.passage_prefix": "p: ", "rollout.kl_loss": "k2",
}  # fmt: skip
PARTIAL = sorted(key for key, stages in STAGES_OF.items() if set(stages) != set(STAGES))


def value_of(key: str) -> Any:
    if key in VALUES:
        return VALUES[key]
    table, _, name = key.partition(".")
    default = getattr(getattr(TrainConfig.model_fields[table], "default", None), name)
    return 1 if default is None else default


@pytest.mark.parametrize("key", PARTIAL)
def test_key_of_other_stages_is_an_error(key: str, tmp_path: Path) -> None:
    """A key is refused in exactly the stages that it is not declared for."""
    for stage in STAGES:
        values = stage_of(stage, **{key: value_of(key)})
        if isinstance(values.get("mix"), dict):
            values |= {"mix.zh": 1.0}
            del values["mix"]
        path = written(tmp_path / "r.toml", [values])
        if stage in STAGES_OF[key]:
            try:
                load_stages(path)
            except ConfigError as error:  # a key that needs another one
                assert "in stage" not in str(error), str(error)
            continue
        with pytest.raises(ConfigError) as refusal:
            load_stages(path)
        text = str(refusal.value)
        table = key.partition(".")[0]
        assert key in text or f"[{table}] has no effect in stage {stage}" in text, text


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("sft", {"init_from": "m", "size": "nano"}, "size has no effect with init_from"),
        ("sft", {"init_from": "m", "vocab_size": 900}, "vocab_size has no effect with init_from"),
        ("pt", {"tokenizer": "t", "vocab_size": 900}, "vocab_size has no effect with tokenizer"),
        ("pt", {"preference.beta": 0.1}, "[preference] has no effect in stage pt: it is for dpo"),
        (
            "sft",
            {"rollout.kl": 0.1},
            "[rollout] has no effect in stage sft: it is for ppo and",
        ),
        ("grpo", {"rollout.lam": 0.9}, "rollout.lam has no effect in stage grpo: it is for ppo"),
        ("pt", {"early_stop": 3, "val_fraction": 0.0}, "early_stop has no effect without held-out"),
        ("ppo", {"early_stop": 3}, "early_stop has no effect in stage ppo"),
        ("pt", {"eval_every": 3, "val_fraction": 0.0}, "eval_every has no effect without held-out"),
        ("pt", {"sample_every": 3}, "sample_every has no effect without prompts"),
        ("dpo", {"val": "v", "val_fraction": 0.2}, "val_fraction has no effect with val"),
        ("pt", {"schedule.cycles": 3}, "schedule.cycles has no effect with schedule.name=wsd"),
        (
            "pt",
            {"schedule.name": "constant", "schedule.min_ratio": 0.1},
            "schedule.min_ratio has no effect with schedule.name=constant",
        ),
        (
            "pt",
            {"schedule.warmup_steps": 1, "schedule.warmup_fraction": 0.1},
            "schedule.warmup_fraction has no effect with schedule.warmup_steps",
        ),
        ("sft", {"optimizer": "muon", "lora.rank": 4}, "optimizer has no effect with [lora]"),
        ("dpo", {"reference": "m", "preference.loss": "orpo"}, "reference has no effect with"),
        ("dpo", {"preference.gamma": 0.5}, "preference.gamma has no effect with"),
        ("grpo", {"rollout.kl": 0.0, "rollout.kl_loss": "k2"}, "rollout.kl_loss has no effect"),
        ("ppo", {"rollout.kl_horizon": 10}, "rollout.kl_horizon has no effect without"),
    ],
)
def test_key_that_another_key_disables(
    stage: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = {**stage_of(stage), **changes}
    if "init_from" in changes and "size" not in changes:
        del values["size"]
    with pytest.raises(ConfigError) as error:
        load_stages(written(tmp_path / "r.toml", [values]))
    assert message in str(error.value) and error.value.hint
    # An override that says the same is refused too.
    key = next((key for key in changes if message.startswith(f"{key} ")), next(iter(changes)))
    value = values.pop(key)
    with pytest.raises(ConfigError, match="has no effect"):
        load_stages(written(tmp_path / "r.toml", [values]), [f"{key}={json.dumps(value)}"])


def test_override_takes_the_place_of_a_key(tmp_path: Path) -> None:
    """The shipped recipes have a size for a test run, and are used with init_from=MODEL."""
    path = written(tmp_path / "r.toml", [stage_of("dpo", vocab_size=900, val_fraction=0.2)])
    (config,) = load_stages(path, ["init_from=m", "val=held.jsonl"])
    assert config.init_from == Path("m") and config.val == Path("held.jsonl")
    with pytest.raises(ConfigError, match="size has no effect with init_from"):
        load_stages(path, ["init_from=m", "size=mini"])
    (config,) = load_stages(path, ["init_from=m", 'init_from=""'])
    assert config.init_from is None


def test_shared_key_needs_an_effect_in_one_stage(tmp_path: Path) -> None:
    stages = [stage_of("pt"), stage_of("dpo", init_from="runs/pt/last")]
    path = written(tmp_path / "r.toml", stages, eval_tokens=100, batch_pairs=4)
    assert len(load_stages(path)) == 2
    assert len(load_stages(path, ["early_stop=3"])) == 2
    with pytest.raises(ConfigError, match=r"embed.pooling|\[embed\] has no effect"):
        load_stages(path, ["embed.pooling=last"])
    with pytest.raises(ConfigError, match="batch_pairs has no effect in stage pt"):
        load_stages(path, ["pt.batch_pairs=4"])


def test_shared_shape_is_for_new_models(tmp_path: Path) -> None:
    stages = [stage_of("pt"), stage_of("sft", init_from="runs/pt/last")]
    path = written(tmp_path / "r.toml", stages, **{"model.hidden_size": 128})
    pt, sft = load_stages(path, ["model.head_dim=32"])
    assert pt.model == {"hidden_size": 128, "head_dim": 32} and sft.model == {}
    with pytest.raises(ConfigError, match="excludes init_from"):
        load_stages(path, ["sft.model.head_dim=32"])


def test_override_of_one_role(tmp_path: Path) -> None:
    path = written(tmp_path / "r.toml", [stage_of("sft", init_from="m")])
    (config,) = load_stages(path, ["columns.roles.customer=user", "columns.roles.bot=assistant"])
    assert config.columns.roles == {"customer": "user", "bot": "assistant"}
    with pytest.raises(ConfigError, match=r"columns\.roles\.bot: Input should be"):
        load_stages(path, ["columns.roles.bot=alien"])


def test_recipe_without_stages(tmp_path: Path) -> None:
    path = written(tmp_path / "r.toml", [stage_of("pt")], stages=[])
    with pytest.raises(ConfigError, match="stages is empty"):
        load_stages(path)


@pytest.mark.parametrize(
    ("stage", "key", "meant"),
    [
        ("pt", "batch_size", "batch_tokens"),
        ("dpo", "batch_size", "batch_pairs"),
        ("ppo", "batch_size", "rollout.prompts"),
        ("pt", "batch_pair", None),
        ("sft", "per_device_train_batch_size", "micro_batch"),
        ("sft", "gradient_accumulation_steps", "batch_tokens"),
        ("sft", "learning_rate", "lr"),
        ("sft", "num_train_epochs", "epochs"),
        ("sft", "max_seq_length", "window"),
        ("embed", "max_length", "embed.max_length"),
        ("sft", "warmup_ratio", "schedule.warmup_fraction"),
        ("pt", "warmup_steps", "schedule.warmup_steps"),
        ("pt", "min_lr", "schedule.min_ratio"),
        ("sft", "bf16", "dtype"),
        ("sft", "lora_r", "lora.rank"),
        ("sft", "lora.r", "lora.rank"),
        ("sft", "lora.lora_alpha", "lora.alpha"),
        ("dpo", "beta", "preference.beta"),
        ("grpo", "beta", "rollout.kl"),
        ("grpo", "num_generations", "rollout.group"),
        ("ppo", "temperature", "rollout.temperature"),
        ("embed", "temperature", "embed.temperature"),
        ("pt", "n_layer", "model.num_hidden_layers"),
        ("pt", "block_size", "window"),
        ("pt", "max_iters", "max_steps"),
        ("sft", "output_dir", "out"),
        ("sft", "model_name_or_path", "init_from"),
        ("pt", "schedule.lr", "lr"),
        ("pt", "Learning-Rate", "lr"),
        ("pt", "weight_decy", "weight_decay"),
        ("pt", "early_stoping", "early_stop"),
        ("pt", "shedule.name", "schedule"),
        ("pt", "zzz", None),
    ],
)
def test_unknown_key_names_the_right_one(
    stage: str, key: str, meant: str | None, tmp_path: Path
) -> None:
    path = written(tmp_path / "r.toml", [stage_of(stage)])
    with pytest.raises(ConfigError, match="unknown key") as error:
        load_stages(path, [f'{key}="x"'])
    hint = error.value.hint or ""
    assert f"did you mean '{meant}'?" in hint if meant else "batch_pairs'" not in hint, hint
    # What it names is a key that has an effect there.
    if meant and not meant.startswith(("model.", "schedule")):
        assert stage in STAGES_OF[meant]
