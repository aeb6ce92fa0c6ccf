"""The token stream over shards, against lists: any layout, empty shards, documents without tokens, all widths."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import threading
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest

from eulerforge.data import tokens
from eulerforge.data.tokens import Piece, TokenStream
from eulerforge.errors import PreparationError
from tests.kit.streams import Documents, make_stream, write_shard

WIDTHS = ["<u2", "<u4", "<u2", "<i8", ">u2"]


@dataclass(frozen=True)
class _Layout:
    """A random stream and what it holds."""

    stream: TokenStream
    shards: tuple[Documents, ...]

    @property
    def documents(self) -> list[list[int]]:
        return [list(ids) for shard in self.shards for ids in shard]

    @property
    def ids(self) -> list[int]:
        return [token for document in self.documents for token in document]

    @property
    def starts(self) -> list[int]:
        """Where each document begins, and the end."""
        return [0, *accumulate(map(len, self.documents))]


def _layout(tmp_path: Path, seed: int) -> _Layout:
    source = random.Random(seed)
    shards = tuple(
        [[source.randrange(2**15) for _ in range(source.choice([0, 0, 1, 2, 3, 10]))] for _ in range(documents)]
        for documents in source.choices([0, 0, 1, 2, 5], k=source.randrange(1, 9))
    )
    return _Layout(make_stream(tmp_path, *shards, dtypes=source.sample(WIDTHS, 3)), shards)


SEEDS = range(25)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_part_can_be_read(tmp_path: Path, seed: int) -> None:
    layout = _layout(tmp_path, seed)
    ids = layout.ids
    assert layout.stream.tokens == len(ids)
    for start in range(len(ids) + 1):
        for stop in range(start, len(ids) + 1):
            found = layout.stream.read(start, stop)
            assert found.tolist() == ids[start:stop]
            assert found.dtype == np.int64


@pytest.mark.parametrize("seed", SEEDS)
def test_where_documents_begin(tmp_path: Path, seed: int) -> None:
    layout = _layout(tmp_path, seed)
    stream, starts = layout.stream, layout.starts
    assert stream.documents == len(layout.documents)
    assert [stream.document_start(document) for document in range(stream.documents + 1)] == starts
    owners = [number for number, ids in enumerate(layout.documents) for _ in ids]
    assert [stream.document_at(position) for position in range(stream.tokens)] == owners


@pytest.mark.parametrize("seed", SEEDS)
def test_documents_that_begin_between_two_positions(tmp_path: Path, seed: int) -> None:
    """Those without tokens begin where the next one does."""
    layout = _layout(tmp_path, seed)
    begins = sorted(set(layout.starts[:-1]))
    for start in range(layout.stream.tokens + 1):
        for stop in range(start, layout.stream.tokens + 1):
            found = list(layout.stream.starts_between(start, stop))
            assert found == sorted(found)
            assert sorted(set(found)) == [begin for begin in begins if start < begin < stop], (start, stop)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_span_is_any_run_of_documents(tmp_path: Path, seed: int) -> None:
    layout = _layout(tmp_path, seed)
    stream, starts, documents = layout.stream, layout.starts, layout.documents
    bases = [0, *accumulate(map(len, layout.shards))]
    assert (stream.span().first, stream.span().last) == (0, len(documents))
    for first in range(len(documents) + 1):
        assert stream.span(first).last == len(documents)
        for last in range(first, len(documents) + 1):
            span = stream.span(first, last)
            assert (span.start, span.stop) == (starts[first], starts[last])
            assert (span.documents, span.tokens) == (last - first, starts[last] - starts[first])
            pieces = list(span.pieces())
            assert pieces == [
                Piece(shard, max(first, low) - low, min(last, high) - low, max(first, low))
                for shard, (low, high) in enumerate(pairwise(bases))
                if max(first, low) < min(last, high)
            ]
            lengths = [length for piece in pieces for length in span.lengths(piece).tolist()]
            assert lengths == [len(ids) for ids in documents[first:last]]


def test_ids_of_all_widths_keep_their_value(tmp_path: Path) -> None:
    stream = TokenStream(
        [
            write_shard(tmp_path / "a", [[0, 65535]], "<u2"),
            write_shard(tmp_path / "b", [[65536, 2**31, 2**32 - 1]], "<u4"),
            write_shard(tmp_path / "c", [[2**40]], "<i8"),
            write_shard(tmp_path / "d", [[258]], ">u2"),
        ]
    )
    assert stream.read(0, 7).tolist() == [0, 65535, 65536, 2**31, 2**32 - 1, 2**40, 258]


def test_ids_may_lie_behind_a_header_in_a_file_of_their_own(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / str(number), [[number, 7], [8]], header=128 * number) for number in range(3)]
    assert TokenStream(shards).read(0, 9).tolist() == [0, 7, 8, 1, 7, 8, 2, 7, 8]


def test_the_place_of_a_document(tmp_path: Path) -> None:
    """Three files in the first shard, one file over two shards whose lines are counted from a range's beginning."""
    one: Documents = [[1]] * 3
    stream = TokenStream(
        [
            write_shard(
                tmp_path / "a", [[1]] * 5, lines=[2, 9, 1, 4, 6], files=[(0, 2), (1, 1), (4, 2)], first_file=3
            ),
            write_shard(tmp_path / "empty", [], files=[], first_file=8),
            write_shard(tmp_path / "b", one, lines=[1, 2, 5], first_file=8),
            write_shard(tmp_path / "c", one, lines=[1, 3, 4], first_file=8, first_line=70),
            # Lines before a shard are lines of its first file.
            write_shard(tmp_path / "d", one, lines=[5, 1, 2], files=[(0, 1), (1, 2)], first_file=9, first_line=50),
        ]
    )
    assert [stream.location(document) for document in range(stream.documents)] == [
        *[(3, 2), (3, 9), (4, 1), (7, 4), (7, 6)],
        *[(8, 1), (8, 2), (8, 5)],
        *[(8, 71), (8, 73), (8, 74)],
        *[(9, 55), (10, 1), (10, 2)],
    ]


