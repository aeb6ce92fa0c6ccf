"""The global order of rows, how it is split, and what a micro-batch holds."""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from eulerforge.data.order import EpochOrder, FileOrder, MixtureOrder, Order
from eulerforge.data.rows import (
    IGNORE_INDEX,
    DocumentRows,
    HeldOutBatches,
    JoinedRows,
    MicroBatch,
    PackedRows,
    Rows,
    StepBatches,
    StepPlan,
    hash_sums,
    require_rows,
    row_hash,
    step_hash,
)
from eulerforge.errors import DataError
from tests.kit.streams import make_stream, span_of_lengths, span_of_tokens

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


# --- Other orders -----------------------------------------------------------------------------------------------


def test_sources_of_a_mixture_are_not_visited_alike() -> None:
    orders = [[EpochOrder(100, 3, source).row(position) for position in range(100)] for source in range(4)]
    assert orders[0] == _epoch(100, seed=3)
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert all(sum(left == right for left, right in zip(orders[0], other, strict=True)) < 10 for other in orders[1:])
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_of_a_later_source_is_fixed_for_all_time() -> None:
    assert [EpochOrder(10, 42, 1).row(position) for position in range(12)] == [3, 6, 0, 4, 2, 1, 7, 5, 8, 9, 4, 6]


def test_file_order_is_that_of_the_files_again_and_again() -> None:
    order = FileOrder(5)
    assert [order.row(position) for position in range(12)] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert order.row(10**18 + 3) == 3


MIXTURES: list[tuple[list[str], list[int]]] = [
    # weights, rows
    (["0.7", "0.3"], [11, 13]),
    (["1", "1"], [5, 5]),
    (["0.999", "0.001"], [3, 7]),
    (["1", "2", "3"], [10, 20, 7]),
    (["0.5", "0.25", "0.125", "0.125"], [9, 8, 7, 6]),
    (["1", "1", "1", "1", "1"], [2, 3, 4, 5, 6]),
    (["3", "0.01", "1e-3", "7", "2.5", "0.3", "1"], [17, 1, 2, 30, 4, 9, 8]),
]


def _mixture(weights: Sequence[str], rows: Sequence[int], seed: int = 7) -> MixtureOrder:
    orders = [EpochOrder(number, seed, source) for source, number in enumerate(rows)]
    return MixtureOrder(orders, rows, [Fraction(weight) for weight in weights])


def test_a_mixture_of_seven_to_three_over_2000_rows() -> None:
    order = _mixture(["0.7", "0.3"], [500, 900])
    rows = [order.row(position) for position in range(2000)]
    share = sum(row < 500 for row in rows) / 2000
    assert abs(share - 0.7) <= 0.005
    assert rows == [_mixture(["0.7", "0.3"], [500, 900]).row(position) for position in range(2000)]


@pytest.mark.parametrize(("weights", "rows"), MIXTURES)
def test_every_prefix_of_a_mixture_has_the_shares_of_the_weights(weights: list[str], rows: list[int]) -> None:
    """Off by less than one row for each halving above a source."""
    order = _mixture(weights, rows)
    total = sum(Fraction(weight) for weight in weights)
    halvings = (len(weights) - 1).bit_length()
    seen = [0] * len(weights)
    for position in range(1500):
        source, index = order.split(position)
        assert index == seen[source]  # a source's own stream has neither gaps nor repetitions
        seen[source] += 1
        for weight, count in zip(weights, seen, strict=True):
            assert abs(count - (position + 1) * Fraction(weight) / total) < halvings


@pytest.mark.parametrize(("weights", "rows"), MIXTURES)
def test_each_source_of_a_mixture_has_its_own_epochs(weights: list[str], rows: list[int]) -> None:
    order = _mixture(weights, rows)
    bases = [0, *accumulate(rows)]
    streams: list[list[int]] = [[] for _ in rows]
    for position in range(600):
        row = order.row(position)
        source = next(number for number in range(len(rows)) if row < bases[number + 1])
        streams[source].append(row - bases[source])
    for source, (stream, number) in enumerate(zip(streams, rows, strict=True)):
        own = EpochOrder(number, 7, source)
        assert stream == [own.row(position) for position in range(len(stream))]
        for start in range(0, len(stream) - number + 1, number):
            assert sorted(stream[start : start + number]) == list(range(number))
    assert sum(len(stream) > 2 * number for stream, number in zip(streams, rows, strict=True)) >= 1


