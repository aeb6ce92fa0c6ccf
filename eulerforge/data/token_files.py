"""Token ids that another tool has written: raw maps of `dolma tokens`, `.npy` with a header, flat `.bin` files.

They are used in place, with an index of documents: from the `.csv.gz` that `dolma tokens` writes beside each file
(start, end, id, source, line), else a document ends at each EOS token. They are taken as they are: no BOS or EOS is
added.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from eulerforge.data.shards import ShardWriter
from eulerforge.data.sources import SourceFile
from eulerforge.errors import DataError

_BLOCK = 2**22
"""Ids looked at together: 16 MB at most."""


@dataclass(frozen=True)
class TokenFile:
    """Where the ids of a file lie.

    Attributes:
        header: bytes before the first id.
        index: the file's table of documents, None without one.
    """

    path: Path
    header: int
    dtype: np.dtype[Any]
    count: int
    index: Path | None


def index_of(path: Path) -> Path | None:
    """The table of documents that `dolma tokens` wrote beside a file."""
    table = path.with_name(f"{path.name.removesuffix('.npy')}.csv.gz")
    return table if path.name.endswith(".npy") and table.is_file() else None


def table_in_use(path: Path) -> Path | None:
    """The table of documents that is used for a file: that beside a raw map. A `.npy` with a header needs none."""
    return None if _is_numpy(path) else index_of(path)


def _is_numpy(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(6) == b"\x93NUMPY"


def describe(file: SourceFile, token_dtype: str | None) -> TokenFile:
    """Find out how the ids of a file are stored.

    Args:
        token_dtype: `data.token_dtype`.

    Raises:
        DataError: it is not known, or the file cannot hold ids of it.
    """
    if _is_numpy(file.path):
        return _describe_numpy(file)
    index = index_of(file.path)
    if token_dtype is None:
        if index is None:
            raise DataError(
                f"data.path: {file.path} holds raw token ids, and their size is not known",
                "set data.token_dtype: uint16 or uint32, as they were written",
            )
        last = _last_end(index)
        width, rest = divmod(file.size, last) if last else (2, file.size)
        if rest or width not in (2, 4):
            raise DataError(
                f"data.path: {index} names {last:,} tokens, and {file.path} has {file.size:,} bytes",
                "copy both files again; they belong together",
            )
        token_dtype = f"uint{width * 8}"
    dtype = np.dtype(token_dtype).newbyteorder("<")
    if file.size % dtype.itemsize:
        raise DataError(
            f"data.path: {file.path} has {file.size:,} bytes, which is no whole number of {token_dtype}",
            "correct data.token_dtype, or copy the file again",
        )
    return TokenFile(file.path, 0, dtype, file.size // dtype.itemsize, index)


def _describe_numpy(file: SourceFile) -> TokenFile:
    try:
        array = np.load(file.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"data.path: {file.path} is a damaged .npy file: {error}", "write it again") from None
    if array.ndim != 1 or array.dtype.kind not in "ui" or array.dtype.itemsize not in (2, 4, 8):
        raise DataError(
            f"data.path: {file.path} holds {array.dtype} of shape {array.shape}, not one row of token ids",
            "write ids as one dimension of uint16 or uint32",
        )
    return TokenFile(file.path, int(array.offset), array.dtype, len(array), None)


def add_documents(
    tokens: TokenFile, writer: ShardWriter, eos_id: int | None, largest_id: int, report: Callable[[int, int], None]
) -> None:
    """Index the documents of a token file.

    Args:
        largest_id: ids beyond it are refused.
        report: told the documents and tokens of each block.

    Raises:
        DataError: an id that the tokenizer does not have, or a table that does not fit.
    """
    number = 0
    for ids in _documents(tokens, eos_id):
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if high > largest_id or low < 0:
            raise DataError(
                f"data.path: {tokens.path} holds the id {high if low >= 0 else low} in document {number + 1}, and "
                f"the tokenizer's largest is {largest_id}",
                "set tokenizer to the one that wrote the file, and data.token_dtype to the size of its ids",
            )
        number += 1
        writer.add(ids, [len(ids)], [number], 0)
        report(1, len(ids))
    writer.meta.counts.documents = number
    writer.meta.lines = number


def _documents(tokens: TokenFile, eos_id: int | None) -> Iterator[npt.NDArray[Any]]:
    if not tokens.count:  # an empty file cannot be mapped
        return
    array = np.memmap(tokens.path, dtype=tokens.dtype, mode="r", offset=tokens.header, shape=(tokens.count,))
    start = 0
    for end in _ends_of_table(tokens) if tokens.index else _ends_of_eos(array, eos_id):
        yield np.asarray(array[start:end])
        start = end


def _ends_of_eos(array: npt.NDArray[Any], eos_id: int | None) -> Iterator[int]:
    end = 0
    for start in range(0, len(array) if eos_id is not None else 0, _BLOCK):
        for found in np.flatnonzero(np.asarray(array[start : start + _BLOCK]) == eos_id):
            end = start + int(found) + 1
            yield end
    if end < len(array):
        yield len(array)


def _ends_of_table(tokens: TokenFile) -> Iterator[int]:
    assert tokens.index is not None
    before = 0
    for start, end in _rows(tokens.index):
        if start != before or end < start:
            raise DataError(
                f"data.path: {tokens.index}: a document begins at token {start}, and the one before ends at {before}",
                f"remove {tokens.index.name} to take each EOS token for the end of a document",
            )
        before = end
        yield end
    if before != tokens.count:
        raise DataError(
            f"data.path: {tokens.index} names {before:,} tokens, and {tokens.path} has {tokens.count:,}",
            "copy both files again; they belong together",
        )


def _last_end(index: Path) -> int:
    last = deque(_rows(index), maxlen=1)
    return last[0][1] if last else 0


def _rows(index: Path) -> Iterator[tuple[int, int]]:
    for row in table_rows(index):
        yield int(row[0]), int(row[1])


def table_rows(index: Path) -> Iterator[list[str]]:
    """The rows of a table of documents: start, end, id, source, line.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with gzip.open(index, "rb") as handle:
            for row in csv.reader(io.TextIOWrapper(handle, encoding="utf-8", newline="")):
                int(row[0]), int(row[1])
                yield row
    except (OSError, EOFError, ValueError, IndexError, zlib.error, csv.Error) as error:
        raise DataError(f"data.path: {index} is not a table of documents: {error}", "remove it") from None
