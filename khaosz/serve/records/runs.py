"""A look into the folder of training runs: what the trainer writes there, and nothing else.

A run is a folder that holds `metrics.jsonl`, or a `train_config.json` without a model beside it
(a run before its first step; checkpoints have both). Its id is its path below the folder. Ids are
looked up in listings of real folders, so there is none with `..` in it, and no link is followed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from stat import S_ISREG
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from khaosz.serve.errors import ApiError, errors
from khaosz.serve.records.run_metrics import Row, curve, last_row, plain, read_samples, rows_after
from khaosz.serve.replies import Reply

MAX_FOLDERS = 20_000  # looked into for a listing
MAX_DEPTH = 8
MAX_RUNS = 1000
QUIET = 120.0  # seconds without a sign of life, at least, before a run counts as stopped
_INSIDE = ("last", "best", "tensorboard", "tokenizer", "data", "val")  # of a run, no runs
_MAX_JSON = 1 << 20  # bytes of a configuration

State = Literal["running", "finished", "stopped", "unknown"]
Value = float | int | str | bool | None


class RunSummary(Reply):
    """`steps`: of the whole run, where its plan is known. `last`: the newest value of each metric.
    `curve`: the loss from beginning to end, at most 40 values."""

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
    """`rows` in the order of their steps; `thinned` if some were left out; `step` is the last one
    of the run, which may lie before `after` when it was begun again."""

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
    """What was asked for and what calibration made of it. Of absolute paths only the last name is
    told."""

    object: Literal["run.config"]
    config: dict[str, Any] | None
    plan: dict[str, Any] | None


class NoQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AfterQuery(NoQuery):
    after: Annotated[int, Field(ge=0, lt=2**53)] = 0


def run_routes(folder: Path) -> APIRouter:
    """The routes are plain functions, which FastAPI runs in threads: they read files."""
    router = APIRouter()

    @router.get("/v1/runs", response_model=RunList, responses=errors(400))
    def list_runs(asked: Annotated[NoQuery, Query()]) -> dict[str, Any]:
        """The runs below --runs, those that changed last first."""
        found = [_summary(id, path) for id, path in find_runs(folder)]
        found.sort(key=lambda run: (-run["updated"], run["id"]))
        return {"object": "list", "data": found[:MAX_RUNS]}

    @router.get(
        "/v1/runs/{run:path}/metrics", response_model=RunMetrics, responses=errors(400, 404)
    )
    def run_metrics(run: str, asked: Annotated[AfterQuery, Query()]) -> dict[str, Any]:
        """At most 2,000 rows behind the step `after`. Of a longer run they are taken evenly, and
        the first, the last and those with a validation are always there."""
        path = _run(folder, run)
        rows, thinned = rows_after(path / "metrics.jsonl", asked.after)
        last = last_row(path / "metrics.jsonl") or {}
        return {
            "object": "run.metrics",
            "rows": rows,
            "thinned": thinned,
            "step": last.get("step"),
        }

    @router.get(
        "/v1/runs/{run:path}/samples",
        response_model=RunSamples,
        response_model_exclude_unset=True,
        responses=errors(400, 404),
    )
    def run_samples(run: str, asked: Annotated[AfterQuery, Query()]) -> dict[str, Any]:
        """What the model wrote while it was trained, behind the step `after`; the newest 1,000."""
        samples = read_samples(_run(folder, run) / "samples.jsonl", asked.after)
        return {"object": "run.samples", "data": samples}

    @router.get("/v1/runs/{run:path}/config", response_model=RunConfig, responses=errors(400, 404))
    def run_config(run: str, asked: Annotated[NoQuery, Query()]) -> dict[str, Any]:
        path = _run(folder, run)
        found = {name: _object(path / f"{name}.json") for name in ("train_config", "plan")}
        return {
            "object": "run.config",
            "config": _without_paths(found["train_config"]),
            "plan": _without_paths(found["plan"]),
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
    """Names of folders and of files in a folder, without links and hidden ones."""
    folders: set[str] = set()
    files: set[str] = set()
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_symlink():
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.add(entry.name)
                elif entry.is_file(follow_symlinks=False):
                    files.add(entry.name)
    except OSError:  # not ours to read, or gone meanwhile
        pass
    return folders, files


def _is_run(files: set[str]) -> bool:
    return "metrics.jsonl" in files or ("train_config.json" in files and "config.json" not in files)


def _run(folder: Path, id: str) -> Path:
    """The folder of a run. Each part of the id must be what the listing of its folder names."""
    path = folder
    for part in id.split("/")[:MAX_DEPTH]:
        if part not in _listing(path)[0]:
            raise ApiError(404, "there is no such run", param="run")
        path = path / part
    if path.relative_to(folder).as_posix() != id or not _is_run(_listing(path)[1]):
        raise ApiError(404, "there is no such run", param="run")
    return path


def _summary(id: str, path: Path) -> dict[str, Any]:
    metrics = path / "metrics.jsonl"
    config, plan = _object(path / "train_config.json") or {}, _object(path / "plan.json") or {}
    last = last_row(metrics) or {}
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
    """The trainer leaves no sign when it is killed, so this is told from what it last wrote:
    finished at the plan's last step; running while something was written in the last two minutes,
    or in three times as long as the steps of a row take; stopped after that (by early stopping
    too), and unknown where there is no row."""
    step, taken = last.get("step"), last.get("elapsed_s")
    if step is not None and type(steps) is int and step >= steps:
        return "finished"
    quiet = QUIET
    if step and isinstance(taken, int | float) and type(log_every) is int:
        quiet = max(QUIET, 3.0 * log_every / step * taken)
    if time.time() - updated < quiet:
        return "running"
    return "stopped" if last else "unknown"


def _changed(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none, or none that can be read."""
    try:
        status = path.lstat()
        if not S_ISREG(status.st_mode) or status.st_size > _MAX_JSON:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _without_paths(value: Any, key: str = "") -> Any:
    """Absolute paths tell where things lie on the server: of those the last name is left."""
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