def test_positions_of_a_mixture_are_found_by_themselves() -> None:
    weights, rows = MIXTURES[-1]
    order = _mixture(weights, rows)
    forward = [order.row(position) for position in range(200)]
    assert [_mixture(weights, rows).row(position) for position in reversed(range(200))] == forward[::-1]
    # Far away it takes as long, and shares are kept: of 10^15 rows and the next 1,000.
    large = _mixture(["0.7", "0.3"], [10**9, 10**12])
    sources = [large.split(10**15 + position) for position in range(1000)]
    assert sum(source == 0 for source, _ in sources) == 700
    assert sources[0][1] in (7 * 10**14, 3 * 10**14)


def test_weights_are_relative() -> None:
    first, second = _mixture(["0.7", "0.3"], [10, 10]), _mixture(["14", "6"], [10, 10])
    assert [first.row(position) for position in range(100)] == [second.row(position) for position in range(100)]


def test_the_order_of_a_mixture_is_fixed_for_all_time() -> None:
    """A change here would give resumed runs other data than the run they continue."""
    order = _mixture(["1", "2", "3"], [10, 20, 7], seed=42)
    assert [order.split(position)[0] for position in range(12)] == [2, 1, 0, 2, 1, 2, 2, 1, 0, 2, 1, 2]
    assert [order.row(position) for position in range(12)] == [35, 22, 7, 34, 17, 33, 36, 11, 8, 30, 20, 32]


# --- Rows and steps ---------------------------------------------------------------------------------------------


def _new(tmp_path: Path) -> Path:
    """A folder for the shards of a stream."""
    return Path(tempfile.mkdtemp(dir=tmp_path)) / "shards"


def _packed(tmp_path: Path, rows: int, length: int = 4) -> PackedRows:
    return PackedRows(span_of_tokens(_new(tmp_path), range(rows * length)), length)


def _plan(
    rows: Rows, batch: int, accumulation: int = 1, world: int = 1, seed: int = 7, order: Order | None = None
) -> StepPlan:
    return StepPlan(order or EpochOrder(len(rows), seed), batch, accumulation, world)


def _first_batch(rows: Rows, size: int, keep_apart: bool = False) -> MicroBatch:
    """A batch of the first rows, in order."""
    (batch,) = StepBatches(rows, _plan(rows, size, order=FileOrder(len(rows))), 0, PAD, keep_apart).of_step(0)
    return batch


def _rows_of(batch: MicroBatch, length: int = 4) -> list[int]:
    return [int(first) // length for first in batch.input_ids[:, 0]]


SHAPES = [(1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 4, 1), (2, 1, 4), (2, 2, 2), (4, 2, 1), (4, 1, 2)]
"""(world size, batch size, accumulation), 8 rows a step each."""


@pytest.mark.parametrize(("world", "batch", "accumulation"), SHAPES)
def test_a_step_has_the_same_rows_on_any_number_of_ranks(
    tmp_path: Path, world: int, batch: int, accumulation: int
) -> None:
    """20 rows and 8 a step: step 2 is the end of one epoch and the start of the next."""
    order = EpochOrder(20, seed=7)
    data = _packed(tmp_path, 20)
    plan = _plan(data, batch, accumulation, world)
    assert plan.rows_per_step == 8
    seen: list[int] = []
    for step in range(5):
        rows: list[int] = []
        for rank in range(world):
            batches = list(StepBatches(data, plan, rank, PAD).of_step(step))
            assert [part.input_ids.shape for part in batches] == [(batch, 4)] * accumulation
            rows += [row for part in batches for row in _rows_of(part)]
        assert plan.rows(step) == [order.row(position) for position in range(step * 8, step * 8 + 8)]
        assert sorted(rows) == sorted(plan.rows(step))
        seen += rows
    assert sorted(seen) == sorted([*range(20), *range(20)])


def test_ranks_are_disjoint_and_one_rank_goes_in_order(tmp_path: Path) -> None:
    order, data = EpochOrder(16, seed=7), _packed(tmp_path, 16)
    (first,), (second,) = ([*StepBatches(data, _plan(data, 4, 1, 2), rank, PAD).of_step(0)] for rank in (0, 1))
    assert _rows_of(first) == [order.row(position) for position in range(4)]
    assert _rows_of(second) == [order.row(position) for position in range(4, 8)]


@pytest.mark.parametrize(("total", "rows"), [(11, 2), (12, 3), (13, 3), (3, 0), (4, 1)])
def test_packed_rows_are_consecutive_chunks_and_the_rest_is_dropped(tmp_path: Path, total: int, rows: int) -> None:
    packed = PackedRows(span_of_lengths(tmp_path / "s", 1, total - 2, 1), 4)
    assert len(packed) == rows
    assert [packed[row].tolist() for row in range(rows)] == [list(range(row * 4, row * 4 + 4)) for row in range(rows)]
    assert all(packed[row].dtype == np.int64 for row in range(rows))


def test_packed_rows_hold_ids_above_the_signed_range(tmp_path: Path) -> None:
    ids = [2**32 - 1, 2**31, 65536, 0]
    assert PackedRows(span_of_tokens(tmp_path / "s", ids, "<u4"), 4)[0].tolist() == ids


def test_packed_rows_of_a_span_begin_at_its_first_document(tmp_path: Path) -> None:
    stream = span_of_lengths(tmp_path / "s", 3, 5, 1, 4, 7, 2).stream
    rows = PackedRows(stream.span(1, 5), 4)
    assert (len(rows), rows.total) == (4, 17)
    assert [rows[row].tolist() for row in range(4)] == [list(range(3 + 4 * row, 7 + 4 * row)) for row in range(4)]
    assert [rows.position(row) for row in range(4)] == [3, 7, 11, 15]
    assert [rows.borders(row) for row in range(4)] == [[], [1, 2], [2], []]  # documents begin at 8, 9 and 13


def _documents(tmp_path: Path, *lengths: int, max_length: int = 4) -> DocumentRows:
    return DocumentRows(span_of_lengths(_new(tmp_path), *lengths), max_length)


def test_document_rows_are_documents_cut_to_length(tmp_path: Path) -> None:
    rows = _documents(tmp_path, 3, 1, 6, 4, 2, 1)
    assert len(rows) == 4
    assert [rows[row].tolist() for row in range(4)] == [[0, 1, 2], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15]]
    assert (rows.left_out, rows.cut, rows.real_tokens) == (2, 1, 3 + 4 + 4 + 2)


