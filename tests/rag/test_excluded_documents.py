"""Documents that a changed `.khaoszignore` leaves out: removed when their folder is added again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from khaosz.rag import KnowledgeBase


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.md", "b.md", "sub/c.md", "sub/d.md", "sub/deep/e.md"):
        path = tmp_path / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n\nAbout {name}.\n")
    return tmp_path / "docs"


@pytest.fixture
def base(tmp_path: Path, folder: Path) -> KnowledgeBase:
    base = KnowledgeBase(tmp_path / "a.kb")
    assert base.add([folder]).added == 5
    return base


def names(base: KnowledgeBase) -> list[str]:
    return [document.name for document in base.documents()]


def ignore(folder: Path, *lines: str, encoding: str = "utf-8") -> None:
    (folder / ".khaoszignore").write_text("\n".join(lines), encoding=encoding)


def test_changed_and_removed_ignore_file(base: KnowledgeBase, folder: Path) -> None:
    ignore(folder, "sub/", "!sub/c.md")  # nothing inside a folder that is left out
    report = base.add([folder])
    assert (report.removed, report.excluded, report.unchanged) == (3, 3, 2)
    assert names(base) == ["a.md", "b.md"] and base.search("deep", 5) == []
    assert base.add([folder]).removed == 0
    ignore(folder, "sub/*", "!sub/c.md")
    assert base.add([folder]).added == 1 and "sub/c.md" in names(base)
    (folder / ".khaoszignore").unlink()
    assert base.add([folder]).added == 2 and len(names(base)) == 5


def test_nested_ignore_file(base: KnowledgeBase, folder: Path) -> None:
    ignore(folder, "*.md", "!a.md")
    ignore(folder / "sub", "!d.md")
    assert base.add([folder]).excluded == 3
    assert names(base) == ["a.md", "sub/d.md"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gb18030"])
def test_ignore_file_of_an_editor_on_windows(
    base: KnowledgeBase, folder: Path, encoding: str
) -> None:
    """As Notepad or PowerShell write it: private files are not added by mistake."""
    (folder / "私人.md").write_text("private")
    text = "# 私人文件，请不要添加到知识库\r\n私人.md\r\na.md\r\n"
    (folder / ".khaoszignore").write_bytes(text.encode(encoding))
    report = base.add([folder])
    assert report.excluded == 1 and names(base) == ["b.md", "sub/c.md", "sub/d.md", "sub/deep/e.md"]


def test_deleted_and_excluded_are_told_apart(base: KnowledgeBase, folder: Path) -> None:
    (folder / "a.md").unlink()
    ignore(folder, "b.md")
    report = base.add([folder])
    assert (report.removed, report.excluded, len(names(base))) == (2, 1, 3)


def test_documents_of_other_origins_stay(base: KnowledgeBase, folder: Path, tmp_path: Path) -> None:
    """Of another collection, of the folder above, added by name, and of another folder."""
    base.add([folder / "sub"], collection="other")
    base.add([folder / "a.md"])  # it came with the folder; now the user names it
    (folder / ".hidden.md").write_text("hidden")
    base.add([folder / ".hidden.md"])
    (tmp_path / "far").mkdir()
    (tmp_path / "far/b.md").write_text("far")
    base.add([tmp_path / "far"])
    ignore(folder, "*.md")
    ignore(folder / "sub", "*.md")
    assert base.add([folder / "sub"]).removed == 0  # they came with `docs`
    report = base.add([folder])
    assert report.excluded == 4
    assert sorted(names(base)) == [".hidden.md", "a.md", "b.md", "c.md", "d.md", "deep/e.md"]
    assert base.add([folder / "sub"], collection="other").excluded == 3


def test_names_that_are_left_out_since_they_were_added(base: KnowledgeBase, folder: Path) -> None:
    """As by an earlier version, which read `node_modules`."""
    (folder / "node_modules").mkdir()
    (folder / "node_modules/f.md").write_text("package")
    ignore(folder, "!node_modules/")
    assert base.add([folder]).added == 1
    (folder / ".khaoszignore").unlink()
    report = base.add([folder])
    assert (report.excluded, len(names(base))) == (1, 5)
    assert ("node_modules", "caches and packages") in [
        (skipped.path.name, skipped.reason) for skipped in report.skipped
    ]


def test_formats_of_docling_stay(base: KnowledgeBase, folder: Path) -> None:
    """Without --docling they are not read; that does not remove them."""
    (folder / "x.md").write_text("slides")
    base.add([folder])
    path = str((folder / "x.md").resolve())
    os.rename(path, path[:-3] + ".pptx")
    with base.store.writing():
        base.store._run("UPDATE sources SET path = ? WHERE path = ?", (path[:-3] + ".pptx", path))
    assert base.add([folder]).removed == 0


def test_moved_folder(base: KnowledgeBase, folder: Path, tmp_path: Path) -> None:
    """Its ignore files move along; what came from the old place is removed by its path."""
    ignore(folder, "a.md")
    shutil.move(folder, tmp_path / "moved")
    assert base.add([tmp_path / "moved"]).added == 4
    assert len(names(base)) == 9
    assert base.remove(str(folder)) == 5
    assert len(names(base)) == 4


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_folder_that_became_a_link(base: KnowledgeBase, folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "sub", tmp_path / "elsewhere")
    (folder / "sub").symlink_to(tmp_path / "elsewhere")
    report = base.add([folder])
    assert report.removed == 3 and names(base) == ["a.md", "b.md"]
    assert "link to outside" in report.problems[0].message


def test_asks_before_all_documents_of_a_folder_go(base: KnowledgeBase, folder: Path) -> None:
    asked: list[tuple[Path, int]] = []

    def no(path: Path, count: int) -> bool:
        asked.append((path, count))
        return False

    ignore(folder, "a.md")
    assert base.add([folder], may_empty=no).excluded == 1 and not asked
    ignore(folder, "*")
    report = base.add([folder], may_empty=no)
    assert asked == [(folder.resolve(), 4)]
    assert (report.removed, report.excluded, report.kept, len(names(base))) == (0, 0, 4, 4)
    assert base.add([folder], may_empty=lambda path, count: True).excluded == 4
    assert names(base) == []
