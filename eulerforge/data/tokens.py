"""The tokens of a corpus as one stream over its shards, by random access, in bounded memory.

Tokens are read at their offset, not mapped: resident memory then stays the same however much of the corpus a run has
seen, and a corpus may have more shards than a process may have maps.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from eulerforge.data.shards import ShardMeta
from eulerforge.errors import PreparationError

_OPEN_FILES = 64
_OPEN_INDICES = 16

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Shard:
    """A shard as the stream needs it.

    Attributes:
        folder: with its index.
        tokens_file: where its ids lie.
        header: bytes before the first id.
        dtype: of the ids.
        first_file: number of its first file in the corpus.
        first_line: lines of that file before those that the shard counts from.
    """

    folder: Path
    tokens_file: Path
    header: int
    dtype: str
    tokens: int
    documents: int
    first_file: int
    first_line: int


class _Recent(Generic[K, V]):
    """The values of the last `size` keys; one that goes is disposed of."""

    def __init__(self, size: int, make: Callable[[K], V], dispose: Callable[[V], object]) -> None:
        self._size, self._make, self._dispose = size, make, dispose
        self._values: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V:
        if key not in self._values:
            self._values[key] = self._make(key)
            if len(self._values) > self._size:
                self._dispose(self._values.popitem(last=False)[1])
        self._values.move_to_end(key)
        return self._values[key]


class TokenStream:
    """All documents of a corpus, one after the other. Safe to read from several threads.

    Attributes:
        shards: in order.
        tokens, documents: in all.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)], dtype=np.int64)
        self.tokens = int(self._token_starts[-1])
        self.documents = int(self._document_starts[-1])
        self._lock = threading.Lock()
        self._files: _Recent[Path, IO[bytes]] = _Recent(_OPEN_FILES, _open_raw, lambda handle: handle.close())
        self._indices: _Recent[Path, npt.NDArray[np.int64]] = _Recent(_OPEN_INDICES, _mapped, lambda index: None)

    def read(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Ids from position `start` to `stop`, shape (stop - start,)."""
        ids = np.empty(stop - start, dtype=np.int64)
        filled = 0
        while filled < len(ids):
            number = int(np.searchsorted(self._token_starts, start + filled, side="right")) - 1
            inside = start + filled - int(self._token_starts[number])
            count = min(len(ids) - filled, self.shards[number].tokens - inside)
            ids[filled : filled + count] = self._read_shard(self.shards[number], inside, count)
            filled += count
        return ids

    def _read_shard(self, shard: Shard, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        dtype = np.dtype(shard.dtype)
        try:
            with self._lock:
                handle = self._files.get(shard.tokens_file)
                handle.seek(shard.header + start * dtype.itemsize)
                data = handle.read(count * dtype.itemsize)
        except OSError as error:
            raise _lost(shard.tokens_file, error.strerror) from None
        if len(data) < count * dtype.itemsize:
            raise _lost(shard.tokens_file, "it is shorter than it was")
        return np.frombuffer(data, dtype=dtype)

    def ends(self, shard: int) -> npt.NDArray[np.int64]:
        """Where each document of a shard ends, in tokens of the shard, shape (documents,)."""
        return self._index(shard, "ends.bin")

    def _index(self, shard: int, name: str) -> npt.NDArray[np.int64]:
        path = self.shards[shard].folder / name
        try:
            with self._lock:
                return self._indices.get(path)
        except OSError as error:
            raise _lost(path, error.strerror) from None

    def document_start(self, document: int) -> int:
        """Position of a document's first token; of the end for `documents`."""
        if document == self.documents:
            return self.tokens
        number, inside = self._place(document)
        before = int(self.ends(number)[inside - 1]) if inside else 0
        return int(self._token_starts[number]) + before

    def document_at(self, position: int) -> int:
        """The document that a token belongs to."""
        number = int(np.searchsorted(self._token_starts, position, side="right")) - 1
        inside = position - int(self._token_starts[number])
        found = int(np.searchsorted(self.ends(number), inside, side="right"))
        return int(self._document_starts[number]) + found

    def starts_between(self, start: int, stop: int) -> Iterator[int]:
        """Positions in (start, stop) at which a document begins, in order."""
        position = start
        while position < stop:
            number = int(np.searchsorted(self._token_starts, position, side="right")) - 1
            base = int(self._token_starts[number])
            ends = self.ends(number)
            first, last = np.searchsorted(ends, [position - base, stop - base], side="left")
            for end in ends[first : last + 1]:
                if start < base + int(end) < stop:
                    yield base + int(end)
            position = int(self._token_starts[number + 1])

    def location(self, document: int) -> tuple[int, int]:
        """(number of the file in the corpus, 1-based line or row) of a document."""
        number, inside = self._place(document)
        shard = self.shards[number]
        line = int(self._index(number, "lines.bin")[inside])
        for file, documents in ShardMeta.read(shard.folder).files:
            if inside < documents:
                return shard.first_file + file, line + (shard.first_line if file == 0 else 0)
            inside -= documents
        raise IndexError(document)

    def _place(self, document: int) -> tuple[int, int]:
        """(shard, number of the document in it)."""
        number = int(np.searchsorted(self._document_starts, document, side="right")) - 1
        return number, document - int(self._document_starts[number])

    def span(self, first: int = 0, last: int | None = None) -> Span:
        """The documents from `first` up to, not including, `last`."""
        return Span(self, first, self.documents if last is None else last)


@dataclass(frozen=True)
class Piece:
    """Documents of a span that lie in one shard.

    Attributes:
        low, high: numbers in the shard, `high` not included.
        first: number of the first one in the stream.
    """

    shard: int
    low: int
    high: int
    first: int


class Span:
    """Consecutive documents of a stream.

    Attributes:
        first, last: the documents, `last` not included.
        start, stop: their tokens, as positions in the stream.
    """

    def __init__(self, stream: TokenStream, first: int, last: int) -> None:
        self.stream = stream
        self.first, self.last = first, last
        self.start, self.stop = stream.document_start(first), stream.document_start(last)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return self.last - self.first

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    def pieces(self) -> Iterator[Piece]:
        """Its documents by shard."""
        before = 0
        for number, shard in enumerate(self.stream.shards):
            low, high = max(self.first - before, 0), min(self.last - before, shard.documents)
            if low < high:
                yield Piece(number, low, high, before + low)
            before += shard.documents

    def lengths(self, piece: Piece) -> npt.NDArray[np.int64]:
        """Tokens of each document of a piece."""
        ends = self.stream.ends(piece.shard)
        first = int(ends[piece.low - 1]) if piece.low else 0
        return np.diff(ends[piece.low : piece.high], prepend=first)


def _lost(path: Path, why: str | None) -> PreparationError:
    """The end of a run whose token cache has been removed or damaged under it."""
    return PreparationError(
        f"{path} cannot be read any more: {why}",
        "put it back, or run again with --resume: the token cache is then built again",
    )


def _mapped(path: Path) -> npt.NDArray[np.int64]:
    if not path.stat().st_size:  # an empty file cannot be mapped
        return np.zeros(0, dtype=np.int64)
    return np.memmap(path, dtype="<i8", mode="r")


def _open_raw(path: Path) -> IO[bytes]:
    return path.open("rb", buffering=0)
