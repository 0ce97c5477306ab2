from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from khaosz.config import ColumnsConfig
from khaosz.data.records import readers
from khaosz.data.records.charset import HEAD_BYTES, detect_encoding
from khaosz.data.records.chat import to_messages
from khaosz.data.records.readers import (
    RawBatch,
    Skip,
    detect_language,
    expand_inputs,
    open_source,
    parse_line,
)
from khaosz.errors import DataError

POEM = "明月几时有，把酒问青天。\n不知天上宫阙，今夕是何年。"
RECORDS = [
    {"text": POEM, "n": 1},
    {"text": 'a "quoted" ] , [ {text}\n', "n": 2},
    {"text": "é\u2028"},
]


def records_of(path: Path) -> list[Any]:
    return [
        parse_line(line)
        for batch in open_source(path)
        for line in batch.lines
        if line and not line.isspace()
    ]


def texts_of(path: Path) -> list[str]:
    return [line.decode() for batch in open_source(path) for line in batch.lines]


def skipped_of(path: Path) -> list[tuple[int, str]]:
    return [skip for batch in open_source(path) for skip in batch.skipped]


def as_lines(records: list[Any], end: str = "\n") -> str:
    return "".join(json.dumps(r, ensure_ascii=False) + end for r in records)


def test_jsonl_numbers_lines_and_ignores_line_end_styles(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(("\ufeff" + as_lines(RECORDS, "\r\n")).encode().rstrip())
    assert records_of(path) == RECORDS
    path.write_bytes(b"\n\n" + as_lines(RECORDS[:1]).encode())
    (batch,) = open_source(path)
    assert batch.first_line == 1 and batch.lines[:2] == [b"", b""] and len(batch.lines) == 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16", "utf-16-be"])
def test_encodings_are_recognised(tmp_path: Path, encoding: str) -> None:
    records = [{"text": f"{POEM}第{i}首"} for i in range(300)]
    text = as_lines(records)
    if encoding == "utf-16-be":
        text = "\ufeff" + text
    for name in ("a.jsonl", "a.json", "a.txt"):
        path = tmp_path / name
        content = text if name != "a.json" else json.dumps(records, ensure_ascii=False)
        if encoding == "utf-16-be" and name == "a.json":
            content = "\ufeff" + content
        path.write_bytes(content.encode(encoding))
        batches = list(open_source(path))
        expected = {"utf-8-sig": "utf-8", "utf-16-be": "utf-16"}.get(encoding, encoding)
        assert {batch.encoding for batch in batches} == {expected}
        if name == "a.txt":
            assert texts_of(path) == [text.removeprefix("\ufeff").strip()]
        else:
            assert records_of(path) == records


def test_gb18030_is_decided_by_the_first_megabyte_cut_anywhere() -> None:
    raw = (POEM * 60_000).encode("gb18030")
    for end in range(HEAD_BYTES - 4, HEAD_BYTES):
        assert detect_encoding(raw[:end]) == "gb18030"
    raw = (POEM * 60_000).encode()
    for end in range(HEAD_BYTES - 4, HEAD_BYTES):
        assert detect_encoding(raw[:end]) == "utf-8"


def test_one_bad_line_does_not_make_a_file_gb18030(tmp_path: Path) -> None:
    lines = [json.dumps({"text": POEM}, ensure_ascii=False).encode()] * 5
    lines[2] = '{"text": "床前明月光"}'.encode("gb18030")
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = records_of(path)
    assert found[2] == Skip("not valid UTF-8")
    assert [r for i, r in enumerate(found) if i != 2] == [{"text": POEM}] * 4
    text = tmp_path / "a.txt"
    text.write_bytes(b"\n".join([POEM.encode(), b"\xff\xfe\xff", "好".encode()]))
    assert texts_of(text) == [POEM + "\n好"]
    assert skipped_of(text) == [(3, "not valid UTF-8")]


def test_damage_in_gb18030_and_utf16_costs_one_line(tmp_path: Path) -> None:
    gb = tmp_path / "gb.jsonl"
    good = json.dumps({"text": POEM}, ensure_ascii=False).encode("gb18030")
    gb.write_bytes(b"\n".join([good, b'{"text": "\xff\xff"}', good]))
    assert [r for r in records_of(gb)] == [{"text": POEM}] * 2
    assert skipped_of(gb) == [(2, "not valid GB18030")]
    wide = tmp_path / "wide.jsonl"
    wide.write_bytes(as_lines([{"text": POEM}, {"text": "x"}]).encode("utf-16") + b"\x41")
    assert records_of(wide) == [{"text": POEM}, {"text": "x"}]
    assert skipped_of(wide) == [(3, "not valid UTF-16")]


def test_reads_concatenated_zstd_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    frames = [zstandard.compress(as_lines([r]).encode()) for r in RECORDS]
    path.write_bytes(b"".join(frames))
    assert records_of(path) == RECORDS


def test_zstd_cut_short_or_damaged_names_file_and_place(tmp_path: Path) -> None:
    # Incompressible enough to span several blocks, so that something comes out before the end.
    text = as_lines([{"text": f"{i * 7919 % 104729} {POEM}"} for i in range(20_000)]).encode()
    whole = zstandard.compress(text)
    path = tmp_path / "a.jsonl.zst"
    for length in (len(whole) // 2, len(whole) - 1, 3):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst: zstd data is cut short after \d+"):
            records_of(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"a\.jsonl\.zst"):
        assert records_of(path) == [], "damage must not pass"
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="damaged zstd data after 0 bytes"):
        records_of(path)
    path.write_bytes(b"")
    assert records_of(path) == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(JSON, max_size=8),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_array_equals_json_load_whatever_the_window(
    tmp_path_factory: pytest.TempPathFactory,
    records: list[Any],
    indent: int | None,
    ascii_only: bool,
    chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(f" {text} \n".encode(errors="surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_CHUNK", chunk)
        patch.setattr(readers, "_WINDOW", chunk)
        lines = [line for batch in open_source(path) for line in batch.lines]
    assert [json.loads(line) for line in lines] == records


def test_json_array_damage_has_the_number_of_records(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    whole = json.dumps(RECORDS)
    for bad in (whole[:-1], whole[:-5], whole + "]", whole.replace("}, {", "} {"), "[{},]", "["):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"a\.json: .* after \d records"):
            records_of(path)


def test_json_file_of_lines_is_read_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(as_lines(RECORDS), encoding="utf-8")
    assert records_of(path) == RECORDS


def test_parquet_gives_known_columns_in_batches(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"{POEM}{i}" for i in range(10_000)]
    table = pyarrow.table({"text": texts, "id": list(range(10_000))})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=3000)
    batches = list(open_source(path))
    assert len(batches) > 1
    assert [b.first_line for b in batches][1] == len(batches[0].lines) + 1
    assert records_of(path) == [{"text": text} for text in texts]
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(DataError, match="no known column among body"):
        records_of(path)
    parquet.write_table(pyarrow.table({"text": [b"x"]}), path)
    with pytest.raises(DataError, match="binary"):
        records_of(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match="damaged Parquet"):
        records_of(path)


def test_parquet_structs_lists_maps_and_nulls(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    part = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string())])
    # A union as writers store it: a struct of which one member is set.
    content = pyarrow.struct([("string", pyarrow.string()), ("parts", pyarrow.list_(part))])
    arguments = pyarrow.struct([("x", pyarrow.int64()), ("y", pyarrow.int64())])
    call = pyarrow.struct([("name", pyarrow.string()), ("arguments", arguments)])
    message = pyarrow.struct(
        [("role", pyarrow.string()), ("content", content), ("tool_calls", pyarrow.list_(call))]
    )
    text = {"string": "Hi", "parts": None}
    parts = {
        "string": None,
        "parts": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "."}],
    }
    table = pyarrow.table(
        {
            "text": pyarrow.nulls(1, pyarrow.string()),
            "messages": pyarrow.array(
                [
                    [
                        {"role": "user", "content": text, "tool_calls": None},
                        {"role": "assistant", "content": parts, "tool_calls": None},
                        {
                            "role": "assistant",
                            "content": None,
                            "tool_calls": [{"name": "f", "arguments": {"x": 1, "y": None}}],
                        },
                    ]
                ],
                pyarrow.list_(message),
            ),
            "tools": pyarrow.array(
                [[("name", "f")]], pyarrow.map_(pyarrow.string(), pyarrow.string())
            ),
            "ground_truth": ["42"],
            "picture": [b"\x89PNG"],
        }
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    (record,) = records_of(path)
    chat = to_messages(record)
    call_of_f = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert chat.messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "assistant", "tool_calls": [call_of_f]},
    ]
    assert chat.tools == [{"name": "f"}]
    # Reward functions get every column; other readers those of known layouts.
    assert set(record) == {"messages", "tools"}
    (batch,) = open_source(path, every_column=True)
    assert set(json.loads(batch.lines[0])) == {"messages", "tools", "ground_truth"}
    parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    (batch,) = open_source(path, ColumnsConfig.parse({"text": "body"}))
    assert json.loads(batch.lines[0]) == {"body": "x"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "gb18030"])