@pytest.mark.parametrize("seed", range(20))
def test_document_rows_of_any_span_over_any_shards(tmp_path: Path, seed: int) -> None:
    """Shards without documents, documents without tokens, and spans that begin and end anywhere."""
    source = random.Random(seed)
    shards = [
        [[source.randrange(60_000) for _ in range(source.choice([0, 1, 1, 2, 3, 9]))] for _ in range(count)]
        for count in (source.randrange(6) for _ in range(7))
    ]
    documents = [ids for shard in shards for ids in shard]
    stream = make_stream(tmp_path / "s", *shards, dtypes=["<u2", "<u4"])
    starts = [0, *accumulate(map(len, documents))]
    for _ in range(10):
        first = source.randrange(len(documents) + 1)
        last = source.randrange(first, len(documents) + 1)
        rows = DocumentRows(stream.span(first, last), 4)
        kept = [number for number in range(first, last) if len(documents[number]) >= 2]
        assert (len(rows), rows.texts, rows.left_out) == (len(kept), last - first, last - first - len(kept))
        assert rows.cut == sum(len(documents[number]) > 4 for number in kept)
        assert rows.real_tokens == sum(min(len(documents[number]), 4) for number in kept)
        for row in source.sample(range(len(kept)), len(kept)):
            assert rows[row].tolist() == documents[kept[row]][:4]
            assert rows.position(row) == starts[kept[row]]
            assert rows.borders(row) == []


