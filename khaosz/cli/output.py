"""Arguments and options that several commands share, and how results and progress are printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from khaosz.interop.local_models import named_path

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, npu, mps, xpu or auto.")]
ModelPath = Annotated[
    Path,
    typer.Argument(
        help="Model directory, .gguf file or name; see `khaosz models`.",
        parser=named_path,
        metavar="MODEL",
    ),
]
OutFolder = Annotated[Path, typer.Option(help="Output directory.")]
Window = Annotated[int | None, typer.Option(help="Tokens; default: the training length.")]
Temperature = Annotated[float, typer.Option(help="0: greedy.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum new tokens.")]
AllowUnread = Annotated[
    bool,
    typer.Option("--allow-unread", help="Continue if over 1 % of the records cannot be read."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help="NAME=COLUMN as in [columns] of a recipe, such as prompt=ask; repeatable."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Maximum tokens of prompt and answer; default: the model's, as far as memory allows.",
        min=1,
        show_default=False,
    ),
]
NoMemoryCheck = Annotated[
    bool, typer.Option("--no-memory-check", help="Start even if the memory seems too small.")
]
TopP = Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")]


# What a model, a server, a document or a file name may hold and a terminal would obey: control
# characters, and marks that reverse the order in which text is shown.
_SHOWN = {
    **{code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{
        code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
        for code in (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
}


def printable(text: str) -> str:
    """A text as a terminal may get it: control characters are shown, not obeyed."""
    return text.replace("\r\n", "\n").translate(_SHOWN)


def say(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print a text; on a terminal as `printable` has it, in a file or a pipe as it is."""
    stream = sys.stderr if err else sys.stdout
    typer.echo(printable(str(text)) if stream.isatty() else str(text), err=err, nl=nl)


_UsageError: Any = typer.BadParameter.__bases__[0]  # which typer does not export


class PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class PrintableGroup(typer.core.TyperGroup):
    """Commands whose usage errors quote arguments, such as file names, as `printable` has them."""

    def make_context(self, *args: Any, **more: Any) -> Any:
        with _printable_errors():
            return super().make_context(*args, **more)

    def invoke(self, ctx: Any) -> Any:
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


def open_console(**options: Any) -> Any:
    """A rich `Console` that shows the control characters of what it prints."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                if segment.control:
                    yield segment  # rich's own: cursor movements of a progress bar
                else:
                    yield Segment(printable(segment.text), segment.style)

    return SafeConsole(**options)


def progress_console() -> Any:
    # In a log file or a pipe, long lines are not wrapped.
    return open_console(stderr=True, soft_wrap=not sys.stderr.isatty())


def resolve_device(name: str) -> str:
    """The device that `auto` stands for. Raises `ConfigError`, `DeviceError`."""
    from khaosz.config import ParallelConfig
    from khaosz.parallel import setup_parallel

    config = ParallelConfig.parse({"device": name}, source="--device")
    return str(setup_parallel(config).device)


def parse_columns(entries: list[str] | None) -> Any:
    """The `ColumnsConfig` of `--column` options, or None. Raises `ConfigError`."""
    from khaosz.config import ColumnsConfig, parse_overrides

    values: dict[str, Any] = {}
    for key, value in parse_overrides(entries or []).items():
        table, dot, name = key.partition(".")
        (values.setdefault(table, {}) if dot else values)[name or table] = value
    return ColumnsConfig.parse(values, source="--column") if values else None


def print_notes(lines: Iterable[str]) -> None:
    """Print `lines` on standard error."""
    for line in lines:
        say(line, err=True)


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `ConfigError` for a value that is not one of `choices`."""
    from khaosz.errors import ConfigError, did_you_mean

    if value not in choices:
        hint = did_you_mean(value, choices, f"choose {' | '.join(choices)}")
        raise ConfigError(f"--{option} {value} is unknown", hint=hint)


def print_result(as_json: bool, values: Any, text: str) -> None:
    """Print `values` as JSON, or `text` for people, which may be empty."""
    if as_json:
        print_json(values)
    elif text:
        say(text)


def print_json(values: Any) -> None:
    from khaosz.files import finite

    say(json.dumps(finite(values), ensure_ascii=False, default=str))