def test_a_stream_without_documents(tmp_path: Path) -> None:
    for number, shards in enumerate(([], [[]], [[], []], [[[], []]])):
        stream = make_stream(tmp_path / str(number), *shards)
        assert (stream.tokens, stream.documents) == (0, sum(map(len, shards)))
        assert stream.read(0, 0).tolist() == []
        assert list(stream.starts_between(0, 0)) == []
        assert (stream.span().tokens, stream.document_start(stream.documents)) == (0, 0)


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_more_shards_than_files_are_kept_open(tmp_path: Path) -> None:
    shards = tokens._OPEN_FILES + 20
    stream = make_stream(tmp_path, *([[number, number + 1], [number]] for number in range(shards)))
    gc.collect()
    before = _open_files()
    order = list(range(shards))
    random.Random(0).shuffle(order)
    for number in [*order, *order]:
        assert stream.read(3 * number, 3 * number + 3).tolist() == [number, number + 1, number]
        assert stream.document_at(3 * number + 2) == 2 * number + 1
    opened = _open_files() - before
    assert 0 < opened <= tokens._OPEN_FILES + tokens._OPEN_INDICES


def test_a_stream_may_be_read_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With so few files kept open, threads close each other's all the time."""
    monkeypatch.setattr(tokens, "_OPEN_FILES", 1)
    monkeypatch.setattr(tokens, "_OPEN_INDICES", 1)
    shards = [[[100 * shard + token for token in range(50)]] * 2 for shard in range(4)]
    stream = make_stream(tmp_path, *shards)
    ids = [token for shard in shards for document in shard for token in document]
    wrong: list[object] = []

    def run(seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(400):
                start = source.randrange(400)
                stop = source.randrange(start, 401)
                if stream.read(start, stop).tolist() != ids[start:stop]:
                    wrong.append((start, stop))
                if stream.document_at(start) != start // 50:
                    wrong.append(start)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_file_that_has_been_opened_can_be_read_after_its_removal(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "s", [[1, 2, 3]])
    assert stream.read(0, 1).tolist() == [1]
    shutil.rmtree(tmp_path / "s")
    assert stream.read(0, 3).tolist() == [1, 2, 3]


def test_tokens_that_are_cut_off_while_in_use_are_named(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, [[1, 2, 3]])
    path = stream.shards[0].tokens_file
    os.truncate(path, 4)
    assert stream.read(0, 2).tolist() == [1, 2]
    with pytest.raises(PreparationError) as caught:
        stream.read(1, 3)
    assert str(caught.value) == f"{path} cannot be read any more: it is shorter than it was"


def test_a_cache_that_is_removed_while_in_use_ends_the_run_with_advice(tmp_path: Path) -> None:
    stream = make_stream(tmp_path / "s", [[1, 2, 3]])
    path = stream.shards[0].tokens_file
    shutil.rmtree(tmp_path / "s")
    for read, missing in ((lambda: stream.read(0, 1), path), (lambda: stream.ends(0), path.with_name("ends.bin"))):
        with pytest.raises(PreparationError) as caught:
            read()
        assert str(caught.value) == f"{missing} cannot be read any more: No such file or directory"
        assert "--resume" in caught.value.problems[0].fix
        assert caught.value.exit_code == 1


def test_the_kit_writes_what_a_shard_is(tmp_path: Path) -> None:
    """So that these tests are about shards as they are."""
    from eulerforge.data.shards import ShardMeta

    shard = write_shard(tmp_path / "a", [[1, 2], [], [3]])
    meta = ShardMeta.read(shard.folder)
    assert (meta.documents, meta.tokens, meta.files) == (3, 3, [[0, 3]])
    assert json.loads((shard.folder / "shard.json").read_bytes())["dtype"] == "<u2"
