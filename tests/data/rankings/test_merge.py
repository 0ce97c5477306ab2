"""Rankings of several people: files, merging, and what training reads."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_models import CONTEXT, random_model, tokenizer
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.config import TrainConfig
from khaosz.data.rankings.merge import Merged, merge
from khaosz.data.rankings.ranking_file import append_record, read_rankings, take_back
from khaosz.data.records.preference import load_pairs, to_pairs
from khaosz.errors import DataError
from khaosz.interop.huggingface import save_model
from khaosz.trainer.run import run
from khaosz.trainer.stages.pairs import PairSet

torch.set_num_threads(1)


def record(prompt: str, order: str, annotator: str | None, **more: Any) -> dict[str, Any]:
    """Answers "dog", "fox", "lazy" and "quick" by their first letters, ranked such as `q>df`; shown
    in the order in which they are ranked."""
    words = {"d": "dog", "f": "fox", "l": "lazy", "q": "quick"}
    levels: list[Any] = []
    answers: list[str] = []
    for level in order.split(">"):
        numbers = list(range(len(answers), len(answers) + len(level)))
        levels.append(numbers if len(level) > 1 else numbers[0])
        answers += [words[letter] for letter in level]
    by = {"dog": ["a"], "fox": ["b"], "lazy": ["c"], "quick": ["b", "c"]}
    sources = [[{"model": m, "sampling": {}} for m in by[answer]] for answer in answers]
    made = {"prompt": prompt, "answers": answers, "ranking": levels, "sources": sources, **more}
    return made if annotator is None else {**made, "annotator": annotator}


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path


def merged(tmp_path: Path, *records: dict[str, Any]) -> Merged:
    return merge(read_rankings([write(tmp_path / "file.jsonl", *records)]))


def test_consensus_by_mean_rank_with_a_majority_per_pair(tmp_path: Path) -> None:
    result = merged(
        tmp_path,
        record("one", "d>f>l", "ann"), record("one", "f>d>l", "bo"), record("one", "d>fl", "li"),
        record("two", "d>f>l", "ann"), record("two", "f>d>l", "bo"),
        record("three", "q>f", "ann"),
        record("four", "q>f", "ann"), record("four", "f>q", "bo"),
    )  # fmt: skip
    consensus = result.consensus()
    one, two, three = consensus.records
    assert one["answers"] == ["dog", "fox", "lazy"]  # as first shown
    # Mean ranks 4/3, 11/6, 17/6; each pair has two of three votes.
    assert one["ranking"] == [0, 1, 2] and "pairs" not in one
    assert two["ranking"] == [[0, 1], 2] and "pairs" not in two  # equal means stay a tie
    assert three["annotators"] == ["ann"] and three["ranking"] == [0, 1]
    assert (consensus.pairs, consensus.dropped) == (6, 2)  # d, f of two and q, f of four
    assert [len(to_pairs(each)) for each in consensus.records] == [3, 2, 1]


def test_pair_without_a_majority_is_not_trained_on(tmp_path: Path) -> None:
    """Mean ranks order every pair of a cycle that is broken by one ranking; two of four
    annotators are not a majority."""
    orders = ["d>f>l>q", "d>f>l>q", "f>l>q>d", "fq>l>d"]
    result = merged(tmp_path, *(record("x", order, str(i)) for i, order in enumerate(orders)))
    consensus = result.consensus()
    (x,) = consensus.records
    assert x["ranking"] == [1, 0, 2, 3]  # means 1.625, 2.5, 2.75, 3.125
    assert x["pairs"] == [(1, 2), (1, 3), (2, 3)] and consensus.dropped == 3
    pairs = to_pairs(json.loads(json.dumps(x)))
    assert {(pair.chosen, pair.rejected) for pair in pairs} == {
        ("fox", "lazy"), ("fox", "quick"), ("lazy", "quick"),
    }  # fmt: skip
    assert len({pair.group for pair in pairs}) == 1
    with pytest.raises(DataError, match="in the order of ranking"):
        to_pairs({**x, "pairs": [[0, 1]]})
    with pytest.raises(DataError, match="in the order of ranking"):
        to_pairs({**x, "pairs": [[0]]})


def test_report_of_agreement_and_wins(tmp_path: Path) -> None:
    result = merged(
        tmp_path,
        record("one", "d>f", "ann"), record("one", "d>f", "bo"),
        record("two", "f>d", "ann"), record("two", "d>f", "bo"),
        record("three", "q>d", "bo"), record("three", "d>q", "bo"),  # the later one counts
        record("three", "dq", None),
    )  # fmt: skip
    body = json.loads(json.dumps(result.body()))
    assert (body["rankings"], body["superseded"], body["items"]) == (7, 1, 3)
    assert body["annotators"] == {"ann": 2, "bo": 3, "file": 1}
    assert body["shared_items"] == 3 and body["disputed"] == 1
    assert body["alpha"] is not None and len(body["alpha_interval"]) == 2
    alike = {tuple(each["annotators"]): each["same"] for each in body["agreement"]}
    assert alike == {("ann", "bo"): 0.5, ("bo", "file"): 0.0}
    # a against b: 3 of 4 in one and two, 1.5 of 2 in three; b against c: their answer is the same.
    rows = {each["model"]: each for each in body["models"]}
    assert (rows["a"]["wins"], rows["a"]["comparisons"]) == (6.0, 8)
    assert (rows["b"]["wins"], rows["b"]["comparisons"]) == (2.5, 8)
    assert (rows["c"]["wins"], rows["c"]["comparisons"]) == (1.5, 4)
    assert [each["model"] for each in body["models"]] == ["a", "c", "b"]
    (dispute,) = result.disputes()
    assert dispute["prompt"][0]["content"] == "two" and dispute["discordance"] == 1
    assert dispute["rankings"] == {"ann": [0, 1], "bo": [1, 0]}
    text = "\n".join(result.lines())
    assert "rankings 6, items 3, annotators 3: ann 2, bo 3, file 1" in text
    assert "disputed items: 1" in text and "a: won 75% [" in text


def test_merged_records_train(tmp_path: Path) -> None:
    """One consensus and all rankings of an item have the same weight in a step."""
    rankings = [
        record("the dog", "d>f>l", "ann"), record("the dog", "f>d>l", "bo"),
        record("the dog", "d>fl", "li"), record("the fox", "q>f", "ann"),
    ]  # fmt: skip
    result = merged(tmp_path, *rankings)
    files = {
        "consensus": write(tmp_path / "merged.jsonl", *result.consensus().records),
        "all": write(tmp_path / "all.jsonl", *result.every_ranking()),
    }
    sizes = {}
    for name, file in files.items():
        data = load_pairs(file, tokenizer(), CONTEXT)
        assert not any(entry.skipped for entry in data.report.inputs)
        sizes[name] = [len(draw) for draw in PairSet(data.train).draws]
    assert sizes == {"consensus": [3, 1], "all": [8, 1]}
    # As separate rankings they weigh more.
    plain = load_pairs(write(tmp_path / "plain.jsonl", *rankings), tokenizer(), CONTEXT)
    assert [len(draw) for draw in PairSet(plain.train).draws] == [3, 3, 2, 1]

    save_model(random_model(tokenizer().vocab_size), tmp_path / "tiny")
    tokenizer().save(tmp_path / "tiny")
    for stage, file in (("dpo", files["all"]), ("rm", files["consensus"])):
        config = TrainConfig.parse(
            {
                "stage": stage, "init_from": tmp_path / "tiny", "data": file,
                "out": tmp_path / stage, "window": CONTEXT, "batch_pairs": 2, "micro_batch": 1,
                "max_steps": 1, "optimizer": "adamw", "lr": 1e-3, "embedding_lr": 1e-3,
                "dtype": "fp32", "compile": "off", "val_fraction": 0,
            }
        )  # fmt: skip
        context = run(config, console=Console(file=io.StringIO()))
        assert context.progress.step == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: "),
        ('{"prompt": "x", "chosen": "a", "rejected": "b"}', "line 2: not a ranking"),
        ('{"answers": ["a", "b"], "ranking": [0, 1]}', "line 2: unknown layout"),
        ('{"prompt": "x", "answers": ["a", "b"], "ranking": [0]}', "line 2: ranking does not name"),
        ('{"prompt": "x", "answers": ["a", "a"], "ranking": [0, 1]}', "line 2: two answers are"),
        (
            '{"prompt": "x", "answers": ["a", "b"], "ranking": [0, 1], "sources": [[]]}',
            "line 2: 1 sources for 2 answers",
        ),
        (
            '{"prompt": "x", "answers": ["a", "b"], "ranking": [0, 1], "sources": ["m", 1]}',
            "line 2: sources is not a list",
        ),
        (
            '{"prompt": "x", "answers": ["a", "b"], "ranking": [0, 1], "annotator": 7}',
            "line 2: annotator is not a text",
        ),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path / "r.jsonl", record("x", "d>f", "ann"))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=f"r.jsonl, {message}") as error:
        read_rankings([file])
    assert error.value.hint is not None and "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No\ssuch file"):
        read_rankings([tmp_path / "none.jsonl"])


def test_take_back_removes_the_last_of_an_annotator(tmp_path: Path) -> None:
    file = tmp_path / "new" / "r.jsonl"
    records = [record("1", "d>f", "ann"), record("2", "d>f", "bo"), record("3", "d>f", None)]
    assert take_back(file, "ann") is None
    for each in records:
        append_record(file, each)
    assert take_back(file, "ann") == records[0]
    assert take_back(file, "ann") is None
    assert take_back(file, None) == records[2]
    assert file.read_text() == json.dumps(records[1]) + "\n"


def _annotate(path: Path, name: str) -> None:
    for i in range(30):
        append_record(path, {"annotator": name, "i": i})
        if i % 3 == 2:
            take_back(path, name)


def test_two_annotators_share_a_file(tmp_path: Path) -> None:
    """Both append and take back at once: nothing of the other's is lost."""
    file = tmp_path / "r.jsonl"
    context = multiprocessing.get_context("fork")
    people = [context.Process(target=_annotate, args=(file, name)) for name in ("ann", "bo")]
    for each in people:
        each.start()
    for each in people:
        each.join()
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for name in ("ann", "bo"):
        kept = [each["i"] for each in records if each["annotator"] == name]
        assert kept == [i for i in range(30) if i % 3 != 2]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]  # no lock is left


