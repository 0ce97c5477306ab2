"""One preparation in progress: the position in the input, the open shards, the report."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.config import ColumnsConfig
from khaosz.data.records.readers import InputFiles, RawBatch, open_source
from khaosz.data.records.report import open_reports
from khaosz.data.shards.dedup import PrepareState
from khaosz.data.shards.encode import (
    EncodedBatch,
    PieceEncoder,
    encode_in_worker,
    encode_records,
    start_worker,
)
from khaosz.data.shards.manifest import (
    GROUP_FIELDS,
    MANIFEST_FORMAT,
    PrepareReport,
    identity,
)
from khaosz.data.shards.mmap import Stage, TokenFileWriter, remove_parts
from khaosz.data.tokenizer import Tokenizer
from khaosz.errors import DataError
from khaosz.files import digest, write_json

MAX_GROUPS = 64
OTHER_SOURCE = "other"
COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 5.0
# Four workers and the main process stay within 500 MB; more are faster and need more memory.
DEFAULT_WORKERS = 4
_SMALL_BYTES = 4 << 20  # starting worker processes takes longer than reading this
_IN_FLIGHT_BYTES = 4 << 20  # per worker, at least one batch


@dataclass(frozen=True)
class PrepareProgress:
    """`file_bytes` of `total_bytes` have been read (as stored, compressed or not)."""

    path: Path
    file_bytes: int
    total_bytes: int
    documents: int
    tokens: int
    seconds: float


@dataclass
class OpenGroup:
    """Shards of one (split, source, language); the last one is open while `writer` is set.

    `full` are shards to close at the next commit, as (name, writer state): if one were closed
    earlier, a restart could not return to the last commit.
    """

    split: str
    source: str
    lang: str
    shards: list[str] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    writer: TokenFileWriter | None = None
    full: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in GROUP_FIELDS}


@dataclass
class Preparation:
    """One run: position, open shards, report. `commit` makes them durable together."""

    out: Path
    state: PrepareState
    tokenizer: Tokenizer
    paths: InputFiles
    configuration: dict[str, Any]
    progress: Callable[[PrepareProgress], None] | None
    columns: ColumnsConfig | None = None

    def __post_init__(self) -> None:
        self.sizes = [entry[1] for entry in self.configuration["inputs"]]
        self.started = time.monotonic()
        self.stage: Stage | None = None
        self.position = (0, 0)  # index of the input, lines of it that are done
        self.groups: dict[tuple[str, str, str], OpenGroup] = {}
        self.report = PrepareReport(inputs=open_reports(self.paths))
        self.seconds_before = 0.0
        saved = self.state.get("progress")
        if saved is None:
            # Killed before the first commit: the state does not list the shards.
            for path in self.out.glob("*.tok*"):
                path.unlink()
        else:
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        self.stage = saved["stage"]
        self.position = tuple(saved["position"])
        self.report = PrepareReport.from_dict(saved["report"])
        self.seconds_before = self.report.seconds
        known = set()
        for entry in saved["groups"]:
            open_state = entry.pop("open")
            group = OpenGroup(**entry)
            self.groups[(group.split, group.source, group.lang)] = group
            known.update(group.shards)
            self._close_full(group)
            if open_state is not None:
                group.writer = self._open_shard(group.shards[-1], open_state)
        for path in self.out.glob("*.tok*"):  # shards of after the commit
            if path.name.split(".tok")[0] + ".tok" not in known:
                path.unlink()

    def _open_shard(self, name: str, state: dict[str, Any] | None = None) -> TokenFileWriter:
        assert self.stage is not None
        return TokenFileWriter(
            self.out / name,
            vocab_size=self.tokenizer.vocab_size,
            stage=self.stage,
            fingerprint=self.tokenizer.fingerprint,
            state=state,
        )

    def _close_full(self, group: OpenGroup) -> None:
        for name, state in group.full:
            if (self.out / name).exists():  # killed between the rename and the next commit
                remove_parts(self.out / name)
            else:
                self._open_shard(name, state).close()
        group.full.clear()

    def commit(self) -> None:
        """Make all work so far durable, then close the full shards."""
        entries = []
        for group in self.groups.values():
            open_state = None if group.writer is None else group.writer.flush()
            entries.append({**group.as_dict(), "full": group.full, "open": open_state})
        self.report.seconds = self.seconds_before + time.monotonic() - self.started
        self.state.put(
            "progress",
            {
                "stage": self.stage,
                "position": self.position,
                "groups": entries,
                "report": asdict(self.report),
            },
        )
        self.state.commit()
        for group in self.groups.values():
            self._close_full(group)

    def finish(self) -> None:
        """Close every shard, then write tokenizer and manifest: the directory is complete."""
        for group in self.groups.values():
            self._set_full(group)
        self.commit()
        self.tokenizer.save(self.out / "tokenizer")
        inputs = self.configuration["inputs"]
        manifest = {
            "format": MANIFEST_FORMAT,
            "stage": self.stage,
            "vocab_size": self.tokenizer.vocab_size,
            "tokenizer": self.tokenizer.fingerprint,
            "groups": [group.as_dict() for group in self.groups.values()],
            "configuration": self.configuration,
            "report": asdict(self.report),
            # None: changed meanwhile, so what was read is not known.
            "digests": [
                digest(path) if path.exists() and identity(path) == before else None
                for path, before in zip(self.paths, inputs, strict=True)
            ],
        }
        write_json(self.out / "manifest.json", manifest)

    def abandon(self) -> None:
        """Close the open files, for a later run to resume."""
        for group in self.groups.values():
            if group.writer is not None:
                group.writer.abandon()

    def consume(self, workers: int | None) -> None:
        """Read the inputs from `position` to the end."""
        uncommitted = 0
        committed_at = time.monotonic()
        limit = self.configuration["max_documents"]
        with ExitStack() as stack:
            for index, batch, encoded in self._encoded(workers, stack):
                self._append(index, batch, encoded)
                self.position = (index, batch.first_line - 1 + len(batch.lines))
                uncommitted += batch.n_bytes
                now = time.monotonic()
                due = uncommitted >= COMMIT_BYTES or now - committed_at >= COMMIT_SECONDS
                if due or any(group.full for group in self.groups.values()):
                    self.commit()
                    uncommitted, committed_at = 0, time.monotonic()
                self._report_progress(index, batch)
                if limit is not None and self.report.documents >= limit:
                    break
        self.position = (len(self.paths), 0)

    def _report_progress(self, index: int, batch: RawBatch) -> None:
        if self.progress is not None:
            self.progress(
                PrepareProgress(
                    path=batch.path,
                    file_bytes=sum(self.sizes[:index]) + batch.file_position,
                    total_bytes=sum(self.sizes),
                    documents=self.report.documents,
                    tokens=self.report.tokens,
                    seconds=self.seconds_before + time.monotonic() - self.started,
                )
            )

    def _batches(self) -> Iterator[tuple[int, RawBatch]]:
        first, done = self.position
        for index in range(first, len(self.paths)):
            for batch in open_source(self.paths[index], self.columns):
                consumed = done + 1 - batch.first_line if index == first else 0
                if consumed > 0:
                    if consumed >= len(batch.lines):
                        continue
                    # Another version may have put batch boundaries elsewhere.
                    batch.lines = batch.lines[consumed:]
                    batch.first_line = done + 1
                    batch.skipped = [skip for skip in batch.skipped if skip[0] > done]
                yield index, batch

    def _encoded(
        self, workers: int | None, stack: ExitStack
    ) -> Iterator[tuple[int, RawBatch, EncodedBatch]]:
        """Batches with their documents, in input order, a bounded number of them in flight."""
        assert self.stage is not None
        if workers is None:
            small = sum(self.sizes) < _SMALL_BYTES
            workers = 0 if small else min(_usable_cores(), DEFAULT_WORKERS)
        if workers == 0:
            encoder = PieceEncoder(self.tokenizer)
            for index, batch in self._batches():
                yield index, batch, encode_records(encoder, batch, self.stage, self.columns)
            return
        directory = self.out / ".prepare" / "tokenizer"
        self.tokenizer.save(directory)
        pool = ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker
        )
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[tuple[int, RawBatch, int, Future[EncodedBatch]]] = deque()
        in_flight = 0
        try:
            for index, batch in self._batches():
                size = batch.n_bytes
                while waiting and (
                    len(waiting) > 2 * workers or in_flight + size > workers * _IN_FLIGHT_BYTES
                ):
                    oldest, earlier, n_bytes, future = waiting.popleft()
                    in_flight -= n_bytes
                    yield oldest, earlier, future.result()
                future = pool.submit(encode_in_worker, directory, batch, self.stage, self.columns)
                waiting.append((index, batch, size, future))
                in_flight += size
            while waiting:
                oldest, earlier, _, future = waiting.popleft()
                yield oldest, earlier, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died, possibly out of memory",
                hint="run the same command again with fewer workers: it resumes",
            ) from error

    def _append(self, index: int, batch: RawBatch, encoded: EncodedBatch) -> None:
        """Drop duplicates, count, write the remaining documents to their shards."""
        limit = self.configuration["max_documents"]
        left = None if limit is None else limit - self.report.documents
        n = len(encoded.lengths)
        if self.configuration["dedup"]:
            keep = self.state.add_new(encoded.hashes, left)
            if left is not None and int(keep.sum()) == left:
                n = int(np.flatnonzero(keep)[-1]) + 1 if left else 0
        else:
            keep = np.ones(n, dtype=bool)
            if left is not None:
                keep[left:] = False
                n = min(n, left)
        self.report.count(index, batch, encoded, keep, n_seen=n)
        numbers = np.ascontiguousarray(encoded.hashes[:, :8]).view("<u8")[:, 0]
        is_val = numbers < np.uint64(self.configuration["val_fraction"] * 2.0**64)
        assert int(encoded.lengths.sum()) == len(encoded.tokens), len(encoded.tokens)
        for split, in_split in (("train", ~is_val), ("val", is_val)):
            for number, (source, lang) in enumerate(encoded.groups):
                chosen = keep & in_split & (encoded.group == number)
                if not chosen.any():
                    continue
                take: Any = slice(None)
                if not chosen.all():
                    take = np.repeat(chosen, encoded.lengths)
                self._write(
                    self._group(split, source, lang),
                    encoded.tokens[take],
                    encoded.lengths[chosen],
                    None if encoded.loss_mask is None else encoded.loss_mask[take],
                    encoded.n_bytes[chosen],
                )

    def _group(self, split: str, source: str, lang: str) -> OpenGroup:
        key = (split, source, lang)
        if key not in self.groups and len(self.groups) >= MAX_GROUPS:
            key = (split, OTHER_SOURCE, lang if lang in ("zh", "en") else "other")
        if key not in self.groups:
            self.groups[key] = OpenGroup(*key)
        return self.groups[key]

    def _write(
        self,
        group: OpenGroup,
        tokens: np.ndarray,
        lengths: np.ndarray,
        loss_mask: np.ndarray | None,
        n_bytes: np.ndarray,
    ) -> None:
        """Append documents; a new shard starts before `shard_tokens` would be exceeded."""
        limit = self.configuration["shard_tokens"]
        ends = np.cumsum(lengths)
        first = 0
        while first < len(lengths):
            before = int(ends[first - 1]) if first else 0
            in_shard = group.writer.n_tokens if group.writer is not None else 0
            last = int(np.searchsorted(ends, limit - in_shard + before, side="right"))
            if last <= first:
                if in_shard:
                    self._set_full(group)
                    continue
                last = first + 1  # a document longer than a shard gets its own
            if group.writer is None:
                name = f"{group.split}-{group.source}-{group.lang}-{len(group.shards):05d}.tok"
                group.writer = self._open_shard(name)
                group.shards.append(name)
            end = int(ends[last - 1])
            size = int(n_bytes[first:last].sum())
            group.writer.append(
                tokens[before:end],
                lengths[first:last],
                None if loss_mask is None else loss_mask[before:end],
                size,
            )
            group.documents += last - first
            group.tokens += end - before
            group.bytes += size
            first = last

    def _set_full(self, group: OpenGroup) -> None:
        """End the open shard; the next commit closes it."""
        if group.writer is not None:
            group.full.append((group.shards[-1], group.writer.flush()))
            group.writer.abandon()
            group.writer = None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