def test_csv_rows_are_records(tmp_path: Path, delimiter: str, encoding: str) -> None:
    rows = [
        ["", "prompt", "completion", "label", "unknown"],
        ["0", POEM, 'a "quoted" line\r\nand; another, one\t|', "true", "x"],
        ["1", "empty next", "", "false", "x"],
    ]
    path = tmp_path / "a.csv"
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    assert records_of(path) == [
        {"prompt": rows[1][1], "completion": rows[1][2], "label": "true"},
        {"prompt": "empty next", "label": "false"},
    ]
    assert skipped_of(path) == []
    (batch,) = open_source(path, every_column=True)
    assert json.loads(batch.lines[0])["unknown"] == "x"


def test_damaged_csv_costs_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\nq\ta\nonly one\n"x"y\tb\nq\tc\n"never closed\tz\n')
    assert records_of(path) == [
        {"prompt": "q", "completion": "a"},
        {"prompt": "q", "completion": "c"},
    ]
    assert [number for number, _ in skipped_of(path)] == [2, 3, 5]
    assert skipped_of(path)[0][1] == "not valid CSV: 1 cells, the header has 2"
    path.write_text("body\tid\nx\t1\n")
    with pytest.raises(DataError, match="no known column among body, id"):
        records_of(path)
    path.write_text("")
    assert records_of(path) == []
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["messages"], [json.dumps(chat)]])
    assert to_messages(records_of(path)[0]).messages == chat


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt"])
def test_compressed_files_read_as_the_plain_ones(tmp_path: Path, suffix: str) -> None:
    text = POEM if suffix == ".txt" else as_lines([{"text": POEM}])
    if suffix in (".csv", ".tsv"):
        text = f'text\n"{POEM}"\n'
    raw = text.encode()
    plain = tmp_path / f"a{suffix}"
    plain.write_bytes(raw)
    half = len(raw) // 2
    for end, content in (
        (".gz", gzip.compress(raw)),
        (".GZ", gzip.compress(raw[:half]) + gzip.compress(raw[half:]) + bytes(512)),
        (".zst", zstandard.compress(raw)),
    ):
        path = tmp_path / f"a{suffix}{end}"
        path.write_bytes(content)
        assert texts_of(path) == texts_of(plain)
    assert len(expand_inputs([tmp_path])) == 4


