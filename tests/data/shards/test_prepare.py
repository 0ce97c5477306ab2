from __future__ import annotations

import hashlib
import json
import os
import pkgutil
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.data.shards.encode import PieceEncoder, cut_text, source_name
from khaosz.data.shards.manifest import PreparedData, PrepareReport, format_report
from khaosz.data.shards.prepare import PrepareProgress, prepare
from khaosz.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.chat_template import OWN_TEMPLATES
from khaosz.errors import DataError, TokenFileError

WORDS = tuple(
    "the moon over water asks why a traveller stays so long and doesn't go home".split()  # noqa: SIM905
)
HAN = "明月几时有把酒问青天不知天上宫阙今夕是何年我欲乘风归去又恐琼楼玉宇高处不胜寒"


def sentence(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return " ".join(rng.choices(WORDS, k=rng.randint(3, 30))) + rng.choice([".", "?\n", "!  "])
    return "".join(rng.choices(HAN, k=rng.randint(5, 40))) + rng.choice("。，？\n")


def record(i: int) -> dict[str, Any]:
    rng = random.Random(i)
    return {
        "text": f"{i} " + "".join(sentence(rng) for _ in range(rng.randint(1, 12))),
        "source": rng.choice(["web", "books"]),
    }


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_tokenizer((sentence(rng) for _ in range(500)), 500)


def write_lines(path: Path, records: list[Any]) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def shards_of(out: Path) -> dict[str, str]:
    """Name -> SHA-256 of every shard."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.tok")}


def texts_in(out: Path, tokenizer: Tokenizer, split: str | None = None) -> list[str]:
    found = []
    data = PreparedData.open(out)
    for group in data.groups:
        if split is not None and group.split != split:
            continue
        for shard in group.shards:
            shard.verify()
            for i in range(len(shard)):
                ids = shard.document(i).tolist()
                assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
                found.append(tokenizer.decode(ids[1:-1]))
    data.close()
    return found


def test_texts_come_back_whatever_the_number_of_workers(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    records = [record(i) for i in range(400)]
    a = write_lines(tmp_path / "a.jsonl", records[:300])
    b = write_lines(tmp_path / "b.jsonl", records[300:] + records[:50])  # 50 duplicates
    seen: list[PrepareProgress] = []
    report = prepare(
        [a, b], tokenizer, tmp_path / "one", workers=0, shard_tokens=5000, progress=seen.append
    )
    assert sorted(texts_in(tmp_path / "one", tokenizer)) == sorted(r["text"] for r in records)
    assert [(i.records, i.kept, i.duplicates) for i in report.inputs] == [
        (300, 300, 0),
        (150, 100, 50),
    ]
    assert seen[-1].file_bytes == seen[-1].total_bytes and seen[-1].documents == 400
    prepare([a, b], tokenizer, tmp_path / "two", workers=2, shard_tokens=5000)
    assert shards_of(tmp_path / "one") == shards_of(tmp_path / "two")
    data = PreparedData.open(tmp_path / "two")
    assert {(g.split, g.source) for g in data.groups} == {("train", "web"), ("train", "books")}
    assert {g.lang for g in data.groups} == {"zh", "en"}
    assert data.stage == "pt" and data.vocab_size == tokenizer.vocab_size
    assert max(len(g.shards) for g in data.groups) > 1
    assert all(s.n_tokens <= 5000 for g in data.groups for s in g.shards)
    assert sum(g.bytes for g in data.groups) == sum(len(r["text"].encode()) for r in records)
    assert sum(g.tokens for g in data.groups) == report.tokens
    assert load_tokenizer(data.tokenizer_dir).fingerprint == data.fingerprint
    assert not (tmp_path / "two" / ".prepare").exists()
    assert not list((tmp_path / "two").glob("*.partial"))


def test_duplicates_within_a_batch_and_kept_on_request(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"text": t} for t in ("x y", "z", " x y\n", "z")])
    report = prepare([path], tokenizer, tmp_path / "out", workers=0)
    assert texts_in(tmp_path / "out", tokenizer) == ["x y", "z"]
    assert report.inputs[0].duplicates == 2
    report = prepare([path], tokenizer, tmp_path / "all", workers=0, dedup=False)
    assert texts_in(tmp_path / "all", tokenizer) == ["x y", "z", " x y\n", "z"]
    assert report.inputs[0].duplicates == 0


def test_skipped_records_have_line_and_reason(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines: list[Any] = [
        {"text": "good"},
        "{broken",
        [1],
        {"body": "x"},
        {"text": 5},
        {"text": "  \n"},
        '{"text": "\\ud800"}',
        "",
        {"text": "fine", "lang": "zh-Hans", "source": "../../etc/passwd"},
    ]
    path = write_lines(tmp_path / "a.jsonl", lines + ["{"] * 30)
    report = prepare([path], tokenizer, tmp_path / "out", workers=0, allow_unread=True)
    (entry,) = report.inputs
    assert (entry.records, entry.kept, entry.unread) == (38, 2, 35)
    reasons = {reason: (s["count"], s["lines"]) for reason, s in entry.skipped.items()}
    broken = reasons.pop("not valid JSON: Expecting property name enclosed in double quotes")
    assert broken[0] == 31 and broken[1] == [2, *range(10, 29)]
    assert reasons == {
        "not a JSON object but list": (1, [3]),
        "unknown layout with keys body; nearest is a text (text), without text": (1, [4]),
        "text is not a string": (1, [5]),
        "empty text": (1, [6]),
        "lone surrogate in a JSON escape": (1, [7]),
    }
    names = [shard for g in PreparedData.open(tmp_path / "out").groups for shard in g.shards]
    assert sorted(s.path.name for s in names) == [
        "train-a-en-00000.tok",
        "train-etc_passwd-zh-00000.tok",
    ]
    shown = format_report(report)
    assert "skipped 31: not valid JSON" in shown and "(line 2, 10, 11," in shown
    assert "38 records, 2 kept\n" in shown


def test_special_tokens_in_text_stay_text(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "a <|eos|> b <|assistant|>"
    path = write_lines(tmp_path / "a.jsonl", [{"text": text}])
    prepare([path], tokenizer, tmp_path / "out", workers=0)
    (group,) = PreparedData.open(tmp_path / "out").groups
    ids = group.shards[0].document(0).tolist()
    assert ids.count(tokenizer.eos_id) == 1 and tokenizer.special_ids["<|assistant|>"] not in ids
    assert texts_in(tmp_path / "out", tokenizer) == [text]


def test_validation_split_depends_on_the_text_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"text": f"document {i}"} for i in range(1000)]
    a = write_lines(tmp_path / "a.jsonl", records)
    b = write_lines(tmp_path / "b.jsonl", [*records[::-1], {"text": "more"}])
    prepare([a], tokenizer, tmp_path / "1", workers=0, val_fraction=0.2)
    prepare([b], tokenizer, tmp_path / "2", workers=0, val_fraction=0.2)
    first = set(texts_in(tmp_path / "1", tokenizer, "val"))
    # 200 expected, standard deviation 12.6: five of them
    assert 137 < len(first) < 263
    assert first == set(texts_in(tmp_path / "2", tokenizer, "val")) - {"more"}
    assert len(texts_in(tmp_path / "1", tokenizer, "train")) == 1000 - len(first)


def test_too_many_sources_share_one_group(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"text": f"document {i}", "source": f"s{i % 80}"} for i in range(160)]
    path = write_lines(tmp_path / "a.jsonl", records)
    prepare([path], tokenizer, tmp_path / "out", workers=0)
    groups = {g.source: g.documents for g in PreparedData.open(tmp_path / "out").groups}
    assert len(groups) == 65 and groups["other"] == 32 and groups["s63"] == 2


def test_max_documents_counts_what_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [{"text": t} for t in ("a", "a", "b", "c", "d")]
    path = write_lines(tmp_path / "a.jsonl", records)
    report = prepare([path], tokenizer, tmp_path / "out", workers=0, max_documents=2)
    assert texts_in(tmp_path / "out", tokenizer) == ["a", "b"]
    assert (report.inputs[0].records, report.inputs[0].duplicates) == (3, 1)


def test_chats_become_ids_and_masks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "月?"}, {"role": "assistant", "content": "water."}]
    records = [
        {"messages": messages},
        {"instruction": "月", "input": "?", "output": "home"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [{"role": "user", "content": "nobody answers"}]},
        {"messages": messages},
    ]
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    report = prepare([path], tokenizer, tmp_path / "out", workers=0, allow_unread=True)
    (entry,) = report.inputs
    assert (entry.kept, entry.duplicates) == (3, 1)
    assert entry.skipped == {"no assistant turn": {"count": 1, "lines": [4]}}
    data = PreparedData.open(tmp_path / "out")
    assert data.stage == "sft"
    shards = [shard for group in data.groups for shard in group.shards]
    for shard in shards:
        shard.verify()
    ids, mask = encode_chat(tokenizer, messages)
    found = [s for s in shards if s.document(0).tolist() == ids]
    assert len(found) == 1 and found[0].loss_mask is not None
    assert found[0].loss_mask[: len(ids)].tolist() == mask
    assert mask[-1] == 1 and ids[-1] == tokenizer.end_id  # the end of the turn is trained


def trained_texts(out: Path, tokenizer: Tokenizer) -> list[str]:
    """The text that contributes to the loss, by document."""
    shards = [shard for group in PreparedData.open(out).groups for shard in group.shards]
    texts = []
    for shard in shards:
        assert shard.loss_mask is not None
        for start, end in zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True):
            ids, mask = shard.tokens[int(start) : int(end)], shard.loss_mask[int(start) : int(end)]
            texts.append(tokenizer.decode(ids[mask != 0].tolist()))
    return texts


def test_turns_of_weight_zero_are_context(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    turns += [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b", "weight": 1}]
    plain = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": turns}, {"messages": plain}])
    report = prepare([path], tokenizer, tmp_path / "out", workers=0)
    assert trained_texts(tmp_path / "out", tokenizer) == ["b<|end|>", "a<|end|>b<|end|>"]
    assert report.inputs[0].duplicates == 0  # other labels make another document


def test_reasoning_is_trained_on_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    answer = {"role": "assistant", "content": "b"}
    records = [
        {"messages": [{"role": "user", "content": "q"}, answer | {name: "so"}]}
        for name in ("reasoning_content", "reasoning", "thinking")
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    prepare([path], tokenizer, tmp_path / "out", workers=0)
    expected = "<think>\nso\n</think>\n\nb<|end|>"
    assert set(trained_texts(tmp_path / "out", tokenizer)) == {expected}
    earlier = {**tokenizer.config, "chat_template": OWN_TEMPLATES[1]}
    without = Tokenizer(tokenizer.serialized, earlier)
    with pytest.raises(DataError, match="reasoning that the chat template does not render"):
        prepare([path], without, tmp_path / "other", workers=0)


def test_a_template_without_answers_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    template = "{{ messages[0].content }}"
    plain = Tokenizer(tokenizer.serialized, {**tokenizer.config, "chat_template": template})
    path = write_lines(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match="renders nothing of the answer"):
        prepare([path], plain, tmp_path / "out", workers=0)


def test_text_files_and_mixed_inputs(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "三国.txt").write_bytes("话说天下大势。\n\n分久必合。\n".encode("gb18030"))
    (tmp_path / "in" / "empty.jsonl").touch()
    write_lines(tmp_path / "in" / "b.jsonl", [{"text": "hello"}])
    report = prepare([tmp_path / "in"], tokenizer, tmp_path / "out", workers=0)
    assert sorted(texts_in(tmp_path / "out", tokenizer)) == [
        "hello",
        "话说天下大势。\n\n分久必合。",
    ]
    assert [i.records for i in report.inputs] == [1, 0, 1]
    assert "encoding=gb18030" in format_report(report)
    assert (tmp_path / "out" / "train-三国-zh-00000.tok").exists()


def test_nothing_usable_is_an_error_and_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"body": "x"}, "{"])
    with pytest.raises(DataError, match="no usable record") as caught:
        prepare([path], tokenizer, tmp_path / "out", workers=0)
    assert "a.jsonl line" in str(caught.value)
    assert not (tmp_path / "out").exists()
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match="no usable record"):
        prepare([tmp_path / "e.jsonl"], tokenizer, tmp_path / "out", workers=0)
    for bad in (
        {"stage": "dpo"},
        {"val_fraction": 1.0},
        {"shard_tokens": 0},
        {"max_documents": 0},
    ):
        with pytest.raises(DataError):
            prepare([path], tokenizer, tmp_path / "out", **bad)
    with pytest.raises(DataError, match="no input"):
        prepare([], tokenizer, tmp_path / "out")


def test_a_finished_directory_is_returned_or_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record(i) for i in range(20)])
    first = prepare([path], tokenizer, tmp_path / "out", workers=0)
    before = shards_of(tmp_path / "out")
    again = prepare([path], tokenizer, tmp_path / "out", workers=0)
    assert again.already_prepared and again.inputs == first.inputs
    assert format_report(again).startswith("already prepared")
    with pytest.raises(DataError, match="other settings: val_fraction differ"):
        prepare([path], tokenizer, tmp_path / "out", workers=0, val_fraction=0.5)
    write_lines(path, [record(0)])
    with pytest.raises(DataError, match="other settings: inputs differ"):
        prepare([path], tokenizer, tmp_path / "out", workers=0)
    assert shards_of(tmp_path / "out") == before
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(DataError, match="but no manifest"):
        prepare([path], tokenizer, tmp_path / "out", workers=0)


N_RECORDS = 2500

# Runs prepare with the arguments of its one JSON argument; commits after every batch.
CHILD = """
import json, resource, signal, sys
from khaosz.data.records import readers
from khaosz.data.shards import prepare as p
from khaosz.data.tokenizer import load_tokenizer
from khaosz.errors import DataError
if __name__ == "__main__":
    a = json.loads(sys.argv[1])
    if a["fsize"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (a["fsize"], resource.RLIM_INFINITY))
    p.COMMIT_BYTES = a["commit"]
    readers.BATCH_BYTES = 1 << 16
    try:
        p.prepare([a["input"]], load_tokenizer(a["tokenizer"]), a["out"], workers=a["workers"],
                  shard_tokens=a["shard"], val_fraction=0.1,
                  progress=lambda q: print(q.documents, flush=True))
    except DataError as error:
        print(error)
        sys.exit(3)
"""


def child(**arguments: Any) -> subprocess.Popen[str]:
    settled = {"fsize": 0, "commit": 1, "workers": 0, "shard": 10_000, **arguments}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(settled)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, str]:
    """Records with duplicates, the tokenizer, and the shards of an undisturbed run."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer.save(folder / "tokenizer")
    records = [record(i) for i in range(N_RECORDS)]
    path = write_lines(folder / "a.jsonl", records + records[:200])
    prepare([path], tokenizer, folder / "whole", workers=0, shard_tokens=10_000, val_fraction=0.1)
    return {
        "input": str(path),
        "tokenizer": str(folder / "tokenizer"),
        "whole": str(folder / "whole"),
    }


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX")
@pytest.mark.parametrize("commit", [1, 1 << 40])
def test_killed_and_run_again_gives_the_same_bytes(
    tmp_path: Path, corpus: dict[str, str], tokenizer: Tokenizer, commit: int
) -> None:
    out = tmp_path / "out"
    arguments = {"input": corpus["input"], "tokenizer": corpus["tokenizer"], "out": str(out)}
    killed = 0
    while True:
        process = child(commit=commit, **arguments)
        assert process.stdout is not None
        lines = 0
        while lines < 2 + killed and process.stdout.readline():
            lines += 1
        if killed < 2 and process.poll() is None:
            time.sleep(0.003 * killed)  # somewhere between two batches
            process.kill()
            process.communicate()
            killed += process.returncode == -signal.SIGKILL
            assert not (out / "manifest.json").exists()
            with pytest.raises(DataError, match="no manifest"):
                PreparedData.open(out)
        else:
            process.communicate()
            assert process.returncode == 0
            break
    assert killed == 2
    assert shards_of(out) == shards_of(Path(corpus["whole"]))
    resumed, whole = (
        json.loads((d / "manifest.json").read_text(encoding="utf-8"))
        for d in (out, Path(corpus["whole"]))
    )
    for manifest in (resumed, whole):
        del manifest["report"]["seconds"]
    assert resumed == whole
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".tok") == [
        "manifest.json",
        "tokenizer",
    ]


