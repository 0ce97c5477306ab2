"""Training runs over HTTP: a real run, long files, invalid lines, and paths outside the folder."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from serving import Service, served

from khaosz.config import TrainConfig
from khaosz.serve.records.run_metrics import (
    MAX_ROWS,
    MAX_SAMPLES,
    _choose,
    read_samples,
    rows_after,
)
from khaosz.serve.records.runs import QUIET, find_runs, run_routes
from khaosz.trainer.run import run

SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def service(tiny: Path, folder: Path) -> Iterator[Service]:
    with served(tiny, routers=[run_routes(folder)]) as running:
        yield running


def get(service: Service, path: str) -> tuple[int, Any]:
    status, _, answer = service.ask("GET", f"/v1/runs{path}")
    return status, answer


def one(service: Service, id: str) -> dict[str, Any]:
    (found,) = [each for each in get(service, "")[1]["data"] if each["id"] == id]
    return found


def metrics(service: Service, id: str, after: int = 0) -> dict[str, Any]:
    status, answer = get(service, f"/{quote(id)}/metrics?after={after}")
    assert status == 200, answer
    return answer


def written(path: Path, rows: list[dict[str, Any]], torn: str = "", **config: Any) -> Path:
    path.mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) + torn
    (path / "metrics.jsonl").write_text(text, encoding="utf-8")
    (path / "train_config.json").write_text(json.dumps({"stage": "pt", **config}))
    return path


def steps(count: int, every: int = 1) -> list[dict[str, Any]]:
    return [{"step": i, "loss": 9 / i, "elapsed_s": i / 8} for i in range(every, count + 1, every)]


def test_real_run(service: Service, folder: Path, prepared_dir: Path) -> None:
    config = TrainConfig.parse(
        {
            "stage": "pt", "data": prepared_dir, "out": folder / "演示/pt", "size": "nano",
            "model": SHAPE, "window": 32, "batch_tokens": 128, "micro_batch": 4, "max_steps": 6,
            "dtype": "fp32", "compile": "off", "eval_tokens": 200, "eval_every": 3,
            "save_every": 3, "log_every": 2, "prompts": ["/春天"], "sample_every": 3,
        }
    )  # fmt: skip
    run(config, console=Console(file=io.StringIO()))
    assert [id for id, _ in find_runs(folder)] == ["演示/pt"]  # no checkpoint, no `last`
    on_disk = [json.loads(x) for x in (config.out / "metrics.jsonl").read_text().splitlines()]
    found = one(service, "演示/pt")
    assert (found["stage"], found["state"]) == ("pt", "finished")
    assert (found["step"], found["steps"]) == (6, 6)
    assert found["last"] == on_disk[-1] and found["last"]["val_bits_per_byte"] > 0
    assert found["curve"] == [row["loss"] for row in on_disk]
    assert metrics(service, "演示/pt")["rows"] == on_disk
    assert [row["step"] for row in metrics(service, "演示/pt", 3)["rows"]] == [4, 6]
    status, samples = get(service, f"/{quote('演示/pt')}/samples")
    assert status == 200 and [each["step"] for each in samples["data"]] == [3, 6]
    assert samples["data"][0]["prompt"] == "/春天"
    status, answer = get(service, f"/{quote('演示/pt')}/config")
    assert status == 200 and answer["plan"]["total_steps"] == 6
    assert answer["config"]["window"] == 32 and answer["config"]["prompts"] == ["/春天"]
    # Folders of the server are not revealed.
    assert answer["config"]["out"] == "…/pt" and answer["config"]["data"] == "…/data"
    assert str(folder) not in json.dumps(answer, ensure_ascii=False)


def test_long_runs_are_thinned(service: Service, folder: Path) -> None:
    rows = steps(200_000, every=10)
    for row in rows[::100]:
        row["val_loss"] = row["loss"] + 0.1
    written(folder / "long", rows)
    whole = metrics(service, "long")
    shown = [row["step"] for row in whole["rows"]]
    assert whole["thinned"] and len(shown) == MAX_ROWS and whole["step"] == 200_000
    assert shown[0] == 10 and shown[-1] == 200_000 and shown == sorted(set(shown))
    assert {row["step"] for row in rows[::100]} <= set(shown)
    gaps = [b - a for a, b in pairwise(shown)]
    assert max(gaps) <= 2 * 200_000 / (MAX_ROWS - 200)
    rest = metrics(service, "long", 199_900)
    assert [row["step"] for row in rest["rows"]] == list(range(199_910, 200_001, 10))
    assert not rest["thinned"] and metrics(service, "long", 10**9)["rows"] == []
    curve = one(service, "long")["curve"]
    assert len(curve) == 40 and curve == sorted(curve, reverse=True)
    assert one(service, "long")["last"]["val_loss"] == pytest.approx(rows[-100]["val_loss"])


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=3 * MAX_ROWS), st.integers(0, 3))
def test_choice_of_rows(validated: list[bool], more: int) -> None:
    validated = validated * 4**more
    kept = _choose(validated)
    assert len(kept) == min(len(validated), MAX_ROWS)
    if validated:
        assert {0, len(validated) - 1} <= kept
    must = {i for i, each in enumerate(validated) if each}
    assert must <= kept or len(must) > MAX_ROWS - 2


@pytest.mark.parametrize("after", [0, 1, 57, 998, 999, 1000, 5000])
def test_rows_after_step(tmp_path: Path, after: int) -> None:
    path = written(tmp_path / "run", steps(1000)) / "metrics.jsonl"
    found, thinned = rows_after(path, after)
    assert [row["step"] for row in found] == list(range(after + 1, 1001)) and not thinned


def test_incomplete_line_is_read_later(service: Service, folder: Path) -> None:
    path = written(folder / "torn", steps(3), torn='{"step": 4, "lo') / "metrics.jsonl"
    assert [row["step"] for row in metrics(service, "torn")["rows"]] == [1, 2, 3]
    assert one(service, "torn")["step"] == 3
    with path.open("a") as file:
        file.write('ss": 2.0}\n')
    assert metrics(service, "torn", 3)["rows"] == [{"step": 4, "loss": 2.0}]


def test_invalid_lines_are_skipped(service: Service, folder: Path) -> None:
    path = written(folder / "strange", [])
    with (path / "metrics.jsonl").open("w") as file:
        file.write('\n\x00\n[1]\n"x"\n{}\n{"step": "1"}\n{"step": true}\n{"step": 1.5}\n')
        file.write('{"step": 1, "loss": NaN, "lr": 1e999, "x": -Infinity}\n')
        file.write('{"step": 2, "deep": ' + "[" * 5000 + "]" * 5000 + "}\n")
        file.write('{"step": 3, "text": "\\ud800", "\\ud800": 1, "of": {"a": [1]}}\n')
        file.write('{"step": 4, "long": "' + "x" * 100_000 + '"}\n')
        file.write('{"step": ' + "9" * 400 + "}\n")
        file.write('{"step": 5, "loss": ' + "9" * 400 + ', "elapsed_s": 1e308}\n')
    shown = metrics(service, "strange")["rows"]
    assert shown[0] == {"step": 1, "loss": None, "lr": None, "x": None}
    assert shown[1] == {"step": 3, "text": "?", "?": 1}
    assert shown[2:] == [{"step": 5, "loss": None, "elapsed_s": 1e308}]
    assert one(service, "strange")["step"] == 5
    for name, text in (
        ("train_config.json", '{"stage": 5, "max_steps": "x", "log_every": [], "a": "\\ud800"}'),
        ("plan.json", '{"total_steps": NaN}'),
        ("samples.jsonl", '{"step": 1, "prompt": "\\ud800", "text": "y", "reward": NaN}\n'
            '{"step": 2}\n{"step": 3, "prompt": "x", "text": "y", "reward": ' + "9" * 400 + "}\n"),
    ):  # fmt: skip
        (path / name).write_text(text)
    assert (one(service, "strange")["stage"], one(service, "strange")["steps"]) == (None, None)
    assert get(service, "/strange/config")[1]["config"]["a"] == "?"
    samples = get(service, "/strange/samples")[1]["data"]
    assert samples == [
        {"step": 1, "prompt": "?", "text": "y"},
        {"step": 3, "prompt": "x", "text": "y"},
    ]
    for number in ("9" * 400, "1" + "0" * 307):
        (path / "train_config.json").write_text(f'{{"log_every": {number}, "max_steps": {number}}}')
        assert one(service, "strange")["state"] == "running"
    (path / "train_config.json").write_text("[" * 5000)
    assert get(service, "/strange/config") == (200, {
        "object": "run.config", "config": None, "plan": {"total_steps": None},
    })  # fmt: skip


def test_run_state(service: Service, folder: Path) -> None:
    path = written(folder / "state", steps(30), max_steps=60, log_every=10)

    def aged(seconds: float) -> str:
        then = time.time() - seconds
        for file in path.iterdir():
            os.utime(file, (then, then))
        return one(service, "state")["state"]

    assert aged(0) == "running"
    assert aged(QUIET / 2) == "running"
    assert aged(QUIET * 2) == "stopped"
    # Steps of a minute, ten per row: half an hour without a row is normal.
    rows = [{"step": i, "loss": 1.0, "elapsed_s": 60.0 * i} for i in (10, 20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert aged(1500) == "running"
    assert aged(2000) == "stopped"
    (path / "plan.json").write_text('{"total_steps": 20}')
    assert aged(5000) == "finished"
    (path / "metrics.jsonl").write_text("")
    assert aged(5000) == "unknown"
    (path / "metrics.jsonl").unlink()
    assert aged(0) == "running"  # before its first step
    assert metrics(service, "state") == {
        "object": "run.metrics", "rows": [], "thinned": False, "step": None,
    }  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="symbolic links and pipes")
def test_paths_outside_the_folder_are_not_found(
    service: Service, folder: Path, tmp_path: Path
) -> None:
    outside = written(tmp_path / "outside", steps(3))
    inside = written(folder / "inside", steps(3))
    (folder / "link").symlink_to(outside)
    (folder / "group").mkdir()
    (folder / "group" / "link").symlink_to(outside)
    (outside / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "text": "secret"}\n')
    (inside / "samples.jsonl").symlink_to(outside / "samples.jsonl")
    (inside / "plan.json").symlink_to(outside / "train_config.json")
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / "metrics.jsonl")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "metrics.jsonl").write_text('{"step": 1}\n')
    known = {each["id"] for each in get(service, "")[1]["data"]}
    assert "inside" in known and not known & {"link", "group/link", "pipe", ".hidden"}
    name = quote(outside.name)
    for id in (
        "link", "group/link", "pipe", ".hidden", "..", ".", "", "/", "inside/", "/inside",
        "inside/../inside", "./inside", "inside/.", f"../{name}", f"..%2f{name}",
        "%2e%2e/" + name, quote(str(outside), safe=""), "inside%00", "inside%5C..", "nowhere",
        "inside/metrics.jsonl", "%ff", "/".join("a" * 3000),
    ):  # fmt: skip
        for what in ("metrics", "samples", "config"):
            assert get(service, f"/{id}/{what}")[0] == 404, (id, what)
    assert get(service, "/inside/samples")[1]["data"] == []
    assert get(service, "/inside/config")[1]["plan"] is None


def test_refuses_invalid_query(service: Service, folder: Path, tiny: Path, tmp_path: Path) -> None:
    written(folder / "odd", steps(3))
    for query in ("after=-1", "after=x", "after=1.5", "more=1", f"after={2**60}"):
        assert get(service, f"/odd/metrics?{query}")[0] == 400, query
    assert get(service, "?more=1")[0] == 400
    with served(tiny, routers=[run_routes(tmp_path / "nowhere")]) as nothing:
        assert get(nothing, "") == (200, {"object": "list", "data": []})


def test_newest_samples(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"step": i, "prompt": "p", "text": "x" * 1000} for i in range(1, 5001)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_samples(path, 0)
    assert [each["step"] for each in found] == list(range(5001 - MAX_SAMPLES, 5001))
    assert [each["step"] for each in read_samples(path, 4998)] == [4999, 5000]
