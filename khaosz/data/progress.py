"""A progress bar for preparation: share of the input read, documents, tokens, rate, time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from khaosz.data.prepare import PrepareProgress


@contextmanager
def shown_progress(console: Console) -> Iterator[Callable[[PrepareProgress], None]]:
    """A callback for `prepare` that moves a bar on `console` while the block runs."""
    columns = (
        TextColumn("preparing {task.fields[file]}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, file="", counts="")

        def show(now: PrepareProgress) -> None:
            rate = now.tokens / now.seconds if now.seconds else 0.0
            bar.update(
                task,
                completed=now.file_bytes,
                total=now.total_bytes,
                file=now.path.name,
                counts=f"{now.documents:,} documents, {now.tokens:,} tokens, {rate:,.0f}/s",
            )

        yield show