class Stopped(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("step", "nth"),
    [
        ("khaosz.data.shards.mmap.encode_header", 3),  # parts joined, not renamed
        ("khaosz.data.shards.mmap.remove_parts", 3),  # renamed, side files still there
        ("khaosz.data.shards.prepare.PrepareState.commit", 3),  # shards on disk, not in the state
        ("khaosz.data.shards.writer.write_json", 1),  # every shard closed, no manifest
        ("khaosz.data.shards.prepare.shutil.rmtree", 1),  # complete but for tidying up
    ],
)
def test_interruption_between_durable_states(
    tmp_path: Path, corpus: dict[str, str], tokenizer: Tokenizer, step: str, nth: int
) -> None:
    """The steps between two durable states: stop right before the nth time one is taken."""
    out = tmp_path / "out"
    settled: dict[str, Any] = {"workers": 0, "shard_tokens": 10_000, "val_fraction": 0.1}
    real = pkgutil.resolve_name(step)
    calls = 0

    def stop(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise Stopped
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, stop)
        patch.setattr("khaosz.data.records.readers.BATCH_BYTES", 1 << 16)
        with pytest.raises(Stopped):
            prepare([corpus["input"]], tokenizer, out, **settled)
    report = prepare([corpus["input"]], tokenizer, out, **settled)
    assert report.documents == N_RECORDS
    assert shards_of(out) == shards_of(Path(corpus["whole"]))
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".tok") == [
        "manifest.json",
        "tokenizer",
    ]


