"""Refusals come before work: a recipe is checked as a whole, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import TINY_MODEL, Recipe

from khaosz.config import TrainConfig, find_recipe, load_stages
from khaosz.errors import CheckpointError, ConfigError, DataError, KhaoszError, ModelError
from khaosz.trainer.checks import check_stages
from khaosz.trainer.run import run


@pytest.fixture
def stage(tmp_path: Path, tokenizer_dir: Path) -> Any:
    """`stage("sft", key=value)`: a stage on data of a few records."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "Hello there."}) + "\n")
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}) + "\n")
    data = {"pt": texts, "sft": chats, "embed": pairs}
    data |= dict.fromkeys(("rm", "dpo", "ppo", "grpo"), pairs)

    def build(name: str, **changes: Any) -> TrainConfig:
        values: dict[str, Any] = {"stage": name, "data": data[name], "out": tmp_path / name}
        values["max_steps"] = 4
        if "init_from" not in changes:
            values |= {"size": "nano", "model": TINY_MODEL, "tokenizer": tokenizer_dir}
        return TrainConfig.parse({**values, **changes})

    return build


def refused(*stages: TrainConfig) -> KhaoszError:
    folder = stages[0].out.parent
    before = sorted(folder.rglob("*"))
    with pytest.raises(KhaoszError) as error:
        check_stages(stages)
    assert sorted(folder.rglob("*")) == before, "a check wrote something"
    assert "\n" not in str(error.value)
    return error.value


def test_numbers_of_every_stage_are_known_before_work(stage: Any) -> None:
    pt = stage("pt", window=64)
    sft = stage("sft", init_from=pt.out / "last")
    first, second = check_stages([pt, sft])
    assert (first.config.window, first.config.lr) == (64, 0.01)
    # The second starts from a model that does not exist yet.
    assert second.shape == first.shape and second.config.window == 512
    assert second.config.lr == pytest.approx(0.01 * (256 / 32) ** 0.5 * 0.3, rel=1e-3)


def test_missing_files_of_a_later_stage(stage: Any, tmp_path: Path) -> None:
    pt = stage("pt")
    gone = tmp_path / "gone.jsonl"
    model = pt.out / "last"
    for changes in ({"data": gone}, {"val": gone}):
        error = refused(pt, stage("sft", init_from=model, **changes))
        assert isinstance(error, DataError) and "stage sft" in str(error)
        assert "gone.jsonl" in str(error)
    for name in ("gone", "pt", "pt/step-5", "pt/latest"):
        error = refused(pt, stage("sft", init_from=tmp_path / name))
        assert isinstance(error, ModelError) and f"{name}: model" in str(error)
    for key in ("reference", "reward_model"):
        other: dict[str, Any] = {"max_steps": 2, key: tmp_path / "gone"}
        if key == "reference":
            other["reward_function"] = "khaosz.rewards:brevity"
        error = refused(pt, stage("ppo", init_from=model, **other))
        assert isinstance(error, ModelError) and "gone" in str(error)


def test_best_checkpoint_of_a_stage_without_held_out_data(stage: Any) -> None:
    pt = stage("pt", val_fraction=0.0)
    error = refused(pt, stage("sft", init_from=pt.out / "best"))
    assert "no best checkpoint" in str(error) and "last" in str(error.hint)


def test_reward_model_and_policy_of_other_stages(stage: Any) -> None:
    pt = stage("pt")
    rm = stage("rm", init_from=pt.out / "last")
    ppo = {"init_from": pt.out / "last"}
    check_stages([pt, rm, stage("ppo", reward_model=rm.out / "last", window=128, **ppo)])
    error = refused(pt, rm, stage("ppo", reward_model=pt.out / "last", **ppo))
    assert "is not a reward model" in str(error)
    error = refused(pt, rm, stage("sft", init_from=rm.out / "last"))
    assert "is a reward model" in str(error)


def test_two_stages_in_one_directory(stage: Any) -> None:
    pt = stage("pt")
    error = refused(pt, stage("sft", init_from=pt.out / "last", out=pt.out / "." / "x" / ".."))
    assert "is also that of stage pt" in str(error)


def test_later_stage_that_ran_already(stage: Any) -> None:
    pt, sft = stage("pt"), stage("sft")
    (sft.out / "last").mkdir(parents=True)
    error = refused(pt, sft)
    assert isinstance(error, CheckpointError) and "already contains a run" in str(error)
    assert [one.config.stage for one in check_stages([pt, sft], resume=True)] == ["pt"]


