"""`python -m docs` writes docs/commands.md and the size tables; `--check` only compares.

The sizes in the READMEs and the training guides are those of the presets. The page of commands is
made from the annotated functions of `khaosz.cli` rather than from the printed help, whose layout
changes with the version of typer and the width of the terminal.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Typer
from typer.models import ArgumentInfo, OptionInfo

from khaosz.cli import app
from khaosz.config import SIZES, preset

DOCS = Path(__file__).parent
PAGE = DOCS / "commands.md"
_HEAD = """\
# Commands

Written by `python -m docs` from the program itself; `khaosz VERB --help` says the same.
`python -m khaosz` equals `khaosz`. Where a verb has `--json`, it prints exactly one line of JSON on
standard output. Logs, progress and errors go to standard error. A mistake in what you asked for is
one line, a hint and exit status 1; a command line that cannot be parsed exits with 2.
"""


@dataclass(frozen=True)
class Parameter:
    """An argument (`names`: its placeholder) or an option (`names`: its spellings)."""

    names: tuple[str, ...]
    is_option: bool
    help: str
    default: str | None  # None: required


@dataclass(frozen=True)
class Verb:
    """A command as typed after `khaosz`, what it does, and its parameters in order."""

    name: str
    help: str
    parameters: list[Parameter]


def verbs(group: Typer = app, prefix: str = "") -> Iterator[Verb]:
    """Every verb of the command line, groups depth first, in the order of definition."""
    for command in group.registered_commands:
        callback = command.callback
        assert callback is not None
        name = command.name or callback.__name__.replace("_", "-")
        doc = inspect.cleandoc(callback.__doc__ or "")
        yield Verb(f"{prefix}{name}", " ".join(doc.split()), list(_parameters(callback)))
    for member in group.registered_groups:
        assert member.typer_instance is not None
        named = f"{member.name} " if isinstance(member.name, str) else ""  # or verbs of no group
        yield from verbs(member.typer_instance, f"{prefix}{named}")


def _parameters(callback: Callable[..., Any]) -> Iterator[Parameter]:
    hints = get_type_hints(callback, include_extras=True)
    for name, parameter in inspect.signature(callback).parameters.items():
        hint = hints[name]
        assert get_origin(hint) is Annotated, f"{callback.__name__}: {name} is not annotated"
        kind, info = get_args(hint)
        default = _default(parameter.default)
        if isinstance(info, ArgumentInfo):
            many = "list" in str(kind)
            shown = name.upper() + (" ..." if many else "")
            yield Parameter((shown,), False, info.help or "", default)
            continue
        assert isinstance(info, OptionInfo), f"{callback.__name__}: {name}"
        spelt = name.replace("_", "-")
        # Inside Annotated an option takes no default: typer stores its first name there.
        first = (info.default,) if isinstance(info.default, str) else ()
        names = (*first, *(info.param_decls or ()))
        if not names:
            # a switch without an explicit name also gets one that turns it off
            names = (f"--{spelt}", f"--no-{spelt}") if kind is bool else (f"--{spelt}",)
        yield Parameter(names, True, info.help or "", default)


def _default(value: Any) -> str | None:
    if value is inspect.Parameter.empty:
        return None
    if value is None:
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value.as_posix() if isinstance(value, Path) else str(value)


def render() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    for verb in verbs():
        usage = ["khaosz", verb.name]
        usage += ["[OPTIONS]"] if any(p.is_option for p in verb.parameters) else []
        for parameter in verb.parameters:
            if not parameter.is_option:
                shown = parameter.names[0]
                usage.append(shown if parameter.default is None else f"[{shown}]")
        lines = [f"## khaosz {verb.name}", "", verb.help, "", "```", " ".join(usage), "```"]
        if verb.parameters:
            lines += ["", "| | meaning | default |", "|---|---|---|"]
        for parameter in verb.parameters:
            names = " ".join(f"`{name}`" for name in parameter.names)
            default = {None: "required", "": ""}.get(parameter.default, f"`{parameter.default}`")
            lines.append(f"| {names} | {parameter.help} | {default} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def shape_row(size: str) -> str:
    """A row of the README's table of sizes."""
    m = preset(size).model
    cells = [size, f"{m.hidden_size:,}", str(m.num_hidden_layers)]
    cells.append(f"{m.num_attention_heads} / {m.num_key_value_heads}")
    numbers = (m.intermediate_size, m.vocab_size, m.max_position_embeddings, m.parameters())
    return f"| {' | '.join([*cells, *(f'{number:,}' for number in numbers)])} |"


def training_row(size: str) -> str:
    """A row of the training guide's table: the numbers of pretraining / fine-tuning."""
    pt, sft = preset(size), preset(size, stage="sft")
    cells = [size, f"{pt.window:,} / {sft.window:,}", f"{pt.batch_tokens:,} / {sft.batch_tokens:,}"]
    cells += [f"{pt.lr:g} / {sft.lr:g}", f"{pt.embedding_lr:g} / {sft.embedding_lr:g}"]
    return f"| {' | '.join(cells)} |"


TABLES: dict[Path, Callable[[str], str]] = {
    DOCS.parent / "README.md": shape_row,
    DOCS.parent / "README.zh-CN.md": shape_row,
    DOCS / "en" / "training.md": training_row,
    DOCS / "zh" / "training.md": training_row,
}


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated file, whole or only its rows of sizes, with its content."""
    yield PAGE, render()
    for path, row in TABLES.items():
        text = path.read_text(encoding="utf-8")
        for size in SIZES:
            pattern = rf"^\| {size} \|.*$"
            assert len(re.findall(pattern, text, re.MULTILINE)) == 1, f"{path}: no row of {size}"
            text = re.sub(pattern, row(size), text, flags=re.MULTILINE)
        yield path, text


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    stale = [
        (path, text)
        for path, text in pages()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in stale:
        if arguments:
            print(f"{path.name} is out of date: run `python -m docs`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(path)
    return 1 if stale and arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
