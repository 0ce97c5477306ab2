"""The `khaosz` command. Heavy modules are imported inside the commands, to keep `--help` fast."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from khaosz import __version__
from khaosz.cli.data import data_app, tokenizer_app
from khaosz.cli.inference import bench_app, model_app
from khaosz.cli.models import models_app, pull_app
from khaosz.cli.output import PrintableFormatter, PrintableGroup, printable, say
from khaosz.cli.preference import preference_app
from khaosz.cli.rag import rag_app
from khaosz.cli.training import eval_app, lora_app, training_app
from khaosz.errors import KhaoszError, one_line

app = typer.Typer(
    help="A private, local, bilingual language model: train it, align it, talk to it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
    cls=PrintableGroup,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(training_app)
app.add_typer(eval_app, name="eval")
app.add_typer(preference_app, name="preference")
app.add_typer(lora_app, name="lora")
app.add_typer(model_app)
app.add_typer(bench_app, name="bench")
app.add_typer(pull_app)
app.add_typer(models_app, name="models")
app.add_typer(rag_app, name="rag")


def _show_version(shown: bool) -> None:
    if shown:
        say(f"khaosz {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """A `KhaoszError` is printed as one line and a hint; the exit status is 1. The entry point is
    `khaosz.__main__.main`, which handles signals."""
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if hasattr(stream, "reconfigure"):  # a Windows console may not use UTF-8
            stream.reconfigure(encoding="utf-8", errors=errors)
    if sys.stderr.isatty() and logging.lastResort is not None:  # it prints what packages log
        logging.lastResort.setFormatter(PrintableFormatter())
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # else the interpreter reports a full disk when it ends
    except KhaoszError as error:
        _fail(f"error: {error}", error.hint)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = f" ({one_line(str(error))})" if str(error) else ""
        hint = "use a smaller model, batch or context, or close other programs"
        _fail(f"error: out of memory{reason}", hint)
    except OSError as error:
        from khaosz.files import disk_error, disk_hint

        try:
            sys.stdout.flush()
        except OSError:
            with suppress(OSError):
                sys.stdout.close()
        _fail(f"error: {disk_error(error)}", disk_hint(error))


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch and safetensors raise RuntimeError where an allocation fails."""
    words = "allocate memory", "not enough memory", "unable to mmap", "out of memory"
    return isinstance(error, MemoryError) or any(one in str(error).lower() for one in words)


def _fail(message: str, hint: str | None) -> NoReturn:
    print(printable(message), file=sys.stderr)
    if hint:
        print(printable(f"hint: {hint}"), file=sys.stderr)
    sys.exit(1)
