"""Folders: which files are read, in which order, and which are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from make_documents import load, load_one, problem_of

from khaosz.errors import DataError
from khaosz.folders import LINKED_FOLDERS, Skipped
from khaosz.rag.load import Limits, Problem, WorkerPool, load_file, load_paths
from khaosz.rag.load.ignore import is_ignored, parse_rules

posix = pytest.mark.skipif(os.name == "nt", reason="names and links of POSIX")


def files(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")


def names_in(*paths: Path) -> list[str]:
    loaded, problems = load(*paths)
    assert not problems
    return list(loaded)


def test_folders_are_read_recursively_and_in_order(tmp_path: Path) -> None:
    files(tmp_path, "b.txt", "a/z.md", "a/B.py", "a/b/c/深/文.txt", "Z.txt", "README", "中文.md")
    files(tmp_path, "picture.png", "a/program.exe", "nosuffix")
    expected = ["README", "Z.txt", "a/B.py", "a/b/c/深/文.txt", "a/z.md", "b.txt", "中文.md"]
    assert names_in(tmp_path) == expected


def test_path_to_a_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    files(tmp_path, "nosuffix", ".hidden", "odd.xyz")
    for name in ("nosuffix", ".hidden", "odd.xyz"):
        assert load_one(tmp_path / name).text == name


def test_relative_paths_and_trailing_slashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files(tmp_path, "docs/a.txt")
    monkeypatch.chdir(tmp_path)
    for path in (Path("docs"), Path("./docs/../docs/"), Path("docs/a.txt")):
        ((source, _),) = load_paths([path], on_problem=pytest.fail)
        assert source.path == (tmp_path / "docs" / "a.txt").resolve()
        assert source.name == "a.txt"


def test_each_file_is_read_once(tmp_path: Path) -> None:
    files(tmp_path, "a/x.txt", "a/b/y.txt")
    assert names_in(tmp_path / "a" / "b", tmp_path / "a", tmp_path / "a" / "x.txt") == [
        "y.txt",
        "x.txt",
    ]


def test_hidden_files_are_skipped_unless_included(tmp_path: Path) -> None:
    files(tmp_path, ".env.txt", ".git/config.txt", ".notes/a.txt", ".cache/b.txt", "c.txt")
    assert names_in(tmp_path) == ["c.txt"]
    (tmp_path / ".khaoszignore").write_text("!.notes/\n!.git/\n")
    assert names_in(tmp_path) == [".notes/a.txt", "c.txt"]


def test_ignore_file_of_a_subfolder_applies_below_it(tmp_path: Path) -> None:
    files(tmp_path, "a.txt", "s/a.txt", "s/b.txt", "s/t/a.txt", "s/t/b.txt", "t/b.txt")
    (tmp_path / ".khaoszignore").write_text("a.txt\n", encoding="utf-8-sig")
    (tmp_path / "s" / ".khaoszignore").write_text("/b.txt\n!/a.txt\n")
    assert names_in(tmp_path) == ["s/a.txt", "s/t/b.txt", "t/b.txt"]


PATTERNS = [
    "*.log",
    "build/",
    "/top.txt",
    "docs/*.md",
    "docs/**/x.md",
    "**/cache",
    "logs/**",
    "a/**/z",
    "[ab]*.txt",
    "[!a]?.py",
    "!keep.log",
    "!/build/",
    "#note",
    "\\#note",
    "\\!x",
    "file name",
    "trailing   ",
    "/",
    "**",
    "*",
    "!**/",
    "x.md/",
    "**/**/q/**/**",
    "top.txt/**",
]
NAMES = ["a", "build", "docs", "x.md", "keep.log", "u.log", "top.txt", "ab.txt", "bb.py", "#note"]
NAMES += ["!x", "file name", "trailing", "cache", "logs", "z", "q"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is the reference")
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=5),
    st.lists(
        st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple),
        min_size=1,
        max_size=20,
        unique=True,
    ),
)
@example(["logs/**", "/a/**"], [("logs",), ("logs", "a"), ("a",), ("a", "a")])
def test_patterns_match_as_in_git(
    tmp_path_factory: pytest.TempPathFactory, patterns: list[str], paths: list[tuple[str, ...]]
) -> None:
    folder = tmp_path_factory.mktemp("git")
    subprocess.run(["git", "init", "-q", folder], check=True, capture_output=True)
    (folder / ".git" / "info" / "exclude").write_text("")
    (folder / ".gitignore").write_text("\n".join(patterns) + "\n")
    names = ["/".join(path) for path in paths]
    done = subprocess.run(
        ["git", "-c", "core.excludesFile=/dev/null", "check-ignore", "--no-index", "--stdin"],
        cwd=folder,
        input="\n".join(names),
        capture_output=True,
        text=True,
        check=False,
    )
    ignored = {line.strip('"') for line in done.stdout.splitlines()}
    rules = parse_rules(patterns)

    def skipped(names: Sequence[str]) -> bool:
        """As in a walk: a folder that is skipped hides its contents."""
        return any(
            is_ignored(rules, tuple(names[:depth]), depth < len(names))
            for depth in range(1, len(names) + 1)
        )

    assert {name for path, name in zip(paths, names, strict=True) if skipped(path)} == ignored


def test_hostile_patterns_take_linear_time() -> None:
    rules = parse_rules(["*a" * 30 + "b", "**/a/" * 30 + "b"])
    assert not is_ignored(rules, ("a" * 250,), False)
    assert not is_ignored(rules, ("a",) * 1000, False)


# Links and special files


@posix
def test_links_to_outside_are_problems(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    files(outside, "secret.txt", "more/x.txt")
    files(tmp_path, "folder-2/y.txt")
    files(folder, "a.txt")
    (folder / "link.txt").symlink_to(outside / "secret.txt")
    (folder / "sub").symlink_to(outside)
    (folder / "near").symlink_to(tmp_path / "folder-2")  # starts with the folder's name
    (folder / "broken.txt").symlink_to(outside / "nowhere.txt")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    loaded, problems = load(folder)
    assert list(loaded) == ["a.txt"]
    assert {(p.path.name, p.message) for p in problems} == {
        ("link.txt", "is a link to outside the folder"),
        ("sub", "is a link to outside the folder"),
        ("near", "is a link to outside the folder"),
        ("broken.txt", "is a broken link"),
        ("loop.txt", "is a broken link"),
    }


@posix
def test_links_inside_to_files_are_followed_once_and_to_folders_not(tmp_path: Path) -> None:
    files(tmp_path, "b/x.txt", ".hidden/y.txt")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "c.txt").symlink_to(tmp_path / "b" / "x.txt")
    (tmp_path / "d.txt").symlink_to(tmp_path / ".hidden" / "y.txt")
    (tmp_path / "e").symlink_to(tmp_path / "b")
    skipped: list[Skipped] = []
    list(load_paths([tmp_path], on_problem=pytest.fail, on_skip=skipped.append))
    loaded, problems = load(tmp_path)
    assert not problems and list(loaded) == ["b/x.txt", "d.txt"]
    linked = {each.path for each in skipped if each.reason == LINKED_FOLDERS}
    assert linked == {tmp_path / "e", tmp_path / "b" / "up"}
    assert loaded["d.txt"][0].path == (tmp_path / ".hidden" / "y.txt").resolve()


@posix
def test_path_may_be_a_link_to_a_folder(tmp_path: Path) -> None:
    files(tmp_path, "real/a.txt")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert names_in(tmp_path / "link") == ["a.txt"]


@posix
def test_pipes_and_devices_are_problems(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    loaded, (problem,) = load(tmp_path)
    assert not loaded and problem.message == "is neither a file nor a folder"
    assert problem_of(tmp_path / "pipe.txt").message == "is neither a file nor a folder"
    assert problem_of(Path("/dev/zero")).message == "is neither a file nor a folder"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_name_that_is_not_unicode_is_a_problem(tmp_path: Path) -> None:
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0.txt"))).write_text("x")
    files(tmp_path, "a.txt")
    loaded, (problem,) = load(tmp_path)
    assert list(loaded) == ["a.txt"] and "not valid Unicode" in problem.message


@posix
def test_folders_nest_deeper_than_the_recursion_limit(tmp_path: Path) -> None:
    depth = 1200
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("a.txt").write_text("deep")
    finally:
        os.chdir(here)
    try:
        loaded, problems = load(tmp_path)
        assert not problems and list(loaded) == ["d/" * depth + "a.txt"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)


@pytest.mark.parametrize("name", ["a.doc", "b.PPTX", "c.xlsx", "d.epub"])
def test_unsupported_formats_have_a_hint(tmp_path: Path, name: str) -> None:
    files(tmp_path, name)
    assert "cannot be read" in problem_of(tmp_path / name).message
    _, (problem,) = load(tmp_path)
    assert problem.path == tmp_path / name and problem.hint


def test_unchanged_files_are_not_opened(tmp_path: Path) -> None:
    files(tmp_path, "a.txt", "b.txt", "c.pdf")
    calls = {}

    def unchanged(path: Path, status: os.stat_result) -> bool:
        calls[path.name] = (status.st_size, status.st_mtime_ns)
        path.unlink()  # opening it now is a problem
        return path.name != "b.txt"

    problems: list[Problem] = []
    stats = {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    assert not list(load_paths([tmp_path], on_problem=problems.append, unchanged=unchanged))
    assert calls == stats
    assert [problem.path.name for problem in problems] == ["b.txt"]


def test_file_under_another_name(tmp_path: Path) -> None:
    """The name decides format and citation, not the path."""
    upload = tmp_path / "0123abcd"
    upload.write_text("<h1>鸟</h1><p>企鹅</p>", encoding="utf-8")
    problems: list[Problem] = []
    with WorkerPool(Limits(workers=1)) as pool:
        for name, text in (("鸟.html", "# 鸟\n\n企鹅"), ("鸟.txt", "<h1>鸟</h1><p>企鹅</p>")):
            source, (document,) = load_file(upload, name, pool=pool, on_problem=problems.append)
            assert (source.path, source.name) == (Path(name), name)
            assert (document.name, document.doc_id, document.text.strip()) == (name, name, text)
        with pytest.raises(DataError, match="damaged PDF") as error:
            load_file(upload, "鸟.pdf", pool=pool, on_problem=problems.append)
        assert str(upload) not in str(error.value)
        with pytest.raises(DataError, match="cannot be read"):
            load_file(tmp_path / "none", "a.md", pool=pool, on_problem=problems.append)
        tight = Limits(file_bytes=10, workers=1)
    with (
        WorkerPool(tight) as pool,
        pytest.raises(DataError, match="larger than 10 bytes"),
    ):
        load_file(upload, "a.md", pool=pool, on_problem=problems.append)
    with pytest.raises(DataError, match="ended"):
        load_file(upload, "鸟.html", pool=pool, on_problem=problems.append)
    assert problems == []
