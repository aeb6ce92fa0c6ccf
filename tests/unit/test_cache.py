"""The token cache: exact stream, shards, reuse, damage, several processes, and failures that leave nothing behind."""

from __future__ import annotations

import contextlib
import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from eulerforge.config.paths import default_cache_dir
from eulerforge.data import build, cache, workers
from eulerforge.data.build import Recipe, Report, Task, Workplace, build_task, plan_tasks
from eulerforge.data.cache import CacheSpec, Voice, open_or_build
from eulerforge.data.manifest import TokenCache, open_manifest
from eulerforge.data.readers import DocumentCounts
from eulerforge.data.shards import ContentDigest, ShardMeta
from eulerforge.data.sources import SourceFile, resolve_files
from eulerforge.data.tokens import TokenStream
from eulerforge.errors import DataError, PreparationError
from eulerforge.models.fast_encoder import FastEncoder

BOS, EOS = 300, 301


class _Bytes:
    """One id per byte, plus `shift`."""

    serialized: str | None = None

    def __init__(self, fingerprint: str = "bytes", shift: int = 0, largest_id: int = EOS) -> None:
        self.fingerprint = fingerprint
        self.largest_id = largest_id
        self.texts: list[str] = []
        self.long: list[str] = []
        self._shift = shift

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.texts += texts
        return [[byte + self._shift for byte in text.encode()] for text in texts]

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        self.long.append(text)
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32) + np.uint32(self._shift)


class _Never(_Bytes):
    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise AssertionError("a cache that exists is not built again")


class _Failing(_Bytes):
    """Fails at its n-th group of texts."""

    def __init__(self, group: int, fail: Callable[[], object]) -> None:
        super().__init__()
        self._left = group
        self._fail = fail

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self._left -= 1
        if not self._left:
            self._fail()
        return super().encode(texts)


class _Fast(FastEncoder):
    """A tokenizer of the tokenizers library, which other processes can make too."""

    def __init__(self, serialized: str) -> None:
        super().__init__(serialized)
        self.serialized: str | None = serialized
        self.fingerprint = "fast"
        self.largest_id = tokenizers.Tokenizer.from_str(serialized).get_vocab_size() - 1


class _Log:
    """What a cache says and reports."""

    def __init__(self, report: Report = lambda size, documents, tokens: None) -> None:
        self.lines: list[str] = []
        self.totals: list[int] = []
        self.reports: list[tuple[int, int, int]] = []
        self._report = report

    @property
    def voice(self) -> Voice:
        return Voice(self.lines.append, self._progress)

    @contextlib.contextmanager
    def _progress(self, total: int) -> Iterator[Report]:
        self.totals.append(total)

        def note(size: int, documents: int, tokens: int) -> None:
            self.reports.append((size, documents, tokens))
            self._report(size, documents, tokens)

        yield note


def _lines(*texts: str, column: str = "text") -> bytes:
    return "".join(json.dumps({column: text}) + "\n" for text in texts).encode()


def _corpus(tmp_path: Path, *texts: str, name: str = "data.jsonl") -> Path:
    path = tmp_path / name
    path.write_bytes(_lines(*texts))
    return path


def _spec(*paths: Path, **changes: Any) -> CacheSpec:
    files = tuple(file for path in paths for file in resolve_files(str(path)))
    return replace(CacheSpec(files, "text", "error", bos_id=None, eos_id=EOS), **changes)


def _open(
    tmp_path: Path,
    spec: CacheSpec,
    encoder: Any = None,
    check: Callable[[TokenStream], None] = lambda stream: None,
    log: _Log | None = None,
    folder: str = "cache",
) -> TokenCache:
    return open_or_build(spec, encoder or _Bytes(), tmp_path / folder, check, (log or _Log()).voice)


def _tokens(opened: TokenCache) -> list[int]:
    return opened.stream.read(0, opened.stream.tokens).tolist()


def _starts(opened: TokenCache) -> list[int]:
    return [opened.stream.document_start(document) for document in range(opened.stream.documents + 1)]


def _documents(opened: TokenCache) -> list[list[int]]:
    starts = _starts(opened)
    return [opened.stream.read(start, stop).tolist() for start, stop in pairwise(starts)]


def _locations(opened: TokenCache) -> list[tuple[int, int]]:
    return [opened.stream.location(document) for document in range(opened.stream.documents)]


