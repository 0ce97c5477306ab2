"""Commands for models by name: pull, and models list, show and remove."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from khaosz.cli.output import Json, print_json, print_result, progress_console, say

if TYPE_CHECKING:
    from khaosz.interop.fetch.catalogue import Entry
    from khaosz.interop.gguf.model import GgufModel

pull_app = typer.Typer()
models_app = typer.Typer(help="List models by name; show or remove those that are here.")


@pull_app.command()
def pull(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Name (see `khaosz models`), hf:OWNER/NAME[:QUANT|/FILE][@REVISION], ms:..., or a"
            " local path; default: propose one.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Only this source of a name: hf, ms, pip, a folder or an address.",
            envvar="KHAOSZ_MODEL_SOURCE",
        ),
    ] = None,
) -> None:
    """Download an open model, or import a local one."""
    if name is None and (name := _proposed(source)) is None:
        return
    path = _fetch(name, source)
    from khaosz.interop.models import default_name

    say(f"{path}\n{_next_step(_short(default_name(path), path), path)}")


def _fetch(name: str, source: str | None) -> Path:
    """Pull a model and show how far it is."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    from khaosz.interop.fetch.pull import pull as pull_model

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=progress_console()) as bars:
        tasks: dict[str, Any] = {}

        def show(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total or None)
            bars.update(tasks[file], completed=done, total=total or None)

        def note(line: str) -> None:
            bars.print(line, highlight=False, markup=False)

        return pull_model(name, show, note=note, source=source, memory_of=_memory)


def chosen_model(*, ask: bool = False) -> Path:
    """The model that was trained or pulled last. Where there is none, and `ask` on a terminal, one
    of the catalogue is pulled if the user agrees. Raises `ModelError`, with the command that pulls
    one."""
    from khaosz.errors import ModelError
    from khaosz.interop.local_models import default_model

    with suppress(ModelError):
        return default_model()
    if ask and sys.stdin.isatty() and sys.stdout.isatty():
        say("No model is on this machine yet. / 本机还没有模型。")
        if (name := _proposed(None)) is not None:
            return _fetch(name, None)
    pull_it = f"khaosz pull {_suited()}"
    raise ModelError("no model found on this machine", hint=f"{pull_it}, or train one: khaosz demo")


def _suited() -> str:
    """A name of the catalogue for this machine, without asking the network."""
    from khaosz.interop.fetch.propose import fitting
    from khaosz.memory.machine import memory_limits

    free = min((limit.free for limit in memory_limits()), default=None)
    return next((entry.name for entry in fitting(free)), "NAME")


def _next_step(name: str, path: Path) -> str:
    from khaosz.interop.fetch.catalogue import entry_of
    from khaosz.interop.fetch.store import record_of
    from khaosz.interop.retrieval import is_encoder

    record = record_of(path)
    entry = None if record is None else entry_of(record.name)
    kind = "embedder" if entry is None and is_encoder(path) else entry and entry.kind
    match kind:
        case "embedder":
            return f"Search with it:  khaosz rag add FILES --embedder {name}"
        case "reranker":
            return f"Rank with it:  khaosz rag search QUERY --reranker {name}"
    return f"Start a chat:  khaosz chat {name}"


def _short(name: str, path: Path) -> str:
    from khaosz.errors import ModelError
    from khaosz.interop.local_models import find_model

    try:
        return name if find_model(name) == path else str(path)
    except ModelError:
        return str(path)


def _memory(model: GgufModel) -> int:
    from khaosz.inference.generator import chat_memory

    return chat_memory(model)[0].total


def _proposed(source: str | None) -> str | None:
    """The name of the catalogue that suits this machine, if the user agrees to it."""
    from khaosz.interop.fetch.propose import propose
    from khaosz.memory.machine import memory_limits

    free = min((limit.free for limit in memory_limits()), default=None)
    proposal = propose(source, free)
    say(proposal.reason)
    if not sys.stdin.isatty():
        say(f"khaosz pull {proposal.entry.name}")
        return None
    return proposal.entry.name if typer.confirm(f"Pull {proposal.entry.name}?") else None


@models_app.callback(invoke_without_command=True)
def models(ctx: typer.Context, as_json: Json = False) -> None:
    """List the models that have a name, and which of them are here."""
    if ctx.invoked_subcommand is not None:
        return
    from khaosz.interop.fetch.catalogue import catalogue

    rows = [_row(entry) for entry in catalogue().values()]
    if as_json:
        print_json(rows)
        return
    lines = [("NAME", "FOR", "SIZE", "MEMORY", "HERE", "LANGUAGES", "LICENCE")]
    for row in rows:
        memory = f"{row['memory'] / 1e9:.1f} GB{'' if row['memory_is_whole'] else ' +'}"
        lines.append(
            (row["name"], row["kind"], f"{row['bytes'] / 1e9:.2f} GB", memory, row["here"],
             row["languages"], row["licence"])
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join(cells).rstrip())
    say("\nMEMORY: with 4,096 tokens of context; +: and what their keys and values take.")
    say("`khaosz pull NAME` fetches one, `khaosz models list` shows what is on this machine.")