def test_gzip_cut_short_or_damaged_names_file_and_place(tmp_path: Path) -> None:
    whole = gzip.compress(as_lines([{"text": f"{i * 7919} {POEM}"} for i in range(5000)]).encode())
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: gzip data is cut short after \d+ bytes"):
        records_of(path)
    path.write_bytes(b"hello")
    with pytest.raises(DataError, match="damaged gzip data after 0 bytes"):
        records_of(path)
    path.write_bytes(whole + b"trailing")
    with pytest.raises(DataError, match="damaged gzip data"):
        records_of(path)


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError) as caught:
        records_of(tmp_path / "a.parquet")
    assert "khaosz[train]" in (caught.value.hint or "")


def test_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    paragraphs = [f"{i}: " + POEM * 200 for i in range(300)]
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    pieces = texts_of(path)
    assert len(pieces) > 1 and max(map(len, pieces)) < 2 * readers.BATCH_BYTES
    assert [p for piece in pieces for p in piece.split("\n\n")] == paragraphs
    assert [b.first_line for b in open_source(path)] == list(range(1, len(pieces) + 1))
    path.write_text("\n".join(paragraphs), encoding="utf-8")  # without any blank line
    assert "\n".join(texts_of(path)) == "\n".join(paragraphs)
    assert max(len(piece.encode()) for piece in texts_of(path)) < 3 * readers.BATCH_BYTES