def _tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of all files below a folder: the same only for a file that nobody wrote again."""
    found = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# --- The stream -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bos", "eos", "stream", "starts"),
    [
        (None, EOS, [*b"ab", EOS, *b"c", EOS], [0, 3, 5]),
        (BOS, EOS, [BOS, *b"ab", EOS, BOS, *b"c", EOS], [0, 4, 7]),
        (BOS, None, [BOS, *b"ab", BOS, *b"c"], [0, 3, 5]),
        (None, None, [*b"abc"], [0, 2, 3]),
        (0, 0, [0, *b"ab", 0, 0, *b"c", 0], [0, 4, 7]),
    ],
)
def test_the_stream_is_the_documents_with_the_tokens_of_the_policy(
    tmp_path: Path, bos: int | None, eos: int | None, stream: list[int], starts: list[int]
) -> None:
    """Id 0 is an id, not "none". The empty text between the two leaves no lone EOS."""
    opened = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "", "c"), bos_id=bos, eos_id=eos))
    assert _tokens(opened) == stream
    assert _starts(opened) == starts
    assert _locations(opened) == [(0, 1), (0, 3)]
    assert (opened.stream.documents, opened.stream.tokens) == (2, len(stream))
    assert opened.counts == DocumentCounts(documents=2, empty=1)
    assert opened.reused is False


@pytest.mark.parametrize(
    ("largest", "dtype", "shift"), [(65535, "<u2", 65435), (65536, "<u4", 65436), (200_000, "<u4", 199_900)]
)
def test_ids_are_stored_as_narrow_as_they_fit(tmp_path: Path, largest: int, dtype: str, shift: int) -> None:
    encoder = _Bytes(shift=shift, largest_id=largest)
    opened = _open(tmp_path, _spec(_corpus(tmp_path, "\x64\x00"), eos_id=largest), encoder)
    (shard,) = opened.stream.shards
    assert shard.dtype == dtype
    assert _tokens(opened) == [100 + shift, shift, largest]
    assert shard.tokens_file.stat().st_size == 3 * np.dtype(dtype).itemsize


def test_files_follow_each_other_and_groups_leave_no_seam(tmp_path: Path) -> None:
    """2,500 documents are more than two groups of 1,024."""
    first = [f"a{index}" for index in range(1500)]
    second = [f"b{index}" for index in range(1000)]
    files = _corpus(tmp_path, *first, name="z.jsonl"), _corpus(tmp_path, *second, name="a.jsonl")
    encoder = _Bytes()
    opened = _open(tmp_path, _spec(*files), encoder)
    assert _documents(opened) == [[*text.encode(), EOS] for text in first + second]
    assert encoder.texts == first + second
    assert _locations(opened) == [
        *((0, line) for line in range(1, 1501)),
        *((1, line) for line in range(1, 1001)),
    ]


def test_a_very_long_text_is_encoded_by_itself_and_keeps_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_GROUP_CHARACTERS", 20)
    texts = ["a", "b" * 20, "c" * 21, "d", "e" * 1000, "f" * 30, "g"]
    encoder = _Bytes()
    opened = _open(tmp_path, _spec(_corpus(tmp_path, *texts), bos_id=BOS), encoder)
    assert _documents(opened) == [[BOS, *text.encode(), EOS] for text in texts]
    assert _locations(opened) == [(0, line) for line in range(1, 8)]
    assert encoder.long == ["c" * 21, "e" * 1000, "f" * 30]
    assert encoder.texts == ["a", "b" * 20, "d", "g"]


# --- Shards -----------------------------------------------------------------------------------------------------

_SOURCE = random.Random(5)
TEXTS = [
    _SOURCE.choice(["", "a", "é", "two words", "\u2028", "\U0001f600", "x" * 40]) * _SOURCE.randrange(1, 4)
    for _ in range(60)
]
GOOD = [(line, text) for line, text in enumerate(TEXTS, 1) if text]


def _write_forms(tmp_path: Path) -> dict[str, tuple[list[Path], list[tuple[int, int]]]]:
    """The same 60 texts as files of all kinds, and the location of each document."""
    content = _lines(*TEXTS)
    lines = [(0, line) for line, _ in GOOD]
    middle = len(_lines(*TEXTS[:25])) + 7
    for name, data in {
        "plain.jsonl": content,
        "no_end.jsonl": content.removesuffix(b"\n"),
        "crlf.jsonl": content.replace(b"\n", b"\r\n"),
        "blank.jsonl": content.replace(b"\n", b"\n\n"),
        "packed.jsonl.gz": gzip.compress(content[:middle]) + gzip.compress(content[middle:]),
        "packed.jsonl.zst": zstandard.compress(content[:middle]) + zstandard.compress(content[middle:]),
        "1.jsonl": _lines(*TEXTS[:11]),
        "2.jsonl": b"",
        "3.jsonl": _lines(*TEXTS[11:12]),
        "4.jsonl.gz": gzip.compress(_lines(*TEXTS[12:55])),
        "5.jsonl": _lines(*TEXTS[55:]),
    }.items():
        (tmp_path / name).write_bytes(data)
    for size in (1, 7, 100):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / f"{size}.parquet", row_group_size=size)
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS[12:55]}), tmp_path / "4.parquet", row_group_size=5)
    parts = [slice(0, 11), slice(11, 11), slice(11, 12), slice(12, 55), slice(55, 60)]
    split = [(number, line) for number, part in enumerate(parts) for line, text in enumerate(TEXTS[part], 1) if text]
    files = [tmp_path / f"{number}.jsonl" for number in (1, 2, 3)]
    (tmp_path / "texts").mkdir()
    for line, text in enumerate(TEXTS):
        (tmp_path / "texts" / f"{line:02}.txt").write_bytes(text.encode())
    forms = {name: ([tmp_path / name], lines) for name in ("plain.jsonl", "no_end.jsonl", "crlf.jsonl")}
    forms |= {name: ([tmp_path / name], lines) for name in ("packed.jsonl.gz", "packed.jsonl.zst")}
    forms |= {f"{size}.parquet": ([tmp_path / f"{size}.parquet"], lines) for size in (1, 7, 100)}
    forms["blank.jsonl"] = ([tmp_path / "blank.jsonl"], [(0, 2 * line - 1) for line, _ in GOOD])
    forms["split, gzip"] = ([*files, tmp_path / "4.jsonl.gz", tmp_path / "5.jsonl"], split)
    forms["split, parquet"] = ([*files, tmp_path / "4.parquet", tmp_path / "5.jsonl"], split)
    forms["texts"] = (sorted((tmp_path / "texts").iterdir()), [(line - 1, 1) for line, _ in GOOD])
    return forms


FORMS = [
    "plain.jsonl",
    "no_end.jsonl",
    "crlf.jsonl",
    "blank.jsonl",
    "packed.jsonl.gz",
    "packed.jsonl.zst",
    "1.parquet",
    "7.parquet",
    "100.parquet",
    "split, gzip",
    "split, parquet",
    "texts",
]


def _files(paths: Sequence[Path]) -> tuple[SourceFile, ...]:
    """As a directory would give them, empty ones included."""
    first = paths[0].parent
    every = {file.path: file for file in resolve_files(f"{first}/*")}
    return tuple(every[path] for path in paths)


@pytest.mark.parametrize("form", FORMS)
def test_the_stream_does_not_depend_on_how_it_is_stored_or_cut(tmp_path: Path, form: str) -> None:
    expected = ContentDigest()
    for _, text in GOOD:
        expected.add(np.array([*text.encode(), EOS], dtype=np.uint16))
    paths, locations = _write_forms(tmp_path)[form]
    shards = set()
    for size in (1, 2, 3, 5, 10, 16, 30, 33, 50, 64, 99, 128, 200, 333, 500, 777, 1000, 2**20):
        spec = replace(_spec(tmp_path / "plain.jsonl"), files=_files(paths), shard_bytes=size)
        log = _Log()
        opened = _open(tmp_path, spec, folder=f"cache{size}", log=log)
        assert _documents(opened) == [[*text.encode(), EOS] for _, text in GOOD], size
        assert _locations(opened) == locations, size
        assert opened.digest == expected.hex(), size
        assert opened.counts == DocumentCounts(documents=len(GOOD), empty=60 - len(GOOD))
        assert [sum(values) for values in zip(*log.reports, strict=True)] == [
            sum(path.stat().st_size for path in paths),
            len(GOOD),
            opened.stream.tokens,
        ]
        assert log.totals == [sum(path.stat().st_size for path in paths)]
        # A second opening reads the same from the manifest.
        again = _open(tmp_path, spec, _Never(), folder=f"cache{size}")
        assert (_tokens(again), _locations(again), again.reused) == (_tokens(opened), locations, True)
        shards.add(len(opened.stream.shards))
    assert min(shards) == 1
    assert max(shards) >= 10


@pytest.mark.parametrize("form", ["plain.jsonl", "packed.jsonl.gz", "7.parquet", "split, gzip", "texts"])
def test_progress_never_goes_back(tmp_path: Path, form: str) -> None:
    paths, _ = _write_forms(tmp_path)[form]
    for size in (20, 200, 2000):
        log = _Log()
        spec = replace(_spec(tmp_path / "plain.jsonl"), files=_files(paths), shard_bytes=size)
        _open(tmp_path, spec, folder=f"cache{size}", log=log)
        assert min(report[0] for report in log.reports) >= 0, (size, log.reports)


def test_every_shard_is_bounded(tmp_path: Path) -> None:
    """A shard is closed after `shard_bytes` of text, so it has at most that and one document more."""
    texts = ["x" * 50] * 40
    size = len(_lines(texts[0]))
    for name, data in {"a.jsonl.gz": gzip.compress(_lines(*texts)), "b.jsonl": _lines(*texts)}.items():
        (tmp_path / name).write_bytes(data)
        opened = _open(tmp_path, _spec(tmp_path / name, shard_bytes=150), folder=f"cache-{name}")
        limit = -(-150 // size)
        assert [shard.documents for shard in opened.stream.shards if shard.documents > limit] == [], name
        assert sum(shard.documents for shard in opened.stream.shards) == 40


@pytest.mark.parametrize(
    ("size", "shard"),
    [(8, 8), (65, 1), (640, 10), (641, 20), (1280, 20), (1281, 40), (20_480, 320), (20_481, 320), (10**6, 320)],
)
def test_large_files_get_larger_shards_up_to_a_limit(size: int, shard: int) -> None:
    """A power of two times the smallest (10 bytes, where it is not larger than the file)."""
    file = SourceFile(Path("/a.jsonl"), "jsonl", "none", size, 0)
    smallest = 10 if size > 100 else shard
    tasks = list(plan_tasks([file], ["a"], smallest))
    assert {task.shard_bytes for task in tasks} == {shard if size != 65 else 2}
    if size <= smallest:
        assert [(task.start, task.end) for task in tasks] == [(0, None)]
        return
    step = tasks[0].shard_bytes
    assert [(task.start, task.end) for task in tasks] == [(at, at + step) for at in range(0, size, step)]
    assert sum(task.size for task in tasks) == size


def test_small_files_are_put_together_in_order() -> None:
    def file(name: str, form: Any, size: int, compression: Any = "none") -> SourceFile:
        return SourceFile(Path(name), form, compression, size, 0)

    files = [
        file("a", "jsonl", 40),
        file("b", "text", 50),
        file("c", "jsonl", 11),  # 101 with those before
        file("d", "jsonl", 20, "gzip"),  # taken for 80
        file("e", "parquet", 26),  # taken for 104: more than a shard, alone
        file("f", "jsonl", 0),
        file("g", "npy", 2),  # token files are alone
        file("h", "text", 500),
        file("i", "jsonl", 250),  # in ranges
        file("j", "jsonl", 100),
        file("k", "jsonl", 0),
        file("l", "jsonl", 1),
    ]
    tasks = list(plan_tasks(files, [file.path.name for file in files], 100))
    assert [("".join(task.identities), task.first_file, task.start, task.end) for task in tasks] == [
        ("ab", 0, 0, None),
        ("cd", 2, 0, None),
        ("e", 4, 0, None),
        ("f", 5, 0, None),
        ("g", 6, 0, None),
        ("h", 7, 0, None),
        ("i", 8, 0, 100),
        ("i", 8, 100, 200),
        ("i", 8, 200, 300),
        ("jk", 9, 0, None),
        ("l", 11, 0, None),
    ]
    assert [task.size for task in tasks] == [90, 31, 26, 0, 2, 500, 100, 100, 50, 100, 1]
    assert all("".join(file.path.name for file in task.files) == "".join(task.identities) for task in tasks)


def test_corpora_share_the_shards_of_files_that_they_have_in_common(tmp_path: Path) -> None:
    first, second = (_corpus(tmp_path, *(name * 30 for _ in range(5)), name=f"{name}.jsonl") for name in "ab")
    _open(tmp_path, _spec(first, shard_bytes=100))
    before = _states(tmp_path / "cache" / "shards")
    encoder = _Bytes()
    opened = _open(tmp_path, _spec(first, second, shard_bytes=100), encoder)
    assert encoder.texts == ["b" * 30] * 5
    assert _documents(opened) == [[*(name * 30).encode(), EOS] for name in "ab" for _ in range(5)]
    after = _states(tmp_path / "cache" / "shards")
    assert {name: after[name] for name in before} == before
    assert len(after) == 2 * len(before)


# --- Reuse ------------------------------------------------------------------------------------------------------


def test_a_second_opening_builds_nothing_and_keeps_the_counts(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "ab", "", "x\ud800", "c")
    with path.open("a") as handle:
        handle.write("oops\n[1]\n[2]\n")
    spec = _spec(path, on_bad_line="skip")
    built = _open(tmp_path, spec)
    log = _Log()
    reused = _open(tmp_path, spec, _Never(), log=log)
    assert (built.reused, reused.reused) == (False, True)
    assert (reused.path, reused.digest) == (built.path, built.digest)
    assert _documents(reused) == _documents(built) == [[*b"ab", EOS], [*"x\ufffd".encode(), EOS], [*b"c", EOS]]
    assert (log.lines, log.totals) == ([], [])
    skipped = {"malformed JSON": 1, "not an object": 2}
    for opened in (built, reused):
        assert opened.counts == DocumentCounts(documents=3, empty=1, repaired=1, skipped=skipped)


def test_what_a_build_says(tmp_path: Path) -> None:
    files = _corpus(tmp_path, "ab", "c", name="a.jsonl"), _corpus(tmp_path, "d" * 1000, name="b.jsonl")
    log = _Log()
    _open(tmp_path, _spec(*files), log=log)
    assert log.lines[0] == f"Tokenizing 2 files into {tmp_path / 'cache'}"
    assert log.lines[1].startswith("Tokenized 3 documents, 1,006 tokens in ")
    assert len(log.lines) == 2


def _touch(path: Path, spec: CacheSpec) -> CacheSpec:
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    return replace(spec, files=resolve_files(str(path)))


def _grow(path: Path, spec: CacheSpec) -> CacheSpec:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return replace(spec, files=resolve_files(str(path)))


def _move(path: Path, spec: CacheSpec) -> CacheSpec:
    return replace(spec, files=resolve_files(str(path.rename(path.with_name("moved.jsonl")))))


def _same_size(path: Path, spec: CacheSpec) -> CacheSpec:
    """Other content, and nothing else that `stat` could tell."""
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"a"', b'"z"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return replace(spec, files=resolve_files(str(path)))


Change = Callable[[Path, CacheSpec], CacheSpec]

CHANGES: dict[str, tuple[Change, bool, bool]] = {
    # whether it makes another cache, by `verify`: mtime, content
    "nothing": (lambda path, spec: spec, False, False),
    "file modified": (_touch, True, False),
    "file size": (_grow, True, True),
    "file moved": (_move, True, False),
    "content of the same size and time": (_same_size, False, True),
    "column": (lambda path, spec: replace(spec, text_column="other"), True, True),
    "eos": (lambda path, spec: replace(spec, eos_id=None), True, True),
    "bos": (lambda path, spec: replace(spec, bos_id=BOS), True, True),
    "files": (lambda path, spec: replace(spec, files=spec.files * 2), True, True),
    "bad line policy": (lambda path, spec: replace(spec, on_bad_line="skip"), False, False),
    "processes": (lambda path, spec: replace(spec, processes=1), False, False),
    "names for messages": (lambda path, spec: replace(spec, key="k", name="n"), False, False),
}


@pytest.mark.parametrize("verify", ["mtime", "content"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_tokens_makes_another_cache(tmp_path: Path, change: str, verify: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a", "other": "b"}\n')
    spec = _spec(path, verify=verify)
    first = _open(tmp_path, spec)
    make, by_time, by_content = CHANGES[change]
    another = by_content if verify == "content" else by_time
    second = _open(tmp_path, make(path, spec))
    assert second.reused is not another
    assert (second.path != first.path) is another
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1 + another


def test_what_a_file_is_known_by_is_part_of_the_key(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "a")
    assert _open(tmp_path, _spec(path)).path != _open(tmp_path, _spec(path, verify="content")).path


def test_another_tokenizer_makes_another_cache(tmp_path: Path) -> None:
    spec = _spec(_corpus(tmp_path, "a"))
    first = _open(tmp_path, spec)
    second = _open(tmp_path, spec, _Bytes("shifted", shift=1))
    assert (_tokens(first), _tokens(second)) == ([97, EOS], [98, EOS])
    assert _tokens(_open(tmp_path, spec, _Never())) == [97, EOS]


def test_the_order_of_files_makes_another_cache(tmp_path: Path) -> None:
    files = _corpus(tmp_path, "a", name="a.jsonl"), _corpus(tmp_path, "b", name="b.jsonl")
    first, second = _open(tmp_path, _spec(*files)), _open(tmp_path, _spec(*reversed(files)))
    assert (_tokens(first), _tokens(second)) == ([97, EOS, 98, EOS], [98, EOS, 97, EOS])


def test_using_a_cache_is_noted(tmp_path: Path) -> None:
    spec = _spec(_corpus(tmp_path, "a"))
    path = _open(tmp_path, spec).path
    os.utime(path, (0, 0))
    _open(tmp_path, spec, _Never())
    assert path.stat().st_mtime > 0


# --- Bad lines --------------------------------------------------------------------------------------------------

BAD = b"oops\n"
PACKS: dict[str, Callable[[bytes], bytes]] = {"a.jsonl": bytes, "a.jsonl.gz": gzip.compress}


def _with_bad_lines(tmp_path: Path, name: str, *numbers: int) -> Path:
    """40 lines of 16 bytes, some of them bad (and shorter)."""
    lines = [BAD if line in numbers else _lines(f"{line:02}x") for line in range(1, 41)]
    assert {len(line) for line in lines} == {16, 5}
    path = tmp_path / name
    path.write_bytes(PACKS[name](b"".join(lines)))
    return path


@pytest.mark.parametrize("name", PACKS)
@pytest.mark.parametrize("first", [1, 9, 12, 17, 39])
def test_a_cache_that_was_built_with_skip_names_the_first_bad_line_under_error(
    tmp_path: Path, name: str, first: int
) -> None:
    """64 bytes a shard, so the line may be in any of ten ranges. Its number is that in the file."""
    path = _with_bad_lines(tmp_path, name, first, 40)
    spec = _spec(path, on_bad_line="skip", shard_bytes=64)
    built = _open(tmp_path, spec)
    assert len(built.stream.shards) >= 9
    assert built.counts == DocumentCounts(documents=38, skipped={"malformed JSON": 2})
    for verify in ("reused", "shards only"):
        if verify == "shards only":
            built.path.unlink()
        with pytest.raises(DataError) as caught:
            _open(tmp_path, replace(spec, on_bad_line="error"), _Never())
        assert str(caught.value) == f"{path}:{first}: malformed JSON: Expecting value at column 1"
        assert caught.value.problems[0].fix == "correct the line, or set data.on_bad_line: skip"
    assert _documents(_open(tmp_path, spec, _Never())) == _documents(built)


@pytest.mark.parametrize("name", PACKS)
def test_a_build_that_stopped_at_a_bad_line_goes_on_under_skip(tmp_path: Path, name: str) -> None:
    path = _with_bad_lines(tmp_path, name, 23)
    spec = _spec(path, shard_bytes=64)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, spec)
    assert str(caught.value) == f"{path}:23: malformed JSON: Expecting value at column 1"
    finished = _states(tmp_path / "cache" / "shards")
    assert len(finished) == 5 * 4
    assert not list((tmp_path / "cache" / "building").rglob("*"))
    encoder = _Bytes()
    opened = _open(tmp_path, replace(spec, on_bad_line="skip"), encoder)
    good = [f"{line:02}x" for line in range(1, 41) if line != 23]
    assert _documents(opened) == [[*text.encode(), EOS] for text in good]
    assert _locations(opened) == [(0, line) for line in range(1, 41) if line != 23]
    assert encoder.texts == good[20:]
    after = _states(tmp_path / "cache" / "shards")
    assert {name: after[name] for name in finished} == finished


def test_the_first_bad_line_of_several_files_is_that_of_the_first_file(tmp_path: Path) -> None:
    good, bad = _corpus(tmp_path, "a", "b", name="1.jsonl"), tmp_path / "2.jsonl"
    bad.write_bytes(b"\n" + _lines("c") + b"[1]\n" + BAD)
    spec = _spec(good, bad, on_bad_line="skip")
    _open(tmp_path, spec)
    with pytest.raises(DataError) as caught:
        _open(tmp_path, replace(spec, on_bad_line="error"), _Never())
    assert str(caught.value) == f"{bad}:3: the line holds a list, not a JSON object"


# --- Damage -----------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    """Another content of the same size and time."""
    before = path.stat()
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


SHARD_FILES = ["tokens.bin", "ends.bin", "lines.bin", "shard.json"]
DAMAGES: dict[str, Callable[[Path], object]] = {
    **{f"{name} cut": lambda folder, name=name: os.truncate(folder / name, 3) for name in SHARD_FILES[:3]},
    **{f"{name} empty": lambda folder, name=name: os.truncate(folder / name, 0) for name in SHARD_FILES},
    **{f"{name} gone": lambda folder, name=name: (folder / name).unlink() for name in SHARD_FILES},
    "tokens.bin too long": lambda folder: (folder / "tokens.bin").write_bytes(bytes(1000)),
    "shard gone": shutil.rmtree,
}
ALTERED: dict[str, Callable[[Path], object]] = {
    **{f"{name} altered": lambda folder, name=name: _flip(folder / name) for name in SHARD_FILES[:3]},
    "shard.json zeroed": lambda folder: _zero(folder / "shard.json"),
    "shard.json without keys": lambda folder: (folder / "shard.json").write_text("{}"),
    "shard.json of another shape": lambda folder: (folder / "shard.json").write_text("[]"),
}


def _damage_one(tmp_path: Path, damage: Callable[[Path], object], verify: str) -> tuple[_Log, _Bytes]:
    """Damage the third of five shards and open again: it alone is made again. What was said, what was encoded."""
    texts = [f"text {number}" for number in range(10)]
    size = len(_lines(*texts[:2]))
    path = _corpus(tmp_path, *texts)
    spec = _spec(path, verify=verify, shard_bytes=size)
    built = _open(tmp_path, spec)
    assert [shard.documents for shard in built.stream.shards] == [2] * 5
    folder = built.stream.shards[2].folder
    before = _states(tmp_path / "cache" / "shards")
    content = _tree(tmp_path / "cache" / "shards")
    damage(folder)
    log, encoder = _Log(), _Bytes()
    opened = _open(tmp_path, spec, encoder, log=log)
    assert opened.reused is False
    assert _documents(opened) == [[*text.encode(), EOS] for text in texts]
    assert _locations(opened) == [(0, line) for line in range(1, 11)]
    assert _tree(tmp_path / "cache" / "shards") == content
    after = _states(tmp_path / "cache" / "shards")
    assert {name.split("/")[0] for name in before if after[name] != before[name]} == {folder.name}
    assert encoder.texts == texts[4:6]
    assert _open(tmp_path, spec, _Never()).reused is True
    assert log.lines[0].startswith(f"Token cache {built.path} is damaged (")
    assert log.lines[0].endswith("): building again what is missing.")
    assert log.lines[1] == f"Tokenizing 1 file into {tmp_path / 'cache'}"
    assert log.lines[2].startswith("Tokenized 10 documents, 70 tokens in ")
    assert len(log.lines) == 3
    return log, encoder


@pytest.mark.parametrize("verify", ["mtime", "content"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_announced_and_it_alone_is_made_again(tmp_path: Path, damage: str, verify: str) -> None:
    """After a power cut, files that were not synced are often there with no content."""
    _damage_one(tmp_path, DAMAGES[damage], verify)


@pytest.mark.parametrize("damage", ALTERED)
def test_with_content_verified_a_shard_of_the_same_size_must_be_what_was_written(tmp_path: Path, damage: str) -> None:
    _damage_one(tmp_path, ALTERED[damage], "content")


def test_the_announcement_names_the_file_and_both_sizes(tmp_path: Path) -> None:
    spec = _spec(_corpus(tmp_path, "ab", "c"))
    built = _open(tmp_path, spec)
    tokens = built.stream.shards[0].tokens_file
    os.truncate(tokens, 3)
    log = _Log()
    _open(tmp_path, spec, log=log)
    assert log.lines[0] == (
        f"Token cache {built.path} is damaged ({tokens} has 3 bytes, expected 10): building again what is missing."
    )


def test_with_content_verified_all_altered_shards_are_made_again(tmp_path: Path) -> None:
    """Shards of one chain, of which one is gone and two have been altered."""
    texts = [f"text {number}" for number in range(10)]
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(_lines(*texts)))
    spec = _spec(path, verify="content", shard_bytes=len(_lines(texts[0])))
    built = _open(tmp_path, spec)
    assert len(built.stream.shards) == 10
    content = _tree(tmp_path / "cache" / "shards")
    folders = [shard.folder for shard in built.stream.shards]
    _flip(folders[1] / "tokens.bin")
    shutil.rmtree(folders[3])
    _flip(folders[5] / "tokens.bin")
    encoder = _Bytes()
    opened = _open(tmp_path, spec, encoder)
    assert _documents(opened) == [[*text.encode(), EOS] for text in texts]
    assert _tree(tmp_path / "cache" / "shards") == content
    assert encoder.texts == [texts[1], texts[3], texts[5]]


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "zeroed": _zero,
    "without keys": lambda path: path.write_text("{}"),
    "of another shape": lambda path: path.write_text("[]"),
    "without counts": lambda path: path.write_text(json.dumps({**json.loads(path.read_bytes()), "counts": None})),
    "without a digest": lambda path: path.write_text(
        json.dumps({key: value for key, value in json.loads(path.read_bytes()).items() if key != "digest"})
    ),
    "with strange shards": lambda path: path.write_text(
        json.dumps({**json.loads(path.read_bytes()), "shards": [1, None]})
    ),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_damaged_manifest_is_written_again_from_the_shards(tmp_path: Path, damage: str) -> None:
    path = _corpus(tmp_path, "ab", "", "c")
    spec = _spec(path, shard_bytes=20)
    built = _open(tmp_path, spec)
    content, states = _tree(tmp_path / "cache"), _states(tmp_path / "cache" / "shards")
    MANIFESTS[damage](built.path)
    assert open_manifest(built.path, [path]) is None
    log = _Log()
    opened = _open(tmp_path, spec, _Never(), log=log)
    assert opened.reused is False
    assert _tokens(opened) == [*b"ab", EOS, *b"c", EOS]
    assert opened.counts == DocumentCounts(documents=2, empty=1)
    assert _tree(tmp_path / "cache") == content
    assert _states(tmp_path / "cache" / "shards") == states
    said = [] if damage == "gone" else [True]
    assert [line.startswith(f"Token cache {built.path} is damaged (") for line in log.lines[:-2]] == said


def test_a_manifest_can_be_opened_without_a_spec(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "ab", "c")
    built = _open(tmp_path, _spec(path))
    opened = open_manifest(built.path, [path])
    assert opened is not None
    assert (opened.digest, opened.reused, _tokens(opened)) == (built.digest, True, [*b"ab", EOS, *b"c", EOS])


# --- Failures ---------------------------------------------------------------------------------------------------


def _refuse(stream: TokenStream) -> None:
    raise DataError(f"{stream.tokens} tokens", "more")


def _break() -> None:
    raise RuntimeError("tokenizer broke")


@pytest.mark.parametrize("kept", [False, True], ids=["new cache folder", "existing cache folder"])
@pytest.mark.parametrize("failure", ["bad line", "no document", "check", "encoder", "damaged"])
def test_a_failing_build_leaves_nothing_behind(tmp_path: Path, failure: str, kept: bool) -> None:
    path = _corpus(tmp_path, "ab", "")
    if failure == "bad line":
        path.write_text(path.read_text() + "oops\n")
    if failure == "no document":
        path.write_text('{"text": ""}\n{"text": ""}\n[1]\n')
    if failure == "damaged":
        path.write_bytes(gzip.compress(path.read_bytes())[:-1])
    if kept:
        (tmp_path / "a" / "b").mkdir(parents=True)
    message = {
        "bad line": r"data\.jsonl:3: malformed JSON",
        "no document": r"^data\.path: no usable document in .*data\.jsonl \(2 empty texts; 1 not an object\)$",
        "check": "^3 tokens$",
        "encoder": "tokenizer broke",
        "damaged": "is a damaged or cut-off gzip file",
    }[failure]
    spec = _spec(path, on_bad_line="skip" if failure == "no document" else "error")
    with pytest.raises((DataError, RuntimeError), match=message):
        _open(
            tmp_path,
            spec,
            _Failing(1, _break) if failure == "encoder" else None,
            check=_refuse if failure == "check" else lambda stream: None,
            folder="a/b",
        )
    assert _names(tmp_path) == (["a", "a/b", "data.jsonl"] if kept else ["data.jsonl"])


@pytest.mark.parametrize(
    ("content", "details"),
    [
        (b"\n\n", ""),
        (b'{"text": ""}\n', " (1 empty texts)"),
        (b"[1]\n5\nx\n", " (2 not an object, 1 malformed JSON)"),
    ],
)
def test_a_corpus_without_a_document_is_refused_with_what_there_was(
    tmp_path: Path, content: bytes, details: str
) -> None:
    paths = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for path in paths:
        path.write_bytes(content if path.name == "0.jsonl" else b"\n")
    with pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(*paths, on_bad_line="skip", key="data.validation.path", text_column="text"))
    named = ", ".join(str(path) for path in paths[:3])
    assert str(caught.value) == f"data.validation.path: no usable document in {named}{details}"
    assert caught.value.problems[0].fix == "give lines with non-empty text under 'text' (data.text_column)"


def test_a_corpus_that_is_too_small_takes_its_shards_with_it_and_no_others(tmp_path: Path) -> None:
    first, second = (_corpus(tmp_path, name * 100, name=f"{name}.jsonl") for name in "ab")
    _open(tmp_path, _spec(first, shard_bytes=100))
    before = _names(tmp_path / "cache")
    with pytest.raises(DataError, match=r"^202 tokens$"):
        _open(tmp_path, _spec(first, second, shard_bytes=100), check=_refuse)
    assert _names(tmp_path / "cache") == before


def test_finished_shards_are_kept_when_a_build_fails(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(10)]
    spec = _spec(_corpus(tmp_path, *texts), shard_bytes=len(_lines(texts[0])))
    with pytest.raises(RuntimeError, match="tokenizer broke"):
        _open(tmp_path, spec, _Failing(7, _break))
    shards = _states(tmp_path / "cache" / "shards")
    assert len(shards) == 6 * 4
    assert not list((tmp_path / "cache").glob("corpora/*"))
    assert not (tmp_path / "cache" / "building").exists()
    encoder = _Bytes()
    opened = _open(tmp_path, spec, encoder)
    assert encoder.texts == texts[6:]
    assert _documents(opened) == [[*text.encode(), EOS] for text in texts]
    after = _states(tmp_path / "cache" / "shards")
    assert {name: after[name] for name in shards} == shards


def test_a_reused_cache_is_checked_too(tmp_path: Path) -> None:
    """Another data.max_length may make the same tokens too few."""
    spec = _spec(_corpus(tmp_path, "ab"))
    before = _tree(_open(tmp_path, spec).path.parents[1])
    with pytest.raises(DataError, match=r"^3 tokens$"):
        _open(tmp_path, spec, _Never(), check=_refuse)
    assert _tree(tmp_path / "cache") == before


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = _corpus(tmp_path, "ab")
    with pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(path), folder="data.jsonl/cache")
    assert str(caught.value) == (
        f"data.cache_dir: the token cache in {path}/cache cannot be written: Not a directory"
    )
    assert caught.value.problems[0].fix == "free some space, or set data.cache_dir to a directory that you can write"


@contextlib.contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """What a full disk does, for files of more than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("texts", "limit", "finished"),
    [(1, 100, 0), (400, 3000, 1), (5000, 3000, 1)],
    ids=["at the end", "while closing", "half-way"],
)
def test_a_full_disk_is_named_and_no_half_shard_stays(tmp_path: Path, texts: int, limit: int, finished: int) -> None:
    """`texts` documents of the second shard do not fit."""
    files = _corpus(tmp_path, "a", name="a.jsonl"), _corpus(tmp_path, *["x"] * texts, name="b.jsonl")
    with _largest_file(limit), pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(*files, shard_bytes=files[1].stat().st_size))
    assert str(caught.value) == (
        f"data.cache_dir: the token cache in {tmp_path / 'cache'} cannot be written: File too large"
    )
    shards = list((tmp_path / "cache").glob("shards/*"))
    assert len(shards) == finished
    for folder in shards:
        ShardMeta.read(folder).verify(folder)
    assert not (tmp_path / "cache" / "building").exists()
    assert not list((tmp_path / "cache").glob("corpora/*"))


