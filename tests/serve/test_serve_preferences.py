"""Rankings given on the page are records that training reads as they are, and survive a crash."""

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


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "preferences.jsonl"


@pytest.fixture
def service(tiny: Path, file: Path) -> Iterator[Service]:
    with served(tiny, routers=[preference_routes(PreferenceFile(file))]) as running:
        yield running


def post(service: Service, asked: dict[str, Any]) -> tuple[int, Any]:
    status, _, answer = service.ask("POST", "/v1/preferences", json.dumps(asked))
    return status, answer


def test_a_ranking_is_trained_on_as_it_is(service: Service, file: Path, tiny: Path) -> None:
    assert post(service, RANKED) == (201, {"object": "preference", "pairs": 5, "count": 1})
    assert post(service, PAIR) == (201, {"object": "preference", "pairs": 1, "count": 2})
    shown = {"object": "preferences", "count": 2, "file": "preferences.jsonl"}
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

    # The reader that DPO uses, and DPO itself: every pair is there, those of a ranking together.
    data = load_pairs([file], load_tokenizer(tiny), 256)
    assert not any(entry.skipped for entry in data.report.inputs)
    assert len(data.train) == 6
    assert len({pair.group for pair in data.train[:5]}) == 1
    config = TrainConfig.parse(
        {
            "stage": "dpo", "init_from": tiny, "data": file, "out": file.parent / "dpo",
            "window": 256, "batch_pairs": 2, "micro_batch": 1, "max_steps": 2, "optimizer": "adamw",
            "lr": 1e-3, "embedding_lr": 1e-3, "dtype": "fp32", "compile": "off", "val_fraction": 0,
        }
    )  # fmt: skip
    context = run(config, console=QUIET)
    assert context.progress.step == 2 and context.windows == 6
    # `khaosz preference collect` goes on with the file.
    assert len(ranked_prompts(file, QUIET)) == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"more": 1}, "unknown field"),
        ({"ranked": None}, "give chosen and rejected, or ranked"),
        ({"ranked": None, "chosen": "x"}, "give chosen and rejected, or ranked"),
        ({"chosen": "x", "rejected": "y"}, "not both"),
        ({"ranked": ["x"]}, "at least 2"),
        ({"ranked": [["x", "y"]]}, "at least 2"),
        ({"ranked": ["x", []]}, "ranked.1"),
        ({"ranked": [["x", "y", "z"], [*"abcdef"]]}, "9 answers, not 2 to 8"),
        ({"ranked": ["x", ["y", "x"]]}, "two answers are the same"),
        ({"ranked": ["x", " \n"]}, "an answer is empty"),
        ({"ranked": ["x", "\ud800"]}, "ranked.1"),
        ({"ranked": ["x", "y"], "finish_reasons": ["stop"]}, "finish_reasons"),
        ({"messages": []}, "at least 1"),
        ({"messages": [ASKED[0]]}, "does not end with a user"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "x"}]}, "does not end with a user"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty prompt"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"seed": -1}, "seed"),
        ({"sampling": {"temperatur": 1}}, "unknown field"),
    ],
)
def test_what_could_not_be_trained_on_is_refused(
    service: Service, file: Path, wrong: dict[str, Any], said: str
) -> None:
    asked = {**RANKED, "finish_reasons": None, **wrong}
    status, answer = post(service, asked)
    assert status == 400 and said in answer["error"]["message"], answer
    assert not file.exists()
    assert service.ask("GET", "/v1/preferences")[2]["count"] == 0
    assert service.text("/v1/preferences/export") == (200, "")


def test_many_at_once(service: Service, file: Path) -> None:
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


def test_a_torn_line_is_kept_aside(tmp_path: Path, file: Path) -> None:
    PreferenceFile(file).append({"a": "甲" * 50_000})
    whole = file.read_bytes()
    for cut in (1, 2, 50, 70_000, len(whole) - 1):
        file.write_bytes(whole + whole[:cut])
        mended = PreferenceFile(file)
        if cut == len(whole) - 1:  # only its end is missing
            assert file.read_bytes() == whole + whole
        else:
            assert file.read_bytes() == whole
            assert (tmp_path / "preferences.torn").read_bytes() == whole[:cut] + b"\n"
            (tmp_path / "preferences.torn").unlink()
        assert mended.count() == file.read_bytes().count(b"\n")
        assert mended.append({"b": 1}) == mended.count()
        assert all(json.loads(line) for line in file.read_bytes().splitlines())
    file.write_bytes(b"torn")
    assert PreferenceFile(file).count() == 0 and file.read_bytes() == b""


def test_others_may_append_and_replace(file: Path) -> None:
    kept = PreferenceFile(file)
    assert kept.append({"a": 1}) == 1
    with file.open("ab") as other:
        other.write(b'{"b": 1}\n{"c": 1}\n{"half')
    assert kept.count() == 3
    assert b"".join(kept.lines()) == b'{"a": 1}\n{"b": 1}\n{"c": 1}\n'
    file.write_bytes(b'{"d": 1}\n')
    assert kept.count() == 1


def test_nothing_is_appended_to_a_line_without_its_end(service: Service, file: Path) -> None:
    """An editor has left it so, or a program that was killed while it wrote."""
    assert post(service, PAIR)[0] == 201
    record = file.read_bytes()
    for end, aside in ((record[:-1], b""), (record + b'{"half', b'{"half\n')):
        file.write_bytes(end)
        assert post(service, RANKED)[1]["count"] == 2
        first, second = file.read_bytes().splitlines(keepends=True)
        assert first == record and json.loads(second)["ranking"] == [0, [1, 2], 3]
        torn = file.with_suffix(".torn")
        assert (torn.read_bytes() if torn.exists() else b"") == aside


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind")
def test_a_full_disk_leaves_whole_lines(service: Service, file: Path) -> None:
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


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        PreferenceFile(tmp_path)
    assert os.listdir(tmp_path) == []
