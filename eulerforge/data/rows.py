"""Token stream -> rows -> the micro-batches of a step.

Packed: all documents are one stream, and row c is tokens[c * L : (c + 1) * L]; the rest below L tokens is dropped.
A row of L tokens has L - 1 targets, since the first token of a row has no context. With documents kept apart
(`data.document_mask`) the first token of a document has none either. Unpacked: row d is document d, cut or padded to
L; padding is never a target.

Step s (0-based) takes positions s * G ... (s + 1) * G - 1 of the global order, G = batch_size * accumulation * world
size, so the same rows are in a step whatever the number of processes or micro-batches.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from eulerforge.data.order import Order
from eulerforge.data.tokens import Piece, Span
from eulerforge.errors import DataError

IGNORE_INDEX = -100
"""Label of a position that is not a target (the value that torch's cross entropy ignores)."""

_HALF_BITS = 24
"""A row's hash has twice as many bits. Sums of halves over up to 2^29 rows are exact in float64."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        input_ids: shape (rows, max_length), int64.
        labels: the same ids, `IGNORE_INDEX` at padding and, with `segments`, at the first token of each document. Not
            shifted: the loss does that, in one place.
        attention_mask: 1 for tokens, 0 for padding, shape (rows, max_length); None when there is no padding.
        targets: number of predicted tokens in these rows.
        tokens: number of tokens in these rows, padding not counted.
        segments: number of the document within its row, shape (rows, max_length), int32; None where documents of a
            row see each other.
        hash_sums: the two halves of the rows' hashes, added up over the rows (see `step_hash`).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: int
    tokens: int
    segments: torch.Tensor | None = None
    hash_sums: tuple[int, int] = (0, 0)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same batch with each of its tensors changed (moved, pinned)."""
        return replace(
            self,
            input_ids=change(self.input_ids),
            labels=change(self.labels),
            attention_mask=None if self.attention_mask is None else change(self.attention_mask),
            segments=None if self.segments is None else change(self.segments),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Rows(Protocol):
    """Random access to rows of tokens, at most `max_length` each."""

    max_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]: ...

    def position(self, row: int) -> int:
        """Where the row's first token lies in its stream."""

    def borders(self, row: int) -> list[int]:
        """Where in the row, after its first token, documents begin."""


class PackedRows:
    """Chunks of exactly `max_length` tokens cut from the stream of all documents."""

    def __init__(self, span: Span, max_length: int) -> None:
        self.max_length = max_length
        self.total = span.tokens
        self._span = span

    def __len__(self) -> int:
        return self.total // self.max_length

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        start = self.position(row)
        return self._span.stream.read(start, start + self.max_length)

    def position(self, row: int) -> int:
        """Where the row's first token lies in the stream."""
        return self._span.start + row * self.max_length

    def borders(self, row: int) -> list[int]:
        """Where in the row, after its first token, documents begin."""
        start = self.position(row)
        return [begin - start for begin in self._span.stream.starts_between(start, start + self.max_length)]


class DocumentRows:
    """One document per row, cut to `max_length`. Documents of one token have no target and are left out.

    Attributes:
        texts: documents in all.
        cut: documents of more than `max_length` tokens.
        real_tokens: tokens of all rows, padding not counted.
    """

    def __init__(self, span: Span, max_length: int) -> None:
        self.max_length = max_length
        self._span = span
        self._pieces: list[Piece] = []
        self._row_starts = [0]
        self._found: tuple[int, npt.NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))
        self.texts = span.documents
        self.cut = self.real_tokens = 0
        for piece in span.pieces():
            lengths = span.lengths(piece)
            kept = lengths[lengths >= 2]
            self._pieces.append(piece)
            self._row_starts.append(self._row_starts[-1] + len(kept))
            self.cut += int((kept > max_length).sum())
            self.real_tokens += int(np.minimum(kept, max_length).sum())

    def __len__(self) -> int:
        return self._row_starts[-1]

    @property
    def left_out(self) -> int:
        """Documents of less than two tokens."""
        return self.texts - len(self)

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        document = self._document(row)
        stream = self._span.stream
        start = stream.document_start(document)
        return stream.read(start, min(stream.document_start(document + 1), start + self.max_length))

    def position(self, row: int) -> int:
        """Where the row's first token lies in the stream."""
        return self._span.stream.document_start(self._document(row))

    def borders(self, row: int) -> list[int]:
        """None: a row is one document."""
        return []

    def _document(self, row: int) -> int:
        number = bisect_right(self._row_starts, row) - 1
        piece = self._pieces[number]
        shard, inside = self._found  # one object, so that a thread never sees half of a change
        if shard != number:
            inside = np.flatnonzero(self._span.lengths(piece) >= 2)
            self._found = (number, inside)
        return piece.first + int(inside[row - self._row_starts[number]])