@contextlib.contextmanager
def _without_rights() -> Iterator[Path]:
    """A folder in which an ordinary user works, also where the tests are run by root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        user = os.geteuid()
        try:
            yield folder
        finally:
            os.seteuid(user)
            for path in [folder, *folder.rglob("*")]:
                path.chmod(0o755)


def _give_up_rights(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_a_complete_cache_that_may_only_be_read_opens(tmp_path: Path) -> None:
    with _without_rights() as folder:
        spec = _spec(_corpus(folder, "ab", "c"))
        built = _open(folder, spec)
        before = _names(folder)
        _give_up_rights(folder)
        with pytest.raises(PermissionError):
            (folder / "cache" / "x").touch()
        opened = _open(folder, spec, _Never())
        assert (opened.reused, opened.path, _tokens(opened)) == (True, built.path, [*b"ab", EOS, *b"c", EOS])
        assert _locations(opened) == [(0, 1), (0, 2)]
        assert _names(folder) == before


@pytest.mark.parametrize("state", ["empty", "damaged", "another corpus"])
def test_a_cache_that_may_only_be_read_and_is_not_complete_is_named(tmp_path: Path, state: str) -> None:
    with _without_rights() as folder:
        spec = _spec(_corpus(folder, "ab", "c"))
        (folder / "cache").mkdir()
        if state != "empty":
            built = _open(folder, spec)
            if state == "damaged":
                os.truncate(built.stream.shards[0].tokens_file, 0)
        if state == "another corpus":
            spec = replace(spec, bos_id=BOS)
        before = _names(folder)
        _give_up_rights(folder)
        with pytest.raises(DataError) as caught:
            _open(folder, spec)
        assert str(caught.value) == (
            f"data.cache_dir: the token cache in {folder / 'cache'} cannot be written: Permission denied"
        )
        assert _names(folder) == before


def test_the_default_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "eulerforge" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache_dir() == Path("/home/someone/.cache/eulerforge/tokens")


# --- Killed and waiting processes -------------------------------------------------------------------------------


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("group", [1, 4, 10])
def test_a_killed_build_goes_on_where_it_was(tmp_path: Path, group: int) -> None:
    """What it leaves (a lock that nobody holds, half a shard) is in nobody's way."""
    texts = [f"text {number}" for number in range(10)]
    spec = _spec(_corpus(tmp_path, *texts), shard_bytes=len(_lines(texts[0])))
    arguments = (tmp_path, spec, _Failing(group, _kill_this_process))
    process = multiprocessing.get_context("fork").Process(target=_open, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()] == [".lock"]
    finished = _states(tmp_path / "cache" / "shards")
    assert len(finished) == (group - 1) * 4
    assert len(list((tmp_path / "cache" / "building").glob("*/*/tokens.bin"))) == 1
    encoder = _Bytes()
    opened = _open(tmp_path, spec, encoder)
    assert encoder.texts == texts[group - 1 :]
    assert _documents(opened) == [[*text.encode(), EOS] for text in texts]
    after = _states(tmp_path / "cache" / "shards")
    assert {name: after[name] for name in finished} == finished
    assert [path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()] == [".json"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["corpora", "shards"]
    whole = _open(tmp_path, spec, folder="whole")
    assert _tree(whole.path.parents[1] / "shards") == _tree(tmp_path / "cache" / "shards")


class _Slow(_Bytes):
    """Tells when it has begun, and goes on when it is told to."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self._fails = fail

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        self.begun.set()
        assert self.may_go_on.wait(30)
        if self._fails:
            _break()
        return super().encode(texts)


@pytest.mark.parametrize("openers", [1, 3])
@pytest.mark.parametrize("ending", ["built", "failed"])
def test_who_comes_second_waits_for_who_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, openers: int
) -> None:
    """If the builder fails, one of those that waited builds."""
    monkeypatch.setattr(cache, "_POLL_SECONDS", 0.01)
    spec = _spec(_corpus(tmp_path, "ab", "c"))
    slow = _Slow(fail=ending == "failed")
    waiting = threading.Barrier(openers + 1)
    outcomes: list[Any] = []
    log = _Log()

    def say(line: str) -> None:
        log.lines.append(line)
        if line.startswith("Waiting"):
            waiting.wait(30)

    def run(encoder: Any, voice: Voice) -> None:
        try:
            outcomes.append(open_or_build(spec, encoder, tmp_path / "cache", lambda stream: None, voice))
        except Exception as error:
            outcomes.append(error)

    builder = threading.Thread(target=run, args=(slow, _Log().voice))
    builder.start()
    assert slow.begun.wait(30)
    later = _Bytes() if ending == "failed" else _Never()
    others = [threading.Thread(target=run, args=(later, Voice(say, log.voice.progress))) for _ in range(openers)]
    for other in others:
        other.start()
    waiting.wait(30)
    slow.may_go_on.set()
    for thread in (builder, *others):
        thread.join(30)
    caches = [outcome for outcome in outcomes if isinstance(outcome, TokenCache)]
    failures = [repr(outcome) for outcome in outcomes if not isinstance(outcome, TokenCache)]
    assert failures == ([] if ending == "built" else ["RuntimeError('tokenizer broke')"])
    assert len(caches) == openers + (ending == "built")
    assert [opened.reused for opened in caches].count(False) == 1
    assert all(_tokens(opened) == [*b"ab", EOS, *b"c", EOS] for opened in caches)
    said = f"Waiting for another process that builds the token cache {caches[0].path}"
    assert log.lines.count(said) == openers
    assert [path.suffix for path in (tmp_path / "cache" / "corpora").iterdir()] == [".json"]


# --- Several processes ------------------------------------------------------------------------------------------

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "naïve", "日本語", "1234", "\U0001f600"]


@pytest.fixture(scope="module")
def fast() -> _Fast:
    """A small byte-level BPE."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>"], show_progress=False, initial_alphabet=core.pre_tokenizer.alphabet()
    )
    core.train_from_iterator([" ".join(WORDS) for _ in range(50)], trainer)
    return _Fast(core.to_str())


