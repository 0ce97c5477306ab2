"""The state of a running `data prepare`: one SQLite file with progress and the texts seen so far.

Duplicates are found by a 16-byte BLAKE2b hash of the text. A million documents cost about 30 MB on
disk and nothing in memory. Hashes and progress are committed together, so that after a kill both
speak of the same moment.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.errors import DataError


class PrepareState:
    """`meta` (JSON values by key) and `seen` (hashes), changed together by `commit`.

    Only one process may have it open. Raises DataError when another has, or when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._explained():
            self._database = sqlite3.connect(path, isolation_level=None, timeout=0.2)
            # With an exclusive lock WAL needs no shared memory and works on network disks too.
            self._database.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.execute("PRAGMA cache_size=-32768")  # 32 MB
            self._database.execute("BEGIN IMMEDIATE")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
            )
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY) WITHOUT ROWID"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise DataError(
                    f"{self.path.parent.parent} is being prepared by another process"
                ) from error
            raise DataError(
                f"cannot write {self.path}: {error}",
                hint="free some space and run the same command again: it goes on from there",
            ) from error
        except sqlite3.DatabaseError as error:
            raise DataError(
                f"{self.path} is damaged: {error}",
                hint="remove the output directory and start again",
            ) from error

    def get(self, key: str) -> Any:
        """The value last put under `key`, or None."""
        with self._explained():
            row = self._database.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        with self._explained():
            self._database.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                (key, json.dumps(value, ensure_ascii=False)),
            )

    def add_new(self, hashes: np.ndarray, limit: int | None = None) -> np.ndarray:
        """Remember hashes (n, 16) uint8; bool (n,) True where one was not there before.

        The first of equal hashes counts as new. With `limit`, stops after so many new ones; the
        rest is neither remembered nor new.
        """
        new = np.zeros(len(hashes), dtype=bool)
        found = 0
        with self._explained():
            for i, row in enumerate(hashes):
                if limit is not None and found >= limit:
                    break
                inserted = self._database.execute(
                    "INSERT OR IGNORE INTO seen VALUES (?)", (row.tobytes(),)
                )
                if inserted.rowcount == 1:
                    new[i] = True
                    found += 1
        return new

    def commit(self) -> None:
        """Make everything since the last commit durable, at once."""
        with self._explained():
            self._database.execute("COMMIT")
            self._database.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Give the file back; what was not committed is forgotten."""
        with self._explained():
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
        self._database.close()