def test_rows_of_several_sources_follow_each_other(tmp_path: Path) -> None:
    parts = [
        PackedRows(span_of_lengths(_new(tmp_path), *lengths), 4) for lengths in ((3, 5, 1), (2,), (4, 6), (3, 1, 4))
    ]
    assert [len(part) for part in parts] == [2, 0, 2, 2]
    rows = JoinedRows(parts)
    assert (len(rows), rows.max_length) == (6, 4)
    assert [rows.place(row) for row in range(6)] == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1)]
    assert [rows[row].tolist() for row in range(6)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    assert [rows.position(row) for row in range(6)] == [0, 4] * 3
    assert [rows.borders(row) for row in range(6)] == [[3], [], [], [], [3], []]


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
def test_a_corpus_must_fill_one_row(tmp_path: Path, lengths: tuple[int, ...], packing: bool, fits: bool) -> None:
    span = span_of_lengths(tmp_path / "s", *lengths)
    if fits:
        require_rows(span, 8, packing)
        return
    with pytest.raises(DataError) as caught:
        require_rows(span, 8, packing)
    assert str(caught.value) == (
        "data.path: the corpus has 7 tokens, less than one chunk of data.max_length 8"
        if packing
        else "data.path: no document has two tokens, so there is nothing to predict"
    )


def test_the_advice_on_a_small_corpus_is_a_length_that_works(tmp_path: Path) -> None:
    span = span_of_lengths(tmp_path / "s", 1234)
    with pytest.raises(DataError) as caught:
        require_rows(span, 4096, packing=True)
    assert caught.value.problems[0].fix == "give more text or set data.max_length to at most 1,234"
    require_rows(span, 1234, packing=True)


def test_a_part_of_a_corpus_must_fill_one_row_by_itself(tmp_path: Path) -> None:
    stream = span_of_lengths(tmp_path / "s", 6, 2, 5, 1, 1, 1).stream
    require_rows(stream.span(0, 2), 8, packing=True)
    require_rows(stream.span(2, 4), 8, packing=False)
    with pytest.raises(DataError) as caught:
        require_rows(stream.span(2, 4), 8, True, "data.validation.fraction", "the held-out part")
    assert str(caught.value) == (
        "data.validation.fraction: the held-out part has 6 tokens, less than one chunk of data.max_length 8"
    )
    with pytest.raises(DataError) as caught:
        require_rows(stream.span(3), 8, False, "data.validation.path")
    assert str(caught.value) == ("data.validation.path: no document has two tokens, so there is nothing to predict")


def test_a_batch_of_documents_is_padded_masked_and_counted(tmp_path: Path) -> None:
    batch = _first_batch(_documents(tmp_path, 3, 2, 6), 3)
    assert batch.input_ids.tolist() == [[0, 1, 2, PAD], [3, 4, PAD, PAD], [5, 6, 7, 8]]
    assert batch.labels.tolist() == [
        [0, 1, 2, IGNORE_INDEX],
        [3, 4, IGNORE_INDEX, IGNORE_INDEX],
        [5, 6, 7, 8],
    ]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert (batch.targets, batch.tokens) == (2 + 1 + 3, 3 + 2 + 4)
    assert {batch.input_ids.dtype, batch.labels.dtype, batch.attention_mask.dtype} == {torch.int64}
    assert batch.segments is None


def test_the_pad_id_inside_a_document_is_a_target_all_the_same(tmp_path: Path) -> None:
    """Masks come from lengths, not from ids: padding often shares the id of EOS."""
    batch = _first_batch(DocumentRows(span_of_tokens(tmp_path / "s", [PAD, 5, PAD]), 4), 1)
    assert batch.input_ids.tolist() == [[PAD, 5, PAD, PAD]]
    assert batch.labels.tolist() == [[PAD, 5, PAD, IGNORE_INDEX]]
    assert batch.targets == 2


def test_a_batch_without_padding_has_no_mask_and_a_target_less_than_tokens_per_row(tmp_path: Path) -> None:
    batch = _first_batch(_packed(tmp_path, 3), 3)
    assert batch.attention_mask is None
    assert torch.equal(batch.labels, batch.input_ids)
    assert (batch.targets, batch.tokens) == (9, 12)


def test_moving_a_batch_keeps_its_content(tmp_path: Path) -> None:
    for rows, keep_apart in (
        (_documents(tmp_path, 3, 2), False),
        (_packed(tmp_path, 2), False),
        (_packed(tmp_path, 2), True),
    ):
        batch = _first_batch(rows, 2, keep_apart)
        moved = batch.to(torch.device("meta"))
        assert moved.input_ids.device.type == moved.labels.device.type == "meta"
        assert (moved.attention_mask is None) == (batch.attention_mask is None)
        assert moved.attention_mask is None or moved.attention_mask.device.type == "meta"
        assert (moved.segments is not None) == keep_apart
        assert moved.segments is None or moved.segments.device.type == "meta"
        assert (moved.targets, moved.tokens, moved.hash_sums) == (batch.targets, batch.tokens, batch.hash_sums)


# --- Documents kept apart ---------------------------------------------------------------------------------------


def test_documents_kept_apart_are_numbered_and_their_first_tokens_are_no_targets(tmp_path: Path) -> None:
    """Documents of 3, 5, 1, 1 and 6 tokens; the fourth row begins with the last one's last tokens."""
    rows = PackedRows(span_of_lengths(tmp_path / "s", 3, 5, 1, 1, 6), 4)
    batch = _first_batch(rows, 4, keep_apart=True)
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert batch.segments is not None
    assert batch.segments.dtype == torch.int32
    assert batch.segments.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 2, 2], [0, 0, 0, 0]]
    assert batch.labels[:, 1:].tolist() == [
        [1, 2, IGNORE_INDEX],
        [5, 6, 7],
        [IGNORE_INDEX, IGNORE_INDEX, 11],
        [13, 14, 15],
    ]
    assert batch.attention_mask is None
    assert (batch.targets, batch.tokens) == (2 + 3 + 1 + 3, 16)