def _several(tmp_path: Path) -> list[Path]:
    """A corpus of all kinds of tasks: ranges, chains, a group of small files."""
    source = random.Random(3)
    texts = [" ".join(source.choices(WORDS, k=source.randrange(30))) for _ in range(300)]
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet", "d.jsonl.zst", "e.txt", "f.jsonl", "g.jsonl"]
    paths = [tmp_path / name for name in names]
    paths[0].write_bytes(_lines(*texts[:150]) + BAD)
    paths[1].write_bytes(gzip.compress(_lines(*texts[150:200])))
    pyarrow.parquet.write_table(pyarrow.table({"text": [*texts[200:250], None]}), paths[2], row_group_size=9)
    paths[3].write_bytes(zstandard.compress(_lines(*texts[250:270])))
    paths[4].write_text(texts[270])
    paths[5].write_bytes(_lines(*texts[271:280]))
    paths[6].write_bytes(_lines(*texts[280:]) + b"[1]\n")
    return paths


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path, fast: _Fast) -> None:
    spec = _spec(*_several(tmp_path), eos_id=0, on_bad_line="skip", shard_bytes=1500)
    logs = {number: _Log() for number in (1, 2)}
    opened = {
        number: _open(tmp_path, replace(spec, processes=number), fast, folder=f"cache{number}", log=log)
        for number, log in logs.items()
    }
    assert len(opened[1].stream.shards) > 15
    assert _tree(tmp_path / "cache1") == _tree(tmp_path / "cache2")
    assert opened[1].counts.skipped == {"malformed JSON": 1, "text not a string": 1, "not an object": 1}
    assert opened[1].counts == opened[2].counts
    assert logs[2].lines[0] == f"Tokenizing 7 files into {tmp_path / 'cache2'} with 2 processes"
    expected = [sum(file.size for file in spec.files), opened[1].stream.documents, opened[1].stream.tokens]
    for log in logs.values():
        assert [sum(values) for values in zip(*log.reports, strict=True)] == expected
    assert not multiprocessing.active_children()
    first = json.loads(spec.files[0].path.read_bytes().split(b"\n", 1)[0])["text"]
    assert _documents(opened[2])[0] == [*fast.encode([first])[0], 0]


