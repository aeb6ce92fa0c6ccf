"""A preset's corpus (caches, rows, held-out part, order), progress of making it, and what a cache directory holds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from filelock import FileLock

from eulerforge.config.schema import PretrainPreset
from eulerforge.corpus import Corpus, CorpusCaches, make_corpus, open_caches, say_mixture
from eulerforge.data.build import Report
from eulerforge.data.cache import CacheSpec, Voice, open_or_build
from eulerforge.data.housekeeping import Unfinished, entries, remove, remove_unfinished, unfinished
from eulerforge.data.manifest import TokenCache
from eulerforge.data.order import EpochOrder, FileOrder, MixtureOrder
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.rows import DocumentRows, JoinedRows, PackedRows, Rows
from eulerforge.data.sources import CorpusFiles, resolve_corpus, resolve_files
from eulerforge.errors import DataError
from eulerforge.files import tree_bytes
from eulerforge.metrics.console import Console
from eulerforge.metrics.progress import TokenizingProgress, tokenizing

BOS, EOS = 300, 301


class _Tokenizer:
    """One id per byte."""

    fingerprint = "bytes"
    serialized = None
    largest_id = EOS
    bos_id: int | None = BOS
    eos_id: int | None = EOS

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.texts += texts
        return [list(text.encode()) for text in texts]

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        raise AssertionError("no long texts here")


def _preset(path: Any, **data: Any) -> PretrainPreset:
    values = {"path": path, "max_length": 4, **data}
    return PretrainPreset.model_validate({"model_dir": "m", "data": values, "training": {"max_steps": 10, "seed": 5}})


def _voice(say: Callable[[str], None]) -> Voice:
    @contextlib.contextmanager
    def progress(total: int) -> Iterator[Report]:
        yield lambda size, documents, tokens: None

    return Voice(say, progress)


def _corpus(tmp_path: Path, name: str, *texts: str) -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def _caches(
    tmp_path: Path, preset: PretrainPreset, say: Callable[[str], None] = lambda line: None, tokenizer: Any = None
) -> tuple[CorpusFiles, CorpusCaches]:
    validation = preset.data.validation
    held = resolve_corpus(validation.path, "data.validation.path") if validation and validation.path else ()
    files = CorpusFiles(resolve_corpus(preset.data.path), held, tmp_path / "cache", "tokenizer")
    return files, open_caches(files, preset, tokenizer or _Tokenizer(), _voice(say))


def _make(tmp_path: Path, preset: PretrainPreset, say: Callable[[str], None] = lambda line: None) -> Corpus:
    files, caches = _caches(tmp_path, preset)
    return make_corpus(preset, files.parts, caches, say)


def _all(rows: Rows) -> list[list[int]]:
    return [rows[row].tolist() for row in range(len(rows))]


def _ids(*texts: str) -> list[int]:
    return [token for text in texts for token in [*text.encode(), EOS]]


def _chunks(ids: Sequence[int], length: int = 4) -> list[list[int]]:
    return [list(ids[start : start + length]) for start in range(0, len(ids) - length + 1, length)]


# --- Caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "ids"),
    [
        ({}, [*b"abc", EOS]),
        ({"add_bos": True}, [BOS, *b"abc", EOS]),
        ({"add_bos": True, "add_eos": False}, [BOS, *b"abc"]),
        ({"add_eos": False, "max_length": 3}, [*b"abc"]),
    ],
)
def test_the_policy_of_the_preset_is_that_of_the_cache(
    tmp_path: Path, policy: dict[str, Any], ids: list[int]
) -> None:
    _, caches = _caches(tmp_path, _preset(_corpus(tmp_path, "a.jsonl", "abc"), **policy))
    (cache,) = caches.parts
    assert cache.stream.read(0, cache.stream.tokens).tolist() == ids
    assert caches.validation is None


def test_keys_of_the_preset_reach_the_cache(tmp_path: Path) -> None:
    """Column, bad lines, width of ids; EOS ends documents in token files though it is not added to texts."""
    (tmp_path / "a.jsonl").write_text('{"body": {"en": "ab"}}\noops\n{"body": {"en": "c"}}\n')
    (tmp_path / "b.bin").write_bytes(np.array([1, EOS, 2], dtype="<u4").tobytes())
    preset = _preset(
        [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.bin"],
        text_column="body.en",
        on_bad_line="skip",
        token_dtype="uint32",
        add_eos=False,
    )
    _, caches = _caches(tmp_path, preset)
    (cache,) = caches.parts
    assert [cache.stream.document_start(number) for number in range(5)] == [0, 2, 3, 5, 6]
    assert cache.stream.read(0, 6).tolist() == [*b"abc", 1, EOS, 2]
    assert cache.counts.skipped == {"malformed JSON": 1}


def test_how_files_are_known_and_what_they_are_called_reach_the_cache(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "a.jsonl", "abcd")
    reused = {}
    for verify in ("mtime", "content"):
        preset = _preset(f"{tmp_path}/*.jsonl", verify=verify)
        _caches(tmp_path, preset)
        os.utime(path, (0, 0) if verify == "mtime" else (1, 1))
        reused[verify] = _caches(tmp_path, preset)[1].parts[0].reused
    assert reused == {"mtime": False, "content": True}
    assert {entry.name for entry in entries(tmp_path / "cache")} == {f"{tmp_path}/*.jsonl"}


@pytest.mark.parametrize(("workers", "several"), [("auto", False), (1, False), (2, True)])
def test_the_number_of_processes_reaches_the_cache(tmp_path: Path, workers: Any, several: bool) -> None:
    """Two token files are two tasks; this tokenizer would have to be copied for a second process."""
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(np.array([1, 2, EOS], dtype="<u2").tobytes())
    said: list[str] = []
    _caches(tmp_path, _preset(f"{tmp_path}/*.bin", num_workers=workers, token_dtype="uint16"), said.append)
    copied = "This tokenizer cannot be copied to other processes: tokenizing in one process"
    assert (said[0] == copied) is several


def test_what_opening_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "abcd"}\n{"text": ""}\n{"text": ""}\n{"text": "\\ud800"}\n[1]\n[2]\noops\n')
    preset = _preset(str(path), on_bad_line="skip")
    said: list[str] = []
    _, caches = _caches(tmp_path, preset, said.append)
    manifest = caches.parts[0].path
    assert said[0] == f"Tokenizing 1 file into {tmp_path}/cache"
    assert said[1].startswith("Tokenized 2 documents, 9 tokens in ")
    notes = (
        "Data notes: 2 skipped, not an object, 1 skipped, malformed JSON, 2 empty texts dropped, "
        "1 texts with lone surrogates repaired"
    )
    assert said[2:] == [f"Loaded 2 texts from {path}", notes, f"Token cache: built {manifest}"]
    again: list[str] = []
    _caches(tmp_path, preset, again.append)
    assert again == [f"Loaded 2 texts from {path}", notes, f"Token cache: reused {manifest}"]


def test_a_clean_corpus_has_no_notes_and_held_out_text_is_not_spoken_of(tmp_path: Path) -> None:
    first, second = _corpus(tmp_path, "a.jsonl", "abcd"), _corpus(tmp_path, "b.jsonl", "efgh")
    preset = _preset(first, validation={"path": second})
    _, caches = _caches(tmp_path, preset)
    said: list[str] = []
    _, caches = _caches(tmp_path, preset, said.append)
    assert said == [f"Loaded 1 texts from {first}", f"Token cache: reused {caches.parts[0].path}"]
    assert caches.validation is not None
    assert caches.validation.stream.read(0, 5).tolist() == [*b"efgh", EOS]


@pytest.mark.parametrize(
    ("texts", "held", "message"),
    [
        (["ab"], None, "data.path: the corpus has 3 tokens, less than one chunk of data.max_length 4"),
        (["abcd"], ["a"], "data.validation.path: the corpus has 2 tokens, less than one chunk of data.max_length 4"),
        (["abcd"], [""], "data.validation.path: no usable document in {root}/b.jsonl (1 empty texts)"),
    ],
)
def test_a_corpus_that_is_too_small_leaves_nothing_behind(
    tmp_path: Path, texts: list[str], held: list[str] | None, message: str
) -> None:
    first = _corpus(tmp_path, "a.jsonl", *texts)
    validation = {"path": _corpus(tmp_path, "b.jsonl", *held)} if held else None
    with pytest.raises(DataError) as caught:
        _caches(tmp_path, _preset(first, validation=validation))
    assert str(caught.value) == message.format(root=tmp_path)
    assert len(list((tmp_path / "cache").rglob("*.json"))) == (2 if held else 0)  # those of the training text


def test_documents_of_one_token_are_nothing_to_train_on(tmp_path: Path) -> None:
    preset = _preset(_corpus(tmp_path, "a.jsonl", "a", "b"), packing=False, add_eos=False)
    with pytest.raises(DataError, match=r"^data\.path: no document has two tokens, so there is nothing to predict$"):
        _caches(tmp_path, preset)


# --- Rows, held-out rows, order ---------------------------------------------------------------------------------

TEXTS = ["abc", "defghij", "k", "lmnop", "qrs", "tuvwxyz", "01234", "567", "89"]


def test_a_packed_corpus(tmp_path: Path) -> None:
    said: list[str] = []
    preset = _preset(_corpus(tmp_path, "a.jsonl", *TEXTS))
    corpus = _make(tmp_path, preset, said.append)
    ids = _ids(*TEXTS)
    assert isinstance(corpus.rows, PackedRows)
    assert _all(corpus.rows) == _chunks(ids)
    assert (corpus.part_rows, corpus.held_out, corpus.validation_rows) == ((corpus.rows,), (0,), None)
    assert isinstance(corpus.order, EpochOrder)
    own = EpochOrder(len(corpus.rows), 5)
    assert [corpus.order.row(position) for position in range(30)] == [own.row(position) for position in range(30)]
    assert said == ["Packed: 45 tokens → 11 chunks (max_length=4)"]
    assert corpus.counts == DocumentCounts(documents=9)


def test_the_order_of_the_files(tmp_path: Path) -> None:
    corpus = _make(tmp_path, _preset(_corpus(tmp_path, "a.jsonl", *TEXTS), shuffle=False))
    assert isinstance(corpus.order, FileOrder)
    assert [corpus.order.row(position) for position in range(13)] == [*range(11), 0, 1]


def test_a_corpus_of_one_document_a_row(tmp_path: Path) -> None:
    said: list[str] = []
    preset = _preset(_corpus(tmp_path, "a.jsonl", "a", "bc", "defghi", "j", "klm"), packing=False, add_eos=False)
    corpus = _make(tmp_path, preset, said.append)
    assert isinstance(corpus.rows, DocumentRows)
    assert _all(corpus.rows) == [list(b"bc"), list(b"defg"), list(b"klm")]
    assert said == ["Rows: 5 texts → 3 rows (max_length=4, 1 cut, 2 of one token left out, 25.0% padding)"]


@pytest.mark.parametrize(
    ("fraction", "documents", "held"),
    [(0.1, 10, 1), (0.1, 11, 2), (0.01, 20, 1), (0.5, 21, 11), (0.9, 10, 9), (0.07, 100, 7), (0.29, 100, 29)],
)
def test_the_held_out_part_is_that_share_of_the_last_documents_rounded_up(
    tmp_path: Path, fraction: float, documents: int, held: int
) -> None:
    texts = [f"{number:03}" for number in range(documents)]  # with EOS a row each
    said: list[str] = []
    preset = _preset(_corpus(tmp_path, "a.jsonl", *texts), validation={"fraction": fraction})
    corpus = _make(tmp_path, preset, said.append)
    assert corpus.held_out == (held,)
    assert _all(corpus.rows) == _chunks(_ids(*texts[: documents - held]))
    assert corpus.validation_rows is not None
    assert _all(corpus.validation_rows) == _chunks(_ids(*texts[documents - held :]))
    assert said == [
        f"Packed: {4 * (documents - held)} tokens → {documents - held} chunks (max_length=4)",
        f"Held out: {held} texts, {held} rows of 4 tokens",
    ]


def test_the_border_of_the_held_out_part_lies_between_documents(tmp_path: Path) -> None:
    """Rows of neither side hold tokens of the other, though the training part fills no whole number of rows."""
    corpus = _make(tmp_path, _preset(_corpus(tmp_path, "a.jsonl", *TEXTS), validation={"fraction": 0.4}))
    assert corpus.held_out == (4,)
    assert _all(corpus.rows) == _chunks(_ids(*TEXTS[:5]))
    assert corpus.validation_rows is not None
    assert _all(corpus.validation_rows) == _chunks(_ids(*TEXTS[5:]))


def test_held_out_text_of_its_own(tmp_path: Path) -> None:
    said: list[str] = []
    held = _corpus(tmp_path, "b.jsonl", "held", "out text")
    corpus = _make(tmp_path, _preset(_corpus(tmp_path, "a.jsonl", *TEXTS), validation={"path": held}), said.append)
    assert corpus.held_out == (0,)
    assert _all(corpus.rows) == _chunks(_ids(*TEXTS))
    assert corpus.validation_rows is not None
    assert _all(corpus.validation_rows) == _chunks(_ids("held", "out text"))
    assert said[-1] == "Held out: 2 texts, 3 rows of 4 tokens"


@pytest.mark.parametrize(
    ("texts", "fraction", "packing", "message"),
    [
        (["abcdefg", "a"], 0.5, True, "the held-out part has 2 tokens, less than one chunk of data.max_length 4"),
        (
            ["a", "abcdefg"],
            0.5,
            True,
            "what is left to train on has 2 tokens, less than one chunk of data.max_length 4",
        ),
        (["ab"], 0.5, False, "no document has two tokens, so there is nothing to predict"),
        (["abcd"], 0.01, True, "what is left to train on has 0 tokens, less than one chunk of data.max_length 4"),
    ],
)
def test_both_sides_of_the_border_must_fill_a_row(
    tmp_path: Path, texts: list[str], fraction: float, packing: bool, message: str
) -> None:
    preset = _preset(_corpus(tmp_path, "a.jsonl", *texts), validation={"fraction": fraction}, packing=packing)
    with pytest.raises(DataError) as caught:
        _make(tmp_path, preset)
    assert str(caught.value) == f"data.validation.fraction: {message}"


def _mixture(tmp_path: Path, **data: Any) -> PretrainPreset:
    web = _corpus(tmp_path, "web.jsonl", *(f"{number:03}" for number in range(50)))
    code = _corpus(tmp_path, "code.jsonl", *(f"x{number:02}" for number in range(20)))
    return _preset([{"path": web, "weight": 0.7}, {"path": code, "weight": 0.3}], **data)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mixture_takes_from_its_sources_by_weight(tmp_path: Path, shuffle: bool) -> None:
    preset = _mixture(tmp_path, shuffle=shuffle)
    said: list[str] = []
    corpus = _make(tmp_path, preset, said.append)
    assert isinstance(corpus.rows, JoinedRows)
    assert [len(part) for part in corpus.part_rows] == [50, 20]
    assert _all(corpus.rows) == [
        *(_ids(f"{number:03}") for number in range(50)),
        *(_ids(f"x{number:02}") for number in range(20)),
    ]
    orders = [EpochOrder(50, 5, 0), EpochOrder(20, 5, 1)] if shuffle else [FileOrder(50), FileOrder(20)]
    own = MixtureOrder(orders, [50, 20], [Fraction(7, 10), Fraction(3, 10)])
    rows = [corpus.order.row(position) for position in range(2000)]
    assert rows == [own.row(position) for position in range(2000)]
    assert sum(row < 50 for row in rows) == 1400
    assert said == [f"Packed: {4 * rows} tokens → {rows} chunks (max_length=4)" for rows in (50, 20)]
    assert corpus.counts == DocumentCounts(documents=70)


def test_each_source_of_a_mixture_holds_out_its_last_documents(tmp_path: Path) -> None:
    said: list[str] = []
    corpus = _make(tmp_path, _mixture(tmp_path, validation={"fraction": 0.1}), said.append)
    assert corpus.held_out == (5, 2)
    assert [len(part) for part in corpus.part_rows] == [45, 18]
    assert corpus.validation_rows is not None
    assert _all(corpus.validation_rows) == [
        *(_ids(f"{number:03}") for number in range(45, 50)),
        *(_ids(f"x{number:02}") for number in range(18, 20)),
    ]
    assert said[-1] == "Held out: 7 texts, 7 rows of 4 tokens"
    seen = {corpus.order.row(position) for position in range(200)}
    assert seen == set(range(63))


def test_a_mixture_says_how_often_each_source_is_seen(tmp_path: Path) -> None:
    preset = _mixture(tmp_path)
    files, caches = _caches(tmp_path, preset)
    corpus = make_corpus(preset, files.parts, caches, lambda line: None)
    said: list[str] = []
    say_mixture(corpus, files.parts, 1000, said.append)
    assert said == [
        f"Mixture: 0.7000 of the tokens from {tmp_path}/web.jsonl, 14.00 passes over its 50 chunks",
        f"Mixture: 0.3000 of the tokens from {tmp_path}/code.jsonl, 15.00 passes over its 20 chunks",
    ]


# --- Progress ---------------------------------------------------------------------------------------------------

MEBIBYTE = 2**20


class _Console(Console):
    """Takes down what it is asked to show."""

    def __init__(self, bar: bool) -> None:
        super().__init__("Prepare")
        self._wants_bar = bar
        self.lines: list[str] = []
        self.calls: list[tuple[Any, ...]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    @property
    def has_bar(self) -> bool:
        return self._wants_bar

    def start_bar(self, total: int, done: int, unit: str = "step") -> None:
        self.calls.append(("start", total, done, unit))

    def move_bar(self, amount: int, values: Mapping[str, str]) -> None:
        self.calls.append(("move", amount, dict(values)))

    def close_bar(self) -> None:
        self.calls.append(("close",))


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_where_nobody_watches_there_is_a_line_every_ten_seconds() -> None:
    console, clock = _Console(bar=False), _Clock()
    progress = TokenizingProgress(console, 1024 * MEBIBYTE, clock)
    for second in range(1, 26):
        clock.now = 100.0 + second
        progress(16 * MEBIBYTE, 1000, 50_000)
    assert console.lines == [
        "Tokenized 16% of 1.0 GiB | 10,000 documents | 1,000 documents/s | 50,000 tokens/s | ETA 0:00:54",
        "Tokenized 31% of 1.0 GiB | 20,000 documents | 1,000 documents/s | 50,000 tokens/s | ETA 0:00:44",
    ]


def test_parts_that_an_earlier_build_has_finished_say_nothing_about_the_speed() -> None:
    console, clock = _Console(bar=False), _Clock()
    progress = TokenizingProgress(console, 100 * MEBIBYTE, clock)
    progress(20 * MEBIBYTE, 0, 0)
    clock.now += 10
    progress(40 * MEBIBYTE, 0, 0)
    clock.now += 10
    progress(10 * MEBIBYTE, 200, 4000)
    assert console.lines == [
        "Tokenized 60% of 100.0 MiB | 0 documents | 0 documents/s | 0 tokens/s | ETA unknown",
        "Tokenized 70% of 100.0 MiB | 200 documents | 10 documents/s | 200 tokens/s | ETA 0:01:00",
    ]


def test_where_a_person_watches_there_is_a_bar_and_no_line() -> None:
    console, clock = _Console(bar=True), _Clock()
    progress = TokenizingProgress(console, 1000, clock)
    clock.now += 20
    progress(300, 40, 5000)
    clock.now += 20
    progress(700, 40, 15_000)
    assert console.lines == []
    assert console.calls == [
        ("move", 300, {"documents/s": "2", "tokens/s": "250"}),
        ("move", 700, {"documents/s": "2", "tokens/s": "500"}),
    ]


def test_the_bar_counts_bytes_and_is_taken_away_in_any_case() -> None:
    console = _Console(bar=True)
    with pytest.raises(RuntimeError, match="broke"), tokenizing(console, 1000) as progress:
        progress(10, 1, 1)
        raise RuntimeError("broke")
    assert [call[0] for call in console.calls] == ["start", "move", "close"]
    assert console.calls[0] == ("start", 1000, 0, "B")


def test_a_corpus_of_no_bytes_has_a_progress_too() -> None:
    console, clock = _Console(bar=False), _Clock()
    progress = TokenizingProgress(console, 0, clock)
    clock.now += 10
    progress(0, 0, 0)
    assert console.lines == ["Tokenized 0% of 0 B | 0 documents | 0 documents/s | 0 tokens/s | ETA unknown"]


# --- The cache directory ----------------------------------------------------------------------------------------


def _build(tmp_path: Path, *paths: str, name: str = "", tokenizer: Any = None) -> TokenCache:
    """Files of 8 lines of 16 bytes become two shards each."""
    files = tuple(file for path in paths for file in resolve_files(path))
    spec = CacheSpec(files, "text", "error", None, EOS, name=name, shard_bytes=64)
    return open_or_build(
        spec, tokenizer or _Tokenizer(), tmp_path / "cache", lambda stream: None, _voice(lambda line: None)
    )


def _three(tmp_path: Path) -> list[str]:
    return [_corpus(tmp_path, f"{name}.jsonl", *(f"{name}{line:02}" for line in range(8))) for name in "abc"]


def _shards(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache" / "shards").iterdir()}


def test_an_empty_place_holds_nothing(tmp_path: Path) -> None:
    assert entries(tmp_path / "none") == []
    assert unfinished(tmp_path / "none") == Unfinished(0, 0)
    assert remove_unfinished(tmp_path / "none") == 0


def test_corpora_are_listed_the_last_used_first(tmp_path: Path) -> None:
    first, second, third = _three(tmp_path)
    caches = [
        _build(tmp_path, first, name="first"),
        _build(tmp_path, first, second),
        _build(tmp_path, third, second, first),
    ]
    for used, cache in zip((200, 300, 100), caches, strict=True):
        os.utime(cache.path, (used, used))
    found = entries(tmp_path / "cache")
    assert [entry.key for entry in found] == [caches[number].path.stem for number in (1, 0, 2)]
    assert [entry.used for entry in found] == [300, 200, 100]
    assert [entry.name for entry in found] == [f"{first}, {second}", "first", f"{third}, {second}"]
    assert [(entry.documents, entry.tokens) for entry in found] == [(16, 64), (8, 32), (24, 96)]
    for entry, cache in zip(found, (caches[1], caches[0], caches[2]), strict=True):
        assert entry.shards == {shard.folder.name for shard in cache.stream.shards}
        assert entry.size == sum(tree_bytes(shard.folder) for shard in cache.stream.shards)
    assert [len(entry.shards) for entry in found] == [4, 2, 6]
    assert unfinished(tmp_path / "cache") == Unfinished(0, 0)


def test_removing_a_corpus_keeps_the_shards_of_others(tmp_path: Path) -> None:
    first, second, third = _three(tmp_path)
    kept, gone = _build(tmp_path, first, second), _build(tmp_path, second, third)
    shared = {shard.folder.name for shard in kept.stream.shards}
    own = {shard.folder.name for shard in gone.stream.shards} - shared
    assert (len(shared), len(own)) == (4, 2)
    size = sum(tree_bytes(tmp_path / "cache" / "shards" / name) for name in own)
    assert gone.stream.read(48, 64).tolist() == _ids("c04", "c05", "c06", "c07")
    assert remove(tmp_path / "cache", gone.path.stem) == size
    assert _shards(tmp_path) == shared
    assert [entry.key for entry in entries(tmp_path / "cache")] == [kept.path.stem]
    assert _build(tmp_path, first, second).reused is True
    # A training that runs goes on with what it has opened.
    assert gone.stream.read(48, 64).tolist() == _ids("c04", "c05", "c06", "c07")
    assert [path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()] == [".json"]
    remove(tmp_path / "cache", kept.path.stem)
    assert not _shards(tmp_path)
    assert not list((tmp_path / "cache" / "corpora").iterdir())


def test_a_corpus_of_which_a_shard_is_gone_can_be_removed(tmp_path: Path) -> None:
    cache = _build(tmp_path, _three(tmp_path)[0])
    shutil.rmtree(cache.stream.shards[0].folder)
    size = tree_bytes(cache.stream.shards[1].folder)
    assert entries(tmp_path / "cache")[0].size == size
    assert remove(tmp_path / "cache", cache.path.stem) == size
    assert not _shards(tmp_path)
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "n", "shards": [{"id": 1}]}'])
def test_a_damaged_manifest_is_listed_as_such_and_can_be_removed(tmp_path: Path, content: str) -> None:
    first, second, _ = _three(tmp_path)
    kept, damaged = _build(tmp_path, first), _build(tmp_path, first, second)
    damaged.path.write_text(content)
    os.utime(damaged.path, (0, 0))
    found = entries(tmp_path / "cache")
    assert [(entry.name, entry.documents, entry.size) for entry in found][1] == ("(damaged)", 0, 0)
    assert unfinished(tmp_path / "cache").shards == 2
    assert remove(tmp_path / "cache", damaged.path.stem) == 0
    assert remove_unfinished(tmp_path / "cache") > 0
    assert _shards(tmp_path) == {shard.folder.name for shard in kept.stream.shards}


def test_what_builds_have_left_is_counted_and_removed(tmp_path: Path) -> None:
    """Two whole shards, half a shard, and the lock of a process that was killed."""
    first, second, _ = _three(tmp_path)
    kept, left = _build(tmp_path, first), _build(tmp_path, second)
    root = tmp_path / "cache"
    left.path.unlink()
    half = root / "building" / left.path.stem / "tmp" / "tokens.bin"
    half.parent.mkdir(parents=True)
    half.write_bytes(bytes(1000))
    left.path.with_suffix(".lock").touch()
    size = sum(tree_bytes(shard.folder) for shard in left.stream.shards) + 1000
    assert unfinished(root) == Unfinished(3, size)
    assert [entry.key for entry in entries(root)] == [kept.path.stem]
    assert remove_unfinished(root) == size
    assert unfinished(root) == Unfinished(0, 0)
    assert _shards(tmp_path) == {shard.folder.name for shard in kept.stream.shards}
    assert [path.suffix for path in (root / "corpora").iterdir()] == [".json"]


def test_nothing_is_removed_while_a_process_builds(tmp_path: Path) -> None:
    first, second, _ = _three(tmp_path)
    kept, left = _build(tmp_path, first), _build(tmp_path, second)
    root = tmp_path / "cache"
    left.path.unlink()
    before = _shards(tmp_path)
    for held, removal in ((kept, lambda: remove(root, kept.path.stem)), (left, lambda: remove_unfinished(root))):
        path = held.path.with_suffix(".lock")
        with FileLock(path):
            with pytest.raises(DataError) as caught:
                removal()
            assert str(caught.value) == f"{path} is held: a process is building this token cache"
            assert caught.value.problems[0].fix == "wait for it, or stop it first"
            assert path.exists()
        path.unlink()
    assert _shards(tmp_path) == before
    assert kept.path.exists()


class _Slow(_Tokenizer):
    """Tells when it has begun, and goes on when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.may_go_on = threading.Event()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.begun.set()
        assert self.may_go_on.wait(30)
        return super().encode(texts)


def test_removing_a_corpus_takes_no_shard_from_a_build_that_shares_it(tmp_path: Path) -> None:
    """The build has found the first file's shards finished and works on the second file."""
    first, second, _ = _three(tmp_path)
    complete = _build(tmp_path, first)
    slow = _Slow()
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(_build(tmp_path, first, second, tokenizer=slow))
        except Exception as error:
            outcome.append(error)

    builder = threading.Thread(target=run)
    builder.start()
    assert slow.begun.wait(30)
    with contextlib.suppress(DataError):
        remove(tmp_path / "cache", complete.path.stem)
    slow.may_go_on.set()
    builder.join(30)
    (built,) = outcome
    assert isinstance(built, TokenCache), built
    assert built.stream.read(0, 64).tolist() == _ids(*(f"{name}{line:02}" for name in "ab" for line in range(8)))
