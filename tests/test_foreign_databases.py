"""Databases of other programs, by all ways to open one: refused, and not a byte has changed."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tiny_models

from khaosz.data.tokenizer import train_tokenizer
from khaosz.database import examine, open_database, require_version
from khaosz.errors import KhaoszError
from khaosz.interop.huggingface import save_model
from khaosz.rag import KnowledgeBase
from khaosz.rag.store import open_store
from khaosz.serve.knowledge.catalogue import Catalogue
from khaosz.serve.models import Limits
from khaosz.serve.records.conversation_store import ConversationStore
from khaosz.serve.run import Address, serve

OTHER = (
    "CREATE TABLE photos (id INTEGER PRIMARY KEY, name TEXT);\nINSERT INTO photos VALUES (1, 'x')"
)
WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.stdin.read().split(";"):
    db.execute(statement)
print("ready", flush=True)
time.sleep(600)
"""
Contents = dict[str, tuple[bytes, int]]


def contents(folder: Path) -> Contents:
    """Hash and time of everything in a folder, and its own time."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in paths
    }


def make(path: Path, script: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript(script)


def writing(path: Path, script: str) -> subprocess.Popen[str]:
    """Another program that has `script` in its -wal and keeps the file open."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("PRAGMA journal_mode = WAL;" + script)
    process.stdin.close()
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    return process


def killed(path: Path, script: str) -> None:
    process = writing(path, script)
    process.kill()
    process.wait()


def moved_with_its_log(path: Path, script: str) -> None:
    killed(path, script)
    Path(f"{path}-shm").unlink()


def damaged(path: Path) -> None:
    make(path, OTHER)
    raw = bytearray(path.read_bytes())
    raw[100:1000] = bytes(900)
    path.write_bytes(raw)


NAMES = ("meta", "sources", "documents", "chunks", "vectors", "terms", "postings")
NAMES += ("bases", "files", "conversations", "texts")  # type: ignore[assignment]
FOREIGN: dict[str, Callable[[Path], object]] = {
    "other tables": lambda path: make(path, OTHER),
    "tables of these names": lambda path: make(
        path,
        "".join(f"CREATE TABLE {name} (key, value);" for name in NAMES),
    ),
    "application id": lambda path: make(path, "PRAGMA application_id = 252006675"),
    "version only": lambda path: make(path, "PRAGMA user_version = 7"),
    "wal mode": lambda path: make(path, f"PRAGMA journal_mode = WAL;{OTHER}"),
    "killed": lambda path: killed(path, OTHER),
    "moved with its log": lambda path: moved_with_its_log(path, OTHER),
    "not a database": lambda path: path.write_bytes(b"\x00\x01 encrypted " * 1000),
    "damaged": damaged,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "read-only": lambda path: (make(path, OTHER), path.chmod(0o444)),
}
OPEN: dict[str, Callable[[Path], object]] = {
    "knowledge base": KnowledgeBase,
    "existing knowledge base": lambda path: open_store(path, new=False),
    "catalogue": Catalogue,
    "conversations": ConversationStore,
}


def refused(opened: Callable[[Path], object], path: Path) -> str:
    before = contents(path.parent)
    with pytest.raises(KhaoszError) as caught:
        opened(path)
    assert contents(path.parent) == before
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value)


@pytest.mark.parametrize("opened", OPEN.values(), ids=OPEN)
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_refused_without_a_change(
    foreign: Callable[[Path], object], opened: Callable[[Path], object], tmp_path: Path
) -> None:
    path = tmp_path / "50% of #1?.db"
    foreign(path)
    assert "cannot be used" in refused(opened, path)


@pytest.fixture
def other_program(tmp_path: Path) -> Iterator[Path]:
    process = writing(tmp_path / "a.db", OTHER)
    yield tmp_path / "a.db"
    process.kill()
    process.wait()


@pytest.mark.parametrize("opened", OPEN.values(), ids=OPEN)
def test_file_that_a_program_has_open(
    other_program: Path, opened: Callable[[Path], object]
) -> None:
    assert "another program" in refused(opened, other_program)


