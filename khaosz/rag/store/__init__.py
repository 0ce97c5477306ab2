"""Where a knowledge base lives. One interface (`Store`), three homes:

FILE                              SQLite, in this process: the one to begin with
postgresql://user@host/db#NAME    PostgreSQL with pgvector; NAME is a schema (default: khaosz)
qdrant+http://host:6333/NAME      Qdrant; NAME begins the names of its collections
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from khaosz.errors import ConfigError, DataError
from khaosz.rag.store.protocol import (
    NewChunk,
    NewDocument,
    SourceFile,
    Store,
    StoredChunk,
    StoredDocument,
)
from khaosz.rag.store.sqlite import SqliteStore

__all__ = [
    "NewChunk",
    "NewDocument",
    "SourceFile",
    "Store",
    "StoredChunk",
    "StoredDocument",
    "open_store",
]


def open_store(where: Path | str, *, new: bool = True) -> Store:
    """Open a base, or begin one where `new`.

    Raises `DataError` for what is no base or cannot be reached, and where there is none and none
    shall be begun; `ConfigError` for an address that cannot be right or a client that is missing.
    """
    address = str(where)
    if address.startswith(("postgresql://", "postgres://")):
        _need("psycopg", "postgres")
        from khaosz.rag.store.postgres import PostgresStore

        return PostgresStore(address, new=new)
    if address.startswith(("qdrant+http://", "qdrant+https://")):
        _need("qdrant_client", "qdrant")
        from khaosz.rag.store.qdrant import open_qdrant

        return open_qdrant(address, new=new)
    if address.startswith("qdrant:"):
        # The client's local mode keeps pickles, and reading one runs whatever is in it.
        raise ConfigError(
            f"{address}: Qdrant is used through its server, not in a folder",
            hint="qdrant+http://localhost:6333/NAME, or a file: SQLite needs no server",
        )
    if "://" in address:
        raise ConfigError(
            f"{address} is no address of a knowledge base",
            hint="a file, postgresql://user@host/db or qdrant+http://host:6333/NAME",
        )
    path = Path(where)
    if not new and not path.exists():
        raise DataError(
            f"there is no knowledge base {path}", hint=f"khaosz rag add FILES --kb {path}"
        )
    return SqliteStore(path)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"the package {package} is not installed", hint=f"pip install 'khaosz[{extra}]'"
        )
