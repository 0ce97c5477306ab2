"""The table of formats against the readers, the walk and the guides."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import khaosz.rag.load
from khaosz.rag.load.formats import FORMATS, INSTEAD, SUFFIXES, format_of
from khaosz.rag.load.walk import walk

FOLDER = Path(khaosz.rag.load.__file__).parent
ROOT = FOLDER.parents[2]


def table() -> dict[str, str]:
    """Suffix -> format, of every row."""
    return {suffix: name for name, row in FORMATS.items() for suffix in row.suffixes.split()}


def test_no_suffix_is_in_two_rows() -> None:
    suffixes = [suffix for row in FORMATS.values() for suffix in row.suffixes.split()]
    assert len(suffixes) == len(set(suffixes)) == len(table())


@pytest.mark.parametrize("docling", [False, True])
def test_walk_accepts_the_suffixes_that_have_a_reader(tmp_path: Path, docling: bool) -> None:
    for suffix in {*table(), *INSTEAD, ".png", ".exe", ".khaosz"}:
        (tmp_path / f"a{suffix}").touch()
    problems = []
    formats = {
        file.path.suffix: file.format for file in walk([tmp_path], problems.append, docling=docling)
    }
    rows = {name for name, row in FORMATS.items() if docling or row.reader or not row.docling}
    assert formats == {suffix: name for suffix, name in table().items() if name in rows}
    assert {problem.path.suffix for problem in problems} == set(INSTEAD) - set(formats)
    if not docling:
        assert set(formats) == set(SUFFIXES)


def test_readers_are_those_of_the_table() -> None:
    """A reader is a module with `parse(raw, limits)`; its package need not be installed."""
    readers = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "parse":
                assert [argument.arg for argument in node.args.args] == ["raw", "limits"]
                readers.add(path.stem)
    assert readers == {row.reader for row in FORMATS.values() if row.reader}


def test_names_without_a_suffix() -> None:
    assert format_of("README") == "text" and format_of("Makefile") == "code"
    assert format_of("nosuffix") is None and format_of(".md") is None


@pytest.mark.parametrize("page", ["docs/en/rag.md", "docs/zh/rag.md"])
def test_guide_lists_the_formats_of_the_table(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|`]+ \| ((?:`\.\w+` ?)+)\|", text, re.MULTILINE)
    listed = sorted(sorted(re.findall(r"\.\w+", row)) for row in rows)
    assert listed == sorted(sorted(row.suffixes.split()) for row in FORMATS.values())