class JoinedRows:
    """The rows of several sources, one source after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = tuple(parts)
        self.max_length = parts[0].max_length
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + len(part))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        source, inside = self.place(row)
        return self.parts[source][inside]

    def position(self, row: int) -> int:
        """Where the row's first token lies in its source's stream."""
        source, inside = self.place(row)
        return self.parts[source].position(inside)

    def borders(self, row: int) -> list[int]:
        """Where in the row, after its first token, documents begin."""
        source, inside = self.place(row)
        return self.parts[source].borders(inside)

    def place(self, row: int) -> tuple[int, int]:
        """(source, row in the source) of a row."""
        source = bisect_right(self._starts, row) - 1
        return source, row - self._starts[source]


def require_rows(
    span: Span, max_length: int, packing: bool, key: str = "data.path", what: str = "the corpus"
) -> None:
    """Refuse a corpus that does not fill one row.

    Args:
        span: its documents.
        key, what: for the message.

    Raises:
        DataError: with the number of tokens there are.
    """
    if packing and span.tokens < max_length:
        raise DataError(
            f"{key}: {what} has {span.tokens:,} tokens, less than one chunk of data.max_length {max_length:,}",
            f"give more text or set data.max_length to at most {max(span.tokens, 2):,}",
        )
    if not packing and not any((span.lengths(piece) >= 2).any() for piece in span.pieces()):
        raise DataError(f"{key}: no document has two tokens, so there is nothing to predict", "give longer texts")


@dataclass(frozen=True)
class StepPlan:
    """Which rows a step takes, over all processes.

    Attributes:
        order: of all rows.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches per step and process.
    """

    order: Order
    batch_size: int
    accumulation: int
    world_size: int

    @property
    def rows_per_step(self) -> int:
        """Over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    def rows(self, step: int) -> list[int]:
        """The rows of a step (0-based), in the global order."""
        start = step * self.rows_per_step
        return [self.order.row(position) for position in range(start, start + self.rows_per_step)]


class StepBatches:
    """The micro-batches of any step, by random access.

    Args:
        rows: the data.
        plan: which rows a step takes.
        rank: this process.
        pad_id: what fills short rows; any valid id, since padding is neither seen by the loss nor attended to.
        keep_apart: documents of a row do not see each other.
    """

    def __init__(self, rows: Rows, plan: StepPlan, rank: int, pad_id: int, keep_apart: bool = False) -> None:
        self._rows = rows
        self._plan = plan
        self._rank = rank
        self._pad_id = pad_id
        self._keep_apart = keep_apart

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step (0-based)."""
        plan = self._plan
        for pass_number in range(plan.accumulation):
            offset = (pass_number * plan.world_size + self._rank) * plan.batch_size
            start = step * plan.rows_per_step + offset
            numbers = [plan.order.row(position) for position in range(start, start + plan.batch_size)]
            tokens = [self._rows[number] for number in numbers]
            batch = _collate(self._rows, numbers, tokens, self._pad_id, self._keep_apart)
            hashes = [row_hash(offset + index, ids) for index, ids in enumerate(tokens)]
            yield replace(batch, hash_sums=hash_sums(hashes))


def row_hash(place: int, ids: npt.NDArray[np.int64]) -> int:
    """48 bits of the BLAKE2b of a row's place within its step and its ids (uint32)."""
    content = place.to_bytes(8, "little") + ids.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=2 * _HALF_BITS // 8).digest(), "little")


def hash_sums(hashes: Sequence[int]) -> tuple[int, int]:
    """The sums of the upper and of the lower halves."""
    mask = (1 << _HALF_BITS) - 1
    return sum(value >> _HALF_BITS for value in hashes), sum(value & mask for value in hashes)


def step_hash(upper: float, lower: float) -> str:
    """The hash of a step's token ids, 12 hexadecimal digits, from the sums over all of its rows.

    A sum does not depend on how the rows are dealt out to processes and micro-batches; each row's hash holds its
    place, so the order within the step counts.
    """
    mask = (1 << _HALF_BITS) - 1
    digits = _HALF_BITS // 4
    return f"{round(upper) & mask:0{digits}x}{round(lower) & mask:0{digits}x}"


class HeldOutBatches:
    """All rows once, in order, dealt out to ranks; each rank gets the same number of batches.

    Args: as of `StepBatches`.
    """

    def __init__(
        self, rows: Rows, batch_size: int, rank: int, world_size: int, pad_id: int, keep_apart: bool = False
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._pad_id = pad_id
        self._keep_apart = keep_apart

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __getitem__(self, number: int) -> MicroBatch:
        """This rank's batch. Where the rows have run out it is row 0 without any target."""
        start = (number * self._world_size + self._rank) * self._batch_size
        numbers = range(start, min(start + self._batch_size, len(self._rows)))
        tokens = [self._rows[row] for row in numbers or [0]]
        batch = _collate(self._rows, numbers or [0], tokens, self._pad_id, self._keep_apart)
        if numbers:
            return batch
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), targets=0, tokens=0)


def _collate(
    rows: Rows, numbers: Sequence[int], tokens: Sequence[npt.NDArray[np.int64]], pad_id: int, keep_apart: bool
) -> MicroBatch:
    length = rows.max_length
    ids = np.full((len(tokens), length), pad_id, dtype=np.int64)
    lengths = np.array([len(row) for row in tokens], dtype=np.int64)
    for index, row in enumerate(tokens):
        ids[index, : len(row)] = row
    real = np.arange(length) < lengths[:, None]
    mask = None if bool(real.all()) else torch.from_numpy(real.astype(np.int64))
    counted, segments = real, None
    if keep_apart:
        begins = np.zeros(real.shape, dtype=np.int32)
        for index, number in enumerate(numbers):
            begins[index, rows.borders(number)] = 1
        counted = real & (begins == 0)
        segments = torch.from_numpy(np.cumsum(begins, axis=1, dtype=np.int32))
    labels = np.where(counted, ids, IGNORE_INDEX)
    targets = int(counted[:, 1:].sum())
    return MicroBatch(torch.from_numpy(ids), torch.from_numpy(labels), mask, targets, int(lengths.sum()), segments)
