"""Encodings of text files: which are detected, and what becomes of damage and of doubt."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from khaosz.data.records import charset
from khaosz.data.records.charset import HEAD_BYTES, decode_bytes, detect, spread
from khaosz.data.records.readers import open_source
from khaosz.data.records.report import InputReport
from khaosz.data.records.texts import read_texts
from khaosz.rag.load.decode import decode

CHINESE = (
    "本报告说明了项目在今年的进展情况。我们完成了三个主要任务，并且对用户的意见进行了整理。"
    "下一步的工作，是把系统推广到更多的部门。"
)
TRADITIONAL = (
    "本報告說明了專案在今年的進展情況。我們完成了三個主要任務，並且對使用者的意見進行了整理。"
)
JAPANESE = (
    "この報告書では、今年の進み具合を説明します。利用者からの意見もまとめました。"
    "次は、ほかの部署でも使えるようにします。"
)
KOREAN = (
    "이 보고서는 올해의 진행 상황을 설명합니다. 사용자의 의견도 정리했습니다. "
    "다음은 다른 부서입니다."
)
ENGLISH = "It’s a fine day – and she didn’t mind. We’ve seen the “final” report already."
FRENCH = "Les résultats de l'année dernière ont été vérifiés à nouveau, après la réunion du comité."
GERMAN = "Die Prüfung der Maßnahmen ist für nächste Woche geplant, die Ergebnisse hören wir später."
EURO = "The ticket was €20, the book by Anaïs was €35 and the œuvre was not for sale."
RUSSIAN = "В этом отчёте описаны результаты работы за прошлый год и планы на следующий."
POLISH = "Wyniki badań zostały już ogłoszone, ale część osób wciąż czeka na swoją kolejkę."
GREEK = "Η έκθεση περιγράφει τα αποτελέσματα της περασμένης χρονιάς και τα επόμενα βήματα."
CODE = "def total(rows):\n    # 求和\n    return sum(rows)\n\n# 计算平均值，不含空行\nmean = 0\n"
TABLE = [
    (CHINESE, "gb18030"),
    (CHINESE, "gbk"),
    (CHINESE, "utf-8"),
    (CHINESE, "utf-8-sig"),
    (CHINESE, "utf-16"),
    (CHINESE, "utf-16-le"),
    (CHINESE, "utf-16-be"),
    (CHINESE, "utf-32"),
    (CODE, "gb18030"),
    (TRADITIONAL, "big5"),
    (TRADITIONAL, "gb18030"),
    (JAPANESE, "shift_jis"),
    (JAPANESE, "euc_jp"),
    (JAPANESE, "iso2022_jp"),
    (KOREAN, "iso2022_kr"),
    (CHINESE, "hz"),
    (CODE, "hz"),
    (JAPANESE, "utf-16-le"),
    (KOREAN, "euc_kr"),
    (ENGLISH, "cp1252"),
    (ENGLISH, "utf-16-be"),
    (FRENCH, "cp1252"),
    (FRENCH, "iso-8859-1"),
    (GERMAN, "iso-8859-1"),
    (EURO, "iso-8859-15"),
    (RUSSIAN, "cp1251"),
    (RUSSIAN, "koi8-r"),
    (RUSSIAN, "utf-16-le"),
    (POLISH, "cp1250"),
    (POLISH, "iso-8859-2"),
    (GREEK, "cp1253"),
]


@pytest.mark.parametrize(("text", "encoding"), TABLE)
def test_encodings_of_prose_lists_and_long_files(text: str, encoding: str) -> None:
    words = text.replace("。", "。\n").replace(" ", "\n")
    for variant in (text, words, text[: len(text) // 2], (text + "\n") * 400):
        decoded, found = decode_bytes(variant.encode(encoding))
        assert decoded == variant, found


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("It’s", "cp1252"),
        ("don’t", "cp1252"),
        ("£20 and a café", "cp1252"),
        ("你好", "gb18030"),
        ("中文", "gbk"),
        ("求和", "gb2312"),
        ("中文 ~ 2", "hz"),
        ("五月\n六月\n七月\n十二月", "big5"),
        ("パスワード", "euc_jp"),
        ("ありがとう", "shift_jis"),
        ("감사합니다", "euc_kr"),
        ("Привет", "cp1251"),
    ],
)
def test_short_texts(text: str, encoding: str) -> None:
    assert decode_bytes(text.encode(encoding))[0] == text


@pytest.mark.parametrize(
    "text", ["A~{b} and ~{c}", "echo ~{one,two}", "~{xy~} is a set", "see ~~{ab~}", "ref~{1}"]
)
def test_tildes_in_english_are_not_hz(text: str) -> None:
    assert decode_bytes(text.encode()) == (text, charset.Detected("utf-8"))


@pytest.mark.parametrize("encoding", ["iso2022_jp", "hz", "gb18030", "utf-8"])
def test_damage_after_the_head_spoils_its_record_alone(tmp_path: Path, encoding: str) -> None:
    text = JAPANESE if encoding == "iso2022_jp" else CHINESE
    damage = {"iso2022_jp": b"\x1b$B\x30\x7f\x1b(B", "hz": b"~{\x30\x01~}"}.get(encoding, b"\xff")
    line = json.dumps({"text": text}, ensure_ascii=False).encode(encoding) + b"\n"
    path = tmp_path / "records.jsonl"
    path.write_bytes(line * (HEAD_BYTES // len(line) + 9) + b'{"text": "' + damage + b'"}\n' + line)
    report = InputReport(str(path))
    texts = [each for _, each in read_texts(path, report)]
    assert set(texts) == {text} and report.unread == 1


def test_doubt_is_said_with_the_name_of_the_file(tmp_path: Path) -> None:
    clear, unclear = tmp_path / "clear.txt", tmp_path / "unclear.txt"
    clear.write_bytes((CHINESE * 3).encode("gb18030"))
    [batch] = open_source(clear)
    assert batch.encoding == "gb18030"
    raw = next(bytes([a, b]) for a in range(0xC0, 0xF0) for b in range(0xC0, 0xF0)
               if not detect(bytes([a, b]), whole=True).sure)  # fmt: skip
    unclear.write_bytes(raw)
    [batch] = open_source(unclear)
    assert batch.encoding.endswith("(a guess: unclear.txt)")
    assert str(decode(raw)[1]).endswith(" (a guess)")


def test_each_file_of_a_folder_has_its_own_encoding(tmp_path: Path) -> None:
    texts = {"a": (CHINESE, "gb18030"), "b": (ENGLISH, "cp1252"), "c": (RUSSIAN, "cp1251")}
    for name, (text, encoding) in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text.encode(encoding))
        assert [t for _, t in read_texts(tmp_path / f"{name}.txt")] == [text]


def test_lines_beyond_the_head_are_sampled_and_the_file_is_not_read_whole(tmp_path: Path) -> None:
    ascii_lines = b'{"text": "plain"}\n' * (HEAD_BYTES // 18 + 10)
    line = json.dumps({"text": ENGLISH}, ensure_ascii=False).encode("cp1252") + b"\n"
    path = tmp_path / "late.jsonl"
    path.write_bytes(ascii_lines * 3 + line)
    assert {batch.encoding for batch in open_source(path)} == {"cp1252"}
    assert [t for _, t in read_texts(path)][-1] == ENGLISH

    class Counted(io.BytesIO):
        taken = 0

        def read(self, size: int | None = -1) -> bytes:
            piece = super().read(size)
            self.taken += len(piece)
            return piece

    file = Counted(ascii_lines * 8)
    file.seek(100)
    more = spread(file, len(ascii_lines) * 8)
    assert file.taken == 2 * charset.SPREAD_BYTES and file.tell() == 100
    assert set(more.split(b"\n")) == {b'{"text": "plain"}'}


def test_bytes_that_contradict_the_sample_cost_their_line(tmp_path: Path) -> None:
    line = json.dumps({"text": CHINESE}, ensure_ascii=False).encode() + b"\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(line * 30_000 + b'{"text": "\xe9"}\n' + line * 30_000)
    batches = list(open_source(path))
    assert {batch.encoding for batch in batches} == {"utf-8"}
    assert len(list(read_texts(path))) == 60_000


def test_first_megabyte_may_end_inside_a_character() -> None:
    raw = (CHINESE * 20_000).encode("gb18030")
    for end in range(HEAD_BYTES - 3, HEAD_BYTES + 1):
        assert detect(raw[:end]).encoding == "gb18030"
    assert detect((CHINESE * 20_000).encode()[: HEAD_BYTES - 1]).encoding == "utf-8"


def test_small_numbers_are_not_utf16() -> None:
    """Without a byte order mark: pairs of bytes that look like accented Latin letters."""
    for binary in (b"\x00\x01" * 50, b"\x01\x00\x02\x00" * 500, bytes(range(1, 128)) * 2 + b"\0"):
        assert "utf-16" not in str(detect(binary, whole=True))
    for text in ("Zażółć gęślą jaźń. ", "Příliš žluťoučký kůň ", "L'été à Noël. "):
        for encoding in ("utf-16-le", "utf-16-be"):
            assert str(detect((text * 9).encode(encoding), whole=True)) == encoding
