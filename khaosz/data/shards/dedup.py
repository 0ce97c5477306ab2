"""The state of a running `data prepare`: one SQLite file with progress and the texts seen so far.

Duplicates are detected by a 16-byte BLAKE2b hash of the text. A million documents take about 30 MB
on disk and no memory. Hashes and progress are committed together, so they agree after a kill.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from khaosz.database import close_on_error, database_errors, open_database


class PrepareState:
    """`meta` (JSON values by key) and `seen` (hashes), changed together by `commit`.

    Only one process may open it. Raises `DataError` for a second one, and when the file cannot be
    read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._errors = partial(
            database_errors,
            path,
            busy=f"{path.parent.parent} is being prepared by another process",
            hint="remove the output directory and start again",
        )
        with self._errors():
            self._db = open_database(path, timeout=0.2, durable=False, exclusive=True)
            with close_on_error(self._db):
                self._db.execute("PRAGMA cache_size = -32768")  # 32 MB
                self._db.execute("BEGIN IMMEDIATE")
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)"
                )
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY) WITHOUT ROWID"
                )

    def get(self, key: str) -> Any:
        """The value stored under `key`, or None."""
        with self._errors():
            row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO meta VALUES (?, ?)",
                (key, json.dumps(value, ensure_ascii=False)),
            )

    def add_new(self, hashes: np.ndarray, limit: int | None = None) -> np.ndarray:
        """Store hashes (n, 16) uint8; returns bool (n,), True for each that was not stored before.

        The first of equal hashes is new. Stops after `limit` new ones; the rest is neither stored
        nor new.
        """
        new = np.zeros(len(hashes), dtype=bool)
        count = 0
        with self._errors():
            for i, row in enumerate(hashes):
                if limit is not None and count >= limit:
                    break
                inserted = self._db.execute(
                    "INSERT OR IGNORE INTO seen VALUES (?)", (row.tobytes(),)
                )
                new[i] = inserted.rowcount == 1
                count += inserted.rowcount
        return new

    def commit(self) -> None:
        """Commit all changes since the last commit."""
        with self._errors():
            self._db.execute("COMMIT")
            self._db.execute("BEGIN IMMEDIATE")

    def close(self) -> None:
        """Close the file; uncommitted changes are lost."""
        with self._errors():
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        self._db.close()