def test_a_tokenizer_that_cannot_be_copied_works_in_one_process(tmp_path: Path) -> None:
    log = _Log()
    opened = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c"), shard_bytes=10, processes=2), log=log)
    assert _tokens(opened) == [*b"ab", EOS, *b"c", EOS]
    assert log.lines[:2] == [
        "This tokenizer cannot be copied to other processes: tokenizing in one process",
        f"Tokenizing 1 file into {tmp_path / 'cache'}",
    ]


@pytest.mark.parametrize(
    ("wanted", "size", "files", "processes"),
    [
        (None, 16 * 2**20 - 1, 9, 1),
        (None, 16 * 2**20, 9, 3),
        (2, 10, 9, 2),
        (7, 10, 9, 7),
        (7, 10, 2, 2),
        (1, 2**40, 2, 1),
    ],
)
def test_how_many_processes_there_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: int | None,
    size: int,
    files: int,
    processes: int,
) -> None:
    """One for a small corpus, as many as there are cores for others; never more than tasks (one a file here)."""
    monkeypatch.setattr(cache, "available_cores", lambda: 3)
    used: list[int] = []

    def build_in_processes(
        tasks: Sequence[Task], place: Workplace, serialized: str, processes: int, report: Report
    ) -> Any:
        used.append(processes)
        raise DataError("far enough", "")

    def in_one(*arguments: Any) -> Any:
        used.append(1)
        raise DataError("far enough", "")

    monkeypatch.setattr(workers, "build_in_processes", build_in_processes)
    monkeypatch.setattr(cache, "build_task", in_one)
    encoder = _Bytes()
    encoder.serialized = "{}"
    sizes = [size - files + 1, *[1] * (files - 1)]
    sources = tuple(
        SourceFile(Path(f"/{number}.gz"), "jsonl", "gzip", length, 0) for number, length in enumerate(sizes)
    )
    spec = CacheSpec(sources, "text", "error", None, EOS, processes=wanted, shard_bytes=1)
    with pytest.raises(DataError, match="far enough"):
        _open(tmp_path, spec, encoder)
    assert used == [processes]