def test_out_that_is_a_file(stage: Any, tmp_path: Path) -> None:
    assert "texts.jsonl is a file" in str(refused(stage("pt", out=tmp_path / "texts.jsonl/run")))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple of num_attention_heads"),
        ({"num_attention_heads": 6}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "must be even"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 1e30}, "hidden_size"),
        ({"vocab_size": 5}, r"vocab_size=5 is less than"),
        ({"max_position_embeddings": 64}, "longer than the model's context of 64"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_interleaved": True}, "has the features qk_norm, rope_interleaved together"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor"),
    ],
)
def test_shapes_that_no_model_has(stage: Any, model: dict[str, Any], message: str) -> None:
    for name in ("pt", "dpo"):
        error = refused(stage("pt", out=stage("pt").out / "a"), stage(name, model=model))
        assert isinstance(error, ConfigError) and message in str(error)


def test_windows_beyond_the_context(stage: Any) -> None:
    pt = stage("pt", window=64, model={**TINY_MODEL, "max_position_embeddings": 128})
    error = refused(pt, stage("sft", init_from=pt.out / "last", window=256))
    assert "window=256 is longer than the model's context of 128" in str(error)
    grpo = {"init_from": pt.out / "last", "reward_function": "khaosz.rewards:brevity"}
    error = refused(pt, stage("grpo", **grpo, window=64, rollout={"group": 2}))
    assert "no room for a prompt in a window of 64" in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loggers": ["swanlab"]}, "logger 'swanlab' is not installed"),
        ({"compile": "on"}, "compile=on"),
        ({"parallel": {"device": "npu"}}, "device 'npu' is not available"),
        ({"tokenizer": "gone"}, "gone"),
    ],
)
def test_what_this_machine_lacks(
    stage: Any, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "missing-compiler")
    pt = stage("pt")
    assert message in str(refused(pt, stage("sft", out=pt.out.parent / "other", **changes)))


def test_prepared_data_of_another_stage(recipe: Recipe) -> None:
    assert "holds pt data" in str(refused(recipe(stage="sft")))


def test_sample_prompts_that_fill_the_context(recipe: Recipe, stage: Any) -> None:
    """Their first sample ended the run."""
    error = refused(stage("sft", prompts=["Hi", "long " * 600]))
    assert "fills the context of 512" in str(error) and len(str(error)) < 300
    for changes in ({"window": 256}, {"tokenizer": None, "vocab_size": 300}):  # is trained first
        config = recipe(prompts=["很长" * 300], **changes)
        with pytest.raises(ConfigError, match="fills the context"):
            run(config, console=Console(quiet=True))
        assert not (config.out / "metrics.jsonl").exists()


def test_early_stop_without_held_out_data(recipe: Recipe, stage: Any) -> None:
    """A fraction of a few documents may hold out none: it is known when the data is read."""
    config = stage("rm", early_stop=2, val_fraction=0.001, window=64)
    with pytest.raises(ConfigError, match="early_stop=2, but no data was held out"):
        run(config, console=Console(quiet=True))


def test_data_that_a_later_stage_cannot_read(stage: Any, tmp_path: Path) -> None:
    pt = stage("pt")
    start = {"init_from": pt.out / "last"}
    reward = {"reward_function": "khaosz.rewards:brevity", "rollout": {"group": 2}}
    for name, data, extra in (
        ("sft", "texts", {}),
        ("dpo", "texts", {}),
        ("dpo", "chats", {}),
        ("grpo", "texts", reward),
        ("embed", "chats", {}),
    ):
        own = {"data": tmp_path / f"{data}.jsonl", **start, **extra}
        error = refused(pt, stage(name, **own))
        text = str(error)
        assert isinstance(error, DataError) and f"stage {name}: {tmp_path}" in text
        assert "none of the first records can be read" in text and "line 1" in text
    check_stages([pt, stage("ppo", data=tmp_path / "chats.jsonl", **start, **reward)])
    (tmp_path / "broken.jsonl").write_text("{]\n")
    assert "broken" in str(refused(stage("pt", val=tmp_path / "broken.jsonl")))
    # One record is enough, wherever it is in the first batch; a directory may have other files.
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed/a.json").write_text('{"a": 1}')
    (tmp_path / "mixed/b.jsonl").write_text('{"b": 1}\n{"text": "Hello."}\n')
    check_stages([stage("pt", data=tmp_path / "mixed")])


def test_missing_example_data_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"example data") as caught:
        check_stages(load_stages(find_recipe(Path("pt"))))
    assert "data=FILE, or create it with `khaosz data get demo`" in str(caught.value.hint)
    Path("own.jsonl").write_text('{"query": "a", "positive": "b"}\n' * 20)
    own = ["data=own.jsonl", "size=nano", "init_from="]
    with pytest.raises(DataError, match=r"pairs_val.jsonl not found") as caught:
        check_stages(load_stages(find_recipe(Path("embed")), own))
    assert "hold out a part with val=" in str(caught.value.hint)
    assert len(check_stages(load_stages(find_recipe(Path("embed")), [*own, "val="]))) == 1
