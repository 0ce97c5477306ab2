"""What the verbs share: where progress goes, how an answer is printed, what an option means."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on standard output.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, npu, mps, xpu or auto.")]


def progress_console() -> Any:
    from rich.console import Console

    # A log file or a pipe gets whole lines, however long.
    return Console(stderr=True, soft_wrap=not sys.stderr.isatty())


def chosen_device(name: str) -> str:
    from khaosz.config import ParallelConfig
    from khaosz.parallel import setup_parallel

    config = ParallelConfig.parse({"device": name}, source="--device")
    return str(setup_parallel(config).device)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    from khaosz.errors import ConfigError, nearest

    if value not in known:
        guess = nearest(value, known) or " | ".join(known)
        raise ConfigError(f"--{name} {value} is unknown", hint=f"did you mean {guess}?")


def plain(report: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(report)


def answer(as_json: bool, values: dict[str, Any], text: str) -> None:
    if as_json:
        print_json(values)
    else:
        typer.echo(text)


def print_json(values: dict[str, Any]) -> None:
    typer.echo(json.dumps(values, ensure_ascii=False, default=str))
