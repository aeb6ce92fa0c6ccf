"""Token cache -> rows -> the micro-batches of a step.

Packed: all documents are one stream, and row c is tokens[c * L : (c + 1) * L]; the rest below L tokens is dropped.
A row of L tokens has L - 1 targets, since the first token of a row has no context. Unpacked: row d is document d, cut
or padded to L; padding is never a target.

Step s (0-based) takes positions s * G ... (s + 1) * G - 1 of the global order, G = batch_size * accumulation * world
size, so the same rows are in a step whatever the number of processes or micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from eulerforge.data.cache import Tokens
from eulerforge.data.order import EpochOrder
from eulerforge.errors import DataError

IGNORE_INDEX = -100
"""Label of a position that is not a target (the value that torch's cross entropy ignores)."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        input_ids: shape (rows, max_length), int64.
        labels: the same ids, `IGNORE_INDEX` at padding. Not shifted: the loss does that, in one place.
        attention_mask: 1 for tokens, 0 for padding, shape (rows, max_length); None when there is no padding.
        targets: number of predicted tokens in these rows.
        tokens: number of tokens in these rows, padding not counted.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: torch.Tensor | None
    targets: int
    tokens: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on a device."""
        mask = None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True)
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=mask,
        )


class Rows(Protocol):
    """Random access to rows of tokens, at most `max_length` each."""

    max_length: int

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]: ...


class PackedRows:
    """Chunks of exactly `max_length` tokens cut from the stream of all documents."""

    def __init__(self, tokens: Tokens, max_length: int) -> None:
        self.max_length = max_length
        self.total = len(tokens)
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens) // self.max_length

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        start = row * self.max_length
        return self._tokens[start : start + self.max_length].astype(np.int64)


class DocumentRows:
    """One document per row, cut to `max_length`. Documents of one token have no target and are left out."""

    def __init__(self, tokens: Tokens, offsets: npt.NDArray[np.int64], max_length: int) -> None:
        self.max_length = max_length
        self._tokens = tokens
        self._offsets = offsets
        lengths = np.diff(offsets)
        self.texts = len(lengths)
        self._documents = np.flatnonzero(lengths >= 2)
        self.left_out = len(lengths) - len(self._documents)
        self.cut = int((lengths > max_length).sum())
        self.real_tokens = int(np.minimum(lengths[self._documents], max_length).sum())

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        document = self._documents[row]
        start = int(self._offsets[document])
        end = min(int(self._offsets[document + 1]), start + self.max_length)
        return self._tokens[start:end].astype(np.int64)


def require_rows(
    offsets: npt.NDArray[np.int64], max_length: int, packing: bool, key: str = "data.path", what: str = "the corpus"
) -> None:
    """Refuse a corpus that does not fill one row.

    Args:
        offsets: document boundaries, the first need not be 0.
        key, what: for the message.

    Raises:
        DataError: with the number of tokens there are.
    """
    total = int(offsets[-1] - offsets[0])
    if packing and total < max_length:
        raise DataError(
            f"{key}: {what} has {total:,} tokens, less than one chunk of data.max_length {max_length:,}",
            f"give more text or set data.max_length to at most {max(total, 2):,}",
        )
    if not packing and not (np.diff(offsets) >= 2).any():
        raise DataError(f"{key}: no document has two tokens, so there is nothing to predict", "give longer texts")


class StepBatches:
    """The micro-batches of any step, by random access.

    Args:
        rows: the data.
        seed: of the order.
        batch_size: rows in a micro-batch.
        accumulation: micro-batches per step and process.
        rank, world_size: this process among all.
        pad_id: what fills short rows; any valid id, since padding is neither seen by the loss nor attended to.
    """

    def __init__(
        self, rows: Rows, seed: int, batch_size: int, accumulation: int, rank: int, world_size: int, pad_id: int
    ) -> None:
        self._rows = rows
        self._order = EpochOrder(len(rows), seed)
        self._batch_size = batch_size
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._pad_id = pad_id

    def of_step(self, step: int) -> Iterator[MicroBatch]:
        """This rank's micro-batches of a step (0-based)."""
        per_pass = self._batch_size * self._world_size
        for pass_number in range(self._accumulation):
            start = (step * self._accumulation + pass_number) * per_pass + self._rank * self._batch_size
            numbers = [self._order.row(position) for position in range(start, start + self._batch_size)]
            yield _collate([self._rows[number] for number in numbers], self._rows.max_length, self._pad_id)


class HeldOutBatches:
    """All rows once, in order, dealt out to ranks; each rank gets the same number of batches.

    Args: as of `StepBatches`.
    """

    def __init__(self, rows: Rows, batch_size: int, rank: int, world_size: int, pad_id: int) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._pad_id = pad_id

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __getitem__(self, number: int) -> MicroBatch:
        """This rank's batch. Where the rows have run out it is row 0 without any target."""
        start = (number * self._world_size + self._rank) * self._batch_size
        numbers = range(start, min(start + self._batch_size, len(self._rows)))
        batch = _collate([self._rows[row] for row in numbers or [0]], self._rows.max_length, self._pad_id)
        if numbers:
            return batch
        return replace(batch, labels=torch.full_like(batch.labels, IGNORE_INDEX), targets=0, tokens=0)


def _collate(rows: Sequence[npt.NDArray[np.int64]], length: int, pad_id: int) -> MicroBatch:
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    lengths = np.array([len(tokens) for tokens in rows], dtype=np.int64)
    for index, tokens in enumerate(rows):
        ids[index, : len(tokens)] = tokens
    real = np.arange(length) < lengths[:, None]
    mask = None if bool(real.all()) else torch.from_numpy(real.astype(np.int64))
    labels = torch.from_numpy(np.where(real, ids, IGNORE_INDEX))
    return MicroBatch(torch.from_numpy(ids), labels, mask, int((lengths - 1).sum()), int(lengths.sum()))
