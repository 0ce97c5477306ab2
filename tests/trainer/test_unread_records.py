"""Records that a run or an evaluation does not use: said, and refused above 1 %."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny import TINY_MODEL, random_model
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.config import TrainConfig
from khaosz.data.records.report import InputReport, refuse_unread, summary
from khaosz.data.shards.prepare import prepare
from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.errors import DataError
from khaosz.interop.huggingface import save_model
from khaosz.trainer.run import run

RUNNER = CliRunner()
USER = {"role": "user", "content": "hello"}
GOOD: dict[str, Any] = {
    "pt": {"text": "Plain text about rivers and the sea."},
    "sft": {"messages": [USER, {"role": "assistant", "content": "ok"}]},
    "dpo": {"prompt": "hello", "chosen": "yes", "rejected": "no"},
    "rm": {"prompt": "hello", "chosen": "yes", "rejected": "no"},
    "grpo": {"prompt": "hello"},
    "embed": {"query": "hello", "positive": "yes"},
}
BAD = [{"narration": "x"}, "{broken", {"messages": [{"role": "narrator", "content": "x"}]}]


def write(path: Path, stage: str, good: int, bad: int) -> Path:
    """`good` usable records of a stage and `bad` others, at the end."""
    records = [
        {key: _numbered(value, i) for key, value in GOOD[stage].items()} for i in range(good)
    ]
    lines = [json.dumps(record) for record in records]
    lines += [b if isinstance(b, str) else json.dumps(b) for b in (BAD * bad)[:bad]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _numbered(value: Any, i: int) -> Any:
    if isinstance(value, str):
        return f"{value} {i}"
    return [turn | {"content": f"{turn['content']} {i}"} for turn in value]


def config_of(stage: str, data: Path, out: Path, tokenizer_dir: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": stage, "data": data, "out": out, "tokenizer": tokenizer_dir, "size": "nano",
        "model": TINY_MODEL, "window": 64, "micro_batch": 2, "max_steps": 1, "dtype": "fp32",
        "compile": "off", "eval_tokens": 200, "val_fraction": 0.2, "batch_tokens": 128,
    }  # fmt: skip
    if stage == "grpo":
        values |= {
            "reward_function": "khaosz.rewards:brevity",
            "rollout": {"max_new_tokens": 4, "group": 2},
        }
    return TrainConfig.parse(values | more)


@pytest.mark.parametrize("stage", list(GOOD))
def test_every_stage_refuses_unread_records_before_it_trains(
    stage: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    data = write(tmp_path / "data.jsonl", stage, 20, 4)
    config = config_of(stage, data, tmp_path / "out", tokenizer_dir)
    with pytest.raises(DataError) as caught:
        run(config, console=Console(quiet=True))
    message = str(caught.value)
    assert message.startswith("4 of 24 records cannot be read: ")
    # Grouped by reason, with file and line and the nearest layout.
    assert "unknown layout with keys narration; nearest is " in message
    assert "(data.jsonl:21, data.jsonl:24)" in message and "not valid JSON" in message
    assert "--allow-unread" in str(caught.value.hint) and "allow_unread" in str(caught.value.hint)
    assert not list((tmp_path / "out").glob("step-*"))


@pytest.mark.parametrize("stage", ["pt", "sft", "dpo", "embed"])
def test_allowed_records_are_said_of_data_and_validation(
    stage: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    data = write(tmp_path / "data.jsonl", stage, 20, 4)
    val = write(tmp_path / "val.jsonl", stage, 6, 2)
    values = {"val": val, "batch_pairs": 4}
    config = config_of(stage, data, tmp_path / "out", tokenizer_dir, allow_unread=True, **values)
    console = Console(record=True, width=60, force_terminal=False, quiet=False, file=_sink())
    run(config, console=console)
    lines = console.export_text().splitlines()
    for name, counts in (("data", "24 records"), ("val", "8 records")):
        assert any(f"{name}.jsonl: {counts}" in line and "not read" in line for line in lines)
        assert any("skipped " in line and f"({name}.jsonl:" in line for line in lines)
    # A prepared directory says so again; the refusal also concerns validation data alone.
    fine = write(tmp_path / "fine.jsonl", stage, 20, 0)
    refused = config_of(stage, fine, tmp_path / "other", tokenizer_dir, **values)
    with pytest.raises(DataError, match="2 of 8 records cannot be read"):
        run(refused, console=Console(quiet=True))
    assert not list((tmp_path / "other").glob("step-*"))


def _sink() -> Any:
    import io

    return io.StringIO()


def test_one_in_a_hundred_is_allowed() -> None:
    for records, unread, refused in (
        (100, 1, False),
        (99, 1, True),
        (1000, 11, True),
        (0, 0, False),
    ):
        report = InputReport("a.jsonl", records=records)
        for line in range(unread):
            report.skip(line, "bad")
        report.skip(records, "empty text", unread=False)
        if refused:
            with pytest.raises(DataError, match=f"{unread} of {records:,} records"):
                refuse_unread([report], False)
        else:
            refuse_unread([report], False)
        refuse_unread([report], True)


def test_reasons_are_grouped_over_files() -> None:
    reports = [InputReport(f"folder/{name}.jsonl", records=9) for name in "ab"]
    for report in reports:
        for line in (3, 5):
            report.skip(line, "not valid JSON")
            report.skip(line, "not valid JSON")  # two pairs of one record
    assert [report.unread for report in reports] == [2, 2]
    assert summary(reports) == [
        "2 files: 18 records, 0 kept, 4 not read",
        "  skipped 8: not valid JSON (a.jsonl:3, a.jsonl:3, a.jsonl:5, ...)",
    ]


def test_preparation_stops_at_unread_records_and_completes_when_allowed(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    tokenizer, out = load_tokenizer(tokenizer_dir), tmp_path / "out"
    data = write(tmp_path / "data.jsonl", "pt", 20, 4)
    with pytest.raises(DataError, match="4 of 24 records cannot be read"):
        prepare([data], tokenizer, out, workers=0)
    assert not (out / "manifest.json").exists()
    report = prepare([data], tokenizer, out, workers=0, allow_unread=True)
    assert (report.documents, report.inputs[0].unread) == (20, 4)
    assert (out / "manifest.json").exists() and not (out / ".prepare").exists()
    # Mended data replaces what was refused.
    other = tmp_path / "other"
    with pytest.raises(DataError, match="cannot be read"):
        prepare([data], tokenizer, other, workers=0)
    write(data, "pt", 21, 0)
    assert prepare([data], tokenizer, other, workers=0).documents == 21


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    save_model(random_model(tokenizer), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_commands_say_what_they_skip(model_dir: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "texts.jsonl", "pt", 40, 3)
    pairs = write(tmp_path / "pairs.jsonl", "dpo", 8, 2)
    passages = write(tmp_path / "passages.jsonl", "embed", 8, 2)
    tokenizer = ["tokenizer", "train", texts, "--vocab-size", "300", "--out", tmp_path / "tok"]
    prepared = ["data", "prepare", texts, "--out", tmp_path / "prepared"]
    commands = [
        tokenizer,
        ["eval", "bpb", model_dir, texts],
        ["eval", "preference", model_dir, pairs],
        ["eval", "retrieval", passages],
        [*prepared, "--tokenizer", model_dir],
    ]
    for command in commands:
        words = [str(word) for word in command]
        done = RUNNER.invoke(app, words)
        assert isinstance(done.exception, DataError), (words, done.output)
        assert "records cannot be read" in str(done.exception)
        written = [tmp_path / "tok", tmp_path / "prepared" / "manifest.json"]
        assert not (command is tokenizer and written[0].exists()) and not written[1].exists()
        done = RUNNER.invoke(app, [*words, "--allow-unread"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        said = done.stderr + done.stdout
        assert "not read" in said or "skipped" in said
        assert "unknown layout with keys narration" in said
        result = json.loads(RUNNER.invoke(app, [*words, "--allow-unread", "--json"]).stdout)
        assert result.get("unread") == 3 or result.get("skipped") == 2 or "inputs" in result
    shown = RUNNER.invoke(app, ["data", "show", str(texts), "--tokenizer", str(model_dir)])
    assert shown.exit_code == 0 and "not valid JSON" in shown.output


@pytest.mark.parametrize("stage", GOOD)
def test_dry_run_counts_unread_records(
    stage: str, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run would: with the file and line of each, also of `val`."""
    monkeypatch.chdir(tmp_path)
    data = write(Path("data.jsonl"), stage, 30, 3)
    options = [f"data={data}", "out=out", f"tokenizer={tokenizer_dir}", "size=nano", "max_steps=1"]
    options += ["init_from="] if stage != "pt" else []
    if stage == "grpo":
        Path("reward.py").write_text("def one(messages, answer, extra):\n    return 1.0\n")
        options += ["reward_function=reward.py:one", "rollout.group=2"]
    options += ["val="] if stage == "embed" else []
    refused = RUNNER.invoke(app, ["train", stage, "--dry-run", *options])
    assert isinstance(refused.exception, DataError), refused.output
    assert "3 of 33 records cannot be read" in str(refused.exception)
    assert "data.jsonl:31" in str(refused.exception)
    assert "data.jsonl: 33 records, 30 kept, 3 not read" in refused.output
    allowed = RUNNER.invoke(app, ["train", stage, "--dry-run", "--allow-unread", *options])
    assert allowed.exit_code == 0, allowed.output
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