def test_bad_input_of_a_worker_is_an_error_of_ours(tmp_path: Path, fast: _Fast) -> None:
    path = _with_bad_lines(tmp_path, "a.jsonl", 33)
    log = _Log()
    with pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(path, shard_bytes=64, processes=2, eos_id=0), fast, log=log)
    assert str(caught.value) == f"{path}:33: malformed JSON: Expecting value at column 1"
    assert caught.value.problems[0].fix == "correct the line, or set data.on_bad_line: skip"
    assert caught.value.see == "docs/data.md"
    assert not multiprocessing.active_children()
    assert log.lines == [f"Tokenizing 1 file into {tmp_path / 'cache'} with 2 processes"]


def test_a_full_disk_of_a_worker_is_named(tmp_path: Path, fast: _Fast) -> None:
    path = _corpus(tmp_path, *["text"] * 4000)
    with _largest_file(1000), pytest.raises(DataError) as caught:
        _open(tmp_path, _spec(path, shard_bytes=10_000, processes=2, eos_id=0), fast)
    assert str(caught.value) == (
        f"data.cache_dir: the token cache in {tmp_path / 'cache'} cannot be written: File too large"
    )
    assert not (tmp_path / "cache").exists()


def test_a_defect_in_a_worker_is_shown_with_its_traceback(tmp_path: Path, fast: _Fast) -> None:
    broken = _Fast(fast.serialized or "")
    broken.serialized = "{}"
    with pytest.raises(PreparationError) as caught:
        _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c"), shard_bytes=10, processes=2, eos_id=0), broken)
    assert str(caught.value).startswith("a tokenising process failed:\nTraceback (most recent call last):\n")
    assert caught.value.exit_code == 1
    assert caught.value.problems[0].fix == "this is a defect of the program; report it"
    assert _names(tmp_path) == ["data.jsonl"]