def test_batches_are_bounded_and_numbered(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 1000})
    path.write_text((line + "\n") * 5000 + "\n" * 20_000 + line)
    batches = list(open_source(path))
    assert max(batch.n_bytes for batch in batches) < readers.BATCH_BYTES + 2000
    assert max(len(batch.lines) for batch in batches) <= readers.BATCH_LINES
    numbers = [b.first_line for b in batches]
    assert numbers == [1 + sum(len(b.lines) for b in batches[:i]) for i in range(len(batches))]
    assert batches[-1].first_line + len(batches[-1].lines) - 1 == 25_001
    assert batches[-1].file_position == path.stat().st_size


def test_overlong_line_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100_000)
    for suffix in (".jsonl", ".txt"):
        path = tmp_path / ("a" + suffix)
        path.write_bytes(b'{"a":1}\n' + b"x" * 1_000_000 + b'\n{"a":2}\n' + b"y" * 200_000)
        assert [n for n, _ in skipped_of(path)] == [2, 4]
        text = "\n".join(line for line in texts_of(path) if line)
        assert text == '{"a":1}\n{"a":2}'


def test_lines_split_like_bytes_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_CHUNK", 5)
    path = tmp_path / "a.jsonl"
    raw = b"one\n\nthree is long\r\n\n\nsix\n" + b"seven" * 9
    path.write_bytes(raw)
    assert [line for b in open_source(path) for line in b.lines] == [
        line.removesuffix(b"\r") for line in raw.split(b"\n")
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "not a JSON object but list"),
        (b"null", "not a JSON object but NoneType"),
        (b'"x"', "not a JSON object but str"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "number too long"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
    ],
)
def test_parse_line_gives_a_reason(line: bytes, reason: str) -> None:
    found = parse_line(line)
    assert isinstance(found, Skip) and reason in found.reason


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (POEM, "zh"),
        ("The quick brown fox", "en"),
        ("使用 Python 的 asyncio 模块编写程序", "zh"),
        ("The word 明月 (moon) appears in many of his poems about home", "en"),
        ("", "en"),
        ("12345 !!", "en"),
        ("𠮷", "en"),  # outside the basic plane alone: no evidence
        ("Привет, мир", "en"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert detect_language(text) == language


def test_inputs_expand_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.txt", "sub/c.json", "sub/notes.md", "D.PARQUET"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = expand_inputs([tmp_path, tmp_path / "b.jsonl", str(tmp_path / "*.txt")])
    assert [p.relative_to(tmp_path).as_posix() for p in found] == [
        *sorted(["D.PARQUET", "a.txt", "b.jsonl", "sub/c.json"])
    ]
    with pytest.raises(DataError, match="unsupported file type") as caught:
        expand_inputs([tmp_path / "sub/notes.md"])
    assert ".parquet" in (caught.value.hint or "")
    with pytest.raises(DataError, match="does not exist"):
        expand_inputs([tmp_path / "missing.jsonl"])
    with pytest.raises(DataError, match="matches no"):
        expand_inputs([str(tmp_path / "*.tsv")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no"):
        expand_inputs([tmp_path / "empty"])


def test_empty_file_is_one_empty_batch(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.txt", "a.json"):
        (tmp_path / name).touch()
        (batch,) = open_source(tmp_path / name)
        assert isinstance(batch, RawBatch) and not any(batch.lines)
