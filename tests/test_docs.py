"""The documents say what the program does: commands, options, keys, defaults, sizes, links."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic.fields import FieldInfo
from tiny_models import tiny_model
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.config import (
    ColumnsConfig,
    EmbedConfig,
    LoRAConfig,
    ModelConfig,
    ParallelConfig,
    PreferenceConfig,
    RewardConfig,
    RolloutConfig,
    ScheduleConfig,
    TrainConfig,
    load_stages,
    preset,
)
from khaosz.config.closed import Closed
from khaosz.data.tokenizer import load_tokenizer
from khaosz.interop.huggingface import save_model

ROOT = Path(__file__).parent.parent
GUIDES = (
    "alignment.md",
    "architecture.md",
    "chat.md",
    "data.md",
    "deploy.md",
    "gguf.md",
    "inference.md",
    "models.md",
    "page.md",
    "quickstart.md",
    "rag.md",
    "serve.md",
    "tokenizer.md",
    "tools.md",
    "training.md",
)
READMES = (ROOT / "README.md", ROOT / "README.zh-CN.md")
PAIRS = [READMES] + [(ROOT / "docs/en" / name, ROOT / "docs/zh" / name) for name in GUIDES]
PAGES = [path for pair in PAIRS for path in pair]
PAGES += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "docs/commands.md")]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^(#+) ", re.MULTILINE)
# A command line: at the start of a line, a path or a code span, or behind -m.
_COMMAND = re.compile(r"(?:^|[`/]|-m |&& )khaosz ([a-z][^`\n]*)", re.MULTILINE)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def prose(path: Path) -> str:
    """A page without its fenced code and its comments."""
    return _COMMENT.sub("", _FENCE.sub("", read(path)))


def command_lines(path: Path) -> list[list[str]]:
    """The words after `khaosz` of every command that a page shows, comments removed."""
    return [shlex.split(line, comments=True) for line in _COMMAND.findall(read(path))]


@cache
def verbs() -> dict[str, Any]:
    module = runpy.run_path(str(ROOT / "docs" / "__main__.py"), run_name="docs_page")
    return {verb.name: verb for verb in module["verbs"]()}


def complaint(words: list[str]) -> str | None:
    """What is wrong with a shown command, or None."""
    for length in (2, 1):
        verb = verbs().get(" ".join(words[:length]))
        if verb is not None:
            break
    else:
        groups = {known.split()[0] for known in verbs()}
        whole = words[0] in groups and len(words) == 1  # "`khaosz data` ..." in a sentence
        return None if whole else f"no verb '{' '.join(words[:2])}'"
    known = {spelt for p in verb.parameters if p.is_option for spelt in p.names} | {"--help", "-h"}
    for word in words[length:]:
        if word.startswith("-") and word not in known:
            return f"{verb.name} has no option {word}"
        key, equals, _ = word.partition("=")
        first = key.split(".")[0]
        if verb.name == "train" and equals and word != "[key=value":
            keys = {*TrainConfig.model_fields, "pt", "sft"}
            if first not in keys:
                return f"train knows no key {key}"
    return None


def test_generated_pages_are_current() -> None:
    command = [sys.executable, "-m", "docs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stale_pages_are_noticed_and_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sized = [*READMES, ROOT / "docs/en/training.md", ROOT / "docs/zh/training.md"]
    for path in [*sized, ROOT / "docs/__main__.py"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(read(path), encoding="utf-8", newline="\n")
    main = runpy.run_path(str(tmp_path / "docs/__main__.py"), run_name="docs_page")["main"]
    assert main(["--check"]) == 1  # commands.md is missing
    assert main([]) == 0 and main(["--check"]) == 0
    changes = [(tmp_path / "docs/commands.md", "--seed", "--sead")]
    count = f"{preset('nano').model.parameters():,}"
    changes += [(tmp_path / readme.name, count, "7") for readme in READMES]
    changes += [(tmp_path / "docs/zh/training.md", f"{preset('13b').lr:g} /", "9 /")]
    for path, right, wrong in changes:
        before = read(path)
        assert right in before
        path.write_text(before.replace(right, wrong), encoding="utf-8", newline="\n")
        capsys.readouterr()
        assert main(["--check"]) == 1
        assert capsys.readouterr().err == f"{path.name} is out of date: run `python -m docs`\n"
        assert main([]) == 0 and read(path) == before
    assert main(["--chekc"]) == 2


def test_the_page_names_every_verb_and_option_as_the_help_does() -> None:
    # The page is made from signatures; the help is typer's own reading of them.
    runner = CliRunner()
    for verb in verbs().values():
        result = runner.invoke(app, [*verb.name.split(), "--help"], env={"COLUMNS": "200"})
        assert result.exit_code == 0, verb.name
        shown = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.output.partition("Options:")[2]))
        mine = {spelt for p in verb.parameters if p.is_option for spelt in p.names}
        assert mine <= shown, f"{verb.name}: {mine - shown} not in --help"
        spelt_first = {
            re.findall(r"--?[a-z][\w-]*", line)[0]
            for line in result.output.partition("Options:")[2].splitlines()
            if re.match(r"  -", line)
        }
        assert spelt_first <= mine | {"-h"}, f"{verb.name}: {spelt_first - mine} not listed"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_shown_commands_exist(path: Path) -> None:
    wrong = [
        f"khaosz {' '.join(words)}: {why}"
        for words in command_lines(path)
        if (why := complaint(words)) is not None
    ]
    assert not wrong, "\n".join(wrong)


def test_wrong_commands_are_noticed() -> None:
    assert complaint(["trian", "recipes/pt.toml"])
    assert complaint(["data", "shwo", "x"])
    assert complaint(["generate", "MODEL", "--promt", "x"])
    assert complaint(["train", "recipes/pt.toml", "learning_rate=1"])
    assert complaint(["train", "recipes/pt.toml", "pt.lr=1", "--resume"]) is None
    assert sum(len(command_lines(path)) for path in PAGES) > 50  # the pattern finds them


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_relative_links_resolve(path: Path) -> None:
    for target in _LINK.findall(prose(path)):
        if "://" not in target:
            file = (path.parent / target.partition("#")[0]).resolve()
            assert file.exists(), f"{name(path)} links to {target}"


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_have_the_same_shape(pair: tuple[Path, Path]) -> None:
    english, chinese = pair
    levels = [[len(marks) for marks in _HEADING.findall(prose(path))] for path in pair]
    assert levels[0] == levels[1] and len(levels[0]) > 3
    rows = [len(re.findall(r"^\|", prose(path), re.MULTILINE)) for path in pair]
    assert rows[0] == rows[1], "tables of different length"
    code = [[block for lang, block in _FENCE.findall(read(p)) if lang == "python"] for p in pair]
    assert code[0] == code[1], "different Python examples"
    hanzi = len(re.findall(r"[\u4e00-\u9fff]", read(chinese)))
    assert hanzi > 300, f"{name(chinese)} is hardly Chinese"
    assert english.name != chinese.name or english.parent != chinese.parent


def test_both_languages_have_the_same_guides() -> None:
    for language in ("en", "zh"):
        assert sorted(p.name for p in (ROOT / "docs" / language).iterdir()) == list(GUIDES)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_key_stands_there_with_its_default(language: str) -> None:
    required = {"en": "required", "zh": "必填"}[language]
    table = {"en": "table", "zh": "表"}[language]

    def default(field: FieldInfo) -> str:
        if field.is_required():
            return required
        value = field.get_default(call_default_factory=True)
        if isinstance(value, Closed):
            return table
        return f"`{'-' if value is None else json.dumps(value)}`"

    for page, owners in {
        "training.md": (TrainConfig, ScheduleConfig, ParallelConfig, EmbedConfig),
        "data.md": (ColumnsConfig,),
        "models.md": (ModelConfig,),
        "alignment.md": (LoRAConfig, RewardConfig, PreferenceConfig, RolloutConfig),
    }.items():
        text = read(ROOT / "docs" / language / page)
        for owner in owners:
            for key, field in owner.model_fields.items():
                row = f"| `{key}` | {default(field)} |"
                assert row in text, f"docs/{language}/{page} lacks {row}"


def test_recipes_in_the_guides_are_valid(tmp_path: Path) -> None:
    blocks = [b for lang, b in _FENCE.findall(read(ROOT / "docs/en/training.md")) if lang == "toml"]
    assert blocks
    for block in blocks:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(block, encoding="utf-8")
        assert [config.stage for config in load_stages(recipe)] == ["pt", "sft"]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/en/chat.md", "docs/en/models.md", "docs/en/tokenizer.md"]
)
def test_python_examples_run(
    page: str,
    tmp_path: Path,
    tokenizer_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The examples speak of the demo's model; a tiny one with random weights stands at its place.
    tokenizer = load_tokenizer(tokenizer_dir)
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    directory = tmp_path / "runs/demo/dpo/last"
    save_model(model, directory, eos_ids=[tokenizer.eos_id, tokenizer.end_id])
    tokenizer.save(directory)
    monkeypatch.chdir(tmp_path)
    blocks = [b for lang, b in _FENCE.findall(read(ROOT / page)) if lang == "python"]
    blocks = [block for block in blocks if "transformers" not in block]  # test_interop has those
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {"__name__": "example"})
    assert capsys.readouterr().out


def test_samples_stand_where_training_is_explained() -> None:
    for path in READMES:
        assert "samples:begin" not in read(path), name(path)
    for path in (ROOT / "docs/en/training.md", ROOT / "docs/zh/training.md"):
        begin, end = (read(path).find(f"<!-- samples:{mark} -->") for mark in ("begin", "end"))
        assert 0 < begin < end, name(path)
