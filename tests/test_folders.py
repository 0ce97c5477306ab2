"""What a folder holds beside a person's files: skipped by all who walk it, and named."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from khaosz.data.records.readers import expand_inputs
from khaosz.data.records.report import summary
from khaosz.data.records.texts import read_interleaved
from khaosz.errors import DataError
from khaosz.rag import KnowledgeBase
from khaosz.serve.errors import ApiError
from khaosz.serve.knowledge.library import file_name

posix = pytest.mark.skipif(os.name == "nt", reason="links and pipes of POSIX")

LEFT_OUT = {
    "version control": [".git/a", ".svn/a", "sub/.hg/a", "CVS/a"],
    "caches and packages": [
        *(".ipynb_checkpoints/a", "__pycache__/a", "node_modules/x/a", ".venv/lib/a"),
    ],
    "lock and temporary files": ["~$a", ".~lock.a#", "a~", ".a.swp", "#a#", "a.tmp"],
    "unfinished downloads": ["a.crdownload", "a.part", "a.partial"],
    "system files": [".DS_Store", "Thumbs.db", "desktop.ini", "._a", "__MACOSX/a"],
    "shortcuts": ["a.lnk", "a.url"],
    "hidden files and folders": [".secret", ".config/a"],
}


def messy(folder: Path, suffix: str, content: str) -> Path:
    """Two files of a person, and what programs put beside them, with names that could be read."""
    names = [f"deep/{'d/' * 20}keep{suffix}", f"数据{suffix}"]
    for name in (each for names in LEFT_OUT.values() for each in names):
        path, stem = Path(name).parent, Path(name).name
        is_fixed = stem in (".DS_Store", "Thumbs.db", "desktop.ini") or "." in stem[1:]
        names.append(str(path / (stem if is_fixed or stem[-1] in "~#" else f"{stem}{suffix}")))
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content.replace("NUMBER", str(i)), encoding="utf-8")
    return folder


def test_training_data_names_what_it_skips(tmp_path: Path) -> None:
    messy(tmp_path / "data", ".jsonl", '{"text": "The text of record NUMBER."}\n')
    (tmp_path / "data/picture.png").write_bytes(b"x")
    files = expand_inputs([tmp_path / "data"])
    assert [file.name for file in files] == ["keep.jsonl", "数据.jsonl"]
    notes = "\n".join(files.notes)
    for reason, names in LEFT_OUT.items():
        assert f"skipped {len(names)}: {reason} (" in notes
    assert "skipped 1: files of other types (picture.png)" in notes
    assert "(.ipynb_checkpoints, .venv, __pycache__, ...)" in notes
    reports: list = []
    assert sorted(read_interleaved([tmp_path / "data"], reports)) == [
        f"The text of record {i}." for i in (0, 1)
    ]
    assert [line.strip() for line in summary(reports)[1:]] == list(files.notes)


def test_documents_name_what_they_skip(tmp_path: Path) -> None:
    messy(tmp_path / "docs", ".md", "# Title\n\nParagraph NUMBER.\n")
    with KnowledgeBase(tmp_path / "a.kb") as base:
        report = base.add([tmp_path / "docs"])
        names = {document.name.rpartition("/")[2] for document in base.documents()}
    assert names == {"keep.md", "数据.md"} and not report.problems
    reasons = [skipped.reason for skipped in report.skipped]
    assert {reason: reasons.count(reason) for reason in LEFT_OUT} == {
        reason: len(names) for reason, names in LEFT_OUT.items()
    }


@posix
def test_links_in_training_data(tmp_path: Path) -> None:
    """A link to a file is followed, once; one to a folder is not, unless the user names it."""
    folder, far = tmp_path / "data", tmp_path / "far"
    for path in (folder / "b", far):
        path.mkdir(parents=True)
    (folder / "b/one.txt").write_text("one")
    (far / "two.txt").write_text("two")
    (folder / "a.txt").symlink_to(folder / "b/one.txt")
    os.link(folder / "b/one.txt", folder / "b/same.txt")
    (folder / "far.txt").symlink_to(far / "two.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "outside").symlink_to(far)
    (folder / "broken.txt").symlink_to(far / "nothing.txt")
    files = expand_inputs([folder])
    assert [file.relative_to(folder).as_posix() for file in files] == ["b/one.txt", "far.txt"]
    assert files.notes == (
        "skipped 2: linked folders (loop, outside)",
        "skipped 2: the same file under another name (b/same.txt, a.txt)",
        "skipped 1: broken links (broken.txt)",
    )
    assert expand_inputs([folder / "outside"]) == [folder / "outside/two.txt"]
    assert expand_inputs([str(folder / "**/*.txt")]) == files
    (folder / "node_modules").mkdir()
    (folder / "node_modules/x.txt").write_text("x")
    named = expand_inputs(
        [str(folder / "*/*.txt")]
    )  # a level of folders, linked or not, each file once
    assert [file.parent.name for file in named] == ["b", "outside"]
    assert "skipped 1: caches and packages (" in named.notes[-1]


@posix
def test_special_files_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / ".khaoszignore")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(tmp_path)  # a socket's path is short
        try:
            listening.bind("socket.txt")
        finally:
            os.chdir(here)
        (tmp_path / "a.txt").write_text("text")
        files = expand_inputs([tmp_path])
        assert [file.name for file in files] == ["a.txt"]
        assert "skipped 2: pipes, sockets and devices (pipe.txt, socket.txt)" in files.notes
        with KnowledgeBase(tmp_path / "x" / "a.kb") as base:
            report = base.add([tmp_path])
        assert report.added == 1 and len(report.problems) == 3
        with pytest.raises(DataError, match="neither a file nor a folder"):
            expand_inputs([tmp_path / "pipe.txt"])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0.txt")).write_text("x")
    (tmp_path / "a.txt").write_text("text")
    files = expand_inputs([tmp_path])
    assert [file.name for file in files] == ["a.txt"]
    assert "not valid Unicode" in json.dumps(files.notes) and "\\udcd6" in files.notes[0]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs another user")
def test_folders_that_may_not_be_read() -> None:
    """Named, and what was added of them stays."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as place:
        folder = Path(name)
        folder.chmod(0o755)
        for inner in ("open", "closed"):
            (folder / inner).mkdir()
            (folder / inner / "a.txt").write_text(f"text of {inner}")
            (folder / inner).chmod(0o755)
            (folder / inner / "a.txt").chmod(0o644)
        with KnowledgeBase(Path(place) / "a.kb") as base:
            assert base.add([folder]).added == 2
            (folder / "closed").chmod(0)
            os.seteuid(65534)
            try:
                files, report = expand_inputs([folder]), base.add([folder])
            finally:
                os.seteuid(0)
            assert (report.removed, report.unchanged) == (0, 1) and report.problems
    assert [file.parent.name for file in files] == ["open"]
    assert files.notes == ("skipped 1: cannot be read: permission denied (closed)",)


@posix
def test_deep_folders_of_training_data(tmp_path: Path) -> None:
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
        Path("a.txt").write_text("deep")
    finally:
        os.chdir(here)
    try:
        assert len(expand_inputs([tmp_path])) == 1
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


def test_folder_that_holds_only_what_is_skipped(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match="holds no") as caught:
        expand_inputs([tmp_path])
    assert caught.value.hint is not None and ".git" in caught.value.hint
    assert "files of other types (notes.md)" in caught.value.hint


@pytest.mark.parametrize("name", ["~$合同.docx", "._a.pdf", "Desktop.ini"])
def test_service_refuses_uploads_of_them(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        file_name(name)
    assert (caught.value.status, caught.value.code) == (415, "unsupported_file_type")
    assert file_name(".notes.md") == ".notes.md"