def test_later_versions_of_ours(tmp_path: Path) -> None:
    with KnowledgeBase(tmp_path / "kb") as base, base.store.writing():
        base.store.set("version", "99")
    for name in ("catalogue", "conversations"):
        OPEN[name](tmp_path / name).close()  # type: ignore[attr-defined]
        make(tmp_path / name, "PRAGMA user_version = 99; PRAGMA wal_checkpoint(TRUNCATE)")
    for name, opened in (("kb", KnowledgeBase), *OPEN.items()):
        if (tmp_path / name).exists():
            assert "layout version 99" in refused(opened, tmp_path / name)


def test_link_to_a_foreign_database(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    killed(tmp_path / "far/a.db", OTHER)
    (tmp_path / "link").symlink_to(tmp_path / "far/a.db")
    refused(KnowledgeBase, tmp_path / "link")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = train_tokenizer(iter(["the quick brown fox"] * 20), 300)
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_models.tiny_model(vocab_size=tokenizer.vocab_size), folder)
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("name", ["catalogue.db", "conversations.db"])
def test_data_folder_with_a_foreign_database_keeps_its_modes(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    """`khaosz serve` makes its folder private, but only if it is its own."""
    make(tmp_path / name, OTHER)
    tmp_path.chmod(0o755)
    (tmp_path / name).chmod(0o644)

    def start(path: Path) -> None:
        serve(
            [str(tiny)], data=tmp_path, runs=tmp_path, max_upload=1, address=Address(port=0),
            device="cpu", limits=Limits(), timeout=1.0, announce=pytest.fail,
        )  # fmt: skip

    refused(start, tmp_path / name)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path, tmp_path / name)] == [0o755, 0o644]


def test_empty_file_becomes_a_knowledge_base_only_when_documents_are_added(tmp_path: Path) -> None:
    (tmp_path / "a.kb").touch()
    assert "is empty" in refused(lambda path: open_store(path, new=False), tmp_path / "a.kb")
    with KnowledgeBase(tmp_path / "a.kb") as base:
        base.add_text("x", name="x")


def test_own_files_open_in_any_state(tmp_path: Path) -> None:
    """Open elsewhere, killed, and moved with their log."""
    with KnowledgeBase(tmp_path / "a.kb") as base:
        base.add_text("The tide is high.", name="tide")
        assert Path(f"{base.store.where}-wal").stat().st_size
        for name, ends in (("b.kb", ("", "-wal", "-shm")), ("c.kb", ("", "-wal"))):
            for end in ends:
                shutil.copy(f"{base.store.where}{end}", f"{tmp_path / name}{end}")
        for name in ("a.kb", "b.kb", "c.kb"):
            with KnowledgeBase(open_store(tmp_path / name, new=False)) as other:
                assert len(other.search("tide")) == 1


def test_older_version_passes_and_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    make(path, "CREATE TABLE notes (id INTEGER); PRAGMA user_version = 1")
    schema = "CREATE TABLE notes (id INTEGER, text TEXT);\nCREATE TABLE marks (note INTEGER)"
    upgrades = {1: "ALTER TABLE notes ADD text;\nCREATE TABLE marks (note INTEGER)"}
    examine(path, 2, schema, upgrades=upgrades)
    with closing(open_database(path, timeout=1, durable=True)) as db:
        require_version(db, path, 2, schema, upgrades)
    examine(path, 2, schema)


def test_file_that_another_process_writes_meanwhile(tmp_path: Path) -> None:
    """A search beside a writer that checkpoints all the time is never refused."""
    KnowledgeBase(tmp_path / "a.kb").close()
    code = (
        "import sys; from khaosz.rag import KnowledgeBase\n"
        "for i in range(30):\n"
        "    with KnowledgeBase(sys.argv[1]) as base: base.add_text(f'tide {i}', name=str(i % 5))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a.kb")])
    while process.poll() is None:
        with KnowledgeBase(open_store(tmp_path / "a.kb", new=False)) as base:
            base.documents()
    assert process.returncode == 0
