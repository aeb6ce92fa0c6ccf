"""The global order of rows, how it is split, and what a micro-batch holds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from eulerforge.data.order import EpochOrder
from eulerforge.data.rows import (
    IGNORE_INDEX,
    DocumentRows,
    HeldOutBatches,
    MicroBatch,
    PackedRows,
    StepBatches,
    require_rows,
)
from eulerforge.errors import DataError

PAD = 9


def _epoch(rows: int, seed: int, epoch: int = 0) -> list[int]:
    order = EpochOrder(rows, seed)
    return [order.row(epoch * rows + index) for index in range(rows)]


def test_every_epoch_is_a_permutation() -> None:
    for rows in range(1, 201):
        for epoch in (0, 1):
            assert sorted(_epoch(rows, seed=3, epoch=epoch)) == list(range(rows)), (rows, epoch)


@pytest.mark.parametrize("rows", [4096, 4097, 10_000])
def test_a_larger_epoch_is_a_permutation(rows: int) -> None:
    assert len(set(_epoch(rows, seed=1))) == rows


@pytest.mark.parametrize("rows", [10**9 + 7, 2**40, 2**40 + 1, 10**15])
def test_huge_corpora_cost_no_memory_and_repeat_nothing(rows: int) -> None:
    order = EpochOrder(rows, seed=5)
    positions = [*range(2000), rows // 2, rows - 1]
    seen = {order.row(position) for position in positions}
    assert len(seen) == len(positions)
    assert all(0 <= row < rows for row in seen)
    # Spread over the whole range, not only the neighbourhood of the positions: the mean of 2,000 uniform values
    # has a standard deviation of 0.0065 of the range.
    assert abs(sum(seen) / len(seen) / rows - 0.5) < 0.04


def test_epochs_and_seeds_differ() -> None:
    orders = [_epoch(100, seed, epoch) for seed in range(5) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 20
    # Two independent permutations agree at one position on average; 10 is far outside.
    assert all(sum(left == right for left, right in zip(orders[0], other, strict=True)) < 10 for other in orders[1:])


def test_the_order_is_fixed_for_all_time() -> None:
    """A change here would give resumed runs other data than the run they continue."""
    assert _epoch(10, seed=42) == [7, 8, 2, 0, 3, 4, 5, 1, 6, 9]
    assert _epoch(10, seed=42, epoch=1) == [4, 2, 5, 1, 8, 9, 7, 0, 6, 3]
    order = EpochOrder(1_000_003, seed=2**63 - 1)
    assert [order.row(position) for position in (0, 1, 1_000_002, 1_000_003)] == [427729, 354724, 305909, 784698]


def test_access_is_random() -> None:
    """Asking back and forth between epochs gives the same rows as going through them."""
    order = EpochOrder(7, seed=1)
    forward = [order.row(position) for position in range(21)]
    assert [order.row(position) for position in reversed(range(21))] == forward[::-1]


def _packed(rows: int, length: int = 4) -> PackedRows:
    return PackedRows(np.arange(rows * length, dtype=np.uint16), length)


def _rows_of(batch: MicroBatch, length: int = 4) -> list[int]:
    return [int(first) // length for first in batch.input_ids[:, 0]]


SHAPES = [(1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 4, 1), (2, 1, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2)]
"""(world size, batch size, accumulation), 8 rows a step each."""


@pytest.mark.parametrize(("world", "batch", "accumulation"), SHAPES)
def test_a_step_has_the_same_rows_on_any_number_of_ranks(world: int, batch: int, accumulation: int) -> None:
    """20 rows and 8 a step: step 2 is the end of one epoch and the start of the next."""
    order = EpochOrder(20, seed=7)
    seen: list[int] = []
    for step in range(5):
        rows: list[int] = []
        for rank in range(world):
            batches = list(StepBatches(_packed(20), 7, batch, accumulation, rank, world, PAD).of_step(step))
            assert [part.input_ids.shape for part in batches] == [(batch, 4)] * accumulation
            rows += [row for part in batches for row in _rows_of(part)]
        assert sorted(rows) == sorted(order.row(position) for position in range(step * 8, step * 8 + 8))
        seen += rows
    assert sorted(seen) == sorted([*range(20), *range(20)])


def test_ranks_are_disjoint_and_one_rank_goes_in_order() -> None:
    order = EpochOrder(16, seed=7)
    (first,), (second,) = ([*StepBatches(_packed(16), 7, 4, 1, rank, 2, PAD).of_step(0)] for rank in (0, 1))
    assert _rows_of(first) == [order.row(position) for position in range(4)]
    assert _rows_of(second) == [order.row(position) for position in range(4, 8)]


@pytest.mark.parametrize(("total", "rows"), [(11, 2), (12, 3), (13, 3), (3, 0), (4, 1)])
def test_packed_rows_are_consecutive_chunks_and_the_rest_is_dropped(total: int, rows: int) -> None:
    packed = PackedRows(np.arange(total, dtype=np.uint16), 4)
    assert len(packed) == rows
    assert [packed[row].tolist() for row in range(rows)] == [list(range(row * 4, row * 4 + 4)) for row in range(rows)]
    assert all(packed[row].dtype == np.int64 for row in range(rows))


def test_packed_rows_hold_ids_above_the_signed_range() -> None:
    tokens = np.array([2**32 - 1, 2**31, 65536, 0], dtype=np.uint32)
    assert PackedRows(tokens, 4)[0].tolist() == [2**32 - 1, 2**31, 65536, 0]


def _documents(*lengths: int, max_length: int = 4) -> DocumentRows:
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    return DocumentRows(np.arange(offsets[-1], dtype=np.uint16), offsets, max_length)


def test_document_rows_are_documents_cut_to_length() -> None:
    rows = _documents(3, 1, 6, 4, 2, 1)
    assert len(rows) == 4
    assert [rows[row].tolist() for row in range(4)] == [[0, 1, 2], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15]]
    assert (rows.left_out, rows.cut, rows.real_tokens) == (2, 1, 3 + 4 + 4 + 2)


def _offsets(*lengths: int) -> npt.NDArray[np.int64]:
    return np.cumsum([0, *lengths]).astype(np.int64)


@pytest.mark.parametrize(
    ("lengths", "packing", "fits"),
    [
        ((4, 3), True, False),
        ((4, 4), True, True),
        ((1, 1, 1, 1, 1, 1, 1, 1), True, True),
        ((1, 1, 1), False, False),
        ((1, 2), False, True),
        ((), False, False),
    ],
)
def test_a_corpus_must_fill_one_row(lengths: tuple[int, ...], packing: bool, fits: bool) -> None:
    if fits:
        require_rows(_offsets(*lengths), 8, packing)
        return
    with pytest.raises(DataError) as caught:
        require_rows(_offsets(*lengths), 8, packing)
    assert str(caught.value) == (
        "data.path: the corpus has 7 tokens, less than one chunk of data.max_length 8"
        if packing
        else "data.path: no document has two tokens, so there is nothing to predict"
    )


def test_the_advice_on_a_small_corpus_is_a_length_that_works() -> None:
    with pytest.raises(DataError) as caught:
        require_rows(_offsets(1234), 4096, packing=True)
    assert caught.value.problems[0].fix == "give more text or set data.max_length to at most 1,234"
    require_rows(_offsets(1234), 1234, packing=True)


def test_a_batch_of_documents_is_padded_masked_and_counted() -> None:
    rows = _documents(3, 2, 6)
    (batch,) = StepBatches(rows, 0, 3, 1, 0, 1, PAD).of_step(0)
    order = np.argsort(batch.input_ids[:, 0].numpy())
    assert batch.input_ids[order].tolist() == [[0, 1, 2, PAD], [3, 4, PAD, PAD], [5, 6, 7, 8]]
    assert batch.labels[order].tolist() == [
        [0, 1, 2, IGNORE_INDEX],
        [3, 4, IGNORE_INDEX, IGNORE_INDEX],
        [5, 6, 7, 8],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask[order].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.targets, batch.tokens) == (2 + 1 + 3, 3 + 2 + 4)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.attention_mask.dtype} == {torch.int64}


def test_the_pad_id_inside_a_document_is_a_target_all_the_same() -> None:
    """Masks come from lengths, not from ids: padding often shares the id of EOS."""
    rows = DocumentRows(np.array([PAD, 5, PAD], dtype=np.uint16), _offsets(3), 4)
    (batch,) = StepBatches(rows, 0, 1, 1, 0, 1, PAD).of_step(0)
    assert batch.input_ids.tolist() == [[PAD, 5, PAD, PAD]]
    assert batch.labels.tolist() == [[PAD, 5, PAD, IGNORE_INDEX]]
    assert batch.targets == 2


def test_a_batch_without_padding_has_no_mask_and_a_target_less_than_tokens_per_row() -> None:
    (batch,) = StepBatches(_packed(3), 0, 3, 1, 0, 1, PAD).of_step(0)
    assert batch.attention_mask is None
    assert torch.equal(batch.labels, batch.input_ids)
    assert (batch.targets, batch.tokens) == (9, 12)


def test_moving_a_batch_keeps_its_content() -> None:
    for rows in (_documents(3, 2), _packed(2)):
        (batch,) = StepBatches(rows, 0, 2, 1, 0, 1, PAD).of_step(0)
        moved = batch.to(torch.device("meta"))
        assert moved.input_ids.device.type == moved.labels.device.type == "meta"
        assert (moved.attention_mask is None) == (batch.attention_mask is None)
        assert moved.attention_mask is None or moved.attention_mask.device.type == "meta"
        assert (moved.targets, moved.tokens) == (batch.targets, batch.tokens)


# --- Held-out rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 24])
def test_every_held_out_row_counts_once_over_all_ranks(rows: int, batch_size: int, world: int) -> None:
    """Each rank has the same number of batches, because they all take part in the sums."""
    ranks = [HeldOutBatches(_packed(rows), batch_size, rank, world, PAD) for rank in range(world)]
    number = -(-rows // (batch_size * world))
    assert [len(batches) for batches in ranks] == [number] * world
    seen: list[int] = []
    targets = tokens = labels = 0
    for index in range(number):  # the order in which the ranks go through them
        for batches in ranks:
            batch = batches[index]
            targets, tokens = targets + batch.targets, tokens + batch.tokens
            labels += int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
            assert 1 <= len(batch.input_ids) <= batch_size
            if batch.tokens:
                seen += _rows_of(batch)
    assert seen == list(range(rows))
    assert (targets, labels, tokens) == (3 * rows, 3 * rows, 4 * rows)


def test_a_rank_whose_rows_have_run_out_has_a_batch_without_targets() -> None:
    batch = HeldOutBatches(_packed(5), 2, rank=1, world_size=2, pad_id=PAD)[1]
    assert batch.input_ids.tolist() == [[0, 1, 2, 3]]  # real tokens: a forward pass over it is finite
    assert batch.labels.tolist() == [[IGNORE_INDEX] * 4]
    assert (batch.targets, batch.tokens) == (0, 0)


def test_a_last_batch_has_the_rows_that_are_left() -> None:
    batch = HeldOutBatches(_packed(5), 2, rank=0, world_size=2, pad_id=PAD)[1]
    assert batch.input_ids.tolist() == [[16, 17, 18, 19]]
    assert torch.equal(batch.labels, batch.input_ids)
    assert (batch.targets, batch.tokens) == (3, 4)


def test_held_out_documents_are_padded_and_masked() -> None:
    batch = HeldOutBatches(_documents(3, 1, 6), 2, rank=0, world_size=1, pad_id=PAD)[0]
    assert batch.input_ids.tolist() == [[0, 1, 2, PAD], [4, 5, 6, 7]]
    assert batch.labels.tolist() == [[0, 1, 2, IGNORE_INDEX], [4, 5, 6, 7]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert (batch.targets, batch.tokens) == (5, 7)
