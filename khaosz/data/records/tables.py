"""Rows of Parquet and CSV files as records."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from khaosz.data.records.columns import column_names
from khaosz.data.records.layouts import known_columns
from khaosz.errors import DataError, one_line

if TYPE_CHECKING:  # document loaders import this module under a limit of memory
    from khaosz.config import ColumnsConfig

_DELIMITERS = ",;\t|"

Row = dict[str, Any] | str
"""A record, or why the row is not one."""


def csv_rows(
    path: Path,
    texts: Iterator[str],
    columns: ColumnsConfig | None,
    every_column: bool,
    max_characters: int,
) -> Iterator[Row]:
    """Rows of a table with a header; an empty cell is an absent value. The separator is the one
    that the header has most of. `texts` are the consecutive parts of the file.

    Raises DataError for a header without a known column.
    """
    csv.field_size_limit(max_characters)
    lines = _lines(texts)
    header = next(lines, "")
    delimiter = max(_DELIMITERS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    known = _read_columns(path, names, columns, every_column) if header else []
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"not valid CSV: {error}"
            continue
        if row and len(row) != len(names):
            yield f"not valid CSV: {len(row)} cells, the header has {len(names)}"
        elif row:
            yield {
                name: cell for name, cell in zip(names, row, strict=True) if cell and name in known
            }


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Lines with their ends: a quoted cell may hold line breaks."""
    pending: list[str] = []  # the line so far, joined once: linear in its length
    for text in texts:
        *whole, rest = text.split("\n")
        for line in whole:
            yield "".join((*pending, line, "\n"))
            pending.clear()
        pending.append(rest)
    if last := "".join(pending):
        yield last


def parquet_rows(
    path: Path, columns: ColumnsConfig | None, every_column: bool
) -> tuple[Iterator[dict[str, Any]], Callable[[], int]]:
    """Rows, and the number of bytes of the file that were read so far. Members of structs that are
    null are left out: a column of structs has the members of all its rows.

    Raises DataError for a damaged file, and for one without a known column.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow", hint="pip install 'khaosz[train]'"
        ) from error
    total = path.stat().st_size
    done = n_rows = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal done, n_rows
        try:
            with parquet.ParquetFile(path, memory_map=False, pre_buffer=False) as file:
                schema = file.schema_arrow
                names = [
                    name
                    for name in schema.names
                    if not every_column or not _is_binary(schema.field(name).type)
                ]
                known = _read_columns(path, names, columns, every_column)
                n_rows = file.metadata.num_rows
                for batch in file.iter_batches(batch_size=256, columns=known, use_threads=False):
                    for row in batch.to_pylist():
                        done += 1
                        yield _without_nulls(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: damaged Parquet after {done} records: {error}",
                hint="download the file again",
            ) from error

    def _is_binary(kind: Any) -> bool:
        types = pyarrow.types
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return rows(), lambda: total * done // n_rows if n_rows else total


def plain(value: Any) -> str:
    """For JSON: dates and decimals become text; bytes would become "b'...'"."""
    if isinstance(value, bytes):
        raise DataError("a text column has binary values", hint="store text as strings")
    return str(value)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):  # a map
            return _without_nulls(dict(value))
        return [_without_nulls(item) for item in value]
    return value


def _read_columns(
    path: Path, names: list[str], columns: ColumnsConfig | None, every_column: bool
) -> list[str]:
    """Those of `names` that a layout or [columns] knows, or all. Raises DataError if none is."""
    mapped = set() if columns is None else set(column_names(columns).values())
    known = [name for name in names if name in known_columns() or name in mapped]
    if not known:
        raise DataError(
            f"{path}: no known column among {', '.join(one_line(name) for name in names[:20])}",
            hint="name the columns in [columns] of the recipe; docs/en/data.md lists all layouts",
        )
    return [name for name in names if name] if every_column else known
