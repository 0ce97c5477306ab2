"""The extra `docling`, if it is installed: slides, sheets and documents without models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from make_documents import pdf_bytes, word, write_docx

from khaosz.errors import DataError
from khaosz.rag.load import Document, Problem, load_paths

installed = pytest.mark.skipif(
    importlib.util.find_spec("docling") is None, reason="docling is not installed"
)


def load(path: Path) -> tuple[dict[str, Document], list[Problem]]:
    problems: list[Problem] = []
    loaded = load_paths([path], on_problem=problems.append, docling=True)
    return {source.name: document for source, (document,) in loaded}, problems


@pytest.mark.slow  # it imports PyTorch, transformers and more
@installed
def test_slides_sheets_and_documents(tmp_path: Path) -> None:
    import openpyxl
    import pptx

    book = openpyxl.Workbook()
    assert book.active is not None
    for row in (["品名", "price"], ["茶", 3]):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    slides = pptx.Presentation()
    for title in ("企鹅", "Whales"):
        slide = slides.slides.add_slide(slides.slide_layouts[0])
        slide.shapes.title.text = title
        slide.placeholders[1].text = f"{title} live in the sea."
    slides.save(tmp_path / "b.pptx")
    write_docx(tmp_path / "c.docx", word("总则", "1") + word("第一段。"))
    (tmp_path / "d.pptx").write_bytes(b"PK\x03\x04 no slides")
    (tmp_path / "e.pdf").write_bytes(pdf_bytes([[(72, 720, "A page.")]]))
    documents, problems = load(tmp_path)
    assert documents.keys() >= {"a.xlsx", "b.pptx", "c.docx"}
    assert "品名" in documents["a.xlsx"].text and "茶" in documents["a.xlsx"].text
    text, pages = documents["b.pptx"].text, documents["b.pptx"].pages
    assert len(pages) == 1 and text[pages[0] :].startswith("# Whales")
    assert "第一段。" in documents["c.docx"].text
    by_name = {problem.path.name: problem for problem in problems}
    assert "d.pptx" in by_name
    if "e.pdf" in by_name:  # without models, which are not fetched
        assert "docling-tools" in by_name["e.pdf"].hint
    else:
        assert "A page." in documents["e.pdf"].text


def test_missing_docling_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.pptx").write_bytes(b"PK")
    problems: list[Problem] = []
    assert not list(load_paths([tmp_path], on_problem=problems.append))
    assert "--docling" in problems[0].hint
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="docling is not installed"):
        load_paths([tmp_path], on_problem=problems.append, docling=True)
