"""Source files -> shards, by one process or several, with the same shards either way.

The files of a corpus are dealt out as tasks: a range of bytes of a large plain JSONL file, a file that can only be
read from its beginning (compressed, Parquet), a group of small files, or a token file. A task writes one shard or a
chain of them, each closed after `shard_bytes` of text. Which documents a shard holds depends on the files alone, so a
build that was killed goes on with the shards that are missing, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from eulerforge.data import token_files
from eulerforge.data.readers import BadRecord, DocumentCounts, Record, RecordReader, count_record, line_of_byte
from eulerforge.data.shards import BadLine, Cursor, ShardMeta, ShardWriter, new_shard
from eulerforge.data.sources import SourceFile

FORMAT_VERSION = 5
SHARD_BYTES = 8 * 2**20
"""Bytes of text in a shard of a small file: about 2 M tokens, some seconds of work."""

_LARGEST_SHARD = 32
"""How many times larger the shards of a large file are at most: a terabyte should be thousands of them."""

_SHARDS_OF_A_FILE = 32
"""Into about so many shards a file of middling size is cut."""

_EXPANSION = 4
"""What a compressed byte is taken for when small files are put together."""

_GROUP_DOCUMENTS = 1024
_GROUP_CHARACTERS = 1_000_000


class DocumentEncoder(Protocol):
    """What makes ids of texts."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""

    def encode_long(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of one text of any length, in bounded memory."""


@dataclass(frozen=True)
class Recipe:
    """What decides the ids of a text, besides the text.

    Attributes:
        tokenizer: its fingerprint.
        largest_id: the largest id it can give.
        bos_id, eos_id: None where the policy adds none.
        separator: the EOS that ends documents in token files, whether or not the policy adds one to texts.
        token_dtype: of raw token files.
    """

    tokenizer: str
    largest_id: int
    text_column: str
    bos_id: int | None
    eos_id: int | None
    separator: int | None
    token_dtype: str | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids in shards: as narrow as they fit."""
        return np.dtype("<u2" if self.largest_id < 2**16 else "<u4")


@dataclass(frozen=True)
class Task:
    """A part of a corpus that one process reads from its beginning to its end.

    Attributes:
        files: consecutive files of the corpus.
        identities: what each of them is known by.
        first_file: number of the first one in the corpus.
        start, end: bytes of the only file, for a range.
        shard_bytes: of text, after which a shard is closed.
    """

    files: tuple[SourceFile, ...]
    identities: tuple[str, ...]
    first_file: int
    shard_bytes: int
    start: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Bytes on disk."""
        whole = sum(file.size for file in self.files)
        return whole if self.end is None else min(self.end, whole) - self.start

    def shard_id(self, recipe: Recipe, number: int) -> str:
        """Name of a shard of the chain."""
        content = [FORMAT_VERSION, asdict(recipe), self.identities, self.start, self.end, self.shard_bytes, number]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def plan_tasks(
    files: Sequence[SourceFile], identities: Sequence[str], shard_bytes: int = SHARD_BYTES
) -> Iterator[Task]:
    """Deal out a corpus, in order.

    Args:
        shard_bytes: of small files.
    """
    group: list[int] = []
    filled = 0

    def task(numbers: Sequence[int], size: int) -> Task:
        chosen = slice(numbers[0], numbers[-1] + 1)
        return Task(tuple(files[chosen]), tuple(identities[chosen]), numbers[0], size)

    for number, file in enumerate(files):
        packed = file.compression != "none" or file.format == "parquet"
        plain = file.format == "jsonl" and not packed
        weight = file.size * (_EXPANSION if packed else 1)
        alone = file.holds_tokens or weight > shard_bytes
        if group and (alone or filled + weight > shard_bytes):
            yield task(group, shard_bytes)
            group, filled = [], 0
        size = _shard_size(weight, shard_bytes)
        if plain and alone:
            for start in range(0, file.size, size):
                yield Task((file,), (identities[number],), number, size, start, start + size)
        elif alone:
            yield task([number], size)
        else:
            group.append(number)
            filled += weight
    if group:
        yield task(group, shard_bytes)


def _shard_size(size: int, smallest: int) -> int:
    """Bytes of a shard of a file: a power of two times the smallest, which depends on nothing but the file."""
    factor = 1
    while factor < _LARGEST_SHARD and size > 2 * factor * smallest * _SHARDS_OF_A_FILE:
        factor *= 2
    return factor * smallest


@dataclass(frozen=True)
class Workplace:
    """Where and how shards are made, the same for all tasks.

    Attributes:
        shards: the folder of finished shards.
        workshop: the folder of shards that are being written, on the same file system.
        verify: a finished shard must be what was written, not only as long.
    """

    recipe: Recipe
    on_bad_line: Literal["error", "skip"]
    shards: Path
    workshop: Path
    verify: bool = False


class Report(Protocol):
    """Told what has been done: bytes of the corpus read, documents and tokens written."""

    def __call__(self, size: int, documents: int, tokens: int) -> None: ...


BuiltTask = list[tuple[str, ShardMeta]]
"""The shards of a task, in order: id and meta."""


def build_task(task: Task, place: Workplace, encoder: DocumentEncoder, report: Report) -> BuiltTask:
    """Make the shards of a task that are not there yet; all shards of the task.

    Raises:
        DataError: bad input.
        OSError: the shards cannot be written.
    """
    built: BuiltTask = []
    source = _TaskSource(task, place, report)
    cursor: Cursor | None = Cursor(0, 0)
    while cursor is not None:
        name = task.shard_id(place.recipe, len(built))
        meta = _finished(place.shards / name, place.verify)
        if meta is None:
            with new_shard(place.shards / name, place.workshop, *_storage(task, place.recipe)) as writer:
                if task.files[0].holds_tokens:
                    _index(task, place.recipe, writer, report)
                else:
                    source.go_to(cursor)
                    _fill(source, place, encoder, writer)
            meta = writer.meta
        if meta.first_bad is not None and place.on_bad_line == "error":
            bad = meta.first_bad
            raise BadRecord("", bad.what, bad.fix).error(source.place(bad.file, bad.line))
        built.append((name, meta))
        cursor = meta.next
    report(task.size - source.reported, 0, 0)
    return built


def _finished(folder: Path, verify: bool) -> ShardMeta | None:
    """A shard that is there and whole. A damaged one is removed: only its absence lets another take its place."""
    if not folder.is_dir():
        return None
    try:
        meta = ShardMeta.read(folder)
        if verify:
            meta.verify(folder)
        return meta
    except (OSError, EOFError, ValueError, LookupError, TypeError):
        shutil.rmtree(folder)
        return None


def _storage(task: Task, recipe: Recipe) -> tuple[np.dtype[Any], int | None]:
    """Dtype of a new shard, and where in a token file its ids begin."""
    if not task.files[0].holds_tokens:
        return recipe.dtype, None
    tokens = token_files.describe(task.files[0], recipe.token_dtype)
    return tokens.dtype, tokens.header


def _index(task: Task, recipe: Recipe, writer: ShardWriter, report: Report) -> None:
    tokens = token_files.describe(task.files[0], recipe.token_dtype)
    token_files.add_documents(
        tokens, writer, recipe.separator, recipe.largest_id, lambda documents, count: report(0, documents, count)
    )


class _TaskSource:
    """The records of a task, from any point on; stays open from one shard to the next."""

    def __init__(self, task: Task, place: Workplace, report: Report) -> None:
        self._task = task
        self._column = place.recipe.text_column
        self._report = report
        self.shard_bytes = task.shard_bytes
        self._records: Iterator[Record] = iter(())
        self._reader: RecordReader | None = None
        self._ahead: Record | None = None
        self._before = 0
        self.file = 0
        self.reported = 0

    def go_to(self, cursor: Cursor) -> None:
        """Read on from there, which costs nothing where the last shard has ended."""
        if self._reader is not None and self._ahead is not None and cursor == self.cursor:
            return
        self._before = sum(file.size for file in self._task.files[: cursor.file])
        self._open(cursor.file, cursor.lines)

    def _open(self, file: int, skip: int) -> None:
        task = self._task
        self.file = file
        self._reader = RecordReader(task.files[file], self._column, task.start, task.end, skip)
        self._records = iter(self._reader)
        self._advance()

    def _advance(self) -> None:
        self._ahead = next(self._records, None)
        while self._ahead is None and self.file + 1 < len(self._task.files):
            self._before += self._task.files[self.file].size
            self.file += 1
            self._reader = RecordReader(self._task.files[self.file], self._column)
            self._records = iter(self._reader)
            self._ahead = next(self._records, None)

    def take(self) -> tuple[int, Record] | None:
        """The next record and the file it is in, None at the end of the task."""
        if self._ahead is None:
            return None
        found = self.file, self._ahead
        self._advance()
        return found

    @property
    def cursor(self) -> Cursor | None:
        """Where the next record is, None at the end of the task."""
        return None if self._ahead is None else Cursor(self.file, self._ahead.number - 1)

    @property
    def lines(self) -> int:
        """Lines of the current file read so far."""
        assert self._reader is not None
        return self._reader.lines

    def report(self, documents: int, tokens: int) -> None:
        """Tell what has been read and written since the last time."""
        assert self._reader is not None
        position = min(self._before + self._reader.position, self._task.size)
        self._report(position - self.reported, documents, tokens)
        self.reported = position

    def place(self, file: int, line: int) -> str:
        """`file:line` of a record; counting lines before a range costs a pass, but only an error asks for it."""
        path = self._task.files[file].path
        return f"{path}:{line_of_byte(path, self._task.start) + line}"


@dataclass
class _Group:
    """Documents that are encoded together: enough to keep the tokenizer's threads busy, few in memory."""

    file: int
    texts: list[str]
    lines: list[int]
    characters: int = 0

    def add(self, text: str, line: int) -> None:
        self.texts.append(text)
        self.lines.append(line)
        self.characters += len(text)

    @property
    def is_full(self) -> bool:
        return len(self.texts) >= _GROUP_DOCUMENTS or self.characters >= _GROUP_CHARACTERS


def _fill(source: _TaskSource, place: Workplace, encoder: DocumentEncoder, writer: ShardWriter) -> None:
    """Move records into a shard until it is full or the task ends."""
    meta, size = writer.meta, 0
    counts = meta.counts
    group = _Group(source.file, [], [])
    while size < source.shard_bytes and (taken := source.take()) is not None:
        file, record = taken
        size += record.size
        if isinstance(record.text, BadRecord):
            if place.on_bad_line == "error":
                raise record.text.error(source.place(file, record.number))
            meta.first_bad = meta.first_bad or BadLine(file, record.number, record.text.what, record.text.fix)
        text = count_record(record, counts)
        is_long = text is not None and len(text) > _GROUP_CHARACTERS
        if group.is_full or is_long or file != group.file:
            _write(group, place.recipe, encoder, writer, source)
            group = _Group(file, [], [])
        if text is not None and is_long:
            _write_long(text, record.number, file, place.recipe, encoder, writer, source)
        elif text is not None:
            group.add(text, record.number)
    _write(group, place.recipe, encoder, writer, source)
    meta.next = source.cursor
    meta.lines = source.lines


def _write(group: _Group, recipe: Recipe, encoder: DocumentEncoder, writer: ShardWriter, source: _TaskSource) -> None:
    if not group.texts:
        return
    ids: list[int] = []
    lengths = []
    for document in encoder.encode(group.texts):
        start = len(ids)
        if recipe.bos_id is not None:
            ids.append(recipe.bos_id)
        ids += document
        if recipe.eos_id is not None:
            ids.append(recipe.eos_id)
        lengths.append(len(ids) - start)
    writer.add(np.array(ids, dtype=recipe.dtype), lengths, group.lines, group.file)
    source.report(len(lengths), len(ids))


def _write_long(
    text: str,
    line: int,
    file: int,
    recipe: Recipe,
    encoder: DocumentEncoder,
    writer: ShardWriter,
    source: _TaskSource,
) -> None:
    edges = [[] if token is None else [token] for token in (recipe.bos_id, recipe.eos_id)]
    before, after = (np.array(edge, dtype=np.uint32) for edge in edges)
    ids = np.concatenate([before, encoder.encode_long(text), after]).astype(recipe.dtype)
    writer.add(ids, [len(ids)], [line], file)
    source.report(1, len(ids))


def total_counts(built: Sequence[BuiltTask]) -> DocumentCounts:
    """What was met in all shards."""
    counts = DocumentCounts()
    for task in built:
        for _, meta in task:
            counts.add(meta.counts)
    return counts