KILLED = (
    "a tokenising process ended without a word (exit code -9; -9 is what the system does when memory runs out)",
    "run it again, finished parts are kept; with less memory set data.num_workers lower",
)


def _kill_children() -> None:
    for child in multiprocessing.active_children():
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)


def test_a_killed_worker_ends_the_build_with_advice_and_finished_parts_stay(tmp_path: Path, fast: _Fast) -> None:
    """Killed with the first task done and the second one begun."""
    spec = _spec(*_several(tmp_path), eos_id=0, on_bad_line="skip", shard_bytes=1500)
    killed: list[bool] = []

    def report(size: int, documents: int, tokens: int) -> None:
        if documents and not killed and list((tmp_path / "cache" / "shards").glob("*/shard.json")):
            killed.append(True)
            _kill_children()

    with pytest.raises(PreparationError) as caught:
        _open(tmp_path, replace(spec, processes=2), fast, log=_Log(report))
    assert (caught.value.problems[0].what, caught.value.problems[0].fix) == KILLED
    assert not (tmp_path / "cache" / "building").exists()
    assert not list((tmp_path / "cache").glob("corpora/*"))
    finished = _states(tmp_path / "cache" / "shards")
    assert finished
    for folder in (tmp_path / "cache" / "shards").iterdir():
        ShardMeta.read(folder).verify(folder)
    _open(tmp_path, replace(spec, processes=2), fast)
    after = _states(tmp_path / "cache" / "shards")
    assert {name: after[name] for name in finished} == finished
    _open(tmp_path, replace(spec, processes=1), fast, folder="whole")
    assert _tree(tmp_path / "whole") == _tree(tmp_path / "cache")


