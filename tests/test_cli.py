"""The commands as a user types them: from text to answers, and error messages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from khaosz import __version__
from khaosz.cli import app
from khaosz.errors import KhaoszError


def khaosz(*arguments: str | Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "khaosz", *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", timeout=180,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr
    assert "Traceback" not in done.stderr
    return done


def one_json_line(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A directory written by tokenizer train, data prepare and train."""
    root = tmp_path_factory.mktemp("cli")
    khaosz("tokenizer", "train", corpus_file, "--vocab-size", "700", "--out", root / "tok")
    prepare = ["data", "prepare", corpus_file, "--tokenizer", root / "tok", "--out", root / "data"]
    report = one_json_line(khaosz(*prepare, "--val-fraction", "0.1", "--json"))
    assert isinstance(report["inputs"], list) and not report["already_prepared"]
    khaosz(
        "train", "recipes/pt.toml", f"data={root / 'data'}", f"out={root / 'run'}", "max_steps=4",
        "model.hidden_size=32", "model.num_hidden_layers=1", "model.intermediate_size=48",
        "model.head_dim=16", "window=64", "batch_tokens=512", "compile=off", "eval_tokens=500",
    )  # fmt: skip
    return root


def test_eval_generate_show(trained: Path, corpus_file: Path) -> None:
    model = trained / "run" / "last"
    score = one_json_line(khaosz("eval", "bpb", model, corpus_file, "--limit", "20", "--json"))
    assert {"bits_per_byte", "bytes", "tokens", "by_lang"} <= score.keys()
    assert isinstance(score["by_lang"], dict) and {"zh", "en"} == score["by_lang"].keys()
    options = ["--max-tokens", "12", "--temperature", "0.7", "--seed", "3", "--json"]
    first = one_json_line(khaosz("generate", model, "--prompt", "中国", *options))
    assert first == one_json_line(khaosz("generate", model, "--prompt", "中国", *options))
    assert first.keys() == {"text", "tokens", "finish_reason"}
    for seed in ("-1", str(2**64), "9" * 400):
        refused = khaosz("generate", model, "--prompt", "x", "--seed", seed, ok=False)
        assert refused.returncode == 1 and refused.stderr.startswith("error: seed must be ")
        assert refused.stderr.count("\n") == 1
    answer = one_json_line(khaosz("generate", model, "--chat", "你好 <|end|>", *options))
    assert answer["finish_reason"] in ("stop", "length")
    records = khaosz("data", "show", trained / "data", "-n", "2")
    assert "bos" in records.stdout
    assert "shards verified" in khaosz("data", "verify", trained / "data").stdout
    report = one_json_line(khaosz("doctor", "--json"))
    assert report["device"] and report["devices"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["train", "nowhere.toml"], "recipe not found", "demo, dpo"),
        (["train", "recipes/pt.toml", "lrr=1"], "unknown key 'lrr'", "did you mean 'lr'"),
        (["train", "recipes/pt.toml", "size=nanoo"], "size must be one of", ""),
        (["train", "recipes/pt.toml", "data=gone.jsonl"], "gone.jsonl", ""),
        (["generate", "./nowhere", "--prompt", "x"], "model directory not found", "training"),
        (["generate", "nowhere", "--prompt", "x"], "model 'nowhere' not found", "khaosz models"),
        (["generate", "./nowhere"], "--prompt", ""),
        (["chat", "--url", "http://127.0.0.1:9/v1", "--deterministic"], "--url", "the server"),
        (["eval", "bpb", "nowhere", "x.jsonl"], "model directory not found", ""),
        (["data", "get", "everything"], "not found", "demo"),
        (["tokenizer", "train", "gone.txt", "--out", "t"], "gone.txt", ""),
        (["demo", "--minutes", "0"], "--minutes must be", ""),
    ],
)
def test_user_error_is_one_line_and_exit_1(
    arguments: list[str], message: str, hint: str, tmp_path: Path
) -> None:
    if arguments[0] == "train" and len(arguments) > 2:
        arguments = [*arguments, f"out={tmp_path / 'run'}"]
    done = khaosz(*arguments, ok=False)
    assert done.returncode == 1
    assert message in done.stderr and hint in done.stderr
    assert done.stderr.startswith("error: ") and done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["serve", "--memory-limit", value], "--memory-limit is")
            for value in ("nan", "inf", "-1")
        ),
        (["chat", "--seed", str(2**64)], "seed must be"),
        (["chat", "--temperature", "nan"], "temperature must be"),
    ],
)
def test_values_are_checked_before_the_model(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    command, *options = arguments
    result = CliRunner().invoke(app, [command, str(tmp_path / "no_model"), *options])
    assert isinstance(result.exception, KhaoszError) and message in str(result.exception)


def test_version_and_short_help() -> None:
    assert khaosz("--version").stdout == f"khaosz {__version__}\n"
    short, long = (khaosz("rag", "add", option).stdout for option in ("-h", "--help"))
    assert short == long and "--kb" in short


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    """The script for the shell, and what it gets for `khaosz da<Tab>`."""
    result = CliRunner().invoke(app, ["--show-completion", shell], prog_name="khaosz")
    if result.exit_code == 0:  # some versions of typer detect the shell only
        assert "_KHAOSZ_COMPLETE" in result.output
    words = {"_KHAOSZ_COMPLETE": f"complete_{shell}", "COMP_WORDS": "khaosz da", "COMP_CWORD": "1"}
    words |= {"_TYPER_COMPLETE_ARGS": "khaosz da", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    result = CliRunner().invoke(app, [], prog_name="khaosz", env=words)
    assert "data" in result.output and "chat" not in result.output


def test_truncated_model(trained: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(trained / "run" / "last", tmp_path / "m")
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = khaosz("generate", tmp_path / "m", "--prompt", "x", ok=False)
    assert "broken or cut short" in done.stderr


def test_old_spelling_of_prompt_lookup(trained: Path) -> None:
    model = trained / "run" / "last"
    command = ["generate", model, "--prompt", "a a a", "--max-tokens", "8", "--json"]
    command += ["--temperature", "0"]
    expected = one_json_line(khaosz(*command))
    for option in ("--prompt-lookup", "--lookup"):
        assert one_json_line(khaosz(*command, option)) == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["generate", "{m}", "--prompt", "a", "--json-schema", "none.json"],
            "--json-schema none.json: no",
        ),
        (
            ["generate", "{m}", "--prompt", "a", "--json-schema", "."],
            "--json-schema .: is a directory",
        ),
        (
            ["generate", "{m}", "--prompt", "a", "--json-schema", "binary"],
            "--json-schema binary: not a text",
        ),
        (["eval", "bpb", "{m}", "none"], "input none does not exist"),
        (["chat", "{m}", "--docs", "none.kb"], "knowledge base none.kb not found"),
        (["rag", "add", "binary", "--kb", "binary/x/kb"], "binary/x/kb cannot be used: binary"),
    ],
)
def test_missing_files_are_named_in_one_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("binary").write_bytes(b"\xff\xfe\xfd")
    model = str(trained.resolve() / "run/last")
    done = CliRunner().invoke(app, [argument.format(m=model) for argument in arguments])
    assert isinstance(done.exception, KhaoszError) and said in str(done.exception)
    assert "Errno" not in str(done.exception) and "memory: " not in done.output