def test_ids_of_the_end_of_text_inside_a_document_begin_no_segment(tmp_path: Path) -> None:
    """Borders come from the index, not from ids."""
    eos = 2
    stream = make_stream(tmp_path / "s", [[5, eos, 6, eos], [eos, eos]])
    batch = _first_batch(PackedRows(stream.span(), 6), 1, keep_apart=True)
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch.labels[:, 1:].tolist() == [[eos, 6, eos, IGNORE_INDEX, eos]]


@pytest.mark.parametrize("seed", range(10))
def test_any_documents_kept_apart(tmp_path: Path, seed: int) -> None:
    """Against a walk through the documents; those without tokens take no part."""
    source = random.Random(seed)
    lengths = [source.choice([0, 1, 1, 2, 3, 5, 17]) for _ in range(60)]
    rows = PackedRows(span_of_lengths(tmp_path / "s", *lengths, shard_documents=source.choice([1, 3, 100])), 7)
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    batch = _first_batch(rows, len(rows), keep_apart=True)
    assert batch.segments is not None
    targets = 0
    for row in range(len(rows)):
        owners = owner[row * 7 : row * 7 + 7]
        numbers = sorted(set(owners))
        assert batch.segments[row].tolist() == [numbers.index(number) for number in owners]
        expected = [
            token if owners[place] == owners[place - 1] else IGNORE_INDEX
            for place, token in enumerate(range(row * 7, row * 7 + 7))
        ]
        assert batch.labels[row, 1:].tolist() == expected[1:]
        targets += sum(label != IGNORE_INDEX for label in expected[1:])
    assert batch.targets == targets


def test_padded_rows_kept_apart_are_one_segment_each(tmp_path: Path) -> None:
    batch = _first_batch(_documents(tmp_path, 3, 6, 1, 2), 3, keep_apart=True)
    plain = _first_batch(_documents(tmp_path, 3, 6, 1, 2), 3)
    assert batch.segments is not None
    assert batch.segments.tolist() == [[0] * 4] * 3
    assert torch.equal(batch.labels, plain.labels)
    assert batch.targets == plain.targets


# --- The hash of a step -----------------------------------------------------------------------------------------


def _hash_of_step(rows: Rows, shape: tuple[int, int, int], step: int = 0, keep_apart: bool = False) -> str:
    """From the sums of all ranks, added as float64 as a collective would."""
    world, batch, accumulation = shape
    plan = _plan(rows, batch, accumulation, world)
    sums = torch.zeros(2, dtype=torch.float64)
    for rank in range(world):
        for part in StepBatches(rows, plan, rank, PAD, keep_apart).of_step(step):
            sums += torch.tensor(part.hash_sums, dtype=torch.float64)
    return step_hash(float(sums[0]), float(sums[1]))


def test_the_hash_of_a_step_is_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    rows = _packed(tmp_path, 20)
    for step in range(4):
        hashes = {_hash_of_step(rows, shape, step, keep_apart) for shape in SHAPES for keep_apart in (False, True)}
        numbers = _plan(rows, 8).rows(step)
        expected = 0, 0
        for place, number in enumerate(numbers):
            content = place.to_bytes(8, "little") + np.array(rows[number], dtype="<u4").tobytes()
            value = int.from_bytes(hashlib.blake2b(content, digest_size=6).digest(), "little")
            expected = expected[0] + value // 2**24, expected[1] + value % 2**24
        assert hashes == {f"{expected[0] % 2**24:06x}{expected[1] % 2**24:06x}"}
        assert hashes == {step_hash(*hash_sums([row_hash(place, rows[row]) for place, row in enumerate(numbers)]))}
    assert len({_hash_of_step(rows, SHAPES[0], step) for step in range(5)}) == 5


