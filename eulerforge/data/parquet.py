"""The text column of a Parquet file, row by row, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from eulerforge.data.readers import BadRecord
from eulerforge.errors import DataError, reason_of


def iter_values(path: Path, text_column: str, skip: int, rows: int) -> Iterator[tuple[int, int, Any]]:
    """Yield (1-based row, rows of the file, text, None or `BadRecord`).

    Args:
        text_column: name of the column; a literal name wins over the nested reading of `a.b`.
        skip: rows to leave out; whole row groups of them are not read.
        rows: read at a time.

    Raises:
        DataError: a damaged file, no such column, or one that does not hold text.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_text(file.schema_arrow, text_column, path)
            yield from _values(file, text_column, skip, rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"data.path: {path} is a damaged Parquet file: {reason_of(error)}", "copy or download the file again"
        ) from None


def _values(
    file: pyarrow.parquet.ParquetFile, text_column: str, skip: int, rows: int
) -> Iterator[tuple[int, int, Any]]:
    total, number = file.metadata.num_rows, 0
    groups = list(range(file.num_row_groups))
    while groups and number + file.metadata.row_group(groups[0]).num_rows <= skip:
        number += file.metadata.row_group(groups.pop(0)).num_rows
    if not groups:
        return
    for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=[text_column]):
        for value in _texts(_column(batch, text_column)):
            number += 1
            if number > skip:
                yield number, total, value


def _column(batch: pyarrow.RecordBatch, text_column: str) -> pyarrow.Array:
    if text_column in batch.schema.names:
        return batch.column(text_column)
    first, *rest = text_column.split(".")
    # A null on the way gives a null text.
    return pyarrow.compute.struct_field(batch.column(first), rest)


def _texts(column: pyarrow.Array) -> Iterator[Any]:
    try:
        yield from column.to_pylist()
    except UnicodeDecodeError:
        for scalar in column:
            try:
                yield scalar.as_py()
            except UnicodeDecodeError as error:
                what = f"invalid UTF-8 at byte {error.start} of the text"
                yield BadRecord("invalid UTF-8", what, "mend the row, or set data.on_bad_line: skip")


def _require_text(schema: pyarrow.Schema, text_column: str, path: Path) -> None:
    kind: Any = None
    if text_column in schema.names:
        kind = schema.field(text_column).type
    else:
        first, *rest = text_column.split(".")
        kind = schema.field(first).type if first in schema.names else None
        for name in rest:
            inside = pyarrow.types.is_struct(kind) and kind.get_field_index(name) >= 0 if kind is not None else False
            kind = kind.field(name).type if inside else None
    if kind is None:
        raise DataError(
            f"{path}: no column {text_column!r}; columns found: {', '.join(map(repr, schema.names[:12]))}",
            "set data.text_column to the column that holds the text",
        )
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(test(kind) for test in tests):
        raise DataError(
            f"{path}: the column {text_column!r} holds {kind}, not text", "set data.text_column to a column of text"
        )
