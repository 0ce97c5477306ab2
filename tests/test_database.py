"""SQLite files: versions, transactions, two writers, and files that cannot be used."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from khaosz.database import (
    database_errors,
    is_busy,
    is_full,
    open_database,
    require_version,
    run_script,
    transaction,
)
from khaosz.errors import DataError

SCHEMA = """
CREATE TABLE notes (id INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE marks (note INTEGER NOT NULL REFERENCES notes ON DELETE CASCADE);
"""


def opened(path: Path, timeout: float = 0.1, *, exclusive: bool = False) -> sqlite3.Connection:
    return open_database(path, timeout=timeout, durable=True, exclusive=exclusive)


def prepared(path: Path) -> sqlite3.Connection:
    db = opened(path)
    require_version(db, path, 2, SCHEMA)
    return db


def count(db: sqlite3.Connection) -> int:
    number: int = db.execute("SELECT count(*) FROM notes").fetchone()[0]
    return number


def test_creates_the_schema_once(tmp_path: Path) -> None:
    for expected in (1, 2):
        with closing(prepared(tmp_path / "a.db")) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            db.execute("INSERT INTO notes (text) VALUES ('x')")
            assert count(db) == expected


def test_refuses_other_versions_and_other_programs_files(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    prepared(path).close()
    with closing(opened(path)) as db:
        with pytest.raises(DataError, match="has layout version 2, this program supports 1"):
            require_version(db, path, 1, SCHEMA)
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
    with closing(opened(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
        with pytest.raises(DataError, match="layout version 0"):
            require_version(db, path, 2, SCHEMA)
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("recipes",)]


def test_upgrades_step_by_step(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    prepared(path).close()
    upgrades = {
        2: "ALTER TABLE notes ADD COLUMN colour TEXT",
        3: "UPDATE notes SET colour = 'red';\nALTER TABLE notes ADD COLUMN size INTEGER",
    }
    with closing(opened(path)) as db:
        db.execute("INSERT INTO notes (text) VALUES ('x')")
        require_version(db, path, 4, SCHEMA, upgrades)
        assert db.execute("SELECT * FROM notes").fetchall() == [(1, "x", "red", None)]
        assert db.execute("PRAGMA user_version").fetchone() == (4,)


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    prepared(path).close()
    upgrades = {2: "DROP TABLE marks", 3: "DROP TABLE missing"}
    with closing(opened(path)) as db:
        with pytest.raises(sqlite3.OperationalError):
            require_version(db, path, 4, SCHEMA, upgrades)
        assert db.execute("SELECT count(*) FROM marks").fetchone() == (0,)
        assert db.execute("PRAGMA user_version").fetchone() == (2,)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_rolls_back_on_any_exception(tmp_path: Path, error: type[BaseException]) -> None:
    with closing(prepared(tmp_path / "a.db")) as db:
        with pytest.raises(error), transaction(db):
            db.execute("INSERT INTO notes (text) VALUES ('x')")
            raise error
        assert count(db) == 0 and not db.in_transaction
        with transaction(db):
            db.execute("INSERT INTO notes (text) VALUES ('x')")
        assert count(db) == 1


def test_foreign_keys_are_enforced(tmp_path: Path) -> None:
    with closing(prepared(tmp_path / "a.db")) as db:
        with pytest.raises(sqlite3.IntegrityError):
            db.execute("INSERT INTO marks VALUES (1)")
        with transaction(db):
            run_script(db, "INSERT INTO notes VALUES (1, 'x');\nINSERT INTO marks VALUES (1)")
            db.execute("DELETE FROM notes")
        assert db.execute("SELECT count(*) FROM marks").fetchone() == (0,)


def test_a_second_writer_waits_then_gets_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(prepared(path)) as first, closing(opened(path)) as second:
        with transaction(first):
            first.execute("INSERT INTO notes (text) VALUES ('x')")
            assert count(second) == 0  # a reader does not wait, and sees the state before
            with (
                pytest.raises(DataError, match=r"a\.db is in use by another process"),
                database_errors(path),
                transaction(second),
            ):
                pass
        with transaction(second):
            second.execute("INSERT INTO notes (text) VALUES ('y')")
        assert count(first) == count(second) == 2


WRITER = """
import sys
from pathlib import Path
from khaosz.database import open_database, transaction
db = open_database(Path(sys.argv[1]), timeout=30, durable=True)
for _ in range(50):
    with transaction(db):
        (number,) = db.execute("SELECT count(*) FROM notes").fetchone()
        db.execute("INSERT INTO notes VALUES (?, 'x')", (number,))
"""


def test_two_processes_lose_no_write(tmp_path: Path) -> None:
    """Each counts and inserts; an id that both chose would violate the primary key."""
    path = tmp_path / "a.db"
    prepared(path).close()
    processes = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    with closing(opened(path)) as db:
        assert count(db) == 100


def test_an_exclusive_file_refuses_a_second_process(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with (
        closing(opened(path, exclusive=True)) as db,
        pytest.raises(DataError, match="busy here"),
        database_errors(path, busy="busy here"),
    ):
        require_version(db, path, 1, SCHEMA)
        opened(path, exclusive=True)
    opened(path, exclusive=True).close()


@pytest.mark.parametrize("name", ["text.db", "missing/a.db", "folder", "damaged.db"])
def test_names_a_file_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_bytes(b"this is text" * 500)
    with closing(sqlite3.connect(tmp_path / "damaged.db")) as db:
        run_script(db, SCHEMA)
    content = bytearray((tmp_path / "damaged.db").read_bytes())
    content[100:1000] = bytes(900)  # the header of the first page
    (tmp_path / "damaged.db").write_bytes(content)
    path = tmp_path / name
    with (
        pytest.raises(DataError, match=f"{path.name} cannot be used: ") as caught,
        database_errors(path, hint="name another file"),
    ):
        prepared(path)
    assert caught.value.hint == "name another file"


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    with closing(prepared(path)) as db:
        db.execute("PRAGMA max_page_count = 20")
        with (
            pytest.raises(DataError, match=r"cannot write .*a\.db: database or disk is full"),
            database_errors(path),
            transaction(db),
        ):
            for _ in range(100):
                db.execute("INSERT INTO notes (text) VALUES (?)", ("x" * 4000,))
        assert count(db) == 0 and not db.in_transaction


def test_errors_without_a_result_code_are_neither_busy_nor_full() -> None:
    db = sqlite3.connect(":memory:")
    db.close()
    with pytest.raises(sqlite3.ProgrammingError) as caught:
        db.execute("SELECT 1")
    assert not is_busy(caught.value) and not is_full(caught.value)