def _tasks(tmp_path: Path) -> tuple[list[Task], Workplace]:
    files = resolve_files(str(_corpus(tmp_path, *[f"text {number}" for number in range(20)])))
    for name in ("shards", "workshop"):
        (tmp_path / name).mkdir()
    recipe = Recipe("fast", 399, "text", None, 0, 0, None)
    tasks = list(plan_tasks(files, ["a"], 100))
    assert len(tasks) > 3
    return tasks, Workplace(recipe, "error", tmp_path / "shards", tmp_path / "workshop")


def _expect_killed(tasks: list[Task], place: Workplace, fast: _Fast, report: Report) -> None:
    assert fast.serialized is not None
    with pytest.raises(PreparationError) as caught:
        workers.build_in_processes(tasks, place, fast.serialized, 1, report)
    assert (caught.value.problems[0].what, caught.value.problems[0].fix) == KILLED


def test_a_worker_that_is_killed_before_it_takes_its_task(
    tmp_path: Path, fast: _Fast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its task lies unread in the connection, which is then reset, not at its end."""
    tasks, place = _tasks(tmp_path)
    real = workers.wait

    def kill_and_wait(connections: Any) -> Any:
        _kill_children()
        return real(connections)

    monkeypatch.setattr(workers, "wait", kill_and_wait)
    _expect_killed(tasks, place, fast, lambda size, documents, tokens: None)


def test_a_worker_that_is_killed_while_it_waits_for_a_task(
    tmp_path: Path, fast: _Fast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next task cannot be handed over."""
    tasks, place = _tasks(tmp_path)
    real = workers.wait
    known: list[Any] = []

    def note_and_wait(connections: Any) -> Any:
        known[:] = connections
        return real(connections)

    def report(size: int, documents: int, tokens: int) -> None:
        if not documents:  # the last word about a task; that it is done comes next
            assert known[0].poll(30)
            _kill_children()

    monkeypatch.setattr(workers, "wait", note_and_wait)
    _expect_killed(tasks, place, fast, report)
    assert len(list((tmp_path / "shards").iterdir())) == 1


def test_a_task_can_be_built_by_itself(tmp_path: Path, fast: _Fast) -> None:
    tasks, place = _tasks(tmp_path)
    built = build_task(tasks[1], place, fast, lambda size, documents, tokens: None)
    again = build_task(tasks[1], place, _Never(), lambda size, documents, tokens: None)
    assert built == again
    assert [name for name, _ in built] == [tasks[1].shard_id(place.recipe, 0)]


# --- The digest -------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_the_content_wherever_it_lies(tmp_path: Path) -> None:
    """A run may be resumed on another machine, with the corpus elsewhere and the cache built anew."""
    path = _corpus(tmp_path, "ab", "c")
    first = _open(tmp_path, _spec(path))
    assert len(first.digest) == 64
    assert _open(tmp_path, _spec(path), _Never()).digest == first.digest
    touched = _open(tmp_path, _touch(path, _spec(path)))
    (tmp_path / "elsewhere").mkdir()
    moved = _open(tmp_path, _spec(path.rename(tmp_path / "elsewhere" / "other.jsonl")))
    parts = _corpus(tmp_path, "ab", name="1.jsonl"), _corpus(tmp_path, "", "c", name="2.jsonl")
    split = _open(tmp_path, _spec(*parts))
    wide = _open(tmp_path, _spec(*parts), _Bytes(largest_id=2**17))
    caches = (first, touched, moved, split, wide)
    assert len({opened.path for opened in caches}) == 5
    assert [opened.reused for opened in caches] == [False] * 5
    assert {opened.digest for opened in caches} == {first.digest}


CONTENTS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    # texts, what else differs
    "one byte": (("ab", "d"), {}),
    "the order": (("c", "ab"), {}),
    "a document more": (("ab", "c", "d"), {}),
    "a document less": (("ab",), {}),
    "the end token": (("ab", "c"), {"eos_id": BOS}),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_another_content_has_another_digest(tmp_path: Path, case: str) -> None:
    texts, changes = CONTENTS[case]
    first = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c")))
    other = _open(tmp_path, _spec(_corpus(tmp_path, *texts, name="other.jsonl"), **changes))
    assert other.digest != first.digest


def test_other_boundaries_of_the_same_tokens_have_another_digest(tmp_path: Path) -> None:
    first = _open(tmp_path, _spec(_corpus(tmp_path, "ab", "c"), eos_id=None))
    other = _open(tmp_path, _spec(_corpus(tmp_path, "a", "bc", name="other.jsonl"), eos_id=None))
    assert _tokens(first) == _tokens(other) == [*b"abc"]
    assert (_starts(first), _starts(other)) == ([0, 2, 3], [0, 1, 3])
    assert first.digest != other.digest


def _digest(documents: Sequence[Sequence[int]]) -> ContentDigest:
    digest = ContentDigest()
    for ids in documents:
        digest.add(np.array(ids, dtype=np.uint32))
    return digest


def test_digests_of_parts_can_be_joined_wherever_a_sequence_is_cut() -> None:
    documents = [[1, 2], [], [3], [], [], [2**32 - 1], [0], [0, 0]]
    whole = _digest(documents).hex()
    for first in range(len(documents) + 1):
        for second in range(first, len(documents) + 1):
            joined = _digest(documents[:first])
            joined.join(_digest(documents[first:second]))
            joined.join(_digest(documents[second:]))
            assert joined.hex() == whole
            assert joined.documents == 8


def test_digests_of_all_sequences_of_a_few_documents_differ() -> None:
    sequences: list[list[list[int]]] = [[]]
    for _ in range(4):
        sequences += [[*sequence, ids] for sequence in sequences for ids in ([], [0], [1], [0, 1], [256])]
    unique = {json.dumps(sequence) for sequence in sequences}
    assert len({_digest(json.loads(sequence)).hex() for sequence in unique}) == len(unique) > 700


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Its shards would hold a part of what it was; none of them is found again under its new time."""
    path = _corpus(tmp_path, "ab", "c")

    class _Writes(_Bytes):
        def encode(self, texts: Sequence[str]) -> list[list[int]]:
            with path.open("a") as handle:
                handle.write(json.dumps({"text": "more"}) + "\n")
            return super().encode(texts)

    with pytest.raises(DataError, match=r"data\.jsonl was changed while it was read"):
        _open(tmp_path, _spec(path), _Writes())
    assert _open(tmp_path, _spec(path)).stream.documents == 3
