"""Training runs, read from the files that the trainer writes, and from no others.

A run is a folder with `metrics.jsonl`, or with `train_config.json` but no model (a run before its
first step; checkpoints have both). Its id is its path below the folder of runs. Ids are looked up
in listings of real folders, so `..` is never valid, and links are not followed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISREG
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from khaosz.serve.errors import ApiError, errors
from khaosz.serve.records.run_metrics import Row, curve, last_row, plain, read_samples, rows_after
from khaosz.serve.replies import Reply

MAX_FOLDERS = 20_000  # scanned for a listing
MAX_DEPTH = 8
MAX_RUNS = 1000
QUIET = 120.0  # seconds without a write before a run counts as stopped, at least
_INSIDE = ("last", "best", "tensorboard", "tokenizer", "data", "val")  # folders of a run, not runs
_MAX_JSON = 1 << 20  # bytes of a configuration

State = Literal["running", "finished", "stopped", "unknown"]
Value = float | int | str | bool | None


class RunSummary(Reply):
    """`steps`: of the whole run, None if unknown. `last`: the newest value of each metric.
    `curve`: the loss over the whole run, at most 40 values."""

    id: str
    object: Literal["run"]
    stage: str | None
    state: State
    step: int | None
    steps: int | None
    updated: int
    last: dict[str, Value]
    curve: list[float | None]


class RunList(Reply):
    object: Literal["list"]
    data: list[RunSummary]


class RunMetrics(Reply):
    """`rows` sorted by step; `thinned` if some were left out; `step`: the last one of the run, less
    than `after` if the run was started again."""

    object: Literal["run.metrics"]
    rows: list[dict[str, Value]]
    thinned: bool
    step: int | None


class RunSample(Reply):
    step: int
    prompt: str
    text: str
    reward: float | None = None


class RunSamples(Reply):
    object: Literal["run.samples"]
    data: list[RunSample]


class RunConfig(Reply):
    """The configuration, and the plan that calibration made of it. Absolute paths are cut to their
    last name."""

    object: Literal["run.config"]
    config: dict[str, Any] | None
    plan: dict[str, Any] | None


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AfterQuery(NoQuery):
    after: Annotated[int, Field(ge=0, lt=2**53)] = 0


def run_routes(folder: Path) -> APIRouter:
    """The routes are not async, so FastAPI runs them in threads: they read files."""
    router = APIRouter()

    @router.get("/v1/runs", response_model=RunList, responses=errors(400))
    def list_runs(query: Annotated[NoQuery, Query()]) -> dict[str, Any]:
        """The runs below --runs, the last changed first."""
        runs = [_summary(id, path) for id, path in find_runs(folder)]
        runs.sort(key=lambda run: (-run["updated"], run["id"]))
        return {"object": "list", "data": runs[:MAX_RUNS]}

    @router.get(
        "/v1/runs/{run:path}/metrics", response_model=RunMetrics, responses=errors(400, 404)
    )
    def run_metrics(run: str, query: Annotated[AfterQuery, Query()]) -> dict[str, Any]:
        """At most 2,000 rows after the step `after`. Of more they are sampled evenly, always with
        the first, the last and those of validations."""
        path = _run(folder, run)
        rows, thinned = rows_after(path / "metrics.jsonl", query.after)
        step = last_row(path / "metrics.jsonl").get("step")
        return {"object": "run.metrics", "rows": rows, "thinned": thinned, "step": step}

    @router.get(
        "/v1/runs/{run:path}/samples",
        response_model=RunSamples,
        response_model_exclude_unset=True,
        responses=errors(400, 404),
    )
    def run_samples(run: str, query: Annotated[AfterQuery, Query()]) -> dict[str, Any]:
        """Texts sampled during training, after the step `after`; the newest 1,000."""
        samples = read_samples(_run(folder, run) / "samples.jsonl", query.after)
        return {"object": "run.samples", "data": samples}

    @router.get("/v1/runs/{run:path}/config", response_model=RunConfig, responses=errors(400, 404))
    def run_config(run: str, query: Annotated[NoQuery, Query()]) -> dict[str, Any]:
        path = _run(folder, run)
        return {
            "object": "run.config",
            "config": _without_paths(_read_object(path / "train_config.json")),
            "plan": _without_paths(_read_object(path / "plan.json")),
        }

    return router


def find_runs(folder: Path) -> Iterator[tuple[str, Path]]:
    """Ids and folders."""
    waiting, seen = [(folder, 0)], 0
    while waiting and seen < MAX_FOLDERS:
        path, depth = waiting.pop()
        seen += 1
        folders, files = _listing(path)
        is_run = depth > 0 and _is_run(files)
        if is_run:
            yield path.relative_to(folder).as_posix(), path
        if depth < MAX_DEPTH:
            waiting += [
                (path / name, depth + 1)
                for name in sorted(folders, reverse=True)
                if not (is_run and (name in _INSIDE or name.startswith("step-")))
            ]


def _listing(path: Path) -> tuple[set[str], set[str]]:
    """Names of the folders and the files in a folder, without links and hidden ones."""
    folders: set[str] = set()
    files: set[str] = set()
    with suppress(OSError), os.scandir(path) as entries:  # not readable, or deleted meanwhile
        for entry in entries:
            if entry.name.startswith(".") or entry.is_symlink():
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif entry.is_file(follow_symlinks=False):
                files.add(entry.name)
    return folders, files


def _is_run(files: set[str]) -> bool:
    return "metrics.jsonl" in files or ("train_config.json" in files and "config.json" not in files)


def _run(folder: Path, id: str) -> Path:
    """The folder of a run; every part of the id must be in the listing of its parent. Raises
    `ApiError`."""
    path = folder
    for part in id.split("/")[:MAX_DEPTH]:
        if part not in _listing(path)[0]:
            break
        path = path / part
    if path.relative_to(folder).as_posix() != id or not _is_run(_listing(path)[1]):
        raise ApiError(404, "run not found", param="run")
    return path


def _summary(id: str, path: Path) -> dict[str, Any]:
    metrics = path / "metrics.jsonl"
    config = _read_object(path / "train_config.json") or {}
    plan = _read_object(path / "plan.json") or {}
    last = last_row(metrics)
    steps = plain(plan.get("total_steps") or config.get("max_steps"))
    updated = max(map(_changed, (metrics, path / "samples.jsonl", path / "train_config.json")))
    return {
        "id": id,
        "object": "run",
        "stage": stage if isinstance(stage := config.get("stage"), str) else None,
        "state": _state(last, steps, updated, plain(config.get("log_every"))),
        "step": last.get("step"),
        "steps": steps if type(steps) is int else None,
        "updated": int(updated),
        "last": last,
        "curve": curve(metrics),
    }


def _state(last: Row, steps: Any, updated: float, log_every: Any) -> State:
    """A killed trainer leaves no mark, so the state is derived from its last write: finished at the
    plan's last step; running if the last write is less than two minutes ago, or less than three
    times the duration of a row's steps; stopped after that (early stopping too), and unknown
    without rows."""
    step, elapsed = last.get("step"), last.get("elapsed_s")
    if step is not None and type(steps) is int and step >= steps:
        return "finished"
    quiet = QUIET
    if step and isinstance(elapsed, int | float) and type(log_every) is int:
        quiet = max(QUIET, 3.0 * log_every / step * elapsed)
    if time.time() - updated < quiet:
        return "running"
    return "stopped" if last else "unknown"


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None if it is missing or cannot be read."""
    try:
        status = path.lstat()
        if not S_ISREG(status.st_mode) or status.st_size > _MAX_JSON:
            return None
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _without_paths(value: Any, key: str = "") -> Any:
    """Absolute paths reveal the server's folders, so only their last name is kept."""
    match value:
        case dict():
            return {plain(name): _without_paths(each, name) for name, each in value.items()}
        case list():
            return [_without_paths(each, key) for each in value]
        case str() if key != "prompts" and any(
            kind(value).is_absolute() for kind in (PurePosixPath, PureWindowsPath)
        ):
            return f"…/{plain(PureWindowsPath(value).name)}"
    return plain(value)