@pytest.mark.skipif(sys.platform == "win32", reason="needs setrlimit")
@pytest.mark.parametrize("kilobytes", [60, 150])
def test_a_full_disk_is_an_error_and_can_be_resumed(
    tmp_path: Path, corpus: dict[str, str], tokenizer: Tokenizer, kilobytes: int
) -> None:
    out = tmp_path / "out"
    arguments = {"input": corpus["input"], "tokenizer": corpus["tokenizer"], "out": str(out)}
    process = child(fsize=kilobytes << 10, **arguments)
    output, _ = process.communicate()
    assert process.returncode == 3, output
    assert "cannot write" in output and str(out) in output
    assert not (out / "manifest.json").exists()
    process = child(**arguments)
    process.communicate()
    assert process.returncode == 0
    assert shards_of(out) == shards_of(Path(corpus["whole"]))


def test_second_process_is_refused(
    tmp_path: Path, corpus: dict[str, str], tokenizer: Tokenizer
) -> None:
    def again(_: PrepareProgress) -> None:
        with pytest.raises(DataError, match="by another process"):
            prepare([corpus["input"]], tokenizer, tmp_path / "out", workers=0, max_documents=5)
        raise Stopped

    with pytest.raises(Stopped):
        prepare(
            [corpus["input"]],
            tokenizer,
            tmp_path / "out",
            workers=0,
            max_documents=5,
            progress=again,
        )


