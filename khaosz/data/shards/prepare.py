"""Text files -> token shards, resumable: `khaosz data prepare`.

The main process reads raw batches and sends them to workers; results come back in input order, so
the shards do not depend on the number of workers. Only the main process writes. What a restart
needs (position, writers, hashes, report) is in one SQLite file and committed together, after the
shards are synced; a killed run resumes from the last commit.

    out/manifest.json                          written last: a directory without it is unfinished
    out/{split}-{source}-{lang}-{00000}.tok    shards
    out/tokenizer/                             the tokenizer that encoded them
    out/.prepare/                              state, removed at the end
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from khaosz.config import ColumnsConfig
from khaosz.data.records.learned import learned_chats
from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import InputReport, refuse_unread, usable_records, worst_reason
from khaosz.data.shards.dedup import PrepareState
from khaosz.data.shards.encode import record_stage
from khaosz.data.shards.manifest import PrepareReport, identity, read_manifest
from khaosz.data.shards.mmap import Stage
from khaosz.data.shards.writer import Preparation, PrepareProgress
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError
from khaosz.files import digest, disk_hint

_REFUSED = "refused"  # in the state: complete, but with too many unread records


def prepare(
    inputs: Iterable[str | Path],
    tokenizer: Tokenizer,
    out: str | Path,
    *,
    stage: Literal["pt", "sft", "auto"] = "auto",
    workers: int | None = None,
    val_fraction: float = 0.0,
    dedup: bool = True,
    shard_tokens: int = 1 << 28,
    progress: Callable[[PrepareProgress], None] | None = None,
    max_documents: int | None = None,
    columns: ColumnsConfig | None = None,
    allow_unread: bool = False,
) -> PrepareReport:
    """Tokenise `inputs` (files, directories, globs) into `out`, resuming an interrupted call.

    `workers` 0 works in this process; otherwise processes are spawned, so a script that calls this
    needs the usual `if __name__ == "__main__"`. A document belongs to "val" when its hash, read as
    a number in [0, 1), is below `val_fraction`: the same text always falls on the same side.

    A complete `out` is left as it is where its inputs were moved, touched or removed since; where
    they changed, it is another directory's.

    Raises DataError for inputs that cannot be read or have no usable record, for an `out` that
    holds something else, when the disk is full (finished work is kept), and without `allow_unread`
    when more than 1 % of the records cannot be read: the same call with it completes `out` at once.
    """
    if stage not in ("pt", "sft", "auto"):
        raise DataError(f"stage {stage!r} is unknown", hint="use pt, sft or auto")
    if not 0.0 <= val_fraction < 1.0:
        raise DataError(f"val_fraction is {val_fraction}, not in [0, 1)")
    if shard_tokens < 1 or (max_documents is not None and max_documents < 1):
        raise DataError("shard_tokens and max_documents must be at least 1")
    out, inputs = Path(out), list(inputs)
    try:
        paths = expand_inputs(inputs)
    except DataError:
        if not ((out / "manifest.json").exists() and prepared_from(out, *inputs)):
            raise
        paths = None
    if paths == []:
        raise DataError("no inputs", hint="give files, directories or globs")
    configuration: dict[str, Any] = {
        "inputs": [identity(path) for path in paths or []],
        "tokenizer": tokenizer.fingerprint,
        "stage": stage,
        "val_fraction": val_fraction,
        "dedup": dedup,
        "shard_tokens": shard_tokens,
        "max_documents": max_documents,
    }
    if columns is not None and any(vars(columns).values()):
        configuration["columns"] = columns.model_dump(exclude_defaults=True)
    if (finished := _finished_report(out, configuration, paths)) is not None:
        return finished
    assert paths is not None
    state = _open_state(out, configuration)
    try:
        run = Preparation(out, state, tokenizer, paths, configuration, progress, columns)
        if run.stage is None:
            run.stage = _choose_stage(stage, paths, columns)
        if run.stage == "sft":
            _require_chats(tokenizer)
        try:
            run.consume(workers)
            if run.report.documents:
                try:
                    refuse_unread(run.report.inputs, allow_unread)
                except DataError:
                    state.put(_REFUSED, True)
                    run.commit()
                    raise
                run.finish()
        except OSError as error:
            raise _cannot_write(error, out) from error
        finally:
            run.abandon()
    finally:
        state.close()
    shutil.rmtree(out / ".prepare")
    if not run.report.documents:
        if not any(out.iterdir()):
            out.rmdir()
        raise DataError(
            "no usable record in the input" + worst_reason(run.report.inputs),
            hint='a record is {"text": ...}, or a chat for SFT; name other columns in [columns];'
            " docs/en/data.md lists all layouts",
        )
    return run.report


def _cannot_write(error: OSError, out: Path) -> DataError:
    return DataError(
        f"cannot write {error.filename or out}: {error.strerror or error}",
        hint=f"{disk_hint(error) or 'run the command again'}; it resumes",
    )


def prepared_from(out: Path, *inputs: str | Path) -> bool:
    """Whether a prepared directory was made from these files and folders, going by their names."""
    places = [Path(path).resolve() for path in inputs]
    earlier = [Path(entry[0]) for entry in read_manifest(out)["configuration"]["inputs"]]
    return all(any(path == p or p in path.parents for p in places) for path in earlier)


def change_of(out: Path, *inputs: str | Path) -> Literal["gone", "changed"] | None:
    """What became of the inputs of a prepared directory, None if they hold what they held."""
    try:
        paths = expand_inputs(inputs)
    except DataError:
        return "gone"
    now = [identity(path) for path in paths]
    return None if _same_content(read_manifest(out), now, paths) else "changed"


def _finished_report(
    out: Path, configuration: dict[str, Any], paths: list[Path] | None
) -> PrepareReport | None:
    if not (out / "manifest.json").exists():
        return None
    manifest = read_manifest(out)
    earlier = manifest["configuration"]
    if paths is None or _same_content(manifest, configuration["inputs"], paths):
        configuration = {**configuration, "inputs": earlier["inputs"]}
    if earlier != configuration:
        raise _different(out, earlier, configuration)
    shutil.rmtree(out / ".prepare", ignore_errors=True)  # killed just before its removal
    report = PrepareReport.from_dict(manifest["report"])
    report.already_prepared = True
    return report


def _same_content(manifest: dict[str, Any], inputs: list[Any], paths: list[Path]) -> bool:
    """Whether the inputs, where their names or times differ, hold what they held before."""
    earlier = manifest["configuration"]["inputs"]
    digests = manifest.get("digests", [None] * len(earlier))  # earlier versions wrote none
    return len(earlier) == len(inputs) and all(
        now == before or (now[1] == before[1] and known is not None and digest(path) == known)
        for before, now, known, path in zip(earlier, inputs, digests, paths, strict=True)
    )


def _different(out: Path, earlier: dict[str, Any], current: dict[str, Any]) -> DataError:
    keys = [key for key in current if earlier.get(key) != current[key]]
    return DataError(
        f"{out} was prepared with other settings: {', '.join(keys)} differ",
        hint="choose another output directory, or remove this one",
    )


def _open_state(out: Path, configuration: dict[str, Any]) -> PrepareState:
    work = out / ".prepare"
    try:
        if out.exists() and not (work / "state.sqlite").exists():
            shard = next(out.glob("*.tok*"), None)
            if shard is not None:
                raise DataError(
                    f"{out} holds {shard.name} but no manifest.json",
                    hint="choose another output directory, or remove this one",
                )
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(error, out) from error
    state = PrepareState(work / "state.sqlite")
    earlier = state.get("configuration")
    if earlier is None:
        state.put("configuration", configuration)
        state.commit()
    elif earlier != configuration:
        refused = state.get(_REFUSED)
        state.close()
        if not refused:
            raise _different(out, earlier, configuration)
        # The data was mended, or is read otherwise: nothing of it has been used.
        shutil.rmtree(work)
        for path in out.glob("*.tok*"):
            path.unlink()
        return _open_state(out, configuration)
    return state


def _choose_stage(stage: str, paths: list[Path], columns: ColumnsConfig | None) -> Stage:
    """The requested stage, or with "auto" that of the first record of a known layout."""
    if stage != "auto":
        return cast(Stage, stage)
    for path in paths:
        for _, record in usable_records(InputReport(str(path)), columns):
            if (known := record_stage(record, columns)) is not None:
                return known
    return "pt"  # no record is usable; reading the files as PT reports why


def _require_chats(tokenizer: Tokenizer) -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    learned_chats(tokenizer, chat)


@contextmanager
def shown_progress(console: Console) -> Iterator[Callable[[PrepareProgress], None]]:
    """Yield a `progress` callback for `prepare` that draws a bar on `console`."""
    columns = (
        TextColumn("preparing {task.fields[file]}"),
        BarColumn(),
        TextColumn("{task.fields[counts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None, file="", counts="")

        def show(state: PrepareProgress) -> None:
            rate = state.tokens / state.seconds if state.seconds else 0.0
            bar.update(
                task,
                completed=state.file_bytes,
                total=state.total_bytes,
                file=state.path.name,
                counts=f"{state.documents:,} documents, {state.tokens:,} tokens, {rate:,.0f}/s",
            )

        yield show
