"""Preferences given on the page: training reads them, and they survive crashes."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from serving import Service, served

from khaosz.cli.collect import ranked_prompts
from khaosz.config import TrainConfig
from khaosz.data.records.preference import load_pairs
from khaosz.data.tokenizer import load_tokenizer
from khaosz.errors import DataError
from khaosz.serve.records.preferences import PreferenceFile, preference_routes
from khaosz.trainer.run import run

QUIET = Console(file=io.StringIO())
ASKED = [{"role": "system", "content": "简短。"}, {"role": "user", "content": "春眠不觉晓？"}]
RANKED = {
    "messages": ASKED,
    "ranked": ["处处闻啼鸟。", ["the fox", "花落\n知多少"], "？"],
    "finish_reasons": ["stop", "stop", "length", "stop"],
    "model": "tiny",
    "seed": 7,
    "sampling": {"temperature": 0.9, "max_tokens": 64},
}
PAIR = {"messages": ASKED[1:], "chosen": "闻啼鸟", "rejected": "quick"}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> PreferenceFile:
    return PreferenceFile(tmp_path_factory.mktemp("preferences") / "preferences.jsonl")


@pytest.fixture(scope="module")
def server(tiny: Path, preferences: PreferenceFile) -> Iterator[Service]:
    with served(tiny, routers=[preference_routes(preferences)]) as running:
        yield running


@pytest.fixture
def file(preferences: PreferenceFile) -> Iterator[Path]:
    """Does not exist yet."""
    yield preferences.path
    preferences.path.unlink(missing_ok=True)
    preferences.path.with_suffix(".torn").unlink(missing_ok=True)
    assert preferences.count() == 0


@pytest.fixture
def service(server: Service, file: Path) -> Service:
    return server


def post(service: Service, request: dict[str, Any]) -> tuple[int, Any]:
    status, _, answer = service.ask("POST", "/v1/preferences", json.dumps(request))
    return status, answer


def test_training_reads_rankings(service: Service, file: Path, tiny: Path, tmp_path: Path) -> None:
    assert post(service, RANKED) == (201, {"object": "preference", "pairs": 5, "count": 1})
    assert post(service, PAIR) == (201, {"object": "preference", "pairs": 1, "count": 2})
    shown = {"object": "preferences", "count": 2, "file": "preferences.jsonl", "peers": []}
    assert service.ask("GET", "/v1/preferences")[2] == shown
    status, text = service.text("/v1/preferences/export")
    assert status == 200 and text == file.read_text(encoding="utf-8")
    first, second = (json.loads(line) for line in text.splitlines())
    assert first.pop("created") > 0 and second.pop("created") > 0
    assert first == {
        "prompt": ASKED,
        "answers": ["处处闻啼鸟。", "the fox", "花落\n知多少", "？"],
        "ranking": [0, [1, 2], 3],
        "finish_reasons": RANKED["finish_reasons"],
        "model": "tiny",
        "sampling": {"temperature": 0.9, "max_tokens": 64, "seed": 7},
    }
    assert second == {
        "prompt": ASKED[1:], "answers": ["闻啼鸟", "quick"], "ranking": [0, 1]
    }  # fmt: skip

    # The reader of DPO, and DPO itself: all pairs, those of a ranking together.
    data = load_pairs([file], load_tokenizer(tiny), 256)
    assert not any(entry.skipped for entry in data.report.inputs)
    assert len(data.train) == 6
    assert len({pair.group for pair in data.train[:5]}) == 1
    config = TrainConfig.parse(
        {
            "stage": "dpo", "init_from": tiny, "data": file, "out": tmp_path / "dpo",
            "window": 256, "batch_pairs": 2, "micro_batch": 1, "max_steps": 2, "optimizer": "adamw",
            "lr": 1e-3, "embedding_lr": 1e-3, "dtype": "fp32", "compile": "off", "val_fraction": 0,
        }
    )  # fmt: skip
    context = run(config, console=QUIET)
    assert context.progress.step == 2 and context.windows == 6
    # `khaosz preference collect` continues the file.
    assert len(ranked_prompts(file, QUIET)) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"more": 1}, "unknown field"),
        ({"ranked": None}, "give chosen and rejected, or ranked"),
        ({"ranked": None, "chosen": "x"}, "give chosen and rejected, or ranked"),
        ({"chosen": "x", "rejected": "y"}, "not both"),
        ({"ranked": ["x"]}, "at least 2"),
        ({"ranked": [["x", "y"]]}, "at least 2"),
        ({"ranked": ["x", []]}, "ranked.1"),
        ({"ranked": ["0", [*"abcdefghijklmnopqrstuvwxyz"]]}, "27 answers, not 2 to 26"),
        ({"ranked": ["x", ["y", "x"]]}, "two answers are the same"),
        ({"ranked": ["x", " \n"]}, "an answer is empty"),
        ({"ranked": ["x", "\ud800"]}, "ranked.1"),
        ({"ranked": ["x", "y"], "finish_reasons": ["stop"]}, "finish_reasons"),
        ({"messages": []}, "at least 1"),
        ({"messages": [ASKED[0]]}, "does not end with a user"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "does not end with a user"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty prompt"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"seed": 1.5}, "seed"),
        ({"sampling": {"temperatur": 1}}, "unknown field"),
    ],
)
def test_refuses_invalid_preference(
    service: Service, file: Path, wrong: dict[str, Any], message: str
) -> None:
    request = {**RANKED, "finish_reasons": None, **wrong}
    status, answer = post(service, request)
    assert status == 400 and message in answer["error"]["message"], answer
    assert not file.exists()
    assert service.ask("GET", "/v1/preferences")[2]["count"] == 0
    assert service.text("/v1/preferences/export") == (200, "")


def test_concurrent_appends(service: Service, file: Path) -> None:
    def work(number: int) -> None:
        for i in range(10):
            assert post(service, {**PAIR, "chosen": f"{number} {i} " * 3000})[0] == 201

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len({record["answers"][0] for record in records}) == len(records) == 60
    assert service.ask("GET", "/v1/preferences")[2]["count"] == 60


def test_incomplete_line_is_moved_to_another_file(file: Path) -> None:
    PreferenceFile(file).append({"a": "甲" * 50_000})
    whole = file.read_bytes()
    for cut in (1, 2, 50, 70_000, len(whole) - 1):
        file.write_bytes(whole + whole[:cut])
        repaired = PreferenceFile(file)
        if cut == len(whole) - 1:  # only its line break is missing
            assert file.read_bytes() == whole + whole
        else:
            assert file.read_bytes() == whole
            assert file.with_suffix(".torn").read_bytes() == whole[:cut] + b"\n"
            file.with_suffix(".torn").unlink()
        assert repaired.count() == file.read_bytes().count(b"\n")
        assert repaired.append({"b": 1}) == repaired.count()
        assert all(json.loads(line) for line in file.read_bytes().splitlines())
    file.write_bytes(b"torn")
    assert PreferenceFile(file).count() == 0 and file.read_bytes() == b""


def test_file_changed_by_other_programs(file: Path) -> None:
    preferences = PreferenceFile(file)
    assert preferences.append({"a": 1}) == 1
    with file.open("ab") as other:
        other.write(b'{"b": 1}\n{"c": 1}\n{"half')
    assert preferences.count() == 3
    assert b"".join(preferences.lines()) == b'{"a": 1}\n{"b": 1}\n{"c": 1}\n'
    file.write_bytes(b'{"d": 1}\n')
    assert preferences.count() == 1


def test_append_after_incomplete_line(service: Service, file: Path) -> None:
    """Left by an editor, or by a program that was killed while it wrote."""
    assert post(service, PAIR)[0] == 201
    record = file.read_bytes()
    for content, moved in ((record[:-1], b""), (record + b'{"half', b'{"half\n')):
        file.write_bytes(content)
        assert post(service, RANKED)[1]["count"] == 2
        first, second = file.read_bytes().splitlines(keepends=True)
        assert first == record and json.loads(second)["ranking"] == [0, [1, 2], 3]
        torn = file.with_suffix(".torn")
        assert (torn.read_bytes() if torn.exists() else b"") == moved


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind")
def test_full_disk_leaves_complete_lines(service: Service, file: Path) -> None:
    import resource

    assert post(service, PAIR)[0] == 201
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        status, answer = post(service, PAIR)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (status, answer["error"]["message"]) == (507, "the disk is full")
    assert file.read_bytes() == before
    assert post(service, PAIR)[1]["count"] == 2


def test_refuses_unusable_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        PreferenceFile(tmp_path)
    assert os.listdir(tmp_path) == []


def test_annotators_agree_and_take_rankings_back(service: Service, file: Path) -> None:
    sources = [[{"model": "a", "seed": 1}], [{"model": "b"}, {"model": "c"}]]
    for annotator, ranked in (("李", ["fox", "dog"]), ("ann", ["dog", "fox"]), ("ann", ["x", "y"])):
        request = {"messages": ASKED, "ranked": ranked, "annotator": annotator, "sources": sources}
        assert post(service, request)[0] == 201
    record = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    assert record["annotator"] == "李"
    assert record["sources"][0] == [{"model": "a", "sampling": {"seed": 1}}]
    status, _, taken = service.ask("DELETE", "/v1/preferences/last?annotator=ann")
    assert (status, taken) == (
        200, {"object": "preference.deleted", "messages": ASKED, "count": 2}
    )  # fmt: skip
    assert service.ask("DELETE", "/v1/preferences/last")[0] == 404  # all have a name
    report = service.ask("GET", "/v1/preferences/agreement")[2]
    assert report["annotators"] == {"ann": 1, "李": 1} and report["disputed"] == 1
    assert report["alpha"] < 0 and report["disputes"][0]["candidates"] == ["fox", "dog"]
    assert report["disputes"][0]["rankings"] == {"李": [0, 1], "ann": [1, 0]}
    assert {row["model"] for row in report["models"]} == {"a", "b", "c"}
    for wrong in ({"annotator": " "}, {"annotator": "x\n"}, {"sources": [[{"model": "a"}]]}):
        assert post(service, {**PAIR, **wrong})[0] == 400
    file.write_text("no record\n")
    assert service.ask("GET", "/v1/preferences/agreement")[0] == 409
    file.unlink()
    empty = service.ask("GET", "/v1/preferences/agreement")[2]
    assert empty["alpha"] is None and empty["models"] == []