def test_prepared_data_refuses_inconsistent_shards(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="no manifest"):
        PreparedData.open(tmp_path)
    path = write_lines(tmp_path / "a.jsonl", [{"text": "hello"}, {"text": "bye"}])
    out = tmp_path / "out"
    prepare([path], tokenizer, out, workers=0)
    manifest_path = out / "manifest.json"
    good = json.loads(manifest_path.read_text(encoding="utf-8"))
    for change in (
        {"tokenizer": "0" * 64},
        {"vocab_size": 9},
        {"stage": "sft"},
        {"groups": [{**good["groups"][0], "documents": 5}]},
        {"groups": [{**good["groups"][0], "shards": ["missing.tok"]}]},
    ):
        manifest_path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(TokenFileError):
            PreparedData.open(out)
    for text in ("{", "[]", '{"format": 2}', '{"format": 1}'):
        manifest_path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError):
            PreparedData.open(out)
    escaping = {**good["groups"][0], "shards": ["../out/train-a-en-00000.tok"]}
    manifest_path.write_text(json.dumps({**good, "groups": [escaping]}), encoding="utf-8")
    with pytest.raises(DataError, match="file name"):
        PreparedData.open(out)


def test_report_survives_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", [record(1), "{"])
    report = prepare([path], tokenizer, tmp_path / "out", workers=0, allow_unread=True)
    assert PrepareReport.from_dict(json.loads(json.dumps(asdict(report)))) == report


def test_reasons_do_not_grow_with_the_input(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records: list[Any] = [{"messages": [{"role": f"r{i}", "content": "x"}]} for i in range(200)]
    records.append({"instruction": "a", "output": "b"})
    path = write_lines(tmp_path / "a.jsonl", records)
    report = prepare([path], tokenizer, tmp_path / "out", workers=0, allow_unread=True)
    (entry,) = report.inputs
    assert len(entry.skipped) <= 51
    assert sum(skipped["count"] for skipped in entry.skipped.values()) == 200


SPIKY = st.text(
    st.sampled_from("aZ's'tLL reVE \n\r\t\x0b\x1c\x85\u00a0\u3000.,;:!?0９²é\u0301ſ明月，。、<|>{}")
    | st.characters(exclude_categories=["Cs"]),
    max_size=200,
)


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(SPIKY, max_size=6), limit=st.integers(1, 50))
def test_cutting_and_caching_change_no_id(
    tokenizer: Tokenizer, texts: list[str], limit: int
) -> None:
    # stretches of ASCII are only used from 64 characters on: give every example some
    texts = texts + ["“" + text + " and don't, you know; go " * 4 + text for text in texts]
    encoder = PieceEncoder(tokenizer)
    assert encoder.can_cut
    whole = [tokenizer.encode(text) for text in texts]
    assert encoder.encode_batch(texts) == whole
    assert encoder.encode_batch(texts) == whole  # now from memory
    for text, ids in zip(texts, whole, strict=True):
        pieces = list(cut_text(text, limit))
        assert "".join(pieces) == text
        assert [i for piece in encoder.encode_batch(pieces) for i in piece] == ids


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(max_codepoint=127), max_size=120))
def test_ascii_pieces_are_those_of_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert PieceEncoder(tokenizer).encode_batch([text]) == [tokenizer.encode(text)]


