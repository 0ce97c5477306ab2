"""Where a knowledge base is stored. One interface (`Store`), two stores:

FILE                              SQLite, in this process
postgresql://user@host/db#NAME    PostgreSQL with pgvector; NAME is a schema (default: khaosz)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from khaosz.errors import ConfigError, DataError
from khaosz.rag.store.sql import Store
from khaosz.rag.store.sqlite import SqliteStore


def open_store(where: Path | str, *, new: bool = True) -> Store:
    """Open a knowledge base; create it if it does not exist and `new`.

    Raises `DataError` for a file that is not a knowledge base, a server that cannot be reached, and
    a missing knowledge base without `new`; `ConfigError` for an invalid address or missing client.
    """
    address = str(where)
    if address.startswith(("postgresql://", "postgres://")):
        if importlib.util.find_spec("psycopg") is None:
            raise ConfigError(
                "the package psycopg is not installed", hint="pip install 'khaosz[postgres]'"
            )
        from khaosz.rag.store.postgres import PostgresStore

        return PostgresStore(address, new=new)
    if "://" in address:
        raise ConfigError(
            f"{address} is not an address of a knowledge base",
            hint="a file, or postgresql://user@host/db#NAME",
        )
    path = Path(where)
    if not new and not path.exists():
        raise DataError(
            f"knowledge base {path} not found", hint=f"khaosz rag add FILES --kb {path}"
        )
    return SqliteStore(path, new=new)