def _row(entry: Entry) -> dict[str, Any]:
    import importlib.util

    from khaosz.interop.fetch.pull import entry_path
    from khaosz.interop.gguf.architectures import READABLE

    if entry.package is not None:
        here = "yes" if importlib.util.find_spec(entry.package) else "no"
    elif entry.architecture not in READABLE:
        here = "unsupported"
    else:
        here = "yes" if entry_path(entry) is not None else "no"
    return {
        "name": entry.name, "kind": entry.kind, "bytes": entry.bytes, "memory": entry.memory,
        "memory_is_whole": entry.cache_mb is not None, "licence": entry.licence,
        "languages": entry.languages, "context": entry.context, "thinking": entry.thinking,
        "sampling": dict(entry.sampling), "sampling_thinking": dict(entry.sampling_thinking),
        "sha256": entry.sha256, "confirmed": entry.confirmed,
        "here": here,
    }  # fmt: skip


@models_app.command("list")
def list_(as_json: Json = False) -> None:
    """List the models on this machine: trained, pulled, and GGUF files of Ollama, LM Studio and the
    Hugging Face cache, which are used where they lie."""
    from khaosz.interop.fetch.elsewhere import models_elsewhere
    from khaosz.interop.fetch.store import pulled_models
    from khaosz.interop.local_models import RUNS, trained_models
    from khaosz.interop.models import default_name

    found: list[tuple[str, str, Path]] = []
    found += [(default_name(path), "trained", path) for path in trained_models(RUNS)]
    found += [(default_name(path), "pulled", path) for path in pulled_models()]
    found += [(name, name.partition("/")[0], path) for name, path in models_elsewhere().items()]
    rows = [_local_row(*each) for each in found]
    text = "\n".join(
        f"{row['name']:40} {row['origin']:9} {row['bytes'] / 1e9:6.2f} GB  {_needs(row):22}"
        f" {row['path']}"
        for row in rows
    )
    print_result(as_json, rows, text or "none; `khaosz pull` proposes one")


def _needs(row: dict[str, Any]) -> str:
    return row["problem"] or f"needs {row['memory'] / 1e9:.1f} GB"


def _local_row(name: str, origin: str, path: Path) -> dict[str, Any]:
    """What a local model takes, or why it can't be used."""
    from khaosz.errors import KhaoszError
    from khaosz.inference.generator import chat_memory
    from khaosz.interop.models import open_model

    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    row: dict[str, Any] = {
        "name": name, "origin": origin, "path": str(path),
        "bytes": sum(each.stat().st_size for each in files), "memory": None, "problem": None,
    }  # fmt: skip
    try:
        source = open_model(path)
        memory, context = chat_memory(source)
        row["parameters"] = source.config.parameters()
        if source.config.num_experts is not None:
            row["active_parameters"] = source.config.active_parameters()
        row |= {"memory": memory.total, "memory_parts": memory.parts, "memory_context": context}
    except KhaoszError as error:
        row["problem"] = f"not usable: {str(error).removeprefix(f'{path}: ')}"
    return row


@models_app.command()
def show(name: Annotated[str, typer.Argument(help="Name or path.")], as_json: Json = False) -> None:
    """Show what is known about a model, whether it is here or not."""
    from khaosz.interop.fetch.catalogue import entry_of
    from khaosz.interop.fetch.store import record_of
    from khaosz.interop.local_models import find_model
    from khaosz.interop.models import default_name

    entry = entry_of(name)
    values: dict[str, Any] = {} if entry is None else _row(entry)
    if entry is not None:
        values |= {
            "file": entry.file, "revision": entry.revision, "huggingface": entry.huggingface,
            "modelscope": entry.modelscope,
            "packages": entry.packages and f"{entry.packages.prefix}... {entry.packages.version}",
        }  # fmt: skip
    if entry is None or (values["here"] == "yes" and entry.file):
        path = find_model(name)
        values |= _local_row(default_name(path), "local", path)
        if (record := record_of(path)) is not None:
            values |= {
                "origin": record.source, "reference": record.reference,
                "revision": record.revision, "licence": record.licence, "files": record.files,
            }  # fmt: skip
    shown = {key: value for key, value in values.items() if value not in (None, "", {})}
    print_result(
        as_json,
        shown,
        "\n".join(f"{key:16} {_text(key, value)}" for key, value in shown.items()),
    )


def _text(key: str, value: Any) -> str:
    if key == "memory_parts":
        from khaosz.memory.parts import Memory

        return Memory(value).sum()
    if isinstance(value, dict):
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@models_app.command()
def remove(name: Annotated[str, typer.Argument(help="Name of a pulled model.")]) -> None:
    """Remove a pulled model. Trained models and those of other programs are not touched."""
    from khaosz.errors import ModelError
    from khaosz.interop.fetch.store import pulled_models, remove_model
    from khaosz.interop.local_models import find_model

    path = find_model(name)
    if path not in pulled_models():
        raise ModelError(
            f"{path} was not pulled", hint="remove it with the program it belongs to, or by hand"
        )
    say(f"removed {path}: {remove_model(path) / 1e9:.2f} GB")