def test_long_documents_are_cut_and_joined(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("khaosz.data.shards.encode._PIECE_CHARACTERS", 50)
    monkeypatch.setattr("khaosz.data.shards.encode._ENCODE_CHARACTERS", 130)
    texts = [record(i)["text"] for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": t, "lang": "en"} for t in texts])
    prepare([path], tokenizer, tmp_path / "out", workers=0)
    (group,) = PreparedData.open(tmp_path / "out").groups
    for i, text in enumerate(texts):
        assert group.shards[0].document(i).tolist() == [
            tokenizer.bos_id,
            *tokenizer.encode(text),
            tokenizer.eos_id,
        ]


def test_another_pre_tokenizer_is_never_cut(tokenizer: Tokenizer) -> None:
    spec = json.loads(tokenizer.serialized)
    spec["normalizer"] = {"type": "NFC"}
    foreign = Tokenizer(json.dumps(spec).encode(), tokenizer.config)
    encoder = PieceEncoder(foreign)
    assert not encoder.can_cut
    assert encoder.encode_batch(["e\u0301 x"]) == [foreign.encode("e\u0301 x")]


@pytest.mark.parametrize(
    ("given_name", "name"),
    [
        ("Wiki", "wiki"),
        ("a/b\\c:d", "a_b_c_d"),
        ("..", "unnamed"),
        ("三国 演义", "三国_演义"),
        ("x" * 300, "x" * 40),
        (5, "5"),
    ],
)
def test_source_names_are_safe_for_files(given_name: object, name: str) -> None:
    assert source_name(given_name) == name


def test_torch_is_not_imported() -> None:
    """Workers would pay seconds and hundreds of megabytes each."""
    code = "import sys, khaosz.data.shards.prepare; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
