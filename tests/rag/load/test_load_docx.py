"""DOCX: documents as Word and WPS write them, and malicious containers."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
from make_documents import load_one, problem_of, word, write_docx

from khaosz.rag.load import Limits

pytest.importorskip("mammoth")
pytest.importorskip("selectolax")


def row(*cells: str) -> str:
    return "<w:tr>" + "".join(f"<w:tc>{word(cell)}</w:tc>" for cell in cells) + "</w:tr>"


def test_docx_becomes_markdown(tmp_path: Path) -> None:
    body = (
        word("劳动合同", "T")
        + word("Duties", "1")
        + word("工作时间", "2")
        + word("每周工作四十小时，a < b。")
        + word("first", number=True)
        + word("second", number=True)
        + f"<w:tbl>{row('月份', '工资')}{row('一月', '10|20')}</w:tbl>"
    )
    core = (
        '<cp:coreProperties xmlns:cp="http://schemas.openxmlformats.org/package/2006/metadata/'
        'core-properties" xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:creator>x</dc:creator>'
        "<dc:title>合同 &amp; more</dc:title></cp:coreProperties>"
    )
    path = write_docx(tmp_path / "合同.docx", body, {"docProps/core.xml": core})
    document = load_one(path)
    assert document.text == (
        "# 劳动合同\n\n# Duties\n\n## 工作时间\n\n每周工作四十小时，a < b。\n\n"
        "- first\n- second\n\n| 月份 | 工资 |\n| --- | --- |\n| 一月 | 10\\|20 |"
    )
    assert document.metadata == {"format": "docx", "title": "合同 & more"}
    assert document.name == "合同.docx" and document.pages == ()


def test_deleted_text_is_dropped_and_footnotes_stay(tmp_path: Path) -> None:
    w = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    body = (
        "<w:p><w:r><w:t>kept</w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
        '<w:ins><w:r><w:t> new</w:t></w:r></w:ins><w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    )
    footnotes = f'<w:footnotes {w}><w:footnote w:id="2">{word("注释")}</w:footnote></w:footnotes>'
    rels = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="f" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
        'relationships/footnotes" Target="footnotes.xml"/></Relationships>'
    )
    more = {"word/footnotes.xml": footnotes, "word/_rels/document.xml.rels": rels}
    text = load_one(write_docx(tmp_path / "a.docx", body, more)).text
    assert text.startswith("kept new") and "注释" in text and "gone" not in text


@pytest.mark.parametrize("mode", ["external", "file", "inside"])
def test_pictures_are_neither_fetched_nor_opened(tmp_path: Path, mode: str) -> None:
    target = {
        "external": 'Target="http://127.0.0.1:9/a.png" TargetMode="External"',
        "file": f'Target="file://{tmp_path}/secret.png" TargetMode="External"',
        "inside": 'Target="media/a.png"',
    }[mode]
    rels = (
        '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
        '<Relationship Id="i" Type="http://schemas.openxmlformats.org/officeDocument/2006/'
        f'relationships/image" {target}/></Relationships>'
    )
    link = "r:embed" if mode == "inside" else "r:link"
    picture = (
        "<w:p><w:r><w:drawing><wp:inline><a:graphic><a:graphicData><pic:pic><pic:blipFill>"
        f'<a:blip {link}="i"/></pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline>'
        "</w:drawing></w:r></w:p>"
    )
    more = {"word/_rels/document.xml.rels": rels, "word/media/a.png": bytes(50_000_000)}
    path = write_docx(tmp_path / "a.docx", word("before") + picture + word("after"), more)
    # Fifty megabytes of zeros in a picture do not count: they are not unpacked.
    assert load_one(path, Limits(unpacked_bytes=100_000)).text == "before\n\nafter"


# Attacks


def test_zip_bomb_is_stopped_by_its_ratio(tmp_path: Path) -> None:
    path = write_docx(tmp_path / "a.docx", " " * 30_000_000)
    assert path.stat().st_size < 100_000
    problem = problem_of(path)
    assert problem.message == "unpacks to more than 250 times its size"
    assert problem.code == "unsafe"


def test_unpacked_bytes_are_counted_over_all_parts(tmp_path: Path) -> None:
    more = {f"word/part{n}.xml": "<a>" + "x" * 900_000 + "</a>" for n in range(12)}
    path = write_docx(tmp_path / "a.docx", word("x"), more)
    limits = Limits(unpacked_bytes=10_000_000)
    problem = problem_of(path, limits)
    assert (problem.message, problem.code) == ("unpacks to more than 9 MB", "too_large")
    assert load_one(path).text == "x"


def test_false_size_in_a_header_does_not_help(tmp_path: Path) -> None:
    """The headers declare 30 MB as 30,000 bytes."""
    path = write_docx(tmp_path / "a.docx", " " * 30_000_000)
    raw = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as container:
        size = container.getinfo("word/document.xml").file_size
    false_size = raw.replace(struct.pack("<I", size), struct.pack("<I", 30_000))
    assert false_size != raw
    path.write_bytes(false_size)
    assert "damaged DOCX" in problem_of(path).message


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_refuses_compression_without_bounds(tmp_path: Path, compression: int) -> None:
    path = write_docx(tmp_path / "a.docx", word("x"), compression=compression)
    assert problem_of(path).message == "is compressed by a method that DOCX does not allow"


def test_too_many_entries(tmp_path: Path) -> None:
    more = {f"x/{n}": "" for n in range(100)}
    path = write_docx(tmp_path / "a.docx", word("x"), more)
    assert "unpacks to 105 files" in problem_of(path, Limits(entries=104)).message
    assert load_one(path, Limits(entries=105)).text == "x"


LAUGHS = "".join(
    f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' if n else '<!ENTITY l0 "lol">' for n in range(10)
)
HEAD = '<?xml version="1.0"?>'


@pytest.mark.parametrize(
    "declaration",
    [
        f"<!DOCTYPE d [{LAUGHS}]>",
        '<!DOCTYPE d [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>',
        '<!DOCTYPE d SYSTEM "http://127.0.0.1:9/a.dtd">',
        '<!DOCTYPE d [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p; <!ENTITY l9 "x">]>',
    ],
)
def test_refuses_entities(tmp_path: Path, declaration: str) -> None:
    body = "<w:p><w:r><w:t>&l9;</w:t></w:r></w:p>"
    path = write_docx(tmp_path / "a.docx", body, prolog=HEAD + declaration)
    assert "declares a document type in word/document.xml" in problem_of(path).message


def test_refuses_entities_in_utf16_and_other_parts(tmp_path: Path) -> None:
    for part in ("word/styles.xml", "word/_rels/document.xml.rels", "docProps/core.xml"):
        bomb = f'<?xml version="1.0" encoding="utf-16"?><!DOCTYPE d [{LAUGHS}]><d>&l9;</d>'
        path = write_docx(tmp_path / "a.docx", word("x"), {part: bomb.encode("utf-16")})
        assert f"declares a document type in {part}" in problem_of(path).message


def test_deep_nesting_is_a_problem(tmp_path: Path) -> None:
    deep = "<w:sdt><w:sdtContent>" * 5000 + word("x") + "</w:sdtContent></w:sdt>" * 5000
    path = write_docx(tmp_path / "a.docx", deep)
    assert "nests more than 256 elements" in problem_of(path).message


def test_other_files_named_docx_are_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    for data, message in (
        (b"", "damaged DOCX"),
        (b"PK\x03\x04 and then nothing", "damaged DOCX"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(512), "protected by a password, or an old"),
    ):
        path.write_bytes(data)
        assert message in problem_of(path).message
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("a.xml", "<a/>")
    problem = problem_of(path)
    assert problem.message == "is a ZIP file, but not a DOCX document"
    assert problem.code == "wrong_kind"
    write_docx(path, "<w:p>")
    assert "damaged DOCX file: word/document.xml: mismatched tag" in problem_of(path).message
    write_docx(path, "")
    assert problem_of(path).message == "has no text in it"


def test_truncated_docx_is_a_problem(tmp_path: Path) -> None:
    raw = write_docx(tmp_path / "a.docx", word("x" * 500)).read_bytes()
    path = tmp_path / "b.docx"
    for cut in range(0, len(raw), 97):
        path.write_bytes(raw[:cut])
        assert problem_of(path).hint
