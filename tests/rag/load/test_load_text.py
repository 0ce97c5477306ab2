"""Text, Markdown, code and JSON Lines in every encoding."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_documents import load, load_one, problem_of

from khaosz.errors import DataError
from khaosz.rag.load import Document, Limits, Problem, load_paths
from khaosz.rag.load.decode import clean, decode

SIMPLIFIED = (
    "明月几时有？把酒问青天。\n不知天上宫阙，今夕是何年。我欲乘风归去，又恐琼楼玉宇，高处不胜寒。"
)
TRADITIONAL = (
    "本會於民國九十年成立，會員大會為最高權力機構。\n理事會的決議，應有過半數理事出席。"
    "『國語』一詞，指學校所教的語言。"
)
MISSING = os.strerror(errno.ENOENT).lower()
ENGLISH = "It’s a “café” – naïve résumé, £20."


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (SIMPLIFIED, "utf-8"),
        (SIMPLIFIED, "utf-8-sig"),
        (SIMPLIFIED, "gb18030"),
        (SIMPLIFIED, "gbk"),
        (SIMPLIFIED, "utf-16"),
        (SIMPLIFIED, "utf-16-le"),
        (SIMPLIFIED, "utf-16-be"),
        (TRADITIONAL, "big5"),
        (TRADITIONAL, "gbk"),
        (TRADITIONAL, "utf-16-be"),
        (ENGLISH, "cp1252"),
        (ENGLISH, "utf-16-le"),
        ("天地玄黄", "gb2312"),  # none of the most common characters
        ("plain", "ascii"),
    ],
)
def test_encodings_are_detected(tmp_path: Path, text: str, encoding: str) -> None:
    path = write(tmp_path / "笔记.txt", text.encode(encoding))
    document = load_one(path)
    assert document.text == text
    assert document.name == document.doc_id == "笔记.txt"
    assert document.metadata["format"] == "text"


def test_encodings_are_detected_in_short_pieces_of_real_text() -> None:
    """Every 60 characters of real text, in each encoding that can write them."""
    sample = Path(__file__).parents[3] / "khaosz" / "data" / "sample" / "statutes_zh.jsonl"
    texts = [json.loads(line)["text"] for line in sample.read_text("utf-8").splitlines()]
    simplified = "".join(texts)[:30_000]
    for source, encoding in ((simplified, "gb18030"), (TRADITIONAL * 40, "big5")):
        pieces = [source[i : i + 60] for i in range(0, len(source) - 60, 60)]
        wrong = [piece for piece in pieces if decode(piece.encode(encoding))[0] != clean(piece)]
        assert not wrong


def test_only_line_ends_and_the_bom_are_changed(tmp_path: Path) -> None:
    original = "\ufeffa\r\nb\rc \t\n\n  d\u3000\u00a0\ufefff\x0c\r\n"
    text = load_one(write(tmp_path / "a.md", original)).text
    assert text == "a\nb\rc \t\n\n  d\u3000\u00a0\ufefff\x0c\n"


def test_source_describes_the_bytes_read(tmp_path: Path) -> None:
    path = write(tmp_path / "sub" / "a.py", "print('你好')\r\n")
    loaded, problems = load(tmp_path)
    source, (document,) = loaded["sub/a.py"]
    assert not problems
    assert source.path == path.resolve() and source.path.is_absolute()
    assert source.size == path.stat().st_size and source.mtime_ns == path.stat().st_mtime_ns
    assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert document == Document(
        "sub/a.py", "print('你好')\n", "sub/a.py", metadata={"format": "code"}
    )


def test_empty_files_are_sources_without_documents(tmp_path: Path) -> None:
    for name, data in (("a.txt", b""), ("b.py", b" \n\t\n"), ("c.md", b"\xef\xbb\xbf")):
        write(tmp_path / name, data)
    loaded, problems = load(tmp_path)
    assert not problems
    assert {name: documents for name, (_, documents) in loaded.items()} == {
        "a.txt": [],
        "b.py": [],
        "c.md": [],
    }


@pytest.mark.parametrize(
    "data",
    [
        b"\x7fELF\x02\x01\x01" + bytes(60),
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)),
        b"looks like text, and then \x00 does not, as its zeros lie anywhere\x00\x00.",
        bytes(range(1, 32)) * 40,
        random.Random(5).randbytes(5000),
        random.Random(6).randbytes(5000).replace(b"\0", b"\1"),
        bytes(4000),
        b"\xff" * 300,
    ],
)
def test_binary_data_in_a_text_file_is_a_problem(tmp_path: Path, data: bytes) -> None:
    problem = problem_of(write(tmp_path / "a.txt", data))
    assert re.search("is not text", problem.message) and problem.hint
    assert problem.code == "not_text"


def test_damage_stays_local(tmp_path: Path) -> None:
    raw = bytearray((SIMPLIFIED * 20).encode())
    raw[300] = 0xFF
    text = load_one(write(tmp_path / "a.txt", bytes(raw))).text
    assert text.count("\ufffd") <= 3 and text.startswith(SIMPLIFIED) and text.endswith(SIMPLIFIED)
    log = "a line of a log\n" * 1000 + "\0\0\0" + "after the crash\n" * 10
    assert load_one(write(tmp_path / "b.log", log)).text == log.replace("\0", "")


@given(st.binary(max_size=300))
def test_bytes_are_text_or_raise_data_error(raw: bytes) -> None:
    try:
        text, _ = decode(raw)
    except DataError:
        return
    text.encode("utf-8")
    assert "\0" not in text and "\r\n" not in text


@given(st.text(max_size=200))
def test_utf8_text_is_only_cleaned(text: str) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    try:
        decoded, _ = decode(raw)
    except DataError:
        return
    if text.isprintable():
        assert decoded == text.removeprefix("\ufeff")


def test_surrogates_are_paired_or_replaced() -> None:
    assert clean("a\ud83d\ude00b\ud83d") == "a😀b\ufffd"


# JSON Lines


def test_jsonl_lines_are_documents_with_their_ids(tmp_path: Path) -> None:
    lines = [
        {"id": "doc-7", "text": "第一条", "title": "民法典", "year": 2020, "url": "a://b"},
        {"id": 12, "text": "二"},
        {"text": "no id"},
        {"id": "", "text": "an empty id is ignored", "format": "x"},
    ]
    path = tmp_path / "data" / "语料.jsonl"
    write(path, "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    loaded, problems = load(tmp_path)
    assert not problems
    assert loaded["data/语料.jsonl"][1] == [
        Document(
            "data/语料.jsonl#doc-7",
            "第一条",
            "doc-7",
            metadata={"title": "民法典", "url": "a://b", "format": "jsonl"},
        ),
        Document("data/语料.jsonl#12", "二", "12", metadata={"format": "jsonl"}),
        Document("data/语料.jsonl#5", "no id", "data/语料.jsonl#5", metadata={"format": "jsonl"}),
        Document(
            "data/语料.jsonl#7",
            "an empty id is ignored",
            "data/语料.jsonl#7",
            metadata={"format": "jsonl"},
        ),
    ]


def test_bad_lines_are_one_problem_and_the_others_load(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        "\n".join(
            [
                '{"id": 1, "text": "kept"}',
                "{not json",
                "[1]",
                '{"id": 2}',
                '{"id": 3, "text": 4}',
                '{"id": 4, "text": " "}',
                '{"id": "1", "text": "again"}',
                '{"text": "' + "[" * 100_000 + '"}',
                "[" * 100_000,
            ]
        ),
    )
    loaded, (problem,) = load(path)
    assert [document.doc_id for document in loaded["a.jsonl"][1]] == ["1", "a.jsonl#8"]
    assert problem.message.startswith("7 lines are not documents; line 2: not valid JSON")


def test_jsonl_escapes_give_no_nul_and_no_surrogate(tmp_path: Path) -> None:
    line = (
        r'{"id": "a\u0000\ud800", "text": "x\u0000y\ud83d\ude00\udc00\r\nz", "t\udfff": "\ud801"}'
    )
    document = load_one(write(tmp_path / "a.jsonl", line))
    assert document.text == "xy😀\ufffd\nz" and document.doc_id == "a\ufffd"
    assert document.metadata == {"t\ufffd": "\ufffd", "format": "jsonl"}


def test_jsonl_in_other_encodings(tmp_path: Path) -> None:
    line = json.dumps({"id": "一", "text": SIMPLIFIED}, ensure_ascii=False)
    for encoding in ("gb18030", "utf-16", "utf-8-sig"):
        assert load_one(write(tmp_path / "a.jsonl", line.encode(encoding))).text == SIMPLIFIED


# Limits and failures


def test_file_over_the_limit_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x" * 101)
    assert problem_of(path, Limits(file_bytes=100)).message == "is larger than 100 bytes"
    assert len(load_one(path, Limits(file_bytes=101)).text) == 101
    assert problem_of(path, Limits(text_characters=100)).message == "has more than 100 characters"


def test_sparse_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("sparse files are not supported")
    assert problem_of(path).message == "is larger than 256 MB"


def test_ten_megabytes_in_one_line(tmp_path: Path) -> None:
    text = "春眠不觉晓 spring " * 500_000
    assert load_one(write(tmp_path / "a.txt", text)).text == text


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_a_problem(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    path.chmod(0)
    problem = problem_of(path)
    assert (problem.message, problem.code) == ("cannot be read: permission denied", "not_read")


def test_file_that_vanishes_is_a_problem_and_the_others_load(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        write(tmp_path / name, name)
    problems: list[Problem] = []
    names = []
    for source, _ in load_paths([tmp_path], on_problem=problems.append):
        names.append(source.name)
        (tmp_path / "b.txt").unlink(missing_ok=True)
    assert names == ["a.txt", "c.txt"]
    assert [p.message for p in problems] == [f"cannot be read: {MISSING}"]


def test_missing_path_raises_at_once(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=f"nowhere cannot be read: {MISSING}") as caught:
        load_paths([tmp_path, tmp_path / "nowhere"], on_problem=pytest.fail)
    assert caught.value.hint
    with pytest.raises(DataError, match="null"):
        load_paths([Path("a\0b")], on_problem=pytest.fail)


def test_text_is_loaded_without_torch_and_without_a_worker(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "x")
    code = (
        "import sys, subprocess, pathlib\n"
        "sys.addaudithook(lambda event, _: event == 'subprocess.Popen' and sys.exit('a process'))\n"
        "from khaosz.rag.load import load_paths\n"
        f"print(list(load_paths([pathlib.Path({str(tmp_path)!r})], on_problem=print)))\n"
        "names = {'torch', 'mammoth', 'pypdfium2', 'selectolax'}\n"
        "assert not names & set(sys.modules), names & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "text='x'" in done.stdout, done.stderr
