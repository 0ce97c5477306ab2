"""A connection to PostgreSQL for a store: one schema, our errors, pgvector's type."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np
import psycopg
from psycopg.adapt import Dumper, Loader
from psycopg.pq import Format, TransactionStatus
from psycopg.types import TypeInfo

from khaosz.errors import DataError

_CONNECT_S = 10
PGVECTOR = (0, 8)  # continues through its graph until enough vectors pass a filter


class Database:
    """Raises `DataError` for errors of the server, and for a server that cannot be reached."""

    def __init__(self, url: str, schema: str) -> None:
        self.where = f"{_without_password(url)}#{schema}"
        self._schema = schema
        with self._typed("check the address, and that the server is running"):
            self._db = psycopg.connect(url, autocommit=True, connect_timeout=_CONNECT_S)

    def _set_path(self) -> None:
        """Search our schema, and the one that the extension is installed in."""
        row = self._run(
            "SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace"
            " WHERE e.extname = 'vector'"
        ).fetchone()
        path = f'{self._schema}, "{row[0] if row else "public"}"'
        self._run("SELECT set_config('search_path', ?, false)", (path,))

    def _register_vectors(self) -> None:
        """Pass vectors as arrays. Requires the extension at `PGVECTOR` or later."""
        row = self._run("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()
        version = tuple(map(int, row[0].split(".")[:2])) if row else (0, 0)
        if version < PGVECTOR:
            raise DataError(
                f"{self.where} has pgvector {row[0] if row else 'not installed'}",
                hint="{}.{} is needed: ALTER EXTENSION vector UPDATE".format(*PGVECTOR),
            )
        with self._typed():
            info = TypeInfo.fetch(self._db, "vector")
            assert info is not None
            info.register(self._db)
            dumper = type("VectorDumper", (_VectorDumper,), {"oid": info.oid})
            self._db.adapters.register_dumper(np.ndarray, dumper)
            self._db.adapters.register_loader(info.oid, _VectorLoader)

    @contextmanager
    def _typed(self, hint: str | None = None) -> Iterator[None]:
        try:
            yield
        except psycopg.errors.LockNotAvailable as error:
            raise DataError(f"{self.where} is being written by another process") from error
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.where}: {reason}", hint=hint) from error

    def _run(
        self, query: str, values: Sequence[Any] = (), *, binary: bool = False
    ) -> psycopg.Cursor[Any]:
        """Values stand as `?`, or as %b where they go in binary format."""
        with self._typed():
            return self._db.execute(query.replace("?", "%s"), values or None, binary=binary)

    def _copy(self, into: str, types: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        query = f"COPY {into} FROM STDIN (FORMAT BINARY)"
        with self._typed(), self._db.cursor() as cursor, cursor.copy(query) as copy:
            copy.set_types(types)
            for row in rows:
                copy.write_row(row)

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """All reads inside see one state, whatever is written meanwhile."""
        if self._db.info.transaction_status != TransactionStatus.IDLE:
            yield
            return
        with self._typed(), self._db.transaction():
            self._run("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    query = [(key, value) for key, value in parse_qsl(parts.query) if key != "password"]
    netloc = user.partition(":")[0] + at + host
    return urlunsplit(parts._replace(netloc=netloc, query=urlencode(query, safe="/")))


class _VectorDumper(Dumper):
    """The format of pgvector's vector_recv: uint16 dimensions, uint16 zero, float32, big-endian."""

    format = Format.BINARY

    def dump(self, obj: np.ndarray) -> bytes:
        return struct.pack(">HH", len(obj), 0) + obj.astype(">f4").tobytes()


class _VectorLoader(Loader):
    format = Format.BINARY

    def load(self, data: Any) -> np.ndarray:
        return np.frombuffer(bytes(data), ">f4", offset=4).astype(np.float32)