def test_merge_command(tmp_path: Path) -> None:
    runner = CliRunner()
    ann = write(tmp_path / "ann.jsonl", record("x", "d>f", None), record("y", "d>f", None))
    bo = write(tmp_path / "bo.jsonl", record("x", "f>d", None), record("y", "d>f", None))
    out, disputed = tmp_path / "out" / "merged.jsonl", tmp_path / "disputed.jsonl"
    more = ["--out", str(out), "--disputed", str(disputed)]
    shown = runner.invoke(app, ["preference", "merge", str(ann), str(bo), *more])
    assert shown.exit_code == 0
    assert "rankings 4, items 2, annotators 2: ann 2, bo 2" in shown.stdout
    assert "1 pairs; 1 pairs without a majority dropped" in shown.stdout
    (merged,) = map(json.loads, out.read_text().splitlines())
    assert merged["prompt"][0]["content"] == "y" and merged["annotators"] == ["ann", "bo"]
    assert json.loads(disputed.read_text())["rankings"] == {"ann": [0, 1], "bo": [1, 0]}
    everything = ["--out", str(out), "--keep-all", "--json"]
    body = json.loads(
        runner.invoke(app, ["preference", "merge", str(ann), str(bo), *everything]).stdout
    )
    assert body["disputed"] == 1 and body["consensus"]["pairs_without_majority"] == 1
    assert len(out.read_text().splitlines()) == 4
    for wrong, message in (
        ([str(ann), "--keep-all"], "--keep-all needs --out"),
        ([str(ann), "--out", str(ann)], "is read and written"),
        ([str(write(tmp_path / "empty.jsonl"))], "no rankings in"),
    ):
        result = runner.invoke(app, ["preference", "merge", *wrong])
        assert result.exit_code and message in str(result.exception)
    assert len(ann.read_text().splitlines()) == 2