def test_the_hash_of_a_step_tells_one_id_and_the_order(tmp_path: Path) -> None:
    ids = list(range(32))
    orders: list[Order] = [FileOrder(8), _Swapped(FileOrder(8), 0, 7), _Swapped(FileOrder(8), 3, 4)]
    contents = [ids, [*ids[:13], 99, *ids[14:]], [*ids[:31], 99]]
    hashes = set()
    for content in contents:
        rows = PackedRows(span_of_tokens(_new(tmp_path), content), 4)
        for order in orders:
            sums = [part.hash_sums for part in StepBatches(rows, StepPlan(order, 2, 4, 1), 0, PAD).of_step(0)]
            hashes.add(step_hash(sum(upper for upper, _ in sums), sum(lower for _, lower in sums)))
    assert len(hashes) == 9
    assert all(len(value) == 12 for value in hashes)


class _Swapped:
    """An order with two positions exchanged."""

    def __init__(self, order: Order, first: int, second: int) -> None:
        self._order = order
        self._exchanged = {first: second, second: first}

    def row(self, position: int) -> int:
        return self._order.row(self._exchanged.get(position, position))


def test_the_hash_of_a_step_is_exact_for_the_largest_steps() -> None:
    """2^29 rows whose halves are all ones: the sum is below 2^53, so nothing is rounded."""
    most = float(2**29) * (2**24 - 1)
    assert step_hash(most, most - 1) == f"{2**29 * (2**24 - 1) % 2**24:06x}{(2**29 * (2**24 - 1) - 1) % 2**24:06x}"


def test_the_hash_of_a_row_is_fixed_for_all_time() -> None:
    """metrics.jsonl of different versions can then be compared."""
    assert f"{row_hash(3, np.array([1, 2, 2**32 - 1], dtype=np.int64)):012x}" == "2ed6cbb28e10"


# --- Held-out rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 24])
def test_every_held_out_row_counts_once_over_all_ranks(
    tmp_path: Path, rows: int, batch_size: int, world: int
) -> None:
    """Each rank has the same number of batches, because they all take part in the sums."""
    data = _packed(tmp_path, rows)
    ranks = [HeldOutBatches(data, batch_size, rank, world, PAD) for rank in range(world)]
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


def test_a_rank_whose_rows_have_run_out_has_a_batch_without_targets(tmp_path: Path) -> None:
    batch = HeldOutBatches(_packed(tmp_path, 5), 2, rank=1, world_size=2, pad_id=PAD)[1]
    assert batch.input_ids.tolist() == [[0, 1, 2, 3]]  # real tokens: a forward pass over it is finite
    assert batch.labels.tolist() == [[IGNORE_INDEX] * 4]
    assert (batch.targets, batch.tokens) == (0, 0)


def test_a_last_batch_has_the_rows_that_are_left(tmp_path: Path) -> None:
    batch = HeldOutBatches(_packed(tmp_path, 5), 2, rank=0, world_size=2, pad_id=PAD)[1]
    assert batch.input_ids.tolist() == [[16, 17, 18, 19]]
    assert torch.equal(batch.labels, batch.input_ids)
    assert (batch.targets, batch.tokens) == (3, 4)


def test_held_out_documents_are_padded_and_masked(tmp_path: Path) -> None:
    batch = HeldOutBatches(_documents(tmp_path, 3, 1, 6), 2, rank=0, world_size=1, pad_id=PAD)[0]
    assert batch.input_ids.tolist() == [[0, 1, 2, PAD], [4, 5, 6, 7]]
    assert batch.labels.tolist() == [[0, 1, 2, IGNORE_INDEX], [4, 5, 6, 7]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert (batch.targets, batch.tokens) == (5, 7)


def test_held_out_documents_can_be_kept_apart(tmp_path: Path) -> None:
    span = span_of_lengths(tmp_path / "s", 2, 6, 1, 3)
    rows = PackedRows(span, 4)
    ranks = [HeldOutBatches(rows, 2, rank, 2, PAD, keep_apart=True) for rank in (0, 1)]
    first, second = ranks[0][0], ranks[1][0]
    assert first.segments is not None
    assert second.segments is not None
    assert first.segments.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert second.segments.tolist() == [[0, 1, 1, 1]]
    assert first.labels[:, 1:].tolist() == [[1, IGNORE_INDEX, 3], [5, 6, 7]]
    assert (first.targets, second.targets) == (5, 2)
    empty = HeldOutBatches(PackedRows(span, 12), 1, 1, 2, PAD, keep_apart=True)[0]
    assert (empty.targets, empty.tokens, int((empty.labels != IGNORE_INDEX).sum())) == (0, 0, 0)
    assert empty.segments is not None
